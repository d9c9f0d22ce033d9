//! What happens around a limit while it counts: its capacity changes, the clock is set, the month ends.

mod support;

use std::collections::HashMap;

use support::{Random, START, charge, denied, granted, limit};
use tollgate_limiter::{Algorithm, ManualClock, MemoryStore, Millis, Retry};

const MINUTE: u64 = 60_000;
const DAY: u64 = 86_400_000;

fn store_at(now: u64) -> (MemoryStore, ManualClock) {
    let clock = ManualClock::at(Millis(now));
    (MemoryStore::new(clock.clone()), clock)
}

/// The algorithms over a window of a minute once more, naively, in exact numbers, for a capacity that changes.
#[derive(Default)]
struct Model {
    taken: Vec<(u64, u64)>,
    debt: u64,
    at: u64,
}

impl Model {
    fn take(&mut self, algorithm: Algorithm, capacity: u64, now: u64, amount: u64) -> bool {
        if amount > capacity {
            return false;
        }
        let sum = |from: u64, to: u64| -> u64 {
            self.taken.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, n)| n).sum()
        };
        let start = now / MINUTE * MINUTE;
        let fits = match algorithm {
            Algorithm::FixedWindow => sum(start, start + MINUTE) + amount <= capacity,
            Algorithm::MovingWindow => sum(now + 1 - MINUTE, now + 1) + amount <= capacity,
            Algorithm::SlidingWindow => {
                let weighed = sum(start - MINUTE, start) * (start + MINUTE - now);
                weighed + (sum(start, start + MINUTE) + amount) * MINUTE <= capacity * MINUTE
            }
            Algorithm::TokenBucket => {
                // Lowered below what is owed, a bucket owes two of its new size; time drains at the new rate.
                let debt = self.debt.min(2 * capacity * MINUTE).saturating_sub((now - self.at) * capacity);
                let fits = debt + amount * MINUTE <= capacity * MINUTE;
                if fits {
                    (self.debt, self.at) = (debt + amount * MINUTE, now);
                }
                fits
            }
            Algorithm::Concurrency => unreachable!("has no window"),
        };
        if fits {
            self.taken.push((now, amount));
        }
        fits
    }
}

/// 200 random histories per algorithm in which the limit is raised and lowered all the time: every verdict is that of
/// the naive model, so what was used stays used and a new capacity holds at once.
#[test]
fn a_capacity_that_changes_all_the_time() {
    for algorithm in Algorithm::ALL {
        let limits: HashMap<u64, _> =
            (1..=40).map(|n| (n, limit("r", &format!("{n}/minute"), algorithm))).collect();
        let (mut grants, mut denials) = (0, 0);
        for seed in 0..200 {
            let mut random = Random(seed);
            let (store, clock) = store_at(START + random.below(MINUTE));
            let mut model = Model::default();
            let mut capacity = 10;
            for step in 0..120 {
                clock.advance(Millis(random.below(9_000)));
                if random.one_in(4) {
                    capacity = 1 + random.below(40);
                }
                let (now, amount) = (store.now().get(), 1 + random.below(6));
                let expected = model.take(algorithm, capacity, now, amount);
                let decision = store.reserve(charge(&limits[&capacity], "u", amount));
                assert_eq!(decision.is_granted(), expected, "{algorithm} seed {seed} step {step}");
                if expected { grants += 1 } else { denials += 1 }
            }
        }
        assert!(grants > 3_000 && denials > 3_000, "{algorithm}: {grants} granted, {denials} denied");
    }
}

/// How many windows a wait may last after an excursion.
fn windows(algorithm: Algorithm) -> u64 {
    match algorithm {
        Algorithm::FixedWindow | Algorithm::MovingWindow | Algorithm::Concurrency => 2,
        Algorithm::SlidingWindow => 3,
        Algorithm::TokenBucket => 4,
    }
}

/// The clock stands a day ahead for a while, then is right again: the level stays, and goes in due time.
#[test]
fn a_day_ahead_and_back() {
    for algorithm in Algorithm::ALL {
        for quota in ["60/minute", "7/10 s", "1/second"] {
            let limit = limit("r", quota, algorithm);
            let window = limit.window().longest().get();
            for seed in 0..50 {
                let mut random = Random(seed);
                let right = START + random.below(10 * MINUTE);
                let (store, clock) = store_at(right);
                drop(store.reserve(charge(&limit, "u", 1 + random.below(limit.capacity()))));
                clock.set(Millis(right + DAY));
                drop(granted(store.reserve(charge(&limit, "u", limit.capacity()))));
                clock.set(Millis(right));
                // Nobody is let in by the return of the clock,
                denied(store.reserve(charge(&limit, "u", 1)));
                // and nobody is locked out for longer than the bound, asking all the time.
                let mut waited = 0;
                while !store.reserve(charge(&limit, "u", limit.capacity())).is_granted() {
                    clock.advance(Millis(window / 40));
                    waited += window / 40;
                    let most = windows(algorithm) * window;
                    assert!(waited <= most, "{algorithm} {quota}: locked out for {waited} ms");
                }
            }
        }
    }
}

/// The clock falls back by a day, and later catches up: no use is forgotten by falling back.
#[test]
fn a_day_back_and_ahead() {
    for algorithm in Algorithm::ALL {
        for quota in ["60/minute", "7/10 s", "1/second"] {
            let limit = limit("r", quota, algorithm);
            let window = limit.window().longest().get();
            for seed in 0..50 {
                let mut random = Random(seed);
                let right = START + random.below(10 * MINUTE);
                let (store, clock) = store_at(right);
                drop(granted(store.reserve(charge(&limit, "u", limit.capacity()))));
                clock.set(Millis(right - DAY));
                let Retry::After(wait) = denied(store.reserve(charge(&limit, "u", 1))).retry() else {
                    panic!()
                };
                assert!(wait <= Millis(windows(algorithm) * window), "{algorithm} {quota}: {wait}");
                // Falling on and on lets nobody in.
                let mut now = right - DAY;
                for _ in 0..20 {
                    now -= random.below(DAY);
                    clock.set(Millis(now));
                    denied(store.reserve(charge(&limit, "u", 1)));
                }
                clock.set(Millis(now + windows(algorithm) * window));
                drop(granted(store.reserve(charge(&limit, "u", limit.capacity()))));
            }
        }
    }
}

/// Money per month through the end of February: of a common year, a leap year, and a century that is none.
#[test]
fn a_month_ends_with_february() {
    let limit = limit("team", "$100k/month", Algorithm::TokenBucket);
    for (noon, length) in [
        (1_803_816_000_000, 28), // 2027-02-28T12:00Z
        (1_835_438_400_000, 29), // 2028-02-29T12:00Z
        (4_107_499_200_000, 28), // 2100-02-28T12:00Z
    ] {
        let month_end = noon + DAY / 2;
        let (store, clock) = store_at(month_end - length * DAY);
        for micros in [99_999_000_000, 999_999] {
            drop(granted(store.reserve(charge(&limit, "u", micros))));
            clock.set(Millis(month_end - 1));
        }
        let last = granted(store.reserve(charge(&limit, "u", 1)));
        assert_eq!((last.standings()[0].remaining, last.standings()[0].reset), (0, Millis(1)));
        assert_eq!(denied(store.reserve(charge(&limit, "u", 1))).retry(), Retry::After(Millis(1)));
        clock.set(Millis(month_end));
        let march = granted(store.reserve(charge(&limit, "u", 100_000_000_000)));
        assert_eq!(march.standings()[0].reset, Millis(31 * DAY));
        assert_eq!(last.refund()[0].returned, 0, "February's money is not March's");
    }
}
