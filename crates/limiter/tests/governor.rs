//! governor, which counts in nanoseconds with another data structure, as outside judge of the token bucket.

mod support;

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, FakeRelativeClock};
use governor::{Quota, RateLimiter};
use support::{Random, START, charge, limit};
use tollgate_limiter::{Algorithm, Decision, ManualClock, MemoryStore, Millis, Retry};

/// 40 random loads of each rate whose emission interval is a whole number of nanoseconds: the same verdict and the
/// same wait, to the millisecond, 120,000 times.
#[test]
fn governor_agrees_with_the_token_bucket() {
    let (mut grants, mut denials, mut nevers) = (0, 0, 0);
    for (quota, per_unit_ms, burst) in [
        ("5/second", 200, 5),
        ("60/minute", 1_000, 60),
        ("60/minute burst 7", 1_000, 7),
        ("10/minute burst 1", 6_000, 1),
        ("1000/second burst 50", 1, 50),
        ("1/minute", 60_000, 1),
    ] {
        let ours = limit("r", quota, Algorithm::TokenBucket);
        for seed in 0..40 {
            let mut random = Random(seed);
            let clock = ManualClock::at(Millis(START));
            let store = MemoryStore::new(clock.clone());
            let theirs = Quota::with_period(Duration::from_millis(per_unit_ms)).unwrap();
            let theirs = theirs.allow_burst(NonZeroU32::new(burst).unwrap());
            let their_clock = FakeRelativeClock::default();
            let governor = RateLimiter::direct_with_clock(theirs, their_clock.clone());
            for step in 0..500 {
                let pause = match random.below(6) {
                    0 => 0,
                    1 => random.below(per_unit_ms * u64::from(burst) * 2),
                    _ => random.below(per_unit_ms * 2),
                };
                clock.advance(Millis(pause));
                their_clock.advance(Duration::from_millis(pause));
                let amount = if random.one_in(3) { 1 + random.below(u64::from(burst) + 1) } else { 1 };
                let verdict = governor.check_n(NonZeroU32::new(amount as u32).unwrap());
                let decision = store.reserve(charge(&ours, "u", amount));
                let at = format!("{quota}, seed {seed}, step {step}: {amount}");
                match (verdict, decision) {
                    (Ok(Ok(())), Decision::Granted(_)) => grants += 1,
                    (Ok(Err(not_until)), Decision::Denied(denial)) => {
                        let wait = not_until.wait_time_from(their_clock.now()).as_nanos();
                        let wait = wait.div_ceil(1_000_000) as u64;
                        assert_eq!(denial.retry(), Retry::After(Millis(wait)), "{at}");
                        denials += 1;
                    }
                    (Err(_), Decision::Denied(denial)) => {
                        assert_eq!(denial.retry(), Retry::Never, "{at}");
                        nevers += 1;
                    }
                    (verdict, decision) => panic!("{at}: governor {verdict:?}, here {decision:?}"),
                }
            }
        }
    }
    assert!(grants > 20_000 && denials > 20_000 && nevers > 1_000, "{grants} {denials} {nevers}");
}
