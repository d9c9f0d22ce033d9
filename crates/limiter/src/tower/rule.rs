//! One rule of a layer, and what it makes of a request.

use std::fmt;
use std::sync::Arc;

use http::request::Parts;

use super::per::Per;
use crate::limit::{Charge, Limit, LimitError};
use crate::quota::{Algorithm, Quota};

type Condition = dyn Fn(&Parts) -> bool + Send + Sync;
type Weight = dyn Fn(&Parts) -> u64 + Send + Sync;

/// How much, per what, counted how, at which cost.
#[derive(Clone)]
pub struct Rule {
    name: String,
    quota: Quota,
    per: Per,
    algorithm: Option<Algorithm>,
    shadow: bool,
    when: Option<Arc<Condition>>,
    amount: Amount,
}

#[derive(Clone)]
enum Amount {
    One,
    Exactly(Arc<Weight>),
    Estimate(Arc<Weight>),
}

impl Rule {
    /// `name` is what clients see in headers: `free` with `60/minute` is the limit `free-requests-minute`. Counted as
    /// a token bucket if the quota has a burst, else as a fixed window, unless [`algorithm`](Rule::algorithm) says
    /// otherwise. Each request costs 1.
    pub fn new(name: impl Into<String>, quota: Quota, per: Per) -> Rule {
        Rule {
            name: name.into(),
            quota,
            per,
            algorithm: None,
            shadow: false,
            when: None,
            amount: Amount::One,
        }
    }

    /// How it is counted.
    pub fn algorithm(self, algorithm: Algorithm) -> Rule {
        Rule { algorithm: Some(algorithm), ..self }
    }

    /// Counts and reports, but never refuses: to see what a limit would do before it does.
    pub fn shadow(self) -> Rule {
        Rule { shadow: true, ..self }
    }

    /// Only requests of which this holds meet it.
    pub fn when(self, condition: impl Fn(&Parts) -> bool + Send + Sync + 'static) -> Rule {
        Rule { when: Some(Arc::new(condition)), ..self }
    }

    /// What a request costs, known exactly. More than the limit is refused for ever.
    pub fn cost(self, weight: impl Fn(&Parts) -> u64 + Send + Sync + 'static) -> Rule {
        Rule { amount: Amount::Exactly(Arc::new(weight)), ..self }
    }

    /// What is taken before it is known what a request costs, at most the whole limit. The handler says what it was
    /// by [`Meter::used`](super::Meter::used), at the latest with the last byte of a stream.
    pub fn reserve(self, estimate: impl Fn(&Parts) -> u64 + Send + Sync + 'static) -> Rule {
        Rule { amount: Amount::Estimate(Arc::new(estimate)), ..self }
    }

    pub(super) fn entry(self) -> Result<Entry, LimitError> {
        let bucket = self.quota.burst().is_some();
        let default = if bucket { Algorithm::TokenBucket } else { Algorithm::FixedWindow };
        let limit = Limit::new(&self.name, self.quota, self.algorithm.unwrap_or(default), self.per.scope())?;
        let limit = Arc::new(if self.shadow { limit.shadow() } else { limit });
        Ok(Entry { limit, per: self.per, when: self.when, amount: self.amount })
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quota = self.quota.to_string();
        f.debug_struct("Rule").field("name", &self.name).field("quota", &quota).finish_non_exhaustive()
    }
}

/// A rule that passed the gate.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) limit: Arc<Limit>,
    per: Per,
    when: Option<Arc<Condition>>,
    amount: Amount,
}

impl Entry {
    /// `None`: the request does not meet it.
    pub(super) fn charge(&self, parts: &Parts) -> Option<Charge> {
        if self.when.as_ref().is_some_and(|condition| !condition(parts)) {
            return None;
        }
        let (limit, subject) = (Arc::clone(&self.limit), self.per.subject(parts));
        Some(match &self.amount {
            Amount::One => Charge::new(limit, subject, 1),
            Amount::Exactly(weight) => Charge::new(limit, subject, weight(parts)),
            Amount::Estimate(weight) => Charge::estimate(limit, subject, weight(parts)),
        })
    }
}
