//! How many processes share the store.

use std::time::{Duration, Instant};

/// How long fewer must have been counted before fewer are believed: after a failure the others come back one by one.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many processes share the limits, this one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instances {
    /// How many. Never 0.
    pub count: u32,
    /// Whether they were counted, or only configured.
    pub seen: bool,
}

/// What heartbeats have told.
#[derive(Debug)]
pub(super) struct Fleet {
    instances: Instances,
    fewer: Option<Fewer>,
    last: Option<Instant>,
}

/// Fewer were counted, without a break.
#[derive(Debug)]
struct Fewer {
    since: Instant,
    most: u32,
}

impl Fleet {
    pub(super) fn new(configured: u32) -> Fleet {
        Fleet { instances: Instances { count: configured.max(1), seen: false }, fewer: None, last: None }
    }

    pub(super) fn instances(&self) -> Instances {
        self.instances
    }

    /// So many live; `listed`, this one among them. Returns how long ago it was counted among them last, if nothing was
    /// heard since.
    pub(super) fn counted(&mut self, count: u64, listed: bool, now: Instant) -> Option<Duration> {
        let last = std::mem::replace(&mut self.last, listed.then_some(now));
        let before = last.map(|before| now.saturating_duration_since(before));
        let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
        self.instances.seen = true;
        if count >= self.instances.count {
            self.instances.count = count;
            self.fewer = None;
            return before;
        }
        let fewer = self.fewer.get_or_insert(Fewer { since: now, most: count });
        fewer.most = fewer.most.max(count);
        if now.saturating_duration_since(fewer.since) >= PATIENCE {
            self.instances.count = fewer.most;
            self.fewer = None;
        }
        before
    }

    /// The store did not answer: what was counted before says nothing about who comes back.
    pub(super) fn interrupted(&mut self) {
        self.fewer = None;
    }
}

#[cfg(test)]
mod tests {
    use super::{Fleet, PATIENCE};
    use std::time::{Duration, Instant};

    #[test]
    fn more_are_believed_at_once_and_fewer_later() {
        let (mut fleet, start) = (Fleet::new(2), Instant::now());
        assert!(!fleet.instances().seen);
        let mut count = |count, at: Duration| {
            fleet.counted(count, true, start + at);
            fleet.instances().count
        };
        assert_eq!(count(4, Duration::ZERO), 4);
        assert_eq!(count(1, Duration::from_secs(1)), 4);
        assert_eq!(count(3, Duration::from_secs(2)), 4);
        assert_eq!(count(1, Duration::from_secs(1) + PATIENCE), 3, "the most of those counted meanwhile");
        assert_eq!(count(1, Duration::from_secs(2) + PATIENCE), 3);
        assert_eq!(count(1, Duration::from_secs(2) + 2 * PATIENCE), 1);
        assert!(fleet.instances().seen);
    }

    #[test]
    fn who_comes_back_first_is_not_alone() {
        let (mut fleet, start) = (Fleet::new(0), Instant::now());
        assert_eq!(fleet.instances().count, 1);
        fleet.counted(4, true, start);
        fleet.counted(1, true, start + Duration::from_secs(1));
        fleet.interrupted();
        fleet.counted(1, true, start + PATIENCE * 3);
        assert_eq!(fleet.instances().count, 4);
    }
}
