//! The definition: what every algorithm means, in whole numbers, with time as an argument.
//!
//! A [`State`] is what one counter remembers. `redate` first; then `fits`, `wait` and `reading` ask, `charge` takes,
//! `correct` settles. Nothing here reads a clock, and asking never changes anything.
//!
//! Every state stores `at`, the store's time of its last write. A clock behind `at` counts as `at`, so that going back
//! never mints quota. A state dated more than one window ahead of the clock is re-dated to the clock with its level
//! kept, so that one forward excursion does not freeze it.

use crate::clock::Millis;
use crate::quota::Algorithm;

mod bucket;
mod calendar;
mod fixed;
#[cfg(feature = "redis")]
mod form;
mod leases;
mod moving;
mod rate;
#[cfg(feature = "persist")]
mod saved;
mod sliding;

use bucket::Bucket;
use fixed::Fixed;
use leases::{Leases, Member};
use moving::Moving;
pub use rate::Rate;
use sliding::Sliding;

/// How long a call in flight counts after it was last heard of. A holder renews its lease well within that.
pub const LEASE: Millis = Millis::from_secs(30);

/// The year 10889. A time beyond it is none, and no product of windows overflows before: so much is asked of states that
/// were kept elsewhere.
#[cfg(any(feature = "redis", feature = "persist"))]
const TIME_MAX: Millis = Millis(1 << 48);

/// When an amount fits. Ordered: the later, the greater; never is greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Retry {
    /// It fits now.
    Now,
    /// It fits after this long if nobody else comes, and not one tick earlier.
    After(Millis),
    /// It never fits: it is more than the limit's capacity.
    Never,
}

/// What a counter says at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Units in use, rounded up. More than the capacity after a late settlement.
    pub used: u64,
    /// Units that could be taken at once.
    pub remaining: u64,
    /// How long until nothing is in use.
    pub reset: Millis,
}

/// What `charge` took, and from where: kept until it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    life: u64,
    generation: u64,
    amount: u64,
    at: Millis,
    /// Bucket: D, the debt right after the take, and R, what had been refunded by then.
    debt: u64,
    refunded: u64,
    /// Concurrency: the number of the lease.
    lease: u64,
}

impl Receipt {
    /// Of so much of it.
    #[cfg(feature = "redis")]
    pub(crate) fn of(self, amount: u64) -> Receipt {
        Receipt { amount, ..self }
    }

    /// How much was taken, as far as it was not given back.
    #[cfg(feature = "redis")]
    pub(crate) fn amount(&self) -> u64 {
        self.amount
    }

    fn member(&self) -> Member {
        Member { life: self.life, number: self.lease }
    }
}

/// What a settlement did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Correction {
    /// Units charged on top of the estimate.
    pub charged: u64,
    /// Units given back.
    pub returned: u64,
    /// Units used on top of the estimate but not charged, because debt has a bound.
    pub forgiven: u64,
}

/// What one counter remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Told apart from every earlier state of the same counter.
    life: u64,
    /// Changes when what was taken before can no longer be given back.
    generation: u64,
    /// The store's time of the last write; of a bucket, in whole ticks.
    at: Millis,
    level: Level,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    Fixed(Fixed),
    Sliding(Sliding),
    Moving(Moving),
    Bucket(Bucket),
    Leases(Leases),
}

impl State {
    /// Nothing used. `life` must differ from that of every state this counter had before.
    pub fn new(rate: &Rate, life: u64) -> State {
        let level = match rate.algorithm {
            Algorithm::FixedWindow => Level::Fixed(Fixed::default()),
            Algorithm::SlidingWindow => Level::Sliding(Sliding::default()),
            Algorithm::MovingWindow => Level::Moving(Moving::default()),
            Algorithm::TokenBucket => Level::Bucket(Bucket::new(rate)),
            Algorithm::Concurrency => Level::Leases(Leases::default()),
        };
        State { life, generation: 0, at: Millis::ZERO, level }
    }

    /// What it is told apart by from every earlier state of the same counter.
    #[cfg(feature = "redis")]
    pub(crate) fn life(&self) -> u64 {
        self.life
    }

    /// For what was charged by the last write, unconditionally.
    #[cfg(feature = "redis")]
    pub(crate) fn receipt(&self, amount: u64) -> Receipt {
        let (debt, refunded) = match &self.level {
            Level::Bucket(bucket) => bucket.owed(),
            _ => (0, 0),
        };
        let (life, generation, at) = (self.life, self.generation, self.at);
        Receipt { life, generation, amount, at, debt, refunded, lease: 0 }
    }

    /// Whether it is dated more than one window ahead of the clock.
    #[inline]
    pub fn is_ahead(&self, rate: &Rate, now: Millis) -> bool {
        self.at > now + Millis(rate.length_ms)
    }

    /// Brings a state from more than one window ahead back to the clock, its level kept. The one write that may come
    /// with a denial. Says whether it was one.
    #[inline]
    pub fn redate(&mut self, rate: &Rate, now: Millis) -> bool {
        let ahead = self.at > now && self.is_ahead(rate, now);
        if ahead {
            self.date_back(rate, now);
        }
        ahead
    }

    #[cold]
    fn date_back(&mut self, rate: &Rate, now: Millis) {
        match &mut self.level {
            Level::Fixed(fixed) => fixed.redate(rate, now),
            Level::Sliding(sliding) => sliding.redate(rate, self.at, now),
            Level::Moving(moving) => moving.redate(rate, self.at, now),
            Level::Leases(leases) => leases.redate(rate, self.at, now),
            Level::Bucket(_) => {}
        }
        self.at = match self.level {
            Level::Bucket(bucket) => bucket.grid(now),
            _ => now,
        };
        self.generation += 1;
    }

    /// Whether `amount` can be taken.
    #[inline]
    pub fn fits(&self, rate: &Rate, now: Millis, amount: u64) -> bool {
        self.fits_even_now(rate, amount) || self.fits_by(rate, now, amount)
    }

    /// Whether `amount` could be taken even if no time had passed since the last write: time only ever makes room. The
    /// usual case, and no arithmetic on time.
    #[inline]
    fn fits_even_now(&self, rate: &Rate, amount: u64) -> bool {
        match &self.level {
            Level::Fixed(fixed) => fixed.fits(rate, amount),
            Level::Sliding(sliding) => sliding.fits_whole(rate, amount),
            Level::Bucket(bucket) => bucket.fits_undrained(rate, amount),
            Level::Moving(_) | Level::Leases(_) => false,
        }
    }

    #[inline(never)]
    fn fits_by(&self, rate: &Rate, now: Millis, amount: u64) -> bool {
        let at = self.at.max(now);
        match &self.level {
            Level::Fixed(fixed) => fixed.rolled(rate, at).fits(rate, amount),
            Level::Sliding(sliding) => sliding.rolled(rate, at).fits(rate, at, amount),
            Level::Moving(moving) => moving.fits(rate, at, amount),
            Level::Bucket(bucket) => bucket.drained(rate, self.at, now).fits(rate, amount),
            Level::Leases(leases) => leases.fits(rate, at, amount),
        }
    }

    /// When `amount` can be taken.
    pub fn wait(&self, rate: &Rate, now: Millis, amount: u64) -> Retry {
        if amount > rate.at_once() {
            return Retry::Never;
        }
        if self.fits(rate, now, amount) {
            return Retry::Now;
        }
        let at = self.at.max(now);
        Retry::After(match &self.level {
            Level::Fixed(fixed) => rate.end(fixed.rolled(rate, at).window()) - now,
            Level::Sliding(sliding) => sliding.rolled(rate, at).wait(rate, at, now, amount),
            Level::Moving(moving) => moving.wait(rate, at, now, amount),
            Level::Bucket(bucket) => bucket.drained(rate, self.at, now).wait(rate, now, amount),
            Level::Leases(leases) => leases.wait(),
        })
    }

    /// What is in use and what is left.
    #[inline]
    pub fn reading(&self, rate: &Rate, now: Millis) -> Reading {
        let at = self.at.max(now);
        match &self.level {
            Level::Fixed(fixed) => fixed.rolled(rate, at).reading(rate, now),
            Level::Sliding(sliding) => sliding.rolled(rate, at).reading(rate, at, now),
            Level::Moving(moving) => moving.reading(rate, at, now),
            Level::Bucket(bucket) => bucket.drained(rate, self.at, now).reading(rate, now),
            Level::Leases(leases) => leases.reading(rate, at, now),
        }
    }

    /// Takes `amount`, which fits.
    pub fn charge(&mut self, rate: &Rate, now: Millis, amount: u64) -> Receipt {
        let (debt, refunded, lease) = self.take(rate, now, amount);
        Receipt { life: self.life, generation: self.generation, amount, at: self.at, debt, refunded, lease }
    }

    /// The same for good, without a receipt.
    #[inline]
    pub fn spend(&mut self, rate: &Rate, now: Millis, amount: u64) {
        self.take(rate, now, amount);
    }

    /// D, R and the number of the lease, for the receipt.
    #[inline(always)]
    fn take(&mut self, rate: &Rate, now: Millis, amount: u64) -> (u64, u64, u64) {
        let (mut debt, mut refunded, mut lease) = (0, 0, 0);
        let at = self.at.max(now);
        match &mut self.level {
            Level::Fixed(fixed) => {
                fixed.roll(rate, at);
                fixed.add(amount);
                self.at = at;
            }
            Level::Sliding(sliding) => {
                sliding.roll(rate, at);
                sliding.add(amount);
                self.at = at;
            }
            Level::Moving(moving) => {
                moving.take(rate, at, amount);
                self.at = at;
            }
            Level::Bucket(bucket) => {
                let drained = bucket.drained(rate, self.at, now);
                bucket.set(rate, drained);
                (debt, refunded) = bucket.add(rate, amount);
                self.generation += u64::from(drained.renewed);
                self.at = drained.at;
            }
            Level::Leases(leases) => {
                lease = leases.take(rate, at, self.life, amount);
                self.at = at;
            }
        }
        (debt, refunded, lease)
    }

    /// Replaces what `receipt` took by `actual`. More is charged now, unconditionally, up to a bound; less is given
    /// back only into what it was taken from, and never after a `clear`. A call in flight is over, whatever `actual`.
    pub fn correct(&mut self, rate: &Rate, now: Millis, receipt: &Receipt, actual: u64) -> Correction {
        // A bucket is settled at the terms it was last charged at: settling does not bring back those of a limit
        // that was changed since.
        let rate = &match self.level {
            Level::Bucket(bucket) => bucket.terms(rate),
            _ => *rate,
        };
        self.refresh(rate, now);
        if let Level::Leases(leases) = &mut self.level {
            return Correction { returned: leases.release(receipt.member()), ..Correction::default() };
        }
        let clamped = actual.min(rate.stop());
        if let Some(more) = actual.checked_sub(receipt.amount).filter(|more| *more > 0) {
            let charged = match &mut self.level {
                Level::Fixed(fixed) => fixed.add_late(rate, clamped.saturating_sub(receipt.amount)),
                Level::Sliding(sliding) => sliding.add_late(rate, clamped.saturating_sub(receipt.amount)),
                Level::Moving(moving) => {
                    moving.add_late(rate, self.at, clamped.saturating_sub(receipt.amount))
                }
                Level::Bucket(bucket) => bucket.add_late(rate, clamped.saturating_sub(receipt.amount)),
                Level::Leases(_) => 0,
            };
            return Correction { charged, forgiven: more - charged, returned: 0 };
        }
        if (self.life, self.generation) != (receipt.life, receipt.generation) {
            return Correction::default();
        }
        let less = receipt.amount - actual;
        let returned = match &mut self.level {
            Level::Fixed(fixed) => fixed.give_back(rate.index(receipt.at), less),
            Level::Sliding(sliding) => sliding.give_back(rate.index(receipt.at), less),
            Level::Moving(moving) => moving.give_back(rate, self.at, receipt.at, less),
            Level::Bucket(bucket) => bucket.give_back(rate, self.at, receipt, less),
            Level::Leases(_) => 0,
        };
        Correction { returned, ..Correction::default() }
    }

    /// The call of `receipt` still runs: its lease starts anew, even if it had run out. Nothing for other algorithms.
    pub fn renew(&mut self, rate: &Rate, now: Millis, receipt: &Receipt) {
        self.refresh(rate, now);
        if let Level::Leases(leases) = &mut self.level {
            leases.renew(rate, self.at, receipt.member(), receipt.amount);
        }
    }

    /// Lets the time pass that has passed, before a write.
    fn refresh(&mut self, rate: &Rate, now: Millis) {
        let at = self.at.max(now);
        match &mut self.level {
            Level::Fixed(fixed) => fixed.roll(rate, at),
            Level::Sliding(sliding) => sliding.roll(rate, at),
            Level::Moving(moving) => moving.forget(rate, at),
            Level::Leases(leases) => leases.forget(at),
            Level::Bucket(bucket) => {
                let drained = bucket.drained(rate, self.at, now);
                self.generation += u64::from(drained.renewed);
                bucket.set(rate, drained);
                self.at = drained.at;
                return;
            }
        }
        self.at = at;
    }
}

/// `min(x + d, stop)`, but never lower than `x`: raises `level` and returns by how much.
fn raise(level: &mut u64, by: u64, stop: u64) -> u64 {
    let raised = level.saturating_add(by).min(stop).max(*level);
    let added = raised - *level;
    *level = raised;
    added
}

#[cfg(test)]
mod tests;
