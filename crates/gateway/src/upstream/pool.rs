//! Connections to one provider, HTTP/1.1 with keep-alive, driven by the requests that use them.
//!
//! A pooled connection usually runs as a task of its own, and every chunk crosses a channel and two task switches on its way
//! to the caller. Here the request's own task moves the connection's bytes: what a provider sent at once is taken over in one
//! poll, and leaving a request closes its connection at once. docs/decisions/0005 has the figures.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body::{Body as _, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use tokio::task::unconstrained;
use tower_service::Service;

use super::Failure;
use super::connect::{Connector, Stream, failure};

/// A connection is used no longer than this, so that a name that moved is looked up again.
const AGE_MAX: Duration = Duration::from_secs(300);

/// Idle connections are closed before the usual 60 s of servers and balancers run out.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Idle connections of one worker to one provider.
const IDLE_CONNECTIONS_MAX: usize = 512;

/// What is buffered of an answer, its head included.
const BUFFER_BYTES_MAX: usize = 32 << 10;

/// How often a connection is polled in a row because it called for it; then others have a turn.
const TURNS_MAX: usize = 8;

/// A worker thread: connections wait for the next request where their socket is watched. More workers share.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lane(pub usize);

/// As many lists of idle connections.
const LANES: usize = 16;

/// The connections to one provider.
pub(super) struct Client {
    connector: Connector,
    /// As in `Host`.
    host: HeaderValue,
    base: Uri,
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

/// One connection. Boxed: it is large, and moves with the request that uses it.
type Link = Box<Connection>;

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None` once it has ended. Dropped then: only that gives a request back that it never took over.
    driver: Option<http1::Connection<Stream, Full<Bytes>>>,
    bell: Arc<Bell>,
    opened: Instant,
    used: Instant,
}

/// The waker of one connection. Polling it wakes whoever polls: what it reads it hands over through channels, to the same
/// task. That is noted, and looked at before the poll ends, instead of running the whole task once more for nothing.
#[derive(Default)]
struct Bell {
    task: AtomicWaker,
    polled: AtomicBool,
    rung: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.polled.load(Ordering::SeqCst) {
            self.rung.store(true, Ordering::SeqCst);
        } else {
            self.task.wake();
        }
    }
}

impl Bell {
    /// Polls until nothing that was done calls for more.
    fn quieten<T>(
        self: &Arc<Self>,
        cx: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.task.register(cx.waker());
        let own = Waker::from(self.clone());
        self.polled.store(true, Ordering::SeqCst);
        let mut polled = Poll::Pending;
        for _ in 0..TURNS_MAX {
            self.rung.store(false, Ordering::SeqCst);
            polled = poll(&mut Context::from_waker(&own));
            if polled.is_ready() || !self.rung.load(Ordering::SeqCst) {
                break;
            }
        }
        self.polled.store(false, Ordering::SeqCst);
        // Rung after all, it must not be lost. Ready, the caller comes back by itself.
        if polled.is_pending() && self.rung.load(Ordering::SeqCst) {
            self.task.wake();
        }
        polled
    }
}

impl Connection {
    /// Moves bytes; whether the connection has ended.
    fn drive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.driver.as_mut().is_some_and(|driver| Pin::new(driver).poll(cx).is_ready()) {
            self.driver = None;
        }
        self.driver.is_none()
    }

    /// Whether another request can be sent on it. Nobody is woken for what this finds out.
    fn is_usable(&mut self) -> bool {
        // Outside of the task's budget, or a closed connection could not say so behind many others.
        let look = pin!(unconstrained(poll_fn(|cx| Poll::Ready(self.drive(cx)))));
        let closed = matches!(look.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(true));
        let young = self.used.elapsed() < IDLE_MAX && self.opened.elapsed() < AGE_MAX;
        !closed && young && self.sender.is_ready()
    }
}

impl Client {
    /// A client for one base URL. Opens nothing yet.
    pub(super) fn new(base: &Uri, connector: Connector) -> Self {
        let authority = base.authority().map(|authority| HeaderValue::from_str(authority.as_str()));
        let host = authority.and_then(Result::ok).unwrap_or(HeaderValue::from_static(""));
        Self { connector, host, base: base.clone(), idle: Arc::default() }
    }

    /// Sends a request and waits for the head of its answer. Dropped, the connection closes. `reached` becomes true when
    /// there is one.
    ///
    /// A request that an idle connection turned out to be too dead to carry is sent on another: the provider never saw it.
    ///
    /// # Errors
    /// When there is no connection, or it breaks before the head has come.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        lane: Lane,
        reached: &AtomicBool,
    ) -> Result<Response<Flow>, Failure> {
        request.headers_mut().insert(header::HOST, self.host.clone());
        loop {
            let kept = self.keep(lane);
            let reused = kept.is_some();
            let mut link = match kept {
                Some(link) => link,
                None => Box::pin(self.connect()).await?,
            };
            reached.store(true, Ordering::Relaxed);
            match exchange(&mut link, request).await {
                Ok(response) => {
                    let home = self.idle.clone();
                    return Ok(response.map(|body| Flow { body, link: Some(link), home, lane }));
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(failure(&error.into_error())),
                },
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
        let shaken = http1::Builder::new().max_buf_size(BUFFER_BYTES_MAX).handshake(stream).await;
        let (sender, driver) = shaken.map_err(|error| failure(&error))?;
        let now = Instant::now();
        let bell = Arc::default();
        Ok(Box::new(Connection { sender, driver: Some(driver), bell, opened: now, used: now }))
    }
}

/// Sends on a connection and moves its bytes until the head of the answer has come.
async fn exchange(
    link: &mut Link,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, hyper::client::conn::TrySendError<Request<Full<Bytes>>>> {
    let mut sending = pin!(link.sender.try_send_request(request));
    let bell = link.bell.clone();
    poll_fn(|cx| {
        bell.quieten(cx, |cx| {
            // That it ended, and why, the request hears through `sending`.
            link.drive(cx);
            sending.as_mut().poll(cx)
        })
    })
    .await
}

/// The body of an answer, with the connection it comes from. Dropped before its end, the connection closes.
pub struct Flow {
    body: Incoming,
    link: Option<Link>,
    home: Arc<Idle>,
    lane: Lane,
}

impl Flow {
    /// The next frame. Behind the last one the connection is free for others.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let body = &mut self.body;
        let polled = match &mut self.link {
            None => Pin::new(body).poll_frame(cx),
            Some(link) => {
                let (bell, mut ended) = (link.bell.clone(), false);
                let polled = bell.quieten(cx, |cx| match Pin::new(&mut *body).poll_frame(cx) {
                    Poll::Pending => {
                        ended |= link.drive(cx);
                        Pin::new(&mut *body).poll_frame(cx)
                    }
                    ready => ready,
                });
                if ended {
                    self.link = None;
                }
                polled
            }
        };
        if let Poll::Ready(None) = polled {
            self.release();
        }
        polled
    }

    /// Takes what has come already, so that a short answer nobody wants does not cost its connection.
    pub fn discard(mut self) {
        let mut bytes = 0;
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(Ok(frame))) = self.poll_frame(&mut cx) {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > BUFFER_BYTES_MAX {
                return;
            }
        }
    }

    /// Whether it is known that nothing will come.
    pub fn is_empty(&self) -> bool {
        self.body.is_end_stream()
    }

    fn release(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        link.used = Instant::now();
        if link.is_usable() {
            let mut idle = self.home.of(self.lane);
            idle.push_back(link);
            let surplus = if idle.len() > IDLE_CONNECTIONS_MAX { idle.pop_front() } else { None };
            drop(idle);
            drop(surplus);
        }
    }
}
