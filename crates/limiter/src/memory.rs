//! Limits of one process: the definition under sharded locks, bounded.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::future::ready;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, Millis};
use crate::limit::Charge;
use crate::reservation::{Decision, Standing};
use crate::scope::Subject;
use crate::spec::Retry;
use crate::store::{Answer, Place, Store};

mod decision;
mod key;
mod locked;
#[cfg(feature = "persist")]
pub mod persist;
mod shard;
#[cfg(feature = "redis")]
mod stand_in;

use key::Key;
use shard::Shard;

/// A power of two, and no more than the bits of the mask of shards.
const SHARDS_MAX: usize = 64;
/// Below this a budget is kept in fewer shards, so that eviction has a choice.
const SUBJECTS_PER_SHARD_MIN: usize = 1_024;
/// Receipts of so many charges are kept without an allocation of their own.
const FEW: usize = 4;

/// How many subjects are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Of known callers.
    pub keyed: usize,
    /// Of strangers: those marked by [`Subject::unauthenticated`].
    pub unauthenticated: usize,
}

impl Default for Budgets {
    fn default() -> Budgets {
        Budgets { keyed: 1_000_000, unauthenticated: 100_000 }
    }
}

/// How full a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// Subjects of known callers.
    pub keyed: usize,
    /// Subjects of strangers.
    pub unauthenticated: usize,
    /// Subjects forgotten for want of room while something was still counted for them, since the start.
    pub evicted_live: u64,
}

/// Counters in the memory of this process. Clones share them.
///
/// A subject's counters live in one shard; a decision locks the shards of its subjects in order, reads the clock once,
/// and takes all or nothing. What it remembers is bounded: past a budget, which the shards share evenly, subjects with
/// nothing in use go first, then those nearest to it.
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

struct Inner {
    clock: Arc<dyn Clock>,
    hasher: RandomState,
    shards: Arc<[Mutex<Shard>]>,
    /// Last, so that it is dropped when nothing counts any more.
    #[cfg(feature = "persist")]
    keeper: Option<persist::Keeper>,
}

impl MemoryStore {
    /// An empty store with the default budgets.
    pub fn new(clock: impl Clock + 'static) -> MemoryStore {
        MemoryStore::with_budgets(clock, Budgets::default())
    }

    /// An empty store that remembers as many subjects as these.
    pub fn with_budgets(clock: impl Clock + 'static, budgets: Budgets) -> MemoryStore {
        MemoryStore(Arc::new(Inner::new(clock, budgets)))
    }

    /// Takes every charge, or none.
    pub fn reserve(&self, charges: impl IntoIterator<Item = Charge>) -> Decision {
        let standings: Vec<Standing> = charges.into_iter().map(Standing::unanswered).collect();
        match standings.len() {
            0..=1 => self.decide(standings, [None; 1]),
            2..=FEW => self.decide(standings, [None; FEW]),
            many => self.decide(standings, vec![None; many]),
        }
    }

    /// Takes every charge for good, or none, with nothing to settle and nothing to report: the shortest way.
    /// [`Retry::Now`]: each was taken, or its limit is a shadow. Calls in flight want [`MemoryStore::reserve`], which
    /// can end them.
    pub fn take_all(&self, charges: &[Charge]) -> Retry {
        if self.take_known(charges) {
            return Retry::Now;
        }
        self.take_any(charges)
    }

    /// [`MemoryStore::take_all`] of one charge.
    pub fn take(&self, charge: &Charge) -> Retry {
        self.take_all(std::slice::from_ref(charge))
    }

    /// What every limit would say to these charges. Changes nothing.
    pub fn peek(&self, charges: Vec<Charge>) -> Vec<Standing> {
        let mut standings: Vec<Standing> = charges.into_iter().map(Standing::unanswered).collect();
        let runs = self.0.runs(&standings);
        let mut locked = self.0.lock(&runs);
        let now = self.0.clock.now();
        locked.stand(&runs, &mut standings, now);
        standings
    }

    /// Forgets everything counted for a subject. Says whether there was anything.
    pub fn clear(&self, subject: &Subject) -> bool {
        let key = self.0.key(subject);
        self.0.shard(&key).remove(&key)
    }

    /// The store's time.
    pub fn now(&self) -> Millis {
        self.0.clock.now()
    }

    /// Some of the subjects that have counters, in order of their names, and where the next ones are; `None`: those were
    /// the last. Decisions about them wait for about a millisecond at most.
    pub fn walk(&self, from: Place) -> (Vec<Subject>, Option<Place>) {
        let Some(shard) = self.0.shards.get(from.shard) else { return (Vec::new(), None) };
        let texts = lock(shard).texts();
        let subjects = texts.into_iter().filter_map(|text| text.parse().ok());
        let mut subjects: Vec<Subject> = subjects.collect();
        subjects.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
        let next = from.shard + 1;
        (subjects, (next < self.0.shards.len()).then_some(Place { shard: next, cursor: 0 }))
    }

    /// The ids of the limits that have a counter of this subject.
    pub fn limits_of(&self, subject: &Subject) -> Vec<String> {
        let key = self.0.key(subject);
        self.0.shard(&key).limits_of(&key)
    }

    /// How full it is.
    pub fn occupancy(&self) -> Occupancy {
        let mut total = Occupancy { keyed: 0, unauthenticated: 0, evicted_live: 0 };
        for shard in &*self.0.shards {
            let one = lock(shard).occupancy();
            total.keyed += one.keyed;
            total.unauthenticated += one.unauthenticated;
            total.evicted_live += one.evicted_live;
        }
        total
    }
}

/// Answers at once.
impl Store for MemoryStore {
    fn reserve(&self, charges: Vec<Charge>) -> Answer<'_, Decision> {
        Box::pin(ready(Ok(MemoryStore::reserve(self, charges))))
    }

    fn peek(&self, charges: Vec<Charge>) -> Answer<'_, Vec<Standing>> {
        Box::pin(ready(Ok(MemoryStore::peek(self, charges))))
    }

    fn clear<'s>(&'s self, subject: &'s Subject) -> Answer<'s, bool> {
        Box::pin(ready(Ok(MemoryStore::clear(self, subject))))
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("occupancy", &self.occupancy()).finish()
    }
}

impl Inner {
    fn new(clock: impl Clock + 'static, budgets: Budgets) -> Inner {
        let wanted = budgets.keyed.min(budgets.unauthenticated) / SUBJECTS_PER_SHARD_MIN;
        let shards = wanted.clamp(1, SHARDS_MAX).next_power_of_two();
        let share =
            Budgets { keyed: budgets.keyed / shards, unauthenticated: budgets.unauthenticated / shards };
        Inner {
            clock: Arc::new(clock),
            hasher: RandomState::new(),
            shards: (0..shards).map(|_| Mutex::new(Shard::new(share))).collect(),
            #[cfg(feature = "persist")]
            keeper: None,
        }
    }

    #[inline]
    fn key(&self, subject: &Subject) -> Key {
        self.key_of(subject.shared_text())
    }

    #[inline]
    fn key_of(&self, text: Arc<str>) -> Key {
        // The bytes alone: a subject is all that is hashed, so it needs no end mark.
        let mut hasher = self.hasher.build_hasher();
        hasher.write(text.as_bytes());
        Key::new(hasher.finish(), text)
    }

    #[inline]
    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        lock(&self.shards[key.place(self.shards.len() - 1)])
    }
}

/// A shard is whole after every statement: a panic elsewhere while it was locked breaks nothing.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
