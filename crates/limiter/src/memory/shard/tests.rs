//! What is remembered stays small.

use std::sync::Arc;

use super::{Class, Key, STALE_TICKETS_MAX, Shard};
use crate::clock::Millis;
use crate::limit::Limit;
use crate::memory::Budgets;
use crate::quota::Algorithm;
use crate::scope::Scope;

const NOW: Millis = Millis(1_700_000_000_000);

fn shard() -> Shard {
    Shard::new(Budgets { keyed: 100, unauthenticated: 100 })
}

fn limit(quota: &str) -> Arc<Limit> {
    Arc::new(Limit::new("r", quota.parse().unwrap(), Algorithm::MovingWindow, Scope::GLOBAL).unwrap())
}

#[test]
fn counters_of_limits_that_are_no_more_leave() {
    let (mut shard, key) = (shard(), Key::new(1, Arc::from("user:u")));
    for minutes in 1..=100 {
        let limit = limit(&format!("10/{minutes} minutes"));
        let now = NOW + Millis::from_secs(minutes * 86_400);
        let state = shard.state_or_new(&key, Class::Keyed, &limit, now);
        state.charge(limit.rate(), now, 1);
        assert_eq!(shard.subjects[&key].list.len(), 1);
    }
}

#[test]
fn tickets_of_cleared_subjects_leave() {
    let (mut shard, key, limit) = (shard(), Key::new(1, Arc::from("user:u")), limit("10/minute"));
    for _ in 0..10_000 {
        shard.state_or_new(&key, Class::Keyed, &limit, NOW);
        shard.make_room(NOW);
        assert!(shard.remove(&key));
        assert!(shard.keyed.tickets.len() <= STALE_TICKETS_MAX + 3);
    }
}
