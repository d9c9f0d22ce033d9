//! What is kept of a series of figures: enough to say a value that the next will rarely exceed.

use super::Bounds;

/// How many answers are remembered.
const ANSWERS: usize = 64;
/// Below this many, a 95th percentile says nothing: the start, or the largest seen, whichever is more.
const ANSWERS_MIN: usize = 20;

/// The tokens of the latest answers.
pub(super) struct Answers {
    /// A ring: the next one is written at `seen % ANSWERS`.
    latest: [u32; ANSWERS],
    seen: u64,
    high: u32,
}

impl Answers {
    /// None yet; estimated at `start`.
    pub(super) fn new(start: u64) -> Self {
        Self { latest: [0; ANSWERS], seen: 0, high: saturated(start) }
    }

    /// One more answer.
    pub(super) fn add(&mut self, tokens: u64) {
        let tokens = saturated(tokens);
        let place = &mut self.latest[(self.seen % ANSWERS as u64) as usize];
        let forgotten = std::mem::replace(place, tokens);
        let full = self.seen >= ANSWERS as u64;
        self.seen = self.seen.saturating_add(1);
        // One for another on the same side of the percentile: it stays where it is.
        let (low, high) = (tokens.min(forgotten), tokens.max(forgotten));
        if full && (low == high || high < self.high || low > self.high) {
            return;
        }
        let known = self.seen.min(ANSWERS as u64) as usize;
        self.high = match known {
            0..ANSWERS_MIN => self.high.max(tokens),
            _ => {
                let mut sorted = self.latest;
                let rank = (known * 95).div_ceil(100) - 1;
                *sorted[..known].select_nth_unstable(rank).1
            }
        };
    }

    /// Their 95th percentile.
    pub(super) fn high(&self) -> u64 {
        self.high.into()
    }
}

fn saturated(tokens: u64) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// A mean that follows, and how far figures lie from it.
pub(super) struct Level {
    bounds: Bounds,
    mean: f64,
    deviation: f64,
}

impl Level {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, mean: bounds.start, deviation: 0.0 }
    }

    /// One more figure; `gain`, 0 to 1, is its weight.
    pub(super) fn learn(&mut self, figure: f64, gain: f64) {
        let distance = figure.clamp(self.bounds.min, self.bounds.max) - self.mean;
        self.mean += gain * distance;
        self.deviation += gain * (distance.abs() - self.deviation);
    }

    pub(super) fn mean(&self) -> f64 {
        self.mean
    }

    /// Two deviations above the mean: of figures that scatter evenly, nineteen of twenty are lower.
    pub(super) fn high(&self) -> f64 {
        (self.mean + 2.0 * self.deviation).clamp(self.bounds.min, self.bounds.max)
    }
}
