//! Refusals of every kind: what they say, where they are counted and written down, and what they leave alone.

mod support;

use support::{
    Ask, Conn, Gate, Provider, Redis, Step, Store, json_answer, obedient, post, request, sse, start_counting,
    start_governed,
};

#[tokio::test]
async fn a_prompt_that_never_fits_is_told_apart() {
    let provider = obedient().await;
    let rest = "models:\n  - { name: exact, count: exact, providers: [{ <<: *upstream, model_name: gpt-4o-mini }] }\n  \
                - { name: chat, providers: [*upstream] }\n\
                limits: [{ name: r, per: [user, model], limit: 50 tokens/day }]";
    let gateway = start_counting(&Store::Memory, &provider, rest).await;
    let long = "one two three ".repeat(100);
    let body = format!(r#","messages":[{{"role":"user","content":"{long}"}}]"#);
    let exact = Ask { model: "exact", body: &body, ..Ask::PLAIN };
    let refused = exact.send(&gateway).await;
    assert_eq!((refused.status, refused.code()), (429, "request_too_large".into()), "{}", refused.text());
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert_eq!((refused.header("retry-after"), refused.header("retry-after-ms")), (None, None));
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["rule"]), (&"tokens".into(), &"r-tokens-day".into()));
    assert_eq!(
        (&error["limit"], &error["used"], &error["retry_after_ms"]),
        (&50.into(), &0.into(), &().into())
    );
    assert!(refused.message().contains("Limit 50, Used 0, Requested "), "{}", refused.message());
    assert_eq!(exact.level(&gateway, "r-tokens-day").await, 0);
    assert_eq!(provider.hits(), 0);
    // What is only estimated is never too large: else a small key could never make its first call.
    assert_eq!(Ask { body: &body, ..Ask::PLAIN }.send(&gateway).await.status, 200);
    let short = r#","messages":[{"role":"user","content":"one"}]"#;
    assert_eq!(Ask { body: short, ..exact }.send(&gateway).await.status, 200);
}

#[tokio::test]
async fn calls_in_flight() {
    for store in [Store::Memory, Store::redis()] {
        let gate = Gate::new();
        let waiting = gate.clone();
        let provider = Provider::start(move |seen| {
            let held = Step::Wait(waiting.clone());
            let (ok, body) = ("200 OK", r#"{"choices":[]}"#);
            match seen.json()["x_way"].as_str().unwrap_or_default() {
                "ends" => vec![held, Step::Send(json_answer(ok, "", body))],
                "fails" => vec![held, Step::Send(json_answer("400 No", "", body))],
                "dies" => vec![held, Step::Close],
                "streams" => vec![
                    Step::Send([sse::head(), support::chunk(sse::delta("a").as_bytes())].concat()),
                    held,
                    Step::Close,
                ],
                _ => vec![Step::Send(json_answer(ok, "", body))],
            }
        })
        .await;
        let gateway = start_governed(
            &store,
            &provider,
            "limits: [{ name: r, per: user, limit: [5 concurrent, 100/day] }]",
        )
        .await;
        let ways = ["ends", "fails", "dies", "streams", "ends"];
        let mut running = Vec::new();
        for way in ways {
            let body = format!(r#","stream":{},"x_way":"{way}""#, way == "streams");
            running.push(Conn::ask(gateway.data, &Ask { body: &body, ..Ask::PLAIN }.bytes()).await);
        }
        gate.reached(ways.len()).await;
        assert_eq!(Ask::PLAIN.level(&gateway, "r-concurrency").await, 5);

        let refused = Ask::PLAIN.send(&gateway).await;
        assert_eq!((refused.status, refused.code()), (429, "concurrency_limit_exceeded".into()));
        assert_eq!(
            (refused.header("retry-after"), refused.header("retry-after-ms")),
            (Some("1"), Some("1000"))
        );
        assert_eq!(refused.header("x-should-retry"), None);
        let error = &refused.json()["error"];
        assert_eq!((&error["type"], &error["rule"]), (&"requests".into(), &"r-concurrency".into()));
        assert_eq!((&error["limit"], &error["used"]), (&5.into(), &5.into()));
        assert!(refused.header("ratelimit").expect("a state").contains(r#""r-concurrency";r=0"#));
        assert_eq!((refused.number("x-ratelimit-limit"), refused.number("x-ratelimit-remaining")), (5, 0));
        assert_eq!(Ask::PLAIN.level(&gateway, "r-requests-day").await, 5, "all or none");
        assert_eq!(Ask { key: "sk-bob", ..Ask::PLAIN }.send(&gateway).await.status, 200);

        // One leaves, one has read a part and leaves; then all the others end in their own ways.
        running.remove(4).leave();
        Ask::PLAIN.level_becomes(&gateway, "r-concurrency", 4).await;
        let mut streaming = running.remove(3);
        streaming.head().await;
        streaming.until("data: ").await;
        streaming.reset();
        Ask::PLAIN.level_becomes(&gateway, "r-concurrency", 3).await;
        let answer = Ask::PLAIN.send(&gateway).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.number("x-ratelimit-limit"), 100, "of calls in flight only a refusal tells");
        assert!(!answer.header("ratelimit").expect("a state").contains("concurrency"));
        assert!(!answer.header("ratelimit-policy").expect("a policy").contains("concurrency"));
        gate.open();
        let mut statuses = Vec::new();
        for conn in &mut running {
            statuses.push(conn.response().await.status);
        }
        assert_eq!(statuses, [200, 400, 502]);
        Ask::PLAIN.level_becomes(&gateway, "r-concurrency", 0).await;
    }
}

#[tokio::test]
async fn a_rule_that_denies() {
    let provider = obedient().await;
    let limits = "limits:\n  - { name: no-embeddings, match: { endpoint: /v1/embed*, user: alice }, deny: true }\n  \
                  - { name: r, per: user, limit: 10/day }";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    let denied = Ask { path: "/v1/embeddings", ..Ask::PLAIN };
    let refused = denied.send(&gateway).await;
    assert_eq!((refused.status, refused.code()), (403, "denied".into()));
    assert_eq!(refused.json()["error"]["type"], "permission_error");
    assert!(refused.message().contains("`no-embeddings`"), "{}", refused.message());
    assert_eq!(refused.header("retry-after"), None);
    assert!(refused.headers.iter().all(|(name, _)| !name.contains("ratelimit")), "{refused:?}");
    let logged = gateway.request_logged(refused.header("x-request-id").expect("an id")).await;
    assert_eq!((&logged["code"], &logged["rule"]), (&"denied".into(), &"no-embeddings".into()));
    assert_eq!(Ask::PLAIN.level(&gateway, "r-requests-day").await, 0);
    assert_eq!(provider.hits(), 0);
    assert_eq!(Ask { key: "sk-bob", ..denied }.send(&gateway).await.status, 200);
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
}

#[tokio::test]
async fn a_shadow_counts_and_never_refuses() {
    for store in [Store::Memory, Store::redis()] {
        let provider = obedient().await;
        let limits = "limits:\n  - { name: s, per: user, limit: [2/day, 1k tokens/day], shadow: true }\n  \
                      - { name: r, per: user, limit: 4/day }";
        let gateway = start_governed(&store, &provider, limits).await;
        let mut last = None;
        for number in 1..=5 {
            let answer = Ask::PLAIN.send(&gateway).await;
            assert_eq!(answer.status, if number <= 4 { 200 } else { 429 }, "{number}: {}", answer.text());
            assert!(!answer.header("ratelimit").expect("a state").contains("\"s-"), "shadows are not shown");
            assert_eq!(answer.number("x-ratelimit-limit-requests"), 4);
            assert_eq!(answer.header("x-ratelimit-limit-tokens"), None);
            last = Some(answer);
        }
        assert_eq!(last.expect("five answers").json()["error"]["rule"], "r-requests-day");
        assert_eq!(Ask::PLAIN.level(&gateway, "s-requests-day").await, 2, "charged only where it fits");
        let metrics = gateway.metrics().await;
        let met = |rule: &str, status: &str| {
            metrics.value(&format!(
                r#"rate_limit_requests_total{{strategy="user",status="{status}",rule="{rule}"}}"#
            ))
        };
        assert_eq!(
            (met("s-requests-day", "allowed"), met("s-requests-day", "shadow")),
            (2.0, 3.0),
            "{}",
            metrics.0
        );
        assert_eq!(met("s-requests-day", "blocked"), 0.0);
        assert_eq!((met("r-requests-day", "allowed"), met("r-requests-day", "blocked")), (4.0, 1.0));
    }
}

#[tokio::test]
async fn what_is_counted_about_limits() {
    let provider = obedient().await;
    let limits = "limits: [{ name: r, per: user, limit: [10/day, 1000 tokens/day] }, { name: all, per: global, limit: 3/day }]";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    let body = r#","messages":[],"max_tokens":100,"x_usage":{"prompt_tokens":30,"completion_tokens":40}"#;
    let ask = Ask { body, ..Ask::PLAIN };
    for status in [200, 200] {
        assert_eq!(ask.send(&gateway).await.status, status);
    }
    ask.level_becomes(&gateway, "r-tokens-day", 140).await;
    // A wrong key, a wrong model and a wrong path meet no limit; what no provider answers does, and is given back.
    let nowhere = Ask { body: r#","messages":[],"max_tokens":100,"x_status":500"#, ..Ask::PLAIN };
    for (ask, status) in [
        (nowhere, 502),
        (ask, 200),
        (ask, 429),
        (Ask { key: "sk-nobody", ..ask }, 401),
        (Ask { model: "nothing", ..ask }, 404),
        (Ask { path: "/v1/nothing", ..ask }, 404),
    ] {
        assert_eq!(ask.send(&gateway).await.status, status);
    }
    ask.level_becomes(&gateway, "r-tokens-day", 210).await;
    let metrics = gateway.metrics().await;
    for (family, label, value) in [
        ("rate_limit_requests_total", r#"status="allowed",rule="r-requests-day""#, 5.0),
        ("rate_limit_requests_total", r#"status="blocked",rule="r-requests-day""#, 0.0),
        ("rate_limit_requests_total", r#"status="allowed",rule="all-requests-day""#, 4.0),
        ("rate_limit_requests_total", r#"status="blocked",rule="all-requests-day""#, 1.0),
        ("rate_limit_blocked_total", r#"rule="all-requests-day""#, 1.0),
        ("rate_limit_blocked_total", r#"rule="r-"#, 0.0),
        ("rate_limit_tokens_total", r#"kind="reserved""#, 400.0),
        ("rate_limit_tokens_total", r#"kind="used""#, 210.0),
        // 30 of each of three, and all of the one that reached nobody.
        ("rate_limit_tokens_total", r#"kind="returned""#, 190.0),
        ("rate_limit_settlements_total", r#"outcome="settled""#, 3.0),
        ("rate_limit_settlements_total", r#"outcome="refunded""#, 1.0),
        ("rate_limit_decision_duration_seconds_count", r#"source="memory""#, 5.0),
    ] {
        assert_eq!(metrics.sum(family, label), value, "{family} {label}\n{}", metrics.0);
    }
    assert!(
        metrics.0.contains(r#"strategy="global""#) && metrics.0.contains(r#"strategy="user""#),
        "{}",
        metrics.0
    );
}

#[tokio::test]
async fn what_a_limit_forgives_is_tokens() {
    let provider = obedient().await;
    let limits =
        "limits: [{ name: r, per: user, limit: [100 tokens/day, 100 input tokens/day, $0.0001/day] }]";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    let body = r#","max_tokens":10,"x_usage":{"prompt_tokens":1000,"completion_tokens":0}"#;
    assert_eq!(Ask { body, ..Ask::PLAIN }.send(&gateway).await.status, 200);
    // A limit remembers twice itself, so much of what was used is forgiven; money is not tokens.
    for limit in ["r-tokens-day", "r-input_tokens-day", "r-cost-day"] {
        Ask::PLAIN.level_becomes(&gateway, limit, 200).await;
    }
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.sum("rate_limit_tokens_total", r#"kind="forgiven""#), 800.0, "{}", metrics.0);
    assert_eq!(metrics.sum("rate_limit_tokens_total", r#"kind="used""#), 1_000.0);
}

#[tokio::test]
async fn a_refusal_is_one_line_and_a_flood_is_not() {
    let provider = obedient().await;
    let gateway =
        start_governed(&Store::Memory, &provider, "limits: [{ name: r, per: user, limit: 1/day }]").await;
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
    let refused = Ask::PLAIN.send(&gateway).await;
    let id = refused.header("x-request-id").expect("an id").to_owned();
    let line = gateway.logged(|line| line["message"] == "limited").await;
    for (name, value) in [
        ("request_id", serde_json::Value::from(id)),
        ("rule", "r-requests-day".into()),
        ("subject", "user:alice".into()),
        ("unit", "requests".into()),
        ("limit", 1.into()),
        ("used", 1.into()),
        ("requested", 1.into()),
        ("source", "memory".into()),
        ("suppressed", ().into()),
    ] {
        assert_eq!(line[name], value, "{line}");
    }
    assert_eq!(line["retry_after_ms"], refused.json()["error"]["retry_after_ms"]);

    // Of a flood a few lines a second, and some of them say how many are missing: until the next of those is written, all
    // that are there and all that are missing are all there were.
    let started = std::time::Instant::now();
    let mut refused = 1;
    loop {
        assert_eq!(Ask::PLAIN.send(&gateway).await.status, 429);
        refused += 1;
        gateway.requests_logged(1 + refused).await;
        let lines: Vec<_> = gateway.lines().into_iter().filter(|line| line["message"] == "limited").collect();
        let seconds = started.elapsed().as_secs() as usize;
        assert!(lines.len() <= 20 * (seconds + 2), "{} lines in {seconds} s", lines.len());
        let missing: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
        if missing > 0 && lines.len() as u64 + missing == refused as u64 {
            break;
        }
        assert!(
            started.elapsed() < support::SOON,
            "{refused} refusals, {} lines, {missing} missing",
            lines.len()
        );
    }
}

#[tokio::test]
async fn junk_never_reaches_redis() {
    let store = Store::redis();
    let Store::Redis(redis) = &store else { panic!("it is one") };
    let provider = obedient().await;
    let limits = "limits:\n  - { name: no-embeddings, match: { endpoint: /v1/embed* }, deny: true }\n  \
                  - { name: r, per: [ip, model, endpoint], limit: 1000/day }";
    let gateway = start_governed(&store, &provider, limits).await;
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
    Ask::PLAIN.level_becomes(&gateway, "r-requests-day", 1).await;
    let batches = batched(redis);
    let before = (commands(redis), redis.cli(&["KEYS", "*:rl:*"]));
    for number in 0..20 {
        let junk = format!("junk-{number}");
        let path = format!("/v1/{junk}");
        for (ask, status) in [
            (Ask { key: &junk, ..Ask::PLAIN }, 401),
            (Ask { model: &junk, ..Ask::PLAIN }, 404),
            (Ask { path: &path, ..Ask::PLAIN }, 404),
            (Ask { path: "/v1/embeddings", ..Ask::PLAIN }, 403),
            (Ask { body: r#","max_tokens":"many""#, ..Ask::PLAIN }, 400),
        ] {
            assert_eq!(ask.send(&gateway).await.status, status);
        }
        let listed =
            post(gateway.data, &request("GET", "/v1/models", &[("X-API-Key", "sk-alice")], b"")).await;
        assert_eq!(listed.status, 200);
    }
    assert_eq!((commands(redis), redis.cli(&["KEYS", "*:rl:*"])), before);
    let more = batched(redis).into_iter().zip(batches).map(|(now, before)| now - before);
    // One for each junk key, or each junk model, would be twenty.
    for (name, more) in BATCHED.iter().zip(more) {
        assert!(more < 20, "{more} times {name}");
    }
    assert_eq!(provider.hits(), 1);
    // They would be seen: one that counts is.
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
    assert_ne!(commands(redis), before.0);
}

/// What scripts of totals, usage and control data do about once a second, whoever asks what; decisions come by `evalsha`.
const BATCHED: [&str; 8] = ["hget", "hset", "hincrby", "hmget", "get", "set", "hlen", "expire"];

/// How often that was done.
fn batched(redis: &Redis) -> [u64; BATCHED.len()] {
    let stats = redis.cli(&["INFO", "commandstats"]);
    let calls = |name: &str| {
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls="))?.split(',').next());
        line.map_or(0, |calls| calls.parse::<u64>().expect("a count"))
    };
    BATCHED.map(calls)
}

/// How often Redis was asked for anything but its own state and what instances tell of themselves every now and then.
fn commands(redis: &Redis) -> Vec<String> {
    let own = ["info", "keys", "ping", "client", "hello", "role", "config", "command"];
    let heartbeat = ["eval", "time", "zadd", "zcard", "zcount", "zremrangebyscore", "pexpire"];
    let stats = redis.cli(&["INFO", "commandstats"]);
    let calls = stats
        .lines()
        .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(",usec"))
        .map(|(calls, _)| calls);
    let name = |calls: &str| calls.split([':', '|']).next().unwrap_or_default().to_owned();
    calls
        .filter(|calls| !own.iter().chain(&heartbeat).chain(&BATCHED).any(|known| name(calls) == *known))
        .map(str::to_owned)
        .collect()
}
