//! An outside judge: what was really used, replayed through exact models that know nothing of settlements.

use std::sync::Arc;

use super::window_ms;
use tollgate_limiter::{Algorithm, Limit};

pub(crate) struct Judge {
    limit: Arc<Limit>,
    used: Vec<Use>,
}

struct Use {
    time: u64,
    amount: u64,
    /// Let in by a decision; else used on top of an estimate, which nobody can refuse.
    admitted: bool,
}

impl Judge {
    pub(crate) fn new(limit: &Arc<Limit>) -> Judge {
        Judge { limit: Arc::clone(limit), used: Vec::new() }
    }

    pub(crate) fn admit(&mut self, time: u64, amount: u64) -> usize {
        self.used.push(Use { time, amount, admitted: true });
        self.used.len() - 1
    }

    /// Use `index` was no more than this.
    pub(crate) fn settle(&mut self, index: usize, amount: u64) {
        self.used[index].amount = amount;
    }

    pub(crate) fn overdraw(&mut self, time: u64, amount: u64) {
        self.used.push(Use { time, amount, admitted: false });
    }

    /// Whether real use was past what the algorithm allows when somebody was let in.
    pub(crate) fn exceeded(&self) -> Option<String> {
        let (limit, window) = (u128::from(self.limit.quota().amount()), u128::from(window_ms(&self.limit)));
        let burst = u128::from(self.limit.capacity());
        let (mut debt, mut last) = (0_u128, 0_u128);
        for (index, this) in self.used.iter().enumerate() {
            let before = &self.used[..=index];
            let time = u128::from(this.time);
            let within = |from: u128, to: u128| -> u128 {
                let inside = before.iter().filter(|other| (from..to).contains(&u128::from(other.time)));
                inside.map(|other| u128::from(other.amount)).sum()
            };
            let start = time / window * window;
            let over = match self.limit.algorithm() {
                Algorithm::FixedWindow => within(start, start + window) > limit,
                Algorithm::SlidingWindow => {
                    let previous = within(start - window, start) * (start + window - time);
                    previous + within(start, start + window) * window > limit * window
                }
                Algorithm::MovingWindow => within(time + 1 - window, time + 1) > limit,
                Algorithm::TokenBucket => {
                    debt = debt.saturating_sub((time - last) * limit) + u128::from(this.amount) * window;
                    last = time;
                    debt > burst * window
                }
                Algorithm::Concurrency => unreachable!("nothing is settled up"),
            };
            if over && this.admitted && this.amount > 0 {
                return Some(format!("use {index}: {} at {time}", this.amount));
            }
        }
        None
    }
}
