//! Settling in Redis: sent once, awaited by nobody who does not want to know.

use std::future::{Future, ready};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use ::redis::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::RedisStore;
use super::pack::Packer;
use super::plan::Plan;
use super::replay::Counters;
use crate::quota::Algorithm;
use crate::reservation::{Hold, Standing};
use crate::spec::{Correction, Receipt};
use crate::store::{Answer, StoreError};

/// The largest number that the script counts exactly; settlements stop below it.
const ACTUAL_MAX: u64 = (1 << 53) - 1;

/// What a reservation holds of a store in Redis.
pub(super) struct Held {
    pub(super) store: RedisStore,
    pub(super) receipts: Vec<Option<Receipt>>,
    /// Where it was granted, if it is to be settled only there: a server that has taken over may not know of it.
    pub(super) only_in: Option<u32>,
    /// Whether its keys may be on two servers: then no other key comes with them.
    alone: bool,
    /// What was sent last. What is sent next waits for it: a heartbeat that overtook the end of its call would hold a
    /// slot that nobody uses.
    sent: Mutex<Option<JoinHandle<()>>>,
}

/// One charge that is settled. A call in flight is over, when `actual` is nothing; else it still runs.
struct Settlement {
    /// Its position among the charges.
    index: usize,
    standing: Standing,
    receipt: Receipt,
    actual: u64,
}

/// Settlements that can be sent: in whose counters, and since when.
struct Sending {
    plan: Arc<Plan>,
    settlements: Vec<Settlement>,
    /// As in [`Held`].
    only_in: Option<u32>,
    /// The time for scripts whose clock is given.
    now: String,
}

impl Hold for Held {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        // Nobody wants to know what became of it: only that it failed is counted.
        if let Ok(Some(sending)) = self.settling(standings, actual) {
            self.forget(&sending);
            drop(self.send(async move |store| {
                let answer = store.settle(&sending).await;
                sending.plan.subjects().iter().for_each(|key| store.0.forget(key));
                store.lost_if(&answer);
                answer.map(drop)
            }));
        }
        Vec::new()
    }

    fn settled(&self, standings: &[Standing], actual: &[u64]) -> Answer<'static, Vec<Correction>> {
        let charges = standings.len();
        let sending = self.settling(standings, actual);
        let sending = match sending {
            Ok(Some(sending)) => sending,
            Ok(None) => return Box::pin(ready(Ok(vec![Correction::default(); charges]))),
            Err(error) => return Box::pin(ready(Err(error))),
        };
        self.forget(&sending);
        self.send(async move |store| {
            let corrections = store.correct(&sending, charges).await;
            store.lost_if(&corrections);
            corrections
        })
    }

    fn renew(&self, standings: &[Standing]) {
        drop(self.renewed(standings));
    }

    /// Sent as settlements that change nothing. One that is lost harms nobody: the next comes well before its lease ends.
    fn renewed(&self, standings: &[Standing]) -> Answer<'static, ()> {
        let sending = self.sending(standings, |_, standing| {
            (standing.limit.algorithm() == Algorithm::Concurrency).then_some(standing.requested)
        });
        match sending {
            Ok(Some(sending)) => self.send(async move |store| store.settle(&sending).await.map(drop)),
            Ok(None) => Box::pin(ready(Ok(()))),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }
}

impl Held {
    pub(super) fn new(store: RedisStore, receipts: Vec<Option<Receipt>>) -> Held {
        Held { store, receipts, only_in: None, alone: false, sent: Mutex::new(None) }
    }

    /// Settled only where it was granted.
    pub(super) fn only_in(self, only_in: Option<u32>) -> Held {
        Held { only_in, ..self }
    }

    /// Of one key, that no other one comes with.
    pub(super) fn alone(self) -> Held {
        Held { alone: true, ..self }
    }

    /// What is to be settled.
    fn settling(&self, standings: &[Standing], actual: &[u64]) -> Result<Option<Sending>, StoreError> {
        self.sending(standings, |index, standing| {
            let over = (standing.limit.algorithm() == Algorithm::Concurrency).then_some(0);
            over.or(actual.get(index).copied()).filter(|actual| *actual != standing.requested)
        })
    }

    /// What is remembered of refusals does not hold any more.
    fn forget(&self, sending: &Sending) {
        sending.plan.subjects().iter().for_each(|key| self.store.0.forget(key));
    }

    /// What `actual` says of charges that were taken; nothing if it says nothing of any.
    fn sending(
        &self,
        standings: &[Standing],
        actual: impl Fn(usize, &Standing) -> Option<u64>,
    ) -> Result<Option<Sending>, StoreError> {
        let mut settlements = Vec::new();
        for (index, (standing, receipt)) in standings.iter().zip(&self.receipts).enumerate() {
            if let (Some(receipt), Some(actual)) = (receipt, actual(index, standing)) {
                let (standing, receipt) = (standing.clone(), *receipt);
                settlements.push(Settlement { index, standing, receipt, actual });
            }
        }
        if settlements.is_empty() {
            return Ok(None);
        }
        let standings: Vec<&Standing> = settlements.iter().map(|settlement| &settlement.standing).collect();
        let met = standings.iter().map(|standing| (&standing.limit, &standing.subject));
        let store = &self.store.0;
        let make = |epochs| Plan::of_standings(&store.prefix, epochs, &standings);
        let plan = match self.alone {
            true => Arc::new(make(None)?),
            false => store.settling.plan(met, || make(Some(&store.epochs)))?,
        };
        Ok(Some(Sending { plan, settlements, only_in: self.only_in, now: self.store.0.time_given() }))
    }

    /// In a task, so that nobody has to wait for it.
    fn send<T: Send + 'static, F: Future<Output = Result<T, StoreError>> + Send>(
        &self,
        work: impl FnOnce(RedisStore) -> F + Send + 'static,
    ) -> Answer<'static, T> {
        let (reply, answer) = oneshot::channel();
        let (store, piece) = (self.store.clone(), self.store.0.underway.begin());
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let before = sent.take();
        *sent = Some(self.store.0.connection.here().1.spawn(async move {
            if let Some(before) = before {
                // Only its being over matters.
                let _ = before.await;
            }
            // Nobody who wants to know is the usual case.
            let _ = reply.send(work(store).await);
            drop(piece);
        }));
        Box::pin(async move { answer.await.unwrap_or(Err(StoreError::Lost)) })
    }
}

impl RedisStore {
    /// Counts a settlement that failed, unless it will be sent in parts.
    fn lost_if<T>(&self, answer: &Result<T, StoreError>) {
        if answer.as_ref().is_err_and(|error| !super::spread::is_split(error)) {
            self.0.settlements_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends the settling script: what each settlement ended of calls in flight, and the counters as they were before.
    async fn settle(
        &self,
        Sending { plan, settlements, only_in, now }: &Sending,
    ) -> Result<(Vec<Value>, Counters), StoreError> {
        let life = self.0.life();
        let mut order = Packer::default();
        order.list(3);
        order.number(life);
        order.list(9 * settlements.len());
        for (settlement, place) in settlements.iter().zip(&plan.places) {
            order.number(*place as u64 + 1);
            settlement.receipt.numbers().into_iter().for_each(|number| order.number(number));
            order.number(settlement.actual.min(ACTUAL_MAX));
        }
        order.number(plan.epochs as u64);
        let args: [&[u8]; 3] = [&plan.set, &order.0, now.as_bytes()];
        let used = if self.0.clock.is_some() { 3 } else { 2 };
        let reply = self.0.connection.settle(&plan.keys, &args[..used], *only_in).await?;
        let Value::Array(parts) = reply.value else {
            return Err(StoreError::Reply("no list".into()));
        };
        let [Value::Int(now), Value::Array(ended), states @ ..] = &parts[..] else {
            return Err(StoreError::Reply("not a time, calls that ended and counters".into()));
        };
        if ended.len() != settlements.len() {
            return Err(StoreError::Reply("another number of settlements than was sent".into()));
        }
        let rates = settlements.iter().map(|settlement| settlement.standing.limit.rate());
        Ok((ended.clone(), Counters::read(plan, rates, (*now, reply.history), states, life)?))
    }

    /// Settles: one correction per charge.
    async fn correct(&self, sending: &Sending, charges: usize) -> Result<Vec<Correction>, StoreError> {
        let answer = self.settle(sending).await;
        let Sending { plan, settlements, .. } = sending;
        // Forgotten once when it was sent, and once more for what left meanwhile.
        plan.subjects().iter().for_each(|key| self.0.forget(key));
        let (ended, mut counters) = answer?;
        let mut corrections = vec![Correction::default(); charges];
        let mut born = vec![false; plan.counters];
        for ((settlement, &place), ended) in settlements.iter().zip(&plan.places).zip(ended) {
            let Settlement { index, standing, receipt, actual } = settlement;
            if let (Algorithm::Concurrency, Value::Int(ended)) = (standing.limit.algorithm(), ended) {
                corrections[*index].returned = u64::try_from(ended).unwrap_or_default();
                continue;
            }
            born[place] |= *actual > standing.requested;
            if counters.found(place) || born[place] {
                let (rate, now) = (standing.limit.rate(), counters.now);
                let state = counters.state(place);
                state.redate(rate, now);
                corrections[*index] = state.correct(rate, now, receipt, *actual);
            }
        }
        Ok(corrections)
    }
}
