//! sliding_window: this window's count, plus the previous one's weighted by how much of it a trailing window still
//! covers. With e ticks gone of W: level·W = previous·(W − e) + used·W, compared before any division.
//! Worst trailing window: just under 2L.

use super::{Rate, Reading, raise};
use crate::clock::Millis;

/// The largest whole number that every store counts exactly.
const COUNT_MAX: u64 = (1 << 53) - 1;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sliding {
    window: u64,
    used: u64,
    previous: u64,
}

impl Sliding {
    #[cfg(feature = "redis")]
    pub(super) fn at(window: u64, used: u64, previous: u64) -> Sliding {
        Sliding { window, used, previous }
    }

    #[inline]
    pub(super) fn roll(&mut self, rate: &Rate, at: Millis) {
        if rate.into(self.window, at).is_none() {
            *self = self.rolled(rate, at);
        }
    }

    /// At the window of `at`: rolling one keeps its count as the previous one, rolling more forgets both.
    #[inline(never)]
    pub(super) fn rolled(self, rate: &Rate, at: Millis) -> Sliding {
        if rate.into(self.window, at).is_some() {
            return self;
        }
        let window = rate.index(at);
        match window.saturating_sub(self.window) {
            0 => self,
            1 => Sliding { window, used: 0, previous: self.used },
            _ => Sliding { window, used: 0, previous: 0 },
        }
    }

    /// Both counts as one. The previous one counts no further than a settlement could have raised it, so that every
    /// store can multiply it exactly.
    pub(super) fn redate(&mut self, rate: &Rate, at: Millis, now: Millis) {
        let share = self.previous.min(rate.stop()) * (rate.length - rate.elapsed(at));
        let used = self.used.saturating_add(share.div_ceil(rate.length)).min(COUNT_MAX);
        *self = Sliding { window: rate.index(now), used, previous: 0 };
    }

    #[inline]
    pub(super) fn fits(self, rate: &Rate, at: Millis, amount: u64) -> bool {
        self.level(rate, at) + product(amount, rate.length) <= product(rate.capacity, rate.length)
    }

    /// Whether it fits even beside all of both counts.
    #[inline]
    pub(super) fn fits_whole(self, rate: &Rate, amount: u64) -> bool {
        self.used.saturating_add(self.previous).saturating_add(amount) <= rate.capacity
    }

    pub(super) fn wait(self, rate: &Rate, at: Millis, now: Millis, amount: u64) -> Millis {
        let (length, elapsed) = (rate.length, rate.elapsed(at));
        // Ticks of a window until `count` of the window before weighs no more than `room`.
        let shrunk = |count: u64, room: u64| {
            length - (product(room, length) / u128::from(count)).min(length.into()) as u64
        };
        let ticks = if self.used.saturating_add(amount) <= rate.capacity {
            shrunk(self.previous, rate.capacity - self.used - amount) - elapsed
        } else {
            length - elapsed + shrunk(self.used, rate.capacity - amount)
        };
        rate.wait(at, ticks, now)
    }

    pub(super) fn reading(self, rate: &Rate, at: Millis, now: Millis) -> Reading {
        let length = u128::from(rate.length);
        let level = self.level(rate, at);
        let left = product(rate.capacity, rate.length).saturating_sub(level);
        let rest = rate.length - rate.elapsed(at);
        Reading {
            used: level.div_ceil(length) as u64,
            remaining: (left / length) as u64,
            reset: match (self.used, self.previous) {
                (0, 0) => Millis::ZERO,
                (0, _) => rate.wait(at, rest, now),
                _ => rate.wait(at, rest + rate.length, now),
            },
        }
    }

    #[inline]
    pub(super) fn add(&mut self, amount: u64) {
        self.used += amount;
    }

    pub(super) fn add_late(&mut self, rate: &Rate, amount: u64) -> u64 {
        raise(&mut self.used, amount, rate.stop())
    }

    /// Into the window it was charged in, running or previous.
    pub(super) fn give_back(&mut self, window: u64, amount: u64) -> u64 {
        let count = match self.window.checked_sub(window) {
            Some(0) => &mut self.used,
            Some(1) => &mut self.previous,
            _ => return 0,
        };
        let returned = amount.min(*count);
        *count -= returned;
        returned
    }

    /// level·W.
    #[inline]
    fn level(self, rate: &Rate, at: Millis) -> u128 {
        product(self.previous, rate.length - rate.elapsed(at)) + product(self.used, rate.length)
    }

    #[cfg(feature = "persist")]
    pub(super) fn saved(self) -> [u64; 3] {
        [self.window, self.used, self.previous]
    }

    #[cfg(feature = "persist")]
    pub(super) fn restored(numbers: &[u64]) -> Option<Sliding> {
        let &[window, used, previous] = numbers else { return None };
        Some(Sliding { window, used, previous })
    }
}

/// A count kept from a larger limit may exceed what the gate knows of: 128 bits hold every case.
#[inline]
fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}
