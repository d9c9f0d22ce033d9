//! The counters that one set of charges meets: their names in Redis, and their terms, packed once.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::epoch::Epochs;
use super::pack::Packer;
use crate::limit::{Charge, Limit};
use crate::quota::Algorithm;
use crate::reservation::Standing;
use crate::scope::Subject;
use crate::spec::Rate;
use crate::store::{CHARGES_MAX, StoreError};

/// Two requests with equal plans meet the same counters at the same terms: they differ in their amounts only.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Of all of it.
    digest: u64,
    /// One per subject, one more for each that has calls in flight, and that of the epoch, if it is there.
    pub(super) keys: Vec<String>,
    /// The place of that, from 1; or 0.
    pub(super) epochs: usize,
    /// What the charging script is told about counters and charges.
    pub(super) set: Vec<u8>,
    /// The counter of each charge.
    pub(super) places: Vec<usize>,
    /// How many counters.
    pub(super) counters: usize,
    /// Whether what is granted waits for a replica.
    pub(super) waits: bool,
}

struct Counter<'c> {
    key: usize,
    /// Where its leases are, if it has such.
    leases: Option<usize>,
    limit: &'c Arc<Limit>,
    subject: &'c Subject,
}

impl Plan {
    /// Of a request. `epochs` says where those are written down; nowhere, where each key has to be alone.
    pub(super) fn of_charges(
        prefix: &str,
        epochs: Option<&Epochs>,
        charges: &[Charge],
    ) -> Result<Plan, StoreError> {
        let met = charges.iter().map(|charge| (charge.limit(), charge.subject()));
        let (mut keys, counters, places) = resolve(prefix, met, CHARGES_MAX)?;
        let epochs = add_epoch(&mut keys, epochs);
        let mut packer = Packer::default();
        packer.list(2);
        pack(&mut packer, &counters);
        packer.list(2 * charges.len());
        for (place, charge) in places.iter().zip(charges) {
            packer.number(*place as u64 + 1);
            packer.number(u64::from(charge.limit().is_shadow()));
        }
        let waits = charges.iter().any(|charge| charge.limit().waits());
        let counters = counters.len();
        Ok(Plan { digest: 0, keys, epochs, set: packer.0, places, counters, waits }.digested())
    }

    fn digested(self) -> Plan {
        let mut hasher = DefaultHasher::new();
        (&self.keys, &self.set, &self.places).hash(&mut hasher);
        Plan { digest: hasher.finish(), ..self }
    }

    /// Of a settlement, which knows no shadows.
    pub(super) fn of_standings(
        prefix: &str,
        epochs: Option<&Epochs>,
        standings: &[&Standing],
    ) -> Result<Plan, StoreError> {
        let met = standings.iter().map(|standing| (&standing.limit, &standing.subject));
        Plan::of_counters(prefix, epochs, met, CHARGES_MAX)
    }

    /// Of so many counters.
    pub(super) fn of_counters<'c>(
        prefix: &str,
        epochs: Option<&Epochs>,
        met: impl ExactSizeIterator<Item = (&'c Arc<Limit>, &'c Subject)>,
        most: usize,
    ) -> Result<Plan, StoreError> {
        let (mut keys, counters, places) = resolve(prefix, met, most)?;
        let epochs = add_epoch(&mut keys, epochs);
        let mut packer = Packer::default();
        pack(&mut packer, &counters);
        let counters = counters.len();
        Ok(Plan { digest: 0, keys, epochs, set: packer.0, places, counters, waits: false }.digested())
    }

    /// The keys without that of the epoch.
    pub(super) fn subjects(&self) -> &[String] {
        &self.keys[..self.keys.len() - usize::from(self.epochs > 0)]
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

/// Adds the key of the epoch, and says where.
fn add_epoch(keys: &mut Vec<String>, epochs: Option<&Epochs>) -> usize {
    let Some(key) = epochs.zip(keys.first()).map(|(epochs, beside)| epochs.key(beside)) else {
        return 0;
    };
    keys.push(key);
    keys.len()
}

/// Keys, counters in the order of their keys, and the counter of each charge.
#[allow(clippy::type_complexity)] // three lists that belong together only until they are packed
fn resolve<'c>(
    prefix: &str,
    met: impl ExactSizeIterator<Item = (&'c Arc<Limit>, &'c Subject)>,
    most: usize,
) -> Result<(Vec<String>, Vec<Counter<'c>>, Vec<usize>), StoreError> {
    if met.len() > most {
        let problem = format!("{} of them; at most {most} are allowed", met.len());
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
