//! Every example is run here, by the requests it is about.
#![cfg(feature = "tower")]
#![allow(dead_code)] // the examples' own `main`

use std::net::SocketAddr;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use tower::ServiceExt;

#[path = "../examples/by_closure.rs"]
mod by_closure;
#[path = "../examples/by_header.rs"]
mod by_header;
#[path = "../examples/by_ip.rs"]
mod by_ip;
#[path = "../examples/by_path.rs"]
mod by_path;
#[path = "../examples/by_session.rs"]
mod by_session;
#[path = "../examples/in_flight.rs"]
mod in_flight;
#[path = "../examples/on_reject.rs"]
mod on_reject;
#[path = "../examples/plain.rs"]
mod plain;
#[path = "../examples/shadow.rs"]
mod shadow;
#[path = "../examples/stream.rs"]
mod stream;
#[path = "../examples/weighted.rs"]
mod weighted;

/// Sends a request with these headers; the header `peer` is the address it comes from.
async fn send(app: &Router, path: &str, headers: &[(&str, &str)]) -> Response<Body> {
    let mut request = Request::builder().uri(path);
    for (name, value) in headers.iter().filter(|(name, _)| *name != "peer") {
        request = request.header(*name, *value);
    }
    let peer = headers.iter().find(|(name, _)| *name == "peer").map_or("192.0.2.1:4711", |(_, peer)| *peer);
    let peer: SocketAddr = peer.parse().expect("an address with a port");
    let request = request.extension(ConnectInfo(peer)).body(Body::empty()).expect("a request");
    app.clone().oneshot(request).await.expect("infallible")
}

/// How many of `times` requests get through before the first is refused.
async fn granted(app: &Router, times: usize, path: &str, headers: &[(&str, &str)]) -> usize {
    for time in 0..times {
        if send(app, path, headers).await.status() == 429 {
            return time;
        }
    }
    times
}

async fn text(response: Response<Body>) -> String {
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    String::from_utf8(bytes.to_vec()).expect("text")
}

fn value<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers.get(name).unwrap_or_else(|| panic!("no `{name}` in {headers:?}")).to_str().expect("ASCII")
}

#[tokio::test]
async fn a_limit_per_header() {
    let app = by_header::app().unwrap();
    let key = |key: &'static str| [("x-api-key", key)];
    // A window may end meanwhile: then one of these is let in again, and the next loop sees the limit.
    assert!((3..=6).contains(&granted(&app, 7, "/", &key("a")).await));
    assert_eq!(send(&app, "/", &key("b")).await.status(), 200);
    // Who leaves the header out is counted with everybody who does.
    let nobody = [("x-other", "1")];
    assert!((3..=6).contains(&granted(&app, 7, "/", &nobody).await));
    let response = send(&app, "/", &key("b")).await;
    assert_eq!(value(response.headers(), "x-ratelimit-limit"), "3");
    assert_eq!(value(response.headers(), "ratelimit-policy"), "\"free-requests-minute\";q=3;w=60");
    assert_eq!(text(response).await, "hello");
}

#[tokio::test]
async fn a_limit_per_address() {
    let app = by_ip::app().unwrap();
    let from = |peer: &'static str| [("peer", peer)];
    assert!((5..8).contains(&granted(&app, 9, "/", &from("192.0.2.1:1")).await));
    // Another port is the same address; another address of one IPv6 network is the same customer.
    assert_eq!(send(&app, "/", &from("192.0.2.1:2")).await.status(), 429);
    assert_eq!(send(&app, "/", &from("[::ffff:192.0.2.1]:2")).await.status(), 429);
    assert!((5..8).contains(&granted(&app, 9, "/", &from("[2001:db8::1]:1")).await));
    assert_eq!(send(&app, "/", &from("[2001:db8::2]:1")).await.status(), 429);
    assert_eq!(send(&app, "/", &from("[2001:db8:0:1::2]:1")).await.status(), 200);
    // A stranger's word about addresses is not believed; that of our own proxies is, from the right.
    let lie = [("peer", "192.0.2.1:2"), ("x-forwarded-for", "198.51.100.1")];
    assert_eq!(send(&app, "/", &lie).await.status(), 429);
    for hops in ["192.0.2.1", "198.51.100.9, 192.0.2.1:99", "1.1.1.1, 192.0.2.1, 10.9.9.9"] {
        let proxied = [("peer", "10.1.2.3:80"), ("x-forwarded-for", hops)];
        assert_eq!(send(&app, "/", &proxied).await.status(), 429, "{hops}");
    }
    let proxied = [("peer", "10.1.2.3:80"), ("x-forwarded-for", "192.0.2.1, 198.51.100.9")];
    assert_eq!(send(&app, "/", &proxied).await.status(), 200);
}

#[tokio::test]
async fn a_limit_per_session() {
    let app = by_session::app().unwrap();
    assert!((10..=20).contains(&granted(&app, 21, "/", &[("user-agent", "a")]).await));
    // A refused request pays nothing, so exactly as many are left for the address.
    let mut others = 0;
    for agent in ["b", "c", "d", "e"] {
        others += granted(&app, 10, "/", &[("user-agent", agent)]).await;
    }
    assert!((20..=40).contains(&others), "{others}");
}

#[tokio::test]
async fn a_limit_per_path() {
    let app = by_path::app().unwrap();
    assert_eq!(granted(&app, 2, "/a", &[]).await, 2);
    assert_eq!(granted(&app, 2, "/b?x=1", &[]).await, 2);
    let response = send(&app, "/b?x=2", &[]).await;
    if response.status() == 429 {
        assert_eq!(value(response.headers(), "retry-after"), "1");
        let wait: u64 = value(response.headers(), "retry-after-ms").parse().unwrap();
        assert!((1..=1_000).contains(&wait), "{wait}");
        assert!(
            text(response).await.starts_with("Rate limit reached: path-requests-second. Limit 2, Used 2")
        );
    }
}

#[tokio::test]
async fn a_limit_per_what_a_closure_says() {
    let app = by_closure::app().unwrap();
    assert!((100..=200).contains(&granted(&app, 201, "/", &[("host", "acme.example.com")]).await));
    assert_eq!(send(&app, "/", &[("host", "other.example.com")]).await.status(), 200);
    let health = send(&app, "/health", &[("host", "acme.example.com")]).await;
    assert_eq!(health.status(), 200);
    assert!(!health.headers().contains_key("ratelimit"));
}

#[tokio::test]
async fn a_weighted_cost() {
    let app = weighted::app().unwrap();
    assert_eq!(granted(&app, 2, "/", &[]).await, 2);
    assert_eq!(send(&app, "/export", &[]).await.status(), 200);
    // 12 of 12, unless a minute has just ended.
    assert!(granted(&app, 2, "/export", &[]).await < 2);
}

#[tokio::test]
async fn a_stream_is_settled_at_its_end() {
    let app = stream::app().unwrap();
    let left = |response: &Response<Body>| -> u64 {
        value(response.headers(), "x-ratelimit-remaining-tokens").parse().unwrap()
    };
    let first = send(&app, "/", &[]).await;
    assert_eq!((first.status().as_u16(), left(&first)), (200, 40));
    assert_eq!(send(&app, "/", &[]).await.status(), 429, "60 are reserved while it runs");
    assert_eq!(text(first).await, "four words are sent");
    let second = send(&app, "/", &[]).await;
    assert_eq!(left(&second), 100 - 4 - 60);
    // Two frames, then the client is gone.
    let mut body = second.into_body();
    for _ in 0..2 {
        body.frame().await.unwrap().unwrap();
    }
    drop(body);
    assert_eq!(left(&send(&app, "/", &[]).await), 100 - 4 - 2 - 60);
}

#[tokio::test]
async fn a_slot_is_held_until_the_last_byte() {
    let app = in_flight::app().unwrap();
    let (first, second) = (send(&app, "/", &[]).await, send(&app, "/", &[]).await);
    // They change all the time: calls in flight are in no header,
    assert!(!first.headers().contains_key("ratelimit"));
    let third = send(&app, "/", &[]).await;
    // until they refuse.
    assert_eq!((third.status().as_u16(), value(third.headers(), "retry-after")), (429, "1"));
    assert_eq!(value(third.headers(), "ratelimit-policy"), "\"slots-concurrency\";q=2");
    assert_eq!(text(first).await, "slow work");
    let fourth = send(&app, "/", &[]).await;
    assert_eq!(fourth.status(), 200);
    drop((second, fourth));
    assert_eq!(send(&app, "/", &[]).await.status(), 200);
}

#[tokio::test]
async fn a_shadow_refuses_nobody() {
    let app = shadow::app().unwrap();
    let mut said = Vec::new();
    for _ in 0..4 {
        let response = send(&app, "/", &[]).await;
        assert_eq!(value(response.headers(), "ratelimit-policy"), "\"now-requests-minute\";q=100;w=60");
        said.push(text(response).await);
    }
    assert_eq!(said[0], "0 would have refused");
    assert!(said.iter().filter(|said| *said == "1 would have refused").count() >= 2, "{said:?}");
}

#[tokio::test]
async fn every_family_and_an_answer_of_ones_own() {
    let app = on_reject::app().unwrap();
    let mut response = send(&app, "/", &[]).await;
    assert_eq!(value(response.headers(), "x-ratelimit-remaining-requests"), "0");
    while response.status() != 429 {
        response = send(&app, "/", &[]).await;
    }
    let headers = response.headers().clone();
    for (name, expected) in [
        ("content-type", "application/json"),
        ("ratelimit-policy", "\"all-requests-minute\";q=1;w=60"),
        ("x-ratelimit-limit", "1"),
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-limit-requests", "1"),
        ("anthropic-ratelimit-requests-limit", "1"),
        ("anthropic-ratelimit-requests-remaining", "0"),
        ("x-tollgate-source", "memory"),
    ] {
        assert_eq!(value(&headers, name), expected);
    }
    // All of the one decision: they name the same moment.
    let unix: u64 = value(&headers, "x-ratelimit-reset").parse().unwrap();
    assert_eq!(unix % 60, 0, "a fixed window ends with the minute");
    let date = value(&headers, "anthropic-ratelimit-requests-reset");
    assert!(date.ends_with(":00Z") && date.len() == 20, "{date}");
    let wait: u64 = value(&headers, "retry-after").parse().unwrap();
    assert_eq!(value(&headers, "ratelimit"), format!("\"all-requests-minute\";r=0;t={wait}"));
    assert!(value(&headers, "x-ratelimit-reset-requests").ends_with('s'));
    assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    assert_eq!(text(response).await, r#"{"error":"slow down","limit":"all-requests-minute"}"#);
}

#[test]
fn without_a_framework() {
    let said = plain::run().unwrap();
    // Estimates of 300: the second fits into 600, the third into 350; a fourth request is one too many.
    let expected =
        ["used 400, 600 left", "used 250, 350 left", "used 90, 260 left", "refused by free-requests-day"];
    assert_eq!(said, expected);
}
