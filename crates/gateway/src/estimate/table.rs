//! A map of fixed size: sets of eight places, the hash says which set, the least recently written place gives way.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Places of one set.
const WAYS: usize = 8;

/// Values by hash. Two keys of one hash are one; of ten thousand, that is one chance in 10¹¹.
pub(super) struct Table<V> {
    /// Each from the most to the least recently written.
    sets: Box<[Mutex<Vec<Place<V>>>]>,
}

struct Place<V> {
    hash: u64,
    value: Box<V>,
}

/// What [`Table::update`] did.
pub(super) struct Updated<R, V> {
    pub(super) value: R,
    /// What had to give way to a new value.
    pub(super) evicted: Option<Box<V>>,
}

impl<V> Table<V> {
    /// For at most `places_max` values, rounded up to whole sets.
    pub(super) fn new(places_max: usize) -> Self {
        let sets = places_max.div_ceil(WAYS).max(1);
        Self { sets: (0..sets).map(|_| Mutex::default()).collect() }
    }

    /// Reads a value. Reading does not keep it.
    pub(super) fn get<R>(&self, hash: u64, read: impl FnOnce(&V) -> R) -> Option<R> {
        let set = self.set(hash);
        set.iter().find(|place| place.hash == hash).map(|place| read(&place.value))
    }

    /// Writes a value, a `new` one if there is none.
    pub(super) fn update<R>(
        &self,
        hash: u64,
        new: impl FnOnce() -> V,
        write: impl FnOnce(&mut V) -> R,
    ) -> Updated<R, V> {
        let mut set = self.set(hash);
        let mut evicted = None;
        match set.iter().position(|place| place.hash == hash) {
            Some(at) => set[..=at].rotate_right(1),
            None => {
                if set.len() == WAYS {
                    evicted = set.pop().map(|place| place.value);
                }
                set.insert(0, Place { hash, value: Box::new(new()) });
            }
        }
        Updated { value: write(&mut set[0].value), evicted }
    }

    /// Writes a value if there is one.
    pub(super) fn update_present(&self, hash: u64, write: impl FnOnce(&mut V)) {
        let mut set = self.set(hash);
        if let Some(place) = set.iter_mut().find(|place| place.hash == hash) {
            write(&mut place.value);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.sets.iter().map(|set| set.lock().unwrap().len()).sum()
    }

    fn set(&self, hash: u64) -> MutexGuard<'_, Vec<Place<V>>> {
        let set = &self.sets[(hash % self.sets.len() as u64) as usize];
        // Figures for estimates: whatever a panic left of them will do.
        set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
