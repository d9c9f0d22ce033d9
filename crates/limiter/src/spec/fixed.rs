//! fixed_window: one count per window of the wall clock. Worst trailing window: 2L.

use super::{Rate, Reading, raise};
use crate::clock::Millis;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fixed {
    window: u64,
    used: u64,
}

impl Fixed {
    #[cfg(feature = "redis")]
    pub(super) fn at(window: u64, used: u64) -> Fixed {
        Fixed { window, used }
    }

    pub(super) fn window(self) -> u64 {
        self.window
    }

    #[inline]
    pub(super) fn roll(&mut self, rate: &Rate, at: Millis) {
        if rate.into(self.window, at).is_none() {
            *self = self.rolled(rate, at);
        }
    }

    /// At the window of `at`: what was used in an earlier one is forgotten.
    #[inline(never)]
    pub(super) fn rolled(self, rate: &Rate, at: Millis) -> Fixed {
        if rate.into(self.window, at).is_some() {
            return self;
        }
        let window = rate.index(at);
        if window > self.window { Fixed { window, used: 0 } } else { self }
    }

    pub(super) fn redate(&mut self, rate: &Rate, now: Millis) {
        self.window = rate.index(now);
    }

    #[inline]
    pub(super) fn fits(self, rate: &Rate, amount: u64) -> bool {
        self.used.saturating_add(amount) <= rate.capacity
    }

    #[inline]
    pub(super) fn reading(self, rate: &Rate, now: Millis) -> Reading {
        Reading {
            used: self.used,
            remaining: rate.capacity.saturating_sub(self.used),
            reset: if self.used > 0 { rate.end(self.window) - now } else { Millis::ZERO },
        }
    }

    #[inline]
    pub(super) fn add(&mut self, amount: u64) {
        self.used += amount;
    }

    pub(super) fn add_late(&mut self, rate: &Rate, amount: u64) -> u64 {
        raise(&mut self.used, amount, rate.stop())
    }

    /// Into the window it was charged in, if that is still running.
    pub(super) fn give_back(&mut self, window: u64, amount: u64) -> u64 {
        let returned = if window == self.window { amount.min(self.used) } else { 0 };
        self.used -= returned;
        returned
    }

    #[cfg(feature = "persist")]
    pub(super) fn saved(self) -> [u64; 2] {
        [self.window, self.used]
    }

    #[cfg(feature = "persist")]
    pub(super) fn restored(numbers: &[u64]) -> Option<Fixed> {
        let &[window, used] = numbers else { return None };
        Some(Fixed { window, used })
    }
}
