//! Which subjects changed since they were last written to a file, and what would be written of them.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use super::{Brought, Class, Counter, Counters, Key, Shard};
use crate::clock::Millis;
use crate::limit::Limit;
use crate::spec::State;

/// Subjects that changed. Never more than those that are remembered and those that are in the file.
pub(super) type Journal = HashSet<Key, BuildHasherDefault<Brought>>;

/// What a file keeps of one subject.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) subject: Arc<str>,
    pub(crate) class: Class,
    /// Limits, and the numbers of their states; none: nothing is in use.
    pub(crate) counters: Vec<(Arc<Limit>, Vec<u64>)>,
}

/// A subject is about to change, or has.
pub(super) fn mark(journal: &mut Option<Journal>, key: &Key) {
    if let Some(journal) = journal
        && !journal.contains(key)
    {
        journal.insert(key.clone());
    }
}

impl Shard {
    /// From now on says what changes.
    pub(in crate::memory) fn keep_journal(&mut self) {
        self.journal = Some(Journal::default());
    }

    /// At most `most` subjects that changed, as they are now.
    pub(in crate::memory) fn changed(&mut self, most: usize, now: Millis) -> Vec<(Key, Row)> {
        let Some(journal) = &mut self.journal else {
            return Vec::new();
        };
        let keys: Vec<Key> = journal.iter().take(most).cloned().collect();
        for key in &keys {
            journal.remove(key);
        }
        keys.into_iter().map(|key| (key.clone(), self.row(&key, now))).collect()
    }

    /// What was said to have changed was not written after all.
    pub(in crate::memory) fn not_written(&mut self, key: Key) {
        if let Some(counters) = self.subjects.get_mut(&key) {
            // What it says of the file is not known any more: to forget it, it must be written.
            counters.stored = true;
        }
        if let Some(journal) = &mut self.journal {
            journal.insert(key);
        }
    }

    /// How many subjects changed.
    pub(in crate::memory) fn changes(&self) -> usize {
        self.journal.as_ref().map_or(0, HashSet::len)
    }

    /// Takes in what a file kept; what has run out since is to be forgotten by the file, too. Says whether every number made sense.
    pub(in crate::memory) fn restore(&mut self, key: &Key, row: Row, now: Millis) -> bool {
        self.births += 1;
        let birth = self.births;
        let mut counters = Counters::new(row.class, birth);
        counters.stored = true;
        for (limit, numbers) in row.counters {
            let Some(state) = State::restored(limit.rate(), birth, &numbers) else {
                return false;
            };
            counters.list.push(Counter { limit, state });
        }
        let idle = now + counters.reset(now);
        if idle == now {
            self.not_written(key.clone());
            return true;
        }
        if self.subjects.insert(key.clone(), counters).is_none() {
            let queue = match row.class {
                Class::Keyed => &mut self.keyed,
                Class::Unauthenticated => &mut self.unauthenticated,
            };
            queue.join(idle, birth, key);
        }
        true
    }

    /// A subject without a row in the file need not be written to be forgotten.
    pub(super) fn mark_removed(&mut self, key: &Key, counters: &Counters) {
        if let Some(journal) = &mut self.journal {
            if counters.stored {
                journal.insert(key.clone());
            } else {
                journal.remove(key);
            }
        }
    }

    fn row(&mut self, key: &Key, now: Millis) -> Row {
        let mut row = Row { subject: Arc::clone(&key.text), class: Class::Keyed, counters: Vec::new() };
        if let Some(counters) = self.subjects.get_mut(key) {
            row.class = counters.class;
            for counter in counters.list.iter().filter(|counter| counter.reset(now) > Millis::ZERO) {
                let numbers = counter.state.saved();
                row.counters.extend(numbers.map(|numbers| (Arc::clone(&counter.limit), numbers)));
            }
            counters.stored = !row.counters.is_empty();
        }
        row
    }
}
