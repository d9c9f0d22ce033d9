//! When to stop asking. Pure: time is an argument.

use std::time::{Duration, Instant};

/// So many failures in a row.
const FAILURES_MAX: u32 = 5;
/// Of at least so many calls in [`SLOTS`] times [`SLOT`], half.
const CALLS_MIN: u32 = 10;
const SLOTS: usize = 10;
const SLOT: Duration = Duration::from_millis(100);

/// Counts the calls of the last second. It only says when it is enough; whoever asks does the rest.
#[derive(Debug)]
pub(super) struct Breaker {
    in_a_row: u32,
    slots: [Slot; SLOTS],
    start: Instant,
    /// The number, since the start, of the slot that is filled now.
    current: u128,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    calls: u32,
    failures: u32,
}

impl Breaker {
    pub(super) fn new(start: Instant) -> Breaker {
        Breaker { in_a_row: 0, slots: [Slot::default(); SLOTS], start, current: 0 }
    }

    pub(super) fn succeeded(&mut self, now: Instant) {
        self.in_a_row = 0;
        self.slot(now).calls += 1;
    }

    /// Whether it is enough.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        self.in_a_row += 1;
        let slot = self.slot(now);
        slot.calls += 1;
        slot.failures += 1;
        let (calls, failures) =
            self.slots.iter().fold((0, 0), |(calls, failures), s| (calls + s.calls, failures + s.failures));
        self.in_a_row >= FAILURES_MAX || calls >= CALLS_MIN && 2 * failures >= calls
    }

    /// Empties the slots that have passed.
    fn slot(&mut self, now: Instant) -> &mut Slot {
        let number = now.saturating_duration_since(self.start).as_nanos() / SLOT.as_nanos();
        let passed = number.saturating_sub(self.current).min(SLOTS as u128);
        for step in 0..passed {
            self.slots[((number - step) % SLOTS as u128) as usize] = Slot::default();
        }
        self.current = self.current.max(number);
        &mut self.slots[(self.current % SLOTS as u128) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::Breaker;
    use std::time::{Duration, Instant};

    /// Tells a breaker what happened when, in milliseconds; when it was enough.
    fn enough(told: impl IntoIterator<Item = (u64, bool)>) -> Option<u64> {
        let start = Instant::now();
        let mut breaker = Breaker::new(start);
        told.into_iter().find_map(|(at, success)| {
            let now = start + Duration::from_millis(at);
            if success {
                breaker.succeeded(now);
                return None;
            }
            breaker.failed(now).then_some(at)
        })
    }

    #[test]
    fn five_in_a_row_however_far_apart() {
        assert_eq!(enough((0..4).map(|n| (n * 60_000, false))), None);
        assert_eq!(enough((0..5).map(|n| (n * 60_000, false))), Some(240_000));
        let broken_by_one = [false, false, false, false, true, false, false, false, false];
        // Far apart, so that only the row counts.
        assert_eq!(enough((0..).map(|n| n * 60_000).zip(broken_by_one)), None);
    }

    #[test]
    fn half_of_ten_within_a_second() {
        let alternating = |pause: u64| (0..200).map(move |n| (n * pause, n % 2 == 1));
        // Failure 5 comes with call 9, failure 6 with call 11.
        assert_eq!(enough(alternating(10)), Some(100));
        assert_eq!(enough(alternating(99)), Some(990));
        // Never ten within a second.
        assert_eq!(enough(alternating(125)), None);
        // Never half.
        assert_eq!(enough((0..1_000).map(|n| (n, n % 5 < 3))), None);
    }

    #[test]
    fn what_is_older_than_a_second_is_forgotten() {
        let good = (0..1_000).map(|n| (n, true));
        let bad = |from: u64| (0..4).map(move |n| (from + n, false));
        assert_eq!(enough(good.clone().chain(bad(1_000))), None, "four of a thousand");
        let mixed = |from: u64| (0..12).map(move |n| (from + n * 3, n % 3 == 0));
        assert_eq!(enough(good.clone().chain(mixed(1_001))), None, "eight of a thousand");
        assert!(enough(good.chain(mixed(2_001))).is_some(), "eight of twelve");
    }

    #[test]
    fn a_clock_that_goes_back_is_no_reason() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut breaker = Breaker::new(start);
        breaker.succeeded(start + Duration::from_secs(5));
        for _ in 0..4 {
            assert!(!breaker.failed(start - Duration::from_secs(1)));
        }
        assert!(breaker.failed(start));
    }
}
