//! What several test files need: limits in one line, a small random source.
#![allow(dead_code)] // each test file uses its own part

#[cfg(feature = "redis")]
pub(crate) mod agreement;
#[cfg(feature = "redis-tls")]
pub(crate) mod fleet;
pub(crate) mod judge;
#[cfg(feature = "redis")]
pub(crate) mod proxy;
#[cfg(feature = "redis")]
pub(crate) mod resilient;
#[cfg(feature = "redis")]
pub(crate) mod server;

use std::borrow::Cow;
use std::sync::Arc;

use tollgate_limiter::{Algorithm, Charge, Decision, Denial, Dimension, Limit, Reservation, Scope, Subject};

/// 2026-11-14T00:00:00Z: a Saturday, midnight, so the start of every window up to a day.
pub(crate) const START: u64 = 1_794_614_400_000;

pub(crate) fn limit(rule: &str, quota: &str, algorithm: Algorithm) -> Arc<Limit> {
    let scope = Scope::of([Dimension::User]);
    let quota = quota.parse().unwrap_or_else(|error| panic!("{error}"));
    Arc::new(Limit::new(rule, quota, algorithm, scope).unwrap_or_else(|error| panic!("{error}")))
}

/// So many calls at a time.
pub(crate) fn slots(rule: &str, n: u64) -> Arc<Limit> {
    limit(rule, &format!("{n} concurrent"), Algorithm::Concurrency)
}

pub(crate) fn user(name: &str) -> Subject {
    Scope::of([Dimension::User]).subject(|_| Cow::Borrowed(name))
}

pub(crate) fn charge(limit: &Arc<Limit>, name: &str, amount: u64) -> Vec<Charge> {
    vec![Charge::new(Arc::clone(limit), user(name), amount)]
}

pub(crate) fn granted(decision: Decision) -> Reservation {
    match decision {
        Decision::Granted(reservation) => reservation,
        Decision::Denied(denial) => panic!("denied: {denial:?}"),
    }
}

pub(crate) fn denied(decision: Decision) -> Denial {
    match decision {
        Decision::Granted(reservation) => panic!("granted: {reservation:?}"),
        Decision::Denied(denial) => denial,
    }
}

pub(crate) fn window_ms(limit: &Limit) -> u64 {
    limit.window().longest().get()
}

/// SplitMix64: small, seeded, the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
