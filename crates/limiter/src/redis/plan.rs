//! The counters that one set of charges meets: their names in Redis, and their terms, packed once.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::pack::Packer;
use crate::limit::{Charge, Limit};
use crate::quota::Algorithm;
use crate::reservation::Standing;
use crate::scope::Subject;
use crate::spec::Rate;
use crate::store::StoreError;

/// The most charges that one request may meet.
pub(super) const CHARGES_MAX: usize = 64;

/// Two requests with equal plans meet the same counters at the same terms: they differ in their amounts only.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Of all of it.
    digest: u64,
    /// One per subject, and one more for each that has calls in flight.
    pub(super) keys: Vec<String>,
    /// What the charging script is told about counters and charges.
    pub(super) set: Vec<u8>,
    /// The counter of each charge.
    pub(super) places: Vec<usize>,
    /// How many counters.
    pub(super) counters: usize,
}

struct Counter<'c> {
    key: usize,
    /// Where its leases are, if it has such.
    leases: Option<usize>,
    limit: &'c Arc<Limit>,
    subject: &'c Subject,
}

impl Plan {
    /// Of a request.
    pub(super) fn of_charges(prefix: &str, charges: &[Charge]) -> Result<Plan, StoreError> {
        let met = charges.iter().map(|charge| (charge.limit(), charge.subject()));
        let (keys, counters, places) = resolve(prefix, met)?;
        let mut packer = Packer::default();
        packer.list(2);
        pack(&mut packer, &counters);
        packer.list(2 * charges.len());
        for (place, charge) in places.iter().zip(charges) {
            packer.number(*place as u64 + 1);
            packer.number(u64::from(charge.limit().is_shadow()));
        }
        Ok(Plan::new(keys, packer.0, places, counters.len()))
    }

    fn new(keys: Vec<String>, set: Vec<u8>, places: Vec<usize>, counters: usize) -> Plan {
        let mut hasher = DefaultHasher::new();
        (&keys, &set, &places).hash(&mut hasher);
        Plan { digest: hasher.finish(), keys, set, places, counters }
    }

    /// Of a settlement, which knows no shadows.
    pub(super) fn of_standings(prefix: &str, standings: &[&Standing]) -> Result<Plan, StoreError> {
        let met = standings.iter().map(|standing| (&standing.limit, &standing.subject));
        let (keys, counters, places) = resolve(prefix, met)?;
        let mut packer = Packer::default();
        pack(&mut packer, &counters);
        Ok(Plan::new(keys, packer.0, places, counters.len()))
    }
}

/// Once for all: plans are looked up again and again.
impl Hash for Plan {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.digest);
    }
}

/// `<prefix>:{<tag>}:rl:<scope>:<value>`
pub(super) fn key(prefix: &str, subject: &Subject) -> String {
    format!("{prefix}:{{{}}}:rl:{}", subject.tag(), subject.as_str())
}

/// Where a subject's leases are, of its limits on calls in flight.
pub(super) fn leases_key(key: &str) -> String {
    format!("{key}:c")
}

/// One field per limit and algorithm. The window is in the id; the capacity is not, so that a limit that was raised
/// or lowered keeps what was used.
fn field(limit: &Limit) -> String {
    let algorithm = match limit.algorithm() {
        Algorithm::FixedWindow => 'f',
        Algorithm::SlidingWindow => 's',
        Algorithm::MovingWindow => 'm',
        Algorithm::TokenBucket => 'b',
        Algorithm::Concurrency => 'c',
    };
    format!("{algorithm}:{}", limit.id())
}

/// Keys, counters in the order of their keys, and the counter of each charge.
#[allow(clippy::type_complexity)] // three lists that belong together only until they are packed
fn resolve<'c>(
    prefix: &str,
    met: impl ExactSizeIterator<Item = (&'c Arc<Limit>, &'c Subject)>,
) -> Result<(Vec<String>, Vec<Counter<'c>>, Vec<usize>), StoreError> {
    if met.len() > CHARGES_MAX {
        let problem = format!("{} of them; at most {CHARGES_MAX} are allowed", met.len());
        return Err(StoreError::Charges(problem));
    }
    let mut subjects: Vec<&Subject> = Vec::with_capacity(met.len());
    let mut counters: Vec<Counter<'c>> = Vec::with_capacity(met.len());
    let mut found = Vec::with_capacity(met.len());
    for (limit, subject) in met {
        let key = subjects.iter().position(|known| *known == subject).unwrap_or_else(|| {
            subjects.push(subject);
            subjects.len() - 1
        });
        let same = |counter: &Counter<'_>| counter.key == key && counter.limit.same_counter(limit);
        let counter = counters.iter().position(same).unwrap_or_else(|| {
            counters.push(Counter { key, leases: None, limit, subject });
            counters.len() - 1
        });
        if counters[counter].limit.rate() != limit.rate() {
            let problem = format!("`{}` of {subject} is met twice, with different quotas", limit.id());
            return Err(StoreError::Charges(problem));
        }
        found.push(counter);
    }
    let mut order: Vec<usize> = (0..counters.len()).collect();
    order.sort_by_key(|counter| counters[*counter].key);
    let mut place = vec![0; counters.len()];
    order.iter().enumerate().for_each(|(to, from)| place[*from] = to);
    counters.sort_by_key(|counter| counter.key);
    debug_assert!(counters.iter().all(|counter| subjects[counter.key] == counter.subject));
    let mut keys: Vec<String> = subjects.into_iter().map(|subject| key(prefix, subject)).collect();
    let mut last = None;
    for counter in counters.iter_mut().filter(|c| c.limit.algorithm() == Algorithm::Concurrency) {
        if last != Some(counter.key) {
            keys.push(leases_key(&keys[counter.key]));
            last = Some(counter.key);
        }
        counter.leases = Some(keys.len() - 1);
    }
    Ok((keys, counters, found.into_iter().map(|counter| place[counter]).collect()))
}

fn pack(packer: &mut Packer, counters: &[Counter<'_>]) {
    packer.list(counters.len());
    for counter in counters {
        let rate: &Rate = counter.limit.rate();
        packer.list(9 + usize::from(counter.leases.is_some()));
        packer.number(counter.key as u64 + 1);
        packer.text(&field(counter.limit));
        rate.numbers().into_iter().for_each(|number| packer.number(number));
        counter.leases.iter().for_each(|key| packer.number(*key as u64 + 1));
    }
}
