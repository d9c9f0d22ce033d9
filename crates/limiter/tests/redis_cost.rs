//! What a decision costs the server. Run by hand: `cargo test --release --features redis --test redis_cost -- --ignored
//! --nocapture`.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use redis::aio::MultiplexedConnection;
use support::server::Server;
use support::{limit, user};
use tollgate_limiter::{Algorithm, Charge, RedisStore, Store};

const DECISIONS: u64 = 40_000;
const TASKS: u64 = 64;

/// Seconds of processor time the server has used.
async fn cpu(client: &mut MultiplexedConnection) -> f64 {
    let info: String = redis::cmd("INFO").arg("cpu").query_async(client).await.unwrap();
    let used = |name: &str| -> f64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().parse().unwrap()
    };
    used("used_cpu_sys:") + used("used_cpu_user:")
}

async fn spread(work: impl AsyncFn(u64) + Clone + 'static) {
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
}

async fn measure(server: &Server, what: &str, work: impl AsyncFn(u64) + Clone + 'static) {
    let mut client = server.client().await;
    let before = cpu(&mut client).await;
    spread(work).await;
    let used = cpu(&mut client).await - before;
    println!("{what}: {:.0} per second of the server's processor", DECISIONS as f64 / used);
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
    let sha: String = redis::cmd("SCRIPT")
        .arg("LOAD")
        .arg("return {1, '1', redis.call('HMGET', KEYS[1], 'a', 'b', 'c', 'd')}")
        .query_async(&mut client.clone())
        .await
        .unwrap();
    let ping = client.clone();
    measure(&server, "PING", async move |_| {
        redis::cmd("PING").query_async::<()>(&mut ping.clone()).await.unwrap();
    })
    .await;
    let bare = client.clone();
    measure(&server, "a bare EVALSHA that reads four fields", async move |number: u64| {
        let call = redis::cmd("EVALSHA").arg(&sha).arg(1).arg(format!("k{}", number % 1_000)).clone();
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
            measure(&server, &what, take(plain.clone(), algorithms, count, 1_000)).await;
        }
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
