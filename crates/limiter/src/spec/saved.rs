//! States as plain numbers, to be kept over a restart.

use super::bucket::Bucket;
use super::fixed::Fixed;
use super::moving::Moving;
use super::sliding::Sliding;
use super::{Level, Rate, State, TIME_MAX};
use crate::clock::Millis;
use crate::quota::Algorithm;

/// No number of a state is larger: twice a count, or a debt.
pub(super) const NUMBER_MAX: u64 = 1 << 53;

impl State {
    /// The time, and what the algorithm keeps. `None`: calls in flight, which end with their process.
    pub(crate) fn saved(&self) -> Option<Vec<u64>> {
        let mut numbers = vec![self.at.get()];
        match &self.level {
            Level::Fixed(fixed) => numbers.extend(fixed.saved()),
            Level::Sliding(sliding) => numbers.extend(sliding.saved()),
            Level::Moving(moving) => numbers.extend(moving.saved()),
            Level::Bucket(bucket) => numbers.extend(bucket.saved()),
            Level::Leases(_) => return None,
        }
        Some(numbers)
    }

    /// The state of these numbers; what was taken before cannot be given back. `None`: this is no state of that rate.
    pub(crate) fn restored(rate: &Rate, life: u64, numbers: &[u64]) -> Option<State> {
        let (at, rest) = numbers.split_first()?;
        if numbers.iter().any(|number| *number > NUMBER_MAX) || *at > TIME_MAX.get() {
            return None;
        }
        let in_time = || rest.first().is_none_or(|window| *window <= rate.index(TIME_MAX));
        let level = match rate.algorithm {
            Algorithm::FixedWindow if in_time() => Level::Fixed(Fixed::restored(rest)?),
            Algorithm::SlidingWindow if in_time() => Level::Sliding(Sliding::restored(rest)?),
            Algorithm::FixedWindow | Algorithm::SlidingWindow => return None,
            Algorithm::MovingWindow => {
                let moving = Moving::restored(rest)?;
                moving
                    .log
                    .iter()
                    .all(|entry| entry.time <= TIME_MAX.get())
                    .then_some(Level::Moving(moving))?
            }
            Algorithm::TokenBucket => Level::Bucket(Bucket::restored(rate, rest)?),
            Algorithm::Concurrency => return None,
        };
        Some(State { life, generation: 0, at: Millis(*at), level })
    }
}

#[cfg(test)]
mod tests {
    use super::{NUMBER_MAX, State, TIME_MAX};
    use crate::clock::Millis;
    use crate::quota::{Algorithm, Quota};
    use crate::spec::Rate;

    /// What a file says is no state, or one that can be worked with.
    #[test]
    fn absurd_numbers_break_nothing() {
        let now = Millis(1_794_614_400_000);
        let numbers = [0, 1, 7, now.get(), TIME_MAX.get(), TIME_MAX.get() + 1, NUMBER_MAX, u64::MAX];
        let mut read = 0;
        for algorithm in Algorithm::ALL {
            for quota in ["5/second", "60/minute", "1000000000/day", "3/month"] {
                let quota: Quota = quota.parse().unwrap();
                let rate = Rate::new(&quota, quota.window().unwrap(), algorithm).unwrap();
                for seed in 0..4_000_usize {
                    let pick = |place: usize| numbers[(seed >> (3 * place)) % numbers.len()];
                    let numbers: Vec<u64> = (0..1 + seed % 5).map(pick).collect();
                    let Some(mut state) = State::restored(&rate, 7, &numbers) else { continue };
                    read += 1;
                    state.wait(&rate, now, 1);
                    state.reading(&rate, now);
                    state.redate(&rate, now);
                    state.reading(&rate, now);
                    if state.fits(&rate, now, 1) {
                        let receipt = state.charge(&rate, now, 1);
                        state.correct(&rate, now, &receipt, 0);
                    }
                }
            }
        }
        assert!(read > 1_000, "{read}");
        let minute: Quota = "60/minute".parse().unwrap();
        for (algorithm, counts) in [(Algorithm::FixedWindow, 1), (Algorithm::SlidingWindow, 2)] {
            let rate = Rate::new(&minute, minute.window().unwrap(), algorithm).unwrap();
            let state = |window| State::restored(&rate, 7, &[now.get(), window, 1, 1][..2 + counts]);
            assert!(state(rate.index(TIME_MAX)).is_some() && state(rate.index(TIME_MAX) + 1).is_none());
        }
    }
}
