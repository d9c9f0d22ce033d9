//! The layer with a storage that many processes share: a real Redis.
#![cfg(all(feature = "tower", feature = "redis"))]

mod support;

use std::convert::Infallible;

use http::{Request, Response};
use http_body_util::Full;
use support::server::Server;
use tollgate_limiter::limit;
use tollgate_limiter::tower::{Family, Per, RateLimitLayer, Rule, WhenDown};
use tower::{Layer, ServiceExt, service_fn};

/// Status and `x-tollgate-source` of one request.
async fn send(layer: &RateLimitLayer) -> (u16, String) {
    let inner = service_fn(|_: Request<()>| async {
        Ok::<_, Infallible>(Response::new(Full::<bytes::Bytes>::from(String::new())))
    });
    let response = layer.layer(inner).oneshot(Request::new(())).await.expect("infallible");
    let source =
        response.headers().get("x-tollgate-source").map_or("", |source| source.to_str().expect("ASCII"));
    (response.status().as_u16(), source.to_owned())
}

#[tokio::test]
async fn instances_share_a_limit_and_say_when_they_cannot() {
    let server = Server::start();
    let _ready = server.client().await;
    let instance = || {
        let rule = Rule::new("all", limit!("3/day"), Per::everyone());
        let layer = RateLimitLayer::from_url(&server.url()).expect("an address").headers([Family::Source]);
        layer.limit(rule).expect("it can be counted")
    };
    let (one, other) = (instance(), instance());
    // The first request may come before the first connection, which a decision waits for in its 50 ms.
    while send(&one).await.0 == 503 {}
    while send(&other).await.0 == 503 {}
    let mut granted = 2;
    for turn in 0..6 {
        granted += u64::from(send(if turn % 2 == 0 { &one } else { &other }).await == (200, "redis".into()));
    }
    assert_eq!(granted, 3);
    let (status, source) = send(&one).await;
    assert!(status == 429 && ["redis", "denial_memory"].contains(&&*source), "{status} {source}");
    drop(server);
    let (closed, open) =
        (instance_at("unix:///nowhere"), instance_at("unix:///nowhere").when_down(WhenDown::Open));
    assert_eq!(send(&closed).await, (503, String::new()));
    assert_eq!(send(&open).await, (200, String::new()));
}

#[tokio::test]
async fn instances_share_slots() {
    let server = Server::start();
    let _ready = server.client().await;
    let instance = || {
        let rule = Rule::new("slots", limit!("1 concurrent"), Per::everyone());
        RateLimitLayer::from_url(&server.url()).expect("an address").limit(rule).expect("it can be counted")
    };
    let inner = service_fn(|_: Request<()>| async {
        Ok::<_, Infallible>(Response::new(Full::<bytes::Bytes>::from("hello")))
    });
    let (one, other) = (instance(), instance());
    let status = async |layer: &RateLimitLayer| {
        let response = layer.layer(inner).oneshot(Request::new(())).await.expect("infallible");
        (response.status().as_u16(), response)
    };
    let start = std::time::Instant::now();
    // Held until its body is gone: a slot that comes back is seen by the other.
    for turn in 0..4 {
        let (mine, theirs) = if turn % 2 == 0 { (&one, &other) } else { (&other, &one) };
        let held = loop {
            let (code, response) = status(mine).await;
            if code == 200 {
                break response;
            }
            assert!(start.elapsed().as_secs() < 20, "{code}");
        };
        while status(theirs).await.0 != 429 {
            assert!(start.elapsed().as_secs() < 20, "never refused");
        }
        drop(held);
    }
}

fn instance_at(url: &str) -> RateLimitLayer {
    let rule = Rule::new("all", limit!("3/day"), Per::everyone());
    RateLimitLayer::from_url(url).expect("an address").limit(rule).expect("it can be counted")
}
