//! Limits whose counters are on several masters of a real cluster.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::fleet::{Authority, Instance, cluster, free_port, until};
use support::{denied, granted, limit, user};
use tollgate_limiter::{
    Algorithm, Charge, Decision, Dimension, Limit, RedisOptions, RedisStore, Retry, Scope, Source, Store,
    Subject, Tls, Topology,
};

const PATIENT: Duration = Duration::from_secs(10);

async fn connected(nodes: &[Instance], deadline: Duration) -> RedisStore {
    // Two of them are enough.
    let url = format!("redis+cluster://{},{}", nodes[1].address(), nodes[0].address());
    let store = RedisStore::open(RedisOptions::new(&url).deadline(deadline)).unwrap();
    until("it is connected", async || store.ping().await.is_ok() && store.status().connected).await;
    store
}

fn of(limit: &Arc<Limit>, subject: Subject, amount: u64) -> Charge {
    Charge::new(Arc::clone(limit), subject, amount)
}

fn model_of(name: &str, tenant: &str) -> Subject {
    let value = |dimension| Cow::Borrowed(if dimension == Dimension::User { name } else { "m" });
    Scope::of([Dimension::User, Dimension::Model]).subject(value).of_tenant(tenant)
}

async fn used(store: &RedisStore, limit: &Arc<Limit>, subject: &Subject) -> u64 {
    store.peek(vec![of(limit, subject.clone(), 0)]).await.unwrap()[0].used
}

/// Names of users whose counters are on three different masters: slots of the three thirds.
fn far_apart() -> [Subject; 3] {
    // Slots 12182, 5061 and 6206.
    ["foo", "bar", "carol"].map(user)
}

/// Subjects with counters.
async fn keys(node: &Instance) -> usize {
    node.ask::<Vec<String>>("KEYS *:rl:*").await.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn charges_far_apart_are_taken_all_or_none() {
    let nodes = cluster(false).await;
    let store = connected(&nodes, PATIENT).await;
    let status = store.status();
    assert_eq!((status.topology, status.address.split(',').count()), (Topology::Cluster, 3), "{status:?}");
    assert!(store.info().await.unwrap().used_memory.is_some());
    for algorithm in Algorithm::ALL.into_iter().filter(|algorithm| *algorithm != Algorithm::Concurrency) {
        let (wide, narrow) =
            (limit("wide", "90/366 days", algorithm), limit("narrow", "40/366 days", algorithm));
        let far = far_apart();
        let charges = |amount: u64| -> Vec<Charge> {
            // Two charges on one counter, and all of them out of order.
            let mut all: Vec<Charge> = far.iter().map(|subject| of(&wide, subject.clone(), amount)).collect();
            all.push(of(&narrow, far[1].clone(), amount));
            all
        };
        let clear = async || {
            for subject in &far {
                assert!(store.clear(subject).await.unwrap());
            }
        };
        let reservation = granted(store.reserve(charges(30)).await.unwrap());
        let names: Vec<&str> = reservation.standings().iter().map(|s| s.subject.as_str()).collect();
        assert_eq!(names, ["user:foo", "user:bar", "user:carol", "user:bar"], "in the order of the charges");
        assert!(reservation.standings().iter().all(|s| s.taken && s.used == 30), "{reservation:?}");
        // One has no room: nobody pays.
        let denial = denied(store.reserve(charges(20)).await.unwrap());
        assert_eq!((denial.binding_index(), denial.source()), (3, Source::Redis));
        let told: Vec<(u64, bool)> =
            denial.standings().iter().map(|s| (s.used, s.retry == Retry::Now)).collect();
        assert_eq!(told, [(30, true), (30, true), (30, true), (30, false)], "{denial:?}");
        let (scripts, start) = (store.counts().scripts, Instant::now());
        until("a refusal is remembered", async || {
            denied(store.reserve(charges(20)).await.unwrap()).source() == Source::DenialMemory
        })
        .await;
        println!("remembered after {:?}, {} scripts", start.elapsed(), store.counts().scripts - scripts);
        until("what was taken is given back", async || {
            let levels = [used(&store, &wide, &far[0]).await, used(&store, &wide, &far[2]).await];
            levels == [30, 30]
        })
        .await;
        // Settled in every slot. (Of a bucket, what others gave back meanwhile bounds what is given back.)
        clear().await;
        let reservation = granted(store.reserve(charges(30)).await.unwrap());
        let corrections = reservation.settled(&[10, 50, 30]).await.unwrap();
        assert_eq!(corrections.iter().map(|c| c.returned).collect::<Vec<_>>(), [20, 0, 0, 0]);
        assert_eq!(corrections[1].charged, 20);
        let levels = store.peek(charges(0)).await.unwrap();
        assert_eq!(levels.iter().map(|s| s.used).collect::<Vec<_>>(), [10, 50, 30, 30]);
        clear().await;
    }
    let limit = limit("r", "9/day", Algorithm::FixedWindow);
    let charges: Vec<Charge> = far_apart().into_iter().map(|subject| of(&limit, subject, 1)).collect();
    drop(granted(store.reserve(charges).await.unwrap()));
    for node in &nodes {
        assert_eq!(keys(node).await, 1, "one on each master");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_costs_one_script_and_sums_are_exact() {
    let nodes = cluster(false).await;
    let store = connected(&nodes, PATIENT).await;
    let plain = limit("plain", "1000000/day", Algorithm::FixedWindow);
    let tenant = vec![
        of(&plain, user("alice").of_tenant("team"), 1),
        of(&plain, model_of("alice", "team"), 1),
        of(&plain, user("bob").of_tenant("team"), 1),
    ];
    let before = store.counts().scripts;
    drop(granted(store.reserve(tenant).await.unwrap()));
    assert_eq!(store.counts().scripts - before, 1);
    for algorithm in Algorithm::ALL.into_iter().filter(|algorithm| *algorithm != Algorithm::Concurrency) {
        let (all, own) = (limit("all", "300/366 days", algorithm), limit("own", "150/366 days", algorithm));
        let everybody: Subject = "global".parse().unwrap();
        let charges = |name: &str| vec![of(&all, everybody.clone(), 1), of(&own, user(name), 1)];
        let admitted = Arc::new(AtomicU64::new(0));
        let ask = |store: RedisStore, charges: Vec<Charge>, admitted: Arc<AtomicU64>| async move {
            for _ in 0..25 {
                if let Decision::Granted(_) = store.reserve(charges.clone()).await.unwrap() {
                    admitted.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        // Without the memory of denials, which would be waited for.
        let url = format!("redis+cluster://{}", nodes[2].address());
        let forgetful =
            RedisStore::open(RedisOptions::new(&url).deadline(PATIENT).without_denial_memory()).unwrap();
        let asked: Vec<_> = (0..32)
            .map(|n| {
                let store = if n % 2 == 0 { &store } else { &forgetful };
                let name = ["foo", "bar", "carol"][n % 3];
                tokio::spawn(ask(store.clone(), charges(name), Arc::clone(&admitted)))
            })
            .collect();
        for asked in asked {
            asked.await.unwrap();
        }
        assert!(admitted.load(Ordering::Relaxed) <= 300);
        // Some were refused for a moment only: those who ask again get the rest, and not one more.
        let mut refused = 0;
        while refused < 20 {
            refused += 1;
            for name in ["foo", "bar", "carol"] {
                if let Decision::Granted(_) = forgetful.reserve(charges(name)).await.unwrap() {
                    admitted.fetch_add(1, Ordering::Relaxed);
                    refused = 0;
                }
            }
        }
        assert_eq!(admitted.load(Ordering::Relaxed), 300, "{algorithm}");
        until("levels are those of what was admitted", async || {
            let mut paid = 0;
            for name in ["foo", "bar", "carol"] {
                paid += used(&store, &own, &user(name)).await;
            }
            (used(&store, &all, &everybody).await, paid) == (300, 300)
        })
        .await;
        assert_eq!(store.counts().settlements_lost + forgetful.counts().settlements_lost, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_master_costs_the_others_nothing() {
    let nodes = cluster(false).await;
    let store = connected(&nodes, Duration::from_millis(100)).await;
    let limit = limit("r", "1000/day", Algorithm::FixedWindow);
    let charges: Vec<Charge> = far_apart().into_iter().map(|subject| of(&limit, subject, 1)).collect();
    until("it counts", async || store.reserve(charges.clone()).await.is_ok()).await;
    nodes[0].signal("STOP");
    for _ in 0..5 {
        let start = Instant::now();
        assert!(store.reserve(charges.clone()).await.is_err());
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
    nodes[0].signal("CONT");
    until("it answers again", async || {
        store.peek(charges.clone()).await.is_ok_and(|standings| standings.len() == 3)
    })
    .await;
    // What the others took is given back, and what the frozen one took when it went on.
    until("what was taken is given back", async || {
        let standings = store.peek(charges.clone()).await.unwrap_or_default();
        standings.len() == 3 && standings.iter().all(|standing| standing.used == 1)
    })
    .await;
}

/// An event loop with connections of its own asks again as soon as a master goes on: nobody else would for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_loop_that_joined_is_back_at_once() {
    let nodes = cluster(false).await;
    let store = connected(&nodes, Duration::from_millis(100)).await;
    let other = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let joining = store.clone();
    other.spawn(async move { joining.join_runtime() }).await.unwrap();
    let limit = limit("r", "1000/day", Algorithm::FixedWindow);
    let charges: Vec<Charge> = far_apart().into_iter().map(|subject| of(&limit, subject, 1)).collect();
    let ask = || {
        let (store, charges) = (store.clone(), charges.clone());
        other.spawn(async move { store.reserve(charges).await.map(drop) })
    };
    until("it counts there", async || ask().await.unwrap().is_ok()).await;
    nodes[0].signal("STOP");
    // So often that it is given up.
    for asked in [(); 5].map(|()| ask()) {
        assert!(asked.await.unwrap().is_err());
    }
    nodes[0].signal("CONT");
    let start = Instant::now();
    until("it counts again", async || ask().await.unwrap().is_ok()).await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    other.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_master_s_replica_takes_over() {
    let mut nodes = cluster(true).await;
    let store = connected(&nodes, Duration::from_millis(50)).await;
    let limit = limit("r", "1000000/day", Algorithm::FixedWindow);
    let charges: Vec<Charge> = far_apart().into_iter().map(|subject| of(&limit, subject, 1)).collect();
    until("it counts", async || store.reserve(charges.clone()).await.is_ok()).await;
    let dead = nodes[1].address();
    nodes[1].kill();
    let start = Instant::now();
    let mut alone = 0;
    until("it counts again", async || {
        // Tenants on other masters are not concerned.
        let alive = far_apart().into_iter().filter(|subject| subject.as_str() != "user:carol");
        for subject in alive {
            alone += u64::from(store.reserve(vec![of(&limit, subject, 1)]).await.is_ok());
        }
        store.reserve(charges.clone()).await.is_ok()
    })
    .await;
    println!("a master was killed: {:?} without its slots, {alone} decisions elsewhere", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(15));
    assert!(!store.status().address.contains(&dead), "{:?}", store.status());
    assert!(alone > 0);
}

#[tokio::test]
async fn a_cluster_may_be_encrypted() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let encrypted = authority.files(folder.path(), "localhost");
    let (port, bus) = (free_port().to_string(), free_port().to_string());
    let more =
        ["--tls-port", &port, "--tls-auth-clients", "no", "--cluster-enabled", "yes", "--cluster-port", &bus];
    let more = [&more[..], &["--tls-cluster", "yes"]].concat();
    let files: Vec<&str> = encrypted.iter().map(String::as_str).collect();
    let node = Instance::start_in(folder, &[&more[..], &files[..]].concat()).await;
    node.ask::<()>("CLUSTER ADDSLOTSRANGE 0 16383").await;
    // It does not know its own address: the one it is reached by counts, which is the certificate's.
    let options = RedisOptions::new(&format!("rediss+cluster://localhost:{port}")).deadline(PATIENT);
    let store = RedisStore::open(options.tls(Tls { ca: Some(authority.pem()), ..Tls::default() })).unwrap();
    let limit = limit("r", "9/day", Algorithm::FixedWindow);
    until("it counts", async || store.reserve(vec![of(&limit, user("foo"), 1)]).await.is_ok()).await;
    assert_eq!(store.status().address, format!("localhost:{port}"));
}

/// Every slot of the counters moves from master to master while they are used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_may_move_under_load() {
    let nodes = cluster(false).await;
    let store = connected(&nodes, Duration::from_secs(2)).await;
    let capacity = 4_000;
    let limit = limit("r", &format!("{capacity}/366 days"), Algorithm::TokenBucket);
    let everybody: Subject = "global".parse().unwrap();
    let (moving, admitted, failed) = (Arc::new(AtomicBool::new(true)), Arc::default(), Arc::default());
    let ask = |n: usize| {
        let (store, moving) = (store.clone(), Arc::clone(&moving));
        let (admitted, failed): (Arc<AtomicU64>, Arc<AtomicU64>) =
            (Arc::clone(&admitted), Arc::clone(&failed));
        // One tenant with two keys, and everybody elsewhere; some tenants are new all the time.
        let limit = Arc::clone(&limit);
        let everybody = everybody.clone();
        tokio::spawn(async move {
            let mut turn = 0;
            while moving.load(Ordering::Relaxed) {
                turn += 1;
                let name = format!("u{n}-{}", turn / 50);
                let charges = vec![
                    of(&limit, user(&name).of_tenant("foo"), 1),
                    of(&limit, everybody.clone(), 1),
                    of(&limit, model_of(&name, "foo"), 1),
                ];
                match store.reserve(charges).await {
                    Ok(Decision::Granted(reservation)) => {
                        // Half of them are given back, and may be taken again.
                        if turn % 2 == 0 {
                            reservation.settled(&[0, 0, 0]).await.unwrap();
                        } else {
                            admitted.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Ok(Decision::Denied(_)) => {}
                    Err(error) => {
                        failed.fetch_add(1, Ordering::Relaxed);
                        println!("failed: {error}");
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    let asked: Vec<_> = (0..8).map(ask).collect();
    let mut moved = 0;
    for (from, to) in [(0, 1), (1, 2), (2, 0), (0, 2), (2, 1)] {
        for tag in ["foo", "global"] {
            let slot: u64 = nodes[0].ask(&format!("CLUSTER KEYSLOT {{{tag}}}")).await;
            moved += move_slot(&nodes, slot, from, to).await;
        }
    }
    moving.store(false, Ordering::Relaxed);
    for asked in asked {
        asked.await.unwrap();
    }
    let (admitted, failed) = (admitted.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
    println!("{moved} keys moved, {admitted} admitted, {failed} failed");
    assert!(moved > 10 && admitted > 100 && failed == 0);
    until("levels are those of what was admitted", async || {
        used(&store, &limit, &everybody).await == admitted
    })
    .await;
    // The rest, and not one more.
    let mut rest = 0;
    while let Decision::Granted(_) = store.reserve(vec![of(&limit, everybody.clone(), 10)]).await.unwrap() {
        rest += 10;
    }
    assert!(capacity - admitted - rest < 10);
    assert_eq!(store.counts().settlements_lost, 0);
}

/// Moves a slot as `redis-cli --cluster reshard` does, key by key, if it is where it is said to be. How many keys.
async fn move_slot(nodes: &[Instance], slot: u64, from: usize, to: usize) -> u64 {
    let mut ids: Vec<String> = Vec::new();
    for node in nodes {
        ids.push(node.ask("CLUSTER MYID").await);
    }
    let mine: String = nodes[from].ask("CLUSTER NODES").await;
    let range = mine.lines().find(|line| line.contains("myself")).unwrap().to_string();
    let has = range.split_whitespace().skip(8).any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u64, u64) = match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => (first, last),
            _ => return false,
        };
        (first..=last).contains(&slot)
    });
    if !has {
        return 0;
    }
    nodes[to].ask::<()>(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", ids[from])).await;
    nodes[from].ask::<()>(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", ids[to])).await;
    let mut moved = 0;
    // As long as there are keys, and one at a time, so that decisions come between.
    loop {
        let keys: Vec<String> = nodes[from].ask(&format!("CLUSTER GETKEYSINSLOT {slot} 1")).await;
        let Some(key) = keys.first() else {
            break;
        };
        nodes[from].ask::<()>(&format!("MIGRATE 127.0.0.1 {} {key} 0 5000", nodes[to].port)).await;
        moved += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for node in [to, from] {
        nodes[node].ask::<()>(&format!("CLUSTER SETSLOT {slot} NODE {}", ids[to])).await;
    }
    moved
}
