//! What a caller's limits say, spending nothing: `GET /v1/limits`.

use std::sync::Arc;

use serde_json::{Value, json};
use tollgate_limiter::{CHARGES_MAX, Charge, Retry, Standing};

use super::{Demand, Plan, failed};
use crate::error::Error;
use crate::identity::Caller;
use crate::limits::Limits;

/// Counters told of at a time; a caller with more asks about one model.
const STANDINGS_MAX: usize = 48;

/// The counters that requests of some plans meet, each once.
#[derive(Default)]
pub struct Counters {
    charges: Vec<Charge>,
    /// There are more than [`STANDINGS_MAX`].
    more: bool,
}

impl Counters {
    /// Those of `caller`.
    pub fn of(caller: &Caller, mut plans: impl Iterator<Item = Plan>) -> Self {
        let mut found = Self::default();
        while let (false, Some(plan)) = (found.more, plans.next()) {
            for charge in plan.charges(caller, &Demand::default()) {
                found.add(charge);
            }
        }
        found
    }

    fn add(&mut self, charge: Charge) {
        let (limit, subject) = (charge.limit(), charge.subject());
        let known = |other: &Charge| Arc::ptr_eq(other.limit(), limit) && other.subject() == subject;
        if self.charges.iter().any(known) {
            return;
        }
        if self.charges.len() == STANDINGS_MAX {
            self.more = true;
            return;
        }
        // Asked for one unit, so that an answer can say when there is one.
        self.charges.push(Charge::new(limit.clone(), subject.clone(), 1));
    }

    /// `{"object":"list","data":[…],"has_more":…}`.
    ///
    /// # Errors
    /// 503 when the store does not answer.
    pub async fn standings(self, limits: &Limits) -> Result<Value, Error> {
        let mut data = Vec::with_capacity(self.charges.len());
        for charges in self.charges.chunks(CHARGES_MAX) {
            let said = limits.peek(charges.to_vec()).await.map_err(|error| failed(&error))?;
            data.extend(said.iter().map(shown));
        }
        Ok(json!({ "object": "list", "data": data, "has_more": self.more }))
    }
}

/// What one limit says, as JSON.
pub fn shown(standing: &Standing) -> Value {
    let limit = &standing.limit;
    let retry = match standing.retry {
        Retry::After(wait) => Some(wait.get()),
        Retry::Now | Retry::Never => None,
    };
    json!({
        "object": "limit",
        "rule": limit.id(),
        "scope": limit.scope().to_string(),
        "subject": standing.subject.as_str(),
        "unit": limit.unit().as_str(),
        "strategy": limit.algorithm().as_str(),
        "window": limit.quota().window().map(|window| window.to_string()),
        "limit": limit.capacity(),
        "used": standing.used,
        "remaining": standing.remaining,
        "reset_ms": standing.reset.get(),
        "retry_after_ms": retry,
        "shadow": limit.is_shadow(),
    })
}
