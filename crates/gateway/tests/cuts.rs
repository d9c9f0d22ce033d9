//! Ten thousand callers cut at random points: each request ends exactly once, and nothing is left over.

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use support::{Conn, Metrics, Provider, Step, Tollgate, chat_config, chunk, openai, request, soon, sse};
use tokio::sync::{Notify, Semaphore};

const CALLERS: usize = 10_000;
const AT_ONCE: usize = 250;
const EVENTS_MAX: usize = 24;

/// What a caller does.
#[derive(Clone, Copy, PartialEq)]
enum Plan {
    /// Reads this many events, after which the provider falls silent, and leaves.
    LeaveAfter(usize),
    /// Leaves with this many bytes of the answer read, while the rest keeps coming.
    LeaveAnywhere(usize),
    /// Sends the request and leaves without a look: it may be gone before anybody has read it.
    LeaveAtOnce,
    /// Leaves while the provider, which has the request, says nothing.
    LeaveWaiting,
    /// Reads it all.
    Stay,
}

/// What became of it.
#[derive(Clone, Copy, PartialEq)]
enum Saw {
    Nothing,
    Some,
    All,
}

fn plan(number: usize) -> Plan {
    let mut random = fastrand::Rng::with_seed(number as u64);
    match random.u8(..10) {
        0..4 => Plan::LeaveAfter(random.usize(1..=EVENTS_MAX)),
        4..7 => Plan::LeaveAnywhere(random.usize(1..EVENTS_MAX * 190)),
        7 if random.bool() => Plan::LeaveAtOnce,
        7 => Plan::LeaveWaiting,
        _ => Plan::Stay,
    }
}

/// Three bytes of text each: one token where tokens are estimated.
fn events(count: usize) -> Vec<u8> {
    chunk(sse::delta("abc").as_bytes()).repeat(count)
}

fn script(plan: Plan) -> Vec<Step> {
    // Closed after each answer, so that a connection left over is one too many.
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let end = [chunk(sse::usage(5, 7).as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")].concat();
    match plan {
        Plan::LeaveWaiting => vec![Step::Hang],
        Plan::LeaveAfter(count) => vec![Step::Send([head.as_bytes(), &events(count)].concat()), Step::Hang],
        _ => vec![
            Step::Send([head.as_bytes(), &events(1)].concat()),
            Step::Send(events(EVENTS_MAX - 1)),
            Step::Send(end),
            Step::Close,
        ],
    }
}

async fn call(gateway: std::net::SocketAddr, number: usize, asked: &Notify) -> Saw {
    let body = format!(r#"{{"model":"chat","stream":true,"messages":[],"seed":{number}}}"#);
    let id = number.to_string();
    let headers = [("Authorization", "Bearer sk-alice"), ("X-Request-Id", id.as_str())];
    let mut conn =
        Conn::ask(gateway, &request("POST", "/v1/chat/completions", &headers, body.as_bytes())).await;
    let plan = plan(number);
    let wanted = match plan {
        Plan::LeaveAtOnce | Plan::LeaveWaiting => 0,
        Plan::LeaveAfter(count) => count * sse::delta("abc").len(),
        Plan::LeaveAnywhere(bytes) => bytes,
        Plan::Stay => usize::MAX,
    };
    let mut saw = Saw::Nothing;
    if plan == Plan::LeaveWaiting {
        soon("the provider is asked", asked.notified()).await;
        saw = Saw::Some;
    }
    if wanted > 0 {
        assert_eq!(conn.head().await.status, 200);
        let mut read = 0;
        saw = Saw::Some;
        while read < wanted {
            match soon("a part of a stream", conn.data()).await.expect("the gateway goes on") {
                Some(data) => read += data.len(),
                None => {
                    saw = Saw::All;
                    break;
                }
            }
        }
    }
    if number.is_multiple_of(2) {
        conn.leave();
    } else {
        conn.reset();
    }
    saw
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_ends_exactly_once() {
    let started = Instant::now();
    // One for each caller: the provider has its request.
    let asked: Arc<Vec<Notify>> = Arc::new((0..CALLERS).map(|_| Notify::new()).collect());
    let at_provider = asked.clone();
    let provider = Provider::start(move |seen| {
        let number = seen.json()["seed"].as_u64().expect("a number") as usize;
        at_provider[number].notify_one();
        script(plan(number))
    })
    .await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let (address, sockets) = (gateway.data, gateway.open_sockets());
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut callers = Vec::new();
    for number in 0..CALLERS {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let asked = asked.clone();
        callers.push(tokio::spawn(async move {
            let saw = call(address, number, &asked[number]).await;
            drop(place);
            saw
        }));
    }
    let mut saw = Vec::new();
    for caller in callers {
        saw.push(caller.await.expect("a caller"));
    }
    println!("{CALLERS} callers after {:?}", started.elapsed());

    let nothing_left = |metrics: &Metrics| {
        metrics.sum("http_requests_in_flight", "") == 0.0 && metrics.value("connections") <= 1.0
    };
    let metrics = gateway.metrics_become(nothing_left).await;
    provider.connections_become(|open| open == 0).await;
    let counted = metrics.sum("http_requests_total", "/v1/chat/completions") as usize;
    let lines = gateway.requests_logged(counted).await;
    check_lines(&lines, &saw);
    check_sums(&lines, &metrics, &provider);
    // The scrape itself holds one for a moment.
    soon("sockets are closed", async {
        while gateway.open_sockets() > sockets {
            tokio::task::yield_now().await
        }
    })
    .await;
    println!("all checked after {:?}", started.elapsed());
}

/// One line for each request the gateway can have seen, and what it says is what happened.
fn check_lines(lines: &[Value], saw: &[Saw]) {
    let mut ended: HashMap<usize, &Value> = HashMap::new();
    for line in lines {
        let number = line["request_id"].as_str().and_then(|id| id.parse().ok()).expect("an id of ours");
        assert!(ended.insert(number, line).is_none(), "ended twice: {line}");
    }
    for (number, saw) in saw.iter().enumerate() {
        let Some(line) = ended.get(&number) else {
            assert!(*saw == Saw::Nothing, "request {number} never ended");
            continue;
        };
        match (plan(number), saw) {
            (Plan::LeaveAfter(count), _) => {
                assert_eq!(
                    (&line["outcome"], &line["estimated"], &line["completion_tokens"]),
                    (&"client_left".into(), &true.into(), &count.into()),
                    "{line}"
                );
            }
            (Plan::LeaveWaiting, _) => {
                assert_eq!(
                    (&line["outcome"], &line["status"]),
                    (&"client_left".into(), &499.into()),
                    "{line}"
                );
                assert!(line.get("completion_tokens").is_none(), "{line}");
            }
            (_, Saw::All) => {
                assert_eq!(
                    (&line["outcome"], &line["completion_tokens"]),
                    (&"done".into(), &7.into()),
                    "{line}"
                );
                assert!(line.get("estimated").is_none(), "{line}");
            }
            _ => assert!(line["outcome"] == "client_left" || line["outcome"] == "done", "{line}"),
        }
    }
}

fn check_sums(lines: &[Value], metrics: &Metrics, provider: &Provider) {
    let count = |name: &str, value: Value| lines.iter().filter(|line| line[name] == value).count();
    let (left, done) = (count("outcome", "client_left".into()), count("outcome", "done".into()));
    let early = count("status", 499.into());
    println!("{} requests: {done} done, {left} left, {early} of them before the head", lines.len());
    assert_eq!(left + done, lines.len());
    assert!(left > CALLERS / 3 && done > CALLERS / 6 && early > CALLERS / 40, "{left} {done} {early}");
    assert_eq!(metrics.sum("http_requests_total", r#"code="200""#) as usize, count("status", 200.into()));
    assert_eq!(metrics.sum("http_requests_total", r#"code="499""#) as usize, early);
    assert_eq!(metrics.value(r#"streams_aborted_total{by="client"}"#) as usize, left);
    assert_eq!(metrics.sum("streams_aborted_total", "") as usize, left);
    assert_eq!(metrics.sum("http_request_duration_seconds_count", "") as usize, lines.len());
    assert_eq!(metrics.value("log_lines_dropped_total"), 0.0);
    let tokens: u64 = lines.iter().filter_map(|line| line["completion_tokens"].as_u64()).sum();
    assert_eq!(metrics.sum("tokens_total", r#"type="completion""#) as u64, tokens);
    assert!(provider.hits() <= lines.len(), "nothing reaches a provider uncounted");
}
