//! Callers that leave and providers that die, at random points, streams and plain answers: when all is over, what the
//! limits count is what the log says was used, to the token. Nothing is lost, nothing counts twice, nothing stays reserved.

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    Conn, Fleet, Provider, Redis, Step, Tollgate, blackhole, chat, chat_config, chunk, json_answer, question,
    sse, tokens_of,
};
use tokio::sync::Semaphore;

const AT_ONCE: usize = 64;
const LEAVES_WITHIN: Duration = Duration::from_millis(40);
const TOKENS: &str = "r-tokens-day";
const REQUESTS: &str = "r-requests-day";
const UNDER_WAY: &str = "r-concurrency";

/// What a provider makes of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answers {
    /// Whole.
    Well,
    /// Up to some byte; then the connection closes, or is reset.
    Dies { resets: bool },
    /// Up to some byte; then nothing more.
    FallsSilent,
    /// With an error about the request, in one piece or in several.
    Refuses { whole: bool },
}

/// One request, by its number.
struct Plan {
    stream: bool,
    answers: Answers,
    /// The caller leaves after so long, if it is still there.
    patience: Option<Duration>,
    prompt: u64,
    completion: u64,
    random: fastrand::Rng,
}

impl Plan {
    fn of(number: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(number as u64);
        let answers = match random.u8(..10) {
            0..5 => Answers::Well,
            5..7 => Answers::Dies { resets: random.bool() },
            7..9 => Answers::FallsSilent,
            _ => Answers::Refuses { whole: random.bool() },
        };
        let leaves = answers == Answers::FallsSilent || random.u8(..10) < 4;
        let patience = leaves.then(|| LEAVES_WITHIN.mul_f64(random.f64()));
        Self {
            stream: random.u8(..3) > 0,
            answers,
            patience,
            prompt: random.u64(1..60),
            completion: random.u64(1..90),
            random,
        }
    }

    fn steps(mut self) -> Vec<Step> {
        let refusal = r#"{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}"#;
        let pieces = match (self.answers, self.stream) {
            (Answers::Refuses { whole: true }, _) => vec![json_answer("400 Bad Request", "", refusal)],
            (Answers::Refuses { whole: false }, _) => {
                let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";
                vec![[head.as_bytes(), &chunk(refusal.as_bytes())].concat(), chunk(b"")]
            }
            (_, true) => self.events(),
            (_, false) => {
                let (prompt, completion) = (self.prompt, self.completion);
                let body = format!(
                    r#"{{"choices":[{{"message":{{"content":"abc"}}}}],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{}}}}}"#,
                    prompt + completion
                );
                vec![json_answer("200 OK", "", &body)]
            }
        };
        let random = &mut self.random;
        let cut = match self.answers {
            Answers::Dies { .. } | Answers::FallsSilent => random.usize(..pieces.concat().len()),
            _ => usize::MAX,
        };
        let mut sent = 0;
        let mut steps = Vec::new();
        for mut piece in pieces {
            piece.truncate(cut.saturating_sub(sent));
            sent += piece.len();
            steps.extend([Step::Pause(Duration::from_micros(random.u64(..2_000))), Step::Send(piece)]);
        }
        steps.extend(match self.answers {
            Answers::Dies { resets: true } => Some(Step::Reset),
            Answers::Dies { resets: false } => Some(Step::Close),
            Answers::FallsSilent => Some(Step::Hang),
            _ => None,
        });
        steps
    }

    fn events(&mut self) -> Vec<Vec<u8>> {
        let delta = chunk(sse::delta("abc").as_bytes());
        let mut pieces = vec![sse::head()];
        pieces.extend((0..self.random.usize(1..5)).map(|_| delta.repeat(self.random.usize(1..6))));
        let usage = chunk(sse::usage(self.prompt, self.completion).as_bytes());
        pieces.push([usage, chunk(sse::DONE.as_bytes()), chunk(b"")].concat());
        pieces
    }
}

/// Whether the caller got all there was.
async fn call(gateway: std::net::SocketAddr, number: usize) -> bool {
    let plan = Plan::of(number);
    let mut conn = Conn::open(gateway).await;
    let body = format!(
        r#"{{"model":"chat","stream":{},"seed":{number},"messages":[{{"role":"user","content":"{}"}}]}}"#,
        plan.stream,
        "word ".repeat(1 + number % 50)
    );
    conn.send(&chat(&body)).await;
    let read = async {
        let answer = conn.try_response().await;
        answer.is_ok_and(|answer| answer.status == 200 && !answer.text().contains("upstream_error"))
    };
    let whole = match plan.patience {
        Some(patience) => tokio::time::timeout(patience, read).await.unwrap_or(false),
        None => support::soon("the end of an answer", read).await,
    };
    if number.is_multiple_of(2) {
        conn.leave();
    } else {
        conn.reset();
    }
    whole
}

async fn cut(redis: Option<Redis>, size: usize, callers: usize) {
    let started = Instant::now();
    let provider =
        Provider::start(|seen| Plan::of(seen.json()["seed"].as_u64().expect("a number") as usize).steps())
            .await;
    let limits = "[{ name: r, per: user, limit: [1G tokens/day, 1M/day, 1M concurrent] }]";
    let fleet = Fleet::start(redis, size, "", &provider, limits).await;
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut calls = Vec::new();
    for number in 0..callers {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let address = fleet.of(number).data;
        calls.push(tokio::spawn(async move {
            let whole = call(address, number).await;
            drop(place);
            whole
        }));
    }
    let mut whole = Vec::new();
    for call in calls {
        whole.push(call.await.expect("a caller"));
    }
    let lines = fleet.ended().await;
    let said = check_lines(&lines, &provider, &whole);
    let charged =
        |line: &&Value| line["status"] == 200 || line["status"] == 400 || line["prompt_tokens"].is_u64();
    let asked = lines.iter().filter(charged).count() as u64;
    println!(
        "{callers} callers, {} requests, {asked} charged, {} tokens ({said} by providers), after {:?}",
        lines.len(),
        tokens_of(&lines),
        started.elapsed()
    );
    fleet.used_becomes(TOKENS, tokens_of(&lines)).await;
    fleet.used_becomes(REQUESTS, asked).await;
    fleet.used_becomes(UNDER_WAY, 0).await;
    fleet.usage_becomes(lines.len() as u64, tokens_of(&lines)).await;
    assert_eq!(fleet.tokens_counted().await, tokens_of(&lines));
    assert_eq!(fleet.sum("rate_limit_tokens_total", r#"kind="used""#).await, tokens_of(&lines));
    let settled = fleet.sum("rate_limit_settlements_total", "").await;
    for gateway in &fleet.gateways {
        assert_eq!(gateway.metrics().await.sum("rate_limit_redis_errors_total", ""), 0.0);
    }
    let refunded = fleet.sum("rate_limit_settlements_total", "refunded").await;
    assert_eq!(settled - refunded, asked, "each was settled once");
}

/// Each request has one line, and those that ended well say what their provider said: the tokens of all these.
fn check_lines(lines: &[Value], provider: &Provider, whole: &[bool]) -> u64 {
    let mut seeds = HashMap::new();
    let mut said = 0;
    let seen: HashMap<String, usize> = provider
        .requests()
        .iter()
        .map(|seen| {
            let id = seen.header("x-request-id").expect("an id").to_owned();
            (id, seen.json()["seed"].as_u64().expect("a number") as usize)
        })
        .collect();
    for line in lines {
        let id = line["request_id"].as_str().expect("an id");
        let Some(&number) = seen.get(id) else {
            // It may have been sent, and the connection closed before the provider read it.
            assert!(
                line["outcome"] == "client_left" && line["completion_tokens"].as_u64().is_none_or(|n| n == 0),
                "{line}"
            );
            continue;
        };
        assert!(seeds.insert(number, line).is_none(), "ended twice: {line}");
        let plan = Plan::of(number);
        let counted = line["prompt_tokens"].is_u64();
        if line["outcome"] == "done" && line["status"] == 200 {
            let tokens = (&line["prompt_tokens"], &line["completion_tokens"], &line["estimated"]);
            assert_eq!(tokens, (&plan.prompt.into(), &plan.completion.into(), &Value::Null), "{line}");
            said += plan.prompt + plan.completion;
        } else if line["status"] == 502 || line["status"] == 400 {
            assert!(!counted, "an error costs no tokens: {line}");
        } else if counted && line["estimated"].is_null() {
            assert_eq!(line["prompt_tokens"], plan.prompt, "{line}");
            said += plan.prompt + plan.completion;
        }
    }
    for (number, _) in whole.iter().enumerate().filter(|(_, whole)| **whole) {
        let line = seeds.get(&number).unwrap_or_else(|| panic!("request {number} never ended"));
        assert_eq!((&line["outcome"], &line["status"]), (&"done".into(), &200.into()), "{line}");
    }
    let of = |outcome: &str| lines.iter().filter(|line| line["outcome"] == outcome).count();
    let (done, left, died) = (of("done"), of("client_left"), of("upstream_died"));
    println!("{done} done, {left} left, {died} died, {} refused", of("refused"));
    assert!(left > lines.len() / 5 && done > lines.len() / 5 && died > lines.len() / 50);
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cut_is_counted_once_in_memory() {
    cut(None, 1, 4_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes up to half a minute"]
async fn ten_thousand_cuts_are_counted_once_in_memory() {
    cut(None, 1, 10_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cut_is_counted_once_in_redis() {
    cut(Some(Redis::start()), 3, 4_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes up to half a minute"]
async fn ten_thousand_cuts_are_counted_once_in_redis() {
    cut(Some(Redis::start()), 3, 10_000).await;
}

#[tokio::test]
async fn a_caller_that_leaves_before_a_provider_is_reached_pays_nothing() {
    let (_listener, _waiting, nowhere) = blackhole().await;
    let config = chat_config(&[format!("type: openai, url: 'http://{nowhere}'")]);
    let limits = "limits: [{ name: r, per: user, limit: [1G tokens/day, 1M/day] }]";
    let fleet = Fleet { gateways: vec![Tollgate::start(&format!("{config}{limits}\n")).await], redis: None };
    let gateway = &fleet.gateways[0];
    let caller = Conn::ask(gateway.data, &chat(&question(true))).await;
    gateway.metrics_become(|metrics| metrics.sum("rate_limit_tokens_total", "reserved") > 0.0).await;
    assert_eq!(fleet.used(REQUESTS).await, 1);
    caller.leave();
    let lines = fleet.ended().await;
    assert_eq!((&lines[0]["outcome"], tokens_of(&lines)), (&"client_left".into(), 0), "{lines:?}");
    assert_eq!((fleet.used(REQUESTS).await, fleet.used(TOKENS).await), (0, 0));
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.value(r#"rate_limit_settlements_total{outcome="refunded"}"#), 1.0);
    let tokens = |kind| metrics.sum("rate_limit_tokens_total", kind);
    assert_eq!(tokens("returned"), tokens("reserved"));
}
