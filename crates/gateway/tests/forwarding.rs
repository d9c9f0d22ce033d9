//! What crosses the gateway: headers on the lists and no others, bodies byte for byte but for the model's name.

mod support;

use support::{
    Conn, Gate, Provider, Seen, Step, Tollgate, chat, chat_config, chunk, json_answer, openai, post,
    question, request, soon, sse,
};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
const PATH: &str = "/v1/chat/completions";
const KEY: (&str, &str) = ("Authorization", "Bearer sk-alice");

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "", ANSWER)).await
}

async fn last(provider: &Provider) -> Seen {
    provider.requests().pop().expect("a request")
}

#[tokio::test]
async fn only_listed_headers_reach_the_provider() {
    let provider = provider().await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let headers = [
        KEY,
        ("X-API-Key", "sk-alice"),
        ("Cookie", "session=1"),
        ("X-Forwarded-For", "203.0.113.9"),
        ("Forwarded", "for=203.0.113.9"),
        ("X-Real-IP", "203.0.113.9"),
        ("Proxy-Authorization", "Basic eA=="),
        ("OpenAI-Organization", "org-theirs"),
        ("OpenAI-Project", "proj-theirs"),
        ("OpenAI-Beta", "assistants=v2"),
        ("Idempotency-Key", "once"),
        ("Accept", "text/event-stream"),
        ("Accept-Encoding", "gzip, br"),
        ("User-Agent", "secret-agent/1"),
        ("Referer", "http://intranet/"),
        ("X-Stainless-Lang", "python"),
        ("X-Whatever", "x"),
        ("Connection", "keep-alive, X-Whatever"),
        ("TE", "trailers"),
        ("X-Request-Id", "my-id"),
        ("traceparent", &parent),
        ("tracestate", "vendor=1"),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    let answer = post(gateway.data, &request("POST", PATH, &headers, question(false).as_bytes())).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("my-id")));
    let seen = last(&provider).await;
    assert!(seen.head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{}", seen.head);
    let expected = [
        "accept",
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "openai-beta",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-request-id",
    ];
    assert_eq!(seen.header_names(), expected);
    for (name, value) in [
        ("authorization", "Bearer sk-upstream"),
        ("accept", "text/event-stream"),
        ("accept-encoding", "identity"),
        ("content-type", "application/json"),
        ("idempotency-key", "once"),
        ("openai-beta", "assistants=v2"),
        ("x-request-id", "my-id"),
        ("tracestate", "vendor=1"),
        ("host", &provider.address.to_string()),
    ] {
        assert_eq!(seen.header(name), Some(value));
    }
    let sent = seen.header("traceparent").expect("a trace");
    assert!(sent.starts_with(&format!("00-{trace}-")) && sent.ends_with("-01"), "{sent}");
    assert!(!sent.contains("00f067aa0ba902b7"), "a parent of its own: {sent}");
    let line = &gateway.requests_logged(1).await[0];
    assert_eq!((&line["trace_id"], &line["request_id"]), (&trace.into(), &"my-id".into()));
}

#[tokio::test]
async fn the_callers_key_is_never_the_providers() {
    let provider = provider().await;
    let keyless = format!("type: openai, url: 'http://{}'", provider.address);
    let gateway = Tollgate::start(&chat_config(&[keyless])).await;
    assert_eq!(post(gateway.data, &chat(&question(false))).await.status, 200);
    let seen = last(&provider).await;
    assert_eq!(seen.header("authorization"), None);
    assert!(!seen.head.contains("sk-alice"), "{}", seen.head);
}

#[tokio::test]
async fn only_listed_headers_come_back() {
    let theirs = "cache-control: no-store\r\ncontent-disposition: inline\r\nopenai-processing-ms: 12\r\n\
                  openai-organization: org-ours\r\nanthropic-version: 1\r\nanthropic-ratelimit-requests-limit: 5\r\n\
                  x-ratelimit-limit-requests: 999\r\nx-ratelimit-remaining-tokens: 1\r\nretry-after: 5\r\n\
                  x-request-id: theirs\r\nset-cookie: a=b\r\nserver: nginx\r\nvia: 1.1 x\r\nx-tollgate-provider: liar\r\n\
                  location: http://elsewhere/\r\nserver-timing: x;dur=1\r\naccess-control-allow-origin: *\r\n";
    let provider = Provider::answering(json_answer("200 OK", theirs, ANSWER)).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let answer = post(gateway.data, &chat(&question(false))).await;
    let mut names: Vec<&str> = answer.headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "anthropic-version",
        "cache-control",
        "content-disposition",
        "content-length",
        "content-type",
        "date",
        "openai-organization",
        "openai-processing-ms",
        "server-timing",
        "x-request-id",
        "x-tollgate-provider",
        "x-upstream-request-id",
    ];
    assert_eq!(names, expected);
    assert_eq!(answer.header("x-upstream-request-id"), Some("theirs"));
    assert_ne!(answer.header("x-request-id"), Some("theirs"));
    assert_eq!(answer.header("x-tollgate-provider"), Some(&*provider.address.to_string()));
    let timing = answer.header("server-timing").expect("our times");
    assert!(timing.starts_with("limit;dur=") && timing.contains(", upstream;dur="), "{timing}");
}

#[tokio::test]
async fn the_models_name_is_replaced_and_nothing_else() {
    let provider = provider().await;
    let gateway =
        Tollgate::start(&chat_config(&[format!("{}, model_name: 'their/\"model\"'", openai(&provider))]))
            .await;
    let theirs = r#""their/\"model\"""#;
    for (sent, expected) in [
        (r#"{"model":"chat"}"#, r#"{"model":@}"#),
        ("\r\n\t{ \"model\" :\n \"chat\" , \"x\" : 1 } \n", "\r\n\t{ \"model\" :\n @ , \"x\" : 1 } \n"),
        (
            r#"{"x":{"model":"chat"},"model":"chat","y":["model"]}"#,
            r#"{"x":{"model":"chat"},"model":@,"y":["model"]}"#,
        ),
        (r#"{"mod\u0065l":"ch\u0061t","z":"\ud83d\uddfc"}"#, r#"{"mod\u0065l":@,"z":"\ud83d\uddfc"}"#),
        (
            r#"{"a":1e400,"b":-0.0,"c":12345678901234567890123,"model":"gpt-4o-mini"}"#,
            r#"{"a":1e400,"b":-0.0,"c":12345678901234567890123,"model":@}"#,
        ),
        (r#"{"dup":1,"dup":2,"model":"chat","名":"前"}"#, r#"{"dup":1,"dup":2,"model":@,"名":"前"}"#),
    ] {
        let answer = post(gateway.data, &chat(sent)).await;
        assert_eq!(answer.status, 200, "{sent}: {}", answer.text());
        assert_eq!(last(&provider).await.text(), expected.replace('@', theirs));
    }
}

/// A form whose `model` part is where `order` says, with bytes in the file that look like a delimiter and like JSON.
fn form(order: &str, model: &str) -> Vec<u8> {
    let mut body = b"a preamble nobody reads\r\n".to_vec();
    for part in order.chars() {
        let (head, value): (&str, &[u8]) = match part {
            'm' => ("name=\"model\"", model.as_bytes()),
            'f' => (
                "name=\"file\"; filename=\"model.wav\"\r\nContent-Type: audio/wav",
                b"\x00\xff\r\n--frontie\r\n\"model\"\r\nfrontier\n\x80chat",
            ),
            _ => ("name=\"prompt\"", "model=chat 東京".as_bytes()),
        };
        body.extend_from_slice(
            format!("--frontier\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(value);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--frontier--\r\n");
    body
}

#[tokio::test]
async fn the_model_part_of_a_form_is_found_wherever_it_stands() {
    let text = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello";
    let provider = Provider::answering(text.into()).await;
    let gateway =
        Tollgate::start(&chat_config(&[format!("{}, model_name: whisper-large", openai(&provider))])).await;
    let kind = ("Content-Type", "multipart/form-data; boundary=frontier");
    let send = async |body: &[u8]| {
        post(gateway.data, &request("POST", "/v1/audio/transcriptions", &[KEY, kind], body)).await
    };
    for order in ["mfp", "fmp", "fpm", "m", "pm"] {
        let answer = send(&form(order, "chat")).await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"hello"[..]), "{order}: {answer:?}");
        assert_eq!(answer.header("content-type"), Some("text/plain"));
        let seen = last(&provider).await;
        assert_eq!(seen.body, form(order, "whisper-large"), "{order}");
        assert_eq!(seen.header("content-type"), Some(kind.1));
        assert!(seen.head.starts_with("POST /v1/audio/transcriptions "));
    }
    let asked = provider.hits();
    let cut = &form("fm", "chat")[..90];
    for (what, body) in [("two", form("mfm", "chat")), ("none", form("fp", "")), ("cut", cut.to_vec())] {
        let answer = send(&body).await;
        assert_eq!((answer.status, answer.code()), (400, serde_json::Value::Null), "{what}");
    }
    assert_eq!(send(&form("mf", "nothing")).await.status, 404);
    assert_eq!(provider.hits(), asked);
}

#[tokio::test]
async fn answers_of_any_kind_and_size_pass_untouched() {
    let audio: Vec<u8> =
        (0..3_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let head =
        |kind: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n");
    let large =
        format!(r#"{{"data":"{}","usage":{{"prompt_tokens":9,"total_tokens":9}}}}"#, "x".repeat(3_000_000));
    for (path, kind, body) in [
        ("/v1/audio/speech", "audio/mpeg", audio),
        ("/v1/embeddings", "application/json", large.into_bytes()),
    ] {
        let mut wire = head(kind).into_bytes();
        body.chunks(70_001).for_each(|piece| wire.extend(chunk(piece)));
        wire.extend(chunk(b""));
        let provider = Provider::answering(wire).await;
        let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let answer =
            post(gateway.data, &request("POST", path, &[KEY], br#"{"model":"chat","input":"a"}"#)).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, Some(kind)));
        assert!(answer.body == body, "{path}: {} of {} bytes", answer.body.len(), body.len());
        let line = &gateway.requests_logged(1).await[0];
        assert_eq!(line["outcome"], "done");
        if kind == "application/json" {
            assert_eq!(line["prompt_tokens"], 9, "{line}");
        }
    }
}

#[tokio::test]
async fn half_an_answer_is_never_taken_for_a_whole_one() {
    let gate = Gate::new();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n";
    let provider = Provider::always(vec![
        Step::Send([head.as_bytes(), &chunk(b"half of it")].concat()),
        Step::Wait(gate.clone()),
        Step::Close,
    ])
    .await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let mut conn = Conn::ask(
        gateway.data,
        &request("POST", "/v1/audio/speech", &[KEY], br#"{"model":"chat","input":"a"}"#),
    )
    .await;
    assert_eq!(conn.head().await.status, 200);
    assert_eq!(conn.until("half of it").await, b"half of it");
    gate.open();
    assert!(soon("the end", conn.rest()).await.is_err(), "the body must not end as if it were whole");
    assert_eq!(gateway.requests_logged(1).await[0]["outcome"], "upstream_died");
}

#[tokio::test]
async fn callers_may_pipeline_and_wait_for_100() {
    let provider = Provider::start(|seen| {
        let stream = sse::whole(&[&sse::delta("hi"), sse::DONE]);
        vec![Step::Send(if seen.json()["stream"] == true {
            stream
        } else {
            json_answer("200 OK", "", ANSWER)
        })]
    })
    .await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let several = [chat(&question(true)), chat(&question(false)), chat("{}"), chat(&question(true))].concat();
    let mut conn = Conn::ask(gateway.data, &several).await;
    let stream = [sse::delta("hi").as_str(), sse::DONE].concat();
    for (status, body) in [(200, stream.as_str()), (200, ANSWER), (400, ""), (200, &stream)] {
        let answer = conn.response().await;
        assert_eq!(answer.status, status);
        assert!(status == 400 || answer.text() == body, "{}", answer.text());
    }
    let body = question(false);
    let whole = request("POST", PATH, &[KEY, ("Expect", "100-continue")], body.as_bytes());
    let (head, body) = whole.split_at(whole.len() - body.len());
    let mut conn = Conn::ask(gateway.data, head).await;
    assert_eq!(conn.head().await.status, 100);
    conn.send(body).await;
    assert_eq!(conn.response().await.status, 200);
}
