//! The last few of many durations, and how they were distributed.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

/// How many are remembered.
const REMEMBERED: usize = 256;

/// The last durations of one kind.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    micros: Vec<u32>,
    /// Where the next one goes once all places are taken.
    next: usize,
}

impl Recent {
    /// One more; in place of the oldest when there are many.
    pub fn add(&self, duration: Duration) {
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.micros.len() < REMEMBERED {
            ring.micros.push(micros);
            return;
        }
        let next = ring.next;
        ring.micros[next] = micros;
        ring.next = (next + 1) % REMEMBERED;
    }

    /// `{"p50":…,"p90":…,"p99":…,"count":…}`, milliseconds; `null` where there were none.
    pub fn percentiles(&self) -> Value {
        let mut sorted = self.0.lock().unwrap_or_else(PoisonError::into_inner).micros.clone();
        if sorted.is_empty() {
            return Value::Null;
        }
        sorted.sort_unstable();
        // The smallest value that so many of a hundred do not exceed.
        let rank = |percent: usize| (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        let millis = |percent| f64::from(sorted[rank(percent)]) / 1_000.0;
        json!({ "p50": millis(50), "p90": millis(90), "p99": millis(99), "count": sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_last_ones() {
        let recent = Recent::default();
        assert_eq!(recent.percentiles(), Value::Null);
        recent.add(Duration::from_millis(7));
        assert_eq!(recent.percentiles(), json!({ "p50": 7.0, "p90": 7.0, "p99": 7.0, "count": 1 }));
        for _ in 0..REMEMBERED {
            recent.add(Duration::from_secs(9));
        }
        for millis in 1..=REMEMBERED as u64 {
            recent.add(Duration::from_millis(millis));
        }
        assert_eq!(recent.percentiles(), json!({ "p50": 128.0, "p90": 231.0, "p99": 254.0, "count": 256 }));
    }
}
