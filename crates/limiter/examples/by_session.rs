//! Ten requests a minute per session, which is an address and a user agent; and because a user agent is free to
//! change, thirty per address.

use std::{error::Error, net::IpAddr, net::SocketAddr};

use axum::http::request::Parts;
use axum::{Router, extract::ConnectInfo, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let peer =
        |parts: &Parts| -> Option<IpAddr> { Some(parts.extensions.get::<ConnectInfo<SocketAddr>>()?.ip()) };
    let limits = RateLimitLayer::from_url("memory://")?
        .limit(Rule::new("session", limit!("10/minute"), Per::session(peer)))?
        .limit(Rule::new("ip", limit!("30/minute"), Per::ip(peer)))?;
    Ok(Router::new().route("/", get(|| async { "hello" })).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    let service = app()?.into_make_service_with_connect_info::<SocketAddr>();
    Ok(axum::serve(listener, service).await?)
}
