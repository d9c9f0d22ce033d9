//! What goes wrong with Redis, one fault after the other, and what becomes of decisions and settlements.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::proxy::Proxy;
use support::resilient::{
    DEADLINE, PATIENCE, ask, count, decisions, exhaust, fleet, see, shared, store, until,
};
use support::server::Server;
use support::{charge, denied, granted, limit};
use tollgate_limiter::resilient::Failure;
use tollgate_limiter::{
    Algorithm, Charge, Circuit, Limit, ResilientOptions, Retry, Source, Store, StoreError, WhenDown,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_swallowing_connections() {
    let server = Server::start();
    server.client().await;
    let proxy = Proxy::start(server.socket()).await;
    let limit = limit("r", "1000000/day", Algorithm::TokenBucket);
    let stores = fleet(&proxy.url(), 3).await;
    for fault in ["50 ms", "2 s", "black hole", "partition"] {
        match fault {
            "50 ms" => proxy.delay(Duration::from_millis(60)),
            "2 s" => proxy.delay(Duration::from_secs(2)),
            "black hole" => proxy.swallow(),
            _ => proxy.partition(),
        }
        let (start, mut slowest) = (Instant::now(), Duration::ZERO);
        let mut asked = 0;
        while !stores[0].state().is_open() && (fault != "black hole" || asked < 50) {
            let question = Instant::now();
            drop(ask(&stores[0], &limit, 1).await);
            slowest = slowest.max(question.elapsed());
            asked += 1;
            assert!(start.elapsed() < PATIENCE, "{fault}");
        }
        println!("{fault}: {asked} decisions within {slowest:?} until nobody asked, {:?}", start.elapsed());
        assert!(slowest < 10 * DEADLINE, "{fault}: {slowest:?}");
        if fault != "black hole" {
            let (_, most) = decisions(&stores[0], &limit, 5_000).await;
            println!("{fault}: then 99 % within {most:?}");
        }
        if fault == "partition" {
            // Long enough for every first attempt to connect to have given up.
            tokio::time::sleep(Duration::from_millis(1_200)).await;
            proxy.swallow();
        }
        proxy.delay(Duration::ZERO);
        println!("{fault}: shared again after {:?}", shared(&stores).await);
        let again = Instant::now();
        while ask(&stores[0], &limit, 1).await.source() != Source::Redis {
            assert!(again.elapsed() < PATIENCE, "{fault}");
        }
    }
}

/// Answers come right before and right after nobody waits for them any more, or never: of what is charged afterwards,
/// too, nobody knows whether it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_slow_as_the_deadline() {
    const L: u64 = 2_000;
    for algorithm in [Algorithm::MovingWindow, Algorithm::TokenBucket] {
        let server = Server::start();
        server.client().await;
        let proxy = Proxy::start(server.socket()).await;
        let began = Instant::now();
        let limit = limit(algorithm.as_str(), "2000/day", algorithm);
        let stores = fleet(&proxy.url(), 1).await;
        while ask(&stores[0], &limit, 0).await.source() != Source::Redis {}
        let mut admitted = 0;
        let mut turns = 0_usize..;
        while stores[0].counts().charges_unsure < 2 {
            let turn = turns.next().unwrap();
            assert!(turn < 30, "every charge was answered: {:?}", stores[0].counts());
            let began = Instant::now();
            while !stores[0].state().is_open() && began.elapsed() < Duration::from_millis(500) {
                proxy.delay(Duration::from_millis(46 + turn as u64 % 10));
                admitted += u64::from(ask(&stores[0], &limit, 1).await.is_granted());
            }
            for _ in 0..30 {
                admitted += u64::from(ask(&stores[0], &limit, 1).await.is_granted());
            }
            if turn % 3 > 0 {
                // It answers a probe, or that and what reconnecting asks, but not what it is charged then.
                proxy.delay(Duration::ZERO);
                proxy.swallow_after(turn % 3);
            }
            // However slow, it comes back now and then.
            let back = until("it is back", || !stores[0].state().is_open());
            let _ = tokio::time::timeout(Duration::from_millis(1_500), back).await;
        }
        proxy.swallow_after(0);
        proxy.swallow();
        proxy.delay(Duration::ZERO);
        until("there is another connection", || stores[0].redis().status().connected).await;
        shared(&stores).await;
        let asked = stores[0].counts();
        loop {
            let decision = ask(&stores[0], &limit, 1).await;
            if !decision.is_granted() && decision.source() != Source::Share {
                break;
            }
            admitted += u64::from(decision.is_granted());
        }
        println!("{algorithm}: {admitted} of {L}; opened {} times, {asked:?}", asked.opened);
        // A bucket is refilled all the time.
        let refilled =
            if algorithm == Algorithm::TokenBucket { 1 + began.elapsed().as_secs() * L / 86_400 } else { 0 };
        assert!(admitted <= L + refilled, "{algorithm}: {admitted}");
        assert!(count(&server, &limit).await >= L, "{algorithm}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_at_the_start() {
    const N: u64 = 4;
    const L: u64 = 50;
    let mut server = Server::absent();
    let changes = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&changes);
    let options = ResilientOptions::default().instances(N as u32);
    let mut stores =
        vec![store(&server.url(), options.clone().on_change(move |state| told.lock().unwrap().push(state)))];
    stores.extend((1..N).map(|_| store(&server.url(), options.clone())));
    let limit = limit("r", "50/day", Algorithm::MovingWindow);
    let start = Instant::now();
    let admitted = exhaust(&stores, &limit).await;
    println!("all was admitted after {:?}", start.elapsed());
    assert!((L..=L + N).contains(&admitted), "{admitted}");
    until("all stopped asking", || stores.iter().all(|store| store.state().is_open())).await;
    assert!(!stores[0].instances().seen);
    server.again();
    server.client().await;
    println!("shared {:?} after it was there", shared(&stores).await);
    assert_eq!(count(&server, &limit).await, admitted);
    assert!(stores[0].instances().seen);
    let changes = changes.lock().unwrap();
    assert!(
        matches!(&changes[..], [Circuit::Open { why: Failure::Unreachable, .. }, Circuit::Closed]),
        "{changes:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_settles_and_counts_again_when_it_can() {
    let server = Server::start();
    let mut client = server.client().await;
    let stores = fleet(&server.url(), 3).await;
    let limit = limit("r", "3000/day", Algorithm::FixedWindow);
    let held = granted(ask(&stores[0], &limit, 100).await);
    see(&stores, &limit).await;
    let mut memory = async |bytes: &str| {
        let set = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(bytes).clone();
        set.query_async::<()>(&mut client).await.unwrap();
    };
    memory("1").await;
    let mut admitted = 100;
    for turn in 0..30 {
        let decision = ask(&stores[turn % 3], &limit, 1).await;
        assert_eq!(decision.source(), Source::Share, "{decision:?}");
        admitted += u64::from(decision.is_granted());
    }
    for store in &stores {
        assert!(
            matches!(store.state(), Circuit::Open { why: Failure::OutOfMemory, .. }),
            "{:?}",
            store.state()
        );
        assert!(store.counts().of(Failure::OutOfMemory) >= 5);
    }
    held.settled(&[60]).await.unwrap();
    assert_eq!(count(&server, &limit).await, 60);
    memory("0").await;
    println!("shared again after {:?}", shared(&stores).await);
    assert_eq!(count(&server, &limit).await, admitted - 40);
}

fn with(limit: &Arc<Limit>, when_down: WhenDown) -> Arc<Limit> {
    Arc::new(Limit::clone(limit).when_down(when_down))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_limit_does_what_it_says() {
    let mut server = Server::start();
    let stores = fleet(&server.url(), 2).await;
    let store = &stores[0];
    server.crash();
    let share = limit("share", "10/day", Algorithm::TokenBucket);
    let open = with(&limit("open", "7/day", Algorithm::TokenBucket), WhenDown::Open);
    let closed = with(&limit("closed", "7/day", Algorithm::FixedWindow), WhenDown::Closed);
    let both = |first: &Arc<Limit>, amount, second: &Arc<Limit>| {
        let mut charges = charge(first, "alice", amount);
        charges.extend(charge(second, "alice", 1));
        charges
    };
    for _ in 0..20 {
        let decision = store.reserve(charge(&open, "alice", 1)).await.unwrap();
        let standing = &decision.standings()[0];
        assert_eq!((decision.source(), decision.is_granted(), standing.taken), (Source::Open, true, false));
        assert_eq!((standing.used, standing.remaining, standing.retry), (0, 7, Retry::Now));
        let refused = store.reserve(both(&open, 1, &closed)).await.unwrap_err();
        assert!(matches!(&refused, StoreError::Closed { limit, .. } if limit == closed.id()), "{refused:?}");
        assert!(!refused.outcome_unknown());
    }
    assert_eq!((store.counts().uncounted, store.counts().closed, store.counts().share), (20, 20, 0));
    // Open and counted together: what counts decides, for both.
    for left in (0..5).rev() {
        let decision = store.reserve(both(&open, 9, &share)).await.unwrap();
        assert_eq!(decision.source(), Source::Share);
        let [open, share] = decision.standings() else { panic!("{decision:?}") };
        assert_eq!((open.limit.rule(), share.limit.rule(), share.remaining), ("open", "share", left));
        let corrections = granted(decision).settle(&[3, 1]);
        assert_eq!(corrections.len(), 2);
    }
    let denial = denied(store.reserve(both(&open, 9, &share)).await.unwrap());
    assert_eq!((denial.binding_index(), denial.source()), (1, Source::Share));
    // A closed shadow only says what it would have done.
    let shadow = Arc::new(Limit::clone(&closed).shadow());
    let decision = store.reserve(charge(&shadow, "alice", 1)).await.unwrap();
    assert!(decision.is_granted() && matches!(decision.standings()[0].retry, Retry::After(_)));
    // More than a share, less than the limit: not now. More than the limit: never.
    for (amount, retry) in [(6, false), (10, false), (11, true)] {
        let denial = denied(store.reserve(charge(&share, "bob", amount)).await.unwrap());
        assert_eq!(denial.retry() == Retry::Never, retry, "{amount}: {denial:?}");
    }
    // Several that count: all or none.
    let small = limit("small", "2/day", Algorithm::MovingWindow);
    let ask =
        || charge(&share, "carol", 1).into_iter().chain(charge(&small, "carol", 1)).collect::<Vec<Charge>>();
    drop(granted(store.reserve(ask()).await.unwrap()));
    for _ in 0..5 {
        denied(store.reserve(ask()).await.unwrap());
    }
    assert_eq!(store.peek(charge(&share, "carol", 0)).await.unwrap()[0].used, 1);
    assert_eq!(store.clear(&support::user("carol")).await, Err(StoreError::Unreachable));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settlements_are_sent_once_and_late() {
    let server = Server::start();
    let stores = fleet(&server.url(), 2).await;
    let store = &stores[0];
    let limit = limit("r", "10000/day", Algorithm::SlidingWindow);
    let (less, more) = (granted(ask(store, &limit, 100).await), granted(ask(store, &limit, 100).await));
    server.signal("STOP");
    until("nobody asks", || stores.iter().all(|store| store.state().is_open())).await;
    less.settle(&[10]);
    assert_eq!(more.settled(&[300]).await, Err(StoreError::Unreachable));
    assert_eq!(store.counts().settlements_waiting, 2);
    // Granted and settled without Redis; and granted without it, settled with it.
    let here = granted(ask(store, &limit, 100).await);
    assert_eq!(here.settle(&[7])[0].returned, 93);
    let before = granted(ask(store, &limit, 5).await);
    server.signal("CONT");
    shared(&stores).await;
    until("all is settled", || store.counts().settlements_waiting == 0).await;
    let expected = 10 + 300 + 7 + 5;
    let start = Instant::now();
    while count(&server, &limit).await != expected {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
    before.settle(&[50]);
    while count(&server, &limit).await != expected + 45 {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
    // Granted without Redis, charged to it late, settled lower: Redis gives it back.
    server.signal("STOP");
    until("nobody asks", || stores.iter().all(|store| store.state().is_open())).await;
    let [one, other] = [(); 2].map(|()| ask(store, &limit, 100));
    let (one, other) = (granted(one.await), granted(other.await));
    server.signal("CONT");
    shared(&stores).await;
    let expected = expected + 45 + 200;
    while count(&server, &limit).await != expected {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
    one.settle(&[30]);
    other.settle(&[0]);
    while count(&server, &limit).await != expected - 70 - 100 {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
    assert_eq!(store.redis().counts().settlements_lost, 0);
    assert_eq!(store.counts().settlements_dropped, 0);
}

/// A server that goes on takes what it was asked meanwhile, and whoever asked has decided without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_without_an_answer_counts_once() {
    let server = Server::start();
    let stores = fleet(&server.url(), 1).await;
    for (name, limit) in support::resilient::limits("1000/day").into_iter().enumerate() {
        let name = format!("user{name}");
        let ask = async || granted(stores[0].reserve(charge(&limit, &name, 1)).await.unwrap()).source();
        for _ in 0..10 {
            ask().await;
        }
        server.signal("STOP");
        let (mut by_share, mut asked) = (0, 0);
        while !stores[0].state().is_open() || asked < 20 {
            by_share += u64::from(ask().await == Source::Share);
            asked += 1;
        }
        assert!(by_share > 0);
        server.signal("CONT");
        shared(&stores).await;
        let start = Instant::now();
        let counted = async || {
            let store = server.store(server.options()).await;
            store.peek(charge(&limit, &name, 0)).await.unwrap()[0].used
        };
        while counted().await != 10 + asked {
            assert!(start.elapsed() < PATIENCE, "{limit:?}: {} of {}", counted().await, 10 + asked);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cleared_is_forgotten_here_too() {
    let server = Server::start();
    let stores = fleet(&server.url(), 3).await;
    let limit = limit("r", "12/day", Algorithm::FixedWindow);
    assert_eq!(exhaust(&stores, &limit).await, 12);
    stores[2].forget(&support::user("alice"));
    assert_eq!(stores[0].clear(&support::user("alice")).await, Ok(true));
    server.signal("STOP");
    until("nobody asks", || stores.iter().all(|store| store.state().is_open())).await;
    assert_eq!(exhaust(&stores[..1], &limit).await, 4, "who cleared it knows");
    assert_eq!(exhaust(&stores[1..2], &limit).await, 0, "who was not told saw twelve");
    assert_eq!(exhaust(&stores[2..], &limit).await, 4, "who was told knows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_became_a_replica_refuses_nobody() {
    let server = Server::start();
    let mut client = server.client().await;
    let stores = fleet(&server.url(), 2).await;
    let limit = limit("r", "1000/day", Algorithm::SlidingWindow);
    see(&stores, &limit).await;
    let mut replica_of = async |master: [&str; 2]| {
        let command = redis::cmd("REPLICAOF").arg(&master).clone();
        command.query_async::<()>(&mut client).await.unwrap();
    };
    replica_of(["127.0.0.1", "1"]).await;
    for turn in 0..40 {
        let decision = ask(&stores[turn % 2], &limit, 1).await;
        assert!(decision.is_granted() && decision.source() == Source::Share, "{decision:?}");
    }
    for store in &stores {
        assert!(matches!(store.state(), Circuit::Open { why: Failure::Refused, .. }), "{:?}", store.state());
    }
    replica_of(["NO", "ONE"]).await;
    println!("shared again after {:?}", shared(&stores).await);
    assert_eq!(count(&server, &limit).await, 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_charged_holds_up_nobody() {
    let mut server = Server::start();
    let stores = fleet(&server.url(), 2).await;
    let limit = limit("r", "100/day", Algorithm::FixedWindow);
    server.crash();
    for name in ["alice", "bob"] {
        drop(granted(stores[0].reserve(charge(&limit, name, 7)).await.unwrap()));
    }
    until("nobody asks", || stores.iter().all(|store| store.state().is_open())).await;
    server.again();
    // Before anybody else comes: Bob's counters are no counters.
    let mut client = server.client().await;
    let wrong = redis::cmd("SET").arg("tollgate:{bob}:rl:user:bob").arg("x").clone();
    wrong.query_async::<()>(&mut client).await.unwrap();
    shared(&stores).await;
    let right = redis::cmd("DEL").arg("tollgate:{bob}:rl:user:bob").clone();
    until("Alice is charged", || stores[0].counts().charged_late >= 7).await;
    right.query_async::<()>(&mut client).await.unwrap();
    until("so is Bob, when that is possible", || stores[0].counts().charged_late == 14).await;
    assert_eq!(stores[0].counts().charges_unsure, 0);
}
