//! Limits: what is counted together, that a refused request costs nothing, and what a refusal says.
//!
//! All windows are days, so that none ends while a test runs (but at midnight UTC).

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::{Conn, Provider, Response, Step, Tollgate, get, json_answer, post, request};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
const CHAT: &str = "/v1/chat/completions";

/// Who sends what.
#[derive(Clone, Copy)]
struct Ask {
    key: &'static str,
    ip: &'static str,
    agent: &'static str,
    model: &'static str,
    path: &'static str,
}

const ASK: Ask = Ask { key: "sk-alice", ip: "203.0.113.1", agent: "a", model: "chat", path: CHAT };

impl Ask {
    fn bytes(&self) -> Vec<u8> {
        let bearer = format!("Bearer {}", self.key);
        let mut headers = vec![("X-Forwarded-For", self.ip), ("User-Agent", self.agent)];
        if !self.key.is_empty() {
            headers.push(("Authorization", &bearer));
        }
        let body = format!(r#"{{"model":"{}","messages":[],"input":"a"}}"#, self.model);
        request("POST", self.path, &headers, body.as_bytes())
    }

    async fn send(&self, gateway: &Tollgate) -> Response {
        post(gateway.data, &self.bytes()).await
    }
}

/// alice has two keys and is in team `red` with carol; bob is alone; models `chat` and `other`.
fn config(provider: &Provider, limits: &str) -> String {
    let providers = format!("[{{ type: openai, url: 'http://{}' }}]", provider.address);
    format!(
        "auth: optional\nusers:\n  - {{ name: alice, team: red, tier: paid, keys: [sk-alice, sk-alice-2] }}\n  \
         - {{ name: bob, keys: [sk-bob] }}\n  - {{ name: carol, team: red, keys: [sk-carol] }}\nmodels:\n  \
         - {{ name: chat, aliases: [gpt-4o-mini], providers: {providers} }}\n  \
         - {{ name: other, providers: {providers} }}\n{limits}\n"
    )
}

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "x-ratelimit-limit-requests: 999\r\n", ANSWER)).await
}

async fn start(provider: &Provider, limits: &str) -> Tollgate {
    let limits =
        format!("{limits}\n{}", if limits.contains("tiers:") { "" } else { "tiers: { paid: [unlimited] }" });
    Tollgate::start_with("  trusted_proxies: [127.0.0.0/8]\n", &config(provider, &limits), &[]).await
}

#[tokio::test]
async fn what_is_counted_together_in_each_scope() {
    let cases: [(&str, &[(Ask, u16)]); 10] = [
        (
            "ip",
            &[
                (ASK, 200),
                (Ask { key: "sk-bob", agent: "b", model: "other", ..ASK }, 200),
                (ASK, 429),
                (Ask { ip: "203.0.113.2", ..ASK }, 200),
            ],
        ),
        (
            "session",
            &[
                (ASK, 200),
                (Ask { key: "", model: "other", ..ASK }, 200),
                (ASK, 429),
                (Ask { agent: "b", ..ASK }, 200),
                (Ask { ip: "203.0.113.2", ..ASK }, 200),
            ],
        ),
        (
            "api_key",
            &[
                (ASK, 200),
                (Ask { ip: "203.0.113.2", ..ASK }, 200),
                (ASK, 429),
                (Ask { key: "sk-alice-2", ..ASK }, 200),
                (Ask { key: "", ..ASK }, 200),
                (Ask { key: "", ..ASK }, 200),
                (Ask { key: "", ..ASK }, 429),
                (Ask { key: "", ip: "203.0.113.2", ..ASK }, 200),
            ],
        ),
        (
            "user",
            &[
                (ASK, 200),
                (Ask { key: "sk-alice-2", ..ASK }, 200),
                (ASK, 429),
                (Ask { key: "sk-bob", ..ASK }, 200),
            ],
        ),
        (
            "team",
            &[
                (ASK, 200),
                (Ask { key: "sk-carol", ..ASK }, 200),
                (Ask { key: "sk-alice-2", ..ASK }, 429),
                (Ask { key: "sk-bob", ..ASK }, 200),
            ],
        ),
        (
            "model",
            &[
                (ASK, 200),
                (Ask { key: "sk-bob", model: "gpt-4o-mini", ..ASK }, 200),
                (ASK, 429),
                (Ask { model: "gpt-4o-mini", ..ASK }, 429),
                (Ask { model: "other", ..ASK }, 200),
            ],
        ),
        (
            "endpoint",
            &[
                (ASK, 200),
                (Ask { path: "/api/v1/chat", key: "sk-bob", ..ASK }, 200),
                (ASK, 429),
                (Ask { path: "/api/v1/chat", ..ASK }, 429),
                (Ask { path: "/v1/embeddings", ..ASK }, 200),
            ],
        ),
        (
            "[user, model]",
            &[
                (ASK, 200),
                (Ask { model: "gpt-4o-mini", path: "/v1/embeddings", ..ASK }, 200),
                (ASK, 429),
                (Ask { model: "other", ..ASK }, 200),
                (Ask { key: "sk-bob", ..ASK }, 200),
            ],
        ),
        (
            "[api_key, endpoint]",
            &[
                (ASK, 200),
                (ASK, 200),
                (ASK, 429),
                (Ask { path: "/v1/embeddings", ..ASK }, 200),
                (Ask { key: "sk-alice-2", ..ASK }, 200),
            ],
        ),
        (
            "global",
            &[
                (ASK, 200),
                (
                    Ask { key: "sk-bob", ip: "203.0.113.2", model: "other", path: "/v1/embeddings", ..ASK },
                    200,
                ),
                (ASK, 429),
                (Ask { key: "", ip: "203.0.113.3", ..ASK }, 429),
            ],
        ),
    ];
    let provider = provider().await;
    for (scope, asks) in cases {
        let gateway = start(&provider, &format!("limits: [{{ name: r, per: {scope}, limit: 2/day }}]")).await;
        for (number, (ask, status)) in asks.iter().enumerate() {
            let answer = ask.send(&gateway).await;
            assert_eq!(answer.status, *status, "per {scope}, request {number}: {}", answer.text());
        }
    }
}

#[tokio::test]
async fn a_rule_is_for_what_it_matches() {
    let provider = provider().await;
    for (matches, hit, missed) in [
        ("authenticated: false", Ask { key: "", ..ASK }, ASK),
        ("authenticated: true", ASK, Ask { key: "", ..ASK }),
        ("endpoint: /v1/embed*", Ask { path: "/v1/embeddings", ..ASK }, ASK),
        (
            "endpoint: /v1/chat/completions",
            Ask { path: "/api/v1/chat", ..ASK },
            Ask { path: "/v1/embeddings", ..ASK },
        ),
        ("model: gpt-4o-mini", ASK, Ask { model: "other", ..ASK }),
        ("user: [alice, carol]", ASK, Ask { key: "sk-bob", ..ASK }),
        ("team: red", Ask { key: "sk-carol", ..ASK }, Ask { key: "sk-bob", ..ASK }),
        ("tier: paid", ASK, Ask { key: "sk-bob", ..ASK }),
        ("ip: 203.0.113.0/28", ASK, Ask { ip: "203.0.113.16", ..ASK }),
        ("user: alice, model: other", Ask { model: "other", ..ASK }, ASK),
    ] {
        let rule = format!("limits: [{{ name: r, match: {{ {matches} }}, per: global, limit: 1/day }}]");
        let gateway = start(&provider, &rule).await;
        for _ in 0..3 {
            assert_eq!(missed.send(&gateway).await.status, 200, "{matches}");
        }
        assert_eq!(hit.send(&gateway).await.status, 200, "{matches}");
        assert_eq!(hit.send(&gateway).await.status, 429, "{matches}");
        assert_eq!(missed.send(&gateway).await.status, 200, "{matches}");
    }
}

#[tokio::test]
async fn all_limits_are_charged_or_none() {
    let provider = provider().await;
    let limits =
        "limits: [{ name: all, per: global, limit: 5/day }, { name: each, per: user, limit: 2/day }]";
    let gateway = start(&provider, limits).await;
    let of = |key| Ask { key, ..ASK };
    for (key, status, rule) in [
        ("sk-alice", 200, ""),
        ("sk-alice", 200, ""),
        ("sk-alice", 429, "each"),
        ("sk-alice", 429, "each"),
        ("sk-alice", 429, "each"),
        ("sk-alice", 429, "each"),
        ("sk-bob", 200, ""),
        ("sk-bob", 200, ""),
        ("sk-carol", 200, ""),
        ("sk-carol", 429, "all"),
        ("sk-carol", 429, "all"),
    ] {
        let answer = of(key).send(&gateway).await;
        assert_eq!(answer.status, status, "{key}: {}", answer.text());
        if status == 429 {
            let refused = answer.json()["error"]["rule"].as_str().expect("a rule").to_owned();
            assert!(refused.starts_with(rule), "{refused}");
        }
    }
    assert_eq!(provider.hits(), 5);
}

#[tokio::test]
async fn three_hundred_at_once_admit_exactly_ten() {
    for strategy in ["fixed_window", "sliding_window", "moving_window", "token_bucket"] {
        let provider = provider().await;
        let rule = format!("limits: [{{ name: r, per: user, limit: 10/day, strategy: {strategy} }}]");
        let gateway = start(&provider, &rule).await;
        let mut ready = Vec::new();
        for _ in 0..300 {
            ready.push(Conn::open(gateway.data).await);
        }
        let barrier = Arc::new(tokio::sync::Barrier::new(ready.len()));
        let asking: Vec<_> = ready
            .into_iter()
            .map(|mut conn| {
                let barrier = barrier.clone();
                tokio::spawn(async move {
                    barrier.wait().await;
                    conn.send(&ASK.bytes()).await;
                    conn.response().await.status
                })
            })
            .collect();
        let mut statuses = Vec::new();
        for asked in asking {
            statuses.push(asked.await.expect("a status"));
        }
        let count = |status| statuses.iter().filter(|&&now| now == status).count();
        assert_eq!((count(200), count(429)), (10, 290), "{strategy}");
        assert_eq!(provider.hits(), 10, "{strategy}");
    }
}

/// Hours, minutes, seconds and milliseconds as Go prints them, in milliseconds.
fn go_millis(text: &str) -> u64 {
    let (mut total, mut number) = (0.0, String::new());
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '0'..='9' | '.' => number.push(next),
            'm' if rest.peek() == Some(&'s') => {
                rest.next();
                total += std::mem::take(&mut number).parse::<f64>().expect("a number");
            }
            unit => {
                let millis = [('h', 3.6e6), ('m', 6e4), ('s', 1e3)].iter().find(|(name, _)| *name == unit);
                let millis = millis.unwrap_or_else(|| panic!("{text}")).1;
                total += std::mem::take(&mut number).parse::<f64>().expect("a number") * millis;
            }
        }
    }
    assert!(number.is_empty(), "{text}");
    total.round() as u64
}

#[tokio::test]
async fn what_an_answer_says_of_its_limits() {
    let provider = provider().await;
    let limits = "limits: [{ name: wide, per: global, limit: 1_000/day }, { name: day, per: user, limit: [3/day, 100/week] }]";
    let gateway = start(&provider, limits).await;
    let day = 86_400;
    for left in [2, 1, 0] {
        let answer = ASK.send(&gateway).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 3);
        assert_eq!(answer.number("x-ratelimit-remaining-requests"), left);
        assert_eq!(answer.number("x-ratelimit-limit"), 3);
        assert_eq!(answer.number("x-ratelimit-remaining"), left);
        let reset = go_millis(answer.header("x-ratelimit-reset-requests").expect("a reset"));
        assert!(reset <= day * 1_000);
        let policy = answer.header("ratelimit-policy").expect("a policy");
        for part in [
            r#""wide-requests-day";q=1000;w=86400"#,
            r#""day-requests-day";q=3;w=86400"#,
            r#""day-requests-week";q=100;w=604800"#,
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        let state = answer.header("ratelimit").expect("a state");
        assert!(state.contains(&format!(r#""day-requests-day";r={left};t="#)), "{state}");
        assert_eq!(answer.header("retry-after"), None);
    }
    let before =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let answer = ASK.send(&gateway).await;
    assert_eq!((answer.status, answer.code()), (429, "rate_limit_exceeded".into()));
    let error = &answer.json()["error"];
    assert_eq!(
        (&error["type"], &error["rule"], &error["scope"], &error["limit"], &error["used"]),
        (&"requests".into(), &"day-requests-day".into(), &"user".into(), &3.into(), &3.into())
    );
    let milliseconds = error["retry_after_ms"].as_u64().expect("milliseconds");
    assert_eq!(answer.number("retry-after-ms"), milliseconds);
    assert_eq!(answer.number("retry-after"), milliseconds.div_ceil(1_000));
    assert!((1..=day * 1_000).contains(&milliseconds));
    assert_eq!(answer.header("x-should-retry"), (milliseconds > 60_000).then_some("false"));
    assert_eq!(answer.number("x-ratelimit-remaining-requests"), 0);
    assert_eq!((answer.number("x-ratelimit-limit"), answer.number("x-ratelimit-remaining")), (3, 0));
    let reset = answer.number("x-ratelimit-reset");
    assert!(reset.abs_diff(before + milliseconds / 1_000) <= 2, "{reset} {before} {milliseconds}");
    assert_eq!(reset % day, 0, "a day ends at midnight UTC");
    let message = answer.message();
    let end = message.split("Limit 3, Used 3, Requested 1. Please try again in ").nth(1);
    let wait = end.and_then(|end| end.strip_suffix('.')).unwrap_or_else(|| panic!("{message}"));
    assert_eq!(go_millis(wait), milliseconds, "{message}");
    let line = &gateway.requests_logged(4).await[3];
    assert_eq!(
        (&line["status"], &line["rule"], &line["attempts"]),
        (&429.into(), &"day-requests-day".into(), &0.into())
    );
}

#[tokio::test]
async fn what_nobody_answers_or_is_no_request_costs_nothing() {
    let well = Arc::new(AtomicBool::new(false));
    let provider = {
        let well = well.clone();
        Provider::start(move |_| {
            let status = if well.load(Ordering::Relaxed) { "200 OK" } else { "500 Internal Server Error" };
            vec![Step::Send(json_answer(status, "", ANSWER))]
        })
        .await
    };
    let gateway = start(&provider, "limits: [{ name: r, per: global, limit: 2/day }]").await;
    for _ in 0..5 {
        assert_eq!(ASK.send(&gateway).await.status, 502);
    }
    for (ask, status) in [
        (Ask { key: "sk-nobody", ..ASK }, 401),
        (Ask { model: "nothing", ..ASK }, 404),
        (Ask { path: "/v1/nothing", ..ASK }, 404),
    ] {
        assert_eq!(ask.send(&gateway).await.status, status);
    }
    let malformed = request("POST", CHAT, &[("Authorization", "Bearer sk-alice")], b"{");
    assert_eq!(post(gateway.data, &malformed).await.status, 400);
    assert_eq!(get(gateway.data, "/v1/models").await.status, 200);
    well.store(true, Ordering::Relaxed);
    for status in [200, 200, 429] {
        assert_eq!(ASK.send(&gateway).await.status, status);
    }
}

#[tokio::test]
async fn a_tier_counts_per_user_and_model() {
    let provider = provider().await;
    let gateway = start(&provider, "tiers: { paid: [2/day, 3/week] }").await;
    for (ask, status) in [
        (ASK, 200),
        (Ask { key: "sk-alice-2", model: "gpt-4o-mini", path: "/v1/embeddings", ..ASK }, 200),
        (ASK, 429),
        (Ask { model: "other", ..ASK }, 200),
        (Ask { key: "sk-bob", ..ASK }, 200),
        (Ask { key: "sk-bob", ..ASK }, 200),
        (Ask { key: "sk-bob", ..ASK }, 200),
    ] {
        assert_eq!(ask.send(&gateway).await.status, status);
    }
}

#[tokio::test]
async fn a_reload_keeps_what_was_used() {
    let provider = provider().await;
    let server = "  trusted_proxies: [127.0.0.0/8]\n";
    let with = |limit: &str| {
        let rules =
            format!("limits: [{{ name: r, per: user, limit: {limit} }}]\ntiers: {{ paid: [unlimited] }}");
        config(&provider, &rules)
    };
    let gateway = Tollgate::start_with(server, &with("3/day"), &[]).await;
    for left in [2, 1, 0] {
        assert_eq!(ASK.send(&gateway).await.number("x-ratelimit-remaining-requests"), left);
    }
    assert_eq!(ASK.send(&gateway).await.status, 429);
    gateway.reload().await;
    assert_eq!(ASK.send(&gateway).await.status, 429, "the same file changes nothing");
    gateway.configure(server, &with("5/day"));
    gateway.reload().await;
    for left in [1, 0] {
        let answer = ASK.send(&gateway).await;
        assert_eq!((answer.status, answer.number("x-ratelimit-remaining-requests")), (200, left));
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 5);
    }
    let answer = ASK.send(&gateway).await;
    assert_eq!((answer.status, &answer.json()["error"]["used"]), (429, &5.into()));
    gateway.configure(server, &with("2/day"));
    gateway.reload().await;
    let answer = ASK.send(&gateway).await;
    assert_eq!((answer.status, answer.number("x-ratelimit-remaining-requests")), (429, 0));
}
