//! Several processes' stores, one Redis, and everything that happens to it: what is admitted stays within its bounds.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::proxy::Proxy;
use support::resilient::{ask, count, decisions, exhaust, fleet, limits, see, shared, store, until};
use support::server::Server;
use support::{denied, granted, limit};
use tollgate_limiter::{Algorithm, Circuit, Limit, ResilientOptions, ResilientStore, Retry, Source};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_and_back() {
    const N: u64 = 4;
    const L: u64 = 103;
    let server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    let limits = limits("103/day");
    let mut admitted = [0; 4];
    for (limit, admitted) in limits.iter().zip(&mut admitted) {
        for turn in 0..40 {
            *admitted += u64::from(ask(&stores[turn % N as usize], limit, 1).await.is_granted());
        }
        see(&stores, limit).await;
    }
    server.signal("STOP");
    let asked = Instant::now();
    let first = ask(&stores[0], &limits[0], 0).await;
    println!("the first decision took {:?}", asked.elapsed());
    assert_eq!(first.source(), Source::Share);
    until("all stopped asking", || stores.iter().all(|store| store.state().is_open())).await;
    println!("all stopped asking after {:?}", asked.elapsed());
    for (limit, admitted) in limits.iter().zip(&mut admitted) {
        *admitted += exhaust(&stores, limit).await;
        assert!((L..=L + N).contains(admitted), "{limit:?}: {admitted}");
        let denial = denied(ask(&stores[1], limit, 1).await);
        assert_eq!(denial.source(), Source::Share);
        let standing = denial.binding();
        assert_eq!((standing.limit.capacity(), standing.remaining), (L.div_ceil(N), 0));
        assert!(matches!(standing.retry, Retry::After(_)));
    }
    let took = decisions(&stores[0], &limits[0], 20_000).await;
    println!("while frozen: half of the decisions within {:?}, 99 % within {:?}", took.0, took.1);
    server.signal("CONT");
    println!("shared again {:?} after it went on", shared(&stores).await);
    for (limit, admitted) in limits.iter().zip(&mut admitted) {
        let counted = count(&server, limit).await;
        assert!(counted >= *admitted, "{limit:?}: {counted} of {admitted}");
        *admitted += exhaust(&stores, limit).await;
        assert!(*admitted <= L + N, "{limit:?}: {admitted}");
        assert_ne!(ask(&stores[2], limit, 1).await.source(), Source::Share);
    }
    for store in &stores {
        assert_eq!(store.counts().opened, 1);
        assert_eq!((store.counts().charges_unsure, store.counts().forgotten), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_and_started_again() {
    const N: u64 = 3;
    const L: u64 = 50;
    let mut server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    let limit = limit("r", "50/day", Algorithm::FixedWindow);
    let before = 20;
    for turn in 0..before {
        drop(granted(ask(&stores[turn % 3], &limit, 1).await));
    }
    see(&stores, &limit).await;
    server.crash();
    let asked = Instant::now();
    // Nobody waits, nobody fails: the first one already is decided here.
    let mut admitted = before as u64;
    for turn in 0..5 {
        admitted += u64::from(ask(&stores[turn % 3], &limit, 1).await.is_granted());
    }
    println!("five decisions took {:?}", asked.elapsed());
    admitted += exhaust(&stores, &limit).await;
    assert!((L..=L + N).contains(&admitted), "{admitted}");
    until("all stopped asking", || stores.iter().all(|store| store.state().is_open())).await;
    server.again();
    server.client().await;
    println!("shared again {:?} after it was there", shared(&stores).await);
    // What it knew is gone; what was admitted since is not.
    assert!(count(&server, &limit).await >= admitted - before as u64);
    assert_eq!(ask(&stores[0], &limit, 0).await.source(), Source::Redis);
    let late: u64 = stores.iter().map(|store| store.counts().charged_late).sum();
    assert_eq!(late, admitted - before as u64);
}

/// Units admitted, by the store's time.
type Admissions = Arc<Mutex<Vec<u64>>>;

/// Asks every store again and again, for so long.
async fn load(stores: &[ResilientStore], limit: &Arc<Limit>, during: Duration) -> Admissions {
    let (admissions, start) = (Admissions::default(), Instant::now());
    let ask = |store: &ResilientStore| {
        let (store, limit, admissions) = (store.clone(), Arc::clone(limit), Arc::clone(&admissions));
        tokio::spawn(async move {
            while start.elapsed() < during {
                let decision = ask(&store, &limit, 1).await;
                if decision.is_granted() {
                    admissions.lock().unwrap().push(decision.now().get());
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    let asking: Vec<_> = stores.iter().map(ask).collect();
    for asking in asking {
        asking.await.unwrap();
    }
    admissions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_windows_without_redis() {
    const N: u64 = 4;
    const L: u64 = 30;
    const WINDOW: u64 = 1_000;
    let mut server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    server.crash();
    let [fixed, sliding, moving, bucket] = &limits("30/second");
    let during = Duration::from_millis(3_600);
    let (fixed, sliding, moving, bucket) = tokio::join!(
        load(&stores, fixed, during),
        load(&stores, sliding, during),
        load(&stores, moving, during),
        load(&stores, bucket, during),
    );
    let sorted = |admissions: Admissions| {
        let mut times = admissions.lock().unwrap().clone();
        times.sort_unstable();
        times
    };
    // The clocks of the stores are a few milliseconds apart: so much of a neighbouring window may seem to be in one.
    let slack = 30;
    let most = |times: &[u64]| {
        let within = |from: &u64| times.iter().filter(|t| (*from..from + WINDOW - slack).contains(t)).count();
        times.iter().map(within).max().unwrap_or(0) as u64
    };
    let fixed = sorted(fixed);
    let mut windows = std::collections::BTreeMap::<u64, u64>::new();
    fixed.iter().for_each(|time| *windows.entry(time / WINDOW).or_default() += 1);
    println!("fixed windows: {windows:?}");
    assert!(windows.values().all(|admitted| *admitted <= L + N + 2), "{windows:?}");
    let whole = windows.values().skip(1).take(windows.len() - 2);
    assert!(whole.into_iter().all(|admitted| *admitted >= L - 2), "{windows:?}");
    let (sliding, moving, bucket) = (most(&sorted(sliding)), most(&sorted(moving)), most(&sorted(bucket)));
    println!("trailing: sliding {sliding}, moving {moving}, bucket {bucket}");
    assert!(sliding < 2 * (L + N), "{sliding}");
    assert!(moving <= L + N, "{moving}");
    assert!(bucket <= 2 * L + 2 * N, "{bucket}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flapping_admits_no_more() {
    const N: u64 = 3;
    const L: u64 = 300;
    let server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    for limit in limits("300/day") {
        let mut admitted = 0;
        for _ in 0..3 {
            for _ in 0..10 {
                for store in &stores {
                    admitted += u64::from(ask(store, &limit, 1).await.is_granted());
                }
            }
            see(&stores, &limit).await;
            server.signal("STOP");
            for _ in 0..25 {
                for store in &stores {
                    admitted += u64::from(ask(store, &limit, 1).await.is_granted());
                }
            }
            server.signal("CONT");
            shared(&stores).await;
            let counted = count(&server, &limit).await;
            assert!(counted >= admitted.min(L), "{counted} of {admitted}");
        }
        see(&stores, &limit).await;
        server.signal("STOP");
        admitted += exhaust(&stores, &limit).await;
        server.signal("CONT");
        shared(&stores).await;
        admitted += exhaust(&stores, &limit).await;
        println!("{}: {admitted} of {L}", limit.algorithm());
        assert!(admitted <= L + N, "{limit:?}: {admitted}");
        // What was asked and never answered may have been taken all the same.
        assert!(admitted >= L - 4 * 5 * N, "{limit:?}: {admitted}");
    }
}

/// Those that are back first are not granted what the others have admitted and not charged yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coming_back_under_load() {
    const N: u64 = 4;
    const L: u64 = 100;
    let server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    for limit in limits("100/day") {
        see(&stores, &limit).await;
        server.signal("STOP");
        let mut admitted = exhaust(&stores, &limit).await;
        until("all stopped asking", || stores.iter().all(|store| store.state().is_open())).await;
        admitted += exhaust(&stores, &limit).await;
        let asking: Vec<_> = stores
            .iter()
            .map(|store| {
                let (store, limit) = (store.clone(), Arc::clone(&limit));
                tokio::spawn(async move {
                    let mut admitted = 0;
                    let mut refused_since = 0;
                    // Until Redis has refused often enough to be certain.
                    while refused_since < 20 {
                        let decision = ask(&store, &limit, 1).await;
                        admitted += u64::from(decision.is_granted());
                        let refused = !decision.is_granted() && store.state() == Circuit::Closed;
                        refused_since = if refused { refused_since + 1 } else { 0 };
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    admitted
                })
            })
            .collect();
        let back = Instant::now();
        server.signal("CONT");
        for asking in asking {
            admitted += asking.await.unwrap();
        }
        println!("{}: {admitted} of {L}, {:?} after it was back", limit.algorithm(), back.elapsed());
        // What was asked right before, and not answered, may have been taken.
        assert!((L - 5 * N..=L + N).contains(&admitted), "{limit:?}: {admitted}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_is_cut_off() {
    const N: u64 = 3;
    const L: u64 = 90;
    let server = Server::start();
    server.client().await;
    let proxy = Proxy::start(server.socket()).await;
    let mut stores: Vec<_> = (1..N).map(|_| store(&server.url(), ResilientOptions::default())).collect();
    stores.push(store(&proxy.url(), ResilientOptions::default()));
    for store in &stores {
        until("all are known", || store.instances().count == N as u32 && store.instances().seen).await;
    }
    for algorithm in [Algorithm::SlidingWindow, Algorithm::TokenBucket] {
        let limit = limit(algorithm.as_str(), "90/day", algorithm);
        see(&stores, &limit).await;
        proxy.delay(Duration::from_secs(1));
        until("it stops asking", || stores[2].state().is_open()).await;
        let mut admitted = exhaust(&stores, &limit).await;
        assert!(admitted > L && admitted <= L + L.div_ceil(N), "{algorithm}: {admitted}");
        assert!(stores[..2].iter().all(|store| store.counts().share == 0));
        proxy.delay(Duration::ZERO);
        shared(&stores).await;
        admitted += exhaust(&stores, &limit).await;
        assert!(admitted <= L + L.div_ceil(N), "{algorithm}: {admitted}");
        assert_eq!(count(&server, &limit).await, admitted, "{algorithm}: what is too much is owed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_against_a_frozen_server() {
    const N: u64 = 2;
    const L: u64 = 501;
    let server = Server::start();
    let stores = fleet(&server.url(), N as u32).await;
    let limit = limit("r", "501/day", Algorithm::TokenBucket);
    see(&stores, &limit).await;
    server.signal("STOP");
    let ask = |number: usize| {
        let (store, limit) = (stores[number % 2].clone(), Arc::clone(&limit));
        tokio::spawn(async move {
            let asked = Instant::now();
            (ask(&store, &limit, 1).await.is_granted(), asked.elapsed())
        })
    };
    let asked: Vec<_> = (0..50_000).map(ask).collect();
    let (mut admitted, mut slowest) = (0, Duration::ZERO);
    for asked in asked {
        let (granted, took) = asked.await.unwrap();
        admitted += u64::from(granted);
        slowest = slowest.max(took);
    }
    println!("50,000 decisions within {slowest:?} each");
    assert!((L..=L + N).contains(&admitted), "{admitted}");
    server.signal("CONT");
    shared(&stores).await;
    assert!(count(&server, &limit).await >= L);
}
