//! What files and environments mean.

use std::time::{Duration, SystemTime};

use serde_json::json;
use tollgate_limiter::{Algorithm, Dimension, Scope};

use super::super::{Auth, Count, LogFormat, Price, ProviderKind, TokenWeights, endpoint_matches, schema};
use super::{file, load, load_file, nothing, variables};

#[test]
fn a_whole_file() {
    let env = variables(&[("KEY", "sk-caller"), ("PORT", "9000"), ("DOLLARS", "a$$b")]);
    let more = "server: { listen: \"127.0.0.1:${PORT}\", admin: \"127.0.0.1:${PORT}\", admin_key: p$$x, max_body: 1_0KB, trusted_proxies: [10.1.2.3/8, ::1] }
settings: { rate_limiting_strategy: sliding_window, log_format: text }
tiers: { free: \"10/minute;100/hour\", pro: { per: user, limit: 5/minute burst 2, strategy: token_bucket }, all: unlimited, x-y: 1 }
limits:
  - { name: m, per: global, limit: 7/month, match: { model: [bee], user: alice, tier: [free, pro], endpoint: /v1/*, authenticated: true } }
users:
  - { name: alice, team: red, tier: free, models: [bee], keys: [\"${KEY}\", { hash: \"sha256:00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF\", name: \"${DOLLARS}\", expires: 2027-01-01 }] }
x-note: { anything: [1, ~, { a: b }] }
";
    let text = file(more).replace("name: b,", "name: b, aliases: [bee], fallback: a,");
    let loaded = load_file(&text, &env).map_err(|problems| super::lines(&problems)).unwrap();
    let config = &loaded.config;
    assert_eq!(config.server.listen, config.server.admin);
    assert_eq!(config.server.admin_key.as_ref().map(|key| key.expose()), Some("p$x"));
    assert_eq!((config.server.max_body, config.server.max_upload), (10_000, 64_000_000));
    assert_eq!(format!("{:?}", config.server.trusted_proxies), "[10.0.0.0/8, ::1/128]");
    assert_eq!((config.settings.log_format, config.auth), (LogFormat::Text, Auth::Optional));
    let rules: Vec<(&str, String)> =
        config.rules.iter().map(|r| (r.name.as_str(), r.per.to_string())).collect();
    let expected = [("free", "user,model"), ("pro", "user"), ("all", "user,model"), ("m", "global")];
    assert_eq!(rules, expected.map(|(name, per)| (name, per.to_owned())));
    let limits: Vec<(&str, Algorithm)> =
        config.limits().map(|(_, limit)| (limit.id(), limit.algorithm())).collect();
    assert_eq!(
        limits,
        [
            ("free-requests-minute", Algorithm::SlidingWindow),
            ("free-requests-hour", Algorithm::SlidingWindow),
            ("pro-requests-minute", Algorithm::TokenBucket),
            ("m-requests-month", Algorithm::FixedWindow),
        ]
    );
    let matches = &config.rules[3].matches;
    assert_eq!((&matches.model[..], matches.authenticated), (&["b".to_owned()][..], Some(true)));
    assert_eq!(config.users[0].models.as_deref(), Some(&["b".to_owned()][..]));
    assert_eq!(config.models[1].fallback, ["a"]);
    // printf sk-caller | sha256sum
    assert_eq!([&config.keys[0].id, &config.keys[1].id], ["8b6712790a20", "001122334455"]);
    assert_eq!(config.keys[1].name.as_deref(), Some("a$$b"), "what a variable holds is left alone");
    let new_year = SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_761_600);
    assert_eq!(config.keys[1].expires, Some(new_year));
}

#[test]
fn providers() {
    let provider = |keys: &str| {
        let text =
            format!("auth: optional\nmodels:\n  - {{ name: a, providers: [{{ {keys} }}, {{ {keys} }}] }}\n");
        load_file(&text, &nothing)
            .map_err(|problems| super::lines(&problems))
            .unwrap()
            .config
            .models
            .remove(0)
            .providers
    };
    for (url, base, name) in [
        ("https://api.openai.com", "https://api.openai.com/v1", "api.openai.com"),
        ("http://10.0.0.5:8000/", "http://10.0.0.5:8000/v1", "10.0.0.5:8000"),
        ("http://x/openai/v2/", "http://x/openai/v2", "x"),
        ("http://[::1]:80/api", "http://[::1]:80/api", "[::1]:80"),
    ] {
        let providers = provider(&format!("type: ollama, url: '{url}', timeout: 1m"));
        assert_eq!([&providers[0].name, &providers[1].name], [name, &format!("{name}-2")]);
        assert_eq!(providers[0].deadlines.total, Duration::from_secs(60));
        assert_eq!(providers[0].deadlines.connect, Duration::from_secs(5));
        let ProviderKind::Openai { base: found, stream_usage: true, key: None } = &providers[0].kind else {
            panic!()
        };
        assert_eq!(found.to_string(), base);
    }
    let simulated = &provider("type: simulated, latency: 250ms, fail_rate: 0.5")[1];
    assert_eq!(simulated.name, "simulated-2");
    let ProviderKind::Simulated { latency, tokens_per_second: 0, completion_tokens: 32, fail_rate } =
        simulated.kind
    else {
        panic!()
    };
    assert_eq!((latency, fail_rate), (Duration::from_millis(250), 0.5));
}

#[test]
fn the_environment_alone() {
    let open = load(None, &variables(&[("TOLLGATE_UPSTREAM", "http://x")])).unwrap().config;
    assert_eq!((open.auth, open.server.listen.to_string().as_str()), (Auth::Optional, "127.0.0.1:8080"));
    assert_eq!((open.models[0].name.as_str(), open.rules.len()), ("*", 1));
    assert_eq!(open.limits().next().unwrap().1.id(), "ip-requests-minute");
    assert_eq!(open.rules[0].limits[0].quota().amount(), 60);

    let set = [
        ("TOLLGATE_UPSTREAM", "http://x"),
        ("TOLLGATE_UPSTREAM_KEY", "up"),
        ("API_KEYS", "a, b"),
        ("REQUEST_RATE_LIMIT", "5"),
        ("RATE_LIMITER_CAPACITY", "20"),
        ("RATE_LIMITER_REFILL_RATE", "0.250"),
    ];
    let keyed = load(None, &variables(&set)).unwrap();
    let config = &keyed.config;
    assert_eq!((config.auth, config.server.listen.to_string().as_str()), (Auth::Required, "0.0.0.0:8080"));
    assert!(config.keys.len() == 2 && config.keys.iter().all(|key| key.user.is_none()));
    assert_eq!(config.rules[0].limits[0].quota().amount(), 5);
    let bucket = &config.rules[1];
    assert_eq!(bucket.per, Scope::of([Dimension::ApiKey]));
    assert_eq!(bucket.limits[0].quota().to_string(), "1/4 seconds burst 20");
    assert_eq!(keyed.effective["config"]["models"][0]["providers"][0]["key"], "***");
    assert_eq!(keyed.effective["origins"]["models[0].providers[0].key"], "TOLLGATE_UPSTREAM_KEY");
}

#[test]
fn the_environment_completes_a_file() {
    let set = [
        ("TOLLGATE_UPSTREAM", "http://x"),
        ("TOLLGATE_LISTEN", "127.0.0.1:9"),
        ("API_KEYS", "k"),
        ("REQUEST_RATE_LIMIT", "7"),
        ("RATE_LIMITER_CAPACITY", "10"),
        ("RATE_LIMITER_REFILL_RATE", "2.5"),
    ];
    let loaded = load_file("server:\n  admin: 127.0.0.1:10\nlimits:\n", &variables(&set)).unwrap();
    assert_eq!((loaded.config.models[0].name.as_str(), loaded.warnings.len()), ("*", 0));
    assert_eq!(loaded.config.server.listen.port(), 9);
    let quotas: Vec<String> = loaded.config.limits().map(|(_, limit)| limit.quota().to_string()).collect();
    assert_eq!(quotas, ["7/minute", "5/2 seconds burst 10"]);
    // With a file nothing is limited that nobody limited.
    assert!(load_file(&file(""), &nothing).unwrap().config.rules.is_empty());
}

#[test]
fn aliases_and_merges() {
    let text = "x-a: &base { type: simulated, latency: 1s, timeout: 9s }\nx-b: &more { completion_tokens: 5, latency: 2s }\nauth: optional\nmodels:\n  - name: a\n    providers:\n      - { <<: [*more, *base], timeout: 3s }\n      - *base\n";
    let providers = load_file(text, &nothing).unwrap().config.models.remove(0).providers;
    let ProviderKind::Simulated { latency, completion_tokens: 5, .. } = providers[0].kind else { panic!() };
    assert_eq!((latency, providers[0].deadlines.total), (Duration::from_secs(2), Duration::from_secs(3)));
    assert_eq!(providers[1].deadlines.total, Duration::from_secs(9));
}

#[test]
fn secrets_stay_hidden() {
    let more =
        "server: { admin_key: canary-1, metrics_key: canary-2 }\nusers: [{ name: u, keys: [canary-3] }]\n";
    let text = file(more).replace("{ type: simulated }", "{ type: openai, url: http://x, key: canary-4 }");
    let loaded = load_file(&text, &nothing).unwrap();
    assert!(!format!("{loaded:?}").contains("canary"));
    assert_eq!(loaded.effective["config"]["users"][0]["keys"], json!(["***"]));
    assert_eq!(loaded.effective["config"]["server"]["admin_key"], "***");
    assert_eq!(loaded.effective["origins"]["server.admin_key"], "t.yml:5:22");
    assert_eq!(loaded.effective["origins"]["server.listen"], "default");
}

#[test]
fn the_schema_lists_every_key() {
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["properties"]["server"]["$ref"], "#/$defs/server");
    assert_eq!(schema["$defs"]["server"]["properties"]["max_body"]["default"], "10MB");
    assert_eq!(schema["$defs"]["limit"]["required"], json!(["name"]));
    assert_eq!(schema["$defs"]["openai"]["additionalProperties"], false);
    for section in [
        "server",
        "dependencies",
        "redis",
        "redis_tls",
        "settings",
        "telemetry",
        "tier",
        "limit",
        "match",
        "user",
        "key",
        "model",
        "token_weights",
        "price",
        "openai",
        "simulated",
    ] {
        assert!(
            schema["$defs"][section]["properties"].as_object().is_some_and(|keys| !keys.is_empty()),
            "{section}"
        );
    }
}

#[test]
fn every_unit() {
    let more = "settings: { rate_limiting_strategy: token_bucket }
limits:
  - { name: t, per: user, limit: [10k tokens/minute, 5k input tokens/minute burst 9k, 1M output tokens/day] }
  - { name: m, per: team, limit: [\"$500/month\", 20 concurrent, \"$9.50/day\"], strategy: moving_window, shadow: true, mode: strict }
  - { name: d, match: { endpoint: /v1/videos }, deny: true }
tiers: { pro: { limit: 64 concurrent, shadow: true } }
users: [{ name: u, tier: pro, team: t }]
";
    let text =
        file(more).replace("{ type: simulated }", "{ type: simulated, price: { input: 1, output: 2 } }");
    let loaded = load_file(&text, &nothing).map_err(|problems| super::lines(&problems)).unwrap();
    assert_eq!(super::lines(&loaded.warnings), [""; 0]);
    let seen: Vec<(&str, Algorithm, u64, bool)> = loaded
        .config
        .limits()
        .map(|(_, limit)| (limit.id(), limit.algorithm(), limit.capacity(), limit.is_shadow()))
        .collect();
    assert_eq!(
        seen,
        [
            ("pro-concurrency", Algorithm::Concurrency, 64, true),
            ("t-tokens-minute", Algorithm::TokenBucket, 10_000, false),
            ("t-input_tokens-minute", Algorithm::TokenBucket, 9_000, false),
            ("t-output_tokens-day", Algorithm::TokenBucket, 1_000_000, false),
            ("m-cost-month", Algorithm::FixedWindow, 500_000_000, true),
            ("m-concurrency", Algorithm::Concurrency, 20, true),
            ("m-cost-day", Algorithm::MovingWindow, 9_500_000, true),
        ]
    );
    let denies: Vec<(&str, bool)> =
        loaded.config.rules.iter().map(|rule| (rule.name.as_str(), rule.deny)).collect();
    assert_eq!(denies, [("pro", false), ("t", false), ("m", false), ("d", true)]);
}

#[test]
fn prices_and_counting() {
    let model = |keys: &str, price: &str| {
        let text = format!(
            "auth: optional\nmodels:\n  - {{ name: a, {keys} providers: [{{ type: simulated, {price} }}] }}\n"
        );
        let loaded = load_file(&text, &nothing).map_err(|problems| super::lines(&problems)).unwrap();
        (loaded.config.models[0].clone(), loaded.effective["config"]["models"][0].clone())
    };
    let (plain, shown) = model("", "");
    assert_eq!(
        (plain.count, plain.token_weights, plain.providers[0].price),
        (Count::Estimate, TokenWeights::default(), None)
    );
    assert_eq!(shown["token_weights"], json!({ "cached_input": 1.0, "reasoning": 1.0 }));
    let (priced, shown) = model(
        "count: exact, token_weights: { cached_input: 0.1, reasoning: 0.125 },",
        "price: { input: 0.15, cached_input: 0.075, output: 1_000.000001 }",
    );
    assert_eq!(
        (priced.count, priced.token_weights),
        (Count::Exact, TokenWeights { cached_input: 100, reasoning: 125 })
    );
    let price = Price { input: 150_000, cached_input: 75_000, output: 1_000_000_001 };
    assert_eq!(priced.providers[0].price, Some(price));
    assert_eq!(shown["providers"][0]["price"]["cached_input"], json!(0.075));
    let (free, _) = model("token_weights: { reasoning: 0 },", "price: { input: 1_000_000, output: 0.0 }");
    assert_eq!(free.token_weights, TokenWeights { cached_input: 1_000, reasoning: 0 });
    let price = Price { input: 1_000_000_000_000, cached_input: 1_000_000_000_000, output: 0 };
    assert_eq!(free.providers[0].price, Some(price));
}

#[test]
fn globs() {
    for (glob, route, fits) in [
        ("/v1/images/*", "/v1/images/edits", true),
        ("/v1/images/*", "/v1/images", false),
        ("/v1/responses", "/v1/responses", true),
        ("/v1/responses", "/v1/responses/x", false),
        ("*", "/v1/rerank", true),
        ("/v1/*/s*s", "/v1/images/edits", false),
        ("/v1/*a*s", "/v1/images/edits", true),
        ("/a*a", "/a", false),
    ] {
        assert_eq!(endpoint_matches(glob, route), fits, "{glob} {route}");
    }
}
