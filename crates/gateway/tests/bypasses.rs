//! Ways around a limit, each closed: what is asked for differently is counted the same.

mod support;

use support::{
    Ask, Conn, Response, Store, Tollgate, governed, obedient, post, request, start_counting, start_governed,
};

const CHAT: &str = Ask::CHAT;

const USED: &str = r#","x_usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}"#;
const MILLION: u64 = 1_000_000;
const TOKENS: &str = "limits: [{ name: r, per: ip, limit: 1M tokens/day }]";
const PER_IP: &str = "r-tokens-day";
const REQUESTS: &str = "limits: [{ name: r, per: user, limit: 1M/day }]";
const PER_USER: &str = "r-requests-day";

/// Sends a chat request of alice's with other headers than usual.
async fn with_headers(gateway: &Tollgate, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
    post(gateway.data, &request(method, target, headers, br#"{"model":"chat","messages":[]}"#)).await
}

#[tokio::test]
async fn what_a_request_may_write_is_reserved_and_what_it_wrote_is_counted() {
    let provider = obedient().await;
    let gateway = start_governed(&Store::Memory, &provider, TOKENS).await;
    let (chat, text) = (CHAT, "/v1/completions");
    let rows = [
        (chat, "", 512),
        (chat, r#","max_tokens":null"#, 512),
        (chat, r#","max_tokens":100"#, 100),
        // Nothing is no bound to some servers.
        (chat, r#","max_tokens":0"#, 512),
        (chat, r#","max_tokens":99.5"#, 100),
        (chat, r#","max_tokens":1,"max_completion_tokens":100"#, 100),
        (chat, r#","max_tokens":100,"max_completion_tokens":1"#, 100),
        (text, r#","max_tokens":100"#, 100),
        // What cannot be is the most or the least that can.
        (chat, r#","max_tokens":1e30"#, MILLION),
        (chat, r#","max_tokens":18446744073709551615"#, MILLION),
        (chat, r#","max_tokens":99999999999999999999999999"#, MILLION),
        (chat, r#","max_tokens":-1"#, 512),
        // Several answers.
        (chat, r#","max_tokens":100,"n":5"#, 500),
        (chat, r#","n":2"#, 1_024),
        (chat, r#","max_tokens":100,"n":0"#, 100),
        (chat, r#","max_tokens":100,"n":-7"#, 100),
        (chat, r#","max_tokens":100,"n":1e30"#, 12_800),
        (chat, r#","max_tokens":18446744073709551615,"n":128"#, MILLION),
        (text, r#","max_tokens":100,"best_of":7"#, 700),
        (text, r#","max_tokens":100,"best_of":2,"n":3"#, 300),
        // Several prompts: of two tokens each, and of one byte each.
        (text, r#","max_tokens":100,"n":2,"prompt":[[1,2],[3,4],[5,6]]"#, 606),
        (text, r#","max_tokens":100,"n":2,"prompt":["a","b","c"]"#, 601),
    ];
    for (number, (path, body, reserved)) in rows.into_iter().enumerate() {
        let (ip, body) = (format!("203.0.113.{number}"), format!("{body}{USED}"));
        let ask = Ask { path, body: &body, ip: &ip, ..Ask::PLAIN };
        let answer = ask.send(&gateway).await;
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        assert_eq!(answer.number("x-ratelimit-remaining-tokens"), MILLION - reserved, "{body}");
        ask.level_becomes(&gateway, PER_IP, 3).await;
    }
    for body in [r#","max_tokens":"many""#, r#","max_tokens":[1]"#, r#","n":true"#, r#","best_of":{}"#] {
        let refused = Ask { body, ..Ask::PLAIN }.send(&gateway).await;
        assert_eq!((refused.status, refused.code()), (400, serde_json::Value::Null), "{body}");
    }
    assert_eq!(provider.hits(), rows.len());
}

#[tokio::test]
async fn an_absurd_bound_locks_nobody_out() {
    let provider = obedient().await;
    let gateway = start_governed(&Store::Memory, &provider, TOKENS).await;
    let body = format!(r#","max_tokens":1e30,"n":128{USED}"#);
    let absurd = Ask { body: &body, ..Ask::PLAIN };
    assert_eq!(absurd.send(&gateway).await.status, 200);
    absurd.level_becomes(&gateway, PER_IP, 3).await;
    let reserved = gateway.metrics().await.sum("rate_limit_tokens_total", r#"kind="reserved""#);
    assert_eq!(reserved, MILLION as f64, "no more is taken than the limit has");
    // The whole of a limit does not fit into what is left of it: not now, which is not never.
    let refused = absurd.send(&gateway).await;
    assert_eq!((refused.status, refused.code()), (429, "rate_limit_exceeded".into()));
    assert!(refused.number("retry-after") > 0);
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
}

#[tokio::test]
async fn a_stream_is_settled_whether_or_not_its_client_wants_to_know() {
    let provider = obedient().await;
    let gateway = start_governed(&Store::Memory, &provider, TOKENS).await;
    let mut used = 0;
    for (options, told) in [
        ("", false),
        (r#","stream_options":null"#, false),
        (r#","stream_options":{}"#, false),
        (r#","stream_options":{"include_usage":false}"#, false),
        (r#","stream_options":{"include_usage":null}"#, false),
        (r#","stream_options":{"include_usage":true}"#, true),
    ] {
        let body = format!(r#","stream":true{options}{USED}"#);
        let answer = Ask { body: &body, ..Ask::PLAIN }.send(&gateway).await;
        assert_eq!(answer.status, 200, "{options}");
        assert_eq!(answer.text().contains(r#""total_tokens":3"#), told, "{options}: {}", answer.text());
        used += 3;
        Ask::PLAIN.level_becomes(&gateway, PER_IP, used).await;
    }
    for options in
        [r#""off""#, "false", r#"{"include_usage":"no"}"#, r#"{"include_usage":true,"include_usage":false}"#]
    {
        let body = format!(r#","stream":true,"stream_options":{options}"#);
        assert_eq!(Ask { body: &body, ..Ask::PLAIN }.send(&gateway).await.status, 400, "{options}");
    }
    assert_eq!(Ask::PLAIN.level(&gateway, PER_IP).await, used);
}

#[tokio::test]
async fn another_name_for_a_model_is_the_same_counter() {
    let provider = obedient().await;
    let limits = "limits: [{ name: r, match: { model: chat }, per: model, limit: 3/day }]";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    for (model, status) in [
        ("chat", 200),
        ("gpt-4o-mini", 200),
        // The same name, written otherwise.
        (r"gpt\u002d4o\u002dmini", 200),
        ("gpt-4o-mini", 429),
        ("chat", 429),
        ("Chat", 404),
        ("chat ", 404),
        ("GPT-4o-mini", 404),
        ("gpt-4o-mini\\u0000", 404),
        ("", 400),
        ("other", 200),
    ] {
        assert_eq!(Ask { model, ..Ask::PLAIN }.send(&gateway).await.status, status, "{model}");
    }
    assert_eq!(provider.hits(), 4);
}

#[tokio::test]
async fn a_user_is_not_the_team_of_that_name() {
    let provider = obedient().await;
    let gateway =
        start_governed(&Store::Memory, &provider, "limits: [{ name: r, per: team, limit: 2/day }]").await;
    for (key, status) in [
        ("sk-alice", 200),
        ("sk-carol", 200),
        ("sk-alice", 429),
        ("sk-red", 200),
        ("sk-red", 200),
        ("sk-red", 429),
    ] {
        assert_eq!(Ask { key, ..Ask::PLAIN }.send(&gateway).await.status, status, "{key}");
    }
}

#[tokio::test]
async fn what_two_readers_could_understand_differently_is_refused() {
    let provider = obedient().await;
    let gateway = start_governed(&Store::Memory, &provider, REQUESTS).await;
    for body in [
        r#"{"model":"other","model":"chat"}"#,
        r#"{"model":"other","\u006dodel":"chat"}"#,
        r#"{"model":"other","Model":"chat"}"#,
        r#"{"model":"chat","max_tokens":1,"max_tokens":1000}"#,
        r#"{"model":"chat","n":1,"N":100}"#,
        r#"{"model":"chat"} {"model":"other"}"#,
        r#"{"model":"chat"}x"#,
        "{\"model\":\"chat\"}\0",
        r#"[{"model":"chat"}]"#,
        r#"{"model":["chat"]}"#,
        r#"{"messages":[]}"#,
    ] {
        let refused =
            post(gateway.data, &request("POST", CHAT, &[("X-API-Key", "sk-alice")], body.as_bytes())).await;
        assert_eq!(refused.status, 400, "{body}: {}", refused.text());
    }
    assert_eq!(provider.hits(), 0);
    assert_eq!(Ask::PLAIN.level(&gateway, PER_USER).await, 0);
}

#[tokio::test]
async fn credentials_in_several_headers() {
    let provider = obedient().await;
    let gateway = start_governed(&Store::Memory, &provider, REQUESTS).await;
    let ask = |headers: &'static [(&str, &str)]| with_headers(&gateway, "POST", CHAT, headers);
    for headers in [
        &[("Authorization", "Bearer sk-alice"), ("X-API-Key", "sk-bob")][..],
        &[("X-API-Key", "sk-bob"), ("Authorization", "Bearer sk-alice")],
        &[("authorization", "Bearer sk-alice"), ("Authorization", "Bearer sk-bob")],
        &[("x-api-key", "sk-alice"), ("X-Api-Key", "sk-bob")],
        &[("Authorization", "Bearer sk-alice"), ("X-API-Key", "")],
        &[("Authorization", "Basic c2stYm9i"), ("X-API-Key", "sk-alice")],
    ] {
        let refused = ask(headers).await;
        assert_eq!((refused.status, refused.code()), (400, "ambiguous_credentials".into()), "{headers:?}");
    }
    // A key that is none does not make its sender anonymous.
    for headers in [
        &[("Authorization", "Basic c2stYWxpY2U=")][..],
        &[("Authorization", "Bearer sk-Alice")],
        &[("X-API-Key", "")],
        &[("Authorization", "Bearer")],
    ] {
        let refused = ask(headers).await;
        assert_eq!((refused.status, refused.code()), (401, "invalid_api_key".into()), "{headers:?}");
    }
    assert_eq!(Ask::PLAIN.level(&gateway, PER_USER).await, 0);
    let good: [&[(&str, &str)]; 6] = [
        &[("Authorization", "Bearer sk-alice"), ("X-API-Key", "sk-alice")],
        &[("AUTHORIZATION", "bearer sk-alice")],
        &[("aUTHORIZATION", "BEARER   sk-alice ")],
        &[("X-API-KEY", "sk-alice")],
        &[("x-api-key", " sk-alice")],
        &[("x-aPI-kEY", "sk-alice-2")],
    ];
    for (count, headers) in good.into_iter().enumerate() {
        let answer = ask(headers).await;
        assert_eq!(answer.status, 200, "{headers:?}: {}", answer.text());
        assert_eq!(
            answer.number("x-ratelimit-remaining-requests"),
            MILLION - 1 - count as u64,
            "{headers:?}"
        );
    }
}

#[tokio::test]
async fn methods_and_paths_have_one_spelling() {
    let provider = obedient().await;
    let limits =
        format!("{REQUESTS}\n").replace("per: user", "match: { endpoint: /v1/chat/completions }, per: user");
    let gateway = start_governed(&Store::Memory, &provider, &limits).await;
    let key = ("Authorization", "Bearer sk-alice");
    let mut granted = 0;
    for (method, target, headers, status) in [
        ("POST", CHAT, &[key][..], 200),
        ("POST", "/api/v1/chat", &[key], 200),
        ("POST", "/v1/chat/completions?path=/v1/models", &[key], 200),
        ("POST", "http://gateway/v1/chat/completions", &[key], 200),
        ("POST", CHAT, &[key, ("X-HTTP-Method-Override", "GET")], 200),
        ("POST", CHAT, &[key, ("X-Method-Override", "OPTIONS"), ("X-HTTP-Method", "HEAD")], 200),
        ("POST", CHAT, &[key, ("X-Original-URL", "/v1/models"), ("X-Rewrite-URL", "/v1/models")], 200),
        ("GET", CHAT, &[key, ("X-HTTP-Method-Override", "POST")], 405),
        ("PUT", CHAT, &[key], 405),
        ("post", CHAT, &[key], 405),
        ("POST", "//v1/chat/completions", &[key], 404),
        ("POST", "/v1//chat/completions", &[key], 404),
        ("POST", "/v1/chat/completions/", &[key], 404),
        ("POST", "/v1/chat/completions.", &[key], 404),
        ("POST", "/v1/chat/completions;a=b", &[key], 404),
        ("POST", "/V1/Chat/Completions", &[key], 404),
        ("POST", "/v1/chat/comp%6cetions", &[key], 404),
        ("POST", "/v1%2Fchat/completions", &[key], 404),
        ("POST", "/v1/./chat/completions", &[key], 404),
        ("POST", "/v1/models/../chat/completions", &[key], 404),
        ("POST", "/api/v1/chat/", &[key], 404),
        ("POST", "/api/v1/chat/completions", &[key], 404),
        ("POST", "/v1/models", &[key, ("X-Original-URL", CHAT)], 405),
    ] {
        let answer = with_headers(&gateway, method, target, headers).await;
        assert_eq!(answer.status, status, "{method} {target} {headers:?}: {}", answer.text());
        granted += u64::from(status == 200);
        assert_eq!(Ask::PLAIN.level(&gateway, PER_USER).await, granted, "{method} {target} {headers:?}");
        assert_eq!(provider.hits() as u64, granted);
    }
}

#[tokio::test]
async fn an_address_is_not_what_a_stranger_says_it_is() {
    let provider = obedient().await;
    let rest =
        "models: [{ name: chat, providers: [*upstream] }]\nlimits: [{ name: r, per: ip, limit: 2/day }]";
    let untrusting = Tollgate::start(&governed(&Store::Memory, &provider, rest)).await;
    let trusting = start_counting(&Store::Memory, &provider, rest).await;
    for number in 0..4 {
        let made_up = format!("198.51.100.{number}");
        let forwarded = format!("for={made_up}");
        let headers = [
            ("X-Forwarded-For", made_up.as_str()),
            ("x-forwarded-for", &made_up),
            ("X-Real-IP", &made_up),
            ("Forwarded", &forwarded),
            ("CF-Connecting-IP", &made_up),
            ("True-Client-IP", &made_up),
        ];
        let answer = with_headers(&untrusting, "POST", CHAT, &headers).await;
        assert_eq!(answer.status, if number < 2 { 200 } else { 429 }, "from a stranger, {number}");

        // A trusted proxy adds whom it saw; what stands before that is the caller's own invention.
        let spoofed = format!("{made_up}, 203.0.113.1");
        let headers =
            [("X-Forwarded-For", spoofed.as_str()), ("X-Real-IP", &made_up), ("Forwarded", &forwarded)];
        let answer = with_headers(&trusting, "POST", CHAT, &headers).await;
        assert_eq!(answer.status, if number < 2 { 200 } else { 429 }, "through a proxy, {number}");
    }
}

#[tokio::test]
async fn a_user_agent_is_free_to_change_and_its_address_is_not() {
    let provider = obedient().await;
    let limits = "limits:\n  - { name: anonymous, match: { authenticated: false }, per: session, limit: 2/day }\n  \
                  - { name: anonymous-ip, match: { authenticated: false }, per: ip, limit: 5/day }";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    for (agent, refused_by) in [
        ("a", None),
        ("a", None),
        ("a", Some("anonymous-requests-day")),
        ("b", None),
        ("c", None),
        ("d", None),
        ("e", Some("anonymous-ip-requests-day")),
        ("f", Some("anonymous-ip-requests-day")),
        // Both refuse, for the same time; the first one says so.
        ("a", Some("anonymous-requests-day")),
    ] {
        let answer = Ask { key: "", agent, ..Ask::PLAIN }.send(&gateway).await;
        let rule = (answer.status == 429).then(|| answer.json()["error"]["rule"].clone());
        assert_eq!(rule, refused_by.map(Into::into), "{agent}: {}", answer.text());
    }
    assert_eq!(Ask { key: "", ip: "203.0.113.2", ..Ask::PLAIN }.send(&gateway).await.status, 200);
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200, "a key is no stranger");
}

#[tokio::test]
async fn size_is_not_tokens() {
    let provider = obedient().await;
    let limits = "limits: [{ name: r, per: user, limit: 5_000 tokens/day }]";
    let gateway = start_governed(&Store::Memory, &provider, limits).await;
    let data = "QUJD".repeat(1 << 18);
    let parts = [
        format!(r#"{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}"#),
        format!(r#"{{"type":"image_url","image_url":"data:image/png;base64,{data}"}}"#),
        format!(r#"{{"type":"input_audio","input_audio":{{"data":"{data}","format":"wav"}}}}"#),
        format!(
            r#"{{"type":"file","file":{{"filename":"a.pdf","file_data":"data:application/pdf;base64,{data}"}}}}"#
        ),
    ];
    let mut used = 0;
    for part in parts {
        let text = r#"{"type":"text","text":"What is this?"}"#;
        let body =
            format!(r#","messages":[{{"role":"user","content":[{text},{part}]}}],"max_tokens":100{USED}"#);
        let answer = Ask { body: &body, ..Ask::PLAIN }.send(&gateway).await;
        assert_eq!(answer.status, 200, "{}: {}", &part[..40], answer.text());
        let left = answer.number("x-ratelimit-remaining-tokens");
        assert!((3_300..4_000).contains(&left), "{left}");
        used += 3;
        Ask::PLAIN.level_becomes(&gateway, "r-tokens-day", used).await;
    }

    let form = [
        &b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n"[..],
        &vec![b'a'; 20_000_000],
        b"\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nchat\r\n--b--\r\n",
    ]
    .concat();
    let headers = [("Authorization", "Bearer sk-alice"), ("Content-Type", "multipart/form-data; boundary=b")];
    let mut conn = Conn::open(gateway.data).await;
    conn.send(&request("POST", "/v1/audio/transcriptions", &headers, &form)).await;
    let answer = conn.response().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.number("x-ratelimit-remaining-tokens"), 5_000 - used, "a recording reserves nothing");
    Ask::PLAIN.level_becomes(&gateway, "r-tokens-day", used + 59).await;
    assert_eq!(Ask::PLAIN.send(&gateway).await.status, 200);
}
