//! What a store promises, case by case.

mod support;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use support::{START, charge, denied, granted, limit, user};
use tollgate_limiter::{
    Algorithm, Budgets, Charge, Decision, Dimension, Limit, ManualClock, MemoryStore, Millis, Retry, Scope,
    Standing, SystemClock,
};

fn store_at(now: u64) -> (MemoryStore, ManualClock) {
    let clock = ManualClock::at(Millis(now));
    (MemoryStore::new(clock.clone()), clock)
}

fn look(store: &MemoryStore, limit: &Arc<Limit>, name: &str, amount: u64) -> Standing {
    store.peek(charge(limit, name, amount)).remove(0)
}

/// Five per five seconds, all at once: time in ms, amount, granted, remaining, reset in ms, retry in ms. The rows up to
/// the line are the table that throttled (`rate_test.go`, cases 0 to 14) and redis-cell (`cell/mod.rs`, the same 15) share.
#[test]
fn the_bucket_is_gcra() {
    let limit = limit("r", "5/5 s", Algorithm::TokenBucket);
    let (store, clock) = store_at(START);
    let never = u64::MAX;
    for (row, (time, amount, grant, remaining, reset, retry)) in [
        (0, 6, false, 5, 0, never),
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
        clock.set(Millis(START + time));
        let decision = store.reserve(charge(&limit, "u", amount));
        let retry = match retry {
            0 => Retry::Now,
            u64::MAX => Retry::Never,
            wait => Retry::After(Millis(wait)),
        };
        let standing = &decision.standings()[0];
        assert_eq!(decision.is_granted(), grant, "row {row}");
        assert_eq!(
            (standing.remaining, standing.reset, standing.retry),
            (remaining, Millis(reset), retry),
            "row {row}"
        );
    }
}

#[test]
fn a_fixed_window_ends_with_the_wall_clock() {
    let limit = limit("r", "10/minute", Algorithm::FixedWindow);
    let (store, clock) = store_at(START + 59_000);
    let first = granted(store.reserve(charge(&limit, "u", 10)));
    assert_eq!(first.standings()[0].remaining, 0);
    let denial = denied(store.reserve(charge(&limit, "u", 1)));
    assert_eq!(
        (denial.retry(), denial.requested(), denial.now()),
        (Retry::After(Millis(1_000)), 1, Millis(START + 59_000))
    );
    clock.advance(Millis(1_000));
    // What went with its window is not given back to the next one.
    drop(granted(store.reserve(charge(&limit, "u", 4))));
    assert_eq!(first.refund()[0].returned, 0);
    assert_eq!(look(&store, &limit, "u", 0).used, 4);
}

#[test]
fn a_sliding_window_fades() {
    let limit = limit("r", "100/minute", Algorithm::SlidingWindow);
    let (store, clock) = store_at(START);
    drop(granted(store.reserve(charge(&limit, "u", 80))));
    clock.set(Millis(START + 75_000));
    // A quarter of the next window is over: three quarters of 80 still count.
    let standing = look(&store, &limit, "u", 41);
    assert_eq!((standing.used, standing.remaining, standing.reset), (60, 40, Millis(45_000)));
    assert_eq!(standing.retry, Retry::After(Millis(750)));
}

#[test]
fn months_are_calendar_months_and_weeks_start_on_monday() {
    let day = 86_400_000;
    // 2028-02-28T12:00Z: a Monday, in a leap year.
    let noon = 1_835_352_000_000;
    let (store, clock) = store_at(noon);
    // Whatever the algorithm, a month is a fixed window.
    for algorithm in Algorithm::ALL {
        let limit = limit(algorithm.as_str(), "10/month", algorithm);
        assert_eq!(limit.algorithm(), Algorithm::FixedWindow);
        drop(granted(store.reserve(charge(&limit, "u", 10))));
        assert_eq!(
            denied(store.reserve(charge(&limit, "u", 1))).retry(),
            Retry::After(Millis(day + day / 2))
        );
    }
    let month = limit("fixed_window", "10/month", Algorithm::FixedWindow);
    clock.set(Millis(noon + day + day / 2 - 1));
    assert_eq!(look(&store, &month, "u", 1).retry, Retry::After(Millis(1)));
    clock.advance(Millis(1));
    let march = granted(store.reserve(charge(&month, "u", 1)));
    assert_eq!(march.standings()[0].reset, Millis(31 * day));
    // 2027-02: 28 days.
    clock.set(Millis(1_801_440_000_000));
    drop(granted(store.reserve(charge(&month, "other", 1))));
    assert_eq!(look(&store, &month, "other", 0).reset, Millis(28 * day));
    let week = limit("w", "10/week", Algorithm::FixedWindow);
    clock.set(Millis(noon));
    drop(granted(store.reserve(charge(&week, "u", 1))));
    assert_eq!(look(&store, &week, "u", 0).reset, Millis(6 * day + day / 2));
}

#[test]
fn big_numbers_are_exact() {
    for (quota, capacity) in
        [("1000000000/day", 1_000_000_000), ("7000000/minute", 7_000_000), ("$40k/day", 40_000_000_000)]
    {
        for algorithm in Algorithm::ALL {
            let limit = limit("r", quota, algorithm);
            let (store, clock) = store_at(START);
            drop(granted(store.reserve(charge(&limit, "u", capacity - 1))));
            drop(granted(store.reserve(charge(&limit, "u", 1))));
            let denial = denied(store.reserve(charge(&limit, "u", 1)));
            assert_eq!(
                (denial.binding().used, denial.binding().remaining),
                (capacity, 0),
                "{algorithm} {quota}"
            );
            let Retry::After(wait) = denial.retry() else { panic!("{algorithm} {quota}") };
            clock.advance(wait);
            drop(granted(store.reserve(charge(&limit, "u", 1))));
        }
    }
    let money = limit("team", "$100,000/month".replace(',', "").as_str(), Algorithm::TokenBucket);
    let (store, _) = store_at(START);
    drop(granted(store.reserve(charge(&money, "u", 100_000_000_000 - 1))));
    assert_eq!(look(&store, &money, "u", 0).remaining, 1);
    // A steady seven million a minute for an hour: not one more or less than the rate and the burst.
    let fast = limit("fast", "7000000/minute burst 1M", Algorithm::TokenBucket);
    let (store, clock) = store_at(START);
    let mut admitted = 0;
    for _ in 0..3_600 {
        admitted += look(&store, &fast, "u", 0).remaining;
        let all = look(&store, &fast, "u", 0).remaining;
        drop(granted(store.reserve(charge(&fast, "u", all))));
        clock.advance(Millis(1_000));
    }
    let whole = 1_000_000 + 3_599 * 7_000_000 / 60;
    assert!((whole - 1..=whole).contains(&admitted), "{admitted} of {whole}");
}

#[test]
fn never_is_not_later_and_estimates_are_clamped() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "10/minute", algorithm);
        let (store, _) = store_at(START);
        assert_eq!(denied(store.reserve(charge(&limit, "u", 11))).retry(), Retry::Never);
        assert_eq!(denied(store.reserve(charge(&limit, "u", u64::MAX))).retry(), Retry::Never);
        let estimate = || vec![Charge::estimate(Arc::clone(&limit), user("u"), 5_000)];
        let reservation = granted(store.reserve(estimate()));
        assert_eq!(reservation.standings()[0].requested, 10);
        assert!(matches!(denied(store.reserve(estimate())).retry(), Retry::After(_)));
        reservation.refund();
        assert_eq!(look(&store, &limit, "u", 10).retry, Retry::Now);
    }
    let bucket = limit("b", "10/minute burst 20", Algorithm::TokenBucket);
    let (store, _) = store_at(START);
    assert_eq!(denied(store.reserve(charge(&bucket, "u", 21))).retry(), Retry::Never);
    drop(granted(store.reserve(charge(&bucket, "u", 20))));
}

#[test]
fn settling_charges_more_now_and_gives_less_back() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "100/minute", algorithm);
        let (store, clock) = store_at(START);
        let used = || look(&store, &limit, "u", 0).used;
        let reservation = granted(store.reserve(charge(&limit, "u", 60)));
        let correction = reservation.settle(&[25]).remove(0);
        assert_eq!((correction.returned, correction.charged, correction.forgiven), (35, 0, 0), "{algorithm}");
        assert_eq!(used(), 25);
        let reservation = granted(store.reserve(charge(&limit, "u", 60)));
        let correction = reservation.settle(&[150]).remove(0);
        assert_eq!((correction.returned, correction.charged, correction.forgiven), (0, 90, 0), "{algorithm}");
        assert_eq!((used(), look(&store, &limit, "u", 0).remaining), (175, 0));
        // Debt is waited off, and one more settlement stops at twice the limit.
        clock.advance(Millis(1));
        assert!(matches!(look(&store, &limit, "u", 1).retry, Retry::After(_)));
        let (store, _) = store_at(START);
        let (first, second) = (
            granted(store.reserve(charge(&limit, "u", 50))),
            granted(store.reserve(charge(&limit, "u", 50))),
        );
        let correction = first.settle(&[u64::MAX]).remove(0);
        assert_eq!((correction.charged, correction.forgiven), (100, u64::MAX - 150), "{algorithm}");
        let correction = second.settle(&[70]).remove(0);
        assert_eq!((correction.charged, correction.forgiven), (0, 20), "{algorithm}");
        assert_eq!(look(&store, &limit, "u", 0).used, 200);
        // Dropped, the estimate stands.
        drop(store.reserve(charge(&limit, "v", 30)));
        assert_eq!(look(&store, &limit, "v", 0).used, 30);
        // Amounts that are missing keep the estimate; there may be more than charges.
        let pair = |name| [charge(&limit, name, 5), charge(&limit, "w", 5)].concat();
        granted(store.reserve(pair("p"))).settle(&[1]);
        granted(store.reserve(pair("q"))).settle(&[1, 2, 3]);
        assert_eq!(["p", "q", "w"].map(|name| look(&store, &limit, name, 0).used), [1, 1, 7]);
    }
}

#[test]
fn after_a_clear_old_reservations_settle_upward_only() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "100/minute", algorithm);
        let (store, _) = store_at(START);
        let take = || granted(store.reserve(charge(&limit, "u", 40)));
        let (less, more) = (take(), take());
        assert!(store.clear(&user("u")));
        assert!(!store.clear(&user("u")));
        assert_eq!(store.occupancy().keyed, 0);
        drop(take());
        assert_eq!(less.refund()[0].returned, 0, "{algorithm}");
        assert_eq!(look(&store, &limit, "u", 0).used, 40);
        assert_eq!(more.settle(&[50])[0].charged, 10, "{algorithm}");
        assert_eq!(look(&store, &limit, "u", 0).used, 50);
    }
}

#[test]
fn a_changed_capacity_keeps_what_was_used() {
    for algorithm in Algorithm::ALL {
        let of = |amount: u64| limit("r", &format!("{amount}/minute"), algorithm);
        let (store, _) = store_at(START);
        drop(granted(store.reserve(charge(&of(60), "u", 60))));
        let raised = look(&store, &of(61), "u", 0);
        assert_eq!((raised.used, raised.remaining), (60, 1), "{algorithm}");
        drop(granted(store.reserve(charge(&of(100), "u", 30))));
        assert_eq!(look(&store, &of(100), "u", 0).remaining, 10);
        let lowered = look(&store, &of(50), "u", 1);
        assert_eq!((lowered.used, lowered.remaining), (90, 0), "{algorithm}");
        assert!(matches!(lowered.retry, Retry::After(_)));
        denied(store.reserve(charge(&of(50), "u", 1)));
        // Another window, or another algorithm, starts clean.
        assert_eq!(look(&store, &limit("r", "60/hour", algorithm), "u", 0).used, 0);
        let other = Algorithm::ALL[(algorithm as usize + 1) % 4];
        assert_eq!(look(&store, &limit("r", "60/minute", other), "u", 0).used, 0);
    }
}

#[test]
fn a_denial_names_the_longest_wait() {
    let minute = limit("m", "1/minute", Algorithm::FixedWindow);
    let hour = limit("h", "1/hour", Algorithm::FixedWindow);
    let second = limit("s", "1/second", Algorithm::FixedWindow);
    let (store, _) = store_at(START);
    let charges =
        |amount| [charge(&minute, "u", 1), charge(&hour, "u", 1), charge(&second, "u", amount)].concat();
    drop(granted(store.reserve(charges(1))));
    let denial = denied(store.reserve(charges(1)));
    assert_eq!((denial.binding_index(), denial.binding().limit.id()), (1, "h-requests-hour"));
    assert_eq!(denial.retry(), Retry::After(Millis(3_600_000)));
    let denial = denied(store.reserve(charges(2)));
    assert_eq!((denial.binding_index(), denial.retry(), denial.requested()), (2, Retry::Never, 2));
    assert!(denial.standings().iter().all(|standing| !standing.taken));
}

#[test]
fn a_shadow_reports_and_never_refuses() {
    let real = limit("real", "10/minute", Algorithm::FixedWindow);
    let quota = "2/minute".parse().unwrap();
    let scope = Scope::of([Dimension::User]);
    let shadow = Arc::new(Limit::new("shadow", quota, Algorithm::FixedWindow, scope).unwrap().shadow());
    let (store, _) = store_at(START);
    let charges = || [charge(&shadow, "u", 2), charge(&real, "u", 2)].concat();
    let first = granted(store.reserve(charges()));
    assert!(first.standings().iter().all(|standing| standing.taken));
    let second = granted(store.reserve(charges()));
    assert_eq!([second.standings()[0].taken, second.standings()[1].taken], [false, true]);
    assert_eq!(second.standings()[0].retry, Retry::After(Millis(60_000)));
    // Only what was taken is settled.
    second.settle(&[0, 0]);
    assert_eq!((look(&store, &shadow, "u", 0).used, look(&store, &real, "u", 0).used), (2, 2));
    drop(granted(store.reserve(charge(&real, "u", 8))));
    let denial = denied(store.reserve(charges()));
    assert_eq!(denial.binding_index(), 1, "a shadow never binds");
}

#[test]
fn two_charges_of_one_counter_count_together() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "10/minute", algorithm);
        let (store, _) = store_at(START);
        let twice = |a, b| [charge(&limit, "u", a), charge(&limit, "u", b)].concat();
        assert_eq!(denied(store.reserve(twice(6, 5))).retry(), Retry::Never);
        assert_eq!(look(&store, &limit, "u", 0).used, 0);
        drop(granted(store.reserve(twice(6, 4))));
        assert_eq!(look(&store, &limit, "u", 0).remaining, 0);
    }
}

#[test]
fn an_empty_set_of_charges_is_granted() {
    let (store, _) = store_at(START);
    assert!(granted(store.reserve(Vec::new())).refund().is_empty());
}

/// Threads meet in different orders; exactly L are admitted, and nobody paid for a refusal.
#[test]
fn many_threads_admit_exactly_the_limit() {
    for algorithm in Algorithm::ALL {
        for capacity in [1, 5, 1_000] {
            let shared = limit("all", &format!("{capacity}/day"), algorithm);
            let own = limit("own", "1000000/day", algorithm);
            let (store, _) = store_at(START);
            let admitted: u64 = std::thread::scope(|scope| {
                let workers: Vec<_> = (0..8_u64)
                    .map(|worker| {
                        let (store, shared, own) = (store.clone(), &shared, &own);
                        scope.spawn(move || {
                            let one = |turn: u64| {
                                let name = format!("w{}", (worker + turn) % 5);
                                let mut charges = [charge(shared, "all", 1), charge(own, &name, 1)].concat();
                                if turn.is_multiple_of(2) {
                                    charges.reverse();
                                }
                                u64::from(matches!(store.reserve(charges), Decision::Granted(_)))
                            };
                            (0..300).map(one).sum::<u64>()
                        })
                    })
                    .collect();
                workers.into_iter().map(|worker| worker.join().unwrap()).sum()
            });
            assert_eq!(admitted, capacity, "{algorithm}");
            let paid: u64 = (0..5).map(|n| look(&store, &own, &format!("w{n}"), 0).used).sum();
            assert_eq!(paid, capacity, "{algorithm}: a refused request paid");
        }
    }
}

fn stranger(n: u64) -> Charge {
    let subject = Scope::of([Dimension::Ip]).subject(|_| Cow::Owned(format!("10.{n}")));
    Charge::new(limit("junk", "10/minute", Algorithm::FixedWindow), subject.unauthenticated(), 1)
}

/// Hundreds of thousands of strangers stay in their budget and push out nobody known.
#[test]
fn junk_is_bounded_and_evicts_no_known_caller() {
    let clock = ManualClock::at(Millis(START));
    let budgets = Budgets { keyed: 10_000, unauthenticated: 4_096 };
    let store = MemoryStore::with_budgets(clock.clone(), budgets);
    let own = limit("own", "10/day", Algorithm::TokenBucket);
    for n in 0..5_000 {
        drop(store.reserve(charge(&own, &n.to_string(), 1)));
    }
    let junk = stranger(0).limit().clone();
    let scope = Scope::of([Dimension::Ip]);
    for n in 0..300_000_u64 {
        let subject = scope.subject(|_| Cow::Owned(n.to_string())).unauthenticated();
        drop(store.reserve(vec![Charge::new(Arc::clone(&junk), subject, 1)]));
    }
    let occupancy = store.occupancy();
    assert_eq!(occupancy.keyed, 5_000);
    assert!((3_500..=4_096).contains(&occupancy.unauthenticated), "{occupancy:?}");
    assert_eq!(occupancy.evicted_live, 300_000 - occupancy.unauthenticated as u64);
    for n in 0..5_000 {
        assert_eq!(look(&store, &own, &n.to_string(), 0).used, 1, "a known caller was forgotten");
    }
    // Refused strangers leave nothing behind.
    assert!(
        store.reserve(vec![Charge::new(junk, user("x").unauthenticated(), 11)]).standings()[0].retry
            == Retry::Never
    );
    assert_eq!(store.occupancy(), occupancy);
}

#[test]
fn those_with_nothing_in_use_are_forgotten_first() {
    let clock = ManualClock::at(Millis(START));
    let store = MemoryStore::with_budgets(clock.clone(), Budgets { keyed: 4, unauthenticated: 2 });
    let (day, minute) =
        (limit("d", "10/day", Algorithm::FixedWindow), limit("m", "10/minute", Algorithm::FixedWindow));
    for name in ["a", "b"] {
        drop(store.reserve(charge(&day, name, 1)));
    }
    for name in ["c", "d"] {
        drop(store.reserve(charge(&minute, name, 1)));
    }
    clock.advance(Millis(60_000));
    for name in ["e", "f"] {
        drop(store.reserve(charge(&day, name, 1)));
    }
    let used = |limit: &Arc<Limit>, name| look(&store, limit, name, 0).used;
    assert_eq!(["a", "b", "e", "f"].map(|name| used(&day, name)), [1; 4]);
    assert_eq!((store.occupancy().keyed, store.occupancy().evicted_live), (4, 0));
    // Now somebody has to go: the one nearest to nothing in use, of its own class.
    drop(store.reserve(charge(&minute, "g", 1)));
    assert_eq!((store.occupancy().keyed, store.occupancy().evicted_live), (4, 1));
    for n in 0..3 {
        drop(store.reserve(vec![stranger(n)]));
    }
    assert_eq!(store.occupancy().unauthenticated, 2);
    // A stranger that becomes known moves to the other budget, and clearing again and again leaves nothing.
    let ip = stranger(2);
    let known = Scope::of([Dimension::Ip]).subject(|_| Cow::Borrowed("10.2"));
    drop(store.reserve(vec![Charge::new(Arc::clone(ip.limit()), known.clone(), 1)]));
    assert_eq!((store.occupancy().keyed, store.occupancy().unauthenticated), (4, 1));
}

/// What was a stranger's and became a known caller's is no longer in reach of strangers.
#[test]
fn a_promoted_subject_is_safe_from_junk() {
    let budgets = Budgets { keyed: 2, unauthenticated: 2 };
    let store = MemoryStore::with_budgets(ManualClock::at(Millis(START)), budgets);
    let known = Scope::of([Dimension::Ip]).subject(|_| Cow::Borrowed("10.0"));
    drop(store.reserve(vec![stranger(0)]));
    drop(store.reserve(vec![Charge::new(Arc::clone(stranger(0).limit()), known.clone(), 1)]));
    for n in 0..100 {
        drop(store.reserve(vec![stranger(n % 10 + 1)]));
    }
    assert_eq!(store.peek(vec![stranger(0)])[0].used, 2);
    assert_eq!((store.occupancy().keyed, store.occupancy().unauthenticated), (1, 2));
    // The flag of one request does not make it a stranger's again.
    drop(store.reserve(vec![stranger(0)]));
    assert_eq!(store.occupancy().keyed, 1);
}

/// One excursion of the clock: the promised wait counts down although every request meanwhile is refused.
#[test]
fn denials_do_not_freeze_an_excursion() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "10/minute", algorithm);
        let (store, clock) = store_at(START + 600_000);
        let held = granted(store.reserve(charge(&limit, "u", 10)));
        clock.set(Millis(START));
        let Retry::After(wait) = denied(store.reserve(charge(&limit, "u", 10))).retry() else { panic!() };
        assert!(wait <= Millis(120_000), "{algorithm}: {wait}");
        for _ in 0..10 {
            clock.advance(Millis(wait.get() / 11));
            denied(store.reserve(charge(&limit, "u", 10)));
        }
        clock.set(Millis(START) + wait);
        let again = granted(store.reserve(charge(&limit, "u", 10)));
        assert_eq!(held.refund()[0].returned, 0, "{algorithm}");
        // Settling alone brings a state back, too.
        clock.set(Millis(START - 600_000));
        assert_eq!(again.refund()[0].returned, 0, "{algorithm}");
        assert!(matches!(look(&store, &limit, "u", 10).retry, Retry::After(wait) if wait <= Millis(120_000)));
    }
}

#[test]
fn clearing_again_and_again_leaves_nothing() {
    let clock = ManualClock::at(Millis(START));
    let store = MemoryStore::with_budgets(clock.clone(), Budgets { keyed: 3, unauthenticated: 3 });
    let limit = limit("m", "10/minute", Algorithm::FixedWindow);
    for _ in 0..1_000 {
        drop(store.reserve(charge(&limit, "again", 1)));
        assert!(store.clear(&user("again")));
    }
    assert_eq!((store.occupancy().keyed, store.occupancy().evicted_live), (0, 0));
    for name in ["a", "b", "c", "d"] {
        drop(store.reserve(charge(&limit, name, 1)));
    }
    assert_eq!((store.occupancy().keyed, store.occupancy().evicted_live), (3, 1));
    assert_eq!(["a", "b", "c", "d"].map(|name| look(&store, &limit, name, 0).used), [0, 1, 1, 1]);
}

/// The short way takes what the long way takes.
#[test]
fn taking_is_reserving_without_a_reservation() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "3/minute", algorithm);
        let ((short, clock), (long, _)) = (store_at(START), store_at(START));
        for step in 0..6 {
            let amount = 1 + step % 2;
            let charges = charge(&limit, "u", amount);
            let taken = short.take(&charges[0]);
            match long.reserve(charges) {
                Decision::Granted(_) => assert_eq!(taken, Retry::Now, "{algorithm} {step}"),
                Decision::Denied(denial) => assert_eq!(taken, denial.retry(), "{algorithm} {step}"),
            }
            let (a, b) = (look(&short, &limit, "u", 0), look(&long, &limit, "u", 0));
            assert_eq!((a.used, a.remaining, a.reset), (b.used, b.remaining, b.reset));
        }
        assert_eq!(short.take(&charge(&limit, "u", 4)[0]), Retry::Never);
        // A stranger that becomes known is promoted on the short way, too.
        drop(clock);
        let known = user("v");
        let by = |subject| Charge::new(Arc::clone(&limit), subject, 1);
        short.take(&by(known.clone().unauthenticated()));
        assert_eq!(short.occupancy().unauthenticated, 1);
        short.take(&by(known));
        assert_eq!((short.occupancy().unauthenticated, short.occupancy().keyed), (0, 2));
    }
}

#[test]
fn the_machine_s_clock_works_too() {
    let store = MemoryStore::new(SystemClock);
    let limit = limit("r", "1/366 days", Algorithm::TokenBucket);
    let began = Instant::now();
    drop(granted(store.reserve(charge(&limit, "u", 1))));
    let Retry::After(wait) = denied(store.reserve(charge(&limit, "u", 1))).retry() else { panic!() };
    let year = 366 * 86_400_000;
    let most = began.elapsed().as_millis() as u64 + 1_000;
    assert!((year - most..=year).contains(&wait.get()), "{wait}");
}
