//! Whether a provider answers these days: learned from its answers, without asking it for anything extra.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;
use prometheus_client::metrics::gauge::Gauge;

use super::Failure;

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
    born: Instant,
    failures: AtomicU32,
    /// Milliseconds since `born`; 0: not resting.
    rests_until: AtomicU64,
    gauge: Gauge,
}

impl Health {
    /// A provider nothing is known against.
    pub fn new(gauge: Gauge) -> Self {
        gauge.set(1);
        Self { born: Instant::now(), failures: AtomicU32::new(0), rests_until: AtomicU64::new(0), gauge }
    }

    /// Whether to ask it now in its turn. A `true` after a rest is given to one caller only.
    pub fn take_turn(&self) -> bool {
        let until = self.rests_until.load(Ordering::Relaxed);
        if until == 0 {
            return true;
        }
        let now = self.now();
        let probe_by = now + millis(REST_FIRST);
        let (order, ignored) = (Ordering::Relaxed, Ordering::Relaxed);
        now >= until && self.rests_until.compare_exchange(until, probe_by, order, ignored).is_ok()
    }

    pub(super) fn answered(&self) {
        if self.failures.swap(0, Ordering::Relaxed) > 0 {
            self.rests_until.store(0, Ordering::Relaxed);
            self.gauge.set(1);
        }
    }

    pub(super) fn failed(&self, failure: &Failure) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let rest = match failure {
            // It said itself for how long.
            Failure::Status(StatusCode::TOO_MANY_REQUESTS, Some(wait)) => (*wait).min(REST_MAX),
            _ if failures < FAILURES_TOLERATED => return,
            _ => (REST_FIRST * 2u32.saturating_pow((failures - FAILURES_TOLERATED).min(8))).min(REST_MAX),
        };
        self.rests_until.store((self.now() + millis(rest)).max(1), Ordering::Relaxed);
        self.gauge.set(0);
    }

    fn now(&self) -> u64 {
        millis(self.born.elapsed())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_after_three_failures_and_recovers_with_one_answer() {
        let health = Health::new(Gauge::default());
        for _ in 0..2 {
            health.failed(&Failure::Broken(String::new()));
            assert!(health.take_turn());
        }
        health.failed(&Failure::Broken(String::new()));
        assert!(!health.take_turn());
        assert_eq!(health.gauge.get(), 0);
        health.answered();
        assert!(health.take_turn());
        assert_eq!(health.gauge.get(), 1);
    }

    #[test]
    fn one_probe_when_the_rest_is_over() {
        let health = Health::new(Gauge::default());
        health.failed(&Failure::Status(StatusCode::TOO_MANY_REQUESTS, Some(Duration::ZERO)));
        while health.now() < 1 {
            std::hint::spin_loop();
        }
        assert!(health.take_turn(), "the rest of zero length is over");
        assert!(!health.take_turn(), "a second caller waits for the probe");
    }
}
