//! Malformed requests: refused as the contract says, with an error that SDKs can read, and nothing of them at the provider.

mod support;

use std::time::{Duration, Instant};

use support::{
    Conn, Provider, Tollgate, chat, chat_config, json_answer, openai, post, question, request, soon,
};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
const MIB: u64 = 1 << 20;
const PATH: &str = "/v1/chat/completions";

async fn start(server: &str) -> (Provider, Tollgate) {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let gateway = Tollgate::start_with(server, &chat_config(&[openai(&provider)]), &[]).await;
    // Warm: what is allocated once is allocated now.
    assert_eq!(post(gateway.data, &chat(&question(false))).await.status, 200);
    (provider, gateway)
}

/// Still serving, and no larger than `before` by more than `mib`.
async fn unharmed(gateway: &mut Tollgate, before: u64, mib: u64) {
    assert!(gateway.is_alive());
    assert_eq!(post(gateway.data, &chat(&question(false))).await.status, 200);
    let grown = gateway.resident_bytes().saturating_sub(before);
    println!("resident: {} KiB more", grown / 1024);
    assert!(grown < mib * MIB, "{grown} bytes more");
    let metrics = gateway.metrics_become(|metrics| metrics.sum("http_requests_in_flight", "") == 0.0).await;
    assert_eq!(metrics.sum("streams_aborted_total", "panic"), 0.0);
}

/// A head with chat's path and alice's key, then `rest`.
fn head(rest: &str) -> String {
    format!("POST {PATH} HTTP/1.1\r\nAuthorization: Bearer sk-alice\r\n{rest}")
}

#[tokio::test]
async fn bodies_that_are_no_request_are_400() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let nested = |open: &str, close: &str, depth: usize| {
        format!(r#"{{"model":"chat","messages":{}{}}}"#, open.repeat(depth), close.repeat(depth))
    };
    let million = 1_000_000;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing but [", "[".repeat(million).into()),
        ("nothing but {\"a\":", "{\"a\":".repeat(million).into()),
        ("[ in a request, closed", nested("[", "]", million).into()),
        ("[ in a request, open", nested("[", "", million).into()),
        ("{ in a request", nested("{\"a\":", "}", million).into()),
        ("128 more than one", nested("[", "]", 128).into()),
        (
            "deep in a member unknown",
            format!(r#"{{"model":"chat","x":{}{}}}"#, "[".repeat(200), "]".repeat(200)).into(),
        ),
        ("bad UTF-8", b"{\"model\":\"chat\",\"messages\":[\"\xff\"]}".to_vec()),
        ("overlong UTF-8", b"{\"model\":\"chat\",\"messages\":[\"\xc0\xaf\"]}".to_vec()),
        ("UTF-8 surrogate", b"{\"model\":\"chat\",\"messages\":[\"\xed\xa0\x80\"]}".to_vec()),
        ("two models", br#"{"model":"chat","model":"chat"}"#.to_vec()),
        ("two models, one escaped", br#"{"model":"chat","mod\u0065l":"other"}"#.to_vec()),
        ("two streams", br#"{"model":"chat","stream":false,"stream":true}"#.to_vec()),
        ("no model", br#"{"messages":[]}"#.to_vec()),
        ("empty model", br#"{"model":""}"#.to_vec()),
        ("null model", br#"{"model":null}"#.to_vec()),
        ("list as model", br#"{"model":["chat"]}"#.to_vec()),
        ("string as stream", br#"{"model":"chat","stream":"true"}"#.to_vec()),
        ("list", br#"[{"model":"chat"}]"#.to_vec()),
        ("more after it", br#"{"model":"chat"}{"model":"chat"}"#.to_vec()),
        ("comma at the end", br#"{"model":"chat",}"#.to_vec()),
        ("cut", br#"{"model":"chat","messages":["#.to_vec()),
        ("byte order mark", b"\xef\xbb\xbf{\"model\":\"chat\"}".to_vec()),
        ("control character", b"{\"model\":\"ch\nat\"}".to_vec()),
        ("form", b"model=chat".to_vec()),
        ("zeroes", vec![0; 1_000]),
        ("empty", Vec::new()),
    ];
    for (what, body) in cases {
        let headers = [("Authorization", "Bearer sk-alice")];
        let asked = Instant::now();
        let answer = post(gateway.data, &request("POST", PATH, &headers, &body)).await;
        assert_eq!(answer.status, 400, "{what}: {}", answer.text());
        assert_eq!(
            (answer.code(), &answer.json()["error"]["type"]),
            (serde_json::Value::Null, &"invalid_request_error".into())
        );
        assert!(asked.elapsed() < Duration::from_secs(5), "{what}: {:?}", asked.elapsed());
    }
    assert_eq!(provider.hits(), 1);
    // As deep as is allowed: the object, its messages and 126 in them.
    assert_eq!(post(gateway.data, &chat(&nested("[", "]", 127))).await.status, 200);
    unharmed(&mut gateway, before, 32).await;
}

#[tokio::test]
async fn random_damage_is_answered() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let mut random = fastrand::Rng::with_seed(11);
    let whole = question(true).into_bytes();
    let mut conn = Conn::open(gateway.data).await;
    for _ in 0..1_000 {
        let mut body = whole.clone();
        for _ in 0..random.usize(1..5) {
            let at = random.usize(..body.len());
            match random.u8(..3) {
                0 => body[at] = random.u8(..),
                1 => drop(body.remove(at)),
                _ => body.insert(at, random.u8(..)),
            }
        }
        conn.send(&request("POST", PATH, &[("Authorization", "Bearer sk-alice")], &body)).await;
        let answer = conn.response().await;
        assert!(
            [200, 400, 404].contains(&answer.status),
            "{}: {}",
            answer.status,
            String::from_utf8_lossy(&body)
        );
    }
    println!("{} of them were requests", provider.hits() - 1);
    unharmed(&mut gateway, before, 16).await;
}

#[tokio::test]
async fn heads_too_large_are_431() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let long = "x".repeat(400_000);
    let many: String = (0..20_000).map(|number| format!("X-{number}: {number}\r\n")).collect();
    let hundred_one: String = (0..101).map(|number| format!("X-{number}: 1\r\n")).collect();
    for (what, bytes) in [
        ("one value", head(&format!("Host: g\r\nX-Long: {long}\r\n\r\n"))),
        ("one name", head(&format!("Host: g\r\n{long}: x\r\n\r\n"))),
        ("many lines", head(&format!("Host: g\r\n{many}\r\n"))),
        ("101 lines", head(&format!("Host: g\r\n{hundred_one}\r\n"))),
        ("target", format!("GET /{long} HTTP/1.1\r\nHost: g\r\n\r\n")),
        ("no end", head(&format!("Host: g\r\nX-Long: {long}"))),
    ] {
        let mut conn = Conn::open(gateway.data).await;
        let _ = conn.send_what_goes(bytes.as_bytes()).await;
        let answer = conn.response().await;
        assert_eq!(answer.status, 431, "{what}");
        assert!(!answer.body.is_empty(), "{what}: {answer:?}");
        answer.code();
        conn.closed().await;
    }
    assert_eq!(provider.hits(), 1);
    unharmed(&mut gateway, before, 16).await;
}

#[tokio::test]
async fn framing_that_two_parsers_could_read_in_two_ways_is_refused() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let inner = String::from_utf8(chat(&question(false))).expect("ASCII");
    let length = inner.len();
    for rest in [
        "Host: a\r\nHost: b\r\n\r\n".to_owned(),
        "Host: a\r\nhost: a\r\n\r\n".to_owned(),
        "\r\n".to_owned(),
        format!("Host: g\r\nContent-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        format!("Host: g\r\nTransfer-Encoding: chunked\r\nContent-Length: {length}\r\n\r\n0\r\n\r\n"),
        "Host: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n".to_owned(),
        "Host: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Host: g\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Host: g\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Host: g\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: 0, 0\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: +0\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: -1\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: 0x10\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: 18446744073709551616\r\n\r\n".to_owned(),
        "Host: g\nContent-Length: 0\r\n\r\n".to_owned(),
        "Host: g\r\nContent-Length: 0\n\n".to_owned(),
        "Host: g\r\nX: a\rb\r\n\r\n".to_owned(),
        "Host: g\r\nX: a\0b\r\n\r\n".to_owned(),
        "Host: g\r\nX y: a\r\n\r\n".to_owned(),
        "Host: g\r\n: a\r\n\r\n".to_owned(),
    ] {
        // What follows is a request to whoever reads the framing in the other way.
        let mut conn = Conn::ask(gateway.data, format!("{}{inner}", head(&rest)).as_bytes()).await;
        let answer = conn.response().await;
        assert_eq!(answer.status, 400, "{rest:?}: {}", answer.text());
        answer.code();
        assert_eq!(soon("the connection is closed", conn.closed()).await, b"", "{rest:?}");
    }
    let malformed = head("Host: g\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n");
    let mut conn = Conn::ask(gateway.data, format!("{malformed}{inner}").as_bytes()).await;
    assert_eq!(conn.response().await.status, 400);
    assert_eq!(soon("the connection is closed", conn.closed()).await, b"");
    assert_eq!(provider.hits(), 1, "nothing of it came to the provider");
    unharmed(&mut gateway, before, 16).await;
}

#[tokio::test]
async fn only_the_exact_path_is_one() {
    let (provider, gateway) = start("").await;
    for path in [
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/comp%6cetions",
        "/%76%31/chat/completions",
        "/v1/chat%2Fcompletions",
        "/v1/chat/completions.",
        "/v1/chat/completions/",
        "/v1/chat/completions%20",
        "/V1/chat/completions",
        "/v1/Chat/Completions",
        "/v1/./chat/completions",
        "/v1/../v1/chat/completions",
        "/v1/chat/completions;a=b",
        "/v1/chat",
        "/chat/completions",
        "/metrics",
        "/livez",
        "/admin/config",
        "/",
    ] {
        let headers = [("Authorization", "Bearer sk-alice")];
        let answer = post(gateway.data, &request("POST", path, &headers, question(false).as_bytes())).await;
        assert_eq!((answer.status, answer.code()), (404, "unknown_url".into()), "{path}");
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "post"] {
        let answer = post(gateway.data, &request(method, PATH, &[], b"")).await;
        assert_eq!((answer.status, answer.code()), (405, "method_not_supported".into()), "{method}");
        assert_eq!(answer.header("allow"), Some("POST"));
    }
    assert_eq!(provider.hits(), 1);
}

#[tokio::test]
async fn compressed_bodies_are_415() {
    let (provider, gateway) = start("").await;
    for encoding in ["gzip", "br", "zstd", "deflate", "GZIP", "gzip, identity", "x"] {
        let headers = [("Authorization", "Bearer sk-alice"), ("Content-Encoding", encoding)];
        let answer = post(gateway.data, &request("POST", PATH, &headers, b"\x1f\x8b")).await;
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (415, &"invalid_request_error".into()));
        answer.code();
    }
    assert_eq!(provider.hits(), 1);
    let headers = [("Authorization", "Bearer sk-alice"), ("Content-Encoding", "identity")];
    let plain = request("POST", PATH, &headers, question(false).as_bytes());
    assert_eq!(post(gateway.data, &plain).await.status, 200);
}
