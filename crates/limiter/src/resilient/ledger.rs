//! What this process counts by itself while the shared store does not answer.
//!
//! Of every counter there are two: `all` is in a store in memory, at this process's share of the limit, and decides.
//! `known` is the part of it that the shared store has, too: what was seen there before the failure, and what has been
//! charged there since. The difference is our own, and owed to the shared store.
//!
//! # A charge that is not answered
//! Nobody knows whether it was made. Every charge is numbered, and the shared store writes down the last number of each
//! process beside the counter. So the store is asked: charged with nothing under the same number, it says whether that
//! was there before, and if not, the charge is never made, should it still arrive.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mirror::{Glimpse, Mirror};
use crate::clock::{Clock, Millis};
use crate::limit::{Charge, Limit};
use crate::memory::{Budgets, MemoryStore};
use crate::quota::Algorithm;
use crate::scope::Subject;
use crate::spec::{Receipt, State};

/// Subjects whose debt to the shared store is kept.
const SUBJECTS_MAX: usize = 100_000;
const SHARDS: usize = 16;
const SHARD_MAX: usize = SUBJECTS_MAX / SHARDS;
/// Between two searches of a full shard for counters with nothing in use.
const SWEEP_PAUSE: Millis = Millis(1_000);
/// Shares of so many limits are kept; then all are made anew.
const SHARES_MAX: usize = 4_096;
/// So many payments of a counter are known, for what is given back of them.
const PAID_MAX: usize = 4;
/// The lives of counters begun here are told apart from those that the store in memory numbers.
const FIRST_LIFE: u64 = 1 << 63;

/// One failure of the shared store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failing {
    pub(super) number: u64,
    /// When it began, by the store's time.
    pub(super) since: Millis,
    /// How many share the limits until it ends.
    pub(super) instances: u32,
}

/// The counters of this process, and what it owes.
pub(super) struct Ledger<C> {
    pub(super) memory: MemoryStore,
    clock: C,
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
    shares: Mutex<HashMap<usize, Share>>,
    lives: AtomicU64,
    /// The order of the last debt.
    orders: AtomicU64,
    forgotten: AtomicU64,
}

/// The share of a limit, and the limit, which keeps its address its own.
struct Share {
    limit: Arc<Limit>,
    instances: u32,
    share: Arc<Limit>,
}

#[derive(Default)]
struct Shard {
    subjects: HashMap<Arc<str>, Vec<Account>>,
    /// Subjects with an account that may owe something.
    owing: Vec<Arc<str>>,
    swept: Millis,
}

/// One counter.
struct Account {
    limit: Arc<Limit>,
    share: Arc<Limit>,
    subject: Subject,
    /// The failure it was last begun for, and what had been seen of it in the shared store by then.
    failing: u64,
    seen: Option<Glimpse>,
    known: State,
    owing: bool,
    /// The number of the last debt that was taken.
    asked: u64,
    /// Those paid last.
    paid: Vec<Paid>,
    /// One that the shared store was sent and did not answer: before anything else it is asked whether it was charged.
    unsure: Option<Unsure>,
}

/// A debt that the shared store was charged, or not.
struct Unsure {
    order: u64,
    amount: u64,
    at: Millis,
}

/// A debt that the shared store was charged.
struct Paid {
    number: u64,
    /// To give some of it back: of the shared store, and of `known`.
    there: Receipt,
    here: Receipt,
}

/// What one counter owes.
#[derive(Clone, Debug)]
pub(super) struct Debt {
    pub(super) limit: Arc<Limit>,
    pub(super) subject: Subject,
    pub(super) amount: u64,
    /// Among those of its counter.
    pub(super) number: u64,
    /// Among all of this process: by this the shared store knows what it was charged.
    pub(super) order: u64,
    /// When it was taken, by the store's time.
    at: Millis,
    /// It was sent before, and not answered. Nothing is charged now.
    pub(super) is_question: bool,
}

impl<C: Clock + Clone + 'static> Ledger<C> {
    pub(super) fn new(clock: C, budgets: Budgets) -> Ledger<C> {
        Ledger {
            memory: MemoryStore::with_budgets(clock.clone(), budgets),
            clock,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            shares: Mutex::default(),
            lives: AtomicU64::new(FIRST_LIFE),
            orders: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
        }
    }

    /// Accounts with something in use that were forgotten for want of room.
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::Relaxed)
    }

    /// The charge as this process may take it: against its share of the limit. A counter that is met for the first
    /// time in this failure begins with what is not left of its share.
    pub(super) fn share(&self, failing: &Failing, mirror: &Mirror, charge: Charge) -> Charge {
        let (limit, subject, amount) = charge.into_parts();
        let share = self.share_of(&limit, failing.instances);
        // Calls in flight are leases: those of this process are in memory already.
        if limit.algorithm() != Algorithm::Concurrency {
            self.begin(failing, mirror, &limit, &share, &subject);
        }
        Charge::new(share, subject, amount)
    }

    /// Our own use of a counter has changed.
    pub(super) fn touched(&self, limit: &Limit, subject: &Subject) {
        let mut shard = self.shard(subject);
        let accounts = shard.subjects.get_mut(subject.as_str());
        let account = accounts.and_then(|all| all.iter_mut().find(|a| a.limit.same_counter(limit)));
        if account.is_some_and(|account| !std::mem::replace(&mut account.owing, true)) {
            shard.owing.push(subject.shared_text());
        }
    }

    /// Takes what at most this many subjects owe, one list per subject. Whoever is not [paid](Ledger::paid) is to be
    /// [touched](Ledger::touched) again.
    pub(super) fn debts(&self, subjects_max: usize) -> Vec<Vec<Debt>> {
        let now = self.clock.now();
        let mut all = Vec::new();
        for shard in &self.shards {
            let mut shard = lock(shard);
            while all.len() < subjects_max {
                let Some(name) = shard.owing.pop() else { break };
                let Some(accounts) = shard.subjects.get_mut(&name) else { continue };
                let debts: Vec<Debt> =
                    accounts.iter_mut().filter_map(|account| self.debt(account, now)).collect();
                if !debts.is_empty() {
                    all.push(debts);
                }
            }
        }
        all
    }

    /// The shared store was charged this at `now`.
    pub(super) fn paid(&self, debt: &Debt, now: Millis, there: Receipt) {
        self.with(&debt.limit, &debt.subject, |account| {
            let here = account.pay(debt.amount, now);
            if account.paid.len() == PAID_MAX {
                account.paid.remove(0);
            }
            account.paid.push(Paid { number: debt.number, there, here });
        });
    }

    /// The shared store has so much of our own already.
    pub(super) fn known(&self, limit: &Limit, subject: &Subject, amount: u64, now: Millis) {
        self.with(limit, subject, |account| {
            account.pay(amount, now);
        });
    }

    /// The shared store was sent this and did not answer.
    pub(super) fn unsure(&self, debt: &Debt) {
        if !debt.is_question {
            let &Debt { order, amount, at, .. } = debt;
            self.with(&debt.limit, &debt.subject, |account| {
                account.unsure = Some(Unsure { order, amount, at })
            });
        }
    }

    /// The shared store has answered the question: it was charged then, or will never be.
    pub(super) fn answered(&self, question: &Debt, charged: bool) {
        self.with(&question.limit, &question.subject, |account| {
            let asked = account.unsure.take_if(|unsure| unsure.order == question.order);
            if let Some(Unsure { amount, at, .. }) = asked.filter(|_| charged) {
                account.known.charge(account.share.rate(), at, amount);
            }
        });
        // The rest is still owed.
        self.touched(&question.limit, &question.subject);
    }

    fn with(&self, limit: &Limit, subject: &Subject, change: impl FnOnce(&mut Account)) {
        let mut shard = self.shard(subject);
        let accounts = shard.subjects.get_mut(subject.as_str());
        let account =
            accounts.and_then(|all| all.iter_mut().find(|account| account.limit.same_counter(limit)));
        if let Some(account) = account {
            change(account);
        }
    }

    /// The number of the last debt: what was taken before this is asked is part of the next one, for certain.
    pub(super) fn asked(&self, limit: &Limit, subject: &Subject) -> u64 {
        let shard = self.shard(subject);
        let accounts = shard.subjects.get(subject.as_str());
        let account = accounts.and_then(|all| all.iter().find(|account| account.limit.same_counter(limit)));
        account.map_or(0, |account| account.asked)
    }

    /// Less was used than was taken right after debt `asked`. If the next one was paid, the shared store has too much: the
    /// limit, what was charged there of it, and how much of that is too much.
    pub(super) fn overpaid(
        &self,
        limit: &Limit,
        subject: &Subject,
        asked: u64,
        less: u64,
    ) -> Option<(Arc<Limit>, Receipt, u64)> {
        let now = self.clock.now();
        let mut shard = self.shard(subject);
        let accounts = shard.subjects.get_mut(subject.as_str())?;
        let account = accounts.iter_mut().find(|account| account.limit.same_counter(limit))?;
        let paid = account.paid.iter_mut().find(|paid| paid.number == asked + 1)?;
        let (there, here) = (paid.there, paid.here);
        let less = less.min(there.amount()).min(here.amount());
        (paid.there, paid.here) = (there.of(there.amount() - less), here.of(here.amount() - less));
        account.known.correct(account.share.rate(), now, &here, here.amount() - less);
        (less > 0).then(|| (Arc::clone(&account.limit), there, less))
    }

    /// Forgets a subject.
    pub(super) fn forget(&self, subject: &Subject) {
        let mut shard = self.shard(subject);
        shard.subjects.remove(subject.as_str());
        self.memory.clear(subject);
    }

    fn begin(
        &self,
        failing: &Failing,
        mirror: &Mirror,
        limit: &Arc<Limit>,
        share: &Arc<Limit>,
        subject: &Subject,
    ) {
        let mut shard = self.shard(subject);
        if !shard.subjects.contains_key(subject.as_str()) {
            self.make_room(&mut shard);
        }
        let accounts = match shard.subjects.entry(subject.shared_text()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Vec::with_capacity(1)),
        };
        let place = accounts.iter().position(|account| account.limit.same_counter(limit));
        let account = match place {
            Some(place) => &mut accounts[place],
            None => {
                accounts.push(Account {
                    limit: Arc::clone(limit),
                    share: Arc::clone(share),
                    subject: subject.clone(),
                    failing: 0,
                    seen: None,
                    known: State::new(share.rate(), self.life()),
                    owing: false,
                    asked: 0,
                    paid: Vec::new(),
                    unsure: None,
                });
                let last = accounts.len() - 1;
                &mut accounts[last]
            }
        };
        let glimpse = mirror.glimpse(limit, subject);
        let begun = account.failing == failing.number;
        if begun && !Arc::ptr_eq(&account.limit, limit) {
            (account.limit, account.share) = (Arc::clone(limit), Arc::clone(share));
        }
        if begun && account.seen == glimpse {
            return;
        }
        account.seen = glimpse;
        let at = if begun { self.clock.now() } else { failing.since };
        let seen = mirror.level(limit, subject, at);
        let left = limit.capacity().saturating_sub(seen).div_ceil(u64::from(failing.instances));
        let gone = share.capacity().saturating_sub(left);
        // A shared store that fails now and then grants something in between. Nothing is added to a share, though: what
        // it was charged is not left to all.
        if begun && gone <= account.known.reading(share.rate(), at).used {
            return;
        }
        let own = self.own(account, at);
        (account.limit, account.share, account.failing) =
            (Arc::clone(limit), Arc::clone(share), failing.number);
        // What is our own is not in what was seen.
        let spent = gone.saturating_add(own).min(share.capacity());
        self.memory.restart(share, subject, self.life(), at, spent);
        account.known = State::new(share.rate(), self.life());
        account.known.charge(share.rate(), at, spent.saturating_sub(own));
        if let Some(unsure) = &mut account.unsure {
            // What has run out since is owed no more, charged or not.
            (unsure.amount, unsure.at) = (unsure.amount.min(own), at);
        }
    }

    fn debt(&self, account: &mut Account, now: Millis) -> Option<Debt> {
        if !std::mem::take(&mut account.owing) {
            return None;
        }
        let (limit, subject) = (Arc::clone(&account.limit), account.subject.clone());
        let debt = |amount, number, order, at, is_question| Debt {
            limit,
            subject,
            amount,
            number,
            order,
            at,
            is_question,
        };
        if let Some(Unsure { order, at, .. }) = account.unsure {
            return Some(debt(0, account.asked, order, at, true));
        }
        let amount = self.own(account, now);
        account.asked += 1;
        let order = || self.orders.fetch_add(1, Ordering::Relaxed) + 1;
        (amount > 0).then(|| debt(amount, account.asked, order(), now, false))
    }

    /// What is in use of our own.
    fn own(&self, account: &Account, now: Millis) -> u64 {
        let all = self.memory.used(&account.share, &account.subject, now);
        all.saturating_sub(account.known.reading(account.share.rate(), now).used)
    }

    fn share_of(&self, limit: &Arc<Limit>, instances: u32) -> Arc<Limit> {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let address = Arc::as_ptr(limit) as usize;
        let same = |found: &&Share| found.instances == instances && Arc::ptr_eq(&found.limit, limit);
        if let Some(found) = shares.get(&address).filter(same) {
            return Arc::clone(&found.share);
        }
        if shares.len() >= SHARES_MAX {
            shares.clear();
        }
        let share = Arc::new(limit.share(instances));
        shares.insert(address, Share { limit: Arc::clone(limit), instances, share: Arc::clone(&share) });
        share
    }

    /// Forgets accounts without anything in use; when there are none, any one.
    fn make_room(&self, shard: &mut Shard) {
        if shard.subjects.len() < SHARD_MAX {
            return;
        }
        let now = self.clock.now();
        if now >= shard.swept + SWEEP_PAUSE {
            shard.swept = now;
            let in_use = |account: &Account| {
                account.owing || self.memory.used(&account.share, &account.subject, now) > 0
            };
            shard.subjects.retain(|_, accounts| accounts.iter().any(in_use));
        }
        if shard.subjects.len() >= SHARD_MAX {
            let first = shard.subjects.keys().next().cloned();
            first.and_then(|first| shard.subjects.remove(&first));
            self.forgotten.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn life(&self) -> u64 {
        self.lives.fetch_add(1, Ordering::Relaxed)
    }

    fn shard(&self, subject: &Subject) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(subject.as_str()) as usize % SHARDS])
    }
}

impl Account {
    /// The shared store has so much more of it.
    fn pay(&mut self, amount: u64, now: Millis) -> Receipt {
        self.known.redate(self.share.rate(), now);
        self.known.charge(self.share.rate(), now, amount)
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod fleet;
#[cfg(test)]
mod tests;
