//! What operators ask of a running gateway: the exact shapes that scripts parse, alone and in a fleet.

mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::{
    Gate, Listener, Provider, Redis, Response, SOON, Step, Tollgate, get, json_answer, over_http2, post,
    question, request,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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

/// All pages of the statistics: names in the order in which they are told.
async fn walked(gateway: &Tollgate, query: &str) -> Vec<String> {
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = told(gateway, &format!("/admin/rate-limit/stats?{query}&cursor={cursor}")).await;
        let rates = page["stats"]["current_rates"].as_object().expect("rates").clone();
        for (name, rate) in rates {
            assert!(rate["current_count"].as_u64() > Some(0), "{name}: {rate}");
            seen.push(name);
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => return seen,
        }
    }
}

/// Instances tell of the fullest; what is beyond those is found in the store itself, also by who never saw it.
async fn all_are_walked(redis: Option<&Redis>) {
    let provider = provider().await;
    let limits =
        "[{ name: address, limit: 9/hour, per: ip }, { name: shade, limit: 1/hour, per: ip, shadow: true }]";
    let text = config(&provider, redis, limits);
    let server = "  trusted_proxies: [127.0.0.0/8]\n";
    let gateway = Tollgate::start_with(server, &text, &[]).await;
    const ADDRESSES: usize = 1_500;
    for number in 0..ADDRESSES {
        let ip = format!("198.51.{}.{}", number / 250, number % 250 + 1);
        let headers = [("Authorization", "Bearer sk-alice"), ("X-Forwarded-For", ip.as_str())];
        let body = question(false);
        let ask = request("POST", "/v1/chat/completions", &headers, body.as_bytes());
        assert_eq!(post(gateway.data, &ask).await.status, 200);
    }
    let newcomer = match redis {
        Some(_) => Some(Tollgate::start_with(server, &text, &[]).await),
        None => None,
    };
    for gateway in std::iter::once(&gateway).chain(&newcomer) {
        let seen = walked(gateway, "limit=300").await;
        let all: std::collections::BTreeSet<&String> = seen.iter().collect();
        assert_eq!(all.len(), ADDRESSES, "of {} told", seen.len());
        // A Redis that makes its table larger meanwhile may tell of some twice.
        assert!(seen.len() == ADDRESSES || redis.is_some());
    }
    assert_eq!(walked(&gateway, "limit=7&prefix=198.51.3.").await.len(), 0);
    let some: std::collections::BTreeSet<String> =
        walked(&gateway, "limit=70&prefix=ip:198.51.3.").await.into_iter().collect();
    assert_eq!(some.len(), 250);
    for cursor in ["~1", "~a:0:0", "~0:0:0:0", "~9999:0:0", "~0:0:99999"] {
        use base64::Engine;
        let cursor = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(cursor);
        let path = format!("/admin/rate-limit/stats?cursor={cursor}");
        assert!(matches!(admin(&gateway, "GET", &path, Value::Null).await.status, 200 | 422), "{cursor}");
    }
}

#[tokio::test]
async fn every_subject_is_walked_in_memory() {
    all_are_walked(None).await;
}

#[tokio::test]
async fn every_subject_is_walked_on_redis() {
    let redis = Redis::start();
    // Things of somebody else, and a kind of key that is no hash.
    for number in 0..100 {
        redis.cli(&["SET", &format!("tollgate:{{x}}:rl:user:{number}:c"), "1"]);
    }
    all_are_walked(Some(&redis)).await;
    assert!(!redis.cli(&["INFO", "commandstats"]).contains("cmdstat_keys:"), "never KEYS");
}

#[tokio::test]
async fn totals_are_those_of_the_whole_fleet() {
    let (provider, redis) = (provider().await, Redis::start());
    // No minute ends between a request and what is said of it.
    let config = config(&provider, Some(&redis), &PER_ADDRESS.replace("/minute", "/day"));
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

#[tokio::test]
async fn a_clear_holds_on_every_instance_within_a_second() {
    let (provider, redis) = (provider().await, Redis::start());
    let limits = "[{ name: person, limit: 2/day, per: user }]";
    let config = config(&provider, Some(&redis), limits);
    let (one, other) = (Tollgate::start(&config).await, Tollgate::start(&config).await);
    for (gateway, status) in [(&one, 200), (&other, 200), (&one, 429), (&other, 429)] {
        assert_eq!(chat(gateway, "sk-alice").await, status, "both remember that they refused it");
    }
    let cleared = admin(&one, "POST", "/admin/rate-limit/clear?key=rate_limit:user:alice", Value::Null).await;
    assert_eq!(cleared.json()["existed"], true);
    assert_eq!(chat(&one, "sk-alice").await, 200);
    let started = Instant::now();
    while chat(&other, "sk-alice").await != 200 {
        assert!(started.elapsed() < EVERYWHERE, "the other one still refuses");
        // Polling is the only way to see it; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(chat(&one, "sk-alice").await, 429, "and counts on");
}

#[tokio::test]
async fn explain_says_what_a_request_would_meet_and_spends_nothing() {
    let provider = provider().await;
    let limits = "[{ name: person, limit: 2/day, per: user }, { name: reds, match: { team: [red] }, limit: 9/day, \
                   per: team }, { name: none, match: { user: [bob], ip: [198.51.100.0/24] }, deny: true }]";
    let gateway = Tollgate::start(&config(&provider, None, limits)).await;
    let ask = "/admin/explain?user=alice&model=chat";
    for _ in 0..3 {
        let said = told(&gateway, ask).await;
        assert_eq!((&said["allowed"], &said["refused"]), (&json!(true), &Value::Null), "{said}");
        let rules = said["rules"].as_array().expect("rules");
        let names: Vec<&Value> = rules.iter().map(|rule| &rule["name"]).collect();
        assert_eq!(names, ["person", "reds", "none"]);
        assert_eq!(rules[0]["limits"][0]["used"], 0, "nothing is spent");
        assert_eq!(rules[0]["limits"][0]["subject"], "user:alice");
        let place = rules[0]["defined"].as_str().expect("a place");
        assert!(place.contains("tollgate.yml:"), "{place}");
        assert_eq!(rules[1]["why_not"], "`team` is none, the rule is for red");
        assert_eq!(rules[2]["why_not"], "`user` is alice, the rule is for bob");
    }
    for status in [200, 200, 429] {
        assert_eq!(chat(&gateway, "sk-alice").await, status);
    }
    let said = told(&gateway, ask).await;
    assert_eq!((&said["allowed"], &said["refused"]["rule"]), (&json!(false), &json!("person-requests-day")));
    assert!(said["refused"]["retry_after_ms"].is_u64(), "{said}");

    let asked = json!({ "user": "bob", "model": "chat", "ip": "198.51.100.7" });
    let said = admin(&gateway, "POST", "/admin/explain", asked).await.json();
    assert_eq!((&said["refused"]["code"], &said["rules"][1]["matches"]), (&json!("denied"), &json!(true)));
    assert_eq!(said["caller"]["ip"], "198.51.100.7");
    let put = admin(&gateway, "PUT", "/admin/limits/person", json!({ "limit": "5/day" })).await;
    assert_eq!(put.status, 200, "{}", put.text());
    let ban = json!({ "subject": "user:alice", "reason": "Pays late" });
    assert_eq!(admin(&gateway, "POST", "/admin/bans", ban).await.status, 201);
    let said = told(&gateway, ask).await;
    assert_eq!(
        (&said["rules"][0]["defined"], &said["ban"]["reason"]),
        (&json!("admin"), &json!("Pays late"))
    );
    assert_eq!(
        (&said["allowed"], &said["refused"]["why"]),
        (&json!(false), &json!("You are banned: Pays late"))
    );

    for (query, status) in [
        ("user=alice", 422),
        ("user=nobody&model=chat", 404),
        ("api_key=nothing&model=chat", 404),
        ("model=chat&endpoint=/v1/nowhere", 422),
        ("model=chat&ip=here", 422),
    ] {
        let answer = admin(&gateway, "GET", &format!("/admin/explain?{query}"), Value::Null).await;
        assert_eq!(answer.status, status, "{query}: {}", answer.text());
    }
    let said = told(&gateway, "/admin/explain?user=bob&model=nope").await;
    assert_eq!(said["refused"]["code"], "model_not_found");
    assert_eq!(told(&gateway, "/admin/explain?model=chat").await["allowed"], false, "without a key");
}

#[tokio::test]
async fn instances_know_each_other() {
    let (provider, redis) = (provider().await, Redis::start());
    let config = config(&provider, Some(&redis), "[]");
    let (one, other) = (Tollgate::start(&config).await, Tollgate::start(&config).await);
    let two = |said: &Value| said["data"].as_array().is_some_and(|all| all.len() == 2);
    for gateway in [&one, &other] {
        let said = becomes(gateway, "/admin/instances", SOON, two).await;
        let all = said["data"].as_array().expect("instances");
        assert_eq!(all.iter().filter(|instance| instance["self"] == true).count(), 1);
        for instance in all {
            assert_eq!(instance["version"], env!("CARGO_PKG_VERSION"));
            assert_eq!(instance["store"], "shared");
            assert_eq!(instance["config_hash"].as_str().map(str::len), Some(16));
        }
    }
    let alone = Tollgate::start(&support::chat_config(&["type: simulated".to_owned()])).await;
    let said = told(&alone, "/admin/instances").await;
    assert_eq!(
        (said["data"].as_array().map(Vec::len), &said["data"][0]["store"]),
        (Some(1), &json!("memory"))
    );
}

#[tokio::test]
async fn models_tell_how_they_do() {
    let (gate, seen) = (Gate::new(), json_answer("200 OK", "", ANSWER));
    let held = gate.clone();
    let provider = Provider::start(move |_| vec![Step::Wait(held.clone()), Step::Send(seen.clone())]).await;
    let gateway = Tollgate::start(&config(&provider, None, "[]")).await;
    let idle = told(&gateway, "/admin/models").await["data"][0]["providers"][0].clone();
    assert_eq!(
        (&idle["in_flight"], &idle["latency_ms"], &idle["healthy"]),
        (&json!(0), &Value::Null, &json!(true))
    );
    let asking = chat(&gateway, "sk-alice");
    let looking = async {
        gate.reached(1).await;
        assert_eq!(told(&gateway, "/admin/models").await["data"][0]["providers"][0]["in_flight"], 1);
        gate.open();
    };
    assert_eq!(tokio::join!(asking, looking).0, 200);
    let done = |said: &Value| said["data"][0]["providers"][0]["in_flight"] == 0;
    let said = becomes(&gateway, "/admin/models", SOON, done).await;
    let latency = &said["data"][0]["providers"][0]["latency_ms"];
    assert!(latency["count"] == 1 && latency["p50"].as_f64().is_some_and(|p50| p50 > 0.0), "{said}");
}

async fn with_key(gateway: &Tollgate, method: &str, path: &str, key: &str) -> Response {
    post(gateway.admin, &request(method, path, &[("X-Admin-Key", key)], b"")).await
}

#[tokio::test]
async fn each_role_may_do_what_it_may() {
    let provider = provider().await;
    let server = "  admin_key: root-key-1\n  admin_keys:\n    - { name: board, key: view-key-2, role: viewer }\n\
                  \x20   - { name: olga, key: oper-key-3, role: operator }\n";
    let gateway = Tollgate::start_with(server, &config(&provider, None, "[]"), &[]).await;
    for (method, path, viewer, operator, admin) in [
        ("GET", "/admin/keys", 200, 200, 200),
        ("GET", "/admin/rate-limit/stats", 200, 200, 200),
        ("POST", "/admin/rate-limit/clear?key=user:alice", 403, 200, 200),
        ("DELETE", "/admin/bans/nobody", 403, 404, 404),
        ("POST", "/admin/keys?dry_run=true", 403, 403, 201),
        ("DELETE", "/admin/users/nobody", 403, 403, 404),
        ("POST", "/admin/config/reload", 403, 403, 200),
        ("GET", "/admin/nowhere", 404, 404, 404),
    ] {
        for (key, status) in [("view-key-2", viewer), ("oper-key-3", operator), ("root-key-1", admin)] {
            let answer = with_key(&gateway, method, path, key).await;
            assert_eq!(answer.status, status, "{method} {path} {key}: {}", answer.text());
            if status == 403 {
                assert_eq!(answer.header("content-type"), Some("application/problem+json"));
            }
        }
    }
    let audit = with_key(&gateway, "GET", "/admin/audit", "view-key-2").await.json();
    let actors: Vec<&Value> =
        audit["data"].as_array().expect("records").iter().map(|note| &note["actor"]).collect();
    assert_eq!(actors, ["admin", "olga"]);
}

#[tokio::test]
async fn a_file_that_is_checked_tells_nothing_of_the_environment() {
    let provider = provider().await;
    let server =
        "  admin_key: ${THE_KEY}\n  admin_keys:\n    - { name: olga, key: oper-key-3, role: operator }\n";
    let secret = "a-canary-nobody-may-see-0123456789";
    let environment = [("THE_KEY", secret), ("TOLLGATE_ADMIN_KEY", secret)];
    let gateway = Tollgate::start_in(&environment, server, &config(&provider, None, "[]"), &[]).await;
    for (file, told) in [
        ("users: [{ name: '${THE_KEY}' }, { name: '${THE_KEY}' }]", "a second user is called `***`"),
        ("tiers: { gold: {} }\nusers: [{ name: a, tier: '${THE_KEY}' }]", ""),
        ("limits: [{ name: '${THE_KEY}', per: user, limit: 1/x }]", ""),
        ("limits: [{ name: a, per: '${THE_KEY}', limit: '${THE_KEY}' }]", ""),
        (
            "models: [{ name: '${THE_KEY}', aliases: ['${THE_KEY}'], providers: [{ type: '${THE_KEY}' }] }]",
            "",
        ),
        (
            "models: [{ name: a, fallback: ['${THE_KEY}'], providers: [{ type: openai, url: '${THE_KEY}' }] }]",
            "",
        ),
        ("users: [{ name: '${THE_KEY}' }]\nlimits: [{ match: { user: a-canary }, limit: 1/day }]", ""),
    ] {
        let headers = [("X-Admin-Key", "oper-key-3")];
        let asked = request("POST", "/admin/config/check", &headers, file.as_bytes());
        let answer = post(gateway.admin, &asked).await;
        assert_eq!((answer.status, &answer.json()["ok"]), (200, &json!(false)), "{file}");
        let text = answer.text();
        assert!(!text.contains("canary-nobody") && !text.contains("0123456789"), "{file}: {text}");
        assert!(text.contains(told), "{file}: {text}");
    }
}

#[tokio::test]
async fn guessing_admin_keys_is_limited() {
    let provider = provider().await;
    let gateway =
        Tollgate::start_with("  admin_key: root-key-1\n", &config(&provider, None, "[]"), &[]).await;
    for _ in 0..30 {
        assert_eq!(get(gateway.admin, "/admin/keys").await.status, 401, "who sends nothing guesses nothing");
    }
    assert_eq!(with_key(&gateway, "GET", "/admin/keys", "root-key-1").await.status, 200);
    for guess in 0..10 {
        assert_eq!(with_key(&gateway, "GET", "/admin/keys", &format!("guess-{guess}")).await.status, 401);
    }
    for key in ["guess-11", "root-key-1"] {
        let answer = with_key(&gateway, "GET", "/admin/keys", key).await;
        assert_eq!(answer.status, 429, "right or wrong, it is not said");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        let wait: u64 = answer.header("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
        assert!((1..=60).contains(&wait), "{wait}");
    }
    assert_eq!(get(gateway.admin, "/readyz").await.status, 200);
}

/// Without an admin key nothing but the address guards the API, and a browser on this machine may be told to ask anything.
#[tokio::test]
async fn pages_of_others_change_nothing_where_there_is_no_key() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, None, "[]")).await;
    let host = gateway.admin.to_string();
    let (own, local) = (format!("http://{host}"), format!("localhost:{}", gateway.admin.port()));
    let ask = async |headers: &[(&str, &str)]| {
        let named: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let ask = format!("POST /admin/keys?dry_run=true HTTP/1.1\r\n{named}content-length: 2\r\n\r\n{{}}");
        post(gateway.admin, ask.as_bytes()).await
    };
    for (headers, status) in [
        (vec![("Host", &*host)], 201),
        (vec![("Host", &*local)], 201),
        (vec![("Host", &*host), ("Origin", &*own)], 201),
        (vec![("Host", &*host), ("Origin", "https://evil.example")], 403),
        (vec![("Host", &*host), ("Origin", "null")], 403),
        (vec![("Host", "evil.example:8081"), ("Origin", "http://evil.example:8081")], 403),
        (vec![("Host", "evil.example:8081")], 403),
    ] {
        let answer = ask(&headers).await;
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.text());
    }
    let elsewhere = "evil.example:8081";
    for (authority, origin, status) in [
        (&*host, None, 201),
        (&*host, Some(&*own), 201),
        (&*host, Some("https://evil.example"), 403),
        (elsewhere, None, 403),
        (elsewhere, Some("http://evil.example:8081"), 403),
    ] {
        let path = "/admin/keys?dry_run=true";
        let mut ask =
            http::Request::post(format!("http://{authority}{path}")).body("{}".to_owned()).expect("one");
        if let Some(origin) = origin {
            ask.headers_mut().insert("origin", origin.parse().expect("a value"));
        }
        let answer = over_http2(gateway.admin, ask).await;
        assert_eq!(answer.status(), status, "HTTP/2, {authority} {origin:?}: {:?}", answer.body());
        let origin = origin.map_or(String::new(), |origin| format!("Origin: {origin}\r\n"));
        let ask = format!("POST http://{authority}{path} HTTP/1.0\r\n{origin}content-length: 2\r\n\r\n{{}}");
        let mut stream = TcpStream::connect(gateway.admin).await.expect("a connection");
        stream.write_all(ask.as_bytes()).await.expect("room");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an end");
        assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{authority} {origin}: {answer}");
    }
    let made = ask(&[("Host", &*host)]).await;
    assert_eq!(made.header("cache-control"), Some("no-store"), "it has a key in it");
    // A key is more than a browser knows.
    let server = "  admin_key: root-key-1\n";
    let guarded = Tollgate::start_with(server, &config(&provider, None, "[]"), &[]).await;
    let headers = [("X-Admin-Key", "root-key-1"), ("Origin", "https://board.example")];
    assert_eq!(post(guarded.admin, &request("GET", "/admin/keys", &headers, b"")).await.status, 200);
    let wrong = get(gateway.admin, "/admin/keys/%ff").await;
    assert_eq!((wrong.status, wrong.header("content-type")), (400, Some("application/problem+json")));
}

/// What is wrong with a value by a schema of the document: only what the document uses.
fn fault(document: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = document.pointer(&reference[1..]).unwrap_or_else(|| panic!("no {reference}"));
        return fault(document, schema, value, at);
    }
    if let Some(either) = schema["anyOf"].as_array() {
        let faults: Vec<String> = either.iter().map_while(|one| fault(document, one, value, at)).collect();
        return (faults.len() == either.len()).then(|| faults.join(", or "));
    }
    let is = |kind: &str| match kind {
        "null" => value.is_null(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other} at {at}"),
    };
    let right = match &schema["type"] {
        Value::Null => true,
        Value::String(kind) => is(kind),
        kinds => kinds.as_array().expect("types").iter().filter_map(Value::as_str).any(is),
    };
    if !right {
        return Some(format!("{at} is {value}, not {}", schema["type"]));
    }
    if let Some(items) = value.as_array() {
        return items.iter().find_map(|item| fault(document, &schema["items"], item, &format!("{at}[]")));
    }
    let fields = value.as_object()?;
    let missing = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(missing) = missing.into_iter().find(|name| !fields.contains_key(*name)) {
        return Some(format!("{at} has no {missing}"));
    }
    fields.iter().find_map(|(name, value)| {
        match (schema["properties"].get(name), schema.get("additionalProperties")) {
            (Some(schema), _) | (None, Some(schema)) => {
                fault(document, schema, value, &format!("{at}.{name}"))
            }
            (None, None) if schema.get("properties").is_some() => {
                Some(format!("{at}.{name} is not described"))
            }
            (None, None) => None,
        }
    })
}

#[tokio::test]
async fn what_is_answered_is_what_is_described() {
    let (provider, redis) = (provider().await, Redis::start());
    let gateway = Tollgate::start(&config(&provider, Some(&redis), PER_ADDRESS)).await;
    assert_eq!(chat(&gateway, "sk-alice").await, 200);
    for (path, body) in [
        (
            "/admin/keys",
            json!({ "name": "laptop", "user": "alice", "limits": ["9/day"], "expires_in": "1h" }),
        ),
        ("/admin/users", json!({ "name": "carol", "team": "red", "metadata": { "a": "b" } })),
        ("/admin/bans", json!({ "subject": "ip:192.0.2.1", "reason": "Noise", "expires_in": "1h" })),
    ] {
        assert_eq!(admin(&gateway, "POST", path, body).await.status, 201, "{path}");
    }
    assert_eq!(
        admin(&gateway, "PUT", "/admin/limits/extra", json!({ "limit": "9/day", "per": "user" }))
            .await
            .status,
        200
    );
    let document = told(&gateway, "/admin/openapi.json").await;
    assert_eq!(document["openapi"], "3.1.0");
    let mut looked_at = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let Some(operation) = methods.get("get").filter(|_| !path.contains('{')) else { continue };
        // Events have no end; they are looked at below.
        if path == "/admin/events" {
            continue;
        }
        let query = if path == "/admin/explain" { "?user=alice&model=chat" } else { "" };
        let said = told(&gateway, &format!("{path}{query}")).await;
        let schema = &operation["responses"]["200"]["content"]["application/json"]["schema"];
        assert_eq!(fault(&document, schema, &said, path), None);
        looked_at += 1;
    }
    assert!(looked_at >= 12, "{looked_at}");
    for (method, path, described, body) in [
        ("GET", "/admin/limits/extra", "/admin/limits/{name}", Value::Null),
        ("GET", "/admin/users/carol", "/admin/users/{name}", Value::Null),
        ("GET", "/admin/limits/extra/history", "/admin/limits/{name}/history", Value::Null),
        ("POST", "/admin/config/check", "/admin/config/check", Value::Null),
        ("PATCH", "/admin/users/carol", "/admin/users/{name}", json!({ "team": "blue" })),
        ("PUT", "/admin/limits/extra", "/admin/limits/{name}", json!({ "limit": "8/day", "per": "user" })),
        ("DELETE", "/admin/limits/extra", "/admin/limits/{name}", Value::Null),
    ] {
        let operation = &document["paths"][described][method.to_lowercase()];
        let mut parameters = operation["parameters"].as_array().expect("parameters").iter();
        if parameters.any(|parameter| parameter["name"] == "If-Match") {
            let sent = request(method, path, &[("If-Match", "\"0\"")], body.to_string().as_bytes());
            let refused = post(gateway.admin, &sent).await;
            assert_eq!(refused.status, 412, "{method} {path}: {}", refused.text());
        }
        let answer = admin(&gateway, method, path, body).await;
        assert!(answer.status < 300, "{method} {path}: {}", answer.text());
        let headers = &operation["responses"][answer.status.to_string()]["headers"];
        assert_eq!(answer.header("etag").is_some(), headers["ETag"].is_object(), "{method} {path}");
    }
    let mut listener = Listener::open(&gateway, "?requests=true").await;
    assert_eq!(chat(&gateway, "sk-alice").await, 200);
    for (event, schema) in [("request", "Request"), ("figures", "Figures")] {
        let schema = json!({ "$ref": format!("#/components/schemas/{schema}") });
        assert_eq!(fault(&document, &schema, &listener.next_of(event).await, event), None);
    }
    for path in ["/admin/keys", "/admin/nowhere"] {
        let problem = admin(&gateway, "POST", path, json!({ "user": 7 })).await.json();
        let schema = json!({ "$ref": "#/components/schemas/Problem" });
        assert_eq!(fault(&document, &schema, &problem, path), None);
    }
}

#[tokio::test]
async fn a_parameter_that_is_not_understood_changes_nothing() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, None, "[]")).await;
    let ban = json!({ "subject": "ip:192.0.2.1", "reason": "Noise" });
    let made = admin(&gateway, "POST", "/admin/bans", ban).await.json();
    let ban = format!("/admin/bans/{}", made["id"].as_str().expect("an id"));
    for (method, path, said) in [
        ("DELETE", format!("{ban}?dryRun=true"), "dryRun: is no parameter of this; did you mean `dry_run`?"),
        ("DELETE", format!("{ban}?dry_run=true&dry_run=false"), "dry_run: is there more than once"),
        ("DELETE", format!("{ban}?dry_run=true&%0a=1"), "allowed: dry_run"),
        ("GET", format!("{ban}?limit=1"), "limit: is no parameter of this; there is none"),
        (
            "GET",
            "/admin/bans?subjekt=x".to_owned(),
            "did you mean `subject`? allowed: subject, limit, cursor",
        ),
        ("GET", "/admin/limits/a/history?limit=1&page=2".to_owned(), "allowed: limit, cursor"),
        ("POST", "/admin/rate-limit/clear?kei=ip:192.0.2.1".to_owned(), "allowed: key, dry_run"),
    ] {
        let answer = admin(&gateway, method, &path, Value::Null).await;
        assert_eq!(answer.status, 422, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        let problem = answer.json();
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(said)), "{path}: {problem}");
    }
    assert_eq!(admin(&gateway, "DELETE", &format!("{ban}?dry_run"), Value::Null).await.status, 204);
    assert_eq!(told(&gateway, &ban).await["reason"], "Noise");
}
