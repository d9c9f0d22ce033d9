//! Listeners, connections, drain: where sockets are.
//!
//! Our own accept loop, because the bounds that matter are per connection: how many, per address, how slow, how
//! large. What happens inside a request is [`crate::pipeline`]'s.

pub mod framing;
pub mod guard;
mod http1;
mod rewound;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{Response, StatusCode};
use http_body::Body as HttpBody;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::guard::{Exchange, Exchanges, Guard, Held};
use self::http1::Speaks;
use self::rewound::Rewound;
use crate::error::{BodyError, Error, raw_response};
use crate::fields::Fields;
use crate::headers::{self, Lines};
use crate::identity::counted;
use crate::ids::{RequestId, Trace};
use crate::ledger::{Entry, Outcome};
use crate::metrics::{ByReason, OTHER};
use crate::pipeline::Arrival;
use crate::relay::{Body, Reply};
use crate::request::{Request, Target};
use crate::upstream::Lane;
use crate::{Gateway, admin, pipeline};

/// Connections that wait in the kernel to be accepted.
const BACKLOG: u32 = 4096;

/// File descriptors kept for what is not a caller: admin, log, Redis, files.
const DESCRIPTORS_RESERVED: u64 = 64;

/// After an `accept` that failed for lack of descriptors: long enough not to spin, short enough to recover in time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Requests one HTTP/2 connection may have open. Each may need a connection to a provider, so not many.
const H2_STREAMS_MAX: u32 = 32;

/// Bytes buffered for a reader slower than the provider.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// What a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// `/v1/*` only.
    Data,
    /// Health, metrics, `/admin/*` only.
    Admin,
    /// Both on one port.
    Both,
}

impl Plane {
    /// Its name in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Admin => "admin",
            Self::Both => "data and admin",
        }
    }
}

/// A plane with what answers its admin paths.
#[derive(Clone)]
struct Planes {
    plane: Plane,
    admin: Option<axum::Router>,
}

impl Planes {
    /// What answers this, unless the pipeline does.
    fn admin_of(&self, target: &Target) -> Option<&axum::Router> {
        self.admin.as_ref().filter(|_| self.plane == Plane::Admin || admin::is_admin_path(target.path()))
    }
}

/// Opens a listening socket.
///
/// # Errors
/// When the address is taken or not ours, naming it.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let open = || {
        let socket = if address.is_ipv4() {
            tokio::net::TcpSocket::new_v4()?
        } else {
            tokio::net::TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|error: io::Error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })
}

/// Accepts connections until the gateway closes and deals them to the workers; each runs as a task of `connections`.
pub async fn accept(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    plane: Plane,
    workers: Vec<Handle>,
    connections: TaskTracker,
) {
    let door = Arc::new(Door::new());
    let admin = (plane != Plane::Data).then(|| admin::router(gateway.clone()));
    let planes = Planes { plane, admin };
    let closing = closing_of(&gateway, plane);
    let mut next = 0_usize;
    loop {
        let accepted = tokio::select! {
            () = closing.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => match door.enter(&gateway, peer.ip().to_canonical(), plane) {
                Ok(visit) => {
                    let (lane, worker) = (next % workers.len(), &workers[next % workers.len()]);
                    next = next.wrapping_add(1);
                    let serving =
                        serve(gateway.clone(), socket.into_std(), visit, planes.clone(), Lane(lane));
                    drop(connections.spawn_on(serving, worker));
                }
                Err(reason) => {
                    gateway.metrics().connections_refused.get_or_create(&ByReason { reason }).inc();
                }
            },
            // Out of descriptors or memory; anything else was the one connection's trouble.
            Err(error) if connection_error(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections for the moment");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Callers are turned away once the gateway closes; operators watch until its last stream has ended.
fn closing_of(gateway: &Gateway, plane: Plane) -> CancellationToken {
    match plane {
        Plane::Admin => gateway.ending.child_token(),
        Plane::Data | Plane::Both => gateway.closing.child_token(),
    }
}

fn connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Counts who is inside, in all and per address.
struct Door {
    places: Arc<Semaphore>,
    per_ip: Mutex<HashMap<IpAddr, usize>>,
}

/// One connection that was let in; leaving is dropping it.
struct Visit {
    door: Arc<Door>,
    gateway: Arc<Gateway>,
    peer: IpAddr,
    /// Counted per address.
    limited: bool,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Door {
    /// As many places as there are descriptors for: each connection may need a second one to a provider.
    fn new() -> Self {
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let places = descriptors.unwrap_or(u64::MAX).saturating_sub(DESCRIPTORS_RESERVED) / 2;
        let places = usize::try_from(places).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)), per_ip: Mutex::default() }
    }

    fn enter(
        self: &Arc<Self>,
        gateway: &Arc<Gateway>,
        peer: IpAddr,
        plane: Plane,
    ) -> Result<Visit, &'static str> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| "total")?;
        let now = gateway.snapshot.load();
        let server = &now.config.server;
        // Everybody behind a proxy has its address; operators must always get in.
        let limited = plane != Plane::Admin && !server.trusted_proxies.iter().any(|net| net.contains(&peer));
        if limited {
            let mut per_ip = self.per_ip.lock().unwrap_or_else(PoisonError::into_inner);
            let open = per_ip.entry(counted(peer)).or_default();
            if *open >= server.max_connections_per_ip {
                return Err("per_ip");
            }
            *open += 1;
        }
        gateway.metrics().connections.inc();
        Ok(Visit { door: self.clone(), gateway: gateway.clone(), peer, limited, _place: place })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.gateway.metrics().connections.dec();
        if !self.limited {
            return;
        }
        let mut per_ip = self.door.per_ip.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = per_ip.get_mut(&counted(self.peer)) {
            *open -= 1;
            if *open == 0 {
                per_ip.remove(&counted(self.peer));
            }
        }
    }
}

async fn serve(
    gateway: Arc<Gateway>,
    socket: io::Result<std::net::TcpStream>,
    visit: Visit,
    planes: Planes,
    lane: Lane,
) {
    // It was accepted elsewhere; from here on this worker's event loop watches it.
    let Ok(socket) = socket.and_then(TcpStream::from_std) else { return };
    // Fails only on a connection that is gone already.
    let _ = socket.set_nodelay(true);
    let refusals = gateway.clone();
    let peer = visit.peer;
    let refuse = Arc::new(move |violation: &framing::Violation| {
        let status = StatusCode::from_u16(violation.status()).unwrap_or(StatusCode::BAD_REQUEST);
        refusals.metrics().connections_refused.get_or_create(&ByReason { reason: "malformed" }).inc();
        let none = Fields::default();
        let (id, trace) = (RequestId::of(&none), Trace::of(&none).id);
        let mut entry = Entry::open(&refusals.ledger, OTHER, None, id, trace, peer);
        entry.status = Some(status);
        entry.outcome = Some(Outcome::Refused);
        raw_response(status, &violation.to_string(), entry.request_id.as_str())
    });
    let mut guard = Guard::new(socket, guard::Limits::default(), refuse);
    let closing = closing_of(&gateway, planes.plane);
    let ending = gateway.ending.child_token();
    let requests = Requests { gateway, exchanges: guard.exchanges(), peer, lane, planes, ending };
    let mut received = BytesMut::new();
    // How a connection ends is the caller's affair: requests ended with their entries.
    match http1::greeting(&mut guard, &mut received, &closing).await {
        Some(Speaks::Http1) => {
            let answer = |request| requests.answer(request, requests.exchanges.begin());
            let _ = http1::serve(guard, received, &closing, &requests.ending, answer).await;
        }
        Some(Speaks::Http2) => serve_http2(Rewound::new(received.freeze(), guard), &closing, requests).await,
        None => {}
    }
    drop(visit);
}

async fn serve_http2(socket: Rewound<Guard<TcpStream>>, closing: &CancellationToken, requests: Requests) {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(guard::Limits::default().head_bytes as u32)
        .max_send_buf_size(WRITE_BYTES_MAX)
        .keep_alive_interval(Duration::from_secs(30));
    let requests = Arc::new(requests);
    let service = service_fn(|request: http::Request<Incoming>| {
        let (requests, exchange) = (requests.clone(), requests.exchanges.begin());
        let request = Request::from(request).map(|body| body.map_err(broken));
        async move {
            let mut ended = pin!(requests.ending.cancelled());
            let mut answering = pin!(requests.answer(request, exchange));
            let reply = poll_fn(|cx| poll_told(cx, ended.as_mut(), answering.as_mut())).await;
            Ok::<_, Infallible>(Response::from(reply))
        }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let finished = tokio::select! {
        biased;
        _ = connection.as_mut() => true,
        () = closing.cancelled() => false,
    };
    if !finished {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
}

/// The requests of one connection.
struct Requests {
    gateway: Arc<Gateway>,
    exchanges: Exchanges,
    peer: IpAddr,
    lane: Lane,
    planes: Planes,
    /// Cancelled when requests must end because the process does. The connection's own: each request looks at it, and
    /// one for all would be fought over by all cores.
    ending: CancellationToken,
}

impl Requests {
    /// Answers one. To be called exactly once for each; to be polled when `ending` is cancelled, by whoever polls it.
    async fn answer<B>(&self, request: Request<B>, mut exchange: Exchange) -> Reply<Held<Body>>
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + Unpin + 'static,
    {
        let request_id = RequestId::of(&request.head.fields);
        let reply = match self.planes.admin_of(&request.head.target) {
            // The rare one is boxed, so that the common one is not made as large.
            Some(admin) => {
                let answering = admin::answer(admin.clone(), request.into(), self.peer);
                caught(Box::pin(answering), &request_id).await
            }
            None => {
                let arrival = Arrival { request_id, peer: self.peer, lane: self.lane, ending: &self.ending };
                caught(pin!(pipeline::answer(&self.gateway, request, &arrival)), &request_id).await
            }
        };
        if let Some(deadline) = reply.body.deadline() {
            exchange.until(deadline.into());
        }
        reply.map(|body| exchange.hold(body))
    }
}

/// A defect in one request is that request's: its entry has ended with the unwinding.
async fn caught(answering: impl Future<Output = Reply> + Unpin, request_id: &RequestId) -> Reply {
    let answered = AssertUnwindSafe(answering).catch_unwind().await;
    answered.unwrap_or_else(|_| internal_error(request_id))
}

/// What `answering` gives, which is polled once more when `ended` is ready: it looks by itself whether it must end, but
/// waits for something else. A connection of HTTP/1 waits for its end once and not again with each request.
fn poll_told<F: Future>(
    cx: &mut Context<'_>,
    mut ended: Pin<&mut impl Future<Output = ()>>,
    mut answering: Pin<&mut F>,
) -> Poll<F::Output> {
    match answering.as_mut().poll(cx) {
        Poll::Pending if ended.as_mut().poll(cx).is_ready() => answering.poll(cx),
        polled => polled,
    }
}

/// Why the body of a request in HTTP/2 broke off.
fn broken(_: hyper::Error) -> BodyError {
    BodyError::Left
}

fn internal_error(request_id: &RequestId) -> Reply {
    let mut fields = Lines::new();
    headers::request(&mut fields, request_id);
    Error::Internal.headers(&mut fields);
    Reply { status: Error::Internal.status(), fields, body: Body::plain(Error::Internal.body()) }
}
