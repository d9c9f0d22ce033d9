//! In the background: heartbeats, probes, and settling up when the store is back.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Inner;
use super::circuit::Failure;
use super::counts::add;
use super::ledger::Debt;
use crate::clock::{Clock, Millis};
use crate::redis::Late;
use crate::store::StoreError;

/// Between two heartbeats.
const BEAT_PAUSE: Duration = Duration::from_secs(1);
/// How long an instance counts as alive after one.
const LIVE: Millis = Millis(5_000);
/// Between two probes, give or take a fifth, so that instances do not all ask at once.
const PROBE_PAUSE: Duration = Duration::from_millis(100);
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
            if store.is_open() {
                let fifth = PROBE_PAUSE / 5;
                PROBE_PAUSE - fifth + fifth * (random.hash_one(turn) % 256) as u32 / 128
            } else {
                BEAT_PAUSE
            }
        };
        // Woken or not, the next turn comes.
        let _ = timeout(pause, wake.notified()).await;
    }
}

impl Inner {
    async fn turn(self: &Arc<Inner>) {
        let suspected = self.suspected.swap(false, Ordering::Relaxed);
        match self.beat().await {
            Ok(()) => self.recover().await,
            Err(error) if self.is_open() => self.still_failing(&error),
            Err(error) => {
                let silent = is_silence(&error);
                self.failed(&error);
                // One that did not answer a caller in time, and then not this either, is gone. So is one that did
                // not answer two heartbeats.
                if silent && (suspected || self.beat().await.is_err_and(|error| is_silence(&error))) {
                    self.open(&error);
                }
            }
        }
    }

    async fn beat(&self) -> Result<(), StoreError> {
        let (now, count) = self.redis.beat(&self.name, LIVE).await?;
        self.clock.set(now);
        self.fleet().counted(count, Instant::now());
        Ok(())
    }

    /// The store answers.
    async fn recover(self: &Arc<Inner>) {
        match self.settle_up(Instant::now() + SETTLE_UP_MAX).await {
            Ok(()) => {
                self.hand_over();
                self.close();
            }
            Err(error) if self.is_open() => return self.still_failing(&error),
            Err(error) => return self.failed(&error),
        }
        while !self.is_open() {
            let waiting = self.settlements.take(CHARGED_AT_ONCE);
            if waiting.is_empty() {
                return;
            }
            let sent: Vec<_> = waiting.iter().map(|settlement| settlement.send()).collect();
            for settled in sent {
                // The store counts those that fail.
                let _ = settled.await;
            }
        }
    }

    /// Charges the store what it is owed.
    async fn settle_up(self: &Arc<Inner>, until: Instant) -> Result<(), StoreError> {
        loop {
            let owed = self.ledger.debts(CHARGED_AT_ONCE);
            if owed.is_empty() {
                return Ok(());
            }
            let mut charging = JoinSet::new();
            for debts in owed {
                let store = Arc::clone(self);
                charging.spawn_on(async move { store.charge(debts).await }, self.redis.runtime());
            }
            let mut failed = None;
            while let Some(charged) = charging.join_next().await {
                failed = failed.or(charged.unwrap_or(Err(StoreError::Lost)).err());
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if Instant::now() >= until {
                self.wake.notify_one();
                return Ok(());
            }
        }
    }

    /// Charges the counters of one subject.
    async fn charge(&self, debts: Vec<Debt>) -> Result<(), StoreError> {
        let mut result = Ok(());
        for debts in debts.chunks(COUNTERS_AT_ONCE) {
            let late: Vec<Late> = debts.iter().map(Late::from).collect();
            let charged = if result.is_ok() {
                self.redis.charge_late(&late).await
            } else {
                result.clone().map(|()| (Millis::ZERO, Vec::new()))
            };
            match charged {
                Ok((now, readings)) => {
                    for (debt, reading) in debts.iter().zip(readings) {
                        self.ledger.paid(debt, now);
                        self.mirror.put(&debt.limit, &debt.subject, reading.used, now, reading.reset);
                        add(&self.tally.charged_late, debt.amount);
                    }
                }
                Err(error) => {
                    for debt in debts {
                        if error.outcome_unknown() {
                            // It may have been charged: what is sent once is not sent again.
                            self.ledger.paid(debt, self.clock.now());
                            add(&self.tally.charges_lost, 1);
                        } else {
                            self.ledger.touched(&debt.limit, &debt.subject);
                        }
                    }
                    result = Err(error);
                }
            }
        }
        result
    }
}

impl From<&Debt> for Late {
    fn from(debt: &Debt) -> Late {
        Late { limit: Arc::clone(&debt.limit), subject: debt.subject.clone(), amount: debt.amount }
    }
}

/// Whether nothing was heard.
fn is_silence(error: &StoreError) -> bool {
    matches!(Failure::of(error), Some(Failure::Timeout | Failure::Unreachable | Failure::Lost))
}
