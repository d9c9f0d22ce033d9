//! What a stream costs is known at its end: 60 tokens are reserved, and what was sent is settled. A client that leaves
//! early pays for what it got.

use std::{convert::Infallible, error::Error};

use axum::{Extension, Router, body::Body, routing::get};
use futures_util::{StreamExt, stream};
use tollgate_limiter::tower::{Family, Meter, Per, RateLimitLayer, Rule};
use tollgate_limiter::{Algorithm, Unit, limit};

async fn answer(Extension(meter): Extension<Meter>) -> Body {
    let words = ["four ", "words ", "are ", "sent"];
    Body::from_stream(stream::iter(1..).zip(stream::iter(words)).map(move |(sent, word)| {
        meter.used(Unit::Tokens, sent);
        Ok::<_, Infallible>(word)
    }))
}

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    let rule = Rule::new("tokens", limit!("100 tokens/day"), Per::everyone()).reserve(|_| 60);
    let limits = RateLimitLayer::from_url("memory://")?
        .limit(rule.algorithm(Algorithm::SlidingWindow))?
        .headers([Family::OpenAi]);
    Ok(Router::new().route("/", get(answer)).route_layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
