//! Plans that were made before: callers come back, and what they meet is the same each time.

use std::sync::{Arc, Mutex, PoisonError};

use super::plan::Plan;
use crate::limit::Limit;
use crate::scope::Subject;
use crate::store::StoreError;

/// How many are remembered: a newcomer takes the place of whoever had it.
const PLANS_MAX: usize = 4_096;

/// A plan depends on limits and subjects alone. Known ones are told by where those are in memory, which is quick; what
/// is remembered keeps them there.
pub(super) struct Plans(Box<[Mutex<Option<Known>>]>);

struct Known {
    limits: Vec<Arc<Limit>>,
    subjects: Vec<Arc<str>>,
    plan: Arc<Plan>,
}

impl Known {
    fn is_of<'c>(&self, met: impl ExactSizeIterator<Item = (&'c Arc<Limit>, &'c Subject)>) -> bool {
        self.limits.len() == met.len()
            && self.limits.iter().zip(&self.subjects).zip(met).all(|((limit, text), (met, subject))| {
                Arc::ptr_eq(limit, met) && std::ptr::eq(&**text, subject.as_str())
            })
    }
}

impl Plans {
    pub(super) fn new() -> Plans {
        Plans((0..PLANS_MAX).map(|_| Mutex::default()).collect())
    }

    /// The plan of what is met; made by `make` unless it is known.
    pub(super) fn plan<'c>(
        &self,
        met: impl ExactSizeIterator<Item = (&'c Arc<Limit>, &'c Subject)> + Clone,
        make: impl FnOnce() -> Result<Plan, StoreError>,
    ) -> Result<Arc<Plan>, StoreError> {
        let place = &self.0[place(met.clone())];
        let lock = || place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().as_ref().filter(|known| known.is_of(met.clone())) {
            return Ok(Arc::clone(&known.plan));
        }
        let plan = Arc::new(make()?);
        let (limits, subjects) =
            met.map(|(limit, subject)| (Arc::clone(limit), subject.shared_text())).unzip();
        *lock() = Some(Known { limits, subjects, plan: Arc::clone(&plan) });
        Ok(plan)
    }
}

/// Addresses are nobody's to choose, so mixing them needs no secret.
fn place<'c>(met: impl Iterator<Item = (&'c Arc<Limit>, &'c Subject)>) -> usize {
    let mix = |hash: u64, address: usize| {
        (hash.rotate_left(5) ^ address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    };
    let hash = met.fold(0, |hash, (limit, subject)| {
        mix(mix(hash, Arc::as_ptr(limit).addr()), subject.as_str().as_ptr().addr())
    });
    (hash >> 32) as usize % PLANS_MAX
}
