//! One line in the log for each refusal, itself limited: an attack must not fill a disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tollgate_limiter::{Denial, Retry};

use crate::log::{Log, field};

/// Lines in one [`WINDOW`].
const LINES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

/// Which refusals are written down.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl Refusals {
    /// Writes a line about a refusal: `rule`, `subject`, `limit`, `used`, `requested`, `source`; `suppressed` says how many
    /// lines before it were left out.
    pub fn note(&self, log: &Log, request_id: &str, denial: &Denial) {
        let Some(suppressed) = self.turn(Instant::now()) else { return };
        log.line("WARN", "limited", |line| {
            let standing = denial.binding();
            line.text(field!("request_id"), request_id);
            line.text(field!("rule"), standing.limit.id());
            line.text(field!("subject"), standing.subject.as_str());
            line.text(field!("unit"), standing.limit.unit().as_str());
            line.number(field!("limit"), standing.limit.capacity());
            line.number(field!("used"), standing.used);
            line.number(field!("requested"), standing.requested);
            if let Retry::After(wait) = standing.retry {
                line.number(field!("retry_after_ms"), wait.get());
            }
            line.text(field!("source"), denial.source().as_str());
            if suppressed > 0 {
                line.number(field!("suppressed"), suppressed);
            }
        });
    }

    /// Whether this one is written: how many were not since the last one that was.
    fn turn(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.window.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            (state.window, state.lines) = (Some(now), 0);
        }
        if state.lines == LINES_MAX {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let refusals = Refusals::default();
        let start = Instant::now();
        let written = (0..1_000).filter(|_| refusals.turn(start).is_some()).count();
        assert_eq!(written, 20);
        assert_eq!(refusals.turn(start + WINDOW), Some(980));
        assert_eq!(refusals.turn(start + WINDOW), Some(0));
    }
}
