//! Counters that Redis has lost: whoever saw them tells it again, once, on top of what was charged meanwhile.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::fleet::{self, Instance};
use support::resilient::{PATIENCE, ask, count, exhaust, fleet, limits, see, shared, until};
use support::server::Server;
use support::{charge, limit, user};
use tollgate_limiter::{
    Algorithm, Circuit, Limit, RedisOptions, RedisStore, ResilientOptions, ResilientStore, Source, Store,
};

/// Stores that know of each other, and wait for a busy machine.
async fn patient(url: &str, size: u32) -> Vec<ResilientStore> {
    let open = || RedisStore::open(RedisOptions::new(url).deadline(Duration::from_millis(500))).unwrap();
    let stores: Vec<_> =
        (0..size).map(|_| ResilientStore::new(open(), ResilientOptions::default())).collect();
    for store in &stores {
        let known = || store.instances().count == size && store.state() == Circuit::Closed;
        until("all are known", known).await;
    }
    stores
}

async fn used(store: &ResilientStore, limit: &Arc<Limit>) -> u64 {
    store.redis().peek(charge(limit, "alice", 0)).await.unwrap()[0].used
}

async fn flush(server: &Server) {
    redis::cmd("FLUSHALL").query_async::<()>(&mut server.client().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushed_under_load() {
    const L: u64 = 900;
    for limit in limits("900/day") {
        let server = Server::start();
        server.client().await;
        let stores = patient(&server.url(), 3).await;
        let (admitted, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let load = |store: &ResilientStore| {
            let (store, limit) = (store.clone(), Arc::clone(&limit));
            let (admitted, over) = (Arc::clone(&admitted), Arc::clone(&over));
            tokio::spawn(async move {
                while !over.load(Ordering::SeqCst) {
                    if ask(&store, &limit, 1).await.is_granted() {
                        admitted.fetch_add(1, Ordering::SeqCst);
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        };
        let loads: Vec<_> = stores.iter().map(load).collect();
        until("half of it is used", || admitted.load(Ordering::SeqCst) > L / 2).await;
        flush(&server).await;
        let (before, flushed) = (admitted.load(Ordering::SeqCst), Instant::now());
        while used(&stores[0], &limit).await < before {
            assert!(flushed.elapsed() < PATIENCE, "{limit:?}: it was never healed");
        }
        let (took, meanwhile) = (flushed.elapsed(), admitted.load(Ordering::SeqCst) - before);
        let start = Instant::now();
        while start.elapsed() < PATIENCE && used(&stores[0], &limit).await < L {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        over.store(true, Ordering::SeqCst);
        for load in loads {
            load.await.unwrap();
        }
        let total = admitted.load(Ordering::SeqCst) + exhaust(&stores, &limit).await;
        println!(
            "{}: {before} admitted, flushed, {meanwhile} more until it was healed {took:?} later; {total} of {L}",
            limit.algorithm()
        );
        assert!(total <= L + meanwhile, "{limit:?}: {total}, {meanwhile} before it was healed");
        // Three told the same: it counts once. A decision or two may have been on their way.
        assert!(total + 10 >= L, "{limit:?}: {total}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_asks_for_is_told_too() {
    let server = Server::start();
    let stores = patient(&server.url(), 2).await;
    let limits = limits("1000/day");
    for (number, store) in stores.iter().enumerate() {
        for limit in &limits {
            for name in 0..20 {
                let name = format!("user{name}");
                drop(store.reserve(charge(limit, &name, 3 + number as u64)).await.unwrap());
            }
        }
    }
    flush(&server).await;
    let flushed = Instant::now();
    let all_told = async || {
        for limit in &limits {
            for name in 0..20 {
                let charges = charge(limit, &format!("user{name}"), 0);
                if stores[0].redis().peek(charges).await.unwrap()[0].used != 7 {
                    return false;
                }
            }
        }
        true
    };
    // Nobody asks: heartbeats find out.
    while !all_told().await {
        assert!(flushed.elapsed() < PATIENCE, "never told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("found out and told {:?} later", flushed.elapsed());
    // The other one tells it too, whoever came first.
    while !stores.iter().all(|store| store.counts().healed >= 80) {
        assert!(flushed.elapsed() < PATIENCE, "only one has told it");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn started_again_without_persistence() {
    const N: u64 = 3;
    const L: u64 = 60;
    let mut server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    for limit in limits("60/day") {
        let mut admitted = 0;
        for turn in 0..30 {
            admitted += u64::from(ask(&stores[turn % 3], &limit, 1).await.is_granted());
        }
        see(&stores, &limit).await;
        server.crash();
        for store in &stores {
            for _ in 0..3 {
                admitted += u64::from(ask(store, &limit, 1).await.is_granted());
            }
        }
        until("all stopped asking", || stores.iter().all(|store| store.state().is_open())).await;
        server.again();
        server.client().await;
        shared(&stores).await;
        let start = Instant::now();
        while count(&server, &limit).await < admitted {
            assert!(start.elapsed() < PATIENCE, "{limit:?}: {} of {admitted}", count(&server, &limit).await);
        }
        assert_eq!(count(&server, &limit).await, admitted, "{limit:?}");
        admitted += exhaust(&stores, &limit).await;
        assert!((L..=L + N).contains(&admitted), "{limit:?}: {admitted}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cleared_stays_cleared() {
    let server = Server::start();
    let stores = patient(&server.url(), 3).await;
    let limit = limit("r", "100/day", Algorithm::FixedWindow);
    drop(ask(&stores[0], &limit, 40).await);
    see(&stores, &limit).await;
    assert_eq!(stores[0].clear(&user("alice")).await, Ok(true));
    // Two were not told: they see that it was cleared, not lost.
    for store in &stores {
        assert!(ask(store, &limit, 1).await.is_granted());
    }
    let seen_by_two: Vec<u64> = stores.iter().map(|store| store.counts().healed).collect();
    assert_eq!((used(&stores[0], &limit).await, seen_by_two), (3, vec![0, 0, 0]));
    // Told, they do not bring it back when everything is lost.
    stores[1].clear(&user("alice")).await.unwrap();
    stores.iter().for_each(|store| store.forget(&user("alice")));
    let bob = || charge(&limit, "bob", 5);
    drop(stores[0].reserve(bob()).await.unwrap());
    flush(&server).await;
    let start = Instant::now();
    while stores[0].redis().peek(bob()).await.unwrap()[0].used < 5 {
        assert!(start.elapsed() < PATIENCE);
        drop(stores[0].reserve(charge(&limit, "bob", 0)).await.unwrap());
    }
    assert_eq!(used(&stores[0], &limit).await, 0);
}

/// Everything is told when one counter is found to be lost; what the same server has shown of the others, and was given
/// back since, is no news.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_given_back_stays_given_back() {
    let server = Server::start();
    let stores = patient(&server.url(), 1).await;
    let (store, limits) = (&stores[0], limits("100/day"));
    for limit in &limits {
        let kept = support::granted(store.reserve(charge(limit, "alice", 30)).await.unwrap());
        let refunded = support::granted(store.reserve(charge(limit, "alice", 20)).await.unwrap());
        assert_eq!(used(store, limit).await, 50);
        refunded.settled(&[0]).await.unwrap();
        drop(kept);
        assert_eq!(used(store, limit).await, 30);
    }
    drop(store.reserve(charge(&limits[0], "bob", 5)).await.unwrap());
    let keys = ["tollgate:{bob}:rl:user:bob", "tollgate:ctl:epoch"];
    let gone: u64 = redis::cmd("DEL").arg(&keys).query_async(&mut server.client().await).await.unwrap();
    assert_eq!(gone, 2);
    drop(store.reserve(charge(&limits[0], "bob", 1)).await.unwrap());
    until("all are told", || store.counts().healed >= 2 + limits.len() as u64).await;
    for limit in &limits {
        assert_eq!(used(store, limit).await, 30, "{limit:?}");
    }
    let bob = store.peek(charge(&limits[0], "bob", 0)).await.unwrap();
    assert_eq!(bob[0].used, 6);
}

/// A master and its replica, watched by three sentinels, and stores that count there.
async fn watched(size: u32) -> (Instance, Instance, Vec<Instance>, Vec<ResilientStore>) {
    let master = Instance::start(&["--repl-diskless-sync-delay", "0"]).await;
    let replica = Instance::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    fleet::until("the replica has caught up", async || {
        master.ask::<String>("INFO replication").await.contains("state=online")
    })
    .await;
    let sentinels = fleet::sentinels(3, &master, 2).await;
    for sentinel in &sentinels {
        fleet::until("sentinels know each other and the replica", async || {
            sentinel.ask::<String>("INFO sentinel").await.contains("slaves=1,sentinels=3")
        })
        .await;
    }
    let url = format!("redis+sentinel://{}/mymaster", fleet::addresses(&sentinels));
    let stores = patient(&url, size).await;
    (master, replica, sentinels, stores)
}

async fn moved(stores: &[ResilientStore], to: &Instance) {
    for store in stores {
        until("all are at the new master", || {
            let status = store.redis().status();
            status.connected && status.address == to.address() && store.state() == Circuit::Closed
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_lost_writes() {
    const L: u64 = 100;
    let (mut master, replica, _sentinels, stores) = watched(3).await;
    let limits = limits("100/day");
    for limit in &limits {
        drop(ask(&stores[0], limit, 30).await);
    }
    fleet::until("the replica has it", async || {
        let offset = |info: String| {
            info.lines().find_map(|line| line.strip_prefix("master_repl_offset:").map(str::to_string))
        };
        offset(master.ask("INFO replication").await) == offset(replica.ask("INFO replication").await)
    })
    .await;
    // From now on the replica is not let in.
    master.ask::<()>("CONFIG SET requirepass secret").await;
    master.password = "secret";
    master.ask::<u64>("CLIENT KILL TYPE replica").await;
    let late = support::limit("late", "100/day", Algorithm::FixedWindow);
    for limit in limits.iter().chain([&late]) {
        drop(ask(&stores[1], limit, 40).await);
    }
    master.kill();
    moved(&stores, &replica).await;
    for (limit, seen) in limits.iter().zip([70; 4]).chain([(&late, 40)]) {
        let start = Instant::now();
        while used(&stores[2], limit).await < seen {
            assert!(start.elapsed() < PATIENCE, "{limit:?}: {} is never told", used(&stores[2], limit).await);
        }
        let more = exhaust(&stores, limit).await;
        assert_eq!(more, L - seen, "{limit:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_lost_nothing() {
    let (master, replica, sentinels, stores) = watched(2).await;
    let limits = limits("100/day");
    for limit in &limits {
        drop(ask(&stores[0], limit, 30).await);
        drop(ask(&stores[1], limit, 20).await);
    }
    // Behind sentinels, too, a grant can wait for a replica.
    let safe = support::limit("safe", "100/day", Algorithm::FixedWindow).as_ref().clone().replicated();
    let safe = Arc::new(safe);
    fleet::until("a replica acknowledges", async || {
        !support::granted(stores[0].redis().reserve(charge(&safe, "alice", 1)).await.unwrap())
            .is_unreplicated()
    })
    .await;
    sentinels[0].ask::<()>("SENTINEL FAILOVER mymaster").await;
    moved(&stores, &replica).await;
    until("all have told", || stores.iter().all(|store| store.counts().healed >= 4)).await;
    for limit in &limits {
        assert_eq!(used(&stores[0], limit).await, 50, "{limit:?}");
        assert_eq!(ask(&stores[1], limit, 0).await.source(), Source::Redis);
    }
    drop(master);
}
