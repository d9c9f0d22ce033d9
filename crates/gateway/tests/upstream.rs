//! Providers: who is asked next and when, how long they may take, and what happens when the caller leaves.

mod support;

use std::time::{Duration, Instant};

use support::{
    Conn, Provider, Step, Tollgate, blackhole, chat, chat_config, chunk, json_answer, openai, post, question,
    refusing, soon, sse,
};

const ANSWER: &str = r#"{"id":"a","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;

fn ok() -> Vec<u8> {
    json_answer("200 OK", "", ANSWER)
}

fn stream_ok() -> Vec<u8> {
    sse::whole(&[&sse::delta("hi"), &sse::usage(1, 2), sse::DONE])
}

async fn good(stream: bool) -> Provider {
    Provider::answering(if stream { stream_ok() } else { ok() }).await
}

#[tokio::test]
async fn the_next_provider_answers_for_one_that_does_not() {
    let status = |line: &str| vec![Step::Send(json_answer(line, "", r#"{"error":{}}"#))];
    let broken =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"id\":".to_vec();
    let cut_chunk =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nff\r\n{"
            .to_vec();
    let gzip = json_answer("200 OK", "content-encoding: gzip\r\n", "\u{1f}");
    let redirect = json_answer("307 Temporary Redirect", "location: http://127.0.0.1:1/\r\n", "{}");
    let error = "data: {\"error\":{\"message\":\"overloaded\"}}\n\n";
    let cases: Vec<(&str, bool, Vec<Step>)> = vec![
        ("500", false, status("500 Internal Server Error")),
        ("503", true, status("503 Service Unavailable")),
        ("401", false, status("401 Unauthorized")),
        ("403", false, status("403 Forbidden")),
        ("407", false, status("407 Proxy Authentication Required")),
        ("408", false, status("408 Request Timeout")),
        ("429", false, status("429 Too Many Requests")),
        ("redirect", false, vec![Step::Send(redirect)]),
        ("closed before the head", false, vec![Step::Close]),
        ("reset before the head", true, vec![Step::Reset]),
        ("no HTTP", false, vec![Step::Send(b"220 smtp.example.org\r\n\r\n".to_vec()), Step::Hang]),
        ("dies inside JSON", false, vec![Step::Send(broken.clone()), Step::Close]),
        ("dies inside a chunk", false, vec![Step::Send(cut_chunk), Step::Reset]),
        ("compressed", false, vec![Step::Send(gzip)]),
        (
            "dies before the first event",
            true,
            vec![Step::Send([sse::head(), chunk(b": ping\n\n")].concat()), Step::Close],
        ),
        ("empty stream", true, vec![Step::Send([sse::head(), chunk(b"")].concat())]),
        ("error event first", true, vec![Step::Send(sse::whole(&[error]))]),
    ];
    for (how, stream, script) in cases {
        let (bad, next) = (Provider::always(script).await, good(stream).await);
        let gateway = Tollgate::start(&chat_config(&[openai(&bad), openai(&next)])).await;
        let answer = post(gateway.data, &chat(&question(stream))).await;
        assert_eq!(answer.status, 200, "{how}: {}", answer.text());
        assert!(answer.text().contains("hi"), "{how}");
        let name = next.address.to_string();
        assert_eq!(answer.header("x-tollgate-provider"), Some(&*name), "{how}");
        assert_eq!((bad.hits(), next.hits()), (1, 1), "{how}");
        let line = &gateway.requests_logged(1).await[0];
        assert_eq!(
            (&line["attempts"], &line["provider"], &line["outcome"]),
            (&2.into(), &name.into(), &"done".into()),
            "{how}"
        );
    }
}

#[tokio::test]
async fn an_answer_about_the_request_is_final() {
    for status in ["400 Bad Request", "404 Not Found", "409 Conflict", "422 Unprocessable Content"] {
        let body = r#"{"error":{"message":"no","type":"t","param":null,"code":"theirs"}}"#;
        let (first, next) = (Provider::answering(json_answer(status, "", body)).await, good(false).await);
        let gateway = Tollgate::start(&chat_config(&[openai(&first), openai(&next)])).await;
        let answer = post(gateway.data, &chat(&question(false))).await;
        assert_eq!(answer.status.to_string(), status[..3]);
        assert_eq!(answer.text(), body);
        assert_eq!((first.hits(), next.hits()), (1, 0), "{status}");
    }
}

#[tokio::test]
async fn the_next_model_answers_when_no_provider_of_the_first_does() {
    let (_socket, nobody) = refusing();
    let failing = Provider::answering(json_answer("500 Internal Server Error", "", "{}")).await;
    let last = good(false).await;
    let config = format!(
        "users: [{{ name: alice, keys: [sk-alice] }}]\nmodels:\n  - name: chat\n    fallback: [local, never]\n    providers:\n      \
         - {{ type: openai, url: 'http://{nobody}' }}\n      - {{ {}, model_name: their-name }}\n  - name: local\n    providers: \
         [{{ {} }}]\n  - name: never\n    providers: [{{ type: openai, url: 'http://{nobody}' }}]\n",
        openai(&failing),
        openai(&last),
    );
    let gateway = Tollgate::start(&config).await;
    let answer = post(gateway.data, &chat(&question(false))).await;
    assert_eq!((answer.status, answer.text()), (200, ANSWER.to_owned()));
    assert_eq!(failing.request(0).await.json()["model"], "their-name");
    assert_eq!((failing.hits(), last.hits()), (1, 1));
    let line = &gateway.requests_logged(1).await[0];
    assert_eq!(
        (&line["model"], &line["fallback_model"], &line["attempts"]),
        (&"chat".into(), &"local".into(), &3.into())
    );
}

#[tokio::test]
async fn when_nobody_answers_the_error_names_what_was_tried() {
    let (_socket, nobody) = refusing();
    let failing = Provider::answering(json_answer("500 Internal Server Error", "", "{}")).await;
    let refused = format!("type: openai, url: 'http://{nobody}'");
    let gateway = Tollgate::start(&chat_config(&[refused, openai(&failing)])).await;
    let answer = post(gateway.data, &chat(&question(true))).await;
    assert_eq!(
        (answer.status, answer.code()),
        (502, "upstream_failed".into()),
        "an error before the stream is plain JSON"
    );
    assert_eq!(answer.json()["error"]["type"], "upstream_error");
    let message = answer.message();
    for part in [&nobody.to_string(), &failing.address.to_string(), "chat at", "status 500", "refused"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!message.contains("sk-"), "{message}");
}

#[tokio::test]
async fn deadlines_before_the_first_byte_are_504_and_name_what_was_tried() {
    let comments = [sse::head(), chunk(b": ping\n\n")].concat();
    let begun =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"id\":".to_vec();
    for (how, stream, setting, script) in [
        ("no head", true, "first_token_timeout: 300ms", vec![Step::Hang]),
        ("no event", true, "first_token_timeout: 300ms", vec![Step::Send(sse::head()), Step::Hang]),
        ("only comments", true, "first_token_timeout: 300ms", vec![Step::Send(comments), Step::Hang]),
        ("no head of a stream", true, "timeout: 300ms", vec![Step::Hang]),
        ("no answer", false, "timeout: 300ms", vec![Step::Hang]),
        ("stalls inside JSON", false, "idle_timeout: 300ms", vec![Step::Send(begun.clone()), Step::Hang]),
        ("late inside JSON", false, "timeout: 300ms", vec![Step::Send(begun), Step::Hang]),
    ] {
        let slow = Provider::always(script).await;
        let gateway = Tollgate::start(&chat_config(&[format!("{}, {setting}", openai(&slow))])).await;
        given_up_after_300_ms(&gateway, stream, &slow.address.to_string(), how).await;
        slow.request(0).await.closed().await;
    }
}

#[tokio::test]
async fn no_connection_in_time_is_504_too() {
    let (_listener, _waiting, nowhere) = blackhole().await;
    let line = format!("type: openai, url: 'http://{nowhere}', connect_timeout: 300ms");
    let gateway = Tollgate::start(&chat_config(&[line])).await;
    given_up_after_300_ms(&gateway, true, &nowhere.to_string(), "no connection").await;
}

async fn given_up_after_300_ms(gateway: &Tollgate, stream: bool, name: &str, how: &str) {
    let asked = Instant::now();
    let answer = post(gateway.data, &chat(&question(stream))).await;
    let took = asked.elapsed();
    assert_eq!((answer.status, answer.code()), (504, "upstream_timeout".into()), "{how}: {}", answer.text());
    let message = answer.message();
    assert!(message.contains(name) && message.contains("300ms"), "{how}: {message}");
    assert!(took >= Duration::from_millis(290) && took < Duration::from_secs(5), "{how}: {took:?}");
}

#[tokio::test]
async fn a_slow_provider_is_given_up_for_the_next() {
    let (_listener, _waiting, nowhere) = blackhole().await;
    let silent = Provider::always(vec![Step::Hang]).await;
    let next = good(true).await;
    let lines = [
        format!("type: openai, url: 'http://{nowhere}', connect_timeout: 200ms"),
        format!("{}, first_token_timeout: 200ms", openai(&silent)),
        openai(&next),
    ];
    let gateway = Tollgate::start(&chat_config(&lines)).await;
    let answer = post(gateway.data, &chat(&question(true))).await;
    assert_eq!(answer.status, 200);
    assert_eq!((silent.hits(), next.hits()), (1, 1));
    let metrics = gateway.metrics().await;
    let timeout = format!(r#"provider="{}",code="timeout""#, silent.address);
    assert_eq!(metrics.sum("upstream_requests_total", &timeout), 1.0);
    assert_eq!(metrics.sum("upstream_requests_total", r#"code="200""#), 1.0);
}

#[tokio::test]
async fn a_stream_that_stalls_or_lasts_too_long_ends_with_an_error_event() {
    let first = sse::delta("one");
    let begun = Step::Send([sse::head(), chunk(first.as_bytes())].concat());
    let drip =
        (0..1_000).flat_map(|_| [Step::Pause(Duration::from_millis(20)), Step::Send(chunk(b": \n\n"))]);
    for (how, setting, script) in [
        ("stalls", "idle_timeout: 300ms", vec![begun.clone(), Step::Hang]),
        ("never ends", "timeout: 400ms", std::iter::once(begun).chain(drip).collect()),
    ] {
        let (slow, next) = (Provider::always(script).await, good(true).await);
        let gateway =
            Tollgate::start(&chat_config(&[format!("{}, {setting}", openai(&slow)), openai(&next)])).await;
        let answer = post(gateway.data, &chat(&question(true))).await;
        let body = answer.text();
        assert!(body.starts_with(&first) && !body.contains("[DONE]"), "{how}: {body}");
        let last = body.trim_end().rsplit("\n\n").next().and_then(|event| event.strip_prefix("data: "));
        let error: serde_json::Value = serde_json::from_str(last.expect("an event")).expect("JSON");
        assert_eq!(error["error"]["code"], "upstream_timeout", "{how}");
        slow.request(0).await.closed().await;
        assert_eq!(next.hits(), 0, "{how}: nothing is retried after a byte was sent");
        assert_eq!(gateway.requests_logged(1).await[0]["outcome"], "timed_out");
        let metrics = gateway.metrics().await;
        assert_eq!(metrics.value(r#"streams_aborted_total{by="timeout"}"#), 1.0);
    }
}

#[tokio::test]
async fn a_limit_of_the_provider_is_told_to_the_caller() {
    for (headers, retry_after, milliseconds, should_retry) in [
        ("retry-after: 7\r\n", Some("7"), Some("7000"), None),
        ("retry-after-ms: 2500\r\n", Some("3"), Some("2500"), None),
        ("retry-after: 90\r\n", Some("90"), Some("90000"), Some("false")),
        ("", None, None, None),
    ] {
        let body = r#"{"error":{"message":"slow down"}}"#;
        let provider = Provider::answering(json_answer("429 Too Many Requests", headers, body)).await;
        let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let answer = post(gateway.data, &chat(&question(false))).await;
        assert_eq!((answer.status, answer.code()), (429, "upstream_rate_limit_exceeded".into()));
        assert_eq!(answer.json()["error"]["type"], "upstream_rate_limit");
        assert_eq!(answer.header("retry-after"), retry_after, "{headers}");
        assert_eq!(answer.header("retry-after-ms"), milliseconds, "{headers}");
        assert_eq!(answer.header("x-should-retry"), should_retry, "{headers}");
        assert!(answer.message().contains(&provider.address.to_string()));
    }
}

#[tokio::test]
async fn providers_that_all_fail_see_a_tenth_more_than_is_offered() {
    const OFFERED: usize = 400;
    let fail = || Provider::answering(json_answer("500 Internal Server Error", "", "{}"));
    let (a, b, c) = (fail().await, fail().await, fail().await);
    let gateway = Tollgate::start(&chat_config(&[openai(&a), openai(&b), openai(&c)])).await;
    let mut conn = Conn::open(gateway.data).await;
    for _ in 0..OFFERED {
        conn.send(&chat(&question(false))).await;
        assert_eq!(conn.response().await.status, 502);
    }
    let asked = a.hits() + b.hits() + c.hits();
    assert!((OFFERED..=OFFERED * 11 / 10).contains(&asked), "{asked} for {OFFERED}");
}

#[tokio::test]
async fn second_attempts_are_a_tenth_even_when_they_succeed() {
    const OFFERED: usize = 400;
    // Two failures, one answer: never enough failures in a row to be passed over.
    let count = std::sync::atomic::AtomicUsize::new(0);
    let shaky = Provider::start(move |_| {
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let failure = json_answer("500 Internal Server Error", "", "{}");
        vec![Step::Send(if number % 3 == 2 { ok() } else { failure })]
    })
    .await;
    let next = good(false).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&shaky), openai(&next)])).await;
    let mut conn = Conn::open(gateway.data).await;
    let mut answered = 0;
    for _ in 0..OFFERED {
        conn.send(&chat(&question(false))).await;
        answered += usize::from(conn.response().await.status == 200);
    }
    assert_eq!(shaky.hits(), OFFERED);
    assert!((10..=OFFERED / 10).contains(&next.hits()), "{} second attempts", next.hits());
    assert_eq!(answered, OFFERED / 3 + next.hits());
}

/// Provider closed ≤ 50 ms after the caller left, wherever the answer stands. The median of several runs: the machine may
/// have other things to do.
#[tokio::test]
async fn a_caller_that_leaves_takes_the_provider_along_within_50_ms() {
    const RUNS: usize = 9;
    let begun = [sse::head(), chunk(sse::delta("one").as_bytes())].concat();
    let json = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{".to_vec();
    let more = chunk(sse::delta("more").repeat(100).as_bytes());
    for (when, stream, started, script) in [
        ("before the head of JSON", false, false, vec![Step::Hang]),
        ("before the head of a stream", true, false, vec![Step::Hang]),
        ("inside JSON", false, false, vec![Step::Send(json), Step::Hang]),
        ("in a silent stream", true, true, vec![Step::Send(begun.clone()), Step::Hang]),
        ("in a flood", true, true, vec![Step::Send(begun), Step::Flood(more)]),
    ] {
        let provider = Provider::always(script).await;
        let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let mut waits = Vec::new();
        for run in 0..RUNS {
            let mut conn = Conn::ask(gateway.data, &chat(&question(stream))).await;
            let seen = provider.request(run).await;
            if started {
                conn.head().await;
                conn.until("one").await;
            }
            let left = if run % 2 == 0 {
                conn.leave()
            } else {
                conn.reset();
                Instant::now()
            };
            waits.push(seen.closed().await.saturating_duration_since(left));
        }
        waits.sort_unstable();
        println!(
            "{when}: provider closed after {:?} (median), {:?} (worst)",
            waits[RUNS / 2],
            waits[RUNS - 1]
        );
        assert!(waits[RUNS / 2] <= Duration::from_millis(50), "{when}: {waits:?}");
        provider.connections_become(|open| open == 0).await;
        for line in gateway.requests_logged(RUNS).await {
            let expected = if started { 200 } else { 499 };
            assert_eq!(
                (&line["outcome"], &line["status"]),
                (&"client_left".into(), &expected.into()),
                "{when}"
            );
        }
        let metrics = gateway.metrics().await;
        let aborted = if stream { RUNS as f64 } else { 0.0 };
        assert_eq!(metrics.value(r#"streams_aborted_total{by="client"}"#), aborted, "{when}");
        assert_eq!(metrics.sum("http_requests_in_flight", ""), 0.0, "{when}");
    }
}

#[tokio::test]
async fn a_slow_reader_holds_the_provider_back_and_not_our_memory() {
    const READERS: usize = 100;
    let begun = [sse::head(), chunk(sse::delta("one").as_bytes())].concat();
    let more = chunk(sse::delta(&"x".repeat(4_000)).as_bytes());
    let provider = Provider::always(vec![Step::Send(begun), Step::Flood(more)]).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let before = gateway.resident_bytes();
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
        conn.head().await;
        conn.until("one").await;
        readers.push(conn);
    }
    // Held back: nobody takes any more of the floods. It must come to that; how soon is no matter.
    soon("the providers stand still", async {
        let mut taken = u64::MAX;
        while provider.flooded() != taken {
            taken = provider.flooded();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await;
    let grown = gateway.resident_bytes().saturating_sub(before) / READERS as u64;
    println!("{READERS} callers that do not read: {} KiB each", grown / 1024);
    assert!(grown < 192 * 1024, "{grown} bytes for each stream");
}

/// What a provider sent while its caller did not read has come in time.
#[tokio::test]
async fn a_caller_that_pauses_is_not_the_provider_s_fault() {
    let begun = [sse::head(), chunk(sse::delta("one").as_bytes())].concat();
    let more = chunk(sse::delta(&"x".repeat(200)).as_bytes());
    let provider = Provider::always(vec![Step::Send(begun), Step::Flood(more)]).await;
    let impatient = format!("{}, idle_timeout: 1s", openai(&provider));
    let gateway = Tollgate::start(&chat_config(&[impatient])).await;
    let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
    conn.head().await;
    conn.until("one").await;
    // Longer than the provider may be silent; it is not, but nobody listens.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let mut read = 0;
    while read < 16 << 20 {
        let data = conn.data().await.unwrap().expect("the answer goes on");
        let text = String::from_utf8_lossy(&data);
        assert!(!text.contains("\"error\""), "{text}");
        read += data.len();
    }
}

/// Bytes behind a request, as of another one, do not hide that its caller has left.
#[tokio::test]
async fn a_caller_that_leaves_is_seen_behind_more_bytes() {
    let provider = Provider::always(vec![Step::Hang]).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let behind = [&b"\r\n"[..], b"GET /v1/mod", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"];
    for (number, more) in behind.into_iter().enumerate() {
        let conn = Conn::ask(gateway.data, &[chat(&question(false)), more.to_vec()].concat()).await;
        let seen = provider.request(number).await;
        let left = conn.leave();
        let closed = seen.closed().await.saturating_duration_since(left);
        assert!(closed < Duration::from_secs(2), "{closed:?} after {}", String::from_utf8_lossy(more));
        provider.connections_become(|open| open == 0).await;
    }
}
