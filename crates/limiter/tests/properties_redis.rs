//! What must hold whatever happens, over seeded random histories, of the store in Redis: the same judges as of the one in
//! memory, fewer histories, because each step is a round trip.
#![cfg(feature = "redis")]

mod support;

use std::sync::Arc;

use support::judge::Judge;
use support::server::Server;
use support::{Random, charge, limit, window_ms};
use tollgate_limiter::{Algorithm, Clock, Decision, Limit, ManualClock, Millis, RedisStore, Retry, Store};

/// Midnight, 2099-01-01: keys live by the server's own clock, so the tests' clock must not be behind it.
const START: u64 = 4_070_908_800_000;

/// A store whose scripts run by this clock, and which asks about everything.
async fn store_at(server: &Server, now: u64) -> (RedisStore, ManualClock) {
    let clock = ManualClock::at(Millis(now));
    let options = server.options().without_denial_memory().rehearse(clock.clone(), &[]);
    (server.store(options).await, clock)
}

async fn retry(store: &RedisStore, limit: &Arc<Limit>, name: &str, amount: u64) -> Retry {
    store.peek(charge(limit, name, amount)).await.expect("an answer")[0].retry
}

#[tokio::test]
async fn a_promised_wait_is_tight_from_both_sides() {
    let server = Server::start();
    let (store, clock) = store_at(&server, START).await;
    for algorithm in Algorithm::ALL {
        let mut promises = 0;
        for (index, quota) in ["7/10 s", "60/minute", "1000/hour"].into_iter().enumerate() {
            let limit = limit("r", quota, algorithm);
            let window = window_ms(&limit);
            for seed in 0..3 {
                let (name, mut random) =
                    (format!("{algorithm}{index}-{seed}"), Random(seed * 10 + index as u64));
                for _ in 0..80 {
                    let step = if random.one_in(8) { 2 * window } else { window / 20 + 1 };
                    clock.advance(Millis(random.below(step)));
                    let amount = 1 + random.below(limit.capacity());
                    let Decision::Denied(denial) =
                        store.reserve(charge(&limit, &name, amount)).await.expect("an answer")
                    else {
                        continue;
                    };
                    let Retry::After(wait) = denial.retry() else { panic!("{amount} of {quota} is never") };
                    let now = denial.now();
                    clock.set(now + wait - Millis(1));
                    assert_eq!(
                        retry(&store, &limit, &name, amount).await,
                        Retry::After(Millis(1)),
                        "{algorithm}"
                    );
                    clock.set(now + wait);
                    assert_eq!(retry(&store, &limit, &name, amount).await, Retry::Now, "{algorithm} {quota}");
                    clock.set(now);
                    promises += 1;
                }
            }
        }
        assert!(promises > 50, "{algorithm}: {promises} promises");
    }
}

#[tokio::test]
async fn real_use_never_exceeds_under_late_settlements() {
    let server = Server::start();
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "60/minute", algorithm);
        for seed in 0..16 {
            let (mut random, up) = (Random(seed), seed % 2 == 1);
            let (store, clock) = store_at(&server, START).await;
            let (name, mut judge, mut held) = (format!("{algorithm}{seed}"), Judge::new(&limit), Vec::new());
            for _ in 0..100 {
                clock.advance(Millis(random.below(4_000)));
                let amount = 1 + random.below(12);
                let decision = store.reserve(charge(&limit, &name, amount)).await.expect("an answer");
                if let Decision::Granted(reservation) = decision {
                    let now = reservation.now().get();
                    held.push((reservation, judge.admit(now, amount)));
                }
                if held.len() > 3 || (!held.is_empty() && random.one_in(3)) {
                    let (reservation, index) = held.swap_remove(random.below(held.len() as u64) as usize);
                    let reserved = reservation.standings()[0].requested;
                    let most = if up && random.one_in(3) { 3 * reserved } else { reserved };
                    let actual = random.below(most + 1);
                    let correction = reservation.settled(&[actual]).await.expect("an answer").remove(0);
                    judge.settle(index, actual.min(reserved));
                    let more = actual.saturating_sub(reserved);
                    assert_eq!(correction.charged + correction.forgiven, more, "{algorithm}");
                    judge.overdraw(clock.now().get(), correction.charged);
                }
            }
            assert_eq!(judge.exceeded(), None, "{algorithm} seed {seed}");
        }
    }
}

#[tokio::test]
async fn a_moving_window_is_never_over_an_exact_log() {
    let server = Server::start();
    for seed in 0..30 {
        let mut random = Random(seed);
        let limit = limit(
            "r",
            ["50/second", "100/10 s", "600/15 minutes"][seed as usize % 3],
            Algorithm::MovingWindow,
        );
        let (window, capacity) = (window_ms(&limit), limit.capacity());
        let (store, clock) = store_at(&server, START + random.below(window)).await;
        let gulp = 1 + random.below(capacity / 25);
        let gap = (window * (gulp + 1) / capacity) * 10 / (5 + random.below(25)) + 1;
        let mut log: Vec<(u64, u64)> = Vec::new();
        for _ in 0..250 {
            clock.advance(Millis(random.below(gap + 1)));
            let (now, amount) = (clock.now().get(), 1 + random.below(gulp));
            let name = format!("u{seed}");
            if store.reserve(charge(&limit, &name, amount)).await.expect("an answer").is_granted() {
                log.push((now, amount));
                let live: u64 =
                    log.iter().filter(|(at, _)| at + window > now).map(|(_, amount)| amount).sum();
                assert!(live <= capacity, "seed {seed}: {live} of {capacity} in a trailing window");
            }
        }
        assert!(!log.is_empty());
    }
}

/// Raised and lowered on live state, thrown forward and back: what was used stays used, and nobody is locked out for longer
/// than is promised.
#[tokio::test]
async fn neither_another_capacity_nor_another_time_forgets_what_was_used() {
    let server = Server::start();
    for (algorithm, windows) in [
        (Algorithm::FixedWindow, 2),
        (Algorithm::SlidingWindow, 3),
        (Algorithm::MovingWindow, 2),
        (Algorithm::TokenBucket, 4),
    ] {
        let (store, clock) = store_at(&server, START + 5_000).await;
        let name = algorithm.to_string();
        let of = |quota: &str| limit("r-requests", quota, algorithm);
        let used = async |limit: &Arc<Limit>| {
            store.peek(charge(limit, &name, 0)).await.expect("an answer").remove(0).used
        };
        let (small, big) = (of("60/minute"), of("100/minute"));
        assert!(store.reserve(charge(&small, &name, 60)).await.expect("an answer").is_granted());
        assert_eq!(used(&big).await, 60, "{algorithm}: raised");
        assert!(store.reserve(charge(&big, &name, 40)).await.expect("an answer").is_granted(), "{algorithm}");
        assert!(used(&small).await >= 60, "{algorithm}: lowered");
        let now = clock.now().get();
        for elsewhere in [now + 86_400_000, now, now - 86_400_000, now] {
            clock.set(Millis(elsewhere));
            let decision = store.reserve(charge(&small, &name, 60)).await.expect("an answer");
            if let Decision::Denied(denial) = decision {
                let Retry::After(wait) = denial.retry() else { panic!("never") };
                let behind = now.saturating_sub(elsewhere);
                assert!(wait <= Millis(windows * 60_000 + behind), "{algorithm}: frozen for {wait}");
            }
        }
    }
}
