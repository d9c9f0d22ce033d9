//! moving_window: a log of what was taken when; never more than L in any trailing window.
//!
//! The log is exact while it is short. Beyond that its entries are merged into slots of the window, each dated at its
//! slot's *end*: it is held longer, never shorter. So it stays short whatever the limit.

use super::{Rate, Reading, raise};
use crate::clock::Millis;

/// Entries up to which the log is exact.
const EXACT_ENTRIES: usize = 64;
/// Slots of a window: of a minute or less, and of a longer one.
const SLOTS_SHORT: u64 = 60;
const SLOTS_LONG: u64 = 96;
const SHORT_MS: u64 = 60_000;

/// Entries in order of time, one per time, none empty. Those whose window has passed are dead: they count for
/// nothing and are dropped by the next write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Moving {
    pub(super) log: Vec<Entry>,
    /// The sum of the log, the dead included.
    total: u64,
    /// Every entry is known to be dated at the end of a slot.
    merged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) time: u64,
    amount: u64,
}

impl Moving {
    /// From pairs of time and amount, in order of time. `None`: they are not.
    #[cfg(feature = "redis")]
    pub(super) fn of(pairs: &[u64]) -> Option<Moving> {
        let (pairs, []) = pairs.as_chunks::<2>() else {
            return None;
        };
        let log: Vec<Entry> = pairs.iter().map(|&[time, amount]| Entry { time, amount }).collect();
        let total = log.iter().try_fold(0_u64, |sum, entry| sum.checked_add(entry.amount))?;
        let ordered = log.is_sorted_by(|earlier, later| earlier.time < later.time);
        (ordered && total <= 1 << 53).then_some(Moving { log, total, merged: false })
    }

    pub(super) fn redate(&mut self, rate: &Rate, at: Millis, now: Millis) {
        let amount = self.level(rate, at);
        self.log.clear();
        if amount > 0 {
            self.log.push(Entry { time: now.get(), amount });
        }
    }

    pub(super) fn fits(&self, rate: &Rate, at: Millis, amount: u64) -> bool {
        self.level(rate, at).saturating_add(amount) <= rate.capacity
    }

    /// Until enough of the oldest entries have left. `amount` does not fit now, but is no more than L.
    pub(super) fn wait(&self, rate: &Rate, at: Millis, now: Millis, amount: u64) -> Millis {
        let mut level = self.level(rate, at);
        let mut until = at;
        for entry in self.live(rate, at) {
            if level.saturating_add(amount) <= rate.capacity {
                break;
            }
            level -= entry.amount;
            until = Millis(entry.time + rate.length_ms);
        }
        until - now
    }

    pub(super) fn reading(&self, rate: &Rate, at: Millis, now: Millis) -> Reading {
        let used = self.level(rate, at);
        let newest = self.live(rate, at).last();
        Reading {
            used,
            remaining: rate.capacity.saturating_sub(used),
            reset: newest.map_or(Millis::ZERO, |entry| Millis(entry.time + rate.length_ms) - now),
        }
    }

    /// Drops dead entries.
    pub(super) fn forget(&mut self, rate: &Rate, at: Millis) {
        let dead = self.dead(rate, at);
        let gone = self.log.drain(..dead);
        self.total -= gone.map(|entry| entry.amount).sum::<u64>();
    }

    /// After forgetting. Not inlined: the callers are short for the other algorithms, and this is long.
    #[inline(never)]
    pub(super) fn take(&mut self, rate: &Rate, at: Millis, amount: u64) {
        self.forget(rate, at);
        self.add(rate, at, amount);
    }

    pub(super) fn add(&mut self, rate: &Rate, at: Millis, amount: u64) {
        // A full log that is merged already: what merging it once more would come to.
        if self.merged && self.log.len() >= EXACT_ENTRIES {
            self.put(slot_end(rate, at.get()), amount);
            return;
        }
        self.put(at.get(), amount);
        self.merged = false;
        if self.log.len() > EXACT_ENTRIES {
            self.merge(rate);
        }
    }

    pub(super) fn add_late(&mut self, rate: &Rate, at: Millis, amount: u64) -> u64 {
        let mut level = self.level(rate, at);
        let charged = raise(&mut level, amount, rate.stop());
        self.add(rate, at, charged);
        charged
    }

    /// Into the entry of that moment, or the merged entry that took it in.
    pub(super) fn give_back(&mut self, rate: &Rate, at: Millis, taken: Millis, amount: u64) -> u64 {
        if at.get() >= taken.get() + rate.length_ms {
            return 0;
        }
        let find = |time: u64| self.log.binary_search_by_key(&time, |entry| entry.time);
        let Ok(place) = find(taken.get()).or_else(|_| find(slot_end(rate, taken.get()))) else {
            return 0;
        };
        let entry = &mut self.log[place];
        let returned = amount.min(entry.amount);
        entry.amount -= returned;
        self.total -= returned;
        if entry.amount == 0 {
            self.log.remove(place);
        }
        returned
    }

    fn put(&mut self, time: u64, amount: u64) {
        if amount == 0 {
            return;
        }
        self.total += amount;
        // Merged entries are dated ahead, so the newest is not always the last.
        let place = self.log.partition_point(|entry| entry.time < time);
        match self.log.get_mut(place).filter(|entry| entry.time == time) {
            Some(entry) => entry.amount += amount,
            None => self.log.insert(place, Entry { time, amount }),
        }
    }

    fn merge(&mut self, rate: &Rate) {
        let mut kept = 0;
        for index in 0..self.log.len() {
            let Entry { time, amount } = self.log[index];
            let time = slot_end(rate, time);
            if kept > 0 && self.log[kept - 1].time == time {
                self.log[kept - 1].amount += amount;
            } else {
                self.log[kept] = Entry { time, amount };
                kept += 1;
            }
        }
        self.log.truncate(kept);
        self.merged = true;
    }

    fn level(&self, rate: &Rate, at: Millis) -> u64 {
        let dead = &self.log[..self.dead(rate, at)];
        self.total - dead.iter().map(|entry| entry.amount).sum::<u64>()
    }

    fn live(&self, rate: &Rate, at: Millis) -> &[Entry] {
        &self.log[self.dead(rate, at)..]
    }

    fn dead(&self, rate: &Rate, at: Millis) -> usize {
        self.log.partition_point(|entry| entry.time + rate.length_ms <= at.get())
    }

    /// Pairs of time and amount.
    #[cfg(feature = "persist")]
    pub(super) fn saved(&self) -> impl Iterator<Item = u64> {
        self.log.iter().flat_map(|entry| [entry.time, entry.amount])
    }

    /// From pairs of time and amount, in order of time.
    #[cfg(feature = "persist")]
    pub(super) fn restored(numbers: &[u64]) -> Option<Moving> {
        let (pairs, []) = numbers.as_chunks::<2>() else { return None };
        let log: Vec<Entry> = pairs.iter().map(|&[time, amount]| Entry { time, amount }).collect();
        let total = log.iter().try_fold(0_u64, |sum, entry| sum.checked_add(entry.amount))?;
        let sound = log.is_sorted_by(|earlier, later| earlier.time < later.time)
            && log.iter().all(|entry| entry.amount > 0)
            && total <= super::saved::NUMBER_MAX;
        sound.then_some(Moving { log, total, merged: false })
    }
}

/// The end of the slot that contains `time`; a time on the grid stays.
fn slot_end(rate: &Rate, time: u64) -> u64 {
    let slots = if rate.length_ms <= SHORT_MS { SLOTS_SHORT } else { SLOTS_LONG };
    time.next_multiple_of(rate.length_ms.div_ceil(slots))
}
