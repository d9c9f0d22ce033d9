//! Calls in flight, which outlive a change of who counts them.
//!
//! Those that the shared store granted are held here, too, so that a failure finds them counted. Those that were
//! granted here are held by the shared store as well, from when it is back, whether it has room for them or not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Inner, settlements};
use crate::limit::Charge;
use crate::memory::MemoryStore;
use crate::quota::Algorithm;
use crate::reservation::{Decision, Hold, Standing};

/// Calls in flight of one request, held here while the shared store counts them.
pub(super) struct Held {
    standings: Vec<Standing>,
    hold: Box<dyn Hold>,
}

impl Held {
    /// `None`: there are none among these.
    pub(super) fn of(standings: &[Standing], memory: &MemoryStore) -> Option<Held> {
        let calls = in_flight(standings);
        if calls.is_empty() {
            return None;
        }
        let charge = |standing: &Standing| {
            let without_bound = Arc::new(standing.limit.without_bound());
            Charge::new(without_bound, standing.subject.clone(), standing.requested)
        };
        match memory.reserve(calls.iter().map(charge)) {
            Decision::Granted(reservation) => {
                let (standings, hold) = reservation.into_parts();
                Some(Held { standings, hold })
            }
            // There is room without bound.
            Decision::Denied(_) => None,
        }
    }

    pub(super) fn renew(&self) {
        self.hold.renew(&self.standings);
    }

    pub(super) fn end(&self) {
        self.hold.settle(&self.standings, &[]);
    }
}

/// Calls in flight that were granted here.
#[derive(Default)]
pub(super) struct Calls(Mutex<Registry>);

#[derive(Default)]
struct Registry {
    last: u64,
    calls: HashMap<u64, Call>,
}

/// Those of one request.
struct Call {
    standings: Vec<Standing>,
    /// The shared store's side, once it was told.
    there: Option<Arc<dyn Hold>>,
}

impl Calls {
    /// Remembers them until they are [ended](Calls::end). `None`: there are none among these.
    pub(super) fn begin(&self, standings: &[Standing]) -> Option<u64> {
        let standings = in_flight(standings);
        if standings.is_empty() {
            return None;
        }
        let mut registry = self.lock();
        registry.last += 1;
        let number = registry.last;
        registry.calls.insert(number, Call { standings, there: None });
        Some(number)
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Tells the shared store of the calls in flight that it does not know.
    pub(super) fn hand_over(self: &Arc<Inner>) {
        for call in self.calls.lock().calls.values_mut().filter(|call| call.there.is_none()) {
            let hold = self.redis.adopt(&call.standings);
            hold.renew(&call.standings);
            let there = settlements::Held { store: Arc::clone(self), hold, here: None };
            call.there = Some(Arc::new(there));
        }
    }

    /// A request still runs.
    pub(super) fn renew_call(&self, number: u64) {
        let registry = self.calls.lock();
        if let Some(Call { standings, there: Some(there) }) = registry.calls.get(&number) {
            there.renew(standings);
        }
    }

    /// A request is over.
    pub(super) fn end_call(&self, number: u64) {
        let call = self.calls.lock().calls.remove(&number);
        if let Some(Call { standings, there: Some(there) }) = call {
            there.settle(&standings, &vec![0; standings.len()]);
        }
    }

    /// Nobody holds it any more: it runs out.
    pub(super) fn forget_call(&self, number: u64) {
        self.calls.lock().calls.remove(&number);
    }
}

fn in_flight(standings: &[Standing]) -> Vec<Standing> {
    let counted = |s: &&Standing| s.taken && s.limit.algorithm() == Algorithm::Concurrency;
    standings.iter().filter(counted).cloned().collect()
}
