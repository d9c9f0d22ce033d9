//! What a guard cannot see: whether an answer is under way.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

/// Counts the requests of one connection that are in service, for its [`Guard`](super::Guard).
#[derive(Clone, Debug, Default)]
pub struct Exchanges(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Of those in service that have one, the time by which the answer must have ended.
    bounded: Mutex<Vec<(u64, Instant)>>,
}

impl Counts {
    fn bounded(&self) -> MutexGuard<'_, Vec<(u64, Instant)>> {
        self.bounded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchanges {
    /// How many have begun and how many have ended, the latter read first: they are equal only if none is in service.
    pub(super) fn counts(&self) -> (u64, u64) {
        let ended = self.0.ended.load(Ordering::Acquire);
        (self.0.begun.load(Ordering::Acquire), ended)
    }

    /// When the last of the answers under way must have ended; `None`: there is none, or one that has no such time.
    pub(super) fn due(&self) -> Option<Instant> {
        let bounded = self.0.bounded();
        let (begun, ended) = self.counts();
        let all = begun.wrapping_sub(ended) == bounded.len() as u64;
        bounded.iter().map(|(_, due)| *due).max().filter(|_| all)
    }

    /// To be called exactly once for each request the service is given.
    pub fn begin(&self) -> Exchange {
        let number = self.0.begun.fetch_add(1, Ordering::AcqRel);
        Exchange { counts: Arc::clone(&self.0), number, bounded: false }
    }
}

/// One request in service; ends when dropped, which must not be before its response body is.
#[must_use = "dropped, the connection counts as idle"]
#[derive(Debug)]
pub struct Exchange {
    counts: Arc<Counts>,
    number: u64,
    bounded: bool,
}

impl Exchange {
    /// Sets when its answer must have ended. A body that is never asked for more, because the client takes nothing,
    /// cannot notice that by itself; the guard then ends the connection.
    pub fn until(&mut self, deadline: Instant) {
        let mut bounded = self.counts.bounded();
        bounded.retain(|(number, _)| *number != self.number);
        bounded.push((self.number, deadline));
        self.bounded = true;
    }

    /// Ties the exchange to the response body.
    pub fn hold<B>(self, body: B) -> Held<B> {
        Held { body, _exchange: self }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // Both at once, to whoever asks when the others are due.
        let mut bounded = self.bounded.then(|| self.counts.bounded());
        if let Some(bounded) = &mut bounded {
            bounded.retain(|(number, _)| *number != self.number);
        }
        self.counts.ended.fetch_add(1, Ordering::AcqRel);
    }
}

/// A response body that ends its [`Exchange`] when the server drops it.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_deadline_is_its_own_answer_s() {
        let exchanges = Exchanges::default();
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(9));
        let mut first = exchanges.begin();
        assert_eq!(exchanges.due(), None, "it has no answer yet");
        first.until(early);
        assert_eq!(exchanges.due(), Some(early));
        drop(first);
        assert_eq!(exchanges.due(), None);
        let (mut second, mut third) = (exchanges.begin(), exchanges.begin());
        second.until(late);
        assert_eq!(exchanges.due(), None, "an answer that is gone leaves no deadline to another");
        third.until(early);
        assert_eq!(exchanges.due(), Some(late), "the connection is theirs together");
        drop(second);
        assert_eq!(exchanges.due(), Some(early));
    }
}
