//! Several gateways on one Redis are one limiter: they admit together what one would, and agree to the token with the
//! provider, the log and the metrics.
//!
//! All windows are days, so that none ends while a test runs (but at midnight UTC).

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    CHAT, Conn, Fleet, Gate, Provider, Redis, Response, Step, chat, chunk, json_answer, post, question, sse,
    tokens_of,
};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
const TOKENS_OF_ANSWER: u64 = 3;

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "", ANSWER)).await
}

async fn ask(fleet: &Fleet, number: usize) -> Response {
    post(fleet.of(number).data, &chat(&question(false))).await
}

/// Sends these requests at the same moment, spread over the gateways; the connections, with nothing read from them.
async fn all_at_once(fleet: &Fleet, requests: impl Iterator<Item = Vec<u8>>) -> Vec<Conn> {
    let mut ready = Vec::new();
    for (number, request) in requests.enumerate() {
        ready.push((Conn::open(fleet.of(number).data).await, request));
    }
    let barrier = Arc::new(tokio::sync::Barrier::new(ready.len()));
    let sending: Vec<_> = ready
        .into_iter()
        .map(|(mut conn, request)| {
            let barrier = barrier.clone();
            tokio::spawn(async move {
                barrier.wait().await;
                conn.send(&request).await;
                conn
            })
        })
        .collect();
    let mut sent = Vec::new();
    for conn in sending {
        sent.push(conn.await.expect("a connection"));
    }
    sent
}

#[tokio::test]
async fn three_gateways_admit_what_one_would() {
    for strategy in ["fixed_window", "sliding_window", "moving_window", "token_bucket"] {
        let limits = format!("[{{ name: r, per: user, limit: 10/day, strategy: {strategy} }}]");
        let provider = provider().await;
        let fleet = Fleet::sharing(Redis::start(), 3, &provider, &limits).await;
        let mut statuses = Vec::new();
        for number in 0..30 {
            statuses.push(ask(&fleet, number).await.status);
        }
        assert_eq!(statuses, [[200; 10], [429; 10], [429; 10]].concat(), "{strategy}");
        assert_eq!((provider.hits(), fleet.used("r-requests-day").await), (10, 10), "{strategy}");

        // All at once, on a Redis that knows nothing.
        let provider = self::provider().await;
        let fleet = Fleet::sharing(Redis::start(), 3, &provider, &limits).await;
        let mut statuses = Vec::new();
        for mut conn in all_at_once(&fleet, (0..300).map(|_| chat(&question(false)))).await {
            statuses.push(conn.response().await.status);
        }
        let count = |status| statuses.iter().filter(|&&now| now == status).count();
        assert_eq!((count(200), count(429)), (10, 290), "{strategy}");
        assert_eq!((provider.hits(), fleet.used("r-requests-day").await), (10, 10), "{strategy}");
    }
}

/// A prompt of which no provider here says more tokens than are expected, and an answer bounded likewise.
fn long_question(number: usize) -> Vec<u8> {
    let text = "word ".repeat(60);
    chat(&format!(
        r#"{{"model":"chat","stream":true,"seed":{number},"max_tokens":400,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    ))
}

fn usage_of(seed: u64) -> (u64, u64) {
    (20 + seed % 20, 1 + seed * 37 % 400)
}

#[tokio::test]
async fn a_hundred_streams_never_reserve_past_a_limit_and_are_counted_to_the_token() {
    const LIMIT: u64 = 10_000;
    const TPD: &str = "r-tokens-day";
    let gates: [Gate; 3] = std::array::from_fn(|_| Gate::new());
    let provider = {
        let gates = gates.clone();
        Provider::start(move |seen| {
            let seed = seen.json()["seed"].as_u64().expect("a number");
            let (prompt, completion) = usage_of(seed);
            let end =
                [chunk(sse::usage(prompt, completion).as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")];
            vec![
                Step::Send([sse::head(), chunk(sse::delta("a").as_bytes())].concat()),
                Step::Wait(gates[seed as usize / 100].clone()),
                Step::Send(end.concat()),
            ]
        })
        .await
    };
    let limits = "[{ name: r, per: user, limit: 10k tokens/day }]";
    let fleet = Fleet::sharing(Redis::start(), 3, &provider, limits).await;
    let (mut used, mut reserved_before, mut hits) = (0, 0, 0);
    for (wave, gate) in gates.iter().enumerate() {
        let mut admitted = Vec::new();
        for mut conn in all_at_once(&fleet, (0..100).map(|number| long_question(100 * wave + number))).await {
            match conn.head().await.status {
                200 => admitted.push(conn),
                429 => {}
                status => panic!("{status}"),
            }
        }
        // All are decided and none has ended: what is reserved now is the most that ever is.
        let reserved = fleet.sum("rate_limit_tokens_total", r#"kind="reserved""#).await - reserved_before;
        reserved_before += reserved;
        let standing = fleet.used(TPD).await;
        assert_eq!(standing, used + reserved, "wave {wave}");
        assert!(standing <= LIMIT, "wave {wave}: {standing}");
        let each = reserved / admitted.len().max(1) as u64;
        println!("wave {wave}: {} admitted, {reserved} reserved, {standing} in all", admitted.len());
        assert!(
            wave > 0 || (each > 400 && standing + each > LIMIT),
            "no more is left out than must be: {each}"
        );
        hits += admitted.len();
        assert_eq!(provider.hits(), hits);
        gate.open();
        for mut conn in admitted {
            conn.rest().await.expect("a whole answer");
        }
        let seeds =
            provider.requests().into_iter().map(|seen| seen.json()["seed"].as_u64().expect("a number"));
        used = seeds.map(|seed| usage_of(seed).0 + usage_of(seed).1).sum();
        fleet.used_becomes(TPD, used).await;
    }
    let lines = fleet.ended().await;
    assert_eq!((lines.len(), tokens_of(&lines)), (300, used));
    assert_eq!(fleet.tokens_counted().await, used);
    assert_eq!(fleet.sum("rate_limit_tokens_total", r#"kind="used""#).await, used);
    assert_eq!(fleet.sum("rate_limit_tokens_total", r#"kind="returned""#).await, reserved_before - used);
}

/// Asks again and again until told to stop; how often each status was the answer.
struct Load {
    stop: tokio::sync::watch::Sender<bool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<Response>>>,
}

impl Load {
    fn start(fleet: &Fleet, callers: usize) -> Self {
        let stop = tokio::sync::watch::Sender::new(false);
        let caller = |number| {
            let (address, stopped) = (fleet.of(number).data, stop.subscribe());
            tokio::spawn(async move {
                let (mut conn, mut answers) = (Conn::open(address).await, Vec::new());
                while !*stopped.borrow() {
                    conn.send(&chat(&question(false))).await;
                    answers.push(conn.response().await);
                }
                answers
            })
        };
        let tasks = (0..callers).map(caller).collect();
        Self { stop, tasks }
    }

    async fn stop(self) -> Vec<Response> {
        self.stop.send_replace(true);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.expect("answers"));
        }
        all
    }
}

fn count(answers: &[Response], status: u16) -> u64 {
    answers.iter().filter(|answer| answer.status == status).count() as u64
}

/// Each reload leaves room for more; every seventh takes most of it away for a while.
async fn reloads_under_load(redis: Option<Redis>, size: usize, reloads: u64) {
    const ROOM: u64 = 5;
    let limits = |requests: u64| {
        format!("[{{ name: r, per: user, limit: [{requests}/day, {}k tokens/day] }}]", 1_000 + requests)
    };
    let provider = provider().await;
    let fleet = Fleet::start(redis, size, "", &provider, &limits(ROOM)).await;
    let started = Instant::now();
    let load = Load::start(&fleet, 6);
    for reload in 1..=reloads {
        let lowered = reload % 7 == 0 && reload < reloads;
        let requests = if lowered { 1 } else { ROOM * reload };
        for gateway in &fleet.gateways {
            gateway.configure("", &Fleet::config(fleet.redis.as_ref(), &provider, &limits(requests)));
            assert_eq!(gateway.reload().await["message"], "configuration reloaded");
        }
        if !lowered && reload % 50 == 0 {
            fleet.used_becomes("r-requests-day", requests).await;
        }
    }
    let limit = ROOM * reloads;
    fleet.used_becomes("r-requests-day", limit).await;
    let answers = load.stop().await;
    println!("{reloads} reloads of {size} in {:?}, {} requests", started.elapsed(), answers.len());
    assert_eq!((count(&answers, 200), provider.hits() as u64), (limit, limit));
    assert_eq!(count(&answers, 200) + count(&answers, 429), answers.len() as u64);
    fleet.used_becomes("r-requests-day", limit).await;
    fleet.used_becomes("r-tokens-day", limit * TOKENS_OF_ANSWER).await;
    let lines = fleet.ended().await;
    assert_eq!((lines.len(), tokens_of(&lines)), (answers.len(), limit * TOKENS_OF_ANSWER));
    assert_eq!(fleet.tokens_counted().await, limit * TOKENS_OF_ANSWER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_under_load_lose_and_invent_nothing() {
    reloads_under_load(None, 1, 100).await;
    reloads_under_load(Some(Redis::start()), 2, 30).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute"]
async fn a_thousand_reloads_under_load_lose_and_invent_nothing() {
    reloads_under_load(None, 1, 1_000).await;
    reloads_under_load(Some(Redis::start()), 2, 1_000).await;
}

#[tokio::test]
async fn a_changed_limit_counts_at_once_and_keeps_what_was_used() {
    let provider = provider().await;
    let limits = |limit: u64| format!("[{{ name: r, per: user, limit: {limit}/day }}]");
    let redis = Redis::start();
    let configs = [3, 5, 2, 6].map(|limit| Fleet::config(Some(&redis), &provider, &limits(limit)));
    let watching = support::Tollgate::start_with("", &configs[0], &["--watch"]).await;
    let told = support::Tollgate::start_with("", &configs[0], &[]).await;
    let fleet = Fleet { gateways: vec![watching, told], redis: Some(redis) };
    let mut used = 0;
    for (limit, config) in [3, 5, 2, 6].into_iter().zip(&configs) {
        if limit != 3 {
            fleet.gateways[0].configure("", config);
            let reloaded = |line: &Value| line["message"] == "configuration reloaded";
            let count = || fleet.gateways[0].lines().iter().filter(|line| reloaded(line)).count();
            let before = count();
            fleet.gateways[1].configure("", config);
            fleet.gateways[1].reload().await;
            support::soon("the file is watched", async {
                while count() == before {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
        }
        for left in (used..limit).rev() {
            let answer = ask(&fleet, left as usize).await;
            used += 1;
            assert_eq!((answer.status, answer.number("x-ratelimit-remaining-requests")), (200, limit - used));
            assert_eq!(answer.number("x-ratelimit-limit-requests"), limit);
        }
        for number in 0..2 {
            let answer = ask(&fleet, number).await;
            let error = &answer.json()["error"];
            assert_eq!((answer.status, &error["limit"], &error["used"]), (429, &limit.into(), &used.into()));
        }
        assert_eq!(fleet.used("r-requests-day").await, used);
    }
    assert_eq!(provider.hits() as u64, used);
}

/// Streams at a gateway that ends; `halfway` tells it so and lets some of them end.
async fn ends_with_streams_under_way(server: &str, at_once: bool) {
    const STREAMS: usize = 60;
    let gate = Gate::new();
    let provider = {
        let gate = gate.clone();
        Provider::start(move |seen| {
            let seed = seen.json()["seed"].as_u64().expect("a number");
            let start = Step::Send([sse::head(), chunk(sse::delta("abc").repeat(5).as_bytes())].concat());
            let (prompt, completion) = usage_of(seed);
            let end =
                [chunk(sse::usage(prompt, completion).as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")];
            match seed % 3 {
                0 => vec![start, Step::Hang],
                1 => vec![start, Step::Wait(gate.clone()), Step::Send(end.concat())],
                _ => vec![Step::Hang],
            }
        })
        .await
    };
    let limits = "[{ name: r, per: user, limit: [100k tokens/day, 1000/day] }]";
    let mut fleet = Fleet::start(Some(Redis::start()), 2, server, &provider, limits).await;
    let mut ending = fleet.gateways.remove(0);
    let mut streams = Vec::new();
    for number in 0..STREAMS {
        streams.push(Conn::ask(ending.data, &long_question(number)).await);
    }
    provider.request(STREAMS - 1).await;
    for stream in
        streams.iter_mut().enumerate().filter(|(number, _)| number % 3 < 2).map(|(_, stream)| stream)
    {
        assert_eq!(stream.head().await.status, 200);
    }
    let reserved = fleet.used("r-tokens-day").await;
    ending.sigterm();
    ending.logged(|line| line["message"].as_str().is_some_and(|said| said.starts_with("ending:"))).await;
    if at_once {
        ending.sigterm();
    } else {
        gate.open();
    }
    let status = ending.ended(Duration::from_secs(15)).await;
    assert_eq!(status.code(), Some(if at_once { 128 + 15 } else { 0 }));
    let lines: Vec<Value> = ending.lines().into_iter().filter(|line| line["endpoint"] == CHAT).collect();
    let outcomes = |name: &str| lines.iter().filter(|line| line["outcome"] == name).count();
    let done = if at_once { 0 } else { STREAMS / 3 };
    assert_eq!((outcomes("done"), outcomes("shutdown")), (done, STREAMS - done), "{lines:#?}");
    let settled = tokens_of(&lines);
    println!("{reserved} reserved, {settled} settled");
    assert!(settled < reserved);
    fleet.used_becomes("r-tokens-day", settled).await;
}

#[tokio::test]
async fn streams_are_settled_when_the_process_ends() {
    ends_with_streams_under_way("  shutdown_grace: 1s\n", false).await;
}

#[tokio::test]
async fn streams_are_settled_when_the_process_ends_at_once() {
    ends_with_streams_under_way("", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_forgotten_by_redis_disturb_nobody() {
    const LIMIT: u64 = 1_000;
    let provider = provider().await;
    let limits = format!("[{{ name: r, per: user, limit: [{LIMIT}/day, 1M tokens/day] }}]");
    let fleet = Fleet::sharing(Redis::start(), 3, &provider, &limits).await;
    let load = Load::start(&fleet, 12);
    let mut flushed = 0;
    while fleet.used("r-requests-day").await < LIMIT {
        fleet.redis.as_ref().expect("a Redis").cli(&["SCRIPT", "FLUSH"]);
        flushed += 1;
    }
    let answers = load.stop().await;
    println!("{flushed} flushes during {} requests", answers.len());
    assert_eq!(count(&answers, 200), LIMIT);
    assert_eq!(count(&answers, 200) + count(&answers, 429), answers.len() as u64);
    fleet.used_becomes("r-tokens-day", LIMIT * TOKENS_OF_ANSWER).await;
    assert_eq!(provider.hits() as u64, LIMIT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_starts_again_goes_on_counting_where_it_was() {
    const CALLERS: usize = 8;
    let provider = provider().await;
    let redis = Redis::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    // The deadline is the default here: it is what callers may notice.
    let config =
        Fleet::config(Some(&redis), &provider, "[{ name: r, per: user, limit: [1M/day, 1G tokens/day] }]")
            .replace(", timeout: 5s", "");
    let gateways = vec![support::Tollgate::start(&config).await, support::Tollgate::start(&config).await];
    let mut fleet = Fleet { gateways, redis: Some(redis) };
    let load = Load::start(&fleet, CALLERS);
    let well = async |fleet: &Fleet, more: usize| {
        let before = provider.hits();
        support::soon("requests are answered", provider.request(before + more)).await;
        assert!(fleet.gateways.iter().all(|gateway| gateway.open_sockets() > 0));
    };
    well(&fleet, 100).await;
    let started = Instant::now();
    fleet.redis.as_mut().expect("a Redis").restart();
    let restarted = started.elapsed();
    well(&fleet, 100).await;
    println!("away for {restarted:?}, and again 100 answers after {:?}", started.elapsed());
    let answers = load.stop().await;
    let (answered, failed) = (count(&answers, 200), count(&answers, 503));
    assert_eq!(answered + failed, answers.len() as u64);
    for answer in answers.iter().filter(|answer| answer.status == 503) {
        assert_eq!(answer.code(), "limiter_unavailable");
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
    }
    assert_eq!(provider.hits() as u64, answered);
    let lines = fleet.ended().await;
    let at_least = async |limit: &str, least: u64| {
        let reached = async {
            loop {
                let used = fleet.used(limit).await;
                if used >= least {
                    return used;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        support::soon("what was counted meanwhile is told", reached).await
    };
    let used = at_least("r-requests-day", answered).await;
    let tokens = at_least("r-tokens-day", tokens_of(&lines)).await;
    println!("{answered} answered, {failed} not decided, {used} counted");
    println!("{} tokens used, {tokens} counted", tokens_of(&lines));
    // A decision whose answer was lost stays counted, one a caller.
    assert!(used <= answered + failed + CALLERS as u64, "{answered} {failed} {used}");
}
