//! How many callers without a key are told apart by more than their address: a `User-Agent` is free to change, and each
//! one would be another counter.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Sessions of one generation; with the one before it, about twice as many are remembered.
const GENERATION_MAX: usize = 50_000;
/// After this time a full generation makes room for another.
const GENERATION: Duration = Duration::from_secs(600);

/// The sessions that have counters of their own.
#[derive(Debug)]
pub(super) struct Strangers {
    hasher: RandomState,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    young: HashSet<u64>,
    old: HashSet<u64>,
    since: Instant,
}

impl Default for Strangers {
    fn default() -> Self {
        let known = Known { young: HashSet::new(), old: HashSet::new(), since: Instant::now() };
        Self { hasher: RandomState::new(), known: Mutex::new(known) }
    }
}

impl Strangers {
    /// Whether this session is counted by itself. One that comes when the budget is used up is not, and shares the
    /// counters of its address.
    pub(super) fn admit(&self, session: &str) -> bool {
        let mark = self.hasher.hash_one(session);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.admit(mark, Instant::now())
    }
}

impl Known {
    fn admit(&mut self, mark: u64, now: Instant) -> bool {
        if self.young.contains(&mark) {
            return true;
        }
        if self.young.len() >= GENERATION_MAX && now.duration_since(self.since) >= GENERATION {
            self.old = std::mem::take(&mut self.young);
            self.since = now;
        }
        if self.young.len() < GENERATION_MAX {
            return self.young.insert(mark);
        }
        self.old.contains(&mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newcomers_past_the_budget_are_not_told_apart_until_there_is_room() {
        let start = Instant::now();
        let mut known = Known { young: HashSet::new(), old: HashSet::new(), since: start };
        let crowd = GENERATION_MAX as u64;
        assert!((0..crowd).all(|mark| known.admit(mark, start)));
        assert!(!known.admit(crowd, start));
        assert!(known.admit(7, start), "whoever was told apart stays so");
        let later = start + GENERATION;
        assert!(known.admit(crowd, later));
        assert!(known.admit(7, later));
        assert!(known.old.len() + known.young.len() <= 2 * GENERATION_MAX);
    }
}
