//! Millions of made-up subjects cost no more memory than the budget, and push out nobody known. A process of its own,
//! so that nothing else moves its size. In release builds with the default budgets and ten million; in debug builds a
//! tenth of both.

mod support;

use std::borrow::Cow;
use std::sync::Arc;

use support::{START, charge, limit};
use tollgate_limiter::{Algorithm, Budgets, Charge, Dimension, ManualClock, MemoryStore, Millis, Scope};

const SCALE: usize = if cfg!(debug_assertions) { 10 } else { 1 };
const STRANGERS: usize = 10_000_000 / SCALE;
const ALLOWANCE: usize = 32 * 1024 * 1024;

/// Bytes of this process in memory.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
    pages.expect("the second number is what is resident") * 4096
}

#[test]
#[cfg(target_os = "linux")]
fn ten_million_strangers_stay_within_the_budget() {
    let full = Budgets::default();
    let budgets = Budgets { keyed: full.keyed / SCALE, unauthenticated: full.unauthenticated / SCALE };
    let clock = ManualClock::at(Millis(START));
    let store = MemoryStore::with_budgets(clock.clone(), budgets);
    let own = limit("own", "10/day", Algorithm::TokenBucket);
    // Shards hold an even share each, so the last tenth of the budget would already evict somewhere.
    let known = budgets.keyed * 9 / 10;
    for n in 0..known {
        drop(store.reserve(charge(&own, &format!("user-{n}"), 1)));
    }
    let junk = limit("junk", "10/minute", Algorithm::FixedWindow);
    let scope = Scope::of([Dimension::Ip]);
    let stranger = |n: usize| {
        if n.is_multiple_of(1_000) {
            clock.advance(Millis(1));
        }
        let subject = scope.subject(|_| Cow::Owned(format!("{n:x}"))).unauthenticated();
        drop(store.reserve(vec![Charge::new(Arc::clone(&junk), subject, 1)]));
    };
    (0..2 * budgets.unauthenticated).for_each(stranger);
    let before = resident();
    (2 * budgets.unauthenticated..STRANGERS).for_each(stranger);
    let grown = resident().saturating_sub(before);
    println!("{STRANGERS} strangers, {} MiB, grown by {} KiB", before >> 20, grown >> 10);
    assert!(grown <= ALLOWANCE, "grown by {grown} bytes over a full store of {before}");
    let occupancy = store.occupancy();
    assert_eq!(occupancy.keyed, known, "a known caller was pushed out");
    assert!(occupancy.unauthenticated <= budgets.unauthenticated);
    for n in (0..known).step_by(97) {
        assert_eq!(store.peek(charge(&own, &format!("user-{n}"), 0))[0].used, 1);
    }
}
