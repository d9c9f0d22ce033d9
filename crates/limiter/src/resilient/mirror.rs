//! What was last seen of every counter in the shared store. Written with every decision, read only when it fails.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::Millis;
use crate::limit::Limit;
use crate::quota::Algorithm;
use crate::redis::{Sighting, epoch_of};
use crate::reservation::Standing;
use crate::scope::Subject;

/// How many subjects are remembered.
pub(super) const SUBJECTS_MAX: usize = 100_000;
pub(super) const SHARDS: usize = 16;
/// A shard has two generations. Who is touched moves to the younger; when that is full, the elder is forgotten.
const GENERATION_MAX: usize = SUBJECTS_MAX / SHARDS / 2;
/// Counters of one subject: limits that are no more make room for others.
const COUNTERS_MAX: usize = 32;

/// By how much one reply may overtake another.
const OVERTAKEN: Millis = Millis(1_000);

/// Levels by subject.
pub(super) struct Mirror {
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
    /// Counters that the store has lost: as they were seen last.
    lost: Mutex<Vec<Sighting>>,
}

type Subjects = HashMap<Arc<str>, Known>;

/// What is known of a subject.
struct Known {
    subject: Subject,
    seen: Vec<Seen>,
}

#[derive(Default)]
struct Shard {
    young: Subjects,
    old: Subjects,
}

/// By which one sight of a counter is told from the next: when, and how much was in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Glimpse(Millis, u64);

/// The level of one counter: `used` units at `at`, none `reset` later.
struct Seen {
    limit: Arc<Limit>,
    used: u64,
    at: Millis,
    reset: Millis,
    /// The life of the counter.
    life: u64,
    /// Who said so: tells the time of one server as a master from any other. 0: nobody knows.
    history: u32,
}

impl Mirror {
    pub(super) fn new() -> Mirror {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Mirror { hasher: RandomState::new(), shards, lost: Mutex::default() }
    }

    /// Remembers what a decision of the store said, at its time. Says whether that shows that something was lost.
    pub(super) fn note(&self, standings: &[Standing], now: Millis) -> bool {
        let (mut rest, mut lost) = (standings, Vec::new());
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|standing| standing.subject == first.subject).count();
            let (together, others) = rest.split_at(same);
            rest = others;
            let mut shard = self.shard(&first.subject);
            let known = shard.known(&first.subject);
            for standing in together {
                if standing.limit.algorithm() != Algorithm::Concurrency {
                    let Standing { used, reset, life, history, .. } = *standing;
                    let seen =
                        Seen { limit: Arc::clone(&standing.limit), used, at: now, reset, life, history };
                    lost.extend(known.put(seen));
                }
            }
        }
        !lost.is_empty() && {
            self.lose(lost);
            true
        }
    }

    /// Remembers the level of one counter. Says whether that shows that something was lost.
    pub(super) fn put(
        &self,
        limit: &Arc<Limit>,
        subject: &Subject,
        (used, reset): (u64, Millis),
        at: Millis,
        (life, history): (u64, u32),
    ) -> bool {
        let seen = Seen { limit: Arc::clone(limit), used, at, reset, life, history };
        let lost = self.shard(subject).known(subject).put(seen);
        lost.is_some() && {
            self.lose(lost.into_iter().collect());
            true
        }
    }

    /// Counters to tell the store of again.
    pub(super) fn lose(&self, counters: Vec<Sighting>) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let room = SUBJECTS_MAX.saturating_sub(lost.len());
        lost.extend(counters.into_iter().take(room));
    }

    /// Takes the counters that were found to be lost.
    pub(super) fn lost(&self) -> Vec<Sighting> {
        std::mem::take(&mut *self.lost.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything with something in use, of one of [`SHARDS`] parts.
    pub(super) fn part(&self, part: usize, now: Millis) -> Vec<Sighting> {
        let shard = self.shards[part].lock().unwrap_or_else(PoisonError::into_inner);
        // Those that were met last first.
        let all = shard.young.values().chain(shard.old.values());
        let live = all.flat_map(|known| known.seen.iter().map(|seen| seen.sighting(&known.subject, now)));
        live.flatten().collect()
    }

    /// The store was told of a counter, and knows it by this life now. What was seen since, it was not told.
    pub(super) fn told(&self, sighting: &Sighting, (life, history): (u64, u32)) {
        let mut shard = self.shard(&sighting.subject);
        if let Some(seen) = shard.seen(&sighting.limit, &sighting.subject)
            && (seen.life, seen.history) == (sighting.life, sighting.history)
            && (seen.at, seen.used) == (sighting.at, sighting.used_then)
        {
            (seen.life, seen.history) = (life, history);
        }
    }

    /// More is on its way to the store. Less is not believed before the store has said it.
    pub(super) fn raise(&self, limit: &Limit, subject: &Subject, by: u64) {
        let mut shard = self.shard(subject);
        if let Some(seen) = shard.seen(limit, subject) {
            seen.used = seen.used.saturating_add(by);
        }
    }

    /// Units in use at `now`, by what was seen last: never fewer than the definition says, if nobody gave any back.
    pub(super) fn level(&self, limit: &Limit, subject: &Subject, now: Millis) -> u64 {
        self.shard(subject).seen(limit, subject).map_or(0, |seen| seen.level(now))
    }

    /// What was seen last, if anything was.
    pub(super) fn glimpse(&self, limit: &Limit, subject: &Subject) -> Option<Glimpse> {
        self.shard(subject).seen(limit, subject).map(|seen| Glimpse(seen.at, seen.used))
    }

    /// Forgets a subject.
    pub(super) fn forget(&self, subject: &Subject) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.retain(|sighting| sighting.subject != *subject);
        drop(lost);
        let mut shard = self.shard(subject);
        shard.young.remove(subject.as_str());
        shard.old.remove(subject.as_str());
    }

    fn shard(&self, subject: &Subject) -> MutexGuard<'_, Shard> {
        let place = self.hasher.hash_one(subject.as_str()) as usize % SHARDS;
        self.shards[place].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shard {
    fn known(&mut self, subject: &Subject) -> &mut Known {
        if self.young.len() >= GENERATION_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        match self.young.entry(subject.shared_text()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => {
                let old = self.old.remove(subject.as_str());
                vacant.insert(old.unwrap_or_else(|| Known { subject: subject.clone(), seen: Vec::new() }))
            }
        }
    }

    fn seen(&mut self, limit: &Limit, subject: &Subject) -> Option<&mut Seen> {
        let (young, old) = (self.young.get_mut(subject.as_str()), self.old.get_mut(subject.as_str()));
        young.or(old)?.seen.iter_mut().find(|seen| seen.limit.same_counter(limit))
    }
}

impl Known {
    /// Puts what was seen now in the place of what was seen before; returns that, if the store has lost it meanwhile. A
    /// counter born since in the same epoch was cleared, or had run out.
    fn put(&mut self, now: Seen) -> Option<Sighting> {
        let same = |seen: &Seen| Arc::ptr_eq(&seen.limit, &now.limit) || seen.limit.same_counter(&now.limit);
        let Some(place) = self.seen.iter().position(same) else {
            if self.seen.len() >= COUNTERS_MAX {
                self.seen.remove(0);
            }
            self.seen.push(now);
            return None;
        };
        let before = &self.seen[place];
        // Replies may overtake each other; what is much older comes from a server whose clock is behind.
        if now.at < before.at && before.at < now.at + OVERTAKEN {
            return None;
        }
        let (then, since) = (epoch_of(before.life), epoch_of(now.life));
        let lost = then != since && then > 0 && since > 0;
        let sighting = lost.then(|| before.sighting(&self.subject, now.at)).flatten();
        self.seen[place] = now;
        sighting
    }
}

impl Seen {
    /// Nothing, if nothing is in use by now.
    fn sighting(&self, subject: &Subject, now: Millis) -> Option<Sighting> {
        let used = self.level(now);
        let (limit, subject) = (Arc::clone(&self.limit), subject.clone());
        (used > 0).then_some(Sighting {
            limit,
            subject,
            used,
            used_then: self.used,
            at: self.at,
            life: self.life,
            history: self.history,
        })
    }

    fn level(&self, now: Millis) -> u64 {
        let window = self.limit.window().longest();
        let end = self.at + self.reset;
        match self.limit.algorithm() {
            Algorithm::FixedWindow | Algorithm::MovingWindow | Algorithm::Concurrency => {
                if now < end {
                    self.used
                } else {
                    0
                }
            }
            Algorithm::TokenBucket => {
                let drained = product(self.limit.quota().amount(), (now - self.at).get());
                let drained = drained / u128::from(window.get());
                self.used.saturating_sub(u64::try_from(drained).unwrap_or(u64::MAX))
            }
            // What was used in the window that was seen may all be of it, and counts in full until it ends; then it
            // fades within one more.
            Algorithm::SlidingWindow if now + window <= end => self.used,
            Algorithm::SlidingWindow => {
                let faded = product(self.used, (end - now).get()).div_ceil(u128::from(window.get()));
                self.used.min(u64::try_from(faded).unwrap_or(u64::MAX))
            }
        }
    }
}

fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

#[cfg(test)]
mod tests {
    use super::{COUNTERS_MAX, Mirror, SUBJECTS_MAX};
    use crate::clock::{Clock, ManualClock, Millis};
    use crate::limit::{Charge, Limit};
    use crate::memory::MemoryStore;
    use crate::quota::Algorithm;
    use crate::scope::{Dimension, Scope, Subject};
    use std::borrow::Cow;
    use std::sync::Arc;

    const START: Millis = Millis(1_794_614_400_000);

    fn limit(rule: &str, quota: &str, algorithm: Algorithm) -> Arc<Limit> {
        let scope = Scope::of([Dimension::User]);
        Arc::new(Limit::new(rule, quota.parse().unwrap(), algorithm, scope).unwrap())
    }

    fn user(name: &str) -> Subject {
        Scope::of([Dimension::User]).subject(|_| Cow::Borrowed(name))
    }

    /// What was seen, aged by the mirror, is never less than the same counter aged by the definition, and soon nothing.
    #[test]
    fn levels_age_like_counters_or_slower() {
        for algorithm in Algorithm::ALL {
            for (quota, amount) in [("60/minute", 60), ("60/minute", 7), ("1000/hour", 999)] {
                let limit = limit("r", quota, algorithm);
                let window = limit.window().longest().get();
                for offset in [0, 1, window / 3, window - 1] {
                    let clock = ManualClock::at(START + Millis(offset));
                    let (store, mirror) = (MemoryStore::new(clock.clone()), Mirror::new());
                    let ask = |amount| vec![Charge::new(Arc::clone(&limit), user("alice"), amount)];
                    let decision = store.reserve(ask(amount));
                    mirror.note(decision.standings(), decision.now());
                    let slack = if algorithm == Algorithm::SlidingWindow { 2 } else { 1 };
                    for step in 0..=40 {
                        clock.set(START + Millis(offset + step * window / 10));
                        let (now, there) = (clock.now(), store.peek(ask(0))[0].used);
                        let seen = mirror.level(&limit, &user("alice"), now);
                        assert!(
                            seen >= there && seen <= there + slack,
                            "{algorithm} {step}: {seen}, {there}"
                        );
                    }
                    assert_eq!(mirror.level(&limit, &user("alice"), clock.now()), 0, "{algorithm}");
                }
            }
        }
    }

    #[test]
    fn it_holds_so_many_subjects_and_keeps_those_in_use() {
        let (mirror, limit) = (Mirror::new(), limit("r", "60/minute", Algorithm::FixedWindow));
        let put = |name: &str| mirror.put(&limit, &user(name), (1, Millis(9)), START, (0, 0));
        for number in 0..3 * SUBJECTS_MAX {
            put(&format!("u{number}"));
            if number % 1_000 == 0 {
                put("alice");
            }
        }
        let held: usize = mirror
            .shards
            .iter()
            .map(|shard| {
                let shard = shard.lock().unwrap();
                shard.young.len() + shard.old.len()
            })
            .sum();
        assert!(held <= SUBJECTS_MAX && held > SUBJECTS_MAX / 3, "{held}");
        assert_eq!(mirror.level(&limit, &user("alice"), START), 1);
        assert_eq!(mirror.level(&limit, &user("u0"), START), 0);
        mirror.raise(&limit, &user("alice"), 4);
        assert_eq!(mirror.level(&limit, &user("alice"), START), 5);
        mirror.forget(&user("alice"));
        assert_eq!(mirror.level(&limit, &user("alice"), START), 0);
    }

    #[test]
    fn the_latest_reply_counts_whenever_it_comes() {
        let (mirror, limit) = (Mirror::new(), limit("r", "60/minute", Algorithm::FixedWindow));
        let put = |used, at| {
            mirror.put(&limit, &user("alice"), (used, Millis(60_000)), at, (0, 0));
            mirror.level(&limit, &user("alice"), at)
        };
        assert_eq!(put(7, START), 7);
        assert_eq!(put(6, START - Millis(999)), 7, "overtaken");
        assert_eq!(put(9, START), 9);
        assert_eq!(put(2, START - Millis(60_000)), 2, "another clock");
    }

    #[test]
    fn a_subject_has_so_many_counters() {
        let mirror = Mirror::new();
        for number in 0..2 * COUNTERS_MAX {
            let limit = limit(&format!("r{number}"), "60/minute", Algorithm::FixedWindow);
            mirror.put(&limit, &user("alice"), (1, Millis(9)), START, (0, 0));
        }
        assert_eq!(mirror.shard(&user("alice")).known(&user("alice")).seen.len(), COUNTERS_MAX);
    }
}
