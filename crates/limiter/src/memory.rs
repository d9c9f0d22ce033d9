//! Limits of one process: the definition under sharded locks, bounded.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::future::ready;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, Millis};
use crate::limit::{Charge, Limit, demand};
use crate::reservation::{Decision, Denial, Hold, Reservation, Standing};
use crate::scope::Subject;
use crate::spec::{Correction, Receipt, Retry, State};
use crate::store::{Answer, Store};

mod shard;

use shard::{Class, Key, Shard};

/// A power of two, and no more than the bits of the mask of shards.
const SHARDS_MAX: usize = 64;
/// Below this a budget is kept in fewer shards, so that eviction has a choice.
const SUBJECTS_PER_SHARD_MIN: usize = 1_024;

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
    clock: Box<dyn Clock>,
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
}

impl MemoryStore {
    /// An empty store with the default budgets.
    pub fn new(clock: impl Clock + 'static) -> MemoryStore {
        MemoryStore::with_budgets(clock, Budgets::default())
    }

    /// An empty store that remembers as many subjects as these.
    pub fn with_budgets(clock: impl Clock + 'static, budgets: Budgets) -> MemoryStore {
        let wanted = budgets.keyed.min(budgets.unauthenticated) / SUBJECTS_PER_SHARD_MIN;
        let shards = wanted.clamp(1, SHARDS_MAX).next_power_of_two();
        let share =
            Budgets { keyed: budgets.keyed / shards, unauthenticated: budgets.unauthenticated / shards };
        MemoryStore(Arc::new(Inner {
            clock: Box::new(clock),
            hasher: RandomState::new(),
            shards: (0..shards).map(|_| Mutex::new(Shard::new(share))).collect(),
        }))
    }

    /// Takes every charge, or none.
    pub fn reserve(&self, charges: Vec<Charge>) -> Decision {
        let inner = &*self.0;
        let keys = inner.keys(&charges);
        let mut locked = inner.lock(&keys);
        let now = inner.clock.now();
        let mut fits = Vec::with_capacity(charges.len());
        for (index, (charge, key)) in charges.iter().zip(&keys).enumerate() {
            let state = locked.shard(key).state(key, charge.limit());
            fits.push(fits_now(state, charge.limit(), now, demand(&charges, index)));
        }
        let refused = |(fits, charge): (&bool, &Charge)| !fits && !charge.limit().is_shadow();
        if fits.iter().zip(&charges).any(refused) {
            let standings = stand(&mut locked, &keys, charges, now);
            drop(locked);
            return Decision::Denied(Denial::new(standings, now));
        }
        let mut standings = Vec::with_capacity(charges.len());
        let mut receipts = Vec::with_capacity(charges.len());
        for ((charge, key), fits) in charges.into_iter().zip(&keys).zip(fits) {
            let (standing, receipt) = take(locked.shard(key), key, charge, fits, now);
            standings.push(standing);
            receipts.push(receipt);
        }
        for shard in &mut locked.guards {
            shard.make_room(now);
        }
        drop(locked);
        let hold = Held { store: self.clone(), keys, receipts };
        Decision::Granted(Reservation::new(standings, now, Box::new(hold)))
    }

    /// What every limit would say to these charges. Changes nothing.
    pub fn peek(&self, charges: Vec<Charge>) -> Vec<Standing> {
        let keys = self.0.keys(&charges);
        let mut locked = self.0.lock(&keys);
        let now = self.0.clock.now();
        stand(&mut locked, &keys, charges, now)
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

    /// How full it is.
    pub fn occupancy(&self) -> Occupancy {
        let mut total = Occupancy { keyed: 0, unauthenticated: 0, evicted_live: 0 };
        for shard in &self.0.shards {
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

/// Re-dates if need be, which alone may be written with a denial, and asks.
fn fits_now(state: Option<&mut State>, limit: &Limit, now: Millis, amount: u64) -> bool {
    match state {
        Some(state) => {
            state.redate(limit.rate(), now);
            state.fits(limit.rate(), now, amount)
        }
        None => State::new(limit.rate(), 0).fits(limit.rate(), now, amount),
    }
}

/// The standings of charges that are not taken.
fn stand(locked: &mut Locked<'_>, keys: &[Key], charges: Vec<Charge>, now: Millis) -> Vec<Standing> {
    let demands: Vec<u64> = (0..charges.len()).map(|index| demand(&charges, index)).collect();
    let mut standings = Vec::with_capacity(charges.len());
    for ((charge, key), demand) in charges.into_iter().zip(keys).zip(demands) {
        let rate = *charge.limit().rate();
        let found = locked.shard(key).state(key, charge.limit());
        let mut state = found.map_or_else(|| State::new(&rate, 0), |state| state.clone());
        state.redate(&rate, now);
        let retry = state.wait(&rate, now, demand);
        standings.push(standing(charge, &state, now, None, retry));
    }
    standings
}

fn standing(charge: Charge, state: &State, now: Millis, receipt: Option<&Receipt>, retry: Retry) -> Standing {
    let reading = state.reading(charge.limit().rate(), now);
    let (limit, subject, requested) = charge.into_parts();
    Standing {
        limit,
        subject,
        requested,
        taken: receipt.is_some(),
        used: reading.used,
        remaining: reading.remaining,
        reset: reading.reset,
        retry,
    }
}

/// Takes one charge that fits; a shadow that does not only reports.
fn take(
    shard: &mut Shard,
    key: &Key,
    charge: Charge,
    fits: bool,
    now: Millis,
) -> (Standing, Option<Receipt>) {
    let rate = *charge.limit().rate();
    if !fits {
        let found = shard.state(key, charge.limit());
        let state = found.map_or_else(|| State::new(&rate, 0), |state| state.clone());
        let retry = state.wait(&rate, now, charge.amount());
        return (standing(charge, &state, now, None, retry), None);
    }
    let state = shard.state_or_new(key, Class::of(charge.subject()), charge.limit(), now);
    let receipt = state.charge(&rate, now, charge.amount());
    (standing(charge, state, now, Some(&receipt), Retry::Now), Some(receipt))
}

impl Inner {
    fn key(&self, subject: &Subject) -> Key {
        Key::new(self.hasher.hash_one(subject.as_str()), subject.shared_text())
    }

    /// One key per charge; neighbours of the same subject are hashed once.
    fn keys(&self, charges: &[Charge]) -> Vec<Key> {
        let mut keys: Vec<Key> = Vec::with_capacity(charges.len());
        for charge in charges {
            let key = match keys.last() {
                Some(last) if last.is(charge.subject()) => last.clone(),
                _ => self.key(charge.subject()),
            };
            keys.push(key);
        }
        keys
    }

    /// Locks every shard of these keys, in the order of the shards: two decisions never wait for each other.
    fn lock(&self, keys: &[Key]) -> Locked<'_> {
        let mask = keys.iter().fold(0_u64, |mask, key| mask | 1 << self.place(key));
        let mut guards = Vec::with_capacity(mask.count_ones() as usize);
        let mut rest = mask;
        while rest != 0 {
            guards.push(lock(&self.shards[rest.trailing_zeros() as usize]));
            rest &= rest - 1;
        }
        Locked { mask, guards, last: self.shards.len() - 1 }
    }

    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.place(key)])
    }

    fn place(&self, key: &Key) -> usize {
        key.place(self.shards.len() - 1)
    }
}

/// A shard is whole after every statement: a panic elsewhere while it was locked breaks nothing.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shards of one decision, locked: a bit per shard, and the guards in that order.
struct Locked<'s> {
    mask: u64,
    guards: Vec<MutexGuard<'s, Shard>>,
    last: usize,
}

impl Locked<'_> {
    fn shard(&mut self, key: &Key) -> &mut Shard {
        let lower = (1_u64 << key.place(self.last)) - 1;
        &mut self.guards[(self.mask & lower).count_ones() as usize]
    }
}

/// What a reservation holds of this store.
struct Held {
    store: MemoryStore,
    keys: Vec<Key>,
    receipts: Vec<Option<Receipt>>,
}

impl Hold for Held {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        let inner = &*self.store.0;
        let now = inner.clock.now();
        let mut corrections = vec![Correction::default(); standings.len()];
        for (index, actual) in actual.iter().enumerate().take(standings.len()) {
            let (Some(receipt), key, standing) =
                (&self.receipts[index], &self.keys[index], &standings[index])
            else {
                continue;
            };
            let mut shard = inner.shard(key);
            corrections[index] = shard.settle(key, standing, now, receipt, *actual);
            shard.make_room(now);
        }
        corrections
    }
}
