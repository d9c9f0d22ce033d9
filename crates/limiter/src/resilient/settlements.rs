//! Settling what the shared store granted. While it does not answer, settlements wait: they are sent once, so not
//! before there is somebody to send them to.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Inner, calls};
use crate::quota::Algorithm;
use crate::reservation::{Hold, Standing};
use crate::scope::Subject;
use crate::spec::Correction;
use crate::store::{Answer, StoreError};

/// How many settlements may wait.
const WAITING_MAX: usize = 16_384;

/// What a reservation holds that the shared store granted.
pub(super) struct Held {
    pub(super) store: Arc<Inner>,
    pub(super) hold: Arc<dyn Hold>,
    /// Its calls in flight.
    pub(super) here: Option<calls::Held>,
}

/// A settlement that was not sent.
pub(super) struct Waiting {
    hold: Arc<dyn Hold>,
    standings: Vec<Standing>,
    actual: Vec<u64>,
}

/// Settlements in the order in which they were made.
#[derive(Default)]
pub(super) struct Settlements {
    waiting: Mutex<VecDeque<Waiting>>,
    dropped: AtomicU64,
}

impl Settlements {
    /// How many wait.
    pub(super) fn waiting(&self) -> u64 {
        self.lock().len() as u64
    }

    /// How many found no room.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The oldest ones, at most so many.
    pub(super) fn take(&self, most: usize) -> Vec<Waiting> {
        let mut waiting = self.lock();
        let most = most.min(waiting.len());
        waiting.drain(..most).collect()
    }

    pub(super) fn put(&self, settlement: Waiting) {
        let mut waiting = self.lock();
        if waiting.len() < WAITING_MAX {
            waiting.push_back(settlement);
        } else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    pub(super) fn subjects(&self) -> impl Iterator<Item = &Subject> {
        self.standings.iter().map(|standing| &standing.subject)
    }

    /// Sends it.
    pub(super) fn send(&self) -> Answer<'static, Vec<Correction>> {
        self.hold.settled(&self.standings, &self.actual)
    }
}

impl Held {
    /// Whether it went to those that wait.
    fn waits(&self, standings: &[Standing], actual: &[u64]) -> bool {
        if let Some(here) = &self.here {
            here.end();
        }
        for (standing, actual) in standings.iter().zip(actual).filter(|(standing, _)| standing.taken) {
            if let Some(more) = actual.checked_sub(standing.requested).filter(|more| *more > 0) {
                self.store.mirror.raise(&standing.limit, &standing.subject, more);
            }
        }
        if !self.store.settlements_wait(standings) {
            return false;
        }
        let over = |standing: &Standing| standing.limit.algorithm() == Algorithm::Concurrency;
        let changed = |(standing, actual): (&Standing, &u64)| standing.taken && *actual != standing.requested;
        let changes = standings.iter().any(|standing| standing.taken && over(standing))
            || standings.iter().zip(actual).any(changed);
        if changes {
            let (standings, actual) = (standings.to_vec(), actual.to_vec());
            let hold = Arc::clone(&self.hold);
            self.store.settlements.put(Waiting { hold, standings, actual });
        }
        true
    }
}

impl Hold for Held {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        if self.waits(standings, actual) { Vec::new() } else { self.hold.settle(standings, actual) }
    }

    fn renew(&self, standings: &[Standing]) {
        drop(self.renewed(standings));
    }

    /// While the store does not answer only this process hears it.
    fn renewed(&self, standings: &[Standing]) -> Answer<'static, ()> {
        if let Some(here) = &self.here {
            here.renew();
        }
        if self.store.settlements_wait(standings) {
            return Box::pin(std::future::ready(Err(StoreError::Unreachable)));
        }
        self.hold.renewed(standings)
    }

    /// When it has to wait, nobody waits with it: the answer is at once that the store cannot be reached.
    fn settled(&self, standings: &[Standing], actual: &[u64]) -> Answer<'static, Vec<Correction>> {
        if self.waits(standings, actual) {
            return Box::pin(std::future::ready(Err(StoreError::Unreachable)));
        }
        self.hold.settled(standings, actual)
    }
}
