//! How much per how long: units, windows, algorithms, and the notation people write them in.

use std::fmt;
use std::str::FromStr;

use crate::clock::Millis;
use crate::names::UnknownName;

mod notation;

/// No counter, and no product of a capacity and a window, reaches this: twice it is still exact in a
/// double, which is what Redis' Lua counts with.
const EXACT: u128 = 1 << 52;
/// The most quotas one text may list.
const QUOTAS_MAX: usize = 16;
/// The longest window.
const WINDOW_DAYS_MAX: u64 = 366;
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
    pub const ALL: [Unit; 6] = [
        Unit::Requests,
        Unit::Tokens,
        Unit::InputTokens,
        Unit::OutputTokens,
        Unit::Cost,
        Unit::Concurrency,
    ];

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
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Algorithm; 4] = [
        Algorithm::FixedWindow,
        Algorithm::SlidingWindow,
        Algorithm::MovingWindow,
        Algorithm::TokenBucket,
    ];

    /// The name used in configuration: `fixed_window`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::FixedWindow => "fixed_window",
            Algorithm::SlidingWindow => "sliding_window",
            Algorithm::MovingWindow => "moving_window",
            Algorithm::TokenBucket => "token_bucket",
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
        let found = Algorithm::ALL
            .into_iter()
            .find(|algorithm| algorithm.as_str() == name);
        found.ok_or_else(|| UnknownName::new("strategy", name, Algorithm::ALL.map(Algorithm::as_str)))
    }
}

/// The step a window is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Span {
    /// 1 s.
    Second,
    /// 60 s.
    Minute,
    /// 60 minutes.
    Hour,
    /// A day in UTC.
    Day,
    /// Seven days from Monday, in UTC.
    Week,
    /// A calendar month in UTC.
    Month,
}

impl Span {
    /// Every span.
    pub const ALL: [Span; 6] = [
        Span::Second,
        Span::Minute,
        Span::Hour,
        Span::Day,
        Span::Week,
        Span::Month,
    ];

    /// The singular: `minute`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Span::Second => "second",
            Span::Minute => "minute",
            Span::Hour => "hour",
            Span::Day => "day",
            Span::Week => "week",
            Span::Month => "month",
        }
    }

    /// Seconds; of the longest month for `Month`.
    const fn seconds(self) -> u64 {
        match self {
            Span::Second => 1,
            Span::Minute => 60,
            Span::Hour => 3_600,
            Span::Day => 86_400,
            Span::Week => 7 * 86_400,
            Span::Month => 31 * 86_400,
        }
    }
}

/// How long a quota lasts: `minute`, `15 minutes`, a calendar month. Displayed the way it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    count: u64,
    span: Span,
}

impl Window {
    /// `count` spans, at most 366 days together; a month cannot be multiplied.
    pub fn new(count: u64, span: Span) -> Result<Window, QuotaError> {
        let window = Window { count, span };
        if count == 0 {
            return Err(QuotaError::new(
                &window.to_string(),
                "a window of no length",
                "write 1 or more",
            ));
        }
        if span == Span::Month && count > 1 {
            let advice = "write `month`, or a number of days";
            return Err(QuotaError::new(
                &window.to_string(),
                "calendar months cannot be multiplied",
                advice,
            ));
        }
        if count > WINDOW_DAYS_MAX * Span::Day.seconds() / span.seconds() {
            return Err(QuotaError::new(
                &window.to_string(),
                "too long a window",
                "366 days is the longest",
            ));
        }
        Ok(window)
    }

    /// A window of whole seconds, in the largest span up to a day that divides it: 3600 is one hour.
    pub fn from_secs(seconds: u64) -> Result<Window, QuotaError> {
        let spans = [Span::Day, Span::Hour, Span::Minute, Span::Second];
        let span = spans
            .into_iter()
            .find(|span| seconds.is_multiple_of(span.seconds()))
            .unwrap_or(Span::Second);
        Window::new(seconds / span.seconds(), span)
    }

    /// How many spans.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// Which span.
    pub const fn span(self) -> Span {
        self.span
    }

    /// Its length. `None` for a calendar month, which has no one length.
    pub fn length(self) -> Option<Millis> {
        (self.span != Span::Month).then(|| self.longest())
    }

    /// Its length; of a calendar month, the longest one: 31 days.
    pub const fn longest(self) -> Millis {
        Millis::from_secs(self.count * self.span.seconds())
    }

    /// The length in the next smaller span, for sentences: a minute is `60 s`.
    pub(crate) fn in_smaller(self) -> String {
        match (self.count, self.span) {
            (_, Span::Month) => "28 days".into(),
            (1, Span::Minute) => "60 s".into(),
            (1, Span::Hour) => "60 minutes".into(),
            (1, Span::Day) => "24 hours".into(),
            (1, Span::Week) => "7 days".into(),
            (count, Span::Second) => format!("{count} s"),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => f.write_str(self.span.as_str()),
            count => write!(f, "{count} {}s", self.span.as_str()),
        }
    }
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
            return Err(QuotaError::new(
                "concurrency",
                "calls in flight have no window",
                advice,
            ));
        }
        Quota {
            amount,
            unit,
            window: Some(window),
            burst: None,
        }
        .checked()
    }

    /// At most `amount` calls in flight.
    pub fn concurrent(amount: u64) -> Result<Quota, QuotaError> {
        Quota {
            amount,
            unit: Unit::Concurrency,
            window: None,
            burst: None,
        }
        .checked()
    }

    /// The same, with a bucket of this size. Only the token bucket has one.
    pub fn with_burst(self, burst: u64) -> Result<Quota, QuotaError> {
        Quota {
            burst: Some(burst),
            ..self
        }
        .checked()
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

    /// The gate: the finest time unit, in milliseconds, in which this algorithm counts the quota exactly.
    /// `None`: there is none. Only the sliding window and the bucket multiply amounts by time.
    pub(crate) fn resolution(&self, algorithm: Algorithm) -> Option<u64> {
        let largest = u128::from(self.amount.max(self.burst.unwrap_or(0)));
        let window = u128::from(self.window?.longest().get());
        let fits = |unit: u64| match algorithm {
            Algorithm::FixedWindow | Algorithm::MovingWindow => largest < EXACT,
            Algorithm::SlidingWindow | Algorithm::TokenBucket => {
                largest * (window / u128::from(unit)) < EXACT
            }
        };
        [1, 10, 100, 1_000].into_iter().find(|unit| fits(*unit))
    }

    /// An amount of this quota's unit, for people: `$0.5`, `10000`.
    pub(crate) fn show(&self, amount: u64) -> String {
        if self.unit != Unit::Cost {
            return amount.to_string();
        }
        let fraction = format!("{:06}", amount % MICROS);
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() { "" } else { "." };
        format!("${}{point}{fraction}", amount / MICROS)
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
            return Err(QuotaError::new(
                &shown,
                "calls in flight have no burst",
                "leave it out",
            ));
        }
        if u128::from(self.amount.max(self.burst.unwrap_or(0))) >= EXACT {
            let advice = format!("the most is {}", self.show((EXACT - 1) as u64));
            return Err(QuotaError::new(
                &shown,
                "too large to be counted exactly",
                &advice,
            ));
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
