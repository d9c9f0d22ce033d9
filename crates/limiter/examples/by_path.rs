//! Two requests a second to each path, whoever sends them; never more than that in any second.

use std::error::Error;

use axum::{Router, routing::get};
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};
use tollgate_limiter::{Algorithm, limit};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let rule = Rule::new("path", limit!("2/second"), Per::path()).algorithm(Algorithm::MovingWindow);
    let limits = RateLimitLayer::from_url("memory://")?.limit(rule)?;
    Ok(Router::new().route("/{page}", get(|| async { "hello" })).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
