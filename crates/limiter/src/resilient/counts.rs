//! What happened so far, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use super::circuit::Failure;

/// What a resilient store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResilientCounts {
    /// Failures of the shared store, by their place in [`Failure::ALL`].
    pub failures: [u64; Failure::ALL.len()],
    /// How often it stopped asking.
    pub opened: u64,
    /// Decisions by this process's share.
    pub share: u64,
    /// Decisions in which at least one limit counted nothing, because it is open while the store does not answer.
    pub uncounted: u64,
    /// Requests that met a limit which lets nothing pass while the store does not answer.
    pub closed: u64,
    /// Units that were admitted by shares and have been charged to the shared store since.
    pub charged_late: u64,
    /// Charges of that kind that were not answered: the store was asked whether it had made them.
    pub charges_unsure: u64,
    /// Subjects whose units could not be remembered until the store came back.
    pub forgotten: u64,
    /// Counters that the store had lost, or may have, and was told of again.
    pub healed: u64,
    /// Settlements that wait for the store to come back.
    pub settlements_waiting: u64,
    /// Settlements that found no room to wait in: their estimates stand.
    pub settlements_dropped: u64,
}

impl ResilientCounts {
    /// Failures of one kind.
    pub fn of(&self, failure: Failure) -> u64 {
        self.failures[failure as usize]
    }
}

/// The same, while they are counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) failures: [AtomicU64; Failure::ALL.len()],
    pub(super) opened: AtomicU64,
    pub(super) share: AtomicU64,
    pub(super) uncounted: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) charged_late: AtomicU64,
    pub(super) charges_unsure: AtomicU64,
    pub(super) healed: AtomicU64,
}

impl Tally {
    pub(super) fn counts(&self) -> ResilientCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ResilientCounts {
            failures: self.failures.each_ref().map(read),
            opened: read(&self.opened),
            share: read(&self.share),
            uncounted: read(&self.uncounted),
            closed: read(&self.closed),
            charged_late: read(&self.charged_late),
            charges_unsure: read(&self.charges_unsure),
            healed: read(&self.healed),
            ..ResilientCounts::default()
        }
    }
}

/// One more, or several.
pub(super) fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}
