//! What the layer refuses, and what it does without axum.
#![cfg(feature = "tower")]

use std::convert::Infallible;
use std::sync::Arc;

use http::{HeaderName, Request, Response};
use http_body_util::{BodyExt, Full};
use tollgate_limiter::tower::{Family, Meter, MeteredBody, Per, Proxies, RateLimitLayer, Rule, Storage};
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
    // Without the feature, or outside a runtime.
    let error = Storage::from_url("redis://:secret@host:6379/0").expect_err("refused").to_string();
    let said = if cfg!(feature = "redis") { "no tokio runtime" } else { "the feature `redis`" };
    assert!(error.contains(said) && !error.contains("secret"), "{error}");
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

/// Each family tells of the binding limit of each unit: the one with the least left of it, of equals the shortest.
#[tokio::test]
async fn every_family_tells_of_the_binding_limits() {
    let (store, clock) = store();
    clock.advance(Millis(15_500));
    let rule = |name, quota| Rule::new(name, quota, Per::everyone());
    let layer = RateLimitLayer::new(store)
        .limit(rule("day", limit!("4/day")))
        .and_then(|layer| layer.limit(rule("minute", limit!("2/minute"))))
        .and_then(|layer| layer.limit(rule("hour", limit!("1/hour")).shadow()))
        .and_then(|layer| layer.limit(rule("big", limit!("1000 tokens/minute")).cost(|_| 10)))
        .and_then(|layer| layer.limit(rule("out", limit!("100 output tokens/hour")).reserve(|_| 50)))
        .and_then(|layer| layer.limit(rule("slots", limit!("9 concurrent"))))
        .unwrap()
        .headers([Family::RateLimit, Family::XRateLimit, Family::OpenAi, Family::Anthropic]);
    let response = send(&layer, plain()).await;
    for (name, expected) in [
        (
            "ratelimit-policy",
            "\"day-requests-day\";q=4;w=86400, \"minute-requests-minute\";q=2;w=60, \
             \"big-tokens-minute\";q=1000;w=60, \"out-output_tokens-hour\";q=100;w=3600",
        ),
        (
            "ratelimit",
            "\"day-requests-day\";r=3;t=86385, \"minute-requests-minute\";r=1;t=45, \
             \"big-tokens-minute\";r=990;t=45, \"out-output_tokens-hour\";r=50;t=3585",
        ),
        ("x-ratelimit-limit", "2"),
        ("x-ratelimit-remaining", "1"),
        ("x-ratelimit-reset", "1794614460"),
        ("x-ratelimit-limit-requests", "2"),
        ("x-ratelimit-remaining-requests", "1"),
        ("x-ratelimit-reset-requests", "44.5s"),
        ("x-ratelimit-limit-tokens", "100"),
        ("x-ratelimit-remaining-tokens", "50"),
        ("x-ratelimit-reset-tokens", "59m44.5s"),
        ("anthropic-ratelimit-requests-reset", "2026-11-14T00:01:00Z"),
        ("anthropic-ratelimit-tokens-limit", "100"),
        ("anthropic-ratelimit-tokens-remaining", "50"),
        ("anthropic-ratelimit-tokens-reset", "2026-11-14T01:00:00Z"),
    ] {
        assert_eq!(response.headers()[name], expected, "{name}");
    }
    // 2 of 4 and 0 of 2; then 0 of 2 refuses.
    assert_eq!(send(&layer, plain()).await.headers()["x-ratelimit-remaining"], "0");
    let refused = send(&layer, plain()).await;
    assert_eq!(refused.status(), 429);
    // The longest wait binds: the tokens of the hour.
    assert_eq!(refused.headers()["x-ratelimit-limit"], "100");
    assert_eq!(refused.headers()["retry-after-ms"], "3584500");
}

/// Over a real connection: a client that goes away while its answer is being made leaves its slot to others.
#[tokio::test]
async fn a_client_that_leaves_frees_its_slot() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (store, _) = store();
    let rule = Rule::new("slots", limit!("1 concurrent"), Per::everyone());
    let layer = RateLimitLayer::new(store.clone()).limit(rule).unwrap();
    let slots = Arc::clone(layer.limits().next().expect("there is one"));
    let (entered, slow) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(true)));
    let (enter, first) = (Arc::clone(&entered), Arc::clone(&slow));
    let handler = move || async move {
        enter.notify_one();
        if first.swap(false, Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        "done"
    };
    let app = axum::Router::new().route("/", axum::routing::get(handler)).layer(layer);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut leaving = tokio::net::TcpStream::connect(address).await.unwrap();
    leaving.write_all(request).await.unwrap();
    entered.notified().await;
    let held = || {
        let subject = tollgate_limiter::Scope::GLOBAL.subject(|_| "".into());
        store.peek(vec![tollgate_limiter::Charge::new(Arc::clone(&slots), subject, 1)])[0].used
    };
    assert_eq!(held(), 1);
    drop(leaving);
    while held() > 0 {
        tokio::task::yield_now().await;
    }
    let mut next = tokio::net::TcpStream::connect(address).await.unwrap();
    next.write_all(request).await.unwrap();
    let mut answer = String::new();
    next.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
    server.abort();
}
