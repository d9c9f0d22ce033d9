//! What a request costs in the end: what its provider says it used, or, where it does not, what was counted.

mod support;

use serde_json::{Value, json};
use support::{Ask, Conn, Gate, Provider, Response, Step, Store, Tollgate, obedient, sse, start_counting};

const CHAT: &str = Ask::CHAT;

/// Requests, tokens, input tokens, output tokens, micro-units of money.
type Cost = [u64; 5];

const ALL_UNITS: &str = "limits: [{ name: r, per: global, limit: [1k/day, 1G tokens/day, 1G input tokens/day, \
                         1G output tokens/day, $1000/day] }]";
const UNITS: [&str; 5] = ["requests", "tokens", "input_tokens", "output_tokens", "cost"];

const MODELS: &str = "models:
  - { name: chat, providers: [*upstream] }
  - name: weighed
    token_weights: { cached_input: 0.1, reasoning: 0.5 }
    providers: [{ <<: *upstream, price: { input: 1, cached_input: 0.5, output: 2 } }]
  - { name: hasty, providers: [{ <<: *upstream, timeout: 100ms }] }
  - name: falling
    fallback: [hasty, chat]
    providers: [{ <<: *upstream, url: 'http://127.0.0.1:1', price: { input: 9, output: 9 } }]
  - { name: simulated, providers: [{ type: simulated, completion_tokens: 1_000, tokens_per_second: 20 }] }
";

async fn start(provider: &Provider) -> Tollgate {
    start_counting(&Store::Memory, provider, &format!("{MODELS}{ALL_UNITS}")).await
}

async fn levels(gateway: &Tollgate) -> Cost {
    let said = Ask::PLAIN.limits(gateway).await.json();
    UNITS.map(|unit| {
        let of_unit = |entry: &&Value| entry["unit"] == unit;
        let entry = said["data"].as_array().and_then(|data| data.iter().find(of_unit));
        entry.unwrap_or_else(|| panic!("{unit}: {said}"))["used"].as_u64().expect("a number")
    })
}

/// What has been added since, once the request with this answer has ended.
async fn cost(gateway: &Tollgate, before: Cost, answer: &Response) -> Cost {
    // The line is written when the request is settled.
    gateway.request_logged(answer.header("x-request-id").expect("an id")).await;
    let after = levels(gateway).await;
    std::array::from_fn(|unit| after[unit] - before[unit])
}

#[tokio::test]
async fn what_was_used_in_every_unit() {
    let provider = obedient().await;
    let gateway = start(&provider).await;
    let (text, embeddings, images) = ("/v1/completions", "/v1/embeddings", "/v1/images/generations");
    let plain = json!({ "prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150 });
    let special = json!({ "prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
        "prompt_tokens_details": { "cached_tokens": 80 }, "completion_tokens_details": { "reasoning_tokens": 40 } });
    let responses = json!({ "input_tokens": 100, "output_tokens": 50, "total_tokens": 150,
        "input_tokens_details": { "cached_tokens": 80 }, "output_tokens_details": { "reasoning_tokens": 40 } });
    let more = json!({ "prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 200 });
    let image = json!({ "input_tokens": 50, "output_tokens": 1_000, "total_tokens": 1_050 });
    let nothing = Value::Null;
    // Without usage the prompt is a third of its bytes, and so is what was written.
    let hello = r#""messages":[{"role":"user","content":"Hello there"}]"#;
    for (path, model, usage, more, expected) in [
        (CHAT, "chat", &plain, "", [1, 150, 100, 50, 200]),
        (CHAT, "chat", &plain, r#""stream":true"#, [1, 150, 100, 50, 200]),
        (text, "chat", &plain, "", [1, 150, 100, 50, 200]),
        (text, "chat", &plain, r#""stream":true"#, [1, 150, 100, 50, 200]),
        // Cached and reasoning tokens are among the others.
        (CHAT, "chat", &special, "", [1, 150, 100, 50, 200]),
        (CHAT, "chat", &special, r#""stream":true"#, [1, 150, 100, 50, 200]),
        (CHAT, "weighed", &plain, "", [1, 150, 100, 50, 200]),
        (CHAT, "weighed", &special, "", [1, 58, 28, 30, 160]),
        (CHAT, "weighed", &responses, "", [1, 58, 28, 30, 160]),
        (CHAT, "weighed", &special, r#""stream":true"#, [1, 58, 28, 30, 160]),
        // Whatever else a provider counts, it says in the total.
        (CHAT, "chat", &more, "", [1, 200, 100, 50, 200]),
        (embeddings, "chat", &json!({ "prompt_tokens": 9, "total_tokens": 9 }), "", [1, 9, 9, 0, 9]),
        (embeddings, "chat", &json!({ "total_tokens": 30 }), "", [1, 30, 30, 0, 30]),
        ("/v1/rerank", "chat", &json!({ "total_tokens": 30 }), "", [1, 30, 30, 0, 30]),
        (images, "chat", &image, "", [1, 1_050, 50, 1_000, 2_050]),
        (images, "chat", &nothing, r#""prompt":"a gate""#, [1, 0, 0, 0, 0]),
        ("/v1/audio/speech", "chat", &nothing, r#""input":"May I pass?""#, [1, 0, 0, 0, 0]),
        ("/v1/moderations", "chat", &nothing, r#""input":"Hello there","x_text":"""#, [1, 4, 4, 0, 4]),
        (CHAT, "chat", &nothing, &format!(r#"{hello},"x_text":"seven b""#), [1, 7, 4, 3, 10]),
        (CHAT, "chat", &nothing, &format!(r#"{hello},"stream":true,"x_text":"se ve n""#), [1, 7, 4, 3, 10]),
        // A count that cannot be is none.
        (CHAT, "chat", &json!({ "prompt_tokens": 1e18, "completion_tokens": 1 }), hello, [1, 7, 4, 3, 10]),
        (CHAT, "chat", &json!({ "prompt_tokens": -5, "completion_tokens": 1 }), hello, [1, 7, 4, 3, 10]),
        (CHAT, "chat", &json!({ "prompt_tokens": "5" }), hello, [1, 7, 4, 3, 10]),
    ] {
        let before = levels(&gateway).await;
        let comma = if more.is_empty() { "" } else { "," };
        let body = format!(r#","x_usage":{usage}{comma}{more}"#);
        let answer = Ask { path, model, body: &body, ..Ask::PLAIN }.send(&gateway).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text());
        assert_eq!(cost(&gateway, before, &answer).await, expected, "{path} {model} {body}");
    }
}

#[tokio::test]
async fn an_error_costs_a_request_where_a_provider_said_it_and_nothing_where_none_answered() {
    let provider = obedient().await;
    let gateway = start(&provider).await;
    let messages = r#""messages":[{"role":"user","content":"Hello there"}]"#;
    for (model, more, status, expected) in [
        ("chat", r#""x_status":400"#, 400, [1, 0, 0, 0, 0]),
        ("chat", r#""x_status":404"#, 404, [1, 0, 0, 0, 0]),
        ("chat", r#""x_status":422,"stream":true"#, 422, [1, 0, 0, 0, 0]),
        ("chat", r#""x_status":413,"x_type":"text/html""#, 413, [1, 0, 0, 0, 0]),
        ("chat", r#""x_status":400,"x_type":"text/event-stream","stream":true"#, 400, [1, 0, 0, 0, 0]),
        // Of these another provider might have known better, and there is none.
        ("chat", r#""x_status":500"#, 502, [0; 5]),
        ("chat", r#""x_status":503,"stream":true"#, 502, [0; 5]),
        ("chat", r#""x_status":401"#, 502, [0; 5]),
        ("chat", r#""x_status":302"#, 502, [0; 5]),
        ("chat", r#""x_status":429"#, 429, [0; 5]),
        ("hasty", r#""x_status":0"#, 504, [0; 5]),
        ("hasty", r#""x_status":0,"stream":true"#, 504, [0; 5]),
    ] {
        let before = levels(&gateway).await;
        let body = format!(",{messages},{more}");
        let answer = Ask { model, body: &body, ..Ask::PLAIN }.send(&gateway).await;
        assert_eq!(answer.status, status, "{more}: {}", answer.text());
        assert_eq!(cost(&gateway, before, &answer).await, expected, "{model} {more}");
    }
}

#[tokio::test]
async fn who_answers_is_paid_once_whoever_was_asked_before() {
    let provider = obedient().await;
    let gateway = start(&provider).await;
    let body = r#","messages":[],"x_usage":{"prompt_tokens":100,"completion_tokens":50}"#;
    let answer = Ask { model: "falling", body, ..Ask::PLAIN }.send(&gateway).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(cost(&gateway, [0; 5], &answer).await, [1, 150, 100, 50, 200]);
}

#[tokio::test]
async fn an_answer_nobody_waited_for_costs_its_prompt() {
    let gate = Gate::new();
    let waiting = gate.clone();
    let provider = Provider::start(move |_| vec![Step::Wait(waiting.clone()), Step::Close]).await;
    let gateway = start(&provider).await;
    for (number, body) in [
        r#","messages":[{"role":"user","content":"Hello there"}],"max_tokens":50"#,
        r#","messages":[{"role":"user","content":"Hello there"}],"max_tokens":50,"stream":true"#,
    ]
    .into_iter()
    .enumerate()
    {
        let before = levels(&gateway).await;
        let lines = gateway.lines().len();
        let conn = Conn::ask(gateway.data, &Ask { body, ..Ask::PLAIN }.bytes()).await;
        provider.request(number).await;
        conn.leave();
        gateway.logged_after(lines, |line| line["outcome"] == "client_left").await;
        let after = levels(&gateway).await;
        let added: Cost = std::array::from_fn(|unit| after[unit] - before[unit]);
        assert_eq!(added, [1, 4, 4, 0, 4], "{body}");
    }
}

#[tokio::test]
async fn a_stream_that_was_cut_costs_what_came_and_its_prompt() {
    let gate = Gate::new();
    let waiting = gate.clone();
    let provider = Provider::start(move |seen| {
        let head = [
            sse::head(),
            support::chunk(sse::delta("one two").as_bytes()),
            support::chunk(sse::delta(" six").as_bytes()),
        ];
        let dies = seen.text().contains("x_dies");
        vec![Step::Send(head.concat()), if dies { Step::Close } else { Step::Wait(waiting.clone()) }]
    })
    .await;
    let gateway = start(&provider).await;
    let body = r#","stream":true,"max_tokens":500,"messages":[{"role":"user","content":"Hello there"}]"#;
    let streaming = Ask { body, ..Ask::PLAIN };
    // 11 bytes asked, 11 bytes written.
    let expected = [1, 8, 4, 4, 12];

    let mut conn = Conn::ask(gateway.data, &streaming.bytes()).await;
    let answer = conn.head().await;
    conn.until(" six").await;
    // While it runs, what it may write is kept free.
    assert_eq!(levels(&gateway).await, [1, 504, 4, 500, 1_004]);
    conn.leave();
    assert_eq!(cost(&gateway, [0; 5], &answer).await, expected, "the caller left");

    let before = levels(&gateway).await;
    let body = format!(r#"{body},"x_dies":true"#);
    let answer = Ask { body: &body, ..Ask::PLAIN }.send(&gateway).await;
    assert!(answer.text().contains("upstream_failed"), "{}", answer.text());
    assert_eq!(cost(&gateway, before, &answer).await, expected, "the provider died");
}

#[tokio::test]
async fn a_simulated_stream_that_was_cut_costs_a_token_for_each_delta() {
    let provider = obedient().await;
    let gateway = start(&provider).await;
    let body = r#","stream":true,"messages":[{"role":"user","content":"Hello there"}]"#;
    let mut conn = Conn::ask(gateway.data, &Ask { model: "simulated", body, ..Ask::PLAIN }.bytes()).await;
    let answer = conn.head().await;
    let read = conn.until("those").await;
    conn.leave();
    let [requests, tokens, input, output, money] = cost(&gateway, [0; 5], &answer).await;
    let read = String::from_utf8(read).expect("UTF-8").matches("\"content\":").count() as u64;
    // One more may have been on its way.
    assert!((read..=read + 1).contains(&output), "{output} tokens, of which {read} were read");
    assert_eq!([requests, tokens, input, money], [1, 4 + output, 4, 0]);
    let logged = gateway.request_logged(answer.header("x-request-id").expect("an id")).await;
    assert_eq!((&logged["completion_tokens"], &logged["estimated"]), (&output.into(), &true.into()));
}
