//! One suite, every store: what they promise alike, asked through the trait.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;

use support::agreement::FUTURE;
use support::server::Server;
use support::{charge, denied, granted, limit, slots, user};
use tollgate_limiter::{
    Algorithm, Charge, Correction, LEASE, Limit, ManualClock, MemoryStore, Millis, Retry, Standing, Store,
};

const DAY: u64 = 86_400_000;

struct Case<'s> {
    store: &'s dyn Store,
    clock: ManualClock,
}

impl Case<'_> {
    fn at(&self, time: u64) {
        self.clock.set(Millis(FUTURE + time));
    }

    async fn take(&self, limit: &Arc<Limit>, name: &str, amount: u64) -> bool {
        self.store.reserve(charge(limit, name, amount)).await.unwrap().is_granted()
    }

    async fn look(&self, limit: &Arc<Limit>, name: &str, amount: u64) -> Standing {
        self.store.peek(charge(limit, name, amount)).await.unwrap().remove(0)
    }
}

/// Runs a case on every store, each empty and at the start of a century. What remembers denials is tested elsewhere: it
/// ages by a clock of its own.
macro_rules! on_every_store {
    ($($name:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test]
            async fn $name() {
                let clock = super::ManualClock::at(super::Millis(super::FUTURE));
                let store = super::MemoryStore::new(clock.clone());
                super::$name(super::Case { store: &store, clock }).await;
            })*
        }
        mod redis {
            $(#[tokio::test]
            async fn $name() {
                let server = super::Server::start();
                let clock = super::ManualClock::at(super::Millis(super::FUTURE));
                let options = server.options().without_denial_memory().rehearse(clock.clone(), &[]);
                let store = server.store(options).await;
                super::$name(super::Case { store: &store, clock }).await;
            })*
        }
        mod redis_one_by_one {
            $(#[tokio::test]
            async fn $name() {
                let server = super::Server::start();
                let clock = super::ManualClock::at(super::Millis(super::FUTURE));
                let options = server.options().without_denial_memory().without_coalescing();
                let store = server.store(options.rehearse(clock.clone(), &[])).await;
                super::$name(super::Case { store: &store, clock }).await;
            })*
        }
        mod resilient {
            $(#[tokio::test]
            async fn $name() {
                let server = super::Server::start();
                let clock = super::ManualClock::at(super::Millis(super::FUTURE));
                let options = server.options().without_denial_memory().rehearse(clock.clone(), &[]);
                let redis = server.store(options).await;
                let store = tollgate_limiter::ResilientStore::new(redis, Default::default());
                super::$name(super::Case { store: &store, clock }).await;
            })*
        }
    };
}

on_every_store!(
    the_bucket_is_gcra,
    waiting_as_promised_succeeds,
    all_or_none,
    shadows_report_and_never_refuse,
    settling_moves_what_was_taken,
    a_refund_after_a_clear_gives_nothing,
    months_are_calendar_months,
    big_numbers_are_exact,
    a_changed_capacity_keeps_what_was_used,
    one_excursion_of_the_clock_freezes_nobody,
    never_is_not_later,
    a_call_holds_its_slot_until_it_is_over,
    a_call_that_is_not_heard_of_loses_its_slot,
    slots_are_taken_with_everything_else_or_not_at_all,
    a_changed_number_of_slots_counts_who_holds_one,
);

/// Five per five seconds, all at once: time in ms, amount, granted, remaining, reset in ms, retry in ms. The rows up to
/// the line are the table that throttled (`rate_test.go`, cases 0 to 14) and redis-cell (`cell/mod.rs`, the same 15) share.
async fn the_bucket_is_gcra(case: Case<'_>) {
    let limit = limit("r", "5/5 s", Algorithm::TokenBucket);
    for (row, (time, amount, grant, remaining, reset, retry)) in [
        (0, 6, false, 5, 0, u64::MAX),
        (0, 1, true, 4, 1_000, 0),
        (0, 1, true, 3, 2_000, 0),
        (0, 1, true, 2, 3_000, 0),
        (0, 1, true, 1, 4_000, 0),
        (0, 1, true, 0, 5_000, 0),
        (0, 1, false, 0, 5_000, 1_000),
        (3_000, 1, true, 2, 3_000, 0),
        (3_100, 1, true, 1, 3_900, 0),
        (4_000, 1, true, 1, 4_000, 0),
        (8_000, 1, true, 4, 1_000, 0),
        (9_500, 1, true, 4, 1_000, 0),
        (9_500, 0, true, 4, 1_000, 0),
        (9_500, 2, true, 2, 3_000, 0),
        (9_500, 5, false, 2, 3_000, 3_000),
        // ----
        (10_000, 0, true, 2, 2_500, 0),
        (10_000, 5, false, 2, 2_500, 2_500),
        (12_500, 5, true, 0, 5_000, 0),
    ]
    .into_iter()
    .enumerate()
    {
        case.at(time);
        let decision = case.store.reserve(charge(&limit, "u", amount)).await.unwrap();
        let retry = match retry {
            0 => Retry::Now,
            u64::MAX => Retry::Never,
            wait => Retry::After(Millis(wait)),
        };
        let standing = &decision.standings()[0];
        assert_eq!(decision.is_granted(), grant, "row {row}");
        let said = (standing.remaining, standing.reset, standing.retry);
        assert_eq!(said, (remaining, Millis(reset), retry), "row {row}");
    }
}

async fn waiting_as_promised_succeeds(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        for quota in ["5/second", "60/minute", "7000000/minute", "1000000000/day"] {
            let limit = limit(algorithm.as_str(), quota, algorithm);
            let capacity = limit.capacity();
            case.at(12_345);
            assert!(case.take(&limit, quota, capacity / 2).await);
            case.at(12_355);
            assert!(case.take(&limit, quota, capacity - capacity / 2).await);
            case.at(12_356);
            let denial = denied(case.store.reserve(charge(&limit, quota, capacity / 3 + 1)).await.unwrap());
            let Retry::After(wait) = denial.retry() else { panic!("{denial:?}") };
            case.at(12_356 + wait.get() - 1);
            assert!(!case.take(&limit, quota, capacity / 3 + 1).await, "{algorithm} {quota}: before {wait}");
            case.at(12_356 + wait.get());
            assert!(case.take(&limit, quota, capacity / 3 + 1).await, "{algorithm} {quota}: after {wait}");
        }
    }
}

async fn all_or_none(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let (wide, narrow) = (limit("wide", "9/hour", algorithm), limit("narrow", "5/minute", algorithm));
        let both = |amount| [charge(&wide, "a", amount), charge(&narrow, "b", amount)].concat();
        case.store.clear(&user("a")).await.unwrap();
        case.store.clear(&user("b")).await.unwrap();
        drop(granted(case.store.reserve(both(3)).await.unwrap()));
        let denial = denied(case.store.reserve(both(3)).await.unwrap());
        assert_eq!((denial.binding_index(), denial.binding().limit.id()), (1, narrow.id()));
        assert_eq!(case.look(&wide, "a", 0).await.used, 3);
        // Two charges on one counter need room for both.
        let twice = [charge(&wide, "a", 4), charge(&wide, "a", 3)].concat();
        assert!(!case.store.reserve(twice).await.unwrap().is_granted());
        let twice = [charge(&wide, "a", 4), charge(&wide, "a", 2)].concat();
        drop(granted(case.store.reserve(twice).await.unwrap()));
        assert_eq!(case.look(&wide, "a", 0).await.remaining, 0);
        drop(granted(case.store.reserve(Vec::new()).await.unwrap()));
    }
}

async fn shadows_report_and_never_refuse(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let shadow = limit("shadow", "2/hour", algorithm);
        let shadow = Arc::new(Limit::clone(&shadow).shadow());
        let enforced = limit("enforced", "10/hour", algorithm);
        let both = || [charge(&shadow, "u", 2), charge(&enforced, "u", 1)].concat();
        case.store.clear(&user("u")).await.unwrap();
        let first = granted(case.store.reserve(both()).await.unwrap());
        assert!(first.standings()[0].taken);
        let second = granted(case.store.reserve(both()).await.unwrap());
        let standing = &second.standings()[0];
        assert!(!standing.taken && matches!(standing.retry, Retry::After(_)), "{standing:?}");
        // What took nothing gives nothing back.
        let corrections = second.settled(&[0, 0]).await.unwrap();
        assert_eq!((corrections[0].returned, corrections[1].returned), (0, 1));
        assert_eq!(case.look(&shadow, "u", 0).await.used, 2);
    }
}

async fn settling_moves_what_was_taken(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let limit = limit(algorithm.as_str(), "100/hour", algorithm);
        let take = async || granted(case.store.reserve(charge(&limit, "u", 40)).await.unwrap());
        let down = take().await.settled(&[15]).await.unwrap();
        assert_eq!(down, [Correction { returned: 25, ..Correction::default() }]);
        let up = take().await.settled(&[95]).await.unwrap();
        assert_eq!(up, [Correction { charged: 55, ..Correction::default() }]);
        let standing = case.look(&limit, "u", 1).await;
        assert_eq!((standing.used, standing.remaining), (110, 0), "{algorithm}: debt is waited off");
        assert!(matches!(standing.retry, Retry::After(_)));
        case.store.clear(&user("u")).await.unwrap();
        let beyond = take().await.settled(&[1_000]).await.unwrap();
        assert_eq!(beyond, [Correction { charged: 160, forgiven: 800, returned: 0 }], "{algorithm}");
        case.store.clear(&user("u")).await.unwrap();
        // Without waiting for it.
        let unawaited = take().await;
        unawaited.refund();
        let mut asked = 0;
        while case.look(&limit, "u", 0).await.used > 0 {
            asked += 1;
            assert!(asked < 10_000, "the refund never came");
        }
    }
}

async fn a_refund_after_a_clear_gives_nothing(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let limit = limit(algorithm.as_str(), "100/hour", algorithm);
        let held = granted(case.store.reserve(charge(&limit, "u", 40)).await.unwrap());
        let late = granted(case.store.reserve(charge(&limit, "u", 10)).await.unwrap());
        assert!(case.store.clear(&user("u")).await.unwrap());
        assert!(!case.store.clear(&user("u")).await.unwrap());
        assert!(case.take(&limit, "u", 30).await);
        assert_eq!(held.settled(&[0]).await.unwrap(), [Correction::default()]);
        assert_eq!(case.look(&limit, "u", 0).await.used, 30);
        assert_eq!(late.settled(&[15]).await.unwrap()[0].charged, 5);
        assert_eq!(case.look(&limit, "u", 0).await.used, 35);
        assert!(case.store.clear(&user("u")).await.unwrap());
    }
}

/// 2100 has no 29 February.
async fn months_are_calendar_months(case: Case<'_>) {
    let limit = limit("r", "10/month", Algorithm::FixedWindow);
    for (day, left) in [(0, 31), (30, 1), (31, 28), (58, 1), (59, 31), (364, 1)] {
        case.at(day * DAY);
        assert!(case.take(&limit, "u", if left == 1 { 4 } else { 6 }).await, "day {day}");
        assert_eq!(case.look(&limit, "u", 0).await.reset, Millis(left * DAY), "day {day}");
    }
    let week = support::limit("w", "10/week", Algorithm::FixedWindow);
    case.at(0);
    // 2100-01-01 is a Friday.
    assert!(case.take(&week, "u", 10).await);
    assert_eq!(case.look(&week, "u", 0).await.reset, Millis(3 * DAY));
}

async fn big_numbers_are_exact(case: Case<'_>) {
    for (quota, capacity) in
        [("1000000000/day", 1_000_000_000), ("7000000/minute", 7_000_000), ("$40k/day", 40_000_000_000)]
    {
        for algorithm in Algorithm::ALL {
            let limit = limit(algorithm.as_str(), quota, algorithm);
            assert!(case.take(&limit, quota, capacity - 1).await);
            assert!(case.take(&limit, quota, 1).await);
            let denial = denied(case.store.reserve(charge(&limit, quota, 1)).await.unwrap());
            assert_eq!(
                (denial.binding().used, denial.binding().remaining),
                (capacity, 0),
                "{algorithm} {quota}"
            );
        }
    }
    let month = limit("r", "$100k/month", Algorithm::FixedWindow);
    assert!(case.take(&month, "u", 100_000_000_000).await);
    assert!(!case.take(&month, "u", 1).await);
}

async fn a_changed_capacity_keeps_what_was_used(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let with = |quota: &str| limit(algorithm.as_str(), quota, algorithm);
        let (small, large) = (with("60/minute"), with("61/minute"));
        assert!(case.take(&small, "u", 60).await);
        assert!(case.take(&large, "u", 1).await, "{algorithm}");
        assert!(!case.take(&large, "u", 1).await, "{algorithm}");
        assert_eq!(case.look(&with("30/minute"), "u", 0).await.remaining, 0);
        assert_eq!(case.look(&with("100/minute"), "u", 0).await.remaining, 39);
    }
}

async fn one_excursion_of_the_clock_freezes_nobody(case: Case<'_>) {
    for (algorithm, windows) in [
        (Algorithm::FixedWindow, 2),
        (Algorithm::SlidingWindow, 3),
        (Algorithm::MovingWindow, 2),
        (Algorithm::TokenBucket, 4),
    ] {
        let limit = limit(algorithm.as_str(), "10/minute", algorithm);
        case.at(DAY);
        assert!(case.take(&limit, "u", 10).await);
        case.at(0);
        assert!(!case.take(&limit, "u", 1).await, "{algorithm}: going back mints nothing");
        let Retry::After(wait) = case.look(&limit, "u", 1).await.retry else { panic!("{algorithm}") };
        assert!(wait <= Millis(windows * 60_000), "{algorithm}: {wait}");
        case.at(wait.get());
        assert!(case.take(&limit, "u", 1).await, "{algorithm}");
    }
}

async fn never_is_not_later(case: Case<'_>) {
    for algorithm in Algorithm::ALL {
        let limit = limit(algorithm.as_str(), "10/minute", algorithm);
        for amount in [11, 1 << 40, u64::MAX] {
            let denial = denied(case.store.reserve(charge(&limit, "u", amount)).await.unwrap());
            assert_eq!((denial.retry(), denial.requested()), (Retry::Never, amount));
        }
        let estimate = Charge::estimate(Arc::clone(&limit), user("u"), u64::MAX);
        drop(granted(case.store.reserve(vec![estimate]).await.unwrap()));
    }
}

async fn a_call_holds_its_slot_until_it_is_over(case: Case<'_>) {
    let limit = slots("gpu", 2);
    let take = async |amount| granted(case.store.reserve(charge(&limit, "u", amount)).await.unwrap());
    let (first, second) = (take(1).await, take(1).await);
    let standing = &second.standings()[0];
    assert_eq!((standing.used, standing.remaining, standing.reset), (2, 0, LEASE));
    let denial = denied(case.store.reserve(charge(&limit, "u", 1)).await.unwrap());
    assert_eq!(denial.retry(), Retry::After(Millis(1_000)), "no promise, only a hint");
    assert_eq!(denied(case.store.reserve(charge(&limit, "u", 3)).await.unwrap()).retry(), Retry::Never);
    assert!(case.take(&limit, "somebody else", 2).await);
    // Whatever a call is settled with, and be it what it took, it is over.
    let over = Correction { returned: 1, ..Correction::default() };
    assert_eq!(first.settled(&[1]).await.unwrap(), [over]);
    let third = take(1).await;
    assert_eq!(second.settled(&[]).await.unwrap(), [over]);
    assert_eq!(third.settled(&[0]).await.unwrap(), [over]);
    assert_eq!(case.look(&limit, "u", 1).await.used, 0);
    let heavy = take(2).await;
    assert!(!case.take(&limit, "u", 1).await);
    case.at(1);
    assert_eq!(heavy.settled(&[7]).await.unwrap()[0].returned, 2);
    // Without waiting for it; and what takes nothing gives nothing back.
    take(2).await.refund();
    let nothing = take(0).await;
    let mut asked = 0;
    while case.look(&limit, "u", 0).await.used > 0 {
        asked += 1;
        assert!(asked < 10_000, "the refund never came");
    }
    assert_eq!(nothing.settled(&[0]).await.unwrap(), [Correction::default()]);
    // What was cleared takes nobody else's slot.
    let old = take(1).await;
    assert!(case.store.clear(&user("u")).await.unwrap());
    let new = take(1).await;
    assert_eq!(old.settled(&[0]).await.unwrap()[0].returned, 0);
    assert_eq!(case.look(&limit, "u", 0).await.used, 1);
    assert_eq!(new.settled(&[0]).await.unwrap()[0].returned, 1);
}

async fn a_call_that_is_not_heard_of_loses_its_slot(case: Case<'_>) {
    let limit = slots("gpu", 2);
    let take = async || granted(case.store.reserve(charge(&limit, "u", 1)).await.unwrap());
    // Whoever held it is gone.
    drop(take().await);
    let alive = take().await;
    for beat in 1..=5 {
        case.at(beat * 10_000);
        alive.renewed().await.unwrap();
    }
    assert_eq!(case.look(&limit, "u", 1).await.used, 1);
    case.at(50_000 + LEASE.get() - 1);
    assert_eq!(case.look(&limit, "u", 1).await.reset, Millis(1));
    case.at(50_000 + LEASE.get());
    assert_eq!(case.look(&limit, "u", 1).await.used, 0);
    // It was only asleep: its call does run, so it counts again, even past the limit.
    let others = [take().await, take().await];
    alive.renewed().await.unwrap();
    let standing = case.look(&limit, "u", 1).await;
    assert_eq!((standing.used, standing.remaining), (3, 0));
    assert_eq!(alive.settled(&[0]).await.unwrap()[0].returned, 1);
    assert!(!case.take(&limit, "u", 1).await);
    // Those ran out: that they end takes nothing from whoever came since.
    case.at(50_000 + 2 * LEASE.get());
    drop([take().await, take().await]);
    for late in others {
        assert_eq!(late.settled(&[0]).await.unwrap(), [Correction::default()]);
    }
    assert_eq!(case.look(&limit, "u", 1).await.used, 2);
}

async fn slots_are_taken_with_everything_else_or_not_at_all(case: Case<'_>) {
    let (one, two) = (slots("one", 5), slots("two", 3));
    let minute = limit("m", "4/minute", Algorithm::MovingWindow);
    let all = || [charge(&one, "a", 1), charge(&two, "a", 1), charge(&minute, "b", 1)].concat();
    let used = async || -> Vec<u64> {
        let standings = case.store.peek(all()).await.unwrap();
        standings.iter().map(|standing| standing.used).collect()
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(granted(case.store.reserve(all()).await.unwrap()));
    }
    let denial = denied(case.store.reserve(all()).await.unwrap());
    assert_eq!((denial.binding().limit.id(), used().await), ("two-concurrency", vec![3, 3, 3]));
    let ended = held.remove(0).settled(&[1, 1, 1]).await.unwrap();
    assert_eq!(ended.iter().map(|one| one.returned).collect::<Vec<_>>(), [1, 1, 0]);
    held.push(granted(case.store.reserve(all()).await.unwrap()));
    drop(held.remove(0).settled(&[]).await.unwrap());
    let denial = denied(case.store.reserve(all()).await.unwrap());
    assert_eq!((denial.binding().limit.id(), used().await), ("m-requests-minute", vec![2, 2, 4]));
    // Of two charges on one limit each has its lease.
    let twice = [charge(&one, "c", 1), charge(&one, "c", 2)].concat();
    let both = granted(case.store.reserve(twice.clone()).await.unwrap());
    assert!(!case.store.reserve(twice).await.unwrap().is_granted());
    let ended = both.settled(&[0, 0]).await.unwrap();
    assert_eq!(ended.iter().map(|one| one.returned).collect::<Vec<_>>(), [1, 2]);
}

async fn a_changed_number_of_slots_counts_who_holds_one(case: Case<'_>) {
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(granted(case.store.reserve(charge(&slots("gpu", 4), "u", 1)).await.unwrap()));
    }
    assert_eq!(case.look(&slots("gpu", 6), "u", 1).await.remaining, 2);
    assert_eq!(case.look(&slots("gpu", 2), "u", 1).await.remaining, 0);
    for (ended, reservation) in held.into_iter().enumerate() {
        let fits = case.look(&slots("gpu", 2), "u", 1).await.retry == Retry::Now;
        assert_eq!(fits, ended > 2, "{ended} ended");
        reservation.settled(&[]).await.unwrap();
    }
}
