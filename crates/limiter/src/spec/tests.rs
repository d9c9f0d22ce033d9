//! What only the inside can see: calendar, gate, and the shape of states.

use super::calendar::{month_of, start_of_month};
use super::moving::Moving;
use super::{Level, Rate, State};
use crate::clock::Millis;
use crate::quota::{Algorithm, Quota};

const DAY_MS: u64 = 86_400_000;

fn rate(quota: &str, algorithm: Algorithm) -> Rate {
    let quota: Quota = quota.parse().unwrap();
    Rate::new(&quota, quota.window().unwrap(), algorithm).unwrap()
}

/// Every day for 700 years, counted by hand.
#[test]
fn months_are_those_of_the_calendar() {
    let (mut day, mut month) = (0, 0);
    for year in 1970..2670 {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        for length in [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            assert_eq!(start_of_month(month), Millis(day * DAY_MS), "{year}, month {month}");
            for _ in 0..length {
                assert_eq!(month_of(Millis(day * DAY_MS)), month);
                assert_eq!(month_of(Millis((day + 1) * DAY_MS - 1)), month);
                day += 1;
            }
            month += 1;
        }
    }
}

#[test]
fn weeks_start_on_monday() {
    // 2026-03-02 was a Monday.
    let monday = 1_772_409_600_000;
    for quota in ["1/week", "1/2 weeks", "1/52 weeks"] {
        let rate = rate(quota, Algorithm::FixedWindow);
        let index = rate.index(Millis(monday));
        let end = rate.end(index).get();
        assert_eq!((end - monday) % (7 * DAY_MS), 0, "{quota}");
        assert_eq!(rate.index(Millis(end - 1)), index);
        assert_eq!(rate.index(Millis(end)), index + 1);
    }
    assert_eq!(rate("1/week", Algorithm::FixedWindow).end(0), Millis(4 * DAY_MS));
}

#[test]
fn the_gate_takes_the_finest_exact_tick() {
    use Algorithm::{FixedWindow, MovingWindow, SlidingWindow, TokenBucket};
    let cases = [
        ("60/minute", TokenBucket, Some(1)),
        ("7000000/minute", TokenBucket, Some(1)),
        ("1000000000/day", TokenBucket, Some(100)),
        ("1000000000/day", SlidingWindow, Some(100)),
        ("1000000000/day", FixedWindow, Some(1)),
        ("1000000000/day", MovingWindow, Some(1)),
        ("1/day burst 1G", TokenBucket, Some(100)),
        ("$60k/day", TokenBucket, None),
        ("$60k/day", SlidingWindow, None),
        ("$60k/day", FixedWindow, Some(1)),
        ("$100k/month", FixedWindow, Some(1)),
    ];
    for (quota, algorithm, tick) in cases {
        assert_eq!(quota.parse::<Quota>().unwrap().resolution(algorithm), tick, "{quota} {algorithm}");
    }
}

#[test]
fn a_moving_log_stays_short_and_in_order() {
    for (quota, span) in [
        ("1000000/minute", 60_000),
        ("1000000/second", 1_000),
        ("1000000/7 s", 7_000),
        ("1000000/day", DAY_MS),
    ] {
        let rate = rate(quota, Algorithm::MovingWindow);
        let mut state = State::new(&rate, 1);
        let mut longest = 0;
        for step in 0..20_000 {
            let now = Millis(1_700_000_000_000 + step * (span / 700).max(1));
            state.charge(&rate, now, 1 + step % 3);
            let Level::Moving(Moving { log, .. }) = &state.level else { panic!() };
            longest = longest.max(log.len());
            assert!(log.windows(2).all(|pair| pair[0].time < pair[1].time), "in order, one per time");
        }
        assert!((60..=98).contains(&longest), "{quota}: {longest} entries");
    }
}

#[test]
fn a_bucket_keeps_its_debt_through_every_change_of_tick() {
    let (fine, coarse) =
        (rate("1000/day", Algorithm::TokenBucket), rate("1000000000/day", Algorithm::TokenBucket));
    assert_eq!((fine.tick, coarse.tick), (1, 100));
    let now = Millis(1_700_000_000_050);
    let mut state = State::new(&fine, 1);
    state.charge(&fine, now, 1_000);
    assert_eq!(state.reading(&coarse, now).used, 1_000);
    state.charge(&coarse, now, 0);
    // Back again: one coarse tick may be lost, never won.
    let back = state.reading(&fine, now);
    assert_eq!((back.used, back.remaining), (1_000, 0));
    assert!(back.reset >= Millis(DAY_MS), "{:?}", back.reset);
    assert!(back.reset <= Millis(DAY_MS + 200), "{:?}", back.reset);
}

#[test]
fn a_coarse_bucket_read_finely_mints_nothing() {
    let (fine, coarse) =
        (rate("1000/day", Algorithm::TokenBucket), rate("1000000000/day", Algorithm::TokenBucket));
    // 99 ms into a coarse tick: it is dated at the tick's start, those 99 ms must not drain.
    let now = Millis(1_700_000_000_099);
    let mut state = State::new(&coarse, 1);
    state.charge(&coarse, now, 1_000);
    assert!(state.reading(&fine, now).reset >= Millis(DAY_MS));
}

#[test]
fn a_merged_entry_gives_back_until_the_window_of_the_take_is_over() {
    let rate = rate("1000/minute", Algorithm::MovingWindow);
    let mut state = State::new(&rate, 1);
    let start = 1_700_000_000_001;
    let receipts: Vec<_> = (0..100).map(|n| state.charge(&rate, Millis(start + n), 2)).collect();
    assert_eq!(state.correct(&rate, Millis(start + 59_999), &receipts[0], 0).returned, 2);
    // The merged entry is still live: it is dated at the end of its slot.
    let over = Millis(start + 1 + 60_000);
    assert_eq!(state.reading(&rate, over).used, 198);
    assert_eq!(state.correct(&rate, over, &receipts[1], 0).returned, 0);
    assert_eq!(state.correct(&rate, over, &receipts[2], 0).returned, 2);
}

#[test]
fn a_changed_rate_ends_what_a_bucket_gives_back() {
    let (slow, fast) =
        (rate("60/minute", Algorithm::TokenBucket), rate("600/minute", Algorithm::TokenBucket));
    let now = Millis(1_700_000_000_000);
    let mut state = State::new(&slow, 1);
    let [older, old] = [10, 10].map(|amount| state.charge(&slow, now, amount));
    let new = state.charge(&fast, now, 10);
    assert_eq!(state.correct(&slow, now, &older, 0).returned, 0);
    // Settling at the old rate does not bring it back: what was taken at the new one is still given back.
    assert_eq!(state.correct(&slow, now, &old, 15).charged, 5);
    assert_eq!(state.correct(&fast, now, &new, 0).returned, 10);
    assert_eq!(state.reading(&fast, now).used, 25);
}

#[test]
fn a_lowered_bucket_owes_no_more_than_its_bound() {
    let (big, small) =
        (rate("1000/minute", Algorithm::TokenBucket), rate("10/minute", Algorithm::TokenBucket));
    let now = Millis(1_700_000_000_000);
    let mut state = State::new(&big, 1);
    state.charge(&big, now, 1_000);
    assert_eq!(state.reading(&small, now).reset, Millis(120_000));
}

/// What was taken in a future that was called off is not given back when that future comes.
#[test]
fn a_redated_state_gives_nothing_back() {
    for algorithm in Algorithm::ALL {
        let rate = rate("10/minute", algorithm);
        let (now, future) = (Millis(1_700_000_000_000), Millis(1_700_000_600_000));
        let mut state = State::new(&rate, 1);
        let receipt = state.charge(&rate, future, 5);
        assert!(!state.redate(&rate, future));
        assert!(state.redate(&rate, now));
        assert_eq!(state.reading(&rate, now).used, 5, "{algorithm}: the level is kept");
        state.charge(&rate, future, 5);
        assert_eq!(state.correct(&rate, future, &receipt, 0).returned, 0, "{algorithm}");
        assert_eq!(state.reading(&rate, future).used, 5, "{algorithm}");
    }
}
