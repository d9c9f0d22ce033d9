//! In the background: heartbeats, probes, and settling up when the store is back.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::circuit::{Circuit, Failure};
use super::counts::add;
use super::ledger::Debt;
use super::{Inner, is_silence};
use crate::clock::{Clock, Millis};
use crate::redis::{Beat, Charged, Late};
use crate::store::StoreError;

/// Between two heartbeats.
const BEAT_PAUSE: Duration = Duration::from_secs(1);
/// Between any two turns, however often somebody wakes the keeper.
const TURN_PAUSE: Duration = Duration::from_millis(5);
/// One that took longer says nothing: meanwhile its instance may have stopped asking.
const BEAT_AGE_MAX: Millis = Millis(100);
/// How long an instance counts as alive after one.
const LIVE: Millis = Millis(5_000);
/// A store that does not know an instance any more which has beaten so short a time ago has lost more than that.
const FORGOTTEN: Duration = Duration::from_secs(4);
/// Between two probes, give or take a fifth, so that instances do not all ask at once.
const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// How long those that are back wait for the others: what these have admitted is not charged yet.
const RETURN_PATIENCE: Duration = Duration::from_millis(250);
/// Between two looks for them.
const RETURN_PAUSE: Duration = Duration::from_millis(15);
/// How long the store is charged what it is owed before it decides again; the rest follows.
const SETTLE_UP_MAX: Duration = Duration::from_millis(250);
/// How many subjects are charged at a time.
const CHARGED_AT_ONCE: usize = 64;
/// How many counters of one subject.
const COUNTERS_AT_ONCE: usize = 16;

/// Ends when nobody asks the store any more.
pub(super) async fn keep(store: Weak<Inner>, wake: Arc<Notify>) {
    let random = RandomState::new();
    for turn in 0_u64.. {
        let pause = {
            let Some(store) = store.upgrade() else { return };
            store.turn().await;
            if store.state().returning.is_some() {
                RETURN_PAUSE
            } else if store.is_open() {
                let fifth = PROBE_PAUSE / 5;
                PROBE_PAUSE - fifth + fifth * (random.hash_one(turn) % 256) as u32 / 128
            } else {
                BEAT_PAUSE
            }
        };
        sleep(TURN_PAUSE).await;
        // Woken or not, the next turn comes.
        let _ = timeout(pause, wake.notified()).await;
    }
}

/// Wakes the keeper when there is another master, or another connection.
pub(super) async fn notice(store: Weak<Inner>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        let Some(store) = store.upgrade() else { return };
        store.wake.notify_one();
    }
}

impl Inner {
    async fn turn(self: &Arc<Inner>) {
        let suspected = self.suspected.swap(false, Ordering::Relaxed);
        match self.probe().await {
            Ok(()) => self.recover().await,
            // The heartbeat is one master's; there are others.
            Err(error) if self.fails_in_part(&error) => self.recover().await,
            Err(error) if self.is_open() => self.still_failing(&error),
            Err(error) => {
                let silent = is_silence(&error);
                self.failed(&error);
                // One that did not answer a caller in time, and then not this either, is gone. So is one that did
                // not answer two heartbeats.
                if silent && (suspected || self.probe().await.is_err_and(|error| is_silence(&error))) {
                    self.open(&error);
                }
            }
        }
    }

    /// Says that this process lives; but not before it has charged what it owes.
    async fn probe(&self) -> Result<(), StoreError> {
        let until = if self.is_open() { Millis::ZERO } else { self.clock.now() + BEAT_AGE_MAX };
        let Beat { now, count, new, written, .. } =
            self.redis.beat(&self.name, LIVE, until, Millis::ZERO).await?;
        self.clock.set(now);
        let last = self.fleet().counted(count, written, Instant::now());
        if new && last.is_some_and(|since| since < FORGOTTEN) {
            self.has_lost();
        }
        Ok(())
    }

    /// The store answers.
    async fn recover(self: &Arc<Inner>) {
        // First what was lost: what it is owed comes on top of that.
        if let Err(error) = self.heal(Instant::now() + SETTLE_UP_MAX).await {
            return if self.is_open() { self.still_failing(&error) } else { self.failed(&error) };
        }
        match self.settle_up(Instant::now() + SETTLE_UP_MAX).await {
            Ok(()) => {
                match self.others_are_back().await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => return self.still_failing(&error),
                }
                self.hand_over();
                self.close();
            }
            Err(error) if self.is_open() => return self.still_failing(&error),
            Err(error) => return self.failed(&error),
        }
        let mut left = self.settlements.waiting() as usize;
        while left > 0 && !self.is_open() {
            let waiting = self.settlements.take(CHARGED_AT_ONCE.min(left));
            left = if waiting.is_empty() { 0 } else { left - waiting.len() };
            let (waiting, later): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|settlement| self.redis.reaches(settlement.subjects()));
            later.into_iter().for_each(|settlement| self.settlements.put(settlement));
            let sent: Vec<_> = waiting.iter().map(|settlement| settlement.send()).collect();
            let mut failed = None;
            for settled in sent {
                // The store counts those that fail.
                failed = failed.or(settled.await.err());
            }
            if let Some(error) = failed.filter(|error| Failure::of(error).is_some()) {
                return self.failed(&error);
            }
        }
    }

    /// Whether the others have charged what they owe, too: whoever is first would be granted what they have admitted.
    /// Nobody is waited for who stays away longer.
    async fn others_are_back(&self) -> Result<bool, StoreError> {
        let Circuit::Open { since, .. } = self.state().circuit else { return Ok(true) };
        let until = self.clock.now() + BEAT_AGE_MAX;
        let beat = self.redis.beat(&self.name, LIVE, until, since).await?;
        self.clock.set(beat.now);
        let first = self.state().returning.is_none();
        if first {
            // Whoever asks on one of these is not to be the one who finds out.
            self.redis.check_lanes().await;
        }
        let expected = u64::from(self.fleet().instances().count);
        let returning = *self.state().returning.get_or_insert_with(Instant::now);
        Ok(beat.since >= expected || returning.elapsed() >= RETURN_PATIENCE)
    }

    /// Charges the store what it is owed. What it refuses to take for one subject holds up nobody else; it is tried
    /// again at the next turn.
    async fn settle_up(self: &Arc<Inner>, until: Instant) -> Result<(), StoreError> {
        let mut refused = Vec::new();
        let settled = loop {
            let owed = self.ledger.debts(CHARGED_AT_ONCE);
            if owed.is_empty() {
                break Ok(());
            }
            let mut charging = JoinSet::new();
            for debts in owed {
                let store = Arc::clone(self);
                charging.spawn_on(async move { store.charge(debts).await }, self.redis.runtime());
            }
            let mut failed = None;
            while let Some(charged) = charging.join_next().await {
                match charged.unwrap_or(Err(StoreError::Lost)) {
                    Ok(debts) => refused.extend(debts),
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                break Err(error);
            }
            if Instant::now() >= until {
                self.wake.notify_one();
                break Ok(());
            }
        };
        self.owed_again(&refused);
        settled
    }

    /// Charges the counters of one subject. Returns those that the store refused to charge, or whose master is gone.
    async fn charge(&self, debts: Vec<Debt>) -> Result<Vec<Debt>, StoreError> {
        if !self.redis.reaches(debts.iter().map(|debt| &debt.subject)) {
            return Ok(debts);
        }
        let mut rest = &debts[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(COUNTERS_AT_ONCE));
            let late: Vec<Late> = now.iter().map(Late::from).collect();
            match self.redis.charge_late(&self.name, &late).await {
                Ok((at, charged)) => {
                    now.iter().zip(charged).for_each(|(debt, charged)| self.charged(debt, at, charged));
                }
                Err(StoreError::Refused { .. }) => {
                    add(&self.tally.failures[Failure::Refused as usize], 1);
                    return Ok(rest.to_vec());
                }
                Err(error) => {
                    if error.outcome_unknown() {
                        now.iter().for_each(|debt| self.ledger.unsure(debt));
                        let first = now.iter().filter(|debt| !debt.is_question);
                        add(&self.tally.charges_unsure, first.count() as u64);
                    }
                    self.owed_again(rest);
                    return Err(error);
                }
            }
            rest = later;
        }
        Ok(Vec::new())
    }

    fn charged(&self, debt: &Debt, at: Millis, charged: Charged) {
        if debt.is_question {
            self.ledger.answered(debt, charged.before);
        } else {
            self.ledger.paid(debt, at, charged.receipt);
            add(&self.tally.charged_late, debt.amount);
        }
        let level = (charged.reading.used, charged.reading.reset);
        if self.mirror.put(&debt.limit, &debt.subject, level, at, (charged.life, charged.history)) {
            self.has_lost();
        }
    }

    fn owed_again(&self, debts: &[Debt]) {
        debts.iter().for_each(|debt| self.ledger.touched(&debt.limit, &debt.subject));
    }
}

impl From<&Debt> for Late {
    fn from(debt: &Debt) -> Late {
        let (limit, subject) = (Arc::clone(&debt.limit), debt.subject.clone());
        Late { limit, subject, amount: debt.amount, number: debt.order }
    }
}
