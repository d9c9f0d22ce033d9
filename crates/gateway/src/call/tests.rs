use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

mod forms;

fn chat(body: impl Into<Vec<u8>>) -> Result<Call, CallError> {
    Call::from_json(Endpoint::ChatCompletions, Bytes::from(body.into()))
}

fn error(body: impl Into<Vec<u8>>) -> CallError {
    chat(body).expect_err("refused")
}

fn prompt_of(members: &str) -> Prompt {
    chat(format!(r#"{{"model":"m",{members}}}"#)).unwrap().prompt()
}

fn text(text_bytes: u64) -> Prompt {
    Prompt { text_bytes, ..Prompt::default() }
}

#[test]
fn endpoints_agree_on_their_paths() {
    for endpoint in Endpoint::ALL {
        assert_eq!(endpoint.route(), format!("/v1{}", endpoint.upstream_path()));
    }
    assert_eq!(Endpoint::ImagesEdits.form(), Form::Either);
    assert_eq!(Endpoint::AudioSpeech.form(), Form::Json);
    assert_eq!(Endpoint::AudioTranslations.form(), Form::Multipart);
    assert!(Endpoint::Completions.streams() && !Endpoint::Embeddings.streams());
}

#[test]
fn a_request_is_understood() {
    let call =
        chat(r#" { "stream" : true , "model" : "gp\u0074-4o" , "n" : 2, "max_tokens": 100 } "#).unwrap();
    assert_eq!((call.model(), call.streamed(), call.n(), call.output_max()), ("gpt-4o", true, 2, Some(100)));
    assert!(!call.usage_asked());
    let call = chat(r#"{"model":"m","stream":true,"stream_options":{"include_usage":true}}"#).unwrap();
    assert!(call.usage_asked());
    let call =
        chat(r#"{"model":"m","stream":null,"n":null,"max_tokens":null,"stream_options":null}"#).unwrap();
    assert_eq!((call.streamed(), call.n(), call.output_max(), call.usage_asked()), (false, 1, None, false));
    assert_eq!(chat(r#"{"a":{"model":"x"},"model":"m","b":[{"model":"y"}]}"#).unwrap().model(), "m");
}

#[test]
fn debug_does_not_show_the_prompt() {
    let call = chat(r#"{"model":"m","messages":[{"role":"user","content":"a secret"}]}"#).unwrap();
    assert!(!format!("{call:?}").contains("secret"));
}

#[test]
fn absurd_numbers_become_possible_ones() {
    let n = |n: &str| chat(format!(r#"{{"model":"m","n":{n}}}"#)).unwrap().n();
    assert_eq!(
        [n("0"), n("-3"), n("1"), n("128"), n("129"), n("1e999"), n("1.5")],
        [1, 1, 1, 128, 128, 128, 2]
    );
    let max = |members: &str| chat(format!(r#"{{"model":"m",{members}}}"#)).unwrap().output_max();
    assert_eq!(max(r#""max_tokens":-1"#), None, "some servers take it for no bound");
    assert_eq!(max(r#""max_tokens":0"#), Some(0));
    assert_eq!(max(r#""max_tokens":99999999999999999999"#), Some(u64::MAX));
    assert_eq!(max(r#""max_completion_tokens":1e999"#), Some(u64::MAX));
    assert_eq!(max(r#""max_tokens":5,"max_completion_tokens":7"#), Some(7));
    assert_eq!(chat(r#"{"model":"m","n":2,"best_of":5}"#).unwrap().n(), 5);
}

#[test]
fn what_is_not_a_json_object_is_refused() {
    let not_json: [&[u8]; 15] = [
        b"",
        b" ",
        b"{",
        b"{]",
        b"{}x",
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b"nul",
        b"{'model':'m'}",
        b"{\"model\":\"m\",}",
        b"{\"model\":\"m\"}\0",
        b"{\"model\":\"\0\"}",
        b"{\"model\":\"m\",\"a\":01}",
        b"{\"model\":\"m\",\"a\":NaN}",
        b"{\"model\":\"m\",\"a\":\"\xff\"}",
    ];
    for body in not_json {
        assert!(matches!(error(body), CallError::NotJson(_)), "{:?}", String::from_utf8_lossy(body));
    }
    for body in ["[]", "null", "\"model\"", "1"] {
        assert_eq!(error(body), CallError::NotAnObject, "{body}");
    }
    assert_eq!(
        error("{\"model\":\"m\"").to_string(),
        "We could not parse the JSON body of your request: EOF while parsing an object at line 1 column 12."
    );
}

#[test]
fn unknown_members_may_hold_anything_that_is_json() {
    for value in ["1e999", "-0.0e-7", r#""\ud83d""#, r#""\u0000""#, "{\"model\":1,\"model\":2}", "[[],{}]"] {
        let body = format!(r#"{{"x":{value},"model":"m","x":{value}}}"#);
        assert_eq!(chat(body.clone()).unwrap().render(None, true), body.as_bytes(), "{value}");
        assert!(
            chat(format!(r#"{{"model":"m","messages":[{{"role":"user","content":{value}}}]}}"#)).is_ok(),
            "{value}"
        );
    }
}

#[test]
fn the_model_must_be_a_name() {
    for body in ["{}", r#"{"model":null}"#, r#"{"x":{"model":"m"}}"#] {
        assert_eq!(error(body), CallError::MissingModel, "{body}");
    }
    for body in [r#"{"Model":"m"}"#, r#"{"model":"m","MODEL":"other"}"#, r#"{"mOd\u0065l":"m","model":"m"}"#]
    {
        assert_eq!(error(body), CallError::OtherCase("model"), "{body}");
    }
    assert_eq!(error(r#"{"model":"m","Stream":true}"#), CallError::OtherCase("stream"));
    assert_eq!(error(r#"{"model":""}"#), CallError::EmptyModel);
    assert!(chat(format!(r#"{{"model":"{}"}}"#, "m".repeat(256))).is_ok());
    assert_eq!(error(format!(r#"{{"model":"{}"}}"#, "m".repeat(257))), CallError::LongModel(257));
    for (value, found) in [
        ("7", "a number"),
        ("true", "a boolean"),
        ("[]", "an array"),
        ("{}", "an object"),
        (r#""\ud800""#, "a string that is not valid Unicode"),
    ] {
        let error = error(format!(r#"{{"model":{value}}}"#));
        assert_eq!(error, CallError::WrongType { param: "model", expected: "a string", found });
        assert_eq!(error.param(), Some("model"));
    }
}

#[test]
fn members_of_the_wrong_type_are_refused() {
    for (param, values) in [
        ("stream", &["1", "\"true\"", "[]"][..]),
        ("n", &["\"1\"", "true", "{}"]),
        ("best_of", &["\"1\""]),
        ("max_tokens", &["\"inf\"", "[1]"]),
        ("max_completion_tokens", &["false"]),
        ("stream_options", &["true", "[]", "\"include_usage\""]),
    ] {
        for value in values {
            let error = error(format!(r#"{{"model":"m","{param}":{value}}}"#));
            assert!(matches!(error, CallError::WrongType { .. }), "{param}: {value}");
            assert_eq!(error.param(), Some(param));
        }
    }
    assert_eq!(
        error(r#"{"model":"m","stream":"yes"}"#).to_string(),
        "Invalid type for 'stream': expected a boolean, but got a string instead."
    );
    let error = error(r#"{"model":"m","stream_options":{"include_usage":1}}"#);
    assert_eq!(error.param(), Some("stream_options.include_usage"));
    let embeddings = Bytes::from_static(br#"{"model":"m","stream_options":7}"#);
    assert!(Call::from_json(Endpoint::Embeddings, embeddings).is_ok(), "it has no such option");
}

#[test]
fn what_matters_may_occur_once() {
    for (param, value) in [
        ("model", "\"m\""),
        ("stream", "true"),
        ("stream_options", "null"),
        ("n", "1"),
        ("best_of", "1"),
        ("max_tokens", "1"),
        ("max_completion_tokens", "1"),
        ("messages", "[]"),
        ("prompt", "\"\""),
        ("suffix", "\"\""),
        ("input", "[]"),
        ("instructions", "\"\""),
        ("query", "\"\""),
        ("documents", "[]"),
        ("texts", "[]"),
        ("tools", "[]"),
        ("functions", "[]"),
        ("response_format", "null"),
    ] {
        let escaped = format!("{}\\u{:04x}", &param[..param.len() - 1], param.as_bytes()[param.len() - 1]);
        for again in [param, &escaped] {
            let body = format!(r#"{{"model":"m","{param}":{value},"{again}":{value}}}"#);
            assert_eq!(error(body), CallError::Duplicate(param), "{again}");
        }
    }
    let twice = error(r#"{"model":"m","stream_options":{"include_usage":false,"include_us\u0061ge":true}}"#);
    assert_eq!(twice, CallError::Duplicate("stream_options.include_usage"));
    assert_eq!(error(r#"{"mod\u0065l":"a","model":"b"}"#), CallError::Duplicate("model"));
}

#[test]
fn nesting_is_bounded_everywhere() {
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let objects = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
    for member in ["x", "messages", "prompt", "tools", "stream_options\":{\"x"] {
        let close = if member.contains('{') { "}" } else { "" };
        let inner = DEPTH_MAX - 1 - close.len();
        for nest in [&nested as &dyn Fn(usize) -> String, &objects] {
            let body = |levels| format!(r#"{{"model":"m","{member}":{}{close}}}"#, nest(levels));
            assert!(chat(body(inner)).is_ok(), "{member}");
            assert_eq!(error(body(inner + 1)), CallError::TooDeep, "{member}");
            assert_eq!(error(body(1_000_000)), CallError::TooDeep, "{member}");
        }
        let unclosed = format!(r#"{{"model":"m","{member}":{}"#, "[".repeat(1_000_000));
        assert!(matches!(error(unclosed), CallError::NotJson(_)), "{member}");
    }
    assert_eq!(error("[".repeat(1_000_000)), CallError::NotAnObject);
    assert!(matches!(error("{\"a\":".repeat(1_000_000)), CallError::NotJson(_)));
    assert_eq!(error(format!(r#"{{"model":{}}}"#, nested(1_000_000))), CallError::TooDeep);
}

#[test]
fn text_of_prompts_is_counted_as_it_decodes() {
    assert_eq!(prompt_of(r#""messages":[{"role":"user","content":"hello"}]"#), text(5));
    assert_eq!(prompt_of(r#""messages":[{"role":"user","content":"\u4f60\"\n"}]"#), text(5));
    assert_eq!(prompt_of(r#""messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}]"#), text(2));
    let call = r#""messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","tool_call_id":"call_1","content":"ok"}]"#;
    assert_eq!(prompt_of(call), text(1 + 2 + 2));
    assert_eq!(prompt_of(r#""prompt":["ab","cd"],"suffix":"e""#), text(5));
    assert_eq!(prompt_of(r#""query":"ab","documents":["cd",{"text":"ef"}]"#), text(6));
    assert_eq!(prompt_of(r#""input":"ab","user":"not text""#), text(2));
    assert_eq!(prompt_of(r#""tools":[{"a":"b"}]"#), text(11));
    assert_eq!(prompt_of(r#""input":[[1,22],[333]]"#), Prompt { token_ids: 3, ..Prompt::default() });
    assert_eq!(prompt_of(r#""messages":[{"content":"a","x":7}]"#), text(1));
    let long_role = format!(r#""messages":[{{"role":"{}"}}]"#, "r".repeat(65));
    assert_eq!(prompt_of(&long_role), text(65), "text under a false name");
}

#[test]
fn a_list_of_prompts_is_answered_prompt_by_prompt() {
    let answers = |endpoint, members: &str| {
        let body = format!(r#"{{"model":"m",{members}}}"#);
        Call::from_json(endpoint, Bytes::from(body)).unwrap().content().answers
    };
    for (prompt, want) in [
        (r#""a""#, 1),
        ("null", 1),
        ("[]", 1),
        (r#"["a"]"#, 1),
        (r#"["a","b,c","[d]"]"#, 3),
        ("[1,2,3]", 1),
        ("[[1,2],[3],[]]", 3),
        (r#"["data:image/png;base64,AAAA","data:image/png;base64,AAAA"]"#, 2),
    ] {
        let members = format!(r#""prompt":{prompt}"#);
        assert_eq!(answers(Endpoint::Completions, &members), want, "{prompt}");
        assert_eq!(answers(Endpoint::Completions, &format!(r#""n":2,"best_of":3,{members}"#)), 3 * want);
        assert_eq!(answers(Endpoint::ChatCompletions, &members), 1, "{prompt}");
    }
}

#[test]
fn a_bound_counts_where_the_endpoint_has_it() {
    let bound = |endpoint, members: &str| {
        let body = format!(r#"{{"model":"m",{members}}}"#);
        Call::from_json(endpoint, Bytes::from(body)).unwrap().content().output_max
    };
    let both = r#""max_tokens":5,"max_completion_tokens":9"#;
    assert_eq!(bound(Endpoint::ChatCompletions, both), Some(9));
    assert_eq!(bound(Endpoint::Completions, both), Some(5));
    assert_eq!(bound(Endpoint::Completions, r#""max_completion_tokens":9"#), None, "its provider ignores it");
}

#[test]
fn texts_are_given_one_by_one() {
    let call = chat(
        r#"{"model":"m","user":"not text","messages":[{"role":"system","content":"a\u0062","name":"bob"},
            {"role":"user","content":[{"type":"text","text":"c"},{"image_url":{"url":"d"}}]}],
            "tools":[ {"f":1} ],"response_format":null,"instructions":"\ud800"}"#,
    );
    let mut texts = Vec::new();
    let messages = call.unwrap().texts(&mut |text: Text<'_>| {
        texts.push((text.member, text.name.to_owned(), text.text.into_owned()));
    });
    let want = [
        ("messages", "content", "ab"),
        ("messages", "name", "bob"),
        ("messages", "text", "c"),
        ("instructions", "", r"\ud800"),
        ("tools", "", r#"[ {"f":1} ]"#),
    ];
    assert_eq!(texts, want.map(|(member, name, text)| (member, name.to_owned(), text.to_owned())));
    assert_eq!(messages, 2);
}

#[test]
fn media_are_counted_and_not_measured() {
    let data = "A".repeat(10_000);
    let parts = format!(
        r#""messages":[{{"role":"user","content":[
            {{"type":"text","text":"look"}},
            {{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}","detail":"low"}}}},
            {{"type":"image_url","image_url":{{"url":"https://example.com/a-long-name.png"}}}},
            {{"type":"input_audio","input_audio":{{"data":"{data}","format":"wav"}}}},
            {{"type":"file","file":{{"file_data":"{data}","filename":"a.pdf"}}}}]}},
            {{"role":"assistant","audio":null,"file":null,"content":"ok"}}]"#
    );
    assert_eq!(prompt_of(&parts), Prompt { text_bytes: 6, token_ids: 0, images: 2, audio: 1, files: 1 });
    let urls = format!(r#""input":["data:image/png;base64,{data}","data:audio\/wav;base64,{data}"]"#);
    assert_eq!(prompt_of(&urls), Prompt { images: 1, audio: 1, ..Prompt::default() });
    for prose in
        ["data: a", "data:,a", "data:image/png;base64,not base64 but a long prompt", "data:text/plain,a"]
    {
        assert_eq!(prompt_of(&format!(r#""input":"{prose}""#)), text(prose.len() as u64), "{prose}");
    }
}

#[test]
fn only_what_must_change_is_rewritten() {
    const ASK: &str = r#""stream_options":{"include_usage":true}"#;
    let cases = [
        (r#"{"model":"a","stream":true}"#, format!(r#"{{"model":"b\"",{ASK},"stream":true}}"#)),
        (r#"{"stream":true, "model" : "a" }"#, format!(r#"{{"stream":true, "model" : "b\"",{ASK} }}"#)),
        (
            r#"{"stream_options":null,"stream":true,"model":"a"}"#,
            format!(r#"{{{ASK},"stream":true,"model":"b\""}}"#),
        ),
        (
            r#"{"model":"a","stream":true,"stream_options":{ }}"#,
            r#"{"model":"b\"","stream":true,"stream_options":{"include_usage":true }}"#.to_owned(),
        ),
        (
            r#"{"model":"a","stream":true,"stream_options":{"x":1}}"#,
            r#"{"model":"b\"","stream":true,"stream_options":{"include_usage":true,"x":1}}"#.to_owned(),
        ),
        (
            r#"{"model":"a","stream":true,"stream_options":{"x":1,"include_usage": false }}"#,
            r#"{"model":"b\"","stream":true,"stream_options":{"x":1,"include_usage": true }}"#.to_owned(),
        ),
        (
            r#"{"model":"a","stream":true,"stream_options":{"include_usage":null}}"#,
            r#"{"model":"b\"","stream":true,"stream_options":{"include_usage":true}}"#.to_owned(),
        ),
        (
            r#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#,
            r#"{"model":"b\"","stream":true,"stream_options":{"include_usage":true}}"#.to_owned(),
        ),
        (r#"{"model":"a","stream":false}"#, r#"{"model":"b\"","stream":false}"#.to_owned()),
    ];
    for (body, want) in cases {
        let call = chat(body).unwrap();
        assert_eq!(call.render(Some("b\""), true), want.as_bytes(), "{body}");
        assert_eq!(call.render(None, false), body.as_bytes());
    }
}

#[test]
fn without_an_edit_the_body_is_not_copied() {
    let body = Bytes::from_static(br#"{"model":"a","stream":true}"#);
    let call = Call::from_json(Endpoint::ChatCompletions, body.clone()).unwrap();
    for rendered in [call.render(None, false), call.render(Some("a"), false)] {
        assert_eq!(rendered.as_ptr(), body.as_ptr());
    }
    let call = Call::from_json(Endpoint::ImagesGenerations, body.clone()).unwrap();
    assert_eq!(call.render(None, true).as_ptr(), body.as_ptr(), "the endpoint has no such option");
}

/// Any JSON value, a few levels deep.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((any::<String>(), inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn options() -> impl Strategy<Value = Option<Value>> {
    prop::sample::select(vec![
        None,
        Some(Value::Null),
        Some(json!({})),
        Some(json!({ "include_usage": true })),
        Some(json!({ "include_usage": false })),
        Some(json!({ "x": [1], "include_usage": null })),
        Some(json!({ "include_obfuscation": false })),
    ])
}

fn request() -> impl Strategy<Value = Value> {
    // A random name may be `n`: a prefix keeps them unknown.
    let others = prop::collection::vec((any::<String>().prop_map(|name| format!("x{name}")), value()), 0..4);
    let known = (".{1,20}", any::<Option<bool>>(), options(), prop::option::of(value()));
    (others, known, any::<usize>()).prop_map(|(others, (model, stream, options, messages), turn)| {
        let mut members: Vec<(String, Value)> = others;
        members.push(("model".to_owned(), model.into()));
        members.extend(stream.map(|stream| ("stream".to_owned(), stream.into())));
        members.extend(options.map(|options| ("stream_options".to_owned(), options)));
        members.extend(messages.map(|messages| ("messages".to_owned(), messages)));
        let turn = turn % members.len();
        members.rotate_left(turn);
        Value::Object(members.into_iter().collect())
    })
}

proptest! {
    #[test]
    fn rendering_changes_the_document_only_where_asked(
        request in request(), model in prop::option::of(".{1,20}"), pretty in any::<bool>(), ask: bool,
    ) {
        let body = if pretty { format!("{request:#}") } else { request.to_string() };
        let call = chat(body).unwrap();
        prop_assert_eq!(call.model(), request["model"].as_str().unwrap());
        let streamed = request.get("stream") == Some(&json!(true));
        prop_assert_eq!(call.streamed(), streamed);
        let rendered: Value = serde_json::from_slice(&call.render(model.as_deref(), ask)).unwrap();
        let mut want = request;
        if let Some(model) = model {
            want["model"] = model.into();
        }
        if ask && streamed {
            if want.get("stream_options").is_none_or(Value::is_null) {
                want["stream_options"] = json!({});
            }
            want["stream_options"]["include_usage"] = true.into();
        }
        prop_assert_eq!(rendered, want);
    }

    #[test]
    fn text_is_counted_like_a_parser_would(messages in prop::collection::vec(any::<String>(), 0..5)) {
        let want: usize = messages.iter().filter(|text| !text.starts_with("data:")).map(String::len).sum();
        let call = chat(json!({ "model": "m", "input": messages }).to_string()).unwrap();
        prop_assert_eq!(call.prompt(), text(want as u64));
        let mut given = 0;
        call.texts(&mut |text| given += text.text.len());
        prop_assert_eq!(given, want);
    }

    #[test]
    fn accepted_is_exactly_what_serde_json_accepts(request in request(), at: prop::sample::Index, byte in any::<u8>()) {
        let mut body = request.to_string().into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        if let Ok(call) = chat(body.clone()) {
            let value: Value = serde_json::from_slice(&body).unwrap_or_else(|_| json!({ "model": call.model() }));
            prop_assert_eq!(value["model"].as_str(), Some(call.model()));
        } else if let Ok(value) = serde_json::from_slice::<Value>(&body) {
            let error = error(body);
            prop_assert!(!matches!(error, CallError::NotJson(_)), "{value}: {error}");
        }
    }

    #[test]
    fn nothing_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = chat(body);
    }
}
