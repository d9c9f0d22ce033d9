//! An answer of one's own to refused requests, and every header family.

use std::error::Error;

use axum::http::{Response, header::CONTENT_TYPE};
use axum::{Router, routing::get};
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Family, Per, RateLimitLayer, Rule};

pub(crate) fn app() -> Result<Router, Box<dyn Error>> {
    use Family::{Anthropic, OpenAi, RateLimit, Source, XRateLimit};
    let limits = RateLimitLayer::from_url("memory://")?
        .limit(Rule::new("all", limit!("1/minute"), Per::everyone()))?
        .headers([RateLimit, XRateLimit, OpenAi, Anthropic, Source])
        .on_reject(|denial, _| {
            let body = format!(r#"{{"error":"slow down","limit":"{}"}}"#, denial.binding().limit.id());
            let mut response = Response::new(body);
            *response.status_mut() = axum::http::StatusCode::TOO_MANY_REQUESTS;
            response.headers_mut().insert(CONTENT_TYPE, "application/json".parse().expect("a valid value"));
            response
        });
    Ok(Router::new().route("/", get(|| async { "hello" })).layer(limits))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    Ok(axum::serve(listener, app()?).await?)
}
