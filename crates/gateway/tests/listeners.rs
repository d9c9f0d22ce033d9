//! Who may listen, how many, how slowly, over which protocol, and until when; and what limits said meanwhile.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use support::{
    Conn, Fleet, Listener, Provider, Redis, Response, SOON, Tollgate, chat, json_answer, post, question,
    request, soon,
};
use tokio::net::{TcpSocket, TcpStream};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
/// As many as may listen.
const LISTENERS_MAX: usize = 32;

const SIMULATED: &str = "users: [{ name: alice, keys: [sk-alice] }]\nsettings: { state: none }\n\
                         models: [{ name: chat, providers: [{ type: simulated }] }]\n";

async fn with_key(gateway: &Tollgate, path: &str, key: &str) -> Response {
    post(gateway.admin, &request("GET", path, &[("X-Admin-Key", key)], b"")).await
}

#[tokio::test]
async fn a_viewer_may_listen_and_nobody_else() {
    let keys =
        "  admin_key: sesame\n  admin_keys: [{ name: wall, role: viewer, key: only-looking-around }]\n";
    let gateway = Tollgate::start_with(keys, SIMULATED, &[]).await;
    for path in ["/admin/events", "/admin/requests"] {
        for key in ["", "wrong"] {
            let refused = with_key(&gateway, path, key).await;
            assert_eq!(
                (refused.status, refused.header("content-type")),
                (401, Some("application/problem+json"))
            );
        }
    }
    assert_eq!(with_key(&gateway, "/admin/requests", "only-looking-around").await.status, 200);
    let mut listener = Listener::with_key(&gateway, "", "only-looking-around").await;
    assert_eq!(listener.next_of("figures").await["state"], "serving");
}

#[tokio::test]
async fn so_many_listen_and_a_place_is_given_back() {
    let gateway = Tollgate::start(SIMULATED).await;
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS_MAX {
        listeners.push(Listener::open(&gateway, "?requests=true&figures=false").await);
    }
    let refused = with_key(&gateway, "/admin/events", "").await;
    assert_eq!((refused.status, refused.header("content-type")), (503, Some("application/problem+json")));
    assert!(refused.number("retry-after") > 0 && refused.text().contains("32 listen already"));
    listeners.pop().expect("a listener").conn.leave();
    let started = Instant::now();
    loop {
        let ask = request("GET", "/admin/events", &[], b"");
        if Conn::ask(gateway.admin, &ask).await.head().await.status == 200 {
            break;
        }
        assert!(started.elapsed() < SOON, "the place is not given back");
        // It is seen a moment after that the connection is gone; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The others go on.
    post(gateway.data, &chat(&question(false))).await;
    for listener in &mut listeners {
        assert_eq!(listener.next_of("request").await["user"], "alice");
    }
}

#[tokio::test]
async fn a_slow_listener_costs_nobody_anything_and_is_told_what_it_missed() {
    const CALLERS: usize = 8;
    const EACH: usize = 1_500;
    let gateway = Tollgate::start(SIMULATED).await;
    // It has room for little, and takes nothing.
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4_096).expect("a socket");
    let mut slow =
        Listener::on(socket.connect(gateway.admin).await.expect("a connection"), "?requests=true").await;
    let mut quick = Listener::open(&gateway, "?requests=true&figures=false").await;
    let following = tokio::spawn(async move {
        let (mut seen, mut lost) = (0, 0);
        while seen + lost < (CALLERS * EACH) as u64 {
            match quick.next().await.expect("it goes on") {
                (name, data) if name == "lost" => lost += data["requests"].as_u64().expect("a number"),
                _ => seen += 1,
            }
        }
        (seen, lost)
    });
    let before = gateway.resident_bytes();
    let callers = (0..CALLERS).map(|_| {
        let (data, id) = (gateway.data, "i".repeat(64));
        tokio::spawn(async move {
            let mut conn = Conn::open(data).await;
            for _ in 0..EACH {
                conn.send(&request("GET", "/v1/nothing", &[("X-Request-Id", &id)], b"")).await;
                assert_eq!(conn.response().await.status, 404);
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        soon("answers", caller).await.expect("callers do not panic");
    }
    let grown = gateway.resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more, with a listener that takes nothing");
    let (seen, lost) = soon("the quick one's events", following).await.expect("it does not panic");
    assert!(seen > 1_000, "one who reads sees the last ones at least: {seen}, not {lost}");

    let total = (CALLERS * EACH) as u64;
    let (mut seen, mut lost, mut figures) = (0, 0, 0);
    while seen + lost < total {
        match slow.next().await.expect("it goes on") {
            (name, data) if name == "lost" => lost += data["requests"].as_u64().expect("a number"),
            (name, _) if name == "figures" => figures += 1,
            _ => seen += 1,
        }
    }
    assert_eq!(seen + lost, total);
    assert!(lost > 0, "{seen} of {total} fitted into sockets: it was not slow");
    println!("slow: {seen} seen, {lost} lost, {figures} figures, {grown} bytes more");
}

#[tokio::test]
async fn the_end_is_told_to_who_listens() {
    let mut gateway = Tollgate::start(SIMULATED).await;
    let mut listener = Listener::open(&gateway, "?requests=true").await;
    gateway.sigterm();
    gateway.logged(|line| line["message"].as_str().is_some_and(|text| text.starts_with("ending"))).await;
    // Until listeners close it goes on as ever.
    post(gateway.data, &chat(&question(false))).await;
    let (mut seen, mut leaving) = (0, false);
    loop {
        let (name, data) = listener.next().await.expect("an end that is told");
        match name.as_str() {
            "request" => seen += 1,
            "figures" => leaving |= data["state"] == "leaving",
            "end" => {
                assert_eq!(data, json!({ "reason": "shutting_down" }));
                break;
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!((seen, leaving), (1, true));
    assert!(listener.next().await.is_none(), "nothing comes after it");
    assert!(gateway.ended(SOON).await.success());
}

#[tokio::test]
async fn events_come_over_http2_too() {
    let gateway = Tollgate::start(SIMULATED).await;
    let stream = TcpStream::connect(gateway.admin).await.expect("a connection");
    let (mut sender, driver) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    tokio::spawn(driver);
    let uri = format!("http://{}/admin/events?requests=true", gateway.admin);
    let ask = http::Request::get(uri).body(Empty::<Bytes>::new()).expect("a request");
    let answer = soon("an answer", sender.send_request(ask)).await.expect("an answer");
    assert_eq!((answer.status(), answer.version()), (http::StatusCode::OK, http::Version::HTTP_2));
    let mut body = answer.into_body();
    let mut said = String::new();
    soon("two seconds and a request", async {
        while said.matches("event: figures").count() < 2 || !said.contains("event: request") {
            if !said.contains("event: request") && said.contains("event: figures") {
                post(gateway.data, &chat(&question(false))).await;
            }
            let frame = body.frame().await.expect("it goes on").expect("it goes on");
            said += &String::from_utf8_lossy(&frame.into_data().expect("data"));
        }
    })
    .await;
}

/// What one limit said, by `GET /admin/limits/{name}`.
async fn live(gateway: &Tollgate, rule: &str) -> Value {
    let answer = with_key(gateway, &format!("/admin/limits/{rule}"), "").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn limits_say_what_they_said_and_who_is_fullest() {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let limits = "[{ name: r, per: user, limit: [3/day, 1000/week] }, { name: s, per: global, limit: 2/day, shadow: true }]";
    let fleet = Fleet::sharing(Redis::start(), 2, &provider, limits).await;
    let [one, other] = &fleet.gateways[..] else { panic!("two gateways") };
    let untouched = live(one, "r").await;
    assert_eq!(
        untouched["limits"][0]["live"],
        json!({ "allowed": 0, "refused": 0, "shadow": 0, "failed": 0, "fullest": null })
    );
    for (gateway, statuses) in [(one, &[200, 200][..]), (other, &[200, 429, 429])] {
        for status in statuses {
            assert_eq!(post(gateway.data, &chat(&question(false))).await.status, *status);
        }
    }
    let said = live(other, "r").await;
    let (day, week) = (&said["limits"][0]["live"], &said["limits"][1]["live"]);
    assert_eq!(
        (&day["allowed"], &day["refused"]),
        (&json!(1), &json!(2)),
        "counted by the one that is asked"
    );
    assert_eq!((&week["allowed"], &week["refused"]), (&json!(3), &json!(0)), "it had room each time");
    let shadow = live(other, "s").await;
    assert_eq!(
        (&shadow["limits"][0]["live"]["shadow"], &shadow["limits"][0]["live"]["refused"]),
        (&json!(3), &json!(0))
    );

    // What the fleet knows, every instance tells within a second or so.
    let started = Instant::now();
    loop {
        let said = live(one, "r").await;
        assert_eq!(
            (&said["limits"][0]["live"]["allowed"], &said["live"]["fullest_of"]),
            (&json!(2), &json!("fleet"))
        );
        let fullest = &said["limits"][0]["live"]["fullest"];
        if fullest["used"] == 3 {
            assert_eq!((&fullest["key"], &fullest["limit"]), (&json!("rate_limit:user:alice"), &json!(3)));
            break;
        }
        assert!(started.elapsed() < SOON, "{said}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let list = with_key(one, "/admin/limits", "").await.json();
    assert!(
        list["data"].as_array().is_some_and(|rules| rules.iter().all(|rule| rule["live"].is_object())),
        "{list}"
    );

    // And so do events: of this instance, and of all.
    let mut listener = Listener::open(one, "").await;
    let started = Instant::now();
    loop {
        let figures = listener.next_of("figures").await;
        if figures["fleet"]["requests"] == 5 && figures["instances"].as_array().map(Vec::len) == Some(2) {
            assert_eq!((&figures["fleet"]["refused"], &figures["requests"]["total"]), (&json!(2), &json!(2)));
            assert_eq!(
                (&figures["limits_of"], &figures["redis"]["connected"]),
                (&json!("fleet"), &json!(true))
            );
            break;
        }
        assert!(started.elapsed() < SOON, "{figures}");
    }
    // A reload keeps what was counted.
    assert_eq!(post(one.admin, &request("POST", "/admin/config/reload", &[], b"")).await.status, 200);
    assert_eq!(live(one, "r").await["limits"][0]["live"]["allowed"], 2);
}

#[tokio::test]
async fn figures_go_on_while_redis_is_away() {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let mut fleet =
        Fleet::sharing(Redis::start(), 1, &provider, "[{ name: r, per: user, limit: 100/day }]").await;
    let mut listener = Listener::open(&fleet.gateways[0], "").await;
    soon("the fleet is heard", async { while listener.next_of("figures").await["fleet"].is_null() {} }).await;
    fleet.redis.as_mut().expect("a Redis").signal(rustix::process::Signal::STOP);
    let started = Instant::now();
    for _ in 0..3 {
        listener.next_of("figures").await;
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "three seconds took {took:?}");
    let figures = listener.next_of("figures").await;
    assert_eq!((&figures["fleet"], &figures["limits_of"]), (&Value::Null, &json!("instance")));
}
