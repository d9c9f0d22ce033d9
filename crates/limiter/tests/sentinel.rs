//! A master that sentinels name, through failovers of real servers.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use support::fleet::{Instance, addresses, sentinel, sentinel_with, sentinels, until};
use support::{charge, limit};
use tollgate_limiter::{Algorithm, Limit, RedisOptions, RedisStore, Store, StoreError, Topology};

/// Longer than the 50 ms of every day: what is asked here is who answers, not how fast on a busy machine.
const DEADLINE: Duration = Duration::from_millis(250);

fn open(sentinels: &[Instance]) -> RedisStore {
    let url = format!("redis+sentinel://{}/mymaster", addresses(sentinels));
    RedisStore::open(RedisOptions::new(&url).deadline(DEADLINE)).unwrap()
}

fn counter() -> Arc<Limit> {
    limit("r", "1000000/day", Algorithm::FixedWindow)
}

async fn answers(store: &RedisStore) -> bool {
    store.reserve(charge(&counter(), "alice", 1)).await.is_ok()
}

/// Asks all the time, until somebody else than `before` answers; the longest time without an answer.
async fn longest_gap(store: &RedisStore, before: &str) -> Duration {
    let (start, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
    loop {
        if answers(store).await {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            let status = store.status();
            if status.connected && status.address != before {
                return longest;
            }
        }
        assert!(start.elapsed().as_secs() < 30, "it never moved: {:?}", store.status());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn knows(sentinel: &Instance, words: &str) -> bool {
    sentinel.ask::<String>("INFO sentinel").await.contains(words)
}

#[tokio::test]
async fn a_failover_is_followed() {
    let (master, replica, sentinels, store) = watched().await;
    let status = store.status();
    assert_eq!((status.topology, status.address), (Topology::Sentinel, master.address()));
    assert_eq!(status.role.as_deref(), Some("master"));
    sentinels[0].ask::<()>("SENTINEL FAILOVER mymaster").await;
    let gap = longest_gap(&store, &master.address()).await;
    println!("a failover that was asked for: {gap:?} without Redis");
    assert_eq!(store.status().address, replica.address());
    assert!(gap < Duration::from_secs(5), "{gap:?}");
}

/// A master and its replica, watched by three sentinels that know everybody, and a store that counts there.
async fn watched() -> (Instance, Instance, Vec<Instance>, RedisStore) {
    let master = Instance::start(&["--repl-diskless-sync-delay", "0"]).await;
    let replica = Instance::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    until("the replica has caught up", async || {
        master.ask::<String>("INFO replication").await.contains("state=online")
    })
    .await;
    let sentinels = sentinels(3, &master, 2).await;
    let store = open(&sentinels);
    until("it counts", async || answers(&store).await).await;
    for sentinel in &sentinels {
        until("sentinels know each other and the replica", async || {
            knows(sentinel, "slaves=1,sentinels=3").await
        })
        .await;
    }
    until("the replica has the counter", async || {
        replica.ask::<String>("INFO keyspace").await.contains("db0:keys=2")
    })
    .await;
    (master, replica, sentinels, store)
}

#[tokio::test]
async fn a_killed_master_is_replaced() {
    let (mut master, replica, _sentinels, store) = watched().await;
    let used = async || store.peek(charge(&counter(), "alice", 0)).await.unwrap()[0].used;
    let before = used().await;
    master.kill();
    let gap = longest_gap(&store, &master.address()).await;
    println!("a master that was killed: {gap:?} without Redis");
    assert_eq!(store.status().address, replica.address());
    assert!(gap < Duration::from_secs(10), "{gap:?}");
    assert!(used().await >= before, "the counter lives on");
}

#[tokio::test]
async fn a_frozen_master_is_replaced_for_good() {
    let (master, replica, _sentinels, store) = watched().await;
    master.signal("STOP");
    let gap = longest_gap(&store, &master.address()).await;
    println!("a master that was frozen: {gap:?} without Redis");
    assert!(gap < Duration::from_secs(10), "{gap:?}");
    // It wakes up and knows nothing of what happened.
    master.signal("CONT");
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1_500) {
        let asked = answers(&store).await;
        assert_eq!((asked, store.status().address), (true, replica.address()));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The old master still calls itself one, and takes every write.
#[tokio::test]
async fn a_deposed_master_is_left() {
    let secret = ["--requirepass", "m"];
    let (mut old, mut new) = (Instance::start(&secret).await, Instance::start(&secret).await);
    (old.password, new.password) = ("m", "m");
    let more = "requirepass s\nsentinel auth-pass mymaster m\n";
    let mut sentinel = sentinel_with(&old, 1, 0, more).await;
    sentinel.password = "s";
    let url = format!("redis+sentinel://:m@{}/mymaster?sentinel_password=s", sentinel.address());
    let store = RedisStore::open(RedisOptions::new(&url).deadline(DEADLINE)).unwrap();
    until("it counts", async || answers(&store).await).await;
    assert_eq!(store.status().address, old.address());
    for (from, to) in [(&old, &new), (&new, &old)] {
        sentinel.ask::<()>("SENTINEL REMOVE mymaster").await;
        assert!(answers(&store).await, "nobody else is known");
        sentinel.ask::<()>(&format!("SENTINEL MONITOR mymaster 127.0.0.1 {} 1", to.port)).await;
        let start = Instant::now();
        longest_gap(&store, &from.address()).await;
        println!("moved {:?} after the sentinel knew", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert_eq!(store.status().address, to.address());
    }
}

/// A sentinel that missed the last failover is not believed, and neither is one that knows nothing.
#[tokio::test]
async fn the_latest_failover_counts() {
    let (old, new) = (Instance::start(&[]).await, Instance::start(&[]).await);
    let (stale, fresh) = (sentinel(&old, 1, 4).await, sentinel(&new, 1, 5).await);
    let url = format!("redis+sentinel://127.0.0.1:1,{},{}/mymaster", stale.address(), fresh.address());
    let store = RedisStore::open(RedisOptions::new(&url).deadline(DEADLINE)).unwrap();
    until("the fresh one is believed", async || {
        answers(&store).await && store.status().address == new.address()
    })
    .await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1_500) {
        assert!(answers(&store).await);
        assert_eq!(store.status().address, new.address());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let unknown = url.replace("mymaster", "nomaster");
    let store = RedisStore::open(RedisOptions::new(&unknown).deadline(DEADLINE)).unwrap();
    let failed = store.reserve(charge(&counter(), "alice", 1)).await.unwrap_err();
    // On a machine too busy to say why in time it is a timeout, which claims less.
    assert!(matches!(failed, StoreError::Unreachable | StoreError::Timeout), "{failed:?}");
    until("it is told why", async || {
        let problem = store.status().problem.unwrap_or_default();
        problem.contains("it knows no master named `nomaster`") && problem.contains("127.0.0.1:1: ")
    })
    .await;
}
