//! What a limit promises, as the numbers the definition works with.

use super::calendar;
use crate::clock::Millis;
use crate::quota::{Algorithm, Quota, Span, Window};

/// From the epoch, a Thursday, to the first Monday.
const FIRST_MONDAY_MS: u64 = 4 * 86_400_000;

/// A quota and an algorithm, as the numbers the definition works with. One that exists passed the gate: no product
/// of an amount and a time overflows what is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub(super) algorithm: Algorithm,
    pub(super) window: Window,
    /// L: units per window.
    pub(super) capacity: u64,
    /// B: the size of the bucket; L for the others.
    pub(super) burst: u64,
    /// u: milliseconds in one unit of time.
    pub(super) tick: u64,
    /// W in milliseconds; 31 days for a calendar month.
    pub(super) length_ms: u64,
    /// W in ticks.
    pub(super) length: u64,
    /// Added to a time before it is divided into windows.
    pub(super) offset_ms: u64,
    /// Bucket: B·W, what it holds; and (B + L)·W, the most debt there is.
    pub(super) size: u64,
    pub(super) full: u64,
}

impl Rate {
    /// `None`: no unit of time lets this algorithm count this quota exactly.
    pub(crate) fn new(quota: &Quota, window: Window, algorithm: Algorithm) -> Option<Rate> {
        let length_ms = window.longest().get();
        let tick = quota.resolution(algorithm)?;
        let rate = Rate {
            algorithm,
            window,
            capacity: quota.amount(),
            burst: quota.burst().unwrap_or(quota.amount()),
            tick,
            length_ms,
            length: length_ms / tick,
            offset_ms: if window.span() == Span::Week { length_ms - FIRST_MONDAY_MS } else { 0 },
            size: 0,
            full: 0,
        };
        Some(rate.with_products())
    }

    /// Multiplied once. Only a bucket asks for these, and of one the gate knows that they are exact.
    pub(super) fn with_products(self) -> Rate {
        let size = self.burst.saturating_mul(self.length);
        let full = self.burst.saturating_add(self.capacity).saturating_mul(self.length);
        Rate { size, full, ..self }
    }

    /// How it is counted.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// How long it lasts.
    pub const fn window(&self) -> Window {
        self.window
    }

    /// Milliseconds in one unit of time: waits are whole numbers of it.
    pub const fn tick(&self) -> Millis {
        Millis(self.tick)
    }

    /// The most that can be taken at once.
    pub const fn at_once(&self) -> u64 {
        self.burst
    }

    /// Where unconditional charges stop, and amounts are clamped.
    pub(super) fn stop(&self) -> u64 {
        2 * self.capacity.max(self.burst)
    }

    /// How far `at` is into window `index`, if that contains it: known without a division.
    #[inline]
    pub(super) fn into(&self, index: u64, at: Millis) -> Option<u64> {
        let start = index.wrapping_mul(self.length_ms).wrapping_sub(self.offset_ms);
        let into = at.get().wrapping_sub(start);
        (into < self.length_ms && self.window.span() != Span::Month).then_some(into)
    }

    /// The number of the window that contains `at`.
    #[inline]
    pub(super) fn index(&self, at: Millis) -> u64 {
        match self.window.span() {
            Span::Month => calendar::month_of(at),
            _ => (at.get() + self.offset_ms) / self.length_ms,
        }
    }

    /// The first moment after window `index`.
    #[inline]
    pub(super) fn end(&self, index: u64) -> Millis {
        match self.window.span() {
            Span::Month => calendar::start_of_month(index + 1),
            _ => Millis((index + 1) * self.length_ms - self.offset_ms),
        }
    }

    /// How far `at` is into its window, in whole ticks.
    #[inline]
    pub(super) fn elapsed(&self, at: Millis) -> u64 {
        (at.get() + self.offset_ms) % self.length_ms / self.tick
    }

    /// Milliseconds from `now` to `ticks` after `at`.
    #[inline]
    pub(super) fn wait(&self, at: Millis, ticks: u64, now: Millis) -> Millis {
        Millis((at.get() / self.tick + ticks) * self.tick) - now
    }
}
