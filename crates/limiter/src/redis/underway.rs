//! Work that nobody awaits, counted, so that a process that ends can wait for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// How much there is.
#[derive(Default)]
pub(super) struct Underway {
    pieces: AtomicUsize,
    none_left: Notify,
}

/// A piece of it, until dropped.
pub(super) struct Piece(Arc<Underway>);

impl Underway {
    /// Begins a piece.
    pub(super) fn begin(self: &Arc<Underway>) -> Piece {
        self.pieces.fetch_add(1, Ordering::AcqRel);
        Piece(Arc::clone(self))
    }

    /// Waits until there is none.
    pub(super) async fn over(&self) {
        loop {
            // Made before the look: what ends after the look is heard of.
            let none_left = self.none_left.notified();
            if self.pieces.load(Ordering::Acquire) == 0 {
                return;
            }
            none_left.await;
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if self.0.pieces.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none_left.notify_waiters();
        }
    }
}
