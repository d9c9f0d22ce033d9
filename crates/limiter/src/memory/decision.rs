//! Decisions: the short way for what is known and fits, and what is held until it is settled.

use super::MemoryStore;
use super::key::{Few, Key, Run};
use super::locked::{Locked, take};
use super::shard::Known;
use crate::clock::Millis;
use crate::limit::Charge;
use crate::quota::Algorithm;
use crate::reservation::{Decision, Denial, Hold, Reservation, Standing};
use crate::spec::{Correction, Receipt, Retry};

impl MemoryStore {
    /// Takes charges of one subject that need nothing but room: `false` says only that this was not enough.
    pub(super) fn take_known(&self, charges: &[Charge]) -> bool {
        let inner = &*self.0;
        let Some((first, rest)) = charges.split_first() else {
            return true;
        };
        if rest.iter().any(|charge| charge.subject() != first.subject()) {
            return false;
        }
        let key = inner.key(first.subject());
        let mut shard = inner.shard(&key);
        let now = inner.clock.now();
        let Some(mut known) = shard.known(&key, charges) else {
            return false;
        };
        if !known.fit(charges, now) {
            return false;
        }
        known.mark(&key);
        known.spend(charges, now);
        true
    }

    /// Takes whatever the charges are.
    #[inline(never)]
    pub(super) fn take_any(&self, charges: &[Charge]) -> Retry {
        match self.reserve(charges.to_vec()) {
            Decision::Granted(_) => Retry::Now,
            Decision::Denied(denial) => denial.retry(),
        }
    }

    /// Decides. `receipts` are as many as the standings, or more.
    pub(super) fn decide<R>(&self, mut standings: Vec<Standing>, mut receipts: R) -> Decision
    where
        R: AsRef<[Option<Receipt>]> + AsMut<[Option<Receipt>]> + Send + Sync + 'static,
    {
        let inner = &*self.0;
        let runs = inner.runs(&standings);
        let mut locked = inner.lock(&runs);
        let now = inner.clock.now();
        let taken = locked.take_known(&runs, &mut standings, receipts.as_mut(), now)
            || locked.take(&runs, &mut standings, receipts.as_mut(), now);
        drop(locked);
        if !taken {
            return Decision::Denied(Denial::new(standings, now));
        }
        let hold = Held { store: self.clone(), runs, receipts };
        Decision::Granted(Reservation::new(standings, now, Box::new(hold)))
    }
}

impl Locked<'_> {
    /// Takes charges that need nothing but room: of subjects that are known as what they were, from counters that
    /// were last charged by the same limits. `false` says only that this was not enough; nothing was taken.
    fn take_known(
        &mut self,
        runs: &Few<Run>,
        standings: &mut [Standing],
        receipts: &mut [Option<Receipt>],
        now: Millis,
    ) -> bool {
        if let Some(run) = runs.only() {
            let Some(mut known) = self.shard(&run.key).known(&run.key, standings) else {
                return false;
            };
            let fit = known.fit(standings, now);
            if fit {
                charge(&mut known, &run.key, standings, receipts, now);
            }
            return fit;
        }
        let repeated =
            |(index, run): (usize, &Run)| runs.iter().take(index).any(|other| other.key == run.key);
        if runs.iter().enumerate().any(repeated) {
            return false;
        }
        for run in runs.iter() {
            let claims = &standings[run.charges.clone()];
            let known = self.shard(&run.key).known(&run.key, claims);
            if !known.is_some_and(|mut known| known.fit(claims, now)) {
                return false;
            }
        }
        for run in runs.iter() {
            let (claims, receipts) =
                (&mut standings[run.charges.clone()], &mut receipts[run.charges.clone()]);
            if let Some(mut known) = self.shard(&run.key).known(&run.key, claims) {
                charge(&mut known, &run.key, claims, receipts, now);
            }
        }
        true
    }
}

/// Takes what fits.
#[inline]
fn charge(
    known: &mut Known<'_>,
    key: &Key,
    standings: &mut [Standing],
    receipts: &mut [Option<Receipt>],
    now: Millis,
) {
    known.mark(key);
    for (index, (standing, receipt)) in standings.iter_mut().zip(receipts).enumerate() {
        if let Some(state) = known.state(index, standing) {
            *receipt = Some(take(state, standing, now));
        }
    }
}

/// What a reservation holds of this store: of each charge its counter, and what was taken from it, if anything.
struct Held<R> {
    store: MemoryStore,
    runs: Few<Run>,
    receipts: R,
}

impl<R: AsRef<[Option<Receipt>]> + Send + Sync> Hold for Held<R> {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        let mut corrections = vec![Correction::default(); standings.len()];
        let inner = &*self.store.0;
        let now = inner.clock.now();
        for run in self.runs.iter() {
            let changes = || run.charges.clone().filter_map(|index| self.change(standings, actual, index));
            if changes().next().is_none() {
                continue;
            }
            let claims = &standings[run.charges.clone()];
            let mut shard = inner.shard(&run.key);
            if let Some(mut known) = shard.known(&run.key, claims).filter(|known| known.has(claims)) {
                known.mark(&run.key);
                for (index, receipt, actual) in changes() {
                    if let Some(state) = known.state(index - run.charges.start, &standings[index]) {
                        let rate = standings[index].limit.rate();
                        state.redate(rate, now);
                        corrections[index] = state.correct(rate, now, receipt, actual);
                    }
                }
                continue;
            }
            for (index, receipt, actual) in changes() {
                corrections[index] = shard.settle(&run.key, &standings[index], now, receipt, actual);
            }
            shard.make_room(now);
        }
        corrections
    }

    fn renew(&self, standings: &[Standing]) {
        let inner = &*self.store.0;
        let now = inner.clock.now();
        for run in self.runs.iter() {
            for index in run.charges.clone() {
                let (standing, receipt) = (&standings[index], &self.receipts.as_ref()[index]);
                if let (Algorithm::Concurrency, Some(receipt)) = (standing.limit.algorithm(), receipt) {
                    let mut shard = inner.shard(&run.key);
                    shard.renew(&run.key, standing, now, receipt);
                    shard.make_room(now);
                }
            }
        }
    }
}

impl<R: AsRef<[Option<Receipt>]>> Held<R> {
    /// What there is to settle of a charge: its place, its receipt, and an amount other than what was taken.
    #[inline]
    fn change(&self, standings: &[Standing], actual: &[u64], index: usize) -> Option<(usize, &Receipt, u64)> {
        let standing = &standings[index];
        let receipt = self.receipts.as_ref()[index].as_ref()?;
        let over = (standing.limit.algorithm() == Algorithm::Concurrency).then_some(0);
        let actual = over.or(actual.get(index).copied()).filter(|actual| *actual != standing.requested)?;
        Some((index, receipt, actual))
    }
}
