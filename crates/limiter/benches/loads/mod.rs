//! What the benches measure, so that both measure the same.

use std::borrow::Cow;
use std::num::NonZeroU32;
use std::sync::Arc;

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tollgate_limiter::{
    Algorithm, Charge, Decision, Dimension, Limit, MemoryStore, Retry, Scope, Subject, SystemClock,
};

/// Distinct callers. More than fits into the nearest cache, as in a real server.
const CALLERS: usize = 10_000;

pub(crate) struct Load {
    names: Vec<String>,
    subjects: Vec<Subject>,
    governor: DefaultKeyedRateLimiter<String>,
    store: MemoryStore,
    limits: Vec<Arc<Limit>>,
    /// Four of each caller, side by side.
    charges: Vec<[Charge; 4]>,
}

impl Load {
    /// Limits that never refuse, because a grant is the longer way.
    pub(crate) fn new(algorithm: Option<Algorithm>) -> Load {
        let scope = Scope::of([Dimension::User]);
        let names: Vec<String> = (0..CALLERS).map(|n| format!("user-{n:05}")).collect();
        let texts = ["1M/minute", "100M/day", "100M tokens/minute", "1G tokens/day"];
        let algorithms = [
            algorithm.unwrap_or(Algorithm::TokenBucket),
            algorithm.unwrap_or(Algorithm::FixedWindow),
            algorithm.unwrap_or(Algorithm::SlidingWindow),
            algorithm.unwrap_or(Algorithm::TokenBucket),
        ];
        let limits = texts.iter().zip(algorithms).map(|(text, algorithm)| {
            let quota = text.parse().expect("a quota");
            Arc::new(Limit::new("bench", quota, algorithm, scope).expect("it can be counted"))
        });
        let million = NonZeroU32::new(1_000_000).expect("not 0");
        let limits: Vec<_> = limits.collect();
        let subjects: Vec<_> = names.iter().map(|name| scope.subject(|_| Cow::Borrowed(name))).collect();
        let all = |subject: &Subject| {
            std::array::from_fn(|index| Charge::new(Arc::clone(&limits[index]), subject.clone(), 1))
        };
        Load {
            charges: subjects.iter().map(all).collect(),
            subjects,
            governor: RateLimiter::keyed(Quota::per_minute(million)),
            store: MemoryStore::new(SystemClock),
            limits,
            names,
        }
    }

    /// governor: one limit, a key that is there already.
    #[inline(never)]
    pub(crate) fn governor(&self, turn: usize) -> bool {
        self.governor.check_key(&self.names[turn % CALLERS]).is_ok()
    }

    /// The same here, of the first `limits` of the four: a caller that is known, a verdict, nothing to settle.
    #[inline(never)]
    pub(crate) fn tollgate_take(&self, turn: usize, limits: usize) -> bool {
        self.store.take_all(&self.charges[turn % CALLERS][..limits]) == Retry::Now
    }

    /// The first `limits` of the four, of one caller, taken together, with a reservation to settle.
    #[inline(never)]
    pub(crate) fn tollgate_reserve(&self, turn: usize, limits: usize) -> bool {
        self.reserve(turn, limits).is_granted()
    }

    /// What a request costs from beginning to end: it is reserved, and every amount turns out to be another.
    #[inline(never)]
    pub(crate) fn tollgate_settle(&self, turn: usize, limits: usize) -> u64 {
        match self.reserve(turn, limits) {
            Decision::Granted(reservation) => {
                reservation.settle(&[2; 4]).iter().map(|correction| correction.charged).sum()
            }
            Decision::Denied(_) => 0,
        }
    }

    fn reserve(&self, turn: usize, limits: usize) -> Decision {
        let subject = &self.subjects[turn % CALLERS];
        let charge = |limit: &Arc<Limit>| Charge::new(Arc::clone(limit), subject.clone(), 1);
        self.store.reserve(self.limits[..limits].iter().map(charge))
    }
}
