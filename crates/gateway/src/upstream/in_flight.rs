//! How many requests one provider is busy with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many requests are under way.
#[derive(Clone, Debug, Default)]
pub struct InFlight(Arc<AtomicU64>);

impl InFlight {
    /// One more, until what this gives is dropped.
    pub fn begin(&self) -> Flight {
        self.0.fetch_add(1, Ordering::Relaxed);
        Flight(self.0.clone())
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One of them.
#[derive(Debug)]
pub struct Flight(Arc<AtomicU64>);

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
