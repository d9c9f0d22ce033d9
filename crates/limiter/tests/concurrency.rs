//! Calls in flight: leases, not a counter.

mod support;

use support::{Random, START, charge, denied, granted, limit, user};
use tollgate_limiter::{Algorithm, Decision, LEASE, ManualClock, MemoryStore, Millis, Retry};

fn store_at(now: u64) -> (MemoryStore, ManualClock) {
    let clock = ManualClock::at(Millis(now));
    (MemoryStore::new(clock.clone()), clock)
}

fn slots(n: u64) -> std::sync::Arc<tollgate_limiter::Limit> {
    limit("gpu", &format!("{n} concurrent"), Algorithm::FixedWindow)
}

#[test]
fn a_limit_on_calls_in_flight_says_what_it_is() {
    let limit = slots(20);
    assert_eq!(limit.id(), "gpu-concurrency");
    assert_eq!(limit.algorithm(), Algorithm::Concurrency);
    assert_eq!((limit.capacity(), limit.window().longest()), (20, LEASE));
    assert_eq!(limit.guarantee(), "at most 20 in flight at any moment");
}

#[test]
fn a_slot_is_free_again_when_its_call_is_over() {
    let limit = slots(2);
    let (store, clock) = store_at(START);
    let first = granted(store.reserve(charge(&limit, "u", 1)));
    let second = granted(store.reserve(charge(&limit, "u", 1)));
    assert_eq!((second.standings()[0].used, second.standings()[0].remaining), (2, 0));
    assert_eq!(second.standings()[0].reset, LEASE);
    let denial = denied(store.reserve(charge(&limit, "u", 1)));
    assert_eq!(denial.retry(), Retry::After(Millis(1_000)), "no promise, only a hint");
    assert_eq!(denied(store.reserve(charge(&limit, "u", 3))).retry(), Retry::Never);
    // Settled with whatever amount, or with none, a call is over.
    assert_eq!(first.settle(&[1])[0].returned, 1);
    let third = granted(store.reserve(charge(&limit, "u", 1)));
    assert_eq!(second.settle(&[])[0].returned, 1);
    assert_eq!(third.refund()[0].returned, 1);
    assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 0);
    // A weight of two takes two.
    let heavy = granted(store.reserve(charge(&limit, "u", 2)));
    denied(store.reserve(charge(&limit, "u", 1)));
    clock.advance(Millis(1));
    assert_eq!(heavy.settle(&[7])[0].returned, 2, "more than was taken cannot be in flight");
    assert_eq!(store.peek(charge(&limit, "u", 2))[0].retry, Retry::Now);
}

#[test]
fn a_lost_holder_is_forgotten_and_a_renewed_one_is_not() {
    let limit = slots(2);
    let (store, clock) = store_at(START);
    drop(granted(store.reserve(charge(&limit, "u", 1))));
    let alive = granted(store.reserve(charge(&limit, "u", 1)));
    for _ in 0..5 {
        clock.advance(Millis(10_000));
        alive.renew();
    }
    assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 1, "the dropped one ran out");
    clock.advance(LEASE - Millis(1));
    assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 1);
    clock.advance(Millis(1));
    assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 0);
    // It was only asleep: its call does run, so it counts again, even past the limit.
    let others =
        [granted(store.reserve(charge(&limit, "u", 1))), granted(store.reserve(charge(&limit, "u", 1)))];
    alive.renew();
    let standing = store.peek(charge(&limit, "u", 1)).remove(0);
    assert_eq!((standing.used, standing.remaining), (3, 0));
    assert_eq!(alive.refund()[0].returned, 1);
    denied(store.reserve(charge(&limit, "u", 1)));
    for other in others {
        assert_eq!(other.refund()[0].returned, 1);
    }
}

#[test]
fn a_cleared_call_takes_nobody_elses_slot() {
    let limit = slots(2);
    let (store, _) = store_at(START);
    let old = granted(store.reserve(charge(&limit, "u", 1)));
    assert!(store.clear(&user("u")));
    let new = granted(store.reserve(charge(&limit, "u", 1)));
    assert_eq!(old.refund()[0].returned, 0);
    assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 1);
    assert_eq!(new.refund()[0].returned, 1);
}

#[test]
fn a_refusal_elsewhere_takes_no_slot() {
    let (slot, minute) = (slots(5), limit("m", "1/minute", Algorithm::MovingWindow));
    let (store, _) = store_at(START);
    let both = || [charge(&slot, "u", 1), charge(&minute, "u", 1)].concat();
    let held = granted(store.reserve(both()));
    denied(store.reserve(both()));
    assert_eq!(store.peek(both())[0].used, 1);
    let corrections = held.settle(&[1, 1]);
    assert_eq!((corrections[0].returned, corrections[1].returned), (1, 0));
}

#[test]
fn raised_and_lowered_while_calls_run() {
    let (store, _) = store_at(START);
    let held: Vec<_> = (0..4).map(|_| granted(store.reserve(charge(&slots(4), "u", 1)))).collect();
    assert_eq!(store.peek(charge(&slots(6), "u", 1))[0].remaining, 2);
    assert_eq!(store.peek(charge(&slots(2), "u", 1))[0].remaining, 0);
    for (ended, reservation) in held.into_iter().enumerate() {
        let fits = store.reserve(charge(&slots(2), "u", 1));
        assert_eq!(fits.is_granted(), ended > 2, "{ended} ended");
        if let Decision::Granted(extra) = fits {
            extra.refund();
        }
        reservation.refund();
    }
}

/// A day forwards and back: nobody is locked out for longer than two leases, and no two counts drift apart.
#[test]
fn an_excursion_of_the_clock_locks_nobody_out() {
    let limit = slots(1);
    for day in [86_400_000, 15_000] {
        let (store, clock) = store_at(START + day);
        let lost = granted(store.reserve(charge(&limit, "u", 1)));
        clock.set(Millis(START));
        denied(store.reserve(charge(&limit, "u", 1)));
        clock.advance(LEASE + LEASE);
        drop(granted(store.reserve(charge(&limit, "u", 1))));
        assert_eq!(lost.refund()[0].returned, 0);
        assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, 1);
    }
}

/// Random calls against a list of who is in flight.
#[test]
fn leases_are_what_a_list_of_calls_says() {
    for seed in 0..100 {
        let mut random = Random(seed);
        let limit = slots(1 + random.below(8));
        let (store, clock) = store_at(START);
        let mut held = Vec::new();
        for _ in 0..500 {
            clock.advance(Millis(random.below(5_000)));
            let now = clock_now(&store);
            let live = |held: &[(_, u64)]| held.iter().filter(|(_, end)| *end > now).count() as u64;
            match random.below(4) {
                0 | 1 => {
                    let decision = store.reserve(charge(&limit, "u", 1));
                    assert_eq!(decision.is_granted(), live(&held) < limit.capacity(), "seed {seed}");
                    if let Decision::Granted(reservation) = decision {
                        held.push((reservation, now + LEASE.get()));
                    }
                }
                2 if !held.is_empty() => {
                    let (reservation, end) = held.swap_remove(random.below(held.len() as u64) as usize);
                    assert_eq!(reservation.refund()[0].returned, u64::from(end > now), "seed {seed}");
                }
                3 if !held.is_empty() => {
                    let place = random.below(held.len() as u64) as usize;
                    held[place].0.renew();
                    held[place].1 = now + LEASE.get();
                }
                _ => {}
            }
            assert_eq!(store.peek(charge(&limit, "u", 1))[0].used, live(&held), "seed {seed}");
        }
    }
}

fn clock_now(store: &MemoryStore) -> u64 {
    store.now().get()
}
