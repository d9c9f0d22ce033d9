//! A subject with its hash, and the runs of charges that share one.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// A subject and its hash, made once per decision.
#[derive(Clone, Debug)]
pub(super) struct Key {
    hash: u64,
    pub(super) text: Arc<str>,
}

/// Charges in a row on one subject: looked up once for all of them.
pub(super) struct Run {
    pub(super) key: Key,
    pub(super) charges: Range<usize>,
}

impl Key {
    pub(super) fn new(hash: u64, text: Arc<str>) -> Key {
        Key { hash, text }
    }

    /// Its shard, `last` being the highest number. Not the bits by which the map inside chooses.
    #[inline]
    pub(super) fn place(&self, last: usize) -> usize {
        (self.hash >> 40) as usize & last
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        self.hash == other.hash && (Arc::ptr_eq(&self.text, &other.text) || self.text == other.text)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hasher.write_u64(self.hash);
    }
}

/// Passes on the hash that a key brings.
#[derive(Default)]
pub(super) struct Brought(u64);

impl Hasher for Brought {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
}

/// One, and seldom more: only the others are allocated.
pub(super) struct Few<T> {
    first: Option<T>,
    rest: Vec<T>,
}

impl<T> Few<T> {
    pub(super) const fn new() -> Few<T> {
        Few { first: None, rest: Vec::new() }
    }

    #[inline]
    pub(super) fn push(&mut self, item: T) {
        if self.first.is_none() {
            self.first = Some(item);
        } else {
            self.rest.push(item);
        }
    }

    /// The first, if there is no other.
    #[inline]
    pub(super) fn only(&self) -> Option<&T> {
        self.first.as_ref().filter(|_| self.rest.is_empty())
    }

    /// The item at a place below their number.
    #[inline]
    pub(super) fn get_mut(&mut self, place: usize) -> &mut T {
        match (place, &mut self.first) {
            (0, Some(first)) => first,
            _ => &mut self.rest[place.saturating_sub(1)],
        }
    }

    #[inline]
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.first.iter().chain(&self.rest)
    }

    #[inline]
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.first.iter_mut().chain(&mut self.rest)
    }
}
