//! Three requests a minute per API key.

use std::error::Error;

use axum::{Router, http::HeaderName, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let per_key = Per::header(HeaderName::from_static("x-api-key"));
    let limits =
        RateLimitLayer::from_url("memory://")?.limit(Rule::new("free", limit!("3/minute"), per_key))?;
    Ok(Router::new().route("/", get(|| async { "hello" })).route_layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
