use proptest::prelude::*;

use super::*;

const CHUNK: &str = r#"{"id":"chatcmpl-AbC123","object":"chat.completion.chunk","created":1717171717,"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_0705bf87c0","choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null}],"usage":null}"#;

fn read(data: &str) -> Delta {
    read_event(data.as_bytes())
}

fn bytes(content_bytes: u64) -> Delta {
    Delta { content_bytes, has_choices: true, ..Delta::default() }
}

#[test]
fn every_kind_of_generated_text_is_counted() {
    let delta = |delta: &str| read(&format!(r#"{{"choices":[{{"index":0,"delta":{delta}}}]}}"#));
    assert_eq!(read(CHUNK), bytes(6));
    assert_eq!(delta(r#"{"role":"assistant","content":""}"#), bytes(0));
    assert_eq!(delta(r#"{"content":"\u4f60\n"}"#), bytes(4));
    assert_eq!(delta(r#"{"content":"你"}"#), bytes(3));
    assert_eq!(delta(r#"{"content":"\ud83d\ude00"}"#), bytes(4));
    assert_eq!(delta(r#"{"content":"half \ud83d"}"#), bytes(7), "an emoji cut in two by the provider");
    assert_eq!(delta(r#"{"content":null,"reasoning_content":"abc"}"#), bytes(3));
    assert_eq!(delta(r#"{"reasoning":"abc","reasoning_content":"abc"}"#), bytes(3));
    assert_eq!(delta(r#"{"refusal":"no"}"#), bytes(2));
    assert_eq!(
        delta(r#"{"content":[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]}"#),
        bytes(2)
    );
    let call = r#"{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"add","arguments":"{\"a\":1}"}}]}"#;
    assert_eq!(delta(call), bytes(3 + 7));
    assert_eq!(delta(r#"{"function_call":{"name":"f","arguments":"{}"}}"#), bytes(3));
    assert_eq!(read(r#"{"choices":[{"text":"abc"},{"text":"de"}]}"#), bytes(5));
    assert_eq!(read(r#"{"type":"transcript.text.delta","delta":"abc"}"#).content_bytes, 3);
}

#[test]
fn only_the_event_with_no_choices_and_usage_is_usage_only() {
    let usage = r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}"#;
    let want = Some(Usage { prompt: 5, completion: 7, total: 12, ..Usage::default() });
    let event = read(&format!(r#"{{"choices":[],"usage":{usage}}}"#));
    assert_eq!(event, Delta { usage: want, usage_only: true, ..Delta::default() });
    let event = read(&format!(r#"{{"choices":[{{"delta":{{}},"finish_reason":"stop"}}],"usage":{usage}}}"#));
    assert_eq!(event, Delta { usage: want, has_choices: true, ..Delta::default() });
    assert!(read(r#"{"choices":[],"usage":{"prompt_tokens":-1}}"#).usage_only, "hidden though unreadable");
    for shown in [
        r#"{"choices":[],"usage":null}"#,
        r#"{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#,
        r#"{"usage":{"prompt_tokens":1}}"#,
        r#"{"choices":null,"usage":{"prompt_tokens":1}}"#,
        r#"{"choices":[],"usage":"none"}"#,
        r#"{"choices":[],"nested":{"usage":{"prompt_tokens":1}}}"#,
    ] {
        assert!(!read(shown).usage_only, "{shown}");
    }
}

#[test]
fn the_end_errors_and_nonsense_are_told_apart() {
    assert_eq!(read("[DONE]"), Delta { done: true, ..Delta::default() });
    assert_eq!(read(" [DONE]\n"), Delta { done: true, ..Delta::default() });
    assert!(read(r#"{"error":{"message":"overloaded","code":503}}"#).error);
    assert!(read(r#"{"object":"error","message":"overloaded"}"#).error);
    assert!(!read(r#"{"error":null,"choices":[]}"#).error);
    for opaque in ["", "null", "[]", "{", "DONE", "{\"choices\":{}}", "{\"choices\":[1]}", "{} x", "1e999"] {
        assert_eq!(read(opaque), Delta::default(), "{opaque}");
    }
    assert_eq!(read_event(b"{\"choices\":[{\"text\":\"\xff\"}]}"), Delta::default());
}

#[test]
fn usage_of_every_endpoint_is_read() {
    let usage = |prompt, completion, total, cached, reasoning| {
        Some(Usage { prompt, completion, total, cached, reasoning })
    };
    let cases = [
        (
            r#"{"prompt_tokens":100,"completion_tokens":50,"total_tokens":150,"prompt_tokens_details":{"cached_tokens":64,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":32,"audio_tokens":0,"accepted_prediction_tokens":0}}"#,
            usage(100, 50, 150, 64, 32),
        ),
        (r#"{"prompt_tokens":8,"total_tokens":8}"#, usage(8, 0, 8, 0, 0)),
        (r#"{"total_tokens":9}"#, usage(9, 0, 9, 0, 0)),
        (
            r#"{"total_tokens":100,"input_tokens":50,"output_tokens":50,"input_tokens_details":{"text_tokens":10,"image_tokens":40}}"#,
            usage(50, 50, 100, 0, 0),
        ),
        (
            r#"{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":0,"audio_tokens":14},"output_tokens":45,"total_tokens":59}"#,
            usage(14, 45, 59, 0, 0),
        ),
        (r#"{"prompt_tokens":1,"completion_tokens":2,"total_tokens":null}"#, usage(1, 2, 3, 0, 0)),
        (r#"{"prompt_tokens":1,"completion_tokens":2,"total_tokens":9}"#, usage(1, 2, 9, 0, 0)),
        (r#"{"prompt_tokens":1.0,"completion_tokens":2e0}"#, usage(1, 2, 3, 0, 0)),
        (r#"{"prompt_tokens":1,"prompt_tokens_details":null}"#, usage(1, 0, 1, 0, 0)),
        (r#"{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":99}}"#, usage(1, 0, 1, 1, 0)),
        (r#"{"type":"duration","seconds":12}"#, None),
        ("{}", None),
        ("null", None),
        ("7", None),
        (r#"{"prompt_tokens":-1,"total_tokens":3}"#, None),
        (r#"{"prompt_tokens":1.5}"#, None),
        (r#"{"prompt_tokens":"12"}"#, None),
        (r#"{"prompt_tokens":1e300}"#, None),
        (r#"{"prompt_tokens":1e999}"#, None),
        (r#"{"prompt_tokens":18446744073709551615,"completion_tokens":18446744073709551615}"#, None),
    ];
    for (written, want) in cases {
        assert_eq!(
            usage_of_answer(format!(r#"{{"data":[],"usage":{written}}}"#).as_bytes()),
            want,
            "{written}"
        );
    }
    assert_eq!(usage_of_answer(br#"{"data":[]}"#), None);
    assert_eq!(usage_of_answer(b"\xff\xfbID3 an mp3"), None);
}

#[test]
fn text_of_whole_answers_is_counted() {
    let count = |body: &str| answer_content_bytes(body.as_bytes());
    assert_eq!(
        count(r#"{"choices":[{"message":{"role":"assistant","content":"hello","refusal":null}}]}"#),
        5
    );
    assert_eq!(count(r#"{"choices":[{"text":"a"},{"text":"bc"}]}"#), 3);
    assert_eq!(count(r#"{"text":"spoken"}"#), 6);
    assert_eq!(count(r#"{"data":[{"embedding":[0.1]}]}"#), 0);
    assert_eq!(count("not json"), 0);
}

#[test]
fn deep_nesting_is_harmless() {
    let million = 1_000_000;
    let deep = format!("{}{}", "[".repeat(million), "]".repeat(million));
    for body in [
        "[".repeat(million),
        "{\"a\":".repeat(million),
        format!(r#"{{"choices":{deep}}}"#),
        format!(r#"{{"choices":[{{"delta":{{"content":{deep}}}}}]}}"#),
        format!(r#"{{"usage":{deep}}}"#),
        format!(
            r#"{{"choices":[],"usage":{}1{}}}"#,
            "{\"prompt_tokens_details\":".repeat(million),
            "}".repeat(million)
        ),
    ] {
        assert_eq!((read(&body).content_bytes, read(&body).usage), (0, None));
        assert_eq!(usage_of_answer(body.as_bytes()), None);
        assert_eq!(answer_content_bytes(body.as_bytes()), 0);
    }
}

#[test]
fn errors_have_openai_s_shape() {
    let extra = [("rule", "free".into()), ("limit", 60.into())];
    let body = error_body("Say \"please\".\n", "requests", None, Some("rate_limit_exceeded"), &extra);
    assert_eq!(
        String::from_utf8(body).unwrap(),
        r#"{"error":{"message":"Say \"please\".\n","type":"requests","param":null,"code":"rate_limit_exceeded","rule":"free","limit":60}}"#
    );
    let event = error_event("a\nb", "upstream_error", None);
    assert_eq!(
        &event[..],
        b"data: {\"error\":{\"message\":\"a\\nb\",\"type\":\"upstream_error\",\"param\":null,\"code\":null}}\n\n"
    );
    let mut splitter = crate::sse::Splitter::new();
    let events: Vec<_> = splitter.push(event).collect();
    assert_eq!(events.len(), 1);
    assert!(read_event(&events[0].data().unwrap()).error);
}

proptest! {
    #[test]
    fn nothing_makes_it_panic(data in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = (read_event(&data), usage_of_answer(&data), answer_content_bytes(&data));
    }

    #[test]
    fn broken_events_do_not_panic(at in 0..CHUNK.len(), byte in any::<u8>(), cut in 0..CHUNK.len()) {
        let mut data = CHUNK.as_bytes().to_vec();
        data[at] = byte;
        let _ = read_event(&data);
        let _ = read_event(&data[..cut]);
    }

    #[test]
    fn an_event_says_the_same_whatever_came_before(
        from in 0..CHUNK.len(), length in 0..8_usize, with in "[a-z\"\\\\é\n{},:]{0,8}", cut in 0..CHUNK.len(),
    ) {
        let mut events = Events::default();
        for data in [CHUNK, &CHUNK.replace("world", "you\\n"), &CHUNK.replace("world", "é")] {
            let mut changed = data.as_bytes().to_vec();
            let from = from.min(data.len());
            changed.splice(from..(from + length).min(data.len()), with.bytes());
            for data in [data.as_bytes(), &changed, &changed[..cut.min(changed.len())], data.as_bytes()] {
                prop_assert_eq!(events.read(data), parsed(data).unwrap_or_default());
            }
        }
    }

    #[test]
    fn content_is_counted_as_it_decodes(text in any::<String>()) {
        let data = serde_json::json!({ "choices": [{ "delta": { "content": text } }] }).to_string();
        prop_assert_eq!(read(&data), bytes(text.len() as u64));
        let ascii: String = data.encode_utf16().map(|unit| match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
            _ => format!("\\u{unit:04x}"),
        }).collect();
        prop_assert_eq!(read(&ascii), bytes(text.len() as u64));
    }
}
