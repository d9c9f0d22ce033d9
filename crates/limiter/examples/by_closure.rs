//! A hundred requests an hour per tenant, which is the first label of the host; the health check is free.

use std::error::Error;

use axum::{Router, http::header::HOST, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let per_tenant = Per::value(|parts| {
        let (tenant, _) = parts.headers.get(HOST)?.to_str().ok()?.split_once('.')?;
        Some(tenant.to_ascii_lowercase())
    });
    let rule =
        Rule::new("tenant", limit!("100/hour"), per_tenant).when(|parts| parts.uri.path() != "/health");
    let limits = RateLimitLayer::from_url("memory://")?.limit(rule)?;
    let app = Router::new().route("/", get(|| async { "hello" })).route("/health", get(|| async { "ok" }));
    Ok(app.layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
