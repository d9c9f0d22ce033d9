//! The store's time while the store does not answer: what it said last, and what has passed here since.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::clock::{Clock, Millis, SystemClock};

/// Clones show the same time. Before the store has said anything, that of this machine.
#[derive(Clone, Debug)]
pub(super) struct StoreClock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: Instant,
    /// The store's time at `start`.
    origin: AtomicU64,
}

impl StoreClock {
    pub(super) fn new() -> StoreClock {
        let inner = Inner { start: Instant::now(), origin: AtomicU64::new(SystemClock.now().get()) };
        StoreClock(Arc::new(inner))
    }

    /// The store has just said that it is `now`.
    pub(super) fn set(&self, now: Millis) {
        let passed = Millis::from(self.0.start.elapsed());
        self.0.origin.store((now - passed).get(), Ordering::Relaxed);
    }
}

impl Clock for StoreClock {
    fn now(&self) -> Millis {
        Millis(self.0.origin.load(Ordering::Relaxed)) + Millis::from(self.0.start.elapsed())
    }
}
