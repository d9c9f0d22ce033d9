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

/// So many are kept in place.
const IN_PLACE: usize = 4;

/// As a rule no more than [`IN_PLACE`]: only the others are allocated.
pub(super) struct Few<T> {
    first: [Option<T>; IN_PLACE],
    count: usize,
    rest: Vec<T>,
}

impl<T> Few<T> {
    pub(super) const fn new() -> Few<T> {
        Few { first: [const { None }; IN_PLACE], count: 0, rest: Vec::new() }
    }

    #[inline]
    pub(super) fn push(&mut self, item: T) {
        match self.first.get_mut(self.count) {
            Some(place) => *place = Some(item),
            None => self.rest.push(item),
        }
        self.count += 1;
    }

    /// The first, if there is no other.
    #[inline]
    pub(super) fn only(&self) -> Option<&T> {
        self.first[0].as_ref().filter(|_| self.count == 1)
    }

    /// The item at a place below their number.
    #[inline]
    pub(super) fn get_mut(&mut self, place: usize) -> &mut T {
        match self.first.get_mut(place) {
            Some(Some(item)) => item,
            _ => &mut self.rest[place.saturating_sub(IN_PLACE)],
        }
    }

    #[inline]
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.first[..self.count.min(IN_PLACE)].iter().flatten().chain(&self.rest)
    }

    #[inline]
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.first[..self.count.min(IN_PLACE)].iter_mut().flatten().chain(&mut self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_are_found_where_they_were_put() {
        for count in 0..3 * IN_PLACE {
            let mut few = Few::new();
            (0..count).for_each(|item| few.push(item));
            assert!(few.iter().copied().eq(0..count));
            assert_eq!(few.only(), (count == 1).then_some(&0));
            (0..count).for_each(|place| *few.get_mut(place) += 1);
            few.iter_mut().for_each(|item| *item += 1);
            assert!(few.iter().copied().eq(2..count + 2));
        }
    }
}
