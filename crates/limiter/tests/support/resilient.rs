//! Stores of several processes, all in this one.
#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::sync::Arc;
use std::time::{Duration, Instant};

use tollgate_limiter::{
    Algorithm, Circuit, Decision, Limit, RedisOptions, RedisStore, ResilientOptions, ResilientStore, Source,
    Store,
};

use super::server::Server;
use super::{charge, limit};

/// As in production; a machine that is too busy to keep it only fails more often.
pub(crate) const DEADLINE: Duration = Duration::from_millis(50);
/// How long anything may take that ends by itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn store(url: &str, options: ResilientOptions) -> ResilientStore {
    let redis = RedisStore::open(RedisOptions::new(url).deadline(DEADLINE)).unwrap();
    ResilientStore::new(redis, options)
}

/// Stores that know of each other.
pub(crate) async fn fleet(url: &str, size: u32) -> Vec<ResilientStore> {
    let stores: Vec<_> = (0..size).map(|_| store(url, ResilientOptions::default())).collect();
    for store in &stores {
        until("all are known", || store.instances().count == size && store.state() == Circuit::Closed).await;
    }
    stores
}

pub(crate) async fn until(what: &str, mut reached: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < PATIENCE, "{what}: never");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    start.elapsed()
}

/// Until every store shares again.
pub(crate) async fn shared(stores: &[ResilientStore]) -> Duration {
    until("shared again", || stores.iter().all(|store| store.state() == Circuit::Closed)).await
}

pub(crate) async fn ask(store: &ResilientStore, limit: &Arc<Limit>, amount: u64) -> Decision {
    store.reserve(charge(limit, "alice", amount)).await.unwrap()
}

/// Asks every store in turn until all of them refuse. How many were admitted.
pub(crate) async fn exhaust(stores: &[ResilientStore], limit: &Arc<Limit>) -> u64 {
    let mut admitted = 0;
    loop {
        let mut refused = 0;
        for store in stores {
            match ask(store, limit, 1).await {
                Decision::Granted(_) => admitted += 1,
                Decision::Denied(_) => refused += 1,
            }
        }
        if refused == stores.len() {
            return admitted;
        }
    }
}

/// Makes every store see the latest count.
pub(crate) async fn see(stores: &[ResilientStore], limit: &Arc<Limit>) {
    for store in stores {
        assert_eq!(ask(store, limit, 0).await.source(), Source::Redis);
    }
}

/// What Redis has counted.
pub(crate) async fn count(server: &Server, limit: &Arc<Limit>) -> u64 {
    let store = server.store(server.options()).await;
    store.peek(charge(limit, "alice", 0)).await.unwrap()[0].used
}

pub(crate) fn limits(quota: &str) -> [Arc<Limit>; 4] {
    Algorithm::ALL.map(|algorithm| limit(algorithm.as_str(), quota, algorithm))
}

/// The median and the 99th percentile.
pub(crate) async fn decisions(
    store: &ResilientStore,
    limit: &Arc<Limit>,
    count: usize,
) -> (Duration, Duration) {
    let mut took = Vec::with_capacity(count);
    for _ in 0..count {
        let asked = Instant::now();
        drop(store.reserve(charge(limit, "bob", 1)).await.unwrap());
        took.push(asked.elapsed());
    }
    took.sort();
    (took[count / 2], took[count * 99 / 100])
}
