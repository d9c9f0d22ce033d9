//! Whether a provider answers these days: learned from its answers, without asking it for anything extra.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;

use super::Failure;
use crate::metrics::Gauge;

/// Failures in a row after which a provider is passed over.
const FAILURES_TOLERATED: u32 = 3;

/// How long it is passed over at first; doubled with each further failure up to the last.
const REST_FIRST: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(30);

/// Passive health of one provider.
///
/// After [`FAILURES_TOLERATED`] failures in a row it rests. When its rest is over one request is let through as a probe
/// while the others still pass it over; its answer ends the matter or doubles the rest.
pub struct Health {
    state: Mutex<State>,
    gauge: Gauge,
}

#[derive(Default)]
struct State {
    failures: u32,
    rests_until: Option<Instant>,
    /// A request was let through after the rest and has not come back.
    probing: bool,
}

impl Health {
    /// A provider nothing is known against.
    pub fn new(gauge: Gauge) -> Self {
        gauge.set(1);
        Self { state: Mutex::default(), gauge }
    }

    /// Whether to ask it now in its turn. A `true` after a rest is given to one caller only, until its attempt has ended.
    pub fn take_turn(&self) -> bool {
        let mut state = self.lock();
        match state.rests_until {
            None => true,
            Some(until) if until > Instant::now() || state.probing => false,
            Some(_) => {
                state.probing = true;
                true
            }
        }
    }

    /// When its rest is over; `None`: it does not rest.
    pub fn rests_until(&self) -> Option<Instant> {
        self.lock().rests_until
    }

    /// An answer has begun. It is not known yet whether it will end: after a rest, the next failure is one too many.
    pub(super) fn began(&self) {
        let mut state = self.lock();
        state.probing = false;
        if state.rests_until.take().is_some() {
            state.failures = FAILURES_TOLERATED - 1;
            self.gauge.set(1);
        }
    }

    pub(super) fn answered(&self) {
        let mut state = self.lock();
        if state.failures > 0 || state.rests_until.is_some() {
            *state = State::default();
            self.gauge.set(1);
        }
    }

    pub(super) fn failed(&self, failure: &Failure) {
        let mut state = self.lock();
        state.probing = false;
        state.failures = state.failures.saturating_add(1);
        let rest = match failure {
            // Ours is the trouble.
            Failure::NoDescriptors => {
                state.failures -= 1;
                return;
            }
            // It said itself for how long.
            Failure::Status(StatusCode::TOO_MANY_REQUESTS, Some(wait)) => (*wait).min(REST_MAX),
            _ if state.failures < FAILURES_TOLERATED => return,
            _ => {
                (REST_FIRST * 2u32.saturating_pow((state.failures - FAILURES_TOLERATED).min(8))).min(REST_MAX)
            }
        };
        state.rests_until = Some(Instant::now() + rest);
        self.gauge.set(0);
    }

    /// The turn that was taken is not used, or its caller left before there was an answer: nothing was learned.
    pub fn pass_turn(&self) {
        self.lock().probing = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> Failure {
        Failure::Broken(String::new())
    }

    #[test]
    fn rests_after_three_failures_and_recovers_with_one_answer() {
        let health = Health::new(Gauge::default());
        for _ in 0..2 {
            health.failed(&broken());
            assert!(health.take_turn());
        }
        health.failed(&broken());
        assert!(!health.take_turn());
        assert_eq!(health.gauge.get(), 0);
        health.answered();
        assert!(health.take_turn());
        assert_eq!(health.gauge.get(), 1);
    }

    #[test]
    fn one_probe_at_a_time_when_the_rest_is_over() {
        let health = Health::new(Gauge::default());
        health.failed(&Failure::Status(StatusCode::TOO_MANY_REQUESTS, Some(Duration::ZERO)));
        assert!(health.take_turn(), "a rest of no length is over");
        assert!(!health.take_turn(), "a second caller waits for the probe");
        health.pass_turn();
        assert!(health.take_turn(), "the next one probes instead of one that left");
        health.failed(&broken());
        assert_eq!(health.gauge.get(), 0, "it rests on");
    }

    #[test]
    fn answers_that_begin_and_break_off_are_failures_in_a_row() {
        let health = Health::new(Gauge::default());
        for _ in 0..FAILURES_TOLERATED {
            assert!(health.take_turn());
            health.began();
            health.failed(&broken());
        }
        assert!(!health.take_turn());
    }

    #[test]
    fn our_own_lack_of_descriptors_is_not_held_against_it() {
        let health = Health::new(Gauge::default());
        (0..9).for_each(|_| health.failed(&Failure::NoDescriptors));
        assert!(health.take_turn());
    }
}
