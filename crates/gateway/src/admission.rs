//! Caller and call → the charges of every limit they meet.

use std::borrow::Cow;

use tollgate_limiter::{Charge, Dimension, Scope, Subject};

use crate::identity::Caller;
use crate::snapshot::Snapshot;

/// What a request of `caller` to `route` (canonical) for `model` (resolved) is charged, by rule in the order of the
/// configuration. Each charge is one request.
pub fn charges(now: &Snapshot, caller: &Caller, route: &str, model: &str) -> Vec<Charge> {
    let mut charges = Vec::new();
    for rule in &now.config.rules {
        if rule.limits.is_empty() || !rule.matches.holds(caller, route, model) {
            continue;
        }
        let subject = subject(rule.per, caller, route, model);
        charges.extend(rule.limits.iter().map(|limit| Charge::new(limit.clone(), subject.clone(), 1)));
    }
    charges
}

/// A scope filled in. What a caller does not have (a user, a team) is replaced by its key, else by its address: a limit per
/// user must not be one counter for all who are nobody.
fn subject(per: Scope, caller: &Caller, route: &str, model: &str) -> Subject {
    let or_identity = |value: Option<&str>| match value {
        Some(value) => Cow::Owned(value.to_owned()),
        None => Cow::Owned(caller.fallback_identity()),
    };
    let subject = per.subject(|dimension| match dimension {
        Dimension::Ip => Cow::Owned(caller.ip().to_string()),
        Dimension::Session => Cow::Owned(caller.session()),
        Dimension::ApiKey => or_identity(caller.key.as_ref().map(|key| key.id.as_str())),
        Dimension::User => or_identity(caller.user()),
        Dimension::Team => or_identity(caller.team().or(caller.user())),
        Dimension::Tier => or_identity(caller.tier()),
        Dimension::Model => Cow::Owned(model.to_owned()),
        Dimension::Endpoint => Cow::Owned(route.to_owned()),
    });
    if caller.key.is_none() { subject.unauthenticated() } else { subject }
}
