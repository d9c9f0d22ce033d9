//! What operators ask of a running gateway: the exact shapes that scripts parse, alone and in a fleet.

mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::{Provider, Redis, Response, SOON, Tollgate, json_answer, post, question, request};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
/// What is told of a fleet is at most so old.
const EVERYWHERE: Duration = Duration::from_secs(1);

async fn admin(gateway: &Tollgate, method: &str, path: &str, body: Value) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    post(gateway.admin, &request(method, path, &[], body.as_bytes())).await
}

async fn told(gateway: &Tollgate, path: &str) -> Value {
    let answer = admin(gateway, "GET", path, Value::Null).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

async fn chat(gateway: &Tollgate, key: &str) -> u16 {
    let bearer = format!("Bearer {key}");
    let headers = [("Authorization", &*bearer)];
    let body = question(false);
    post(gateway.data, &request("POST", "/v1/chat/completions", &headers, body.as_bytes())).await.status
}

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "", ANSWER)).await
}

fn config(provider: &Provider, redis: Option<&Redis>, limits: &str) -> String {
    let store = redis.map_or_else(String::new, |redis| {
        format!("dependencies: {{ redis: {{ url: '{}', timeout: 1s }} }}\n", redis.url())
    });
    format!(
        "{store}users:\n  - {{ name: alice, keys: [sk-alice] }}\n  - {{ name: bob, team: red, keys: [sk-bob] }}\n\
         models: [{{ name: chat, providers: [{{ type: openai, url: 'http://{}' }}] }}]\nsettings: {{ state: none }}\n\
         limits: {limits}\n",
        provider.address
    )
}

const PER_ADDRESS: &str = "[{ name: address, limit: 3/minute, per: ip }, { name: person, limit: [100/day, 1000/week], per: user }, \
     { name: route, limit: 50/hour, per: [endpoint, ip] }]";

/// Waits until what is told is so.
async fn becomes(gateway: &Tollgate, path: &str, within: Duration, right: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let now = told(gateway, path).await;
        if right(&now) {
            return now;
        }
        assert!(started.elapsed() < within, "{path} still says {now}");
        // Polling is the only way to see it; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn stats_have_the_shape_that_scripts_parse() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, None, PER_ADDRESS)).await;
    let empty = told(&gateway, "/admin/rate-limit/stats").await;
    assert_eq!(empty["stats"]["current_rates"], json!({}));
    for status in [200, 200, 200, 429, 429] {
        assert_eq!(chat(&gateway, "sk-alice").await, status);
    }
    let mut said = told(&gateway, "/admin/rate-limit/stats").await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let stats = &mut said["stats"];
    let updated = stats["last_update"].take();
    assert!(updated.as_str().is_some_and(|time| time.len() == 20 && time.ends_with('Z')), "{updated}");
    for rate in stats["current_rates"].as_object_mut().expect("rates").values_mut() {
        let reset = rate["reset_time"].take().as_u64().expect("seconds");
        assert!(reset > now && reset <= now + 7 * 86_400, "{reset} is not soon after {now}");
    }
    let rate = |key: &str, count: u64, limit: u64, window: &str, rule: &str| {
        json!({ "key": key, "current_count": count, "limit": limit, "window": window, "reset_time": null,
                "rule": rule, "unit": "requests" })
    };
    assert_eq!(
        said,
        json!({ "status": "success", "next_cursor": null, "stats": {
            "total_requests": 5, "blocked_requests": 2, "redis_connected": false, "last_update": null,
            "current_rates": {
                "127.0.0.1": rate("rate_limit:ip:127.0.0.1", 3, 3, "1m", "address-requests-minute"),
                "endpoint:/v1/chat/completions:127.0.0.1":
                    rate("rate_limit:endpoint:/v1/chat/completions:127.0.0.1", 3, 50, "1h", "route-requests-hour"),
                "user:alice": rate("rate_limit:user:alice", 3, 100, "24h", "person-requests-day"),
            } } })
    );

    // Every key it tells can be cleared, and is gone then.
    for rate in said["stats"]["current_rates"].as_object().expect("rates").values() {
        let key = rate["key"].as_str().expect("a key");
        let cleared =
            admin(&gateway, "POST", &format!("/admin/rate-limit/clear?key={key}"), Value::Null).await;
        assert_eq!(cleared.json()["existed"], true, "{key}: {}", cleared.text());
    }
    assert_eq!(told(&gateway, "/admin/rate-limit/stats").await["stats"]["current_rates"], json!({}));
    assert_eq!(chat(&gateway, "sk-alice").await, 200);
}

#[tokio::test]
async fn stats_are_paged_the_fullest_first() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, None, PER_ADDRESS)).await;
    assert_eq!(chat(&gateway, "sk-alice").await, 200);
    assert_eq!(chat(&gateway, "sk-bob").await, 200);
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = told(&gateway, &format!("/admin/rate-limit/stats?limit=1&cursor={cursor}")).await;
        let rates = page["stats"]["current_rates"].as_object().expect("rates").clone();
        seen.extend(rates.into_iter().map(|(name, _)| name));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(
        seen,
        ["127.0.0.1", "endpoint:/v1/chat/completions:127.0.0.1", "user:alice", "user:bob"],
        "2/3, 2/50, then 1/100 each"
    );
    for prefix in ["rate_limit:user:", "user:"] {
        let some = told(&gateway, &format!("/admin/rate-limit/stats?prefix={prefix}")).await;
        let names: Vec<&String> = some["stats"]["current_rates"].as_object().expect("rates").keys().collect();
        assert_eq!(names, ["user:alice", "user:bob"]);
    }
    assert_eq!(admin(&gateway, "GET", "/admin/rate-limit/stats?cursor=eA", Value::Null).await.status, 422);
}

#[tokio::test]
async fn totals_are_those_of_the_whole_fleet() {
    let (provider, redis) = (provider().await, Redis::start());
    let config = config(&provider, Some(&redis), PER_ADDRESS);
    let one = Tollgate::start(&config).await;
    let mut other = Tollgate::start(&config).await;
    for (gateway, status) in [(&one, 200), (&other, 200), (&one, 200), (&other, 429)] {
        assert_eq!(chat(gateway, "sk-alice").await, status);
    }
    for gateway in [&one, &other] {
        let said = becomes(gateway, "/admin/rate-limit/stats", EVERYWHERE, |said| {
            said["stats"]["total_requests"] == 4
                && said["stats"]["current_rates"]["127.0.0.1"]["current_count"] == 3
        })
        .await;
        assert_eq!(said["stats"]["blocked_requests"], 1);
        assert_eq!(said["stats"]["redis_connected"], true);
    }
    // What an instance that ended has counted stays in the totals.
    other.sigterm();
    other.sigterm();
    other.ended(SOON).await;
    assert_eq!(told(&one, "/admin/rate-limit/stats").await["stats"]["total_requests"], 4);
}

#[tokio::test]
async fn stats_are_those_of_one_instance_while_redis_is_away() {
    let (provider, mut redis) = (provider().await, Redis::start());
    let gateway = Tollgate::start(&config(&provider, Some(&redis), PER_ADDRESS)).await;
    assert_eq!(chat(&gateway, "sk-alice").await, 200);
    redis.kill();
    let degraded = |said: &Value| said["redis"]["degraded_since"].is_string();
    let said = becomes(&gateway, "/admin/redis/status", SOON, degraded).await;
    assert_eq!(said["redis"]["connected"], false);
    assert!(said["redis"]["degraded_why"].is_string(), "{said}");
    let said = told(&gateway, "/admin/rate-limit/stats").await;
    assert_eq!(
        (&said["stats"]["redis_connected"], &said["stats"]["total_requests"]),
        (&json!(false), &json!(1))
    );
}

#[tokio::test]
async fn the_state_of_redis() {
    let provider = provider().await;
    let alone = Tollgate::start(&config(&provider, None, "[]")).await;
    assert_eq!(
        told(&alone, "/admin/redis/status").await,
        json!({ "status": "success",
                "redis": { "enabled": false, "connected": false, "addr": "", "db": 0, "pool_size": 0 } })
    );
    let redis = Redis::start();
    let gateway = Tollgate::start(&config(&provider, Some(&redis), "[]").replace("/0'", "/2'")).await;
    let measured = |said: &Value| said["redis"]["latency_ms"]["p99"].is_number();
    let said = becomes(&gateway, "/admin/redis/status", SOON, measured).await;
    let redis_said = &said["redis"];
    assert_eq!(said["status"], "success");
    for (field, value) in [
        ("enabled", json!(true)),
        ("connected", json!(true)),
        ("addr", json!(redis.address().to_string())),
        ("db", json!(2)),
        ("topology", json!("single")),
        ("maxmemory_policy", json!("noeviction")),
        ("evicted_keys", json!(0)),
        ("degraded_since", json!(null)),
    ] {
        assert_eq!(redis_said[field], value, "{field}: {said}");
    }
    for field in ["pool_size", "used_memory", "connected_clients"] {
        assert!(redis_said[field].as_u64().is_some_and(|count| count > 0), "{field}: {said}");
    }
    assert!(redis_said["version"].is_string() && redis_said["slowlog"].is_array(), "{said}");
}
