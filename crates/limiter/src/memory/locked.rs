//! The shards of one decision, locked, and the general way to decide: whatever the charges are.

use std::sync::MutexGuard;

use super::key::{Few, Key, Run};
use super::shard::{Class, Shard};
use super::{Inner, lock};
use crate::clock::Millis;
use crate::limit::{Claim, demand};
use crate::reservation::Standing;
use crate::spec::{Receipt, Retry, State};

impl Inner {
    /// The charges by subject; neighbours of the same subject are hashed once.
    #[inline]
    pub(super) fn runs<C: Claim>(&self, claims: &[C]) -> Few<Run> {
        let mut runs = Few::new();
        let mut start = 0;
        while let Some(first) = claims.get(start) {
            let same = |claim: &&C| claim.subject() == first.subject();
            let end = start + 1 + claims[start + 1..].iter().take_while(same).count();
            runs.push(Run { key: self.key(first.subject()), charges: start..end });
            start = end;
        }
        runs
    }

    /// Locks every shard of these runs, in the order of the shards: two decisions never wait for each other.
    pub(super) fn lock(&self, runs: &Few<Run>) -> Locked<'_> {
        let last = self.shards.len() - 1;
        let mask = runs.iter().fold(0_u64, |mask, run| mask | 1 << run.key.place(last));
        let mut guards = Few::new();
        let mut rest = mask;
        while rest != 0 {
            guards.push(lock(&self.shards[rest.trailing_zeros() as usize]));
            rest &= rest - 1;
        }
        Locked { mask, guards, last }
    }
}

/// The shards of one decision, locked: a bit per shard, and the guards in that order.
pub(super) struct Locked<'s> {
    mask: u64,
    guards: Few<MutexGuard<'s, Shard>>,
    last: usize,
}

impl Locked<'_> {
    /// The shard of a key that is among those locked.
    pub(super) fn shard(&mut self, key: &Key) -> &mut Shard {
        let lower = (1_u64 << key.place(self.last)) - 1;
        self.guards.get_mut((self.mask & lower).count_ones() as usize)
    }

    /// Takes everything, or nothing: `false`. Fills in standings and receipts.
    pub(super) fn take(
        &mut self,
        runs: &Few<Run>,
        standings: &mut [Standing],
        receipts: &mut [Option<Receipt>],
        now: Millis,
    ) -> bool {
        let mut fitting = Vec::with_capacity(standings.len());
        for run in runs.iter() {
            for index in run.charges.clone() {
                let claim = &standings[index];
                let rate = claim.limit.rate();
                let demand = demand(standings, index);
                let fits = match self.shard(&run.key).state(&run.key, &claim.limit) {
                    Some(state) => {
                        // This alone may be written with a denial.
                        state.redate(rate, now);
                        state.fits(rate, now, demand)
                    }
                    None => State::new(rate, 0).fits(rate, now, demand),
                };
                fitting.push(fits);
            }
        }
        if standings.iter().zip(&fitting).any(|(standing, fits)| !fits && !standing.limit.is_shadow()) {
            self.stand(runs, standings, now);
            return false;
        }
        for run in runs.iter() {
            let shard = self.shard(&run.key);
            for index in run.charges.clone() {
                let standing = &mut standings[index];
                receipts[index] = None;
                if fitting[index] {
                    let class = Class::of(&standing.subject);
                    let state = shard.state_or_new(&run.key, class, &standing.limit, now);
                    receipts[index] = Some(take(state, standing, now));
                } else {
                    let amount = standing.requested;
                    stand(shard, &run.key, standing, amount, now);
                }
            }
        }
        self.guards.iter_mut().for_each(|shard| shard.make_room(now));
        true
    }

    /// Fills in the standings of charges that are not taken.
    pub(super) fn stand(&mut self, runs: &Few<Run>, standings: &mut [Standing], now: Millis) {
        for run in runs.iter() {
            let shard = self.shard(&run.key);
            for index in run.charges.clone() {
                let demand = demand(standings, index);
                stand(shard, &run.key, &mut standings[index], demand, now);
            }
        }
    }
}

/// Takes what fits, and says how it stands then.
pub(super) fn take(state: &mut State, standing: &mut Standing, now: Millis) -> Receipt {
    let rate = standing.limit.rate();
    let receipt = state.charge(rate, now, standing.requested);
    let reading = state.reading(rate, now);
    standing.taken(reading);
    receipt
}

/// Says how it stands, and when `amount` fits.
fn stand(shard: &mut Shard, key: &Key, standing: &mut Standing, amount: u64, now: Millis) {
    let rate = standing.limit.rate();
    let say = |state: &State| (state.reading(rate, now), state.wait(rate, now, amount));
    let (reading, retry): (_, Retry) = match shard.state(key, &standing.limit) {
        // Asking changes nothing: a state that has to be dated anew is asked as a copy.
        Some(state) if state.is_ahead(rate, now) => {
            let mut state = state.clone();
            state.redate(rate, now);
            say(&state)
        }
        Some(state) => say(state),
        None => say(&State::new(rate, 0)),
    };
    standing.read(reading, retry);
}
