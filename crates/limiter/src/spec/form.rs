//! Rates, states and receipts as plain numbers, for a store that keeps them elsewhere.

use super::{Bucket, Fixed, Leases, Level, Moving, Rate, Receipt, Sliding, State, TIME_MAX};
use crate::clock::Millis;
use crate::quota::{Algorithm, Span};

/// No number of a state is larger: twice a count, or a debt, stays exact in a double.
const NUMBER_MAX: u64 = 1 << 53;
/// The gate of a rate: the largest product of an amount and a window.
const EXACT: u128 = 1 << 52;

impl Rate {
    /// Algorithm, L, B, u, W in milliseconds, offset of windows, and 1 for calendar months.
    pub(crate) fn numbers(&self) -> [u64; 7] {
        let algorithm = match self.algorithm {
            Algorithm::FixedWindow => 0,
            Algorithm::SlidingWindow => 1,
            Algorithm::MovingWindow => 2,
            Algorithm::TokenBucket => 3,
            Algorithm::Concurrency => 4,
        };
        let calendar = u64::from(self.window.span() == Span::Month);
        [algorithm, self.capacity, self.burst, self.tick, self.length_ms, self.offset_ms, calendar]
    }
}

impl Receipt {
    /// Life, generation, amount, time, debt, refunded, lease.
    pub(crate) fn numbers(&self) -> [u64; 7] {
        [self.life, self.generation, self.amount, self.at.get(), self.debt, self.refunded, self.lease]
    }
}

impl State {
    /// Reads life, generation, time, and what the algorithm keeps; of leases, the last number, their sum, and when the
    /// last of them ends. `None`: this is no state of that rate.
    pub(crate) fn from_numbers(rate: &Rate, numbers: &[u64]) -> Option<State> {
        let [life, generation, at, rest @ ..] = numbers else {
            return None;
        };
        if numbers.iter().any(|number| *number > NUMBER_MAX) || *at > TIME_MAX.get() {
            return None;
        }
        let in_time = |window: u64| window <= rate.index(TIME_MAX);
        let level = match (rate.algorithm, rest) {
            (Algorithm::FixedWindow, &[window, used]) if in_time(window) => {
                Level::Fixed(Fixed::at(window, used))
            }
            (Algorithm::SlidingWindow, &[window, used, previous]) if in_time(window) => {
                Level::Sliding(Sliding::at(window, used, previous))
            }
            (Algorithm::MovingWindow, log) => {
                let log = Moving::of(log)?;
                log.log.iter().all(|entry| entry.time <= TIME_MAX.get()).then_some(Level::Moving(log))?
            }
            (Algorithm::TokenBucket, &[debt, refunded, capacity, burst, tick]) => {
                let known = [1, 10, 100, 1_000].contains(&tick) && capacity > 0 && burst > 0;
                if !known || u128::from(capacity.max(burst)) * u128::from(rate.length_ms / tick) >= EXACT {
                    return None;
                }
                Level::Bucket(Bucket::at(debt, refunded, capacity, burst, tick))
            }
            (Algorithm::Concurrency, &[last, used, latest]) if latest <= TIME_MAX.get() => {
                Level::Leases(Leases::in_sum(last, used, Millis(latest)))
            }
            _ => return None,
        };
        Some(State { life: *life, generation: *generation, at: Millis(*at), level })
    }
}

#[cfg(test)]
mod tests {
    use super::{State, TIME_MAX};
    use crate::clock::Millis;
    use crate::quota::{Algorithm, Quota};
    use crate::spec::Rate;

    /// Whatever stands in a store elsewhere is no state, or one that can be worked with.
    #[test]
    fn nonsense_breaks_nothing() {
        let now = Millis(1_794_614_400_000);
        let numbers =
            [0, 1, 7, 1_000, now.get(), 1 << 32, TIME_MAX.get(), TIME_MAX.get() + 1, 1 << 53, u64::MAX];
        let mut read = 0;
        for algorithm in Algorithm::ALL.into_iter().chain([Algorithm::Concurrency]) {
            for quota in ["5/second", "60/minute", "1000000000/day", "9/366 days", "3/week", "3/month"] {
                let quota: Quota = quota.parse().unwrap();
                let rate = Rate::new(&quota, quota.window().unwrap(), algorithm).unwrap();
                for seed in 0..20_000_usize {
                    let length = seed % 10;
                    let pick =
                        |place: usize| numbers[(seed / 10 + seed * (place * place + 3) / 7) % numbers.len()];
                    let numbers: Vec<u64> = (0..length).map(pick).collect();
                    let Some(mut state) = State::from_numbers(&rate, &numbers) else {
                        continue;
                    };
                    read += 1;
                    state.wait(&rate, now, 1);
                    state.reading(&rate, now);
                    state.redate(&rate, now);
                    state.reading(&rate, now);
                    let receipt = State::new(&rate, 7).charge(&rate, now, 1);
                    state.correct(&rate, now, &receipt, numbers[0] % 100);
                    if state.fits(&rate, now, 1) {
                        let receipt = state.charge(&rate, now, 1);
                        state.correct(&rate, now, &receipt, 0);
                    }
                }
            }
        }
        assert!(read > 1_000, "{read}");
    }
}
