//! What a guard cannot see: whether an answer is under way.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

/// Counts the requests of one connection that are in service, for its [`Guard`](super::Guard).
#[derive(Clone, Debug, Default)]
pub struct Exchanges(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    born: Instant,
    begun: AtomicU64,
    ended: AtomicU64,
    /// Milliseconds since `born` when the last of the answers under way must have ended; 0: no such time is known.
    due: AtomicU64,
}

impl Default for Counts {
    fn default() -> Counts {
        let (begun, ended, due) = Default::default();
        Counts { born: Instant::now(), begun, ended, due }
    }
}

impl Exchanges {
    /// How many have begun and how many have ended, the latter read first: they are equal only if none is in service.
    pub(super) fn counts(&self) -> (u64, u64) {
        let ended = self.0.ended.load(Ordering::Acquire);
        (self.0.begun.load(Ordering::Acquire), ended)
    }

    /// When the answers under way must all have ended, while there are any.
    pub(super) fn due(&self) -> Option<Instant> {
        let (begun, ended) = self.counts();
        let due = self.0.due.load(Ordering::Acquire);
        (due > 0 && begun != ended).then(|| self.0.born + Duration::from_millis(due))
    }

    /// To be called exactly once for each request the service is given.
    pub fn begin(&self) -> Exchange {
        self.0.begun.fetch_add(1, Ordering::AcqRel);
        Exchange(Arc::clone(&self.0))
    }
}

/// One request in service; ends when dropped, which must not be before its response body is.
#[must_use = "dropped, the connection counts as idle"]
#[derive(Debug)]
pub struct Exchange(Arc<Counts>);

impl Exchange {
    /// Sets when its answer must have ended. A body that is never asked for more, because the client takes nothing,
    /// cannot notice that by itself; the guard then ends the connection.
    pub fn until(&self, deadline: Instant) {
        let due = deadline.saturating_duration_since(self.0.born).as_millis();
        self.0.due.fetch_max(u64::try_from(due).unwrap_or(u64::MAX).max(1), Ordering::AcqRel);
    }

    /// Ties the exchange to the response body.
    pub fn hold<B>(self, body: B) -> Held<B> {
        Held { body, _exchange: self }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

/// A response body that ends its [`Exchange`] when hyper drops it.
#[derive(Debug)]
pub struct Held<B> {
    body: B,
    _exchange: Exchange,
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
