//! Some requests cost more: an export costs 10, everything else 1, out of 12 a minute.

use std::error::Error;

use axum::{Router, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let rule = Rule::new("work", limit!("12/minute"), Per::everyone())
        .cost(|parts| if parts.uri.path() == "/export" { 10 } else { 1 });
    let limits = RateLimitLayer::from_url("memory://")?.limit(rule)?;
    let app = Router::new().route("/", get(|| async { "hello" })).route("/export", get(|| async { "much" }));
    Ok(app.layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
