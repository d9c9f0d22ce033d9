//! The short way: counters of a subject that are all there, charged by the limits that charged them last.

use std::sync::Arc;

#[cfg(feature = "persist")]
use super::journal::{self, Journal};
use super::{Counter, Counters};
use crate::clock::Millis;
use crate::limit::{Claim, Limit};
use crate::memory::key::Key;
use crate::spec::State;

/// The counters of one subject, to be charged together.
pub(in crate::memory) struct Known<'s> {
    pub(super) counters: &'s mut Counters,
    #[cfg(feature = "persist")]
    pub(super) journal: &'s mut Option<Journal>,
}

impl Known<'_> {
    /// Whether each claim has a counter of its own, last charged by the same limit, and room in it. A `false` says only
    /// that this was not enough.
    #[inline]
    pub(in crate::memory) fn fit<C: Claim>(&mut self, claims: &[C], now: Millis) -> bool {
        let mut elsewhere = false;
        let list = &mut self.counters.list[..];
        for (index, claim) in claims.iter().enumerate() {
            let (limit, amount) = (claim.limit(), claim.amount());
            let counter = if is_at(list, index, limit) {
                &mut list[index]
            } else if let Some(place) = place_of(list, limit) {
                elsewhere = true;
                &mut list[place]
            } else {
                return false;
            };
            counter.state.redate(limit.rate(), now);
            if !counter.state.fits(limit.rate(), now, amount) {
                return false;
            }
        }
        // Each at its own index: no two are the same.
        !elsewhere || distinct(claims)
    }

    /// Whether each claim has a counter, last charged by the same limit.
    pub(in crate::memory) fn has<C: Claim>(&self, claims: &[C]) -> bool {
        let list = &self.counters.list[..];
        claims.iter().enumerate().all(|(index, claim)| {
            is_at(list, index, claim.limit()) || place_of(list, claim.limit()).is_some()
        })
    }

    /// Takes claims that fit for good.
    #[inline]
    pub(in crate::memory) fn spend<C: Claim>(&mut self, claims: &[C], now: Millis) {
        let list = &mut self.counters.list[..];
        for (index, claim) in claims.iter().enumerate() {
            if let Some(counter) = nearest(list, index, claim.limit()) {
                counter.state.spend(claim.limit().rate(), now, claim.amount());
            }
        }
    }

    /// The state of the claim at `index` of those that fit.
    #[inline]
    pub(in crate::memory) fn state<C: Claim>(&mut self, index: usize, claim: &C) -> Option<&mut State> {
        nearest(&mut self.counters.list, index, claim.limit()).map(|counter| &mut counter.state)
    }

    /// Says that they change.
    #[inline]
    pub(in crate::memory) fn mark(&mut self, _key: &Key) {
        #[cfg(feature = "persist")]
        journal::mark(self.journal, _key);
    }
}

/// Whether the counter at `index` was last charged by this very limit: limits that are met together are born together.
#[inline]
fn is_at(list: &[Counter], index: usize, limit: &Arc<Limit>) -> bool {
    list.get(index).is_some_and(|counter| Arc::ptr_eq(&counter.limit, limit))
}

/// The counter last charged by this very limit, most likely the one at `index`.
#[inline]
fn nearest<'l>(list: &'l mut [Counter], index: usize, limit: &Arc<Limit>) -> Option<&'l mut Counter> {
    if is_at(list, index, limit) {
        return list.get_mut(index);
    }
    place_of(list, limit).and_then(|place| list.get_mut(place))
}

#[inline(never)]
fn place_of(list: &[Counter], limit: &Arc<Limit>) -> Option<usize> {
    list.iter().position(|counter| Arc::ptr_eq(&counter.limit, limit))
}

/// Whether no limit is met twice.
fn distinct<C: Claim>(claims: &[C]) -> bool {
    let met = |(index, claim): (usize, &C)| {
        claims[..index].iter().any(|other| Arc::ptr_eq(other.limit(), claim.limit()))
    };
    !claims.iter().enumerate().any(met)
}
