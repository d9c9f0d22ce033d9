//! What the layer refuses, and what it does without axum.
#![cfg(feature = "tower")]

use std::convert::Infallible;
use std::sync::Arc;

use http::{HeaderName, Request, Response};
use http_body_util::{BodyExt, Full};
use tollgate_limiter::tower::{Meter, MeteredBody, Per, Proxies, RateLimitLayer, Rule, Storage};
use tollgate_limiter::{Algorithm, ManualClock, MemoryStore, Millis, Retry, limit};
use tower::{Layer, ServiceExt, service_fn};

const START: u64 = 1_794_614_400_000;

type Body = Full<bytes::Bytes>;

fn store() -> (MemoryStore, ManualClock) {
    let clock = ManualClock::at(Millis(START));
    (MemoryStore::new(clock.clone()), clock)
}

async fn send(layer: &RateLimitLayer, request: Request<()>) -> Response<MeteredBody<Body>> {
    let inner = service_fn(|request: Request<()>| async move {
        let known = request.extensions().get::<Meter>().map_or(0, |meter| meter.standings().len());
        Ok::<_, Infallible>(Response::new(Body::from(format!("{known} limits"))))
    });
    layer.layer(inner).oneshot(request).await.expect("infallible")
}

fn plain() -> Request<()> {
    Request::new(())
}

#[test]
fn urls_are_storages_or_clear_refusals() {
    assert!(Storage::from_url("memory://").unwrap().as_memory().is_some());
    for (url, said) in [
        ("", "write `memory://`"),
        ("memory", "write `memory://`"),
        ("redis://:secret@host:6379/0", "the feature `redis`"),
        ("postgres://secret@host", "allowed: memory://"),
    ] {
        let error = Storage::from_url(url).expect_err("refused").to_string();
        assert!(error.contains(said), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    assert!("nonsense".parse::<Storage>().is_err());
    let file = std::env::temp_dir().join(format!("tollgate-layer-{}.redb", std::process::id()));
    let url = format!("memory://{}", file.display());
    if cfg!(feature = "persist") {
        assert!(Storage::from_url(&url).is_ok());
        std::fs::remove_file(file).unwrap();
        assert!(
            Storage::from_url("memory:///no/such/folder/x").unwrap_err().to_string().contains("cannot be")
        );
    } else {
        assert!(Storage::from_url(&url).unwrap_err().to_string().contains("the feature `persist`"));
    }
    assert!(RateLimitLayer::from_url("redis://host").is_err());
}

#[test]
fn rules_that_cannot_be_counted_are_refused() {
    let layer = || RateLimitLayer::from_url("memory://").expect("there is memory");
    let refused = |layer: RateLimitLayer, rule: Rule| layer.limit(rule).expect_err("refused").to_string();
    let rule = |name: &str| Rule::new(name, limit!("5/minute"), Per::everyone());
    let twice = refused(layer().limit(rule("a")).unwrap(), rule("a"));
    assert!(twice.contains("`a-requests-minute` already"), "{twice}");
    let burst = Rule::new("b", limit!("5/minute burst 2"), Per::everyone()).algorithm(Algorithm::FixedWindow);
    assert!(refused(layer(), burst).contains("burst needs token_bucket"));
    let large = Rule::new("c", limit!("$60k/day"), Per::everyone()).algorithm(Algorithm::SlidingWindow);
    assert!(refused(layer(), large).contains("write fixed_window"));
    let many = (0..16).fold(layer(), |layer, n| layer.limit(rule(&n.to_string())).expect("16 are fine"));
    assert_eq!(many.limits().count(), 16);
    assert!(refused(many, rule("x")).contains("16 rules"));
    for text in ["10.0.0.0/33", "host", "::/129", "10.0.0.0/x", "10.0.0.0/8;::1"] {
        assert!(text.parse::<Proxies>().unwrap_err().to_string().contains("10.0.0.0/8"), "{text}");
    }
    assert_eq!("".parse::<Proxies>(), Ok(Proxies::default()));
    assert!("0.0.0.0/0, ::/0, 192.0.2.1".parse::<Proxies>().is_ok());
}

#[tokio::test]
async fn any_body_and_any_service() {
    let (store, clock) = store();
    let rule = |name, quota| Rule::new(name, quota, Per::everyone());
    let layer = RateLimitLayer::new(store)
        .limit(rule("few", limit!("2/minute")))
        .and_then(|layer| layer.limit(rule("many", limit!("1000 tokens/hour")).reserve(|_| 5_000)))
        .unwrap();
    let response = send(&layer, plain()).await;
    assert_eq!(
        response.headers()["ratelimit"],
        "\"few-requests-minute\";r=1;t=60, \"many-tokens-hour\";r=0;t=3600"
    );
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "2 limits");
    // An estimate is never more than the limit; nothing was settled, so it stands, and refuses for an hour.
    let refused = send(&layer, plain()).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "3600");
    assert_eq!(refused.headers()["x-should-retry"], "false");
    assert_eq!(refused.headers()["x-ratelimit-limit"], "1000");
    let sentence = refused.into_body().collect().await.unwrap().to_bytes();
    let expected = "Rate limit reached: many-tokens-hour. Limit 1000, Used 1000, Requested 1000. Please try again in 1h0m0s.";
    assert_eq!(sentence, expected);
    clock.advance(Millis(3_600_000));
    assert_eq!(send(&layer, plain()).await.status(), 200);
}

#[tokio::test]
async fn an_exact_cost_above_the_limit_is_refused_for_ever() {
    let (store, _) = store();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = Arc::clone(&seen);
    let layer = RateLimitLayer::new(store)
        .limit(Rule::new("size", limit!("10/minute"), Per::everyone()).cost(|_| 11))
        .unwrap()
        .on_reject(move |denial, parts| {
            heard.lock().unwrap().push((denial.retry(), parts.uri.path().to_string()));
            Response::new("never".into())
        });
    let response = send(&layer, plain()).await;
    // The answer is one's own; what a client must know of the limits is added.
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-should-retry"]),
        (200, &"false".parse().unwrap())
    );
    assert!(!response.headers().contains_key("retry-after"));
    assert_eq!(*seen.lock().unwrap(), [(Retry::Never, "/".to_string())]);
}

/// What is in a header may be a secret: it is counted by its hash. Long values are, too.
#[tokio::test]
async fn values_of_headers_are_not_kept() {
    let (store, _) = store();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = Arc::clone(&seen);
    let long = |parts: &http::request::Parts| Some(parts.uri.path().repeat(1_000));
    let layer = RateLimitLayer::new(store)
        .limit(Rule::new("key", limit!("1/minute"), Per::header(HeaderName::from_static("x-api-key"))))
        .and_then(|layer| layer.limit(Rule::new("long", limit!("9/minute"), Per::value(long))))
        .unwrap()
        .on_reject(move |denial, _| {
            let subjects = denial.standings().iter().map(|standing| standing.subject.clone());
            heard.lock().unwrap().extend(subjects);
            Response::new(String::new())
        });
    for _ in 0..2 {
        let request = Request::builder().header("x-api-key", "sk-secret").body(()).unwrap();
        send(&layer, request).await;
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    for subject in seen.iter() {
        assert!(subject.as_str().len() < 64 && !subject.as_str().contains("secret"), "{subject}");
    }
    assert_eq!([seen[0].is_unauthenticated(), seen[1].is_unauthenticated()], [true, false]);
}
