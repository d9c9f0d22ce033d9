//! How long a quota lasts.

use std::fmt;

use super::QuotaError;
use crate::clock::Millis;

/// The longest window.
const WINDOW_DAYS_MAX: u64 = 366;

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
    pub const ALL: [Span; 6] = [Span::Second, Span::Minute, Span::Hour, Span::Day, Span::Week, Span::Month];

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
            return Err(QuotaError::new(&window.to_string(), "a window of no length", "write 1 or more"));
        }
        if span == Span::Month && count > 1 {
            let advice = "write `month`, or a number of days";
            return Err(QuotaError::new(&window.to_string(), "calendar months cannot be multiplied", advice));
        }
        if count > WINDOW_DAYS_MAX * Span::Day.seconds() / span.seconds() {
            return Err(QuotaError::new(&window.to_string(), "too long a window", "366 days is the longest"));
        }
        Ok(window)
    }

    /// A window of whole seconds, in the largest span up to a day that divides it: 3600 is one hour.
    pub fn from_secs(seconds: u64) -> Result<Window, QuotaError> {
        let spans = [Span::Day, Span::Hour, Span::Minute, Span::Second];
        let span =
            spans.into_iter().find(|span| seconds.is_multiple_of(span.seconds())).unwrap_or(Span::Second);
        Window::new(seconds / span.seconds(), span)
    }

    /// `None`: no length, too long, or several months.
    pub(super) const fn checked(count: u64, span: Span) -> Option<Window> {
        let most = if matches!(span, Span::Month) {
            1
        } else {
            WINDOW_DAYS_MAX * Span::Day.seconds() / span.seconds()
        };
        if count == 0 || count > most { None } else { Some(Window { count, span }) }
    }

    /// As long as a lease: what calls in flight have for a window.
    pub(crate) const LEASE: Window = Window { count: crate::spec::LEASE.ceil_secs(), span: Span::Second };

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
