//! Hostile callers: too slow, too large, too many, too random. The process lives on and is no larger.

mod support;

use std::io;
use std::time::{Duration, Instant};

use support::{
    Conn, Gate, Provider, Response, SOON, Step, Tollgate, chat, chat_config, get, json_answer, openai, post,
    question, request, soon,
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

/// Sends byte by byte with pauses until the gateway has had enough; its answer, and when.
async fn drip(
    gateway: &Tollgate,
    first: &str,
    drops: &[u8],
    pause: Duration,
) -> (io::Result<Response>, Duration) {
    let started = Instant::now();
    let mut conn = Conn::ask(gateway.data, first.as_bytes()).await;
    let mut drops = drops.iter().cycle();
    loop {
        // The sender's own slowness is what is tested here.
        match tokio::time::timeout(pause, conn.try_response()).await {
            Ok(answer) => return (answer, started.elapsed()),
            Err(_) if started.elapsed() > SOON => panic!("still served after {:?}", started.elapsed()),
            Err(_) => drop(conn.send_what_goes(&[*drops.next().expect("a cycle")]).await),
        }
    }
}

#[tokio::test]
async fn slow_senders_are_sent_away_and_hold_nobody_up() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let pause = Duration::from_millis(400);
    let silent = async {
        let started = Instant::now();
        let mut conn = Conn::open(gateway.data).await;
        let said = soon("silence ends", conn.closed()).await;
        (said, started.elapsed())
    };
    let body = head("Host: g\r\nContent-Length: 100000\r\n\r\n");
    let chunked = head("Host: g\r\nTransfer-Encoding: chunked\r\n\r\n");
    // What came early buys no time for what does not come.
    let ahead = body.clone() + &" ".repeat(90_000);
    let ((said, silence), headers, drops, standstill, prepaid, chunks, ()) = tokio::join!(
        silent,
        drip(&gateway, "POST ", b"x", pause),
        drip(&gateway, &body, b" ", pause),
        drip(&gateway, &body, b"", Duration::from_secs(3_600)),
        drip(&gateway, &ahead, b"", Duration::from_secs(3_600)),
        drip(&gateway, &chunked, b"1\r\nx\r\n", pause),
        async {
            for _ in 0..20 {
                assert_eq!(post(gateway.data, &chat(&question(false))).await.status, 200);
            }
        },
    );
    assert!(said.is_empty());
    assert!(silence >= Duration::from_millis(4_900) && silence < Duration::from_secs(8), "{silence:?}");
    for (what, (answer, took)) in [
        ("headers", headers),
        ("body", drops),
        ("no body", standstill),
        ("a body ahead of its time", prepaid),
        ("chunks", chunks),
    ] {
        let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
        println!("{what}: {} after {took:?}", answer.status);
        assert_eq!(answer.status, 408, "{what}");
        answer.code();
        assert!(took >= Duration::from_millis(9_900) && took < Duration::from_secs(15), "{what}: {took:?}");
    }
    assert_eq!(provider.hits(), 21);
    unharmed(&mut gateway, before, 16).await;
}

#[tokio::test]
async fn a_gigabyte_is_refused_without_being_read() {
    let (provider, mut gateway) = start("").await;
    let before = gateway.resident_bytes();
    let megabyte = vec![b' '; MIB as usize];
    for framing in
        ["Content-Length: 1073741824", "Content-Length: 9223372036854775807", "Transfer-Encoding: chunked"]
    {
        for expects in ["", "Expect: 100-continue\r\n"] {
            let mut conn =
                Conn::ask(gateway.data, head(&format!("Host: g\r\n{framing}\r\n{expects}\r\n")).as_bytes())
                    .await;
            let chunked = framing.starts_with('T');
            let mut sent = 0;
            while sent < 1024 && (chunked || sent < 1) {
                if chunked && conn.send_what_goes(&support::chunk(&megabyte)).await.is_err() {
                    break;
                }
                sent += 1;
            }
            println!("{framing}: {sent} MiB sent");
            assert!(sent < 64, "{framing}: {sent} MiB were taken");
            match conn.try_response().await {
                Ok(answer) if chunked && answer.status == 100 => {}
                Ok(answer) => {
                    assert_eq!(answer.status, 413, "{framing} {expects}");
                    answer.code();
                }
                // Sending on into a closed connection may reset it before its answer is read.
                Err(error) => assert!(chunked, "{framing}: {error}"),
            }
        }
    }
    assert_eq!(provider.hits(), 1);
    unharmed(&mut gateway, before, 48).await;
}

#[tokio::test]
async fn requests_that_wait_behind_one_take_little() {
    const CALLERS: usize = 200;
    let gate = Gate::new();
    let hold = vec![Step::Wait(gate.clone()), Step::Send(json_answer("200 OK", "", ANSWER))];
    let provider = Provider::start(move |seen| match seen.json()["n"].as_u64() {
        Some(_) => hold.clone(),
        None => vec![Step::Send(json_answer("200 OK", "", ANSWER))],
    })
    .await;
    let mut gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    assert_eq!(post(gateway.data, &chat(&question(false))).await.status, 200);
    let before = gateway.resident_bytes();
    let body = question(false).replacen('{', r#"{"n":1,"#, 1);
    let first = head(&format!("Host: g\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n", body.len()));
    // As small as requests can be; they come with the body of the one that is served.
    let burst = body + &"G / HTTP/1.0\r\n\r\n".repeat(4 * 1024);
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let mut conn = Conn::ask(gateway.data, first.as_bytes()).await;
        assert_eq!(conn.head().await.status, 100);
        // What the gateway does not read stays in the socket, which has room.
        conn.send(burst.as_bytes()).await;
        callers.push(conn);
    }
    gate.reached(CALLERS).await;
    let grown = gateway.resident_bytes().saturating_sub(before);
    println!("resident: {} KiB more for each", grown / 1024 / CALLERS as u64);
    assert!(grown < 32 * MIB, "{grown} bytes more");
    gate.open();
    drop(callers);
    unharmed(&mut gateway, before, 32).await;
}

#[tokio::test]
async fn the_bound_on_a_body_is_exact() {
    let (_provider, gateway) = start("  max_body: 100KB\n  max_upload: 200KB\n").await;
    let padded = |length: usize| {
        let mut body = question(false).into_bytes();
        body.resize(length, b' ');
        body
    };
    for (length, status) in [(100_000, 200), (100_001, 413)] {
        let body = padded(length);
        let sized = chat(std::str::from_utf8(&body).expect("ASCII"));
        assert_eq!(post(gateway.data, &sized).await.status, status);
        let first = head("Host: g\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
        let pieces = body.chunks(4_096).flat_map(support::chunk);
        let chunked: Vec<u8> = first.into_iter().chain(pieces).chain(support::chunk(b"")).collect();
        assert_eq!(post(gateway.data, &chunked).await.status, status, "in chunks");
    }
}

#[tokio::test]
async fn connections_of_one_address_are_bounded() {
    let (_provider, gateway) = start("  max_connections_per_ip: 10\n").await;
    gateway.metrics_become(|metrics| metrics.value("connections") == 1.0).await;
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut conn = Conn::ask(gateway.data, &request("GET", "/v1/models", &[], b"")).await;
        assert_eq!(conn.response().await.status, 401);
        held.push(conn);
    }
    let mut eleventh = Conn::open(gateway.data).await;
    assert_eq!(soon("it is closed", eleventh.closed()).await, b"");
    assert_eq!(get(gateway.admin, "/livez").await.status, 200, "operators always get in");
    held.pop();
    soon("a place is free", async {
        while Conn::ask(gateway.data, &request("GET", "/v1/models", &[], b""))
            .await
            .try_response()
            .await
            .is_err()
        {}
    })
    .await;
}

#[tokio::test]
async fn junk_makes_no_series_and_secrets_stay_secret() {
    let (_provider, gateway) = start("").await;
    let canary = "canary-7f3a";
    let series = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    let junk = async |number: usize| {
        let bearer = format!("Bearer {canary}-{number}");
        let unknown = format!(r#"{{"model":"{canary}-{number}","messages":["{canary}"]}}"#);
        let path = format!("/v1/{canary}-{number}");
        let agent = format!("{canary}-{number}");
        for bytes in [
            chat(&unknown),
            request("POST", PATH, &[("Authorization", &bearer)], unknown.as_bytes()),
            request("POST", &path, &[("User-Agent", &agent)], b"{}"),
            request(&format!("M{number}"), PATH, &[], b""),
            chat(&question(false).replace("Hello", canary)),
        ] {
            post(gateway.data, &bytes).await;
        }
    };
    junk(0).await;
    gateway.requests_logged(6).await;
    let before = gateway.metrics().await.0;
    for number in 1..100 {
        junk(number).await;
    }
    gateway.requests_logged(501).await;
    let after = gateway.metrics().await.0;
    assert_eq!(series(&before), series(&after));
    assert!(!after.contains(canary) && !after.contains("sk-"));
    for line in gateway.lines() {
        assert!(!line.to_string().contains(canary) && !line.to_string().contains("sk-"), "{line}");
    }
}

/// One frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A chat request of alice's on this stream. HPACK: POST, http, :path, :authority, authorization; literals without
/// indexing (RFC 7541, 6.2.2).
fn h2_chat(stream: u32) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).expect("short")][..], text.as_bytes()].concat();
    let (path, host, key) = (text(PATH), text("gateway"), text("Bearer sk-alice"));
    let fields = [&[0x83, 0x86, 0x04][..], &path, &[0x01], &host, &[0x0f, 0x08], &key].concat();
    [frame(1, 4, stream, &fields), frame(0, 1, stream, question(true).as_bytes())].concat()
}

fn h2_reset(stream: u32) -> Vec<u8> {
    frame(3, 0, stream, &8u32.to_be_bytes())
}

/// HTTP/2 in clear text: streams opened, asked on and reset, all at once and one after the other.
#[tokio::test]
async fn rapid_resets_leave_nothing_behind() {
    const AT_ONCE: u32 = 5_000;
    const IN_TURN: u32 = 200;
    let provider = Provider::always(vec![Step::Hang]).await;
    let mut gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let before = gateway.resident_bytes();
    let hello = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, b"")].concat();
    let mut burst = hello.clone();
    for stream in (1..2 * AT_ONCE).step_by(2) {
        burst.extend(h2_chat(stream));
        burst.extend(h2_reset(stream));
    }
    for _ in 0..3 {
        let mut conn = Conn::open(gateway.data).await;
        let _ = conn.send_what_goes(&burst).await;
        soon("who resets so much is sent away", conn.closed()).await;
    }
    let early = provider.hits();
    let mut conn = Conn::ask(gateway.data, &hello).await;
    for number in 0..IN_TURN {
        conn.send(&h2_chat(2 * number + 1)).await;
        let seen = provider.request(early + number as usize).await;
        conn.send(&h2_reset(2 * number + 1)).await;
        seen.closed().await;
    }
    conn.leave();
    let idle = |metrics: &support::Metrics| {
        metrics.sum("http_requests_in_flight", "") == 0.0 && metrics.value("connections") <= 1.0
    };
    let metrics = gateway.metrics_become(idle).await;
    provider.connections_become(|open| open == 0).await;
    let counted = metrics.sum("http_requests_total", PATH) as usize;
    println!("{} streams: {counted} requests, {} at the provider", 3 * AT_ONCE + IN_TURN, provider.hits());
    assert!(provider.hits() <= counted, "nothing reaches a provider uncounted");
    assert_eq!(gateway.requests_logged(counted).await.len(), counted);
    assert!(gateway.is_alive());
    assert_eq!(post(gateway.data, &request("GET", "/v1/models", &[], b"")).await.status, 401);
    let grown = gateway.resident_bytes().saturating_sub(before);
    assert!(grown < 48 * MIB, "{grown} bytes more");
}
