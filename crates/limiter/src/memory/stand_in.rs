//! For a store that counts here what another would, while that one does not answer.

use std::sync::Arc;

use super::MemoryStore;
use super::shard::Class;
use crate::clock::Millis;
use crate::limit::Limit;
use crate::scope::Subject;
use crate::spec::State;

impl MemoryStore {
    /// Units in use of one counter.
    pub(crate) fn used(&self, limit: &Arc<Limit>, subject: &Subject, now: Millis) -> u64 {
        let key = self.0.key(subject);
        let mut shard = self.0.shard(&key);
        shard.state(&key, limit).map_or(0, |state| state.reading(limit.rate(), now).used)
    }

    /// Begins a counter anew, under a `life` that no counter had before, with `level` units taken at `at`.
    pub(crate) fn restart(&self, limit: &Arc<Limit>, subject: &Subject, life: u64, at: Millis, level: u64) {
        let key = self.0.key(subject);
        let mut shard = self.0.shard(&key);
        let state = shard.state_or_new(&key, Class::of(subject), limit, at);
        *state = State::new(limit.rate(), life);
        state.charge(limit.rate(), at, level);
        shard.make_room(self.0.clock.now());
    }
}
