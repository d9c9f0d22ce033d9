//! At most two answers at a time, from the first byte of the request to the last byte of the answer.

use std::error::Error;

use axum::{Router, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let rule = Rule::new("slots", limit!("2 concurrent"), Per::everyone());
    let limits = RateLimitLayer::from_url("memory://")?.limit(rule)?;
    Ok(Router::new().route("/", get(|| async { "slow work" })).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
