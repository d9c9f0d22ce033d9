//! What happens while the shared store does not answer: deciding all the same, and making it good afterwards.
//!
//! A [`ResilientStore`] asks a [`RedisStore`] until that fails too often. Then nobody waits for it any more: every
//! limit does what [`Limit::when_down`](crate::Limit::when_down) says, in this process alone. A probe now and then
//! finds out when it is back; it is charged what was admitted meanwhile, and decides again.
//!
//! # The share
//! With N processes and a limit of L, a process admits, in the window in which the store fails, the N-th part of what
//! was left when it last saw the counter, and the N-th part of L in every later one, both rounded up. So all of them
//! admit at most L + N in a window without the store. When they had seen different counts, at worst
//! L + (N − 1)·⌈L/N⌉ in the window of the failure; when only k of N lose the store, L + k·⌈L/N⌉ per window, because
//! the others go on counting together. N is how many were heard of when the store last answered; before that it is
//! what [`ResilientOptions::instances`] says.

use std::fmt;
use std::future::ready;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::clock::{Clock, Millis};
use crate::limit::Charge;
use crate::memory::Budgets;
use crate::redis::RedisStore;
use crate::reservation::{Decision, Reservation, Standing};
use crate::scope::Subject;
use crate::store::{Answer, Source, Store, StoreError};

mod breaker;
mod calls;
mod circuit;
mod clock;
mod counts;
mod fleet;
mod healing;
mod keeper;
mod ledger;
mod local;
mod mirror;
mod settlements;

pub use circuit::{Circuit, Failure};
pub use counts::ResilientCounts;
pub use fleet::Instances;

use breaker::Breaker;
use calls::Calls;
use clock::StoreClock;
use counts::{Tally, add};
use fleet::Fleet;
use healing::Healing;
use ledger::{Failing, Ledger};
use mirror::Mirror;
use settlements::{Held, Settlements};

/// When it is worth asking again what only the store can grant: by then it may be back.
const RETRY: Millis = Millis(1_000);
/// A store that has failed once more so long after it answered again has not come back then.
const RETURN_KEPT: Duration = Duration::from_secs(1);

/// How a store behaves while the shared one does not answer.
#[derive(Clone)]
pub struct ResilientOptions {
    instances: u32,
    budgets: Budgets,
    listener: Arc<Listener>,
}

type Listener = dyn Fn(Circuit) + Send + Sync;

impl Default for ResilientOptions {
    fn default() -> ResilientOptions {
        ResilientOptions { instances: 1, budgets: Budgets::default(), listener: Arc::new(|_| {}) }
    }
}

impl ResilientOptions {
    /// How many processes share the limits, until heartbeats tell: what was configured, or what
    /// [`ResilientStore::instances`] said before a restart. 1 when nobody says; 0 counts as 1.
    pub fn instances(self, instances: u32) -> ResilientOptions {
        ResilientOptions { instances, ..self }
    }

    /// How many subjects are counted here while the shared store does not answer.
    pub fn budgets(self, budgets: Budgets) -> ResilientOptions {
        ResilientOptions { budgets, ..self }
    }

    /// Told about every change, in order, once each. It must not block, and must not ask the store.
    pub fn on_change(self, listener: impl Fn(Circuit) + Send + Sync + 'static) -> ResilientOptions {
        ResilientOptions { listener: Arc::new(listener), ..self }
    }
}

impl fmt::Debug for ResilientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResilientOptions").field("instances", &self.instances).finish_non_exhaustive()
    }
}

/// A store in Redis that goes on deciding while Redis does not answer. Clones share everything.
///
/// Every decision is labelled with its [`Source`]: [`Share`](Source::Share) when this process counted at least one of
/// the limits, [`Open`](Source::Open) when nothing was counted. A limit that lets nothing pass is
/// [`StoreError::Closed`]. Standings of shares show the share: its capacity, and what is left of it.
#[derive(Clone)]
pub struct ResilientStore(Arc<Inner>);

struct Inner {
    redis: RedisStore,
    /// By which this process is known to the others.
    name: String,
    clock: StoreClock,
    mirror: Mirror,
    ledger: Ledger<StoreClock>,
    settlements: Settlements,
    calls: Calls,
    healing: Healing,
    fleet: Mutex<Fleet>,
    /// As in `state`, for those who only want to know whether to ask.
    open: AtomicBool,
    /// Somebody was not answered in time.
    suspected: AtomicBool,
    state: Mutex<State>,
    tally: Tally,
    wake: Arc<Notify>,
    listener: Arc<Listener>,
}

struct State {
    circuit: Circuit,
    breaker: Breaker,
    failing: Option<Failing>,
    failures: u64,
    /// Since when the store has answered again, while it is not asked yet.
    returning: Option<Instant>,
}

impl ResilientStore {
    /// Stands before `redis`, with a task in the background on the runtime that the store in Redis uses. It need not
    /// be connected: as long as it is not, it counts as failing.
    pub fn new(redis: RedisStore, options: ResilientOptions) -> ResilientStore {
        let (clock, wake) = (StoreClock::new(), Arc::new(Notify::new()));
        let runtime = redis.runtime().clone();
        let inner = Arc::new(Inner {
            name: format!("{:016x}", RandomState::new().hash_one("instance")),
            mirror: Mirror::new(),
            ledger: Ledger::new(clock.clone(), options.budgets),
            clock,
            settlements: Settlements::default(),
            calls: Calls::default(),
            healing: Healing::new(redis.masters_changed()),
            fleet: Mutex::new(Fleet::new(options.instances)),
            open: AtomicBool::new(false),
            suspected: AtomicBool::new(false),
            state: Mutex::new(State {
                circuit: Circuit::Closed,
                breaker: Breaker::new(Instant::now()),
                failing: None,
                failures: 0,
                returning: None,
            }),
            tally: Tally::default(),
            wake: Arc::clone(&wake),
            listener: options.listener,
            redis,
        });
        for changes in [inner.redis.masters_changed(), inner.redis.connections()] {
            drop(runtime.spawn(keeper::notice(Arc::downgrade(&inner), changes)));
        }
        drop(runtime.spawn(keeper::keep(Arc::downgrade(&inner), wake)));
        ResilientStore(inner)
    }

    /// Whether Redis is asked.
    pub fn state(&self) -> Circuit {
        self.0.state().circuit
    }

    /// How many processes share the limits. Worth keeping over a restart, once they were
    /// [seen](Instances::seen).
    pub fn instances(&self) -> Instances {
        self.0.fleet().instances()
    }

    /// What it has done so far. What Redis was asked is in [`RedisStore::counts`].
    pub fn counts(&self) -> ResilientCounts {
        ResilientCounts {
            forgotten: self.0.ledger.forgotten(),
            settlements_waiting: self.0.settlements.waiting(),
            settlements_dropped: self.0.settlements.dropped(),
            ..self.0.tally.counts()
        }
    }

    /// Forgets what was seen and counted of a subject in this process: another one has [cleared](Store::clear) it.
    pub fn forget(&self, subject: &Subject) {
        self.0.mirror.forget(subject);
        self.0.ledger.forget(subject);
    }

    /// The store it stands before.
    pub fn redis(&self) -> &RedisStore {
        &self.0.redis
    }
}

impl Store for ResilientStore {
    fn reserve(&self, charges: Vec<Charge>) -> Answer<'_, Decision> {
        if !self.0.asks(charges.iter().map(Charge::subject)) {
            return Box::pin(ready(self.0.decide(charges)));
        }
        Box::pin(async move {
            match self.0.redis.reserve(charges.clone()).await {
                Ok(decision) => self.0.answered(decision),
                Err(error) if Failure::of(&error).is_none() => Err(error),
                Err(error) => {
                    self.0.failed(&error);
                    self.0.decide(charges)
                }
            }
        })
    }

    fn peek(&self, charges: Vec<Charge>) -> Answer<'_, Vec<Standing>> {
        if !self.0.asks(charges.iter().map(Charge::subject)) {
            return Box::pin(ready(Ok(self.0.look(charges))));
        }
        Box::pin(async move {
            match self.0.redis.peek(charges.clone()).await {
                Ok(standings) => Ok(standings),
                Err(error) if Failure::of(&error).is_none() => Err(error),
                Err(error) => {
                    self.0.failed(&error);
                    Ok(self.0.look(charges))
                }
            }
        })
    }

    /// While Redis does not answer nothing is forgotten, and that is an error.
    fn clear<'s>(&'s self, subject: &'s Subject) -> Answer<'s, bool> {
        if !self.0.asks(std::iter::once(subject)) {
            return Box::pin(ready(Err(StoreError::Unreachable)));
        }
        Box::pin(async move {
            let cleared = self.0.redis.clear(subject).await;
            match &cleared {
                Ok(_) => self.forget(subject),
                Err(error) => self.0.failed(error),
            }
            cleared
        })
    }

    /// What waits for Redis to come back is not waited for.
    fn flush(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.0.redis.flush()
    }
}

impl fmt::Debug for ResilientStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResilientStore").field("state", &self.state()).field("redis", &self.0.redis).finish()
    }
}

impl Inner {
    fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Whether Redis is asked about these subjects.
    fn asks<'s>(&self, subjects: impl Iterator<Item = &'s Subject>) -> bool {
        !self.is_open() && self.redis.reaches(subjects)
    }

    /// Redis has decided.
    fn answered(self: &Arc<Inner>, decision: Decision) -> Result<Decision, StoreError> {
        // Without charges nobody was asked.
        if decision.source() != Source::Redis || decision.standings().is_empty() {
            return Ok(decision);
        }
        self.clock.set(decision.now());
        self.state().breaker.succeeded(Instant::now());
        if self.mirror.note(decision.standings(), decision.now()) {
            self.has_lost();
        }
        match decision {
            Decision::Granted(reservation) => {
                let (now, unreplicated) = (reservation.now(), reservation.is_unreplicated());
                let (standings, hold) = reservation.into_parts();
                let here = calls::Held::of(&standings, &self.ledger.memory);
                let held = Held { store: Arc::clone(self), hold: Arc::from(hold), here };
                let reservation = Reservation::new(standings, now, Box::new(held));
                let reservation = reservation.decided_by(Source::Redis);
                if unreplicated { self.unreplicated(reservation) } else { Ok(Decision::Granted(reservation)) }
            }
            denied @ Decision::Denied(_) => Ok(denied),
        }
    }

    /// Redis has failed; perhaps once too often.
    fn failed(&self, error: &StoreError) {
        let Some(failure) = Failure::of(error) else { return };
        add(&self.tally.failures[failure as usize], 1);
        if self.is_open() || self.fails_in_part(error) {
            return;
        }
        let enough = self.state().breaker.failed(Instant::now());
        if enough {
            self.open(error);
        } else if matches!(failure, Failure::Timeout | Failure::Unreachable)
            && !self.suspected.swap(true, Ordering::Relaxed)
        {
            self.wake.notify_one();
        }
    }

    /// Whether only some of several masters are silent: their counters are decided here, those of the others there.
    fn fails_in_part(&self, error: &StoreError) -> bool {
        is_silence(error) && self.redis.answers_in_part()
    }

    /// A probe has failed.
    fn still_failing(&self, error: &StoreError) {
        let Some(failure) = Failure::of(error) else { return };
        add(&self.tally.failures[failure as usize], 1);
        let mut state = self.state();
        // One that answers now and then is not waited for anew each time.
        state.returning = state.returning.filter(|returning| returning.elapsed() < RETURN_KEPT);
        if let Circuit::Open { since, why } = state.circuit {
            // Whether settlements get through is worth a change, the rest is not.
            if (why == Failure::OutOfMemory) != (failure == Failure::OutOfMemory) {
                state.circuit = Circuit::Open { since, why: failure };
                (self.listener)(state.circuit);
            }
        }
    }

    fn open(&self, error: &StoreError) {
        let Some(why) = Failure::of(error) else { return };
        self.fleet().interrupted();
        let now = self.clock.now();
        let mut state = self.state();
        if !state.circuit.is_open() {
            add(&self.tally.opened, 1);
            state.circuit = Circuit::Open { since: now, why };
            self.open.store(true, Ordering::Release);
            (self.listener)(state.circuit);
            self.wake.notify_one();
        }
    }

    /// Redis answers, and was charged what it was owed: the failure is over.
    fn close(&self) {
        let mut state = self.state();
        (state.failing, state.returning) = (None, None);
        if state.circuit.is_open() {
            state.breaker = Breaker::new(Instant::now());
            state.circuit = Circuit::Closed;
            self.open.store(false, Ordering::Release);
            (self.listener)(state.circuit);
            // What was admitted since it was charged.
            self.wake.notify_one();
        }
    }

    /// The failure that goes on, or begins now.
    fn failing(&self) -> Failing {
        let (since, instances) = (self.clock.now(), self.fleet().instances().count);
        let mut state = self.state();
        if let Some(failing) = state.failing {
            return failing;
        }
        state.failures += 1;
        let failing = Failing { number: state.failures, since, instances };
        state.failing = Some(failing);
        failing
    }

    /// Whether settlements of these would only get lost.
    fn settlements_wait(&self, standings: &[Standing]) -> bool {
        if self.is_open() {
            return !matches!(self.state().circuit, Circuit::Open { why: Failure::OutOfMemory, .. });
        }
        !self.redis.reaches(standings.iter().map(|standing| &standing.subject))
    }

    /// There is something to settle up, and somebody to settle up with.
    fn wake_if_closed(&self) {
        if !self.is_open() {
            self.wake.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether nothing was heard.
fn is_silence(error: &StoreError) -> bool {
    matches!(Failure::of(error), Some(Failure::Timeout | Failure::Unreachable | Failure::Lost))
}
