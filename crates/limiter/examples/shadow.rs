//! A limit on trial: it counts and says so in the headers, but refuses nobody. The real one stands beside it.

use std::error::Error;

use axum::{Router, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Meter, Per, RateLimitLayer, Rule};

/// What the trial would have refused.
async fn answer(axum::Extension(meter): axum::Extension<Meter>) -> String {
    let standings = meter.standings();
    let refused = standings.iter().filter(|standing| standing.limit.is_shadow() && !standing.taken);
    format!("{} would have refused", refused.count())
}

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let limits = RateLimitLayer::from_url("memory://")?
        .limit(Rule::new("now", limit!("100/minute"), Per::everyone()))?
        .limit(Rule::new("soon", limit!("1/minute"), Per::everyone()).shadow())?;
    Ok(Router::new().route("/", get(answer)).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
