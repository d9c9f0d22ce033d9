//! Health and metrics, and the gate in front of `/admin/*`.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response as Answer};
use axum::routing::{any, get};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use subtle::ConstantTimeEq;
use tollgate_limiter::{Limit, WhenDown};
use tower_service::Service;

use crate::Gateway;
use crate::config::Secret;
use crate::relay::Body;

/// What Prometheus sends its scrape's answer as.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether a path belongs here when one port serves everything.
pub fn is_admin_path(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz" | "/healthz" | "/metrics")
        || path == "/admin"
        || path.starts_with("/admin/")
}

/// The admin API.
pub fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(ready))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/admin", any(admin))
        .route("/admin/{*rest}", any(admin))
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "there is nothing here") })
        .with_state(gateway)
}

/// Answers one request of an operator.
pub async fn answer(mut router: Router, request: Request<Incoming>) -> Response<Body> {
    let answered = match router.call(request.map(axum::body::Body::new)).await {
        Ok(answered) => answered,
        Err(never) => match never {},
    };
    let (head, body) = answered.into_parts();
    // Whole bodies only, made in memory by the handlers above.
    let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    Response::from_parts(head, Body::plain(bytes))
}

/// Ready until the process begins to end; without Redis too, unless that would refuse requests.
async fn ready(State(gateway): State<Arc<Gateway>>) -> Answer {
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

async fn metrics(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Answer {
    let key = gateway.snapshot.load().config.server.metrics_key.clone();
    if !key.is_none_or(|key| carries(&headers, &key)) {
        return problem(StatusCode::UNAUTHORIZED, "the metrics key is missing or wrong");
    }
    ([(header::CONTENT_TYPE, OPENMETRICS)], gateway.metrics().encode()).into_response()
}

async fn admin(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Answer {
    // Without a key the listener is on a loopback address: the configuration refuses anything else.
    let key = gateway.snapshot.load().config.server.admin_key.clone();
    if !key.is_none_or(|key| carries(&headers, &key)) {
        return problem(StatusCode::UNAUTHORIZED, "the admin key is missing or wrong");
    }
    problem(StatusCode::NOT_FOUND, "there is nothing here")
}

/// Whether `X-Admin-Key` or `Authorization: Bearer` is this key; takes the same time whatever was sent.
fn carries(headers: &HeaderMap, key: &Secret) -> bool {
    let bearer =
        headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let sent = headers.get("x-admin-key").map(HeaderValue::as_bytes).or(bearer).unwrap_or_default();
    sent.ct_eq(key.expose().as_bytes()).into()
}

/// RFC 9457.
fn problem(status: StatusCode, detail: &str) -> Answer {
    let title = status.canonical_reason().unwrap_or_default();
    let body = serde_json::json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail });
    let content = [(header::CONTENT_TYPE, "application/problem+json")];
    (status, content, Bytes::from(body.to_string())).into_response()
}
