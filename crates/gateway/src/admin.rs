//! What operators ask: health, metrics, and the admin API under `/admin/*`, behind its gate.
//!
//! A handler takes the gateway and an [`Ask`], and gives an answer or a [`Problem`]; [`ask::write`] is the one way in which
//! it changes something. Its route stands in [`api`].

mod ask;
mod audit;
mod bans;
mod configuration;
mod fields;
mod keys;
mod limits;
mod models;
mod problem;
mod rate_limit;
mod users;

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request as Asked, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response as Answer};
use axum::routing::{any, get, post, put};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use subtle::ConstantTimeEq;
use tollgate_limiter::{Limit, WhenDown};
use tower_service::Service;

use self::ask::Ask;
use self::problem::Problem;
use crate::Gateway;
use crate::config::Secret;
use crate::control::Author;
use crate::identity::client_address;
use crate::relay::Body;

/// What Prometheus sends its scrape's answer as.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What every handler is given.
type Shared = State<Arc<Gateway>>;

/// What every handler gives.
type Reply = Result<Answer, Problem>;

/// Whether a path belongs here when one port serves everything.
pub fn is_admin_path(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz" | "/healthz" | "/metrics")
        || path == "/admin"
        || path.starts_with("/admin/")
}

/// All of it.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let gate = middleware::from_fn_with_state(gateway.clone(), gate);
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(ready))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .merge(api().route_layer(gate))
        .fallback(nothing)
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this path is not asked with this method")
        })
        .with_state(gateway)
}

/// `/admin/*`: a line for each path.
fn api() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/admin/keys", get(keys::list).post(keys::create))
        .route("/admin/keys/import", post(keys::import))
        .route("/admin/keys/{id}", get(keys::show).patch(keys::patch).delete(keys::delete))
        .route("/admin/keys/{id}/rotate", post(keys::rotate))
        .route("/admin/keys/{id}/revoke", post(keys::revoke))
        .route("/admin/users", get(users::list).post(users::create))
        .route("/admin/users/{name}", get(users::show).patch(users::patch).delete(users::delete))
        .route("/admin/bans", get(bans::list).post(bans::create))
        .route("/admin/bans/{id}", get(bans::show).delete(bans::delete))
        .route("/admin/limits", get(limits::list))
        .route("/admin/limits/{*name}", get(limits::show).put(limits::put).delete(limits::delete))
        .route("/admin/rate-limit/config", put(rate_limit::configure))
        .route("/admin/rate-limit/clear", post(rate_limit::clear))
        .route("/admin/models", get(models::list))
        .route(
            "/admin/models/{model}/providers/{provider}/drain",
            post(models::drain).delete(models::undrain),
        )
        .route("/admin/audit", get(audit::list))
        .route("/admin/config", get(configuration::show))
        .route("/admin/config/check", post(configuration::check))
        .route("/admin/config/reload", post(configuration::reload))
        .route("/admin", any(nothing))
        .route("/admin/{*rest}", any(nothing))
}

/// Answers one request of an operator; `peer` is at the other end of its connection.
pub async fn answer(mut router: Router, mut request: Request<Incoming>, peer: IpAddr) -> Response<Body> {
    request.extensions_mut().insert(Peer(peer));
    let answered = match router.call(request.map(axum::body::Body::new)).await {
        Ok(answered) => answered,
        Err(never) => match never {},
    };
    let (head, body) = answered.into_parts();
    // Whole bodies only, made in memory by the handlers above.
    let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    Response::from_parts(head, Body::plain(bytes))
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy)]
struct Peer(IpAddr);

/// Ready until the process begins to end; without Redis too, unless that would refuse requests.
async fn ready(State(gateway): Shared) -> Answer {
    if gateway.leaving.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    let closed = |limit: &Limit| limit.while_down() == WhenDown::Closed;
    if gateway.limits.is_degraded() && gateway.snapshot.load().config.limits().any(|(_, limit)| closed(limit))
    {
        let why = "Redis does not answer, and a limit is closed until it does\n";
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    }
    "ok\n".into_response()
}

async fn metrics(State(gateway): Shared, headers: HeaderMap) -> Reply {
    let key = gateway.snapshot.load().config.server.metrics_key.clone();
    if !key.is_none_or(|key| carries(&headers, &key)) {
        return Err(Problem::new(StatusCode::UNAUTHORIZED, "the metrics key is missing or wrong"));
    }
    Ok(([(header::CONTENT_TYPE, OPENMETRICS)], gateway.metrics().encode()).into_response())
}

async fn nothing() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is nothing here")
}

/// Lets in who has the admin key, and says who that is.
async fn gate(State(gateway): Shared, mut request: Asked, next: Next) -> Answer {
    let now = gateway.snapshot.load_full();
    let server = &now.config.server;
    // Without a key the listener is on a loopback address: the configuration refuses anything else.
    if !server.admin_key.as_ref().is_none_or(|key| carries(request.headers(), key)) {
        return Problem::new(StatusCode::UNAUTHORIZED, "the admin key is missing or wrong").into_response();
    }
    let Some(Peer(peer)) = request.extensions().get().copied() else {
        return Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "nobody asked").into_response();
    };
    let address = client_address(&server.trusted_proxies, request.headers(), peer);
    request.extensions_mut().insert(Author { name: "admin".to_owned(), address });
    next.run(request).await
}

/// Whether `X-Admin-Key` or `Authorization: Bearer` is this key; takes the same time whatever was sent.
fn carries(headers: &HeaderMap, key: &Secret) -> bool {
    let bearer =
        headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let sent = headers.get("x-admin-key").map(HeaderValue::as_bytes).or(bearer).unwrap_or_default();
    sent.ct_eq(key.expose().as_bytes()).into()
}
