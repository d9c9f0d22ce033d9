//! What operators ask: health, metrics, and the admin API under `/admin/*`, behind its gate.
//!
//! A handler takes the gateway and an `Ask`, and gives an answer or a `Problem`; `ask::write` is the one way in which
//! it changes something. Its route stands in `routes`.

mod ask;
mod audit;
mod bans;
mod configuration;
mod door;
mod events;
mod explain;
mod fields;
mod history;
mod instances;
mod keys;
mod limits;
mod models;
mod openapi;
mod problem;
mod rate_limit;
mod requests;
mod routes;
mod stats;
mod usage;
mod users;
mod walk;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::middleware;
use axum::response::{IntoResponse, Response as Answer};
use axum::routing::{any, get};
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use tollgate_limiter::{Limit, WhenDown};
use tower_service::Service;

use self::ask::Ask;
use self::door::Door;
use self::problem::Problem;
use crate::Gateway;
use crate::config::Role;
use crate::error::BodyError;
use crate::relay::{self, Body};

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
    let door = Door::new(gateway.clone());
    let routes = routes::all();
    let asked = routes::asked(&routes);
    let mounted = routes.into_iter().filter_map(|route| Some((route.mount?, route.role, route.handler)));
    let api = mounted.zip(asked).fold(Router::new(), |api, ((path, role, handler), asked)| {
        let gate = middleware::from_fn_with_state((door.clone(), role, Some(asked)), door::gate);
        api.route(path, handler.route_layer(gate))
    });
    let gate = middleware::from_fn_with_state((door, Role::Viewer, None), door::gate);
    let nowhere = Router::new().route("/admin", any(nothing)).route("/admin/{*rest}", any(nothing));
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(ready))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .merge(api)
        .merge(nowhere.route_layer(gate))
        .fallback(nothing)
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this path is not asked with this method")
        })
        .with_state(gateway)
}

/// OpenAPI 3.1 of the admin API.
pub fn openapi() -> serde_json::Value {
    openapi::document(&routes::all())
}

/// Answers one request of an operator; `peer` is at the other end of its connection.
pub async fn answer<B>(mut router: Router, mut request: Request<B>, peer: IpAddr) -> relay::Reply
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Send + 'static,
{
    request.extensions_mut().insert(Peer(peer));
    let answered = match router.call(request.map(axum::body::Body::new)).await {
        Ok(answered) => answered,
        Err(never) => match never {},
    };
    let (head, body) = answered.into_parts();
    if body.size_hint().exact().is_none() {
        // One that is told as it happens.
        return Response::from_parts(head, Body::Open(Box::pin(body.map_err(io::Error::other)))).into();
    }
    // The others are whole, made in memory by the handlers above.
    let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    Response::from_parts(head, Body::plain(bytes)).into()
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
    if !key.is_none_or(|key| door::carries(&headers, &key)) {
        return Err(Problem::new(StatusCode::UNAUTHORIZED, "the metrics key is missing or wrong"));
    }
    Ok(([(header::CONTENT_TYPE, OPENMETRICS)], gateway.metrics().encode()).into_response())
}

async fn nothing() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is nothing here")
}
