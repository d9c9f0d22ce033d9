//! When the store has lost counters: it is told what was seen of them last.
//!
//! FLUSHALL, a restart without persistence and a failover that lost writes are found out by whoever is first: a decision
//! whose counter was born since in another epoch, a heartbeat that finds itself forgotten, a connection to another
//! server or another run of it. Then everything that was seen here is told, whatever it was that showed it. Every
//! instance does so; the store takes the most that any of them saw.
//!
//! # The bound
//! What is admitted until then is admitted as if there were more room: at most so much is admitted beyond the limit. A
//! counter that was born since keeps it, on top of what was seen. One that is still there after a failover is raised to
//! what was seen, which may swallow what was charged to it meanwhile, but no more than was lost of it. What was seen of
//! it since the failover it has not lost: there what it was given back stays given back.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Inner;
use super::counts::add;
use super::mirror::SHARDS;
use crate::clock::Clock;
use crate::redis::Sighting;
use crate::store::StoreError;

/// How many scripts are on their way at once.
const SCRIPTS_AT_ONCE: usize = 16;
/// Between two times that everything is told because a counter was lost. Whatever is found to be lost meanwhile is told
/// by itself, so nothing waits for that.
const PAUSE: Duration = Duration::from_secs(1);

/// How far telling has come.
pub(super) struct Healing {
    /// The next part of what was seen.
    next: AtomicUsize,
    /// When a lost counter made it begin last.
    begun: Mutex<Option<Instant>>,
    /// How often somebody else may have become a master, as far as that was told.
    masters: AtomicU64,
    now: watch::Receiver<u64>,
}

impl Healing {
    pub(super) fn new(now: watch::Receiver<u64>) -> Healing {
        let masters = AtomicU64::new(*now.borrow());
        Healing { next: AtomicUsize::new(SHARDS), begun: Mutex::default(), masters, now }
    }

    /// Everything is to be told, unless that has begun a moment ago.
    fn begin(&self, now: Instant) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.is_none_or(|begun| now.saturating_duration_since(begun) >= PAUSE) {
            *begun = Some(now);
            self.next.store(0, Ordering::Relaxed);
        }
    }

    /// The next part to be told.
    fn part(&self) -> Option<usize> {
        let masters = *self.now.borrow();
        if self.masters.swap(masters, Ordering::Relaxed) != masters {
            self.next.store(0, Ordering::Relaxed);
        }
        let more = |part: usize| (part < SHARDS).then_some(part + 1);
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()
    }
}

impl Inner {
    /// The store has lost something: nobody knows how much.
    pub(super) fn has_lost(&self) {
        self.healing.begin(Instant::now());
        self.wake_if_closed();
    }

    /// Tells the store what it has lost, or may have; not for longer than this, the rest follows.
    pub(super) async fn heal(self: &Arc<Inner>, until: Instant) -> Result<(), StoreError> {
        let mut refused = Vec::new();
        let healed = loop {
            let mut seen = self.mirror.lost();
            if seen.is_empty() {
                let Some(part) = self.healing.part() else { break Ok(()) };
                seen = self.mirror.part(part, self.clock.now());
            }
            let failed = self.tell(seen, &mut refused).await;
            if failed.is_err() {
                break failed;
            }
            if Instant::now() >= until {
                self.wake.notify_one();
                break Ok(());
            }
        };
        self.mirror.lose(refused);
        healed
    }

    /// Tells of counters. Those that were not told after all are lost still; those that the store refused are returned.
    async fn tell(
        self: &Arc<Inner>,
        seen: Vec<Sighting>,
        refused: &mut Vec<Sighting>,
    ) -> Result<(), StoreError> {
        let mut scripts = self.redis.healed_together(seen).into_iter();
        let mut telling = JoinSet::new();
        let mut failed = Ok(());
        loop {
            while failed.is_ok() && telling.len() < SCRIPTS_AT_ONCE {
                let Some(seen) = scripts.next() else { break };
                let store = Arc::clone(self);
                telling.spawn_on(async move { store.tell_together(seen).await }, self.redis.runtime());
            }
            match telling.join_next().await {
                None => break,
                Some(Ok((rest, Ok(())))) => refused.extend(rest),
                Some(Ok((rest, Err(error)))) => {
                    self.mirror.lose(rest);
                    failed = Err(error);
                }
                Some(Err(_)) => failed = Err(StoreError::Lost),
            }
        }
        self.mirror.lose(scripts.flatten().collect());
        failed
    }

    /// One script; when it is refused, one for each counter. Returns what the store does not know yet.
    async fn tell_together(&self, seen: Vec<Sighting>) -> (Vec<Sighting>, Result<(), StoreError>) {
        if !self.redis.reaches(seen.iter().map(|sighting| &sighting.subject)) {
            return (seen, Ok(()));
        }
        match self.tell_all(&seen).await {
            Ok(()) => return (Vec::new(), Ok(())),
            Err(StoreError::Refused { .. }) => {}
            Err(error) => return (seen, Err(error)),
        }
        let mut rest = Vec::new();
        for sighting in seen {
            match self.tell_all(std::slice::from_ref(&sighting)).await {
                Ok(()) => {}
                Err(_) => rest.push(sighting),
            }
        }
        (rest, Ok(()))
    }

    async fn tell_all(&self, seen: &[Sighting]) -> Result<(), StoreError> {
        let (lives, history) = self.redis.heal(seen).await?;
        seen.iter().zip(lives).for_each(|(sighting, life)| self.mirror.told(sighting, (life, history)));
        add(&self.tally.healed, seen.len() as u64);
        Ok(())
    }
}
