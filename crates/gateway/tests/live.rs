//! What operators see as it happens: server-sent events, the requests that ended last, what limits said.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    Listener, Provider, Response, SOON, Step, Tollgate, chunk, json_answer, post, question, request, sse,
};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}"#;

fn config(provider: &Provider, limits: &str) -> String {
    format!(
        "users:\n  - {{ name: alice, keys: [sk-alice] }}\n  - {{ name: bob, keys: [sk-bob] }}\n\
         models:\n  - {{ name: chat, aliases: [talk], providers: [{{ type: openai, url: 'http://{}', key: sk-upstream-canary, \
         price: {{ input: 1, output: 2 }} }}] }}\nsettings: {{ state: none }}\nlimits: {limits}\n",
        provider.address
    )
}

async fn start(limits: &str) -> (Provider, Tollgate) {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let gateway = Tollgate::start(&config(&provider, limits)).await;
    (provider, gateway)
}

async fn ask(gateway: &Tollgate, key: &str, id: &str, body: &str) -> Response {
    let bearer = format!("Bearer {key}");
    let headers = [("Authorization", bearer.as_str()), ("X-Request-Id", id)];
    post(gateway.data, &request("POST", "/v1/chat/completions", &headers, body.as_bytes())).await
}

async fn told(gateway: &Tollgate, path: &str) -> Response {
    post(gateway.admin, &request("GET", path, &[], b"")).await
}

/// The requests that a query finds, once they are as many.
async fn requests(gateway: &Tollgate, query: &str, count: usize) -> Vec<Value> {
    let started = Instant::now();
    loop {
        let answer = told(gateway, &format!("/admin/requests{query}")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let Value::Array(found) = answer.json()["data"].take() else { panic!("{}", answer.text()) };
        if found.len() == count {
            return found;
        }
        assert!(started.elapsed() < SOON, "{query}: {} of {count}", found.len());
        // A request ends a moment after its answer; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn figures_come_every_second_with_load_and_without() {
    let (_provider, gateway) = start("[{ name: r, per: user, limit: [3/day, 1000/week] }]").await;
    let mut listener = Listener::open(&gateway, "").await;
    let idle = listener.next_of("figures").await;
    assert_eq!(idle["requests"]["total"], 0);
    assert_eq!(
        (&idle["fleet"], &idle["limits_of"], &idle["overhead_ms"]),
        (&Value::Null, &json!("instance"), &Value::Null)
    );
    assert_eq!(idle["instances"].as_array().map(Vec::len), Some(1));

    let started = Instant::now();
    let (mut requests, mut refused) = (0.0, 0.0);
    for number in 0..4 {
        for key in ["sk-alice", "sk-bob", "sk-nobody"] {
            ask(&gateway, key, "id", &question(false)).await;
        }
        let figures = listener.next_of("figures").await;
        requests += figures["requests"]["per_second"].as_f64().expect("a number");
        refused += figures["requests"]["refused_per_second"].as_f64().expect("a number");
        if number < 3 {
            continue;
        }
        let all = &figures["requests"];
        assert_eq!(
            (&all["total"], &all["refused"], &all["failed"], &all["in_flight"]),
            (&json!(12), &json!(2), &json!(0), &json!(0))
        );
        assert_eq!((&figures["tokens"]["input"], &figures["tokens"]["output"]), (&json!(30), &json!(42)));
        let model = &figures["models"][0];
        assert_eq!(
            (&model["name"], &model["healthy"], &model["upstream_ms"]["count"]),
            (&json!("chat"), &json!(1), &json!(6))
        );
        assert!(model["requests_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{model}");
        let fullest = &figures["limits"][0];
        assert_eq!(
            (&fullest["key"], &fullest["used"], &fullest["limit"]),
            (&json!("rate_limit:user:alice"), &json!(3), &json!(3))
        );
    }
    // Rates are of the second before: over all seconds they come to what there was, to within what a late second costs.
    assert!((6.0..=18.0).contains(&requests) && (1.0..=3.0).contains(&refused), "{requests} {refused}");
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(2_900)..Duration::from_secs(8)).contains(&took),
        "four seconds took {took:?}"
    );
}

#[tokio::test]
async fn requests_are_told_of_as_they_end_and_kept_for_a_while() {
    let (_provider, gateway) = start("[{ name: r, per: user, limit: 2/day }]").await;
    let mut all = Listener::open(&gateway, "?requests=true&figures=false").await;
    let mut refused = Listener::open(&gateway, "?requests&figures=false&refused=true&user=alice").await;
    for (key, id) in
        [("sk-alice", "a1"), ("sk-bob", "b1"), ("sk-alice", "a2"), ("sk-alice", "a3"), ("sk-no", "n1")]
    {
        ask(&gateway, key, id, &question(false)).await;
    }
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(all.next_of("request").await);
    }
    let ids: Vec<&str> = seen.iter().filter_map(|said| said["request_id"].as_str()).collect();
    assert_eq!(ids, ["a1", "b1", "a2", "a3", "n1"]);
    assert_eq!(refused.next_of("request").await, seen[3]);

    let first = &seen[0];
    for (field, value) in [
        ("status", json!(200)),
        ("outcome", json!("done")),
        ("user", json!("alice")),
        ("model", json!("chat")),
        ("endpoint", json!("/v1/chat/completions")),
        ("method", json!("POST")),
        ("source", json!("memory")),
        ("prompt_tokens", json!(5)),
        ("completion_tokens", json!(7)),
        ("estimated", json!(false)),
        // Five tokens at one and seven at two, per million.
        ("cost_micros", json!(19)),
        ("stream", json!(false)),
        ("first_token_ms", Value::Null),
        ("rule", Value::Null),
        ("ip", json!("127.0.0.1")),
    ] {
        assert_eq!(first[field], value, "{field}: {first}");
    }
    assert!(first["latency_ms"].as_f64() >= first["overhead_ms"].as_f64(), "{first}");
    assert_eq!((&seen[3]["rule"], &seen[3]["status"]), (&json!("r-requests-day"), &json!(429)));
    assert_eq!((&seen[4]["user"], &seen[4]["code"]), (&Value::Null, &json!("invalid_api_key")));

    // The same later, the latest first, page by page.
    let (mut later, mut cursor) = (Vec::new(), String::new());
    loop {
        let mut page = told(&gateway, &format!("/admin/requests?limit=2&cursor={cursor}")).await.json();
        later.extend(page["data"].as_array_mut().map(std::mem::take).expect("a page"));
        // What ends in between is on no later page.
        ask(&gateway, "sk-no", "later", &question(false)).await;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    later.reverse();
    assert_eq!(later, seen);
}

#[tokio::test]
async fn filters_find_and_hostile_ones_are_refused() {
    let (_provider, gateway) = start("[{ name: r, per: user, limit: 1/day }]").await;
    for (key, count) in [("sk-alice", 3), ("sk-bob", 1), ("sk-no", 2)] {
        for _ in 0..count {
            ask(&gateway, key, "id", &question(false)).await;
        }
    }
    for (query, count) in [
        ("", 6),
        ("?status=200", 2),
        ("?status=4xx", 4),
        ("?status=401", 2),
        ("?user=alice", 3),
        ("?user=alice&status=429", 2),
        ("?rule=r-requests-day", 2),
        ("?refused=true", 2),
        ("?refused=false&model=chat", 2),
        ("?model=talk&status=2xx", 2),
        ("?model=other", 0),
        ("?user=%00", 0),
        ("?limit=1&status=2xx", 1),
    ] {
        requests(&gateway, query, count).await;
    }
    let long = "x".repeat(257);
    let foreign = "Mw"; // 3
    let other_instance = "MyBvdGhlcg"; // 3 other
    for (query, field) in [
        ("status=ok", "status"),
        ("status=4xxx", "status"),
        ("status=99999999999999999999", "status"),
        ("refused=maybe", "refused"),
        (&*format!("user={long}"), "user"),
        (&*format!("model={long}"), "model"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("cursor=%FF%FE", "cursor"),
        ("cursor=====", "cursor"),
        (&*format!("cursor={foreign}"), "cursor"),
        (&*format!("cursor={other_instance}"), "cursor"),
        ("cursor=MTg0NDY3NDQwNzM3MDk1NTE2MTYgeA", "cursor"),
    ] {
        let answer = told(&gateway, &format!("/admin/requests?{query}")).await;
        assert_eq!(answer.status, 422, "{query}: {}", answer.text());
        assert_eq!(answer.json()["errors"][0]["field"], field, "{query}");
    }
    for (query, field) in [
        ("status=x", "status"),
        ("requests=2", "requests"),
        ("figures=no", "figures"),
        ("figures=false", "figures"),
    ] {
        let answer = told(&gateway, &format!("/admin/events?{query}")).await;
        assert_eq!((answer.status, &answer.json()["errors"][0]["field"]), (422, &json!(field)), "{query}");
    }
}

#[tokio::test]
async fn nothing_of_what_is_asked_or_answered_is_told() {
    let canary = "canary-5f1e";
    let provider = Provider::start(move |_| {
        let delta = sse::delta("canary-5f1e answer");
        vec![Step::Send(
            [sse::head(), chunk(delta.as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")].concat(),
        )]
    })
    .await;
    let gateway = Tollgate::start(&config(&provider, "[{ name: r, per: user, limit: 2/day }]")).await;
    let mut listener = Listener::open(&gateway, "?requests=true").await;
    let body = format!(
        r#"{{"model":"chat","stream":true,"user":"{canary}","messages":[{{"role":"user","content":"{canary}"}}]}}"#
    );
    for key in ["sk-alice", "sk-alice", "sk-alice", "sk-canary-5f1e"] {
        ask(&gateway, key, "id", &body).await;
    }
    ask(&gateway, "sk-alice", "id", &body.replace("\"chat\"", "\"canary-5f1e\"")).await;
    let path = format!("/v1/{canary}?key={canary}");
    post(gateway.data, &request("GET", &path, &[("Authorization", "Bearer sk-alice")], b"")).await;
    let mut said = String::new();
    for _ in 0..6 {
        said += &listener.next_of("request").await.to_string();
    }
    said += &listener.next_of("figures").await.to_string();
    said += &told(&gateway, "/admin/requests").await.text();
    said += &told(&gateway, "/admin/limits").await.text();
    for secret in [canary, "sk-alice", "sk-upstream"] {
        assert!(!said.contains(secret), "{secret}: {said}");
    }
    // It was looked at where streams are, too.
    assert!(said.contains(r#""stream":true"#) && said.contains(r#""first_token_ms":"#), "{said}");
}

#[tokio::test]
async fn who_is_let_in_no_more_listens_no_more() {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let keys = |olga: &str| {
        format!(
            "  admin_key: root-key-1\n  admin_keys:\n    - {{ name: olga, key: {olga}, role: operator }}\n"
        )
    };
    let config = config(&provider, "[]");
    let gateway = Tollgate::start_with(&keys("key-of-olga-1"), &config, &[]).await;
    let mut olga = Listener::with_key(&gateway, "?requests=true&figures=false", "key-of-olga-1").await;
    let mut root = Listener::with_key(&gateway, "", "root-key-1").await;
    // The same name with another key is not the same key.
    gateway.configure(&keys("key-of-olga-2"), &config);
    gateway.reload().await;
    assert_eq!(olga.next().await, Some(("end".to_owned(), json!({ "reason": "unauthorized" }))));
    assert_eq!(olga.next().await, None);
    for _ in 0..2 {
        root.next_of("figures").await;
    }
}
