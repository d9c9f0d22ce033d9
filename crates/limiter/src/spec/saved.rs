//! States as plain numbers, to be kept over a restart.

use super::bucket::Bucket;
use super::fixed::Fixed;
use super::moving::Moving;
use super::sliding::Sliding;
use super::{Level, Rate, State};
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
        if numbers.iter().any(|number| *number > NUMBER_MAX) {
            return None;
        }
        let level = match rate.algorithm {
            Algorithm::FixedWindow => Level::Fixed(Fixed::restored(rest)?),
            Algorithm::SlidingWindow => Level::Sliding(Sliding::restored(rest)?),
            Algorithm::MovingWindow => Level::Moving(Moving::restored(rest)?),
            Algorithm::TokenBucket => Level::Bucket(Bucket::restored(rate, rest)?),
            Algorithm::Concurrency => return None,
        };
        Some(State { life, generation: 0, at: Millis(*at), level })
    }
}
