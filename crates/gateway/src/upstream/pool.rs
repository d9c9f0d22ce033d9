//! Connections to one provider, HTTP/1.1 with keep-alive, driven by the requests that use them.
//!
//! A pooled connection usually runs as a task of its own, and every chunk crosses a channel and two task switches on its way
//! to the caller. Here the request's own task moves the connection's bytes: what a provider sent at once is taken over in one
//! poll, and leaving a request closes its connection at once. docs/decisions/0005 and 0007 have the figures.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Uri};
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use super::Failure;
use super::connect::{Connector, Stream, failure};
use super::connection::{COPIED_BYTES_MAX, Connection, Outgoing, Unanswered};
use super::head::{HEAD_BYTES_MAX, Head};
use crate::headers;

/// Idle connections of one worker to one provider.
const IDLE_CONNECTIONS_MAX: usize = 512;

/// What of an answer that nobody wants is taken, so that its connection can be used again.
const DISCARDED_BYTES_MAX: usize = HEAD_BYTES_MAX;

/// Room for what one request says and another does not.
const REQUEST_BYTES: usize = 300;

/// A worker thread: connections wait for the next request where their socket is watched. More workers share.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lane(pub usize);

/// As many lists of idle connections.
const LANES: usize = 16;

/// The connections to one provider.
pub(super) struct Client {
    connector: Connector,
    base: Uri,
    /// What each of its requests says alike, behind its target.
    fields: Box<[u8]>,
    idle: Arc<Idle>,
}

/// By lane, longest unused first.
#[derive(Default)]
struct Idle([Mutex<VecDeque<Link>>; LANES]);

impl Idle {
    fn of(&self, lane: Lane) -> MutexGuard<'_, VecDeque<Link>> {
        self.0[lane.0 % LANES].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Boxed: it is large, and moves with the request that uses it.
type Link = Box<Connection>;

impl Client {
    /// A client for one base URL, with what its requests say as `Authorization`. Opens nothing yet.
    pub(super) fn new(base: &Uri, connector: Connector, authorization: Option<&HeaderValue>) -> Self {
        let mut fields = BytesMut::from(&b" HTTP/1.1\r\n"[..]);
        let host = base.authority().map_or("", |authority| authority.as_str());
        headers::line(&mut fields, "host", &[host.as_bytes()]);
        if let Some(authorization) = authorization {
            headers::line(&mut fields, "authorization", &[authorization.as_bytes()]);
        }
        fields.extend_from_slice(headers::TO_EVERY_PROVIDER);
        Self { connector, base: base.clone(), fields: fields[..].into(), idle: Arc::default() }
    }

    /// The head of a request with this method and the path of the base URL with this one behind it, and what all say; with
    /// room for `body`.
    pub(super) fn head(&self, method: &str, path: &str, body: &[u8]) -> BytesMut {
        let base = self.base.path().trim_end_matches('/');
        let body = if body.len() <= COPIED_BYTES_MAX { body.len() } else { 0 };
        let mut head =
            BytesMut::with_capacity(base.len() + path.len() + self.fields.len() + REQUEST_BYTES + body);
        for part in [method, " ", base, path] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(&self.fields);
        head
    }

    /// Sends a request and waits for the head of its answer until `by`; `None`: it has not come. Dropped, the connection
    /// closes. `reached` becomes true when there is one.
    ///
    /// A request that an idle connection turned out to be too dead to carry is sent on another: the provider never saw it.
    ///
    /// # Errors
    /// When there is no connection, or it breaks before the head has come.
    pub(super) async fn send(
        &self,
        mut request: Outgoing,
        lane: Lane,
        reached: &AtomicBool,
        by: Instant,
    ) -> Result<Option<(Head, Flow)>, Failure> {
        loop {
            let kept = self.keep(lane);
            let reused = kept.is_some();
            let mut link = match kept {
                Some(link) => link,
                None => match timeout_at(by, Box::pin(self.connect())).await {
                    Ok(connected) => connected?,
                    Err(_) => return Ok(None),
                },
            };
            reached.store(true, Ordering::Relaxed);
            link.begin(request);
            let answered = poll_fn(|cx| match link.poll_head(cx) {
                Poll::Ready(answered) => Poll::Ready(Some(answered)),
                Poll::Pending => link.poll_due(cx, by).map(|()| None),
            });
            match answered.await {
                None => return Ok(None),
                Some(Ok(head)) => {
                    return Ok(Some((head, Flow { link: Some(link), home: self.idle.clone(), lane })));
                }
                Some(Err(Unanswered::Unsent(unsent, _))) if reused => request = unsent,
                Some(Err(Unanswered::Unsent(_, failure) | Unanswered::Failed(failure))) => {
                    return Err(failure);
                }
            }
        }
    }

    /// Closes what was not used for long, or was closed by the provider.
    pub(super) fn reap(&self) {
        for lane in (0..LANES).map(Lane) {
            // Looked at and closed outside of the lock, which requests wait for.
            let mut kept = std::mem::take(&mut *self.idle.of(lane));
            kept.retain_mut(|link| link.is_usable());
            let mut idle = self.idle.of(lane);
            kept.append(&mut idle);
            *idle = kept;
        }
    }

    fn keep(&self, lane: Lane) -> Option<Link> {
        loop {
            let mut last = self.idle.of(lane).pop_back()?;
            if last.is_usable() {
                return Some(last);
            }
        }
    }

    async fn connect(&self) -> Result<Link, Failure> {
        let stream = self.connector.clone().call(self.base.clone()).await;
        let stream = stream.map_err(|error| failure(error.as_ref()))?;
        Ok(Box::new(Connection::new(Stream::of(stream))))
    }
}

/// The body of an answer, with the connection it comes from. Dropped before its end, the connection closes.
pub struct Flow {
    /// `None`: nothing will come any more.
    link: Option<Link>,
    home: Arc<Idle>,
    lane: Lane,
}

impl Flow {
    /// The next bytes. With the last ones the connection becomes free for others.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        let Some(link) = &mut self.link else { return Poll::Ready(None) };
        let polled = link.poll_chunk(cx);
        match &polled {
            Poll::Ready(Some(Err(_))) => self.link = None,
            Poll::Ready(_) if link.is_ended() => self.release(),
            _ => {}
        }
        polled
    }

    /// Takes what has come already, so that a short answer nobody wants does not cost its connection.
    pub fn discard(mut self) {
        let mut bytes = 0;
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(Ok(chunk))) = self.poll_chunk(&mut cx) {
            bytes += chunk.len();
            if bytes > DISCARDED_BYTES_MAX {
                return;
            }
        }
    }

    /// Whether it is known that nothing will come.
    pub fn is_empty(&self) -> bool {
        self.link.as_ref().is_none_or(|link| link.is_ended())
    }

    fn release(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        if link.rest() {
            let mut idle = self.home.of(self.lane);
            idle.push_back(link);
            let surplus = if idle.len() > IDLE_CONNECTIONS_MAX { idle.pop_front() } else { None };
            drop(idle);
            drop(surplus);
        }
    }
}
