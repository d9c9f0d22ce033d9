//! Calls in flight that many processes count together: what only a store in Redis promises of them.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use support::agreement::FUTURE;
use support::server::Server;
use support::{charge, denied, granted, limit, slots, user};
use tollgate_limiter::{Algorithm, Decision, LEASE, Limit, ManualClock, Millis, RedisStore, Source, Store};

const SET: &str = "tollgate:{alice}:rl:user:alice:c";

async fn members(client: &mut MultiplexedConnection) -> Vec<String> {
    redis::cmd("ZRANGE").arg(SET).arg(0).arg(-1).query_async(client).await.unwrap()
}

async fn used(store: &RedisStore, limit: &Arc<Limit>) -> u64 {
    store.peek(charge(limit, "alice", 1)).await.unwrap()[0].used
}

/// Calls of several stores, gathered or not, hold slots and give them back: never more at once than there are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_more_at_once_than_slots() {
    let server = Server::start();
    let limit = slots("gpu", 7);
    let plain = server.options().without_coalescing().without_denial_memory();
    let stores = [server.store(server.options()).await, server.store(plain).await];
    let (running, most, granted) = <(Arc<AtomicU64>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
    let call = |number: usize| {
        let (store, limit) = (stores[number % 2].clone(), Arc::clone(&limit));
        let (running, most, granted) = (running.clone(), most.clone(), granted.clone());
        tokio::spawn(async move {
            for _ in 0..60 {
                let Decision::Granted(slot) = store.reserve(charge(&limit, "alice", 1)).await.unwrap() else {
                    continue;
                };
                granted.fetch_add(1, Ordering::SeqCst);
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                running.fetch_sub(1, Ordering::SeqCst);
                assert_eq!(slot.settled(&[]).await.unwrap()[0].returned, 1);
            }
        })
    };
    for call in (0..40).map(call).collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert!(most.load(Ordering::SeqCst) <= 7, "{most:?} at once");
    assert!(granted.load(Ordering::SeqCst) > 100, "{granted:?} granted");
    assert_eq!(used(&stores[0], &limit).await, 0);
    assert_eq!(members(&mut server.client().await).await, [""; 0], "nothing is left behind");
}

/// Another instance releases its slot: whoever was refused a moment ago gets it. Other limits are remembered all the same.
#[tokio::test]
async fn a_refusal_for_want_of_a_slot_is_not_remembered() {
    let server = Server::start();
    let (here, there) = (server.store(server.options()).await, server.store(server.options()).await);
    let (slot, day) = (slots("gpu", 1), limit("r", "3/366 days", Algorithm::FixedWindow));
    let both = |amount| [charge(&slot, "alice", 1), charge(&day, "alice", amount)].concat();
    for _ in 0..3 {
        let held = granted(there.reserve(both(1)).await.unwrap());
        for _ in 0..2 {
            let refused = denied(here.reserve(both(1)).await.unwrap());
            assert_eq!((refused.source(), refused.binding_index()), (Source::Redis, 0));
        }
        assert_eq!(held.settled(&[0, 0]).await.unwrap()[0].returned, 1);
        let mine = granted(here.reserve(both(1)).await.unwrap());
        mine.settled(&[0, 0]).await.unwrap();
    }
    // Refused by both: what the other limit has no room for is known, what it has room for is asked.
    let held = granted(there.reserve(both(2)).await.unwrap());
    assert_eq!(denied(here.reserve(both(2)).await.unwrap()).source(), Source::Redis);
    assert_eq!(denied(here.reserve(both(2)).await.unwrap()).source(), Source::DenialMemory);
    assert_eq!(denied(here.reserve(both(1)).await.unwrap()).source(), Source::Redis);
    held.settled(&[0, 2]).await.unwrap();
    drop(granted(here.reserve(both(1)).await.unwrap()));
}

#[tokio::test]
async fn what_a_crashed_instance_held_comes_back() {
    let server = Server::start();
    let clock = ManualClock::at(Millis(FUTURE));
    let options = server.options().without_denial_memory().rehearse(clock.clone(), &[]);
    let limit = slots("gpu", 3);
    let crashed = server.store(options.clone()).await;
    for _ in 0..3 {
        drop(granted(crashed.reserve(charge(&limit, "alice", 1)).await.unwrap()));
    }
    drop(crashed);
    let store = server.store(options).await;
    let mut client = server.client().await;
    clock.advance(LEASE - Millis(1));
    denied(store.reserve(charge(&limit, "alice", 1)).await.unwrap());
    clock.advance(Millis(1));
    // Looking and refusing remove nothing; a grant does.
    denied(store.reserve(charge(&limit, "alice", 4)).await.unwrap());
    assert_eq!((used(&store, &limit).await, members(&mut client).await.len()), (0, 4));
    let held = granted(store.reserve(charge(&limit, "alice", 2)).await.unwrap());
    assert_eq!(members(&mut client).await.len(), 2);
    held.settled(&[]).await.unwrap();
    assert!(members(&mut client).await.is_empty());
}

/// Of a limit that is no more, also leases leave, a day after they ended.
#[tokio::test]
async fn leases_of_limits_that_are_no_more_leave() {
    let server = Server::start();
    let clock = ManualClock::at(Millis(FUTURE));
    let store = server.store(server.options().rehearse(clock.clone(), &[])).await;
    let mut client = server.client().await;
    let take = async |limit: &Arc<Limit>| {
        drop(granted(store.reserve(charge(limit, "alice", 2)).await.unwrap()));
    };
    let (old, new) = (slots("old", 9), slots("new", 9));
    take(&old).await;
    take(&old).await;
    clock.advance(Millis(40_000));
    take(&new).await;
    let kept = members(&mut client).await;
    assert_eq!(kept.iter().filter(|member| member.ends_with("c:old-concurrency")).count(), 3, "{kept:?}");
    clock.advance(Millis(86_400_000));
    take(&new).await;
    let kept = members(&mut client).await;
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert!(kept.iter().all(|member| member.ends_with("c:new-concurrency")));
}

/// One of the two keys is lost: nothing is stuck, and nobody's call takes another's slot.
#[tokio::test]
async fn either_key_may_be_lost() {
    let server = Server::start();
    let store = server.store(server.options().without_denial_memory()).await;
    let mut client = server.client().await;
    let limit = slots("gpu", 2);
    for lost in [SET, SET.strip_suffix(":c").unwrap()] {
        let take = async || granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap());
        let held = [take().await, take().await];
        redis::cmd("DEL").arg(lost).query_async::<i64>(&mut client).await.unwrap();
        let gone = lost == SET;
        assert_eq!(used(&store, &limit).await, if gone { 0 } else { 2 });
        for call in held {
            assert_eq!(call.settled(&[]).await.unwrap()[0].returned, u64::from(!gone));
        }
        let both = [take().await, take().await];
        denied(store.reserve(charge(&limit, "alice", 1)).await.unwrap());
        for call in both {
            assert_eq!(call.settled(&[]).await.unwrap()[0].returned, 1);
        }
        store.clear(&user("alice")).await.unwrap();
    }
    // Nonsense in its place is an error.
    redis::cmd("SET").arg(SET).arg("text").query_async::<()>(&mut client).await.unwrap();
    store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
    assert!(store.clear(&user("alice")).await.unwrap());
    drop(granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap()));
}

/// A heartbeat is sent and not awaited.
#[tokio::test]
async fn a_heartbeat_arrives() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let mut client = server.client().await;
    let limit = slots("gpu", 2);
    let held = granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap());
    let end = async |client: &mut MultiplexedConnection| -> i64 {
        let last = redis::cmd("ZRANGE").arg(SET).arg(-1).arg(-1).arg("WITHSCORES").clone();
        last.query_async::<Vec<String>>(client).await.unwrap()[1].parse().unwrap()
    };
    let first = end(&mut client).await;
    let start = Instant::now();
    while end(&mut client).await == first {
        held.renew();
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::task::yield_now().await;
    }
    assert_eq!(used(&store, &limit).await, 1);
    assert_eq!(store.counts().settlements_lost, 0);
}

/// On several threads at that, the end of a call comes after all its heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_never_outlives_its_call() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let limit = slots("gpu", 2);
    for _ in 0..300 {
        let call = granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap());
        call.renew();
        call.renew();
        call.settled(&[]).await.unwrap();
        assert_eq!(used(&store, &limit).await, 0);
    }
}
