//! What must hold whatever happens, over seeded random histories.

mod support;

use std::sync::Arc;

use support::judge::Judge;
use support::{Random, START, charge, limit, user, window_ms};
use tollgate_limiter::{Algorithm, Charge, Decision, Limit, ManualClock, MemoryStore, Millis, Retry};

const QUOTAS: [&str; 6] = ["5/second", "7/10 s", "60/minute", "1/minute", "1000/hour", "1000000000/day"];

fn store_at(now: u64) -> (MemoryStore, ManualClock) {
    let clock = ManualClock::at(Millis(now));
    (MemoryStore::new(clock.clone()), clock)
}

/// Takes and settles at random, handing each step to `watch`.
fn history(
    limit: &Arc<Limit>,
    seed: u64,
    steps: u64,
    mut watch: impl FnMut(&MemoryStore, &ManualClock, u64),
) {
    let mut random = Random(seed);
    let (store, clock) = store_at(START + random.below(1_000_000));
    let window = window_ms(limit);
    let mut held = Vec::new();
    for _ in 0..steps {
        clock.advance(Millis(match random.below(8) {
            0 => random.below(2 * window),
            1..=3 => random.below(window / 10),
            _ => random.below(window / 100 + 1),
        }));
        let amount = if random.one_in(3) { 1 } else { 1 + random.below(limit.capacity()) };
        match store.reserve(charge(limit, "u", amount)) {
            Decision::Granted(reservation) => held.push((reservation, amount)),
            Decision::Denied(_) => watch(&store, &clock, amount),
        }
        if !held.is_empty() && random.one_in(3) {
            let (reservation, amount) = held.swap_remove(random.below(held.len() as u64) as usize);
            let actual =
                if random.one_in(4) { amount + random.below(3 * amount) } else { random.below(amount + 1) };
            reservation.settle(&[actual]);
        }
    }
}

#[test]
fn a_promised_wait_is_tight_from_both_sides() {
    for algorithm in Algorithm::ALL {
        let mut promises = 0;
        for (index, quota) in QUOTAS.iter().enumerate() {
            let limit = limit("r", quota, algorithm);
            for seed in 0..12 {
                history(&limit, seed * 100 + index as u64, 150, |store, clock, amount| {
                    let now = store.now();
                    let retry_at = |time: Millis| {
                        clock.set(time);
                        store.peek(charge(&limit, "u", amount))[0].retry
                    };
                    let Retry::After(wait) = retry_at(now) else {
                        panic!("{algorithm} {quota}: {amount} was denied")
                    };
                    assert!(wait > Millis::ZERO);
                    let before = retry_at(now + wait - Millis(1));
                    assert_eq!(before, Retry::After(Millis(1)), "{algorithm} {quota}: {amount} after {wait}");
                    assert_eq!(
                        retry_at(now + wait),
                        Retry::Now,
                        "{algorithm} {quota}: {amount} after {wait}"
                    );
                    clock.set(now);
                    promises += 1;
                });
            }
        }
        assert!(promises > 1_000, "{algorithm}: {promises} promises");
    }
}

#[test]
fn a_reset_is_when_nothing_is_in_use() {
    for algorithm in Algorithm::ALL {
        for quota in QUOTAS {
            let limit = limit("r", quota, algorithm);
            history(&limit, 7, 200, |store, clock, _| {
                let now = store.now();
                let standing = |time: Millis| {
                    clock.set(time);
                    store.peek(charge(&limit, "u", 0)).remove(0)
                };
                let reset = standing(now).reset;
                let after = standing(now + reset);
                let before = standing(now + reset - Millis(1));
                assert_eq!((after.used, after.remaining), (0, limit.capacity()), "{algorithm} {quota}");
                assert_eq!(after.reset, Millis::ZERO, "{algorithm} {quota}");
                assert!(before.used > 0, "{algorithm} {quota}: already reset 1 ms before {reset}");
                clock.set(now);
            });
        }
    }
}

#[test]
fn a_denial_and_a_look_change_nothing() {
    for algorithm in Algorithm::ALL {
        let (small, big) = (limit("small", "7/10 s", algorithm), limit("big", "1000/minute", algorithm));
        history(&small, 3, 300, |store, clock, amount| {
            let now = store.now();
            // What the counters say now, and at moments to come, shows all that is in them.
            let look = || {
                let mut all = String::new();
                for later in [0, 1, 999, 3_000, 9_999, 15_000, 70_000] {
                    clock.set(now + Millis(later));
                    let mut charges = charge(&small, "u", 3);
                    charges.extend(charge(&big, "other", 3));
                    all += &format!("{:?}", store.peek(charges));
                }
                clock.set(now);
                (all, store.occupancy())
            };
            let before = look();
            let mut charges = charge(&big, "other", 5);
            charges.extend(charge(&small, "u", amount));
            assert!(!store.reserve(charges).is_granted());
            assert_eq!(look(), before, "{algorithm}");
        });
    }
}

/// Late settlements, up and down at random: what was really used, replayed through an exact model, is never over what
/// the limit guarantees at any moment when somebody was let in.
#[test]
fn real_use_never_exceeds_under_late_settlements() {
    for algorithm in Algorithm::ALL {
        for quota in ["5/second", "60/minute", "100/hour"] {
            let limit = limit("r", quota, algorithm);
            // Down only, and both ways.
            for seed in 0..120 {
                let mut random = Random(seed);
                let up = seed % 2 == 1;
                let (store, clock) = store_at(START);
                let window = window_ms(&limit);
                let mut judge = Judge::new(&limit);
                let mut held = Vec::new();
                for _ in 0..200 {
                    clock.advance(Millis(random.below(window / 15)));
                    let amount = 1 + random.below(limit.capacity().min(12));
                    if let Decision::Granted(reservation) = store.reserve(charge(&limit, "u", amount)) {
                        held.push((reservation, judge.admit(store.now().get(), amount)));
                    }
                    if held.len() > 3 || (!held.is_empty() && random.one_in(3)) {
                        let (reservation, index) = held.swap_remove(random.below(held.len() as u64) as usize);
                        let reserved = reservation.standings()[0].requested;
                        let most = if up && random.one_in(3) { 3 * reserved } else { reserved };
                        let actual = random.below(most + 1);
                        let correction = reservation.settle(&[actual]).remove(0);
                        judge.settle(index, actual.min(reserved));
                        assert!(correction.returned <= reserved.saturating_sub(actual));
                        let more = actual.saturating_sub(reserved);
                        assert_eq!(correction.charged + correction.forgiven, more, "{algorithm} {quota}");
                        judge.overdraw(store.now().get(), correction.charged);
                    }
                    let standing = store.peek(charge(&limit, "u", 0)).remove(0);
                    assert!(standing.remaining <= limit.capacity());
                }
                assert_eq!(judge.exceeded(), None, "{algorithm} {quota} seed {seed}");
            }
        }
    }
}

/// 300 random loads against an exact log: none over, and hardly anything lost.
#[test]
fn a_moving_window_is_an_exact_log() {
    let (mut ratios, mut worst) = (0.0, 1.0_f64);
    for seed in 0..300 {
        let mut random = Random(seed);
        let quotas = ["50/second", "100/10 s", "1000/minute", "600/15 minutes", "5000/hour"];
        let limit = limit("r", quotas[seed as usize % quotas.len()], Algorithm::MovingWindow);
        let (window, capacity) = (window_ms(&limit), limit.capacity());
        let (store, clock) = store_at(START + random.below(window));
        // Loads of 0.5 to 3 times the limit, single units and gulps.
        let gulp = 1 + random.below(capacity / 25);
        let gap = (window * (gulp + 1) / capacity) * 10 / (5 + random.below(25)) + 1;
        let mut log: Vec<(u64, u64)> = Vec::new();
        let mut judge: Vec<(u64, u64)> = Vec::new();
        let (mut oldest, mut judge_oldest, mut live, mut judge_live) = (0, 0, 0, 0);
        let (mut taken, mut judge_taken) = (0, 0);
        let end = store.now().get() + 6 * window;
        while store.now().get() < end {
            clock.advance(Millis(random.below(gap + 1)));
            let (now, amount) = (store.now().get(), 1 + random.below(gulp));
            let forget = |log: &[(u64, u64)], oldest: &mut usize, live: &mut u64| {
                while *oldest < log.len() && log[*oldest].0 + window <= now {
                    *live -= log[*oldest].1;
                    *oldest += 1;
                }
            };
            forget(&log, &mut oldest, &mut live);
            forget(&judge, &mut judge_oldest, &mut judge_live);
            if store.reserve(charge(&limit, "u", amount)).is_granted() {
                log.push((now, amount));
                live += amount;
                taken += amount;
                assert!(live <= capacity, "seed {seed}: {live} of {capacity} in a trailing window");
            }
            if judge_live + amount <= capacity {
                judge.push((now, amount));
                judge_live += amount;
                judge_taken += amount;
            }
        }
        let ratio = taken as f64 / judge_taken as f64;
        ratios += ratio;
        worst = worst.min(ratio);
    }
    assert!(ratios / 300.0 >= 0.99, "{} of an exact log's throughput, at worst {worst}", ratios / 300.0);
}

/// Going back mints nothing; going forward and back freezes nothing for long.
#[test]
fn clock_steps_neither_mint_nor_freeze() {
    for (algorithm, windows) in [
        (Algorithm::FixedWindow, 2),
        (Algorithm::SlidingWindow, 3),
        (Algorithm::MovingWindow, 2),
        (Algorithm::TokenBucket, 4),
    ] {
        let limit = limit("r", "60/minute", algorithm);
        for seed in 0..200 {
            let mut random = Random(seed);
            let (store, clock) = store_at(START + random.below(60_000));
            for _ in 0..60 {
                let now = store.now().get();
                let before = store.peek(charge(&limit, "u", 0)).remove(0);
                let back = random.below(100_000);
                clock.set(Millis(now - back));
                let after = store.peek(charge(&limit, "u", 0)).remove(0);
                if back <= 60_000 {
                    assert!(
                        after.remaining <= before.remaining,
                        "{algorithm} seed {seed}: minted by going back {back}"
                    );
                }
                clock.set(Millis(match random.below(4) {
                    0 => now - back,
                    1 => now + random.below(1_000_000),
                    _ => now + random.below(5_000),
                }));
                match store.reserve(charge(&limit, "u", 1 + random.below(60))) {
                    Decision::Granted(reservation) if random.one_in(4) => {
                        drop(reservation.settle(&[random.below(200)]))
                    }
                    Decision::Granted(_) => {}
                    Decision::Denied(denial) => {
                        let Retry::After(wait) = denial.retry() else { panic!("never") };
                        assert!(
                            wait <= Millis(windows * 60_000),
                            "{algorithm} seed {seed}: frozen for {wait}"
                        );
                    }
                }
            }
        }
    }
}

/// While the clock is thrown back and forth within a window, no more is admitted than by a clock that stands.
#[test]
fn a_jittering_clock_admits_no_more() {
    for algorithm in Algorithm::ALL {
        let limit = limit("r", "100/day", algorithm);
        let (store, clock) = store_at(START + 40_000_000);
        let (mut random, mut admitted) = (Random(9), 0);
        for _ in 0..5_000 {
            clock.set(Millis(START + 40_000_000 - random.below(30_000_000)));
            admitted += u64::from(store.reserve(charge(&limit, "u", 1)).is_granted());
        }
        // Only the bucket refills meanwhile: within 30,000 of the 86,400 s.
        let most = if algorithm == Algorithm::TokenBucket { 135 } else { 100 };
        assert!((100..=most).contains(&admitted), "{algorithm}: {admitted}");
    }
}

/// Every amount and every order of charges: all or none.
#[test]
fn all_or_none_over_random_sets() {
    let mut random = Random(1);
    let (store, clock) = store_at(START);
    let limits: Vec<_> = Algorithm::ALL
        .into_iter()
        .flat_map(|algorithm| {
            [("a", "50/minute"), ("b", "200/minute")]
                .map(|(rule, q)| limit(&format!("{rule}-{algorithm}"), q, algorithm))
        })
        .collect();
    for _ in 0..5_000 {
        clock.advance(Millis(random.below(2_000)));
        let charges: Vec<Charge> = (0..1 + random.below(6))
            .map(|_| {
                let limit = &limits[random.below(limits.len() as u64) as usize];
                let name = ["x", "y", "z"][random.below(3) as usize];
                Charge::new(Arc::clone(limit), user(name), random.below(30))
            })
            .collect();
        let before = store.peek(charges.clone());
        let fit = before.iter().all(|standing| standing.retry == Retry::Now);
        let decision = store.reserve(charges.clone());
        assert_eq!(decision.is_granted(), fit);
        let after = store.peek(charges);
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            let counter = |other: &tollgate_limiter::Standing| {
                other.limit.id() == before.limit.id() && other.subject == before.subject
            };
            let taken: u64 =
                decision.standings().iter().filter(|s| s.taken && counter(s)).map(|s| s.requested).sum();
            assert_eq!(after.used, before.used + taken, "charge {index} of {}", before.limit.id());
        }
    }
}
