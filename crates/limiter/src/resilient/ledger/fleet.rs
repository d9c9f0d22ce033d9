//! Many processes and a store that comes and goes, on one clock: what is admitted stays within its bounds.

use std::sync::Arc;

use super::tests::{START, limit, user};
use super::{Failing, Ledger};
use crate::clock::{ManualClock, Millis};
use crate::limit::{Charge, Limit};
use crate::memory::Budgets;
use crate::quota::Algorithm;
use crate::resilient::mirror::Mirror;
use crate::spec::State;

const N: u64 = 4;
const L: u64 = 61;
const WINDOW: u64 = 60_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

struct Fleet {
    now: Millis,
    clock: ManualClock,
    limit: Arc<Limit>,
    shared: State,
    members: Vec<(Mirror, Ledger<ManualClock>)>,
    failing: Option<Failing>,
    failures: u64,
    /// Times of what was admitted.
    admitted: Vec<u64>,
}

impl Fleet {
    fn new(algorithm: Algorithm) -> Fleet {
        let (clock, limit) = (ManualClock::at(START), limit("61/minute", algorithm));
        let member = |_| (Mirror::new(), Ledger::new(clock.clone(), Budgets::default()));
        let shared = State::new(limit.rate(), 7);
        let members = (0..N).map(member).collect();
        let (failing, admitted) = (None, Vec::new());
        Fleet { now: START, clock: clock.clone(), limit, shared, members, failing, failures: 0, admitted }
    }

    fn wait(&mut self, milliseconds: u64) {
        self.now = self.now + Millis(milliseconds);
        self.clock.set(self.now);
    }

    fn see(&self, member: usize) {
        let reading = self.shared.reading(self.limit.rate(), self.now);
        self.members[member].0.put(
            &self.limit,
            &user("alice"),
            (reading.used, reading.reset),
            self.now,
            (0, 0),
        );
    }

    fn ask(&mut self, member: usize) {
        let (rate, now) = (*self.limit.rate(), self.now);
        let granted = if let Some(failing) = &self.failing {
            let (mirror, ledger) = &self.members[member];
            let charge =
                ledger.share(failing, mirror, Charge::new(Arc::clone(&self.limit), user("alice"), 1));
            let granted = ledger.memory.reserve(vec![charge]).is_granted();
            ledger.touched(&self.limit, &user("alice"));
            granted
        } else {
            let fits = self.shared.fits(&rate, now, 1);
            if fits {
                self.shared.charge(&rate, now, 1);
            }
            self.see(member);
            fits
        };
        if granted {
            self.admitted.push(now.get());
        }
    }

    fn fail(&mut self) {
        (0..self.members.len()).for_each(|member| self.see(member));
        self.failures += 1;
        self.failing = Some(Failing { number: self.failures, since: self.now, instances: N as u32 });
    }

    fn recover(&mut self) {
        let (rate, now) = (*self.limit.rate(), self.now);
        let nothing = State::new(&rate, 1).charge(&rate, Millis::ZERO, 0);
        for (mirror, ledger) in &self.members {
            for debt in ledger.debts(10).iter().flatten() {
                self.shared.correct(&rate, now, &nothing, debt.amount);
                ledger.known(&debt.limit, &debt.subject, debt.amount, now);
                let reading = self.shared.reading(&rate, now);
                mirror.put(&self.limit, &user("alice"), (reading.used, reading.reset), now, (0, 0));
            }
        }
        self.failing = None;
    }
}

/// The most that was admitted within any span of this length.
fn most_within(times: &[u64], span: u64) -> u64 {
    let within = |(index, from): (usize, &u64)| times[index..].partition_point(|time| time - from < span);
    times.iter().enumerate().map(within).max().unwrap_or(0) as u64
}

fn history(seed: u64, algorithm: Algorithm) -> Vec<u64> {
    let (mut random, mut fleet) = (Random(seed), Fleet::new(algorithm));
    for _ in 0..30 {
        // Up for a while, down for a while; sometimes for a moment, sometimes for windows.
        for _ in 0..2 {
            let steps = [3, 40, 400][random.below(3) as usize];
            let pause = [1, 60, 700][random.below(3) as usize];
            for _ in 0..steps {
                fleet.wait(random.below(pause));
                fleet.ask(random.below(N) as usize);
            }
            match fleet.failing {
                None => fleet.fail(),
                Some(_) => fleet.recover(),
            }
        }
    }
    fleet.admitted
}

#[test]
fn whenever_it_fails_and_comes_back() {
    let mut worst = [0; 4];
    for seed in 0..12 {
        for (algorithm, worst) in Algorithm::ALL.into_iter().zip(&mut worst) {
            let admitted = history(seed, algorithm);
            let (most, bound) = match algorithm {
                Algorithm::FixedWindow => {
                    let same = admitted.chunk_by(|one, other| one / WINDOW == other / WINDOW);
                    (same.map(<[u64]>::len).max().unwrap_or(0) as u64, L + N)
                }
                Algorithm::MovingWindow => (most_within(&admitted, WINDOW), L + N),
                Algorithm::SlidingWindow => (most_within(&admitted, WINDOW), 2 * (L + N)),
                _ => (most_within(&admitted, WINDOW), 2 * L + 2 * N),
            };
            assert!(most <= bound, "seed {seed}, {algorithm}: {most} of {bound}");
            *worst = most.max(*worst);
        }
    }
    // It is tried hard enough to come near.
    assert!(worst[0] > L && worst[2] > L, "{worst:?}");
}
