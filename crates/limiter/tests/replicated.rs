//! Limits whose grants wait for a replica.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use support::fleet::{Instance, until};
use support::resilient::PATIENCE;
use support::{charge, denied, granted, limit};
use tollgate_limiter::{
    Algorithm, Charge, Circuit, Limit, RedisOptions, RedisStore, ResilientOptions, ResilientStore, Source,
    Store, StoreError, WhenDown,
};

async fn pair() -> (Instance, Instance) {
    let master = Instance::start(&["--repl-diskless-sync-delay", "0"]).await;
    let replica = Instance::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    until("the replica has caught up", async || {
        master.ask::<String>("INFO replication").await.contains("state=online")
    })
    .await;
    (master, replica)
}

fn open(master: &Instance) -> RedisStore {
    let url = format!("redis://{}", master.address());
    RedisStore::open(RedisOptions::new(&url).deadline(Duration::from_millis(500))).unwrap()
}

fn replicated(rule: &str, quota: &str, when_down: WhenDown) -> Arc<Limit> {
    let limit = limit(rule, quota, Algorithm::FixedWindow).as_ref().clone();
    Arc::new(limit.replicated().when_down(when_down))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_waits_for_a_replica() {
    let (master, replica) = pair().await;
    let store = open(&master);
    let (safe, plain) =
        (replicated("safe", "100/day", WhenDown::Share), limit("r", "100/day", Algorithm::FixedWindow));
    assert!(safe.is_replicated() && !plain.is_replicated());
    until("it is connected", async || store.reserve(charge(&plain, "alice", 1)).await.is_ok()).await;
    until("a replica acknowledges", async || {
        !granted(store.reserve(charge(&safe, "alice", 1)).await.unwrap()).is_unreplicated()
    })
    .await;
    let unreplicated = store.counts().unreplicated;
    // It has it, at once and always.
    for turn in 1..=20 {
        let reservation = granted(store.reserve(charge(&safe, "bob", 1)).await.unwrap());
        assert!(!reservation.is_unreplicated());
        let there = open_replica(&replica).await;
        assert_eq!(there.peek(charge(&safe, "bob", 0)).await.unwrap()[0].used, turn);
    }
    assert_eq!(store.counts().unreplicated, unreplicated);
    replica.signal("STOP");
    let asked = Instant::now();
    let reservation = granted(store.reserve(charge(&safe, "bob", 1)).await.unwrap());
    println!("without an acknowledgement after {:?}", asked.elapsed());
    assert!(reservation.is_unreplicated() && asked.elapsed() >= Duration::from_millis(20));
    assert_eq!(store.counts().unreplicated, unreplicated + 1);
    assert_eq!(store.peek(charge(&safe, "bob", 0)).await.unwrap()[0].used, 21, "the charge stands");
    // Nobody else waits, nor does a refusal.
    let plain_too: Vec<Charge> = charge(&plain, "bob", 1);
    assert!(!granted(store.reserve(plain_too).await.unwrap()).is_unreplicated());
    denied(store.reserve(charge(&safe, "bob", 90)).await.unwrap());
    // Many at once: over a few connections of their own.
    let connections = store.counts().connections;
    let ask = |number: u64| {
        let (store, safe) = (store.clone(), Arc::clone(&safe));
        tokio::spawn(async move { store.reserve(charge(&safe, &format!("user{number}"), 1)).await })
    };
    let asked = Instant::now();
    for asked in (0..24).map(ask).collect::<Vec<_>>() {
        assert!(granted(asked.await.unwrap().unwrap()).is_unreplicated());
    }
    println!("24 at once, all within {:?}", asked.elapsed());
    assert!(store.counts().connections <= connections + 3, "{:?}", store.counts());
    replica.signal("CONT");
    until("a replica acknowledges again", async || {
        !granted(store.reserve(charge(&safe, "carol", 0)).await.unwrap()).is_unreplicated()
            && !granted(store.reserve(charge(&safe, "carol", 1)).await.unwrap()).is_unreplicated()
    })
    .await;
}

/// A store that only looks, at a replica.
async fn open_replica(replica: &Instance) -> RedisStore {
    let store = open(replica);
    let nobody = limit("r", "1/day", Algorithm::FixedWindow);
    until("it answers", async || store.peek(charge(&nobody, "nobody", 0)).await.is_ok()).await;
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_one_the_limit_says_what_it_says_while_down() {
    let (master, replica) = pair().await;
    let store = ResilientStore::new(open(&master), ResilientOptions::default().instances(1));
    let share = replicated("share", "10/day", WhenDown::Share);
    let open = replicated("open", "10/day", WhenDown::Open);
    let closed = replicated("closed", "10/day", WhenDown::Closed);
    let plain = limit("plain", "10/day", Algorithm::FixedWindow);
    until("it is connected", async || store.redis().ping().await.is_ok()).await;
    until("it counts with a replica", async || {
        let decision = store.reserve(charge(&share, "nobody", 1)).await.unwrap();
        decision.source() == Source::Redis
    })
    .await;
    let (before, unreplicated) = (store.counts(), store.redis().counts().unreplicated);
    replica.signal("STOP");
    let used = async |limit: &Arc<Limit>| store.peek(charge(limit, "alice", 0)).await.unwrap()[0].used;
    let both = charge(&plain, "alice", 1).into_iter().chain(charge(&share, "alice", 2)).collect();
    let reservation = granted(store.reserve(both).await.unwrap());
    assert_eq!((reservation.source(), reservation.standings().len()), (Source::Share, 2));
    assert_eq!((used(&plain).await, used(&share).await), (1, 2));
    // Settled where it was charged.
    reservation.settled(&[1, 1]).await.unwrap();
    assert_eq!(used(&share).await, 1);
    let decision = store.reserve(charge(&open, "alice", 3)).await.unwrap();
    assert_eq!((decision.is_granted(), decision.source()), (true, Source::Open));
    assert_eq!(used(&open).await, 3);
    let refused = store.reserve(charge(&closed, "alice", 4)).await;
    assert!(matches!(refused, Err(StoreError::Closed { .. })), "{refused:?}");
    assert_eq!(used(&closed).await, 4, "the charge stands");
    let counts = store.counts();
    let more =
        (counts.share - before.share, counts.uncounted - before.uncounted, counts.closed - before.closed);
    assert_eq!(more, (1, 1, 1));
    assert_eq!(store.redis().counts().unreplicated - unreplicated, 3);
    assert_eq!(store.state(), Circuit::Closed, "Redis answers");
    // Nothing is owed for it: Redis was charged once.
    let start = Instant::now();
    replica.signal("CONT");
    while store.reserve(charge(&share, "alice", 0)).await.unwrap().source() != Source::Redis
        || store.reserve(charge(&share, "bob", 1)).await.unwrap().source() != Source::Redis
    {
        assert!(start.elapsed() < PATIENCE);
    }
    assert_eq!((used(&share).await, store.counts().charged_late), (1, before.charged_late));
}
