//! Money, counted exactly.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

/// 10⁻¹² of the unit of money in one micro-unit, which is what [`Unit::Cost`](super::Unit::Cost) counts.
const PICO_PER_MICRO: u128 = 1_000_000;

/// What a request costs: summed exactly in 10⁻¹² of the unit of money, rounded once, when all of it is known. Prices of
/// fractions of a cent per million lose nothing on the way. What is too much for any account stays the largest there is.
///
/// ```
/// use tollgate_limiter::Cost;
///
/// // 0.15 a million units is 150,000 · 10⁻¹² for one.
/// let prompt = Cost::of(1_000, 150_000);
/// let answer = Cost::of(500, 600_000);
/// assert_eq!((prompt + answer).micros(), 450);
/// assert_eq!(Cost::of(1, 150_000).micros(), 1, "rounded up");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cost(u128);

impl Cost {
    /// Nothing.
    pub const ZERO: Cost = Cost(0);

    /// `amount` of something at `price` for each, in 10⁻¹² of the unit of money.
    pub const fn of(amount: u64, price: u64) -> Cost {
        Cost(amount as u128 * price as u128)
    }

    /// In micro-units, rounded up: what is charged to a limit.
    pub const fn micros(self) -> u64 {
        let micros = self.0.div_ceil(PICO_PER_MICRO);
        if micros > u64::MAX as u128 { u64::MAX } else { micros as u64 }
    }
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost(self.0.saturating_add(other.0))
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::ZERO, Add::add)
    }
}

/// Rounded up to a micro-unit: `$0.00045`.
impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::money(self.micros()))
    }
}

#[cfg(test)]
mod tests {
    use super::Cost;

    #[test]
    fn summed_exactly_and_rounded_up_once() {
        let third = Cost::of(1, 333_333);
        assert_eq!([third; 3].into_iter().sum::<Cost>().micros(), 1);
        assert_eq!((third + third + third + Cost::of(1, 1)).micros(), 1);
        assert_eq!((third + third + third + Cost::of(1, 2)).micros(), 2);
        assert_eq!(Cost::ZERO.micros(), 0);
        assert_eq!(Cost::of(1_000_000, 150_000).to_string(), "$0.15");
    }

    #[test]
    fn the_absurd_is_the_largest_there_is() {
        let all = Cost::of(u64::MAX, u64::MAX);
        assert_eq!((all + all).micros(), u64::MAX);
    }
}
