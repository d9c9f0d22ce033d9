use std::borrow::Cow;
use std::sync::Arc;

use super::{Debt, Failing, Ledger, SUBJECTS_MAX};
use crate::clock::{ManualClock, Millis};
use crate::limit::{Charge, Limit};
use crate::memory::Budgets;
use crate::quota::Algorithm;
use crate::resilient::mirror::Mirror;
use crate::scope::{Dimension, Scope, Subject};

pub(super) const START: Millis = Millis(1_794_614_400_000);
const MINUTE: u64 = 60_000;

pub(super) fn limit(quota: &str, algorithm: Algorithm) -> Arc<Limit> {
    let scope = Scope::of([Dimension::User]);
    Arc::new(Limit::new("r", quota.parse().unwrap(), algorithm, scope).unwrap())
}

pub(super) fn user(name: &str) -> Subject {
    Scope::of([Dimension::User]).subject(|_| Cow::Borrowed(name))
}

struct Case {
    clock: ManualClock,
    mirror: Mirror,
    ledger: Ledger<ManualClock>,
    limit: Arc<Limit>,
    failing: Failing,
}

impl Case {
    /// A failure begins 10 s into a minute; `seen` units were in use then, the last of them taken right before.
    fn new(quota: &str, algorithm: Algorithm, instances: u32, seen: u64) -> Case {
        let clock = ManualClock::at(START + Millis(10_000));
        let (mirror, limit) = (Mirror::new(), limit(quota, algorithm));
        let since = START + Millis(10_000);
        let reset = match algorithm {
            Algorithm::SlidingWindow => Millis(MINUTE + 50_000),
            Algorithm::MovingWindow => Millis(MINUTE),
            _ => Millis(50_000),
        };
        mirror.put(&limit, &user("alice"), (seen, reset), since, (0, 0));
        let failing = Failing { number: 1, since, instances };
        Case { ledger: Ledger::new(clock.clone(), Budgets::default()), clock, mirror, limit, failing }
    }

    /// A failure, `after` the first one.
    fn fails_again(&mut self, after: u64) {
        self.clock.set(START + Millis(10_000 + after));
        self.failing = Failing {
            number: self.failing.number + 1,
            since: START + Millis(10_000 + after),
            ..self.failing
        };
    }

    /// How many more units are admitted, `after` the first failure began.
    fn admitted(&self, after: u64) -> u64 {
        (0..).take_while(|_| self.admits(after, 1)).count() as u64
    }

    fn admits(&self, after: u64, amount: u64) -> bool {
        self.clock.set(START + Millis(10_000 + after));
        let charge = Charge::new(Arc::clone(&self.limit), user("alice"), amount);
        let charge = self.ledger.share(&self.failing, &self.mirror, charge);
        let admitted = self.ledger.memory.reserve(vec![charge]).is_granted();
        self.ledger.touched(&self.limit, &user("alice"));
        admitted
    }

    /// The shared store was charged this.
    fn knows(&self, debt: &Debt) {
        self.ledger.known(&debt.limit, &debt.subject, debt.amount, self.failing.since);
    }

    fn owed(&self) -> u64 {
        self.ledger.debts(10).iter().flatten().map(|debt| debt.amount).sum()
    }
}

#[test]
fn what_was_left_is_shared_and_later_windows_are() {
    // Of 10, 3 are left: one each. Then four each.
    for algorithm in [Algorithm::FixedWindow, Algorithm::MovingWindow] {
        let case = Case::new("10/minute", algorithm, 3, 7);
        assert_eq!(case.admitted(0), 1, "{algorithm}");
        let end = if algorithm == Algorithm::FixedWindow { 50_000 } else { MINUTE };
        assert_eq!(case.admitted(end - 1), 0, "{algorithm}");
        assert_eq!(case.admitted(end), 4, "{algorithm}");
        assert_eq!(case.admitted(2 * end - 1), 0, "{algorithm}");
        assert_eq!(case.admitted(3 * MINUTE), 4, "{algorithm}");
    }
    // Nothing was left; more than everything was used.
    for seen in [10, 25] {
        let case = Case::new("10/minute", Algorithm::FixedWindow, 3, seen);
        assert_eq!(case.admitted(0), 0);
        assert_eq!(case.admitted(50_000), 4);
    }
    // A counter met late in the failure: what was in use when it began still counts.
    let case = Case::new("10/minute", Algorithm::MovingWindow, 3, 7);
    assert_eq!(case.admitted(MINUTE - 1), 1);
    let case = Case::new("10/minute", Algorithm::MovingWindow, 3, 7);
    assert_eq!(case.admitted(MINUTE), 4);
}

#[test]
fn a_bucket_has_a_share_of_rate_and_burst() {
    let case = Case::new("60/minute burst 10", Algorithm::TokenBucket, 4, 6);
    // One of the four that are left; then one every 4 s, up to three.
    assert_eq!(case.admitted(0), 1);
    assert_eq!(case.admitted(3_999), 0);
    assert_eq!(case.admitted(4_000), 1);
    assert_eq!(case.admitted(8_000), 1);
    assert_eq!(case.admitted(10 * MINUTE), 3);
}

#[test]
fn a_sliding_window_fades() {
    let case = Case::new("12/minute", Algorithm::SlidingWindow, 3, 12);
    assert_eq!(case.admitted(0), 0);
    assert_eq!(case.admitted(50_000), 0, "all of it may have been used in the window that ends here");
    assert_eq!(case.admitted(50_000 + 30_000), 2, "half of it");
    assert_eq!(case.admitted(10 * MINUTE), 4);
}

#[test]
fn alone_it_admits_what_was_left() {
    for algorithm in Algorithm::ALL {
        let case = Case::new("10/minute", algorithm, 1, 3);
        assert_eq!(case.admitted(0), 7, "{algorithm}");
    }
}

#[test]
fn what_is_granted_there_meanwhile_is_not_left_here() {
    for algorithm in [Algorithm::FixedWindow, Algorithm::MovingWindow, Algorithm::TokenBucket] {
        for instances in [1, 2] {
            let case = Case::new("100/minute", algorithm, instances, 40);
            let seen = |used| {
                let at = case.failing.since + Millis(1);
                case.mirror.put(&case.limit, &user("alice"), (used, Millis(49_999)), at, (0, 0));
            };
            assert!(case.admits(0, 5), "{algorithm}");
            seen(60);
            assert!(case.admits(1, 1));
            assert_eq!(case.owed(), 6, "{algorithm} {instances}");
            let left = if instances == 1 { 100 - 60 - 6 } else { 20 - 6 };
            assert_eq!(case.admitted(1), left, "{algorithm} {instances}");
            assert_eq!(case.owed(), left + 6);
            // Fewer are not believed, and what was charged is not left to all.
            seen(50);
            assert_eq!(case.admitted(1), 0);
        }
    }
}

#[test]
fn what_is_our_own_is_owed_once() {
    for algorithm in Algorithm::ALL {
        let case = Case::new("100/minute", algorithm, 2, 40);
        assert!(case.admits(0, 20), "{algorithm}");
        let debts = case.ledger.debts(10);
        assert_eq!(debts[0][0].amount, 20, "{algorithm}");
        assert!(Arc::ptr_eq(&debts[0][0].limit, &case.limit), "the whole limit, not its share");
        case.knows(&debts[0][0]);
        assert_eq!(case.owed(), 0, "{algorithm}");
        assert!(case.admits(0, 5), "{algorithm}");
        assert_eq!(case.owed(), 5, "{algorithm}");
        assert_eq!(case.owed(), 0, "asked for once");
        case.ledger.touched(&case.limit, &user("alice"));
        assert_eq!(case.owed(), 5, "it was not paid: {algorithm}");
        // What is over is not owed.
        case.ledger.touched(&case.limit, &user("alice"));
        case.clock.set(START + Millis(10 * MINUTE));
        assert_eq!(case.owed(), 0, "{algorithm}");
    }
}

#[test]
fn what_was_not_answered_is_asked_for_first() {
    for (algorithm, charged) in Algorithm::ALL.into_iter().flat_map(|a| [(a, true), (a, false)]) {
        let case = Case::new("100/minute", algorithm, 2, 40);
        assert!(case.admits(0, 12), "{algorithm}");
        let first = case.ledger.debts(10).remove(0).remove(0);
        assert_eq!((first.amount, first.is_question), (12, false));
        case.ledger.unsure(&first);
        // More is taken meanwhile, and the question is lost, too.
        assert!(case.admits(0, 3), "{algorithm}");
        for _ in 0..2 {
            let question = case.ledger.debts(10).remove(0).remove(0);
            assert_eq!((question.amount, question.order, question.is_question), (0, first.order, true));
            case.ledger.unsure(&question);
            case.ledger.touched(&case.limit, &user("alice"));
        }
        let question = case.ledger.debts(10).remove(0).remove(0);
        case.ledger.answered(&question, charged);
        let rest = case.ledger.debts(10).remove(0).remove(0);
        assert_eq!((rest.amount, rest.is_question), (if charged { 3 } else { 15 }, false), "{algorithm}");
        assert!(rest.order > first.order);
        case.knows(&rest);
        case.ledger.touched(&case.limit, &user("alice"));
        assert_eq!(case.owed(), 0, "{algorithm}");
    }
}

#[test]
fn what_has_run_out_since_it_was_sent_pays_for_nothing_new() {
    for algorithm in Algorithm::ALL {
        for fails_again in [true, false] {
            let mut case = Case::new("100/minute", algorithm, 1, 0);
            assert!(case.admits(0, 12), "{algorithm}");
            let first = case.ledger.debts(10).remove(0).remove(0);
            case.ledger.unsure(&first);
            // Ten windows later nothing is left of that, wherever it was charged.
            if fails_again {
                case.fails_again(10 * MINUTE);
            }
            assert!(case.admits(10 * MINUTE, 5), "{algorithm}");
            let question = case.ledger.debts(10).remove(0).remove(0);
            case.ledger.answered(&question, true);
            assert_eq!(case.owed(), 5, "{algorithm}, {fails_again}");
        }
    }
}

#[test]
fn a_bucket_owes_what_the_shared_one_does_not_know() {
    // Full when the failure begins: what is admitted while it drains is ours, whatever the level.
    let case = Case::new("60/minute", Algorithm::TokenBucket, 4, 60);
    let mut admitted = 0;
    for second in 1..=40 {
        admitted += case.admitted(second * 1_000);
    }
    assert_eq!(admitted, 10);
    // The shared bucket has drained by 40 meanwhile; the four together must fill it up again.
    assert_eq!(case.owed(), 10);
}

#[test]
fn failing_again_and_again_is_worth_nothing() {
    for paid in [true, false] {
        let mut case = Case::new("100/day", Algorithm::FixedWindow, 4, 20);
        let (mut admitted, mut seen) = (0, 20);
        for round in 1..=8 {
            admitted += case.admitted(round * 1_000);
            if paid {
                for debt in case.ledger.debts(10).iter().flatten() {
                    case.knows(debt);
                    seen += debt.amount;
                    case.mirror.put(
                        &case.limit,
                        &user("alice"),
                        (seen, Millis(MINUTE)),
                        case.failing.since,
                        (0, 0),
                    );
                }
            }
            case.fails_again(round * 1_000 + 500);
        }
        // Unpaid, one share of what is left; paid, each time a share of what is left then.
        let most = if paid { 80 } else { 20 };
        assert!(admitted <= most, "{admitted}");
        if !paid {
            assert_eq!(case.owed(), 20);
        }
    }
}

#[test]
fn a_limit_that_changes_keeps_its_counter() {
    let mut case = Case::new("10/minute", Algorithm::FixedWindow, 2, 0);
    assert_eq!(case.admitted(0), 5);
    case.limit = limit("30/minute", Algorithm::FixedWindow);
    assert_eq!(case.admitted(0), 10);
    assert_eq!(case.owed(), 15);
}

#[test]
fn it_remembers_so_many_subjects() {
    let case = Case::new("10/minute", Algorithm::FixedWindow, 2, 0);
    for number in 0..SUBJECTS_MAX + SUBJECTS_MAX / 2 {
        let charge = Charge::new(Arc::clone(&case.limit), user(&format!("u{number}")), 1);
        let charge = case.ledger.share(&case.failing, &case.mirror, charge);
        assert!(case.ledger.memory.reserve(vec![charge]).is_granted());
        case.ledger.touched(&case.limit, &user(&format!("u{number}")));
    }
    let held: usize = case.ledger.shards.iter().map(|shard| shard.lock().unwrap().subjects.len()).sum();
    assert!(held <= SUBJECTS_MAX, "{held}");
    assert_eq!(case.ledger.forgotten() as usize, SUBJECTS_MAX + SUBJECTS_MAX / 2 - held);
}
