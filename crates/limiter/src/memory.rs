//! Limits of one process: the definition under sharded locks, bounded.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::future::ready;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, Millis};
use crate::limit::{Charge, Limit, demand};
use crate::quota::Algorithm;
use crate::reservation::{Decision, Denial, Hold, Reservation, Standing};
use crate::scope::Subject;
use crate::spec::{Correction, Reading, Receipt, Retry, State};
use crate::store::{Answer, Store};

#[cfg(feature = "persist")]
pub mod persist;
mod shard;
#[cfg(feature = "redis")]
mod stand_in;

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
    pub fn reserve(&self, charges: Vec<Charge>) -> Decision {
        match <[Charge; 1]>::try_from(charges) {
            Ok([charge]) => self.reserve_one(charge),
            Err(charges) => self.reserve_all(charges),
        }
    }

    /// Takes one charge for good, with nothing to settle and nothing to report: the shortest way. [`Retry::Now`]: it
    /// was taken, or its limit is a shadow. Calls in flight want [`MemoryStore::reserve`], which can end them.
    pub fn take(&self, charge: &Charge) -> Retry {
        let key = self.0.key(charge.subject());
        let mut shard = self.0.shard(&key);
        if shard.take(&key, charge, self.0.clock.now()).is_some() {
            return Retry::Now;
        }
        drop(shard);
        match self.reserve_all(vec![charge.clone()]) {
            Decision::Granted(_) => Retry::Now,
            Decision::Denied(denial) => denial.retry(),
        }
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
        for shard in &*self.0.shards {
            let one = lock(shard).occupancy();
            total.keyed += one.keyed;
            total.unauthenticated += one.unauthenticated;
            total.evicted_live += one.evicted_live;
        }
        total
    }
}

impl MemoryStore {
    /// The shorter way for the usual case: one charge, a counter that is there already, and room in it.
    fn reserve_one(&self, charge: Charge) -> Decision {
        let inner = &*self.0;
        let key = inner.key(charge.subject());
        let mut shard = inner.shard(&key);
        let now = inner.clock.now();
        let Some((receipt, state)) = shard.take(&key, &charge, now) else {
            drop(shard);
            return self.reserve_all(vec![charge]);
        };
        let reading = state.reading(charge.limit().rate(), now);
        drop(shard);
        let standings = vec![standing(charge, reading, true, Retry::Now)];
        let hold = Held { store: self.clone(), held: [(key, Some(receipt))] };
        Decision::Granted(Reservation::new(standings, now, Box::new(hold)))
    }

    fn reserve_all(&self, charges: Vec<Charge>) -> Decision {
        let inner = &*self.0;
        let keys = inner.keys(&charges);
        let mut locked = inner.lock(&keys);
        let now = inner.clock.now();
        let mut refused = false;
        let mut held = Vec::with_capacity(charges.len());
        let mut fitting = Vec::with_capacity(charges.len());
        for (index, (charge, key)) in charges.iter().zip(&keys).enumerate() {
            let state = locked.shard(key).state(key, charge.limit());
            let fits = fits_now(state, charge.limit(), now, demand(&charges, index));
            refused |= !fits && !charge.limit().is_shadow();
            fitting.push(fits);
        }
        if refused {
            let standings = stand(&mut locked, &keys, charges, now);
            drop(locked);
            return Decision::Denied(Denial::new(standings, now));
        }
        let mut standings = Vec::with_capacity(charges.len());
        for ((charge, key), fits) in charges.into_iter().zip(keys).zip(fitting) {
            let (standing, receipt) = take(locked.shard(&key), &key, charge, fits, now);
            standings.push(standing);
            held.push((key, receipt));
        }
        locked.each(|shard| shard.make_room(now));
        drop(locked);
        let hold = Held { store: self.clone(), held };
        Decision::Granted(Reservation::new(standings, now, Box::new(hold)))
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
        standings.push(standing(charge, state.reading(&rate, now), false, retry));
    }
    standings
}

fn standing(charge: Charge, reading: Reading, taken: bool, retry: Retry) -> Standing {
    let (limit, subject, requested) = charge.into_parts();
    Standing {
        limit,
        subject,
        requested,
        taken,
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
        return (standing(charge, state.reading(&rate, now), false, retry), None);
    }
    let state = shard.state_or_new(key, Class::of(charge.subject()), charge.limit(), now);
    let receipt = state.charge(&rate, now, charge.amount());
    let reading = state.reading(&rate, now);
    (standing(charge, reading, true, Retry::Now), Some(receipt))
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

    fn key(&self, subject: &Subject) -> Key {
        self.key_of(subject.shared_text())
    }

    fn key_of(&self, text: Arc<str>) -> Key {
        // The bytes alone: a subject is all that is hashed, so it needs no end mark.
        let mut hasher = self.hasher.build_hasher();
        hasher.write(text.as_bytes());
        Key::new(hasher.finish(), text)
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
        let last = self.shards.len() - 1;
        if mask.is_power_of_two() {
            return Locked {
                mask,
                only: Some(lock(&self.shards[mask.trailing_zeros() as usize])),
                guards: Vec::new(),
                last,
            };
        }
        let mut guards = Vec::with_capacity(mask.count_ones() as usize);
        let mut rest = mask;
        while rest != 0 {
            guards.push(lock(&self.shards[rest.trailing_zeros() as usize]));
            rest &= rest - 1;
        }
        Locked { mask, only: None, guards, last }
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

/// The shards of one decision, locked: the only one; or a bit per shard, and the guards in that order.
struct Locked<'s> {
    mask: u64,
    only: Option<MutexGuard<'s, Shard>>,
    guards: Vec<MutexGuard<'s, Shard>>,
    last: usize,
}

impl Locked<'_> {
    fn shard(&mut self, key: &Key) -> &mut Shard {
        if let Some(only) = &mut self.only {
            return only;
        }
        let lower = (1_u64 << key.place(self.last)) - 1;
        &mut self.guards[(self.mask & lower).count_ones() as usize]
    }

    fn each(&mut self, mut act: impl FnMut(&mut Shard)) {
        self.only.iter_mut().chain(&mut self.guards).for_each(|shard| act(shard));
    }
}

/// What a reservation holds of this store: of each charge its counter, and what was taken from it, if anything.
struct Held<H> {
    store: MemoryStore,
    held: H,
}

impl<H: AsRef<[(Key, Option<Receipt>)]> + Send + Sync> Hold for Held<H> {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        let inner = &*self.store.0;
        let now = inner.clock.now();
        let mut corrections = vec![Correction::default(); standings.len()];
        for (index, (standing, (key, receipt))) in standings.iter().zip(self.held.as_ref()).enumerate() {
            let over = (standing.limit.algorithm() == Algorithm::Concurrency).then_some(0);
            let (Some(receipt), Some(actual)) = (receipt, over.or(actual.get(index).copied())) else {
                continue;
            };
            let mut shard = inner.shard(key);
            corrections[index] = shard.settle(key, standing, now, receipt, actual);
            shard.make_room(now);
        }
        corrections
    }

    fn renew(&self, standings: &[Standing]) {
        let inner = &*self.store.0;
        let now = inner.clock.now();
        for (standing, (key, receipt)) in standings.iter().zip(self.held.as_ref()) {
            if let (Algorithm::Concurrency, Some(receipt)) = (standing.limit.algorithm(), receipt) {
                let mut shard = inner.shard(key);
                shard.renew(key, standing, now, receipt);
                shard.make_room(now);
            }
        }
    }
}
