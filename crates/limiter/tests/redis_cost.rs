//! What a decision costs the server, beside the least that any script, and any write, costs it. Run by hand:
//! `cargo test --release -p tollgate-limiter --features redis --test redis_cost -- --ignored --nocapture`
//!
//! Counted is the processor time of the redis-server process, from /proc, so that it does not matter what else the
//! machine does. redis-benchmark is the one beside that redis-server.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::process::{Command, Stdio};

use support::server::Server;
use support::{limit, slots, user};
use tollgate_limiter::{Algorithm, Charge, Decision, RedisStore, Store};

const DECISIONS: u64 = 40_000;
const TASKS: u64 = 64;
/// Requests of redis-benchmark: so many that a hundredth of a second of processor time is nothing.
const REQUESTS: u64 = 400_000;
const SUBJECTS: u64 = 1_000;
/// Ticks of a second in which Linux counts processor time.
const TICKS: f64 = 100.0;

/// The least a script can do for a decision: read four fields, and say yes.
const BARE: &str = "return {1, '1', redis.call('HMGET', KEYS[1], 'a', 'b', 'c', 'd')}";

/// Seconds of processor time the server has used, by all its threads.
fn processor_time(server: &Server) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.id())).unwrap();
    // The name of the program may contain anything; what follows it does not.
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let ticks = |field: usize| -> f64 { rest.split_whitespace().nth(field).unwrap().parse().unwrap() };
    (ticks(11) + ticks(12)) / TICKS
}

/// Prints a row: how many per second of the server's processor, and how long each takes it.
fn row(what: &str, count: u64, seconds: f64) {
    let (rate, each) = (count as f64 / seconds, seconds / count as f64 * 1e6);
    println!("| {what:<60} | {rate:>9.0} | {each:>5.1} |");
}

fn head(what: &str) {
    println!("| {what:<60} | per CPU s | µs |\n|---|---|---|");
}

async fn measure(server: &Server, what: &str, work: impl AsyncFn(u64) + Clone + 'static) {
    let before = processor_time(server);
    let local = tokio::task::LocalSet::new();
    for task in 0..TASKS {
        let work = work.clone();
        local.spawn_local(async move {
            for number in 0..DECISIONS / TASKS {
                work(task * DECISIONS + number).await;
            }
        });
    }
    local.await;
    row(what, DECISIONS / TASKS * TASKS, processor_time(server) - before);
}

/// What redis-benchmark makes of the same server: over 50 connections, so many commands at a time on each.
fn floor(server: &Server, pipelined: u64, command: &[&str]) {
    let before = processor_time(server);
    let status = Command::new("redis-benchmark")
        .arg("-s")
        .arg(server.socket())
        .args(["-n", &REQUESTS.to_string(), "-P", &pipelined.to_string(), "-r", &SUBJECTS.to_string(), "-q"])
        .args(command)
        .stdout(Stdio::null())
        .status();
    let status = status.unwrap_or_else(|error| panic!("redis-benchmark is needed for this: {error}"));
    assert!(status.success());
    let what = format!("{} -P {pipelined}", command[0]);
    row(&what, REQUESTS, processor_time(server) - before);
}

fn charges(algorithms: &[Algorithm], count: usize, subject: &str) -> Vec<Charge> {
    let quotas = ["1000000/minute", "5000000/hour", "50000000/day", "90000000/week"];
    let one = |number: usize| {
        let algorithm = algorithms[number % algorithms.len()];
        Charge::new(limit(&format!("r{number}"), quotas[number % 4], algorithm), user(subject), 1)
    };
    (0..count).map(one).collect()
}

#[tokio::test]
#[ignore = "a measurement, not a test"]
async fn decisions_per_second_of_the_server() {
    let server = Server::start();
    let client = server.client().await;
    let load = redis::cmd("SCRIPT").arg("LOAD").arg(BARE).clone();
    let sha: String = load.query_async(&mut client.clone()).await.unwrap();
    head("redis-benchmark");
    for pipelined in [1, 32] {
        floor(&server, pipelined, &["set", "key:__rand_int__", "value"]);
        floor(&server, pipelined, &["hset", "hash:__rand_int__", "field", "value"]);
        floor(&server, pipelined, &["evalsha", &sha, "1", "hash:__rand_int__"]);
    }
    head("one connection of this library's client, 64 tasks");
    let ping = client.clone();
    measure(&server, "PING", async move |_| {
        redis::cmd("PING").query_async::<()>(&mut ping.clone()).await.unwrap();
    })
    .await;
    let bare = client.clone();
    measure(&server, "a bare EVALSHA that reads four fields", async move |number: u64| {
        let call = redis::cmd("EVALSHA").arg(&sha).arg(1).arg(format!("hash:{}", number % SUBJECTS)).clone();
        call.query_async::<redis::Value>(&mut bare.clone()).await.unwrap();
    })
    .await;
    let plain = server.store(server.options().without_coalescing().without_denial_memory()).await;
    let mixes = [
        ("token_bucket", &[Algorithm::TokenBucket][..]),
        ("fixed_window", &[Algorithm::FixedWindow]),
        ("sliding_window", &[Algorithm::SlidingWindow]),
        ("moving_window", &[Algorithm::MovingWindow]),
        ("fixed_window and token_bucket", &[Algorithm::FixedWindow, Algorithm::TokenBucket]),
    ];
    for (name, algorithms) in mixes {
        for count in [1, 2, 4, 8] {
            let what = format!("{count} limits, {name}");
            measure(&server, &what, take(plain.clone(), algorithms, count, SUBJECTS)).await;
        }
    }
    for held in [1, 100, 1_000] {
        let what = format!("1 slot taken and given back, {held} held");
        measure(&server, &what, call(plain.clone(), held).await).await;
    }
    let gathering = server.store(server.options()).await;
    let what = "4 limits, fixed_window and token_bucket, one subject, gathered";
    measure(&server, what, take(gathering, mixes[4].1, 4, 1)).await;
}

fn take(
    store: RedisStore,
    algorithms: &'static [Algorithm],
    count: usize,
    subjects: u64,
) -> impl AsyncFn(u64) + Clone {
    async move |number: u64| {
        let charges = charges(algorithms, count, &format!("{}-{}-{count}", number % subjects, algorithms[0]));
        drop(store.reserve(charges).await.unwrap());
    }
}

/// Two scripts: one takes a slot beside those that others hold, one gives it back.
async fn call(store: RedisStore, held: u64) -> impl AsyncFn(u64) + Clone {
    let one = move || vec![Charge::new(slots("gpu", 1_000_000), user(&format!("everybody{held}")), 1)];
    for _ in 0..held {
        drop(store.reserve(one()).await.unwrap());
    }
    async move |_| {
        if let Decision::Granted(slot) = store.reserve(one()).await.unwrap() {
            slot.settled(&[]).await.unwrap();
        }
    }
}
