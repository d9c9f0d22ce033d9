//! Faults seeded into the Lua are each caught by the agreement.
#![cfg(feature = "redis")]

mod support;

use support::agreement::{FUTURE, History};
use support::server::Server;
use tollgate_limiter::{ManualClock, Millis};

const HISTORIES: u64 = 12;
const STEPS: u64 = 10_000;

/// What, and how: in place of the first, the second.
const FAULTS: [(&str, &str, &str); 20] = [
    (
        "a full window is not full",
        "return s[USED] + amount <= capacity end",
        "return s[USED] + amount < capacity end",
    ),
    ("the clock may go back", "local at = max(s[AT], now)", "local at = now"),
    ("a window is remembered for ever", "window == s[INDEX] + 1 and s[USED] or 0", "s[USED]"),
    ("a fading window does not fade", "(window - elapsed(c, s[AT]))", "window"),
    ("an entry dies one millisecond late", "s[first] + c[WINDOW] <= at", "s[first] + c[WINDOW] < at"),
    ("merged entries are held shorter", "return a - rest + b", "return a - rest"),
    ("a log is merged one entry late", "<= 2 * EXACT_ENTRIES then", "<= 2 * EXACT_ENTRIES + 2 then"),
    ("a bucket drains without end", "min(ticks, div_ceil(s[DEBT], c[CAPACITY]))", "ticks + 1"),
    (
        "refunds forgive debt of others",
        "min(less * length(c), owed, s[DEBT])",
        "min(less * length(c), s[DEBT])",
    ),
    ("an empty bucket remembers its refunds", "c.renewed or s[DEBT] == 0 or", "c.renewed or"),
    ("another unit of time is not converted", "s[DEBT] * (s[OLD_TICK] / tick)", "s[DEBT]"),
    ("a state from the future stays there", "if s[AT] <= now + c[WINDOW] then", "if true then"),
    ("a clear is not noticed", "s[LIFE] == life and s[GENERATION]", "s[GENERATION]"),
    ("two charges on one counter are not added", "(needed[c] or 0) + amounts", "0 + amounts"),
    ("a lease that has run out still counts", "                    c.total = c.total - amount\n", ""),
    (
        "a heartbeat holds a second slot",
        "c.total, c.leases[member] = c.total - held, false",
        "c.leases[member] = false",
    ),
    (
        "a lease that has run out ends once more",
        "ends and ends > c.state[AT] and amount or 0",
        "ends and amount or 0",
    ),
    (
        "two limits mix their leases",
        "if field == c[FIELD] then c.leases[member] = now",
        "if true then c.leases[member] = now",
    ),
    ("leases from the future stay there", "    else\n        leases.extend(c, now)\n", ""),
    (
        "a call that is over keeps its slot",
        "leases.hold(c, member, actual)",
        "leases.hold(c, member, amount)",
    ),
];

#[tokio::test]
async fn seeded_faults_are_caught() {
    let server = Server::start();
    let mut missed = Vec::new();
    for (number, (fault, from, to)) in FAULTS.into_iter().enumerate() {
        let mut caught = None;
        for seed in 0..HISTORIES {
            let clock = ManualClock::at(Millis(FUTURE));
            let options = server.options().prefix(&format!("fault{number}-{seed}")).without_denial_memory();
            let store = server.store(options.rehearse(clock.clone(), &[(from, to)])).await;
            let mut history = History::new(seed, clock, store);
            if let Err(difference) = history.tell(STEPS).await {
                caught = Some(format!("seed {seed}, {difference:.60}"));
                break;
            }
        }
        println!("{fault}: {caught:?}");
        if caught.is_none() {
            missed.push(fault);
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// A fault that is none would be caught by nothing: the text has to be there.
#[test]
fn each_fault_is_in_the_text() {
    let text = [
        include_str!("../src/redis/leases.lua"),
        include_str!("../src/redis/state.lua"),
        include_str!("../src/redis/charge.lua"),
        include_str!("../src/redis/settle.lua"),
    ]
    .concat();
    for (fault, from, to) in FAULTS {
        assert_eq!(text.matches(from).count(), 1, "{fault}: `{from}`");
        assert_ne!(from, to);
    }
}
