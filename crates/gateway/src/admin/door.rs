//! Who may ask the admin API: the key, what its role allows, and how often somebody may guess.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderValue};
use subtle::ConstantTimeEq;
use tollgate_limiter::{
    Algorithm, Charge, Dimension, Limit, MemoryStore, Quota, Retry, Scope, Standing, SystemClock,
};

use super::{Peer, Problem, ask};
use crate::Gateway;
use crate::config::{Role, Secret, Server};
use crate::control::Author;
use crate::identity::{client_address, counted};

/// Wrong keys that one address may send; then it is not listened to, right or wrong.
const GUESSES: Quota = tollgate_limiter::limit!("10/minute");

/// The way in.
#[derive(Clone)]
pub(super) struct Door {
    gateway: Arc<Gateway>,
    guesses: Arc<Guesses>,
}

impl Door {
    /// Nobody has guessed so far.
    pub(super) fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway, guesses: Arc::new(Guesses::new()) }
    }
}

/// Wrong keys by address, in bounded memory.
struct Guesses {
    store: MemoryStore,
    limit: Arc<Limit>,
}

impl Guesses {
    fn new() -> Self {
        let per = Scope::of([Dimension::Ip]);
        let limit = Limit::new("admin-keys", GUESSES, Algorithm::MovingWindow, per)
            .expect("ten requests in a minute can be counted exactly");
        Self { store: MemoryStore::new(SystemClock), limit: Arc::new(limit) }
    }

    fn charge(&self, address: IpAddr) -> Charge {
        let address = counted(address).to_string();
        let subject = self.limit.scope().subject(|_| Cow::Borrowed(&*address)).unauthenticated();
        Charge::new(self.limit.clone(), subject, 1)
    }

    /// How long this address must wait before it is listened to.
    fn wait(&self, address: IpAddr) -> Option<Duration> {
        self.store.peek(vec![self.charge(address)]).first().and_then(wait)
    }

    /// A wrong key came from there.
    fn note(&self, address: IpAddr) {
        // Dropped, it stays counted.
        drop(self.store.reserve(vec![self.charge(address)]));
    }
}

fn wait(said: &Standing) -> Option<Duration> {
    match said.retry {
        Retry::After(wait) => Some(Duration::from_millis(wait.get())),
        Retry::Now | Retry::Never => None,
    }
}

/// The parameters of a query that may be given; `None`: there is nothing to ask.
pub(super) type Asked = Option<Arc<[&'static str]>>;

/// Whether who asked with these headers would still be let in to read, as it is configured now.
pub(super) fn is_open(server: &Server, headers: &HeaderMap) -> bool {
    needs_no_key(server) || known(server, headers).is_some()
}

fn needs_no_key(server: &Server) -> bool {
    server.admin_key.is_none() && server.admin_keys.is_empty()
}

/// Lets in who has a key whose role is enough and asks what can be asked, and says who that is.
pub(super) async fn gate(
    State((door, needed, asked)): State<(Door, Role, Asked)>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(Peer(peer)) = request.extensions().get().copied() else {
        return Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "nobody asked").into_response();
    };
    let now = door.gateway.snapshot.load_full();
    let server = &now.config.server;
    let forwarded = request.headers().get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes);
    let address = client_address(&server.trusted_proxies, forwarded, peer);
    let (name, role) = match known(server, request.headers()) {
        // Without any key the listener is on a loopback address: the configuration refuses anything else. A browser there
        // asks in the name of any page that it shows.
        _ if needs_no_key(server) => {
            if is_foreign(&request) {
                let detail = "a page of somebody else asks: set server.admin_key, or ask by the address of this listener";
                return Problem::new(StatusCode::FORBIDDEN, detail).into_response();
            }
            ("admin", Role::Admin)
        }
        known => {
            if let Some(wait) = door.guesses.wait(address) {
                let detail = "too many wrong admin keys came from this address";
                return Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).after(wait).into_response();
            }
            match known {
                Some(known) => known,
                None => {
                    // Who sends nothing guesses nothing.
                    if !sent(request.headers()).is_empty() {
                        door.guesses.note(address);
                    }
                    let detail = "the admin key is missing or wrong";
                    return Problem::new(StatusCode::UNAUTHORIZED, detail).into_response();
                }
            }
        }
    };
    if role < needed {
        let detail = format!(
            "the key `{name}` is that of a {}; this needs the role {}",
            role.as_str(),
            needed.as_str()
        );
        return Problem::new(StatusCode::FORBIDDEN, detail).into_response();
    }
    if let Some(Err(problem)) = asked.map(|asked| ask::only(request.uri().query(), &asked)) {
        return problem.into_response();
    }
    request.extensions_mut().insert(Author { name: name.to_owned(), address });
    let mut answer = next.run(request).await;
    // Some answers have a new key in them.
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// Whether a browser asks in the name of a page that is not ours: of another origin, or of a name that was made to lead here.
fn is_foreign(request: &Request) -> bool {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = request.headers().get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let same = |origin: &str| origin.split_once("://").is_some_and(|(_, authority)| Some(authority) == host);
    let ours = |host: &str| {
        let name = host.parse::<http::uri::Authority>();
        let name = name.as_ref().map_or("", |authority| authority.host());
        let ip = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        // Nobody outside has a name without a dot: `localhost`, or one of a container.
        ip.is_ok() || !name.contains('.')
    };
    origin.is_some_and(|origin| !same(origin)) || host.is_some_and(|host| !ours(host))
}

/// Name and role of the key that was sent. Every key is compared, so that the time says nothing of which.
fn known<'a>(server: &'a Server, headers: &HeaderMap) -> Option<(&'a str, Role)> {
    let first = server.admin_key.as_ref().map(|key| ("admin", key, Role::Admin));
    let others = server.admin_keys.iter().map(|key| (&*key.name, &key.key, key.role));
    let all = first.into_iter().chain(others);
    all.fold(None, |found, (name, key, role)| if carries(headers, key) { Some((name, role)) } else { found })
}

/// Whether `X-Admin-Key` or `Authorization: Bearer` is this key; takes the same time whatever was sent.
pub(super) fn carries(headers: &HeaderMap, key: &Secret) -> bool {
    sent(headers).ct_eq(key.expose().as_bytes()).into()
}

fn sent(headers: &HeaderMap) -> &[u8] {
    let bearer =
        headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    headers.get("x-admin-key").map(HeaderValue::as_bytes).or(bearer).unwrap_or_default()
}
