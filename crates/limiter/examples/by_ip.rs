//! Thirty requests a minute per address, at most five at once; behind a proxy of one's own.

use std::{error::Error, net::SocketAddr};

use axum::{Router, extract::ConnectInfo, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let per_ip = Per::forwarded_ip("10.0.0.0/8, ::1".parse()?, |parts| {
        Some(parts.extensions.get::<ConnectInfo<SocketAddr>>()?.ip())
    });
    let rule = Rule::new("ip", limit!("30/minute burst 5"), per_ip);
    let limits = RateLimitLayer::from_url("memory://")?.limit(rule)?;
    Ok(Router::new().route("/", get(|| async { "hello" })).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    let service = app()?.into_make_service_with_connect_info::<SocketAddr>();
    Ok(axum::serve(listener, service).await?)
}
