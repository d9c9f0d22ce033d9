//! How much per how long: units, windows, algorithms, and the notation people write them in.

use std::fmt;
use std::str::FromStr;

use crate::names::UnknownName;

mod cost;
mod literal;
mod notation;
mod window;

pub use cost::Cost;
pub use window::{Span, Window};

/// No counter, and no product of a capacity and a window, reaches this: twice it is still exact in a
/// double, which is what Redis' Lua counts with.
const EXACT: u128 = 1 << 52;
/// The most quotas one text may list.
const QUOTAS_MAX: usize = 16;
/// Money is counted in millionths.
pub const MICROS: u64 = 1_000_000;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// Calls.
    Requests,
    /// Tokens in and out.
    Tokens,
    /// Tokens of the prompt.
    InputTokens,
    /// Tokens of the answer.
    OutputTokens,
    /// Money, in micro-units: `$1` is 1,000,000.
    Cost,
    /// Calls in flight.
    Concurrency,
}

impl Unit {
    /// Every unit.
    pub const ALL: [Unit; 6] =
        [Unit::Requests, Unit::Tokens, Unit::InputTokens, Unit::OutputTokens, Unit::Cost, Unit::Concurrency];

    /// The name used in identifiers: `input_tokens`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Unit::Requests => "requests",
            Unit::Tokens => "tokens",
            Unit::InputTokens => "input_tokens",
            Unit::OutputTokens => "output_tokens",
            Unit::Cost => "cost",
            Unit::Concurrency => "concurrency",
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How use is forgotten as time goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// One count per window of the wall clock. Up to twice the limit in a trailing window.
    FixedWindow,
    /// The count of this window plus the fading count of the one before.
    SlidingWindow,
    /// Never more than the limit in *any* trailing window.
    MovingWindow,
    /// A bucket that refills steadily (GCRA) and allows bursts.
    TokenBucket,
    /// Calls in flight, each a lease. How every `20 concurrent` is counted, and nothing else.
    Concurrency,
}

impl Algorithm {
    /// Every algorithm that a limit with a window can choose.
    pub const ALL: [Algorithm; 4] =
        [Algorithm::FixedWindow, Algorithm::SlidingWindow, Algorithm::MovingWindow, Algorithm::TokenBucket];

    /// The name used in configuration: `fixed_window`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::FixedWindow => "fixed_window",
            Algorithm::SlidingWindow => "sliding_window",
            Algorithm::MovingWindow => "moving_window",
            Algorithm::TokenBucket => "token_bucket",
            Algorithm::Concurrency => "concurrency",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Algorithm {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Algorithm, UnknownName> {
        let found = Algorithm::ALL.into_iter().find(|algorithm| algorithm.as_str() == name);
        found.ok_or_else(|| UnknownName::new("strategy", name, Algorithm::ALL.map(Algorithm::as_str)))
    }
}

/// Micro-units of money, for people: `$0.5`.
fn money(micros: u64) -> String {
    let fraction = format!("{:06}", micros % MICROS);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    format!("${}{point}{fraction}", micros / MICROS)
}

/// A capacity per window; one that exists is within bounds. Parsed from and displayed in the notation
/// `60/minute`, `10k tokens/day`, `$50/month`, `10/minute burst 5`, `20 concurrent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    amount: u64,
    unit: Unit,
    window: Option<Window>,
    burst: Option<u64>,
}

impl Quota {
    /// `amount` units (micro-units for [`Unit::Cost`]) per window.
    pub fn new(amount: u64, unit: Unit, window: Window) -> Result<Quota, QuotaError> {
        if unit == Unit::Concurrency {
            let advice = "use Quota::concurrent";
            return Err(QuotaError::new("concurrency", "calls in flight have no window", advice));
        }
        Quota { amount, unit, window: Some(window), burst: None }.checked()
    }

    /// At most `amount` calls in flight.
    pub fn concurrent(amount: u64) -> Result<Quota, QuotaError> {
        Quota { amount, unit: Unit::Concurrency, window: None, burst: None }.checked()
    }

    /// The same, with a bucket of this size. Only the token bucket has one.
    pub fn with_burst(self, burst: u64) -> Result<Quota, QuotaError> {
        Quota { burst: Some(burst), ..self }.checked()
    }

    /// A quota known when the program is written: [`limit!`](crate::limit!) has it read by the compiler.
    ///
    /// # Panics
    /// If it is none; in a constant that is an error of the compiler.
    pub const fn literal(text: &str) -> Quota {
        match literal::parse(text) {
            Ok(quota) => quota,
            Err(problem) => panic!("{}", problem),
        }
    }

    /// Every quota of a text like `10/minute;100/hour`. `unlimited` is none.
    pub fn parse_all(text: &str) -> Result<Vec<Quota>, QuotaError> {
        notation::parse_all(text)
    }

    /// Units per window; micro-units for [`Unit::Cost`]. Never 0.
    pub const fn amount(&self) -> u64 {
        self.amount
    }

    /// What is counted.
    pub const fn unit(&self) -> Unit {
        self.unit
    }

    /// How long. `None` for calls in flight.
    pub const fn window(&self) -> Option<Window> {
        self.window
    }

    /// The size of the bucket, when it was given.
    pub const fn burst(&self) -> Option<u64> {
        self.burst
    }

    /// The part of one of `instances`, rounded up: never 0.
    #[cfg(feature = "redis")]
    pub(crate) fn share(self, instances: u32) -> Quota {
        let part = |amount: u64| amount.div_ceil(u64::from(instances.max(1)));
        Quota { amount: part(self.amount), burst: self.burst.map(part), ..self }
    }

    /// The largest amount that is counted exactly.
    #[cfg(feature = "redis")]
    pub(crate) fn without_bound(self) -> Quota {
        Quota { amount: (EXACT - 1) as u64, ..self }
    }

    /// The gate: the finest time unit, in milliseconds, in which this algorithm counts the quota exactly.
    /// `None`: there is none. Only the sliding window and the bucket multiply amounts by time.
    pub(crate) fn resolution(&self, algorithm: Algorithm) -> Option<u64> {
        let largest = u128::from(self.amount.max(self.burst.unwrap_or(0)));
        let window = self.window.map_or(0, |window| u128::from(window.longest().get()));
        let fits = |unit: u64| match algorithm {
            Algorithm::FixedWindow | Algorithm::MovingWindow | Algorithm::Concurrency => largest < EXACT,
            Algorithm::SlidingWindow | Algorithm::TokenBucket => {
                largest * (window / u128::from(unit)) < EXACT
            }
        };
        [1, 10, 100, 1_000].into_iter().find(|unit| fits(*unit))
    }

    /// An amount of this quota's unit, for people: `$0.5`, `10000`.
    pub fn show(&self, amount: u64) -> String {
        if self.unit == Unit::Cost { money(amount) } else { amount.to_string() }
    }

    fn checked(self) -> Result<Quota, QuotaError> {
        let shown = self.to_string();
        if self.amount == 0 {
            let advice = "to refuse every request write `deny: true` instead of a limit";
            return Err(QuotaError::new(&shown, "nothing would ever be allowed", advice));
        }
        if self.burst == Some(0) {
            return Err(QuotaError::new(
                &shown,
                "a burst of 0 allows nothing",
                "leave it out, or write 1 or more",
            ));
        }
        if self.burst.is_some() && self.window.is_none() {
            return Err(QuotaError::new(&shown, "calls in flight have no burst", "leave it out"));
        }
        if u128::from(self.amount.max(self.burst.unwrap_or(0))) >= EXACT {
            let advice = format!("the most is {}", self.show((EXACT - 1) as u64));
            return Err(QuotaError::new(&shown, "too large to be counted exactly", &advice));
        }
        Ok(self)
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.show(self.amount))?;
        f.write_str(match self.unit {
            Unit::Requests | Unit::Cost => "",
            Unit::Tokens => " tokens",
            Unit::InputTokens => " input tokens",
            Unit::OutputTokens => " output tokens",
            Unit::Concurrency => " concurrent",
        })?;
        if let Some(window) = self.window {
            write!(f, "/{window}")?;
        }
        if let Some(burst) = self.burst {
            write!(f, " burst {}", self.show(burst))?;
        }
        Ok(())
    }
}

impl FromStr for Quota {
    type Err = QuotaError;

    fn from_str(text: &str) -> Result<Quota, QuotaError> {
        notation::parse(text)
    }
}

/// A quota that was refused: what was written, what is wrong, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaError {
    text: String,
    problem: String,
    advice: String,
}

impl QuotaError {
    fn new(text: &str, problem: &str, advice: &str) -> QuotaError {
        QuotaError {
            text: crate::names::excerpt(text),
            problem: problem.to_string(),
            advice: advice.to_string(),
        }
    }

    /// What is wrong, without what was written.
    pub fn problem(&self) -> &str {
        &self.problem
    }

    /// What to write instead.
    pub fn advice(&self) -> &str {
        &self.advice
    }
}

impl fmt::Display for QuotaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}; {}", self.text, self.problem, self.advice)
    }
}

impl std::error::Error for QuotaError {}
