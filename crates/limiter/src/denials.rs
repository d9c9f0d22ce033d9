//! Denial memory: what was refused a moment ago is refused again without asking. It makes a flood of requests free.
//!
//! Exact while nobody gives anything back: levels only rise by what others take and fall by the definition, which is
//! run on the remembered levels. What others give back is missed for [`KEPT`] at most; what this process gives back,
//! clears or settles makes it forget.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a refusal is remembered.
pub(crate) const KEPT: Duration = Duration::from_millis(500);
/// How many are.
const DENIALS_MAX: usize = 4_096;
/// Subjects share marks: two that share one make each other forget, which harms nobody.
const MARKS: usize = 1_024;

/// Remembered levels `L` by the plan `P` of the request that was refused.
pub(crate) struct Denials<P, L> {
    hasher: RandomState,
    remembered: Mutex<Remembered<P, L>>,
    marks: Box<[AtomicU64]>,
}

struct Remembered<P, L> {
    entries: HashMap<P, Entry<L>>,
    swept: Option<Instant>,
}

struct Entry<L> {
    departure: Departure,
    levels: L,
}

/// The moment when a question left, and what had changed here by then.
#[derive(Clone, Debug)]
pub(crate) struct Departure {
    at: Instant,
    marks: Vec<u64>,
}

impl<P: Hash + Eq, L: Clone> Denials<P, L> {
    pub(crate) fn new() -> Denials<P, L> {
        Denials {
            hasher: RandomState::new(),
            remembered: Mutex::new(Remembered { entries: HashMap::new(), swept: None }),
            marks: (0..MARKS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// To be called before a question about these subjects leaves.
    pub(crate) fn departure(&self, subjects: &[String], at: Instant) -> Departure {
        Departure { at, marks: self.marks_of(subjects) }
    }

    /// Remembers the levels that came back to a question.
    pub(crate) fn remember(&self, plan: P, departure: Departure, levels: L, now: Instant) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let Remembered { entries, swept } = &mut *remembered;
        if entries.len() >= DENIALS_MAX && swept.is_none_or(|swept| now - swept >= KEPT) {
            entries.retain(|_, entry| now.saturating_duration_since(entry.departure.at) < KEPT);
            *swept = Some(now);
        }
        if entries.len() < DENIALS_MAX || entries.contains_key(&plan) {
            entries.insert(plan, Entry { departure, levels });
        }
    }

    /// What is remembered, and how long ago it left.
    pub(crate) fn recall(&self, plan: &P, subjects: &[String], now: Instant) -> Option<(L, Duration)> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = remembered.entries.get(plan)?;
        let age = now.saturating_duration_since(entry.departure.at);
        if age >= KEPT || entry.departure.marks != self.marks_of(subjects) {
            remembered.entries.remove(plan);
            return None;
        }
        Some((entry.levels.clone(), age))
    }

    /// Forgets what is known of a subject, and what is on its way.
    pub(crate) fn forget(&self, subject: &str) {
        self.mark(subject).fetch_add(1, Ordering::SeqCst);
    }

    fn marks_of(&self, subjects: &[String]) -> Vec<u64> {
        subjects.iter().map(|subject| self.mark(subject).load(Ordering::SeqCst)).collect()
    }

    fn mark(&self, subject: &str) -> &AtomicU64 {
        &self.marks[self.hasher.hash_one(subject) as usize % MARKS]
    }
}

#[cfg(test)]
mod tests {
    use super::{DENIALS_MAX, Denials, KEPT};
    use std::time::{Duration, Instant};

    #[test]
    fn a_denial_is_remembered_for_so_long() {
        let (denials, start) = (Denials::new(), Instant::now());
        let subjects = ["alice".to_string()];
        let departure = denials.departure(&subjects, start);
        denials.remember(1, departure, "full", start);
        let age = KEPT - Duration::from_nanos(1);
        assert_eq!(denials.recall(&1, &subjects, start + age), Some(("full", age)));
        assert_eq!(denials.recall(&2, &subjects, start), None);
        assert_eq!(denials.recall(&1, &subjects, start + KEPT), None);
    }

    #[test]
    fn what_is_given_back_is_noticed_even_on_the_way() {
        let (denials, start) = (Denials::new(), Instant::now());
        let subjects = ["alice".to_string(), "bob".to_string()];
        let departure = denials.departure(&subjects, start);
        denials.remember(1, departure.clone(), (), start);
        denials.forget("bob");
        assert_eq!(denials.recall(&1, &subjects, start), None);
        // The answer to a question that left before.
        denials.remember(1, departure, (), start);
        assert_eq!(denials.recall(&1, &subjects, start), None);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (denials, start) = (Denials::new(), Instant::now());
        for plan in 0..2 * DENIALS_MAX {
            denials.remember(plan, denials.departure(&[], start), (), start);
        }
        let entries = || denials.remembered.lock().unwrap().entries.len();
        assert_eq!(entries(), DENIALS_MAX);
        let later = start + KEPT;
        denials.remember(9, denials.departure(&[], later), (), later);
        assert_eq!(entries(), 1, "the old ones made room");
    }
}
