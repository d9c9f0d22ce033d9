//! concurrency: a lease per call in flight. Each ends when its call does, or runs out when nobody renews it: what a
//! crashed holder took comes back by itself, which a bare counter would keep for ever.

use std::collections::VecDeque;

use super::{Rate, Reading};
use crate::clock::Millis;

/// What a refused call is told: when the next one ends nobody knows.
const RETRY: Millis = Millis::from_secs(1);

/// Leases in order of their ends. Those whose end has passed are dead: they count for nothing and are dropped by the
/// next write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Leases {
    held: VecDeque<Lease>,
    /// The numbers given out.
    last: u64,
}

/// Which lease: of which life of the counter, and its number in it. No two of a counter are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) life: u64,
    pub(super) number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    member: Member,
    amount: u64,
    end: Millis,
}

impl Leases {
    /// Many as one, which nobody holds: where they are kept elsewhere, their sum is enough to decide.
    #[cfg(feature = "redis")]
    pub(super) fn in_sum(last: u64, used: u64, latest: Millis) -> Leases {
        let sum = Lease { member: Member::default(), amount: used, end: latest };
        Leases { held: (used > 0).then_some(sum).into_iter().collect(), last }
    }

    /// Every live lease runs its full time from `now`; their number stays.
    pub(super) fn redate(&mut self, rate: &Rate, at: Millis, now: Millis) {
        self.forget(at);
        for lease in &mut self.held {
            lease.end = now + Millis(rate.length_ms);
        }
    }

    pub(super) fn fits(&self, rate: &Rate, at: Millis, amount: u64) -> bool {
        self.live(at).saturating_add(amount) <= rate.capacity
    }

    pub(super) fn wait(&self) -> Millis {
        RETRY
    }

    pub(super) fn reading(&self, rate: &Rate, at: Millis, now: Millis) -> Reading {
        let used = self.live(at);
        let latest = self.held.back().filter(|_| used > 0);
        Reading {
            used,
            remaining: rate.capacity.saturating_sub(used),
            reset: latest.map_or(Millis::ZERO, |lease| lease.end - now),
        }
    }

    /// Drops dead leases.
    pub(super) fn forget(&mut self, at: Millis) {
        let dead = self.dead(at);
        self.held.drain(..dead);
    }

    /// After forgetting; returns the number of the lease. Not inlined: the callers are short for the other algorithms,
    /// and this is long.
    #[inline(never)]
    pub(super) fn take(&mut self, rate: &Rate, at: Millis, life: u64, amount: u64) -> u64 {
        self.forget(at);
        self.last += 1;
        self.hold(rate, at, Member { life, number: self.last }, amount);
        self.last
    }

    /// From now on for the full time. One that ran out is held again, even past the capacity: its call does run.
    pub(super) fn renew(&mut self, rate: &Rate, at: Millis, member: Member, amount: u64) {
        self.release(member);
        self.hold(rate, at, member, amount);
    }

    /// Ends a lease. Returns what it held; nothing when it had run out.
    pub(super) fn release(&mut self, member: Member) -> u64 {
        let place = self.held.iter().position(|lease| lease.member == member);
        place.and_then(|place| self.held.remove(place)).map_or(0, |lease| lease.amount)
    }

    /// A state's time never goes back, so the newest lease is the last to end.
    fn hold(&mut self, rate: &Rate, at: Millis, member: Member, amount: u64) {
        if amount > 0 {
            self.held.push_back(Lease { member, amount, end: at + Millis(rate.length_ms) });
        }
    }

    fn live(&self, at: Millis) -> u64 {
        let live = self.held.iter().skip(self.dead(at));
        live.fold(0, |sum, lease| sum.saturating_add(lease.amount))
    }

    fn dead(&self, at: Millis) -> usize {
        self.held.partition_point(|lease| lease.end <= at)
    }
}
