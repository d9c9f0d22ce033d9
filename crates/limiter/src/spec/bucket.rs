//! token_bucket: GCRA as a whole-number debt. One unit weighs W ticks; L of debt drain per tick; a bucket of B units
//! holds C = B·W. Exact at any rate, where an emission interval in whole ticks is not. Worst trailing window: B + L.
//!
//! The scale depends on W alone, not on L: a raised or lowered limit reads the same debt.

use super::Reading;
use super::{Rate, Receipt, raise};
use crate::clock::Millis;

/// Beyond this the sum of refunds starts anew.
const REFUNDED_MAX: u64 = 1 << 52;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    debt: u64,
    /// R: debt given back since this generation began.
    refunded: u64,
    /// L, B and the tick at the last charge.
    capacity: u64,
    burst: u64,
    tick: u64,
}

/// What a bucket comes to after the time that has passed.
#[derive(Clone, Copy)]
pub(super) struct Drained {
    pub(super) debt: u64,
    pub(super) at: Millis,
    /// What was taken before can no longer be given back: a new generation.
    pub(super) renewed: bool,
}

impl Bucket {
    pub(super) fn new(rate: &Rate) -> Bucket {
        Bucket { debt: 0, refunded: 0, capacity: rate.capacity, burst: rate.burst, tick: rate.tick }
    }

    #[cfg(feature = "redis")]
    pub(super) fn at(debt: u64, refunded: u64, capacity: u64, burst: u64, tick: u64) -> Bucket {
        Bucket { debt, refunded, capacity, burst, tick }
    }

    /// D and R, for a receipt.
    #[cfg(feature = "redis")]
    pub(super) fn owed(self) -> (u64, u64) {
        (self.debt, self.refunded)
    }

    /// The rate as it was at the last charge.
    pub(super) fn terms(self, rate: &Rate) -> Rate {
        let length = rate.length_ms / self.tick;
        let rate = Rate { capacity: self.capacity, burst: self.burst, tick: self.tick, length, ..*rate };
        rate.with_products()
    }

    /// `at` in whole ticks.
    pub(super) fn grid(self, at: Millis) -> Millis {
        Millis(at.get() / self.tick * self.tick)
    }

    #[inline]
    pub(super) fn drained(&self, rate: &Rate, at: Millis, now: Millis) -> Drained {
        let changed = (self.capacity, self.burst, self.tick) != (rate.capacity, rate.burst, rate.tick);
        let (debt, at) = if changed { self.converted(rate, at) } else { (self.debt, at) };
        // `at` is on the grid of ticks, so whole ticks later is, too. The usual tick is 1, and a division is not free.
        let passed = (now - at).get();
        let (ticks, passed) = match rate.tick {
            1 => (passed, passed),
            tick => (passed / tick, passed / tick * tick),
        };
        let reached = at + Millis(passed);
        let debt = debt.min(rate.full).saturating_sub(ticks.saturating_mul(rate.capacity));
        Drained { debt, at: reached, renewed: debt == 0 || changed || self.refunded >= REFUNDED_MAX }
    }

    /// Whether it fits even if nothing drained since the last write.
    #[inline]
    pub(super) fn fits_undrained(&self, rate: &Rate, amount: u64) -> bool {
        self.tick == rate.tick && amount <= rate.burst && self.debt + amount * rate.length <= rate.size
    }

    /// As drained.
    #[inline]
    pub(super) fn set(&mut self, rate: &Rate, drained: Drained) {
        self.debt = drained.debt;
        if drained.renewed {
            *self = Bucket { debt: drained.debt, ..Bucket::new(rate) };
        }
    }

    /// Takes, and returns D and R for the receipt.
    #[inline]
    pub(super) fn add(&mut self, rate: &Rate, amount: u64) -> (u64, u64) {
        self.debt += amount * rate.length;
        (self.debt, self.refunded)
    }

    /// Charges unconditionally, up to B + L of debt. Returns whole units.
    pub(super) fn add_late(&mut self, rate: &Rate, amount: u64) -> u64 {
        raise(&mut self.debt, amount * rate.length, rate.full).div_ceil(rate.length)
    }

    /// At most what is still owed of the debt at the take: giving back more would forgive debt of others.
    pub(super) fn give_back(&mut self, rate: &Rate, at: Millis, receipt: &Receipt, amount: u64) -> u64 {
        let ticks = (at - receipt.at).get() / rate.tick;
        let drained = ticks.min(receipt.debt.div_ceil(rate.capacity)) * rate.capacity;
        let refunded = self.refunded.saturating_sub(receipt.refunded);
        let owed = receipt.debt.saturating_sub(drained).saturating_sub(refunded);
        let returned = (amount * rate.length).min(owed).min(self.debt);
        self.debt -= returned;
        self.refunded += returned;
        returned / rate.length
    }

    /// In the ticks of `rate`: the debt by the power of ten, rounded up; `at` never earlier than it was.
    #[cold]
    fn converted(&self, rate: &Rate, at: Millis) -> (u64, Millis) {
        if rate.tick > self.tick {
            let debt = self.debt.div_ceil(rate.tick / self.tick);
            return (debt, Millis(at.get().next_multiple_of(rate.tick)));
        }
        if rate.tick < self.tick {
            return (self.debt * (self.tick / rate.tick), at + Millis(self.tick));
        }
        (self.debt, at)
    }

    #[cfg(feature = "persist")]
    pub(super) fn saved(self) -> [u64; 4] {
        [self.debt, self.capacity, self.burst, self.tick]
    }

    /// Only on terms that pass the gate.
    #[cfg(feature = "persist")]
    pub(super) fn restored(rate: &Rate, numbers: &[u64]) -> Option<Bucket> {
        let &[debt, capacity, burst, tick] = numbers else { return None };
        if !matches!(tick, 1 | 10 | 100 | 1_000) || capacity == 0 || burst == 0 {
            return None;
        }
        let product = u128::from(capacity.max(burst)) * u128::from(rate.length_ms / tick);
        (product <= u128::from(super::saved::NUMBER_MAX)).then_some(Bucket {
            debt,
            refunded: 0,
            capacity,
            burst,
            tick,
        })
    }
}

impl Drained {
    #[inline]
    pub(super) fn fits(self, rate: &Rate, amount: u64) -> bool {
        amount <= rate.burst && self.debt + amount * rate.length <= rate.size
    }

    pub(super) fn wait(self, rate: &Rate, now: Millis, amount: u64) -> Millis {
        let over = self.debt + amount * rate.length - rate.size;
        rate.wait(self.at, over.div_ceil(rate.capacity), now)
    }

    #[inline]
    pub(super) fn reading(self, rate: &Rate, now: Millis) -> Reading {
        Reading {
            used: self.debt.div_ceil(rate.length),
            remaining: rate.size.saturating_sub(self.debt) / rate.length,
            reset: match self.debt {
                0 => Millis::ZERO,
                debt => rate.wait(self.at, debt.div_ceil(rate.capacity), now),
            },
        }
    }
}
