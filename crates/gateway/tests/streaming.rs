//! Streams: every byte as it comes, the usage that only the gateway asked for hidden, tokens counted whatever the chunks.

mod support;

use serde_json::Value;
use support::{
    Conn, Gate, Provider, Response, Step, Tollgate, chat, chat_config, chunk, openai, post, question, sse,
};

/// A stream with everything a stream may have: comments, CRLF and CR line ends, fields nobody asked for, several `data`
/// lines, text of many bytes per character, an event without data.
fn motley() -> Vec<u8> {
    let mut stream = String::from(": hello\n\n");
    stream += &sse::delta("Grüße ");
    stream += &sse::delta("aus 東京 🗼").replace('\n', "\r\n");
    stream += ": ping\r\n\r\n";
    stream += "event: noise\nid: 7\nretry: 100\n\n";
    stream += "id: 8\nevent: message\ndata: {\"choices\":[{\"index\":0,\ndata: \"delta\":{\"content\":\"abc\"}}]}\n\n";
    stream += &sse::delta("{\"choices\":[],\"usage\":{}}");
    stream += &sse::delta("end").replace('\n', "\r");
    stream.into_bytes()
}

const MOTLEY_BYTES: u64 = "Grüße aus 東京 🗼abc{\"choices\":[],\"usage\":{}}end".len() as u64;

/// A chat request with a number by which the provider's script knows what to do.
fn numbered(number: usize, more: &str) -> String {
    format!(r#"{{"model":"chat","stream":true{more},"messages":[],"seed":{number}}}"#)
}

fn number_of(seen: &support::Seen) -> usize {
    seen.json()["seed"].as_u64().expect("a number") as usize
}

/// How the stream is cut for request `number`: each place for one cut, then random places.
fn cuts(number: usize, length: usize) -> Vec<usize> {
    if number < length {
        return vec![number];
    }
    let mut random = fastrand::Rng::with_seed(number as u64);
    let mut cuts: Vec<usize> = (0..random.usize(2..40)).map(|_| random.usize(..length)).collect();
    cuts.sort_unstable();
    cuts
}

fn in_chunks(stream: &[u8], cuts: &[usize]) -> Vec<Step> {
    let mut steps = vec![Step::Send(sse::head())];
    let mut from = 0;
    for &to in cuts.iter().chain([&stream.len()]) {
        if to > from {
            steps.push(Step::Send(chunk(&stream[from..to])));
            from = to;
        }
    }
    steps.push(Step::Send(chunk(b"")));
    steps
}

async fn logged(gateway: &Tollgate, answer: &Response) -> Value {
    gateway.request_logged(answer.header("x-request-id").expect("an id")).await
}

#[tokio::test]
async fn every_chunking_is_relayed_byte_for_byte_and_counted_the_same() {
    let motley = motley();
    let sent = [&motley[..], sse::usage(11, 22).as_bytes(), sse::DONE.as_bytes()].concat();
    let expected = [&motley[..], sse::DONE.as_bytes()].concat();
    let length = sent.len();
    let provider = {
        let sent = sent.clone();
        Provider::start(move |seen| in_chunks(&sent, &cuts(number_of(seen), length))).await
    };
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let mut conn = Conn::open(gateway.data).await;
    let count = length + 300;
    for number in 0..count {
        conn.send(&chat(&numbered(number, ""))).await;
        let answer = conn.response().await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body, expected, "cut at {:?}:\n{}", cuts(number, length), answer.text());
    }
    for line in gateway.requests_logged(count).await {
        assert_eq!(
            (&line["prompt_tokens"], &line["completion_tokens"], &line["outcome"]),
            (&11.into(), &22.into(), &"done".into()),
            "{line}"
        );
        assert!(line.get("estimated").is_none());
    }
}

#[tokio::test]
async fn single_bytes_on_the_wire_are_relayed_byte_for_byte() {
    let body = [motley(), sse::usage(1, 2).into(), sse::DONE.into()].concat();
    let mut wire = sse::head();
    body.iter().for_each(|byte| wire.extend(chunk(&[*byte])));
    wire.extend(chunk(b""));
    let provider = Provider::always(vec![Step::Bytewise(wire)]).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let answer = post(gateway.data, &chat(&question(true))).await;
    assert_eq!(answer.body, [motley(), sse::DONE.into()].concat());
    let line = logged(&gateway, &answer).await;
    assert_eq!((&line["prompt_tokens"], &line["completion_tokens"]), (&1.into(), &2.into()));
}

#[tokio::test]
async fn usage_is_asked_for_and_hidden_again_unless_the_caller_asked() {
    let (text, usage) = (sse::delta("hi"), sse::usage(3, 4));
    // Usage beside a choice is no extra event: some servers report as they go.
    let beside = text.replace(r#""usage":null"#, r#""usage":{"prompt_tokens":3,"completion_tokens":1}"#);
    let provider = Provider::answering(sse::whole(&[&text, &beside, &usage, sse::DONE])).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let hidden = [&text[..], &beside, sse::DONE].concat();
    let shown = [&text[..], &beside, &usage, sse::DONE].concat();
    for (options, merged, expected) in [
        ("", r#"{"include_usage":true}"#, &hidden),
        (r#","stream_options":null"#, r#"{"include_usage":true}"#, &hidden),
        (r#","stream_options":{}"#, r#"{"include_usage":true}"#, &hidden),
        (r#","stream_options":{"include_usage":false}"#, r#"{"include_usage":true}"#, &hidden),
        (r#","stream_options":{"x":[1]}"#, r#"{"include_usage":true,"x":[1]}"#, &hidden),
        (r#","stream_options":{"include_usage":true,"x":1}"#, r#"{"include_usage":true,"x":1}"#, &shown),
    ] {
        let asked = provider.hits();
        let answer = post(gateway.data, &chat(&numbered(0, options))).await;
        assert_eq!(&answer.text(), expected, "{options}");
        let seen = provider.requests()[asked].json();
        let merged: Value = serde_json::from_str(merged).unwrap();
        assert_eq!(seen["stream_options"], merged, "{options}");
        let line = logged(&gateway, &answer).await;
        assert_eq!(line["completion_tokens"], 4, "{line}");
    }
    let plain = post(gateway.data, &chat(&question(false))).await;
    assert_eq!(plain.status, 200);
    let seen = provider.requests().pop().expect("a request");
    assert_eq!(seen.text(), question(false), "nothing is added to what is not streamed");
}

#[tokio::test]
async fn without_usage_tokens_are_estimated() {
    let text = [motley(), sse::DONE.into()].concat();
    let provider = {
        let text = text.clone();
        Provider::start(move |seen| in_chunks(&text, &cuts(number_of(seen), text.len()))).await
    };
    let gateway =
        Tollgate::start(&chat_config(&[format!("{}, stream_usage: false", openai(&provider))])).await;
    let mut counted = Vec::new();
    for number in [1, 50, 1_000, 1_001, 1_002] {
        let answer = post(gateway.data, &chat(&numbered(number, ""))).await;
        assert_eq!(answer.body, text);
        let line = logged(&gateway, &answer).await;
        assert_eq!(line["estimated"], true, "{line}");
        counted.push(line["completion_tokens"].as_u64().expect("a count"));
    }
    let seen = provider.request(0).await;
    assert_eq!(seen.text(), numbered(1, ""), "stream_usage: false adds nothing");
    assert!(counted.iter().all(|count| *count == counted[0]), "the same under any chunking: {counted:?}");
    assert_eq!(counted[0], MOTLEY_BYTES.div_ceil(3));
}

#[tokio::test]
async fn events_are_relayed_while_the_provider_holds_the_rest() {
    let (first, second) = (sse::delta("first"), sse::delta("second"));
    let (gate, last_gate) = (Gate::new(), Gate::new());
    // The second event comes in two halves: what is incomplete is held, what was complete is not.
    let (half, rest) = second.split_at(20);
    let provider = Provider::always(vec![
        Step::Send([sse::head(), chunk(first.as_bytes())].concat()),
        Step::Wait(gate.clone()),
        Step::Send([chunk(half.as_bytes()), chunk(rest.as_bytes())].concat()),
        Step::Wait(last_gate.clone()),
        Step::Send([chunk(sse::DONE.as_bytes()), chunk(b"")].concat()),
    ])
    .await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
    let head = conn.head().await;
    assert_eq!(head.status, 200);
    assert_eq!(conn.until("first").await, first.as_bytes());
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.value(r#"http_requests_in_flight{endpoint="/v1/chat/completions"}"#), 1.0);
    gate.open();
    assert_eq!(conn.until("second").await, second.as_bytes());
    last_gate.open();
    assert_eq!(conn.rest().await.unwrap(), sse::DONE.as_bytes());
    let line = logged(&gateway, &head).await;
    assert!(line["first_byte_ms"].as_f64() < line["latency_ms"].as_f64());
}

#[tokio::test]
async fn a_provider_that_dies_leaves_what_came_and_an_error_event() {
    let events = [sse::delta("one"), sse::delta("two"), sse::delta("東京")];
    let all = events.concat();
    let begun = &sse::delta("東京").into_bytes();
    let in_character = begun.iter().position(|byte| *byte > 127).expect("a long character") + 1;
    let deaths = [
        ("chunked, closed", sse::head(), Vec::new(), Step::Close),
        ("chunked, reset", sse::head(), Vec::new(), Step::Reset),
        ("in a character", sse::head(), chunk(&begun[..in_character]), Step::Close),
        ("in a chunk", sse::head(), chunk(begun)[..begun.len()].to_vec(), Step::Reset),
        ("in a chunk size", sse::head(), b"2\r\nda\r\nfff".to_vec(), Step::Close),
        ("garbage", sse::head(), b"this is no chunk\r\n".to_vec(), Step::Hang),
    ];
    for (how, head, tail, end) in deaths {
        let gate = Gate::new();
        let provider = Provider::always(vec![
            Step::Send([head, chunk(all.as_bytes())].concat()),
            // A reset may overtake data that was not read yet: first the client has it.
            Step::Wait(gate.clone()),
            Step::Send(tail),
            end,
        ])
        .await;
        let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
        let head = conn.head().await;
        let mut body = conn.until("東京").await;
        gate.open();
        body.extend(support::soon(how, conn.rest()).await.expect("a whole body"));
        let body = String::from_utf8(body).expect("UTF-8");
        let error = body.strip_prefix(&all).unwrap_or_else(|| panic!("{how}: {body}"));
        let error = error.strip_prefix("data: ").and_then(|error| error.strip_suffix("\n\n"));
        let error: Value = serde_json::from_str(error.unwrap_or_else(|| panic!("{how}: {body}"))).unwrap();
        assert_eq!(error["error"]["type"], "upstream_error", "{how}");
        assert_eq!(error["error"]["code"], "upstream_failed", "{how}");
        assert!(!body.contains("[DONE]"));
        let line = logged(&gateway, &head).await;
        assert_eq!(
            (&line["outcome"], &line["status"], &line["attempts"]),
            (&"upstream_died".into(), &200.into(), &1.into())
        );
        assert_eq!(line["completion_tokens"], "onetwo東京".len().div_ceil(3), "{how}: what was delivered");
        let metrics = gateway.metrics().await;
        assert_eq!(metrics.value(r#"streams_aborted_total{by="upstream"}"#), 1.0);
        assert_eq!(provider.hits(), 1, "nothing is retried after a byte was sent");
    }
}

/// A blank line that ends in CR may be half of a CRLF, or not: when nothing follows, the event was whole.
#[tokio::test]
async fn an_event_that_ends_in_cr_came_whole_when_the_provider_dies() {
    let gate = Gate::new();
    let (first, last) = (sse::delta("one"), sse::delta("two").replace('\n', "\r"));
    let provider = Provider::always(vec![
        Step::Send([sse::head(), chunk(first.as_bytes()), chunk(last.as_bytes())].concat()),
        Step::Wait(gate.clone()),
        Step::Close,
    ])
    .await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
    conn.head().await;
    let mut body = conn.until("one").await;
    gate.open();
    body.extend(support::soon("the end", conn.rest()).await.expect("a whole body"));
    let body = String::from_utf8(body).expect("UTF-8");
    let error = body.strip_prefix(&[first, last].concat()).unwrap_or_else(|| panic!("{body:?}"));
    assert!(error.trim_start_matches(['\r', '\n']).starts_with("data: {\"error\":"), "{body:?}");
    assert_eq!(gateway.requests_logged(1).await[0]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_stream_ended_by_its_connection_is_whole_after_done() {
    let events = [sse::delta("one"), sse::DONE.to_owned()].concat();
    let head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n";
    let untilclose = [&head[..], events.as_bytes()].concat();
    let unterminated = [sse::head(), chunk(events.as_bytes())].concat();
    let trailers = [sse::head(), chunk(events.as_bytes()), b"0\r\nx-trailer: 1\r\n\r\n".to_vec()].concat();
    for (how, wire) in
        [("close-delimited", untilclose), ("no last chunk", unterminated), ("trailers", trailers)]
    {
        let provider = Provider::always(vec![Step::Send(wire), Step::Close]).await;
        let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let answer = post(gateway.data, &chat(&question(true))).await;
        assert_eq!(answer.text(), events, "{how}");
        assert_eq!(logged(&gateway, &answer).await["outcome"], "done", "{how}");
    }
}

#[tokio::test]
async fn completions_stream_as_chat_does() {
    let event = "data: {\"object\":\"text_completion\",\"choices\":[{\"index\":0,\"text\":\"abcdef\"}]}\n\n";
    let provider = Provider::answering(sse::whole(&[event, &sse::usage(5, 6), sse::DONE])).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let body = br#"{"model":"chat","prompt":"a","stream":true}"#;
    let headers = [("X-API-Key", "sk-alice")];
    let answer = post(gateway.data, &support::request("POST", "/v1/completions", &headers, body)).await;
    assert_eq!(answer.text(), [event, sse::DONE].concat());
    let line = logged(&gateway, &answer).await;
    assert_eq!((&line["endpoint"], &line["completion_tokens"]), (&"/v1/completions".into(), &6.into()));
}
