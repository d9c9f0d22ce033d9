//! A limit, what it is per, and one request's charge against it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::names::UnknownName;
use crate::quota::{Algorithm, Quota, Span, Unit, Window};
use crate::spec::Rate;

/// The longest name of a rule.
const RULE_BYTES_MAX: usize = 128;

/// One thing a limit can be per.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dimension {
    /// The caller's address.
    Ip,
    /// The caller's session.
    Session,
    /// The key, by its identifier.
    ApiKey,
    /// The user a key belongs to.
    User,
    /// The user's team.
    Team,
    /// The user's tier.
    Tier,
    /// The model asked for.
    Model,
    /// The route asked for.
    Endpoint,
}

impl Dimension {
    /// Every dimension, in the order in which a subject names them.
    pub const ALL: [Dimension; 8] = [
        Dimension::Ip,
        Dimension::Session,
        Dimension::ApiKey,
        Dimension::User,
        Dimension::Team,
        Dimension::Tier,
        Dimension::Model,
        Dimension::Endpoint,
    ];

    /// The name used in configuration and subjects: `api_key`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Dimension::Ip => "ip",
            Dimension::Session => "session",
            Dimension::ApiKey => "api_key",
            Dimension::User => "user",
            Dimension::Team => "team",
            Dimension::Tier => "tier",
            Dimension::Model => "model",
            Dimension::Endpoint => "endpoint",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Dimension {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Dimension, UnknownName> {
        let found = Dimension::ALL
            .into_iter()
            .find(|dimension| dimension.as_str() == name);
        found.ok_or_else(|| UnknownName::new("scope", name, Dimension::ALL.map(Dimension::as_str)))
    }
}

/// What a limit is per: a set of dimensions. The empty set is global: one counter for everybody.
/// Displayed as in metrics: `user,model`, `global`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scope(u8);

impl Scope {
    /// One counter for everybody.
    pub const GLOBAL: Scope = Scope(0);

    /// The set of these dimensions.
    pub fn of(dimensions: impl IntoIterator<Item = Dimension>) -> Scope {
        Scope(
            dimensions
                .into_iter()
                .fold(0, |set, dimension| set | dimension.bit()),
        )
    }

    /// Whether the limit is per this.
    pub const fn contains(self, dimension: Dimension) -> bool {
        self.0 & dimension.bit() != 0
    }

    /// The dimensions, in the order of [`Dimension::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Dimension> {
        Dimension::ALL
            .into_iter()
            .filter(move |dimension| self.contains(*dimension))
    }

    /// The scope filled in for one request: `user:alice:model:gpt-4o`. Separators and control characters in
    /// values are percent-encoded, so different values never make the same subject. The caller bounds the
    /// length of values that come from outside.
    pub fn subject<'v>(self, mut value: impl FnMut(Dimension) -> Cow<'v, str>) -> Subject {
        if self == Scope::GLOBAL {
            return Subject {
                text: Arc::from("global"),
                unauthenticated: false,
            };
        }
        let mut text = String::with_capacity(64);
        for dimension in self.iter() {
            if !text.is_empty() {
                text.push(':');
            }
            text.push_str(dimension.as_str());
            text.push(':');
            encode(&value(dimension), &mut text);
        }
        Subject {
            text: text.into(),
            unauthenticated: false,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Scope::GLOBAL {
            return f.write_str("global");
        }
        for (index, dimension) in self.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            f.write_str(dimension.as_str())?;
        }
        Ok(())
    }
}

/// Whose counter it is: a scope filled in. Cheap to clone; equal when the text is.
#[derive(Clone)]
pub struct Subject {
    text: Arc<str>,
    unauthenticated: bool,
}

impl Subject {
    /// Marks a subject whose values any stranger can make up. Stores keep those in a budget of their own, so that
    /// they never push out the counters of known callers.
    pub fn unauthenticated(self) -> Subject {
        Subject {
            unauthenticated: true,
            ..self
        }
    }

    /// Whether it was marked as made up by a stranger.
    pub const fn is_unauthenticated(&self) -> bool {
        self.unauthenticated
    }

    /// The canonical text: `user:alice:model:gpt-4o`, `global`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn shared_text(&self) -> Arc<str> {
        Arc::clone(&self.text)
    }
}

impl PartialEq for Subject {
    fn eq(&self, other: &Subject) -> bool {
        Arc::ptr_eq(&self.text, &other.text) || self.text == other.text
    }
}

impl Eq for Subject {}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subject({})", self.text)
    }
}

/// Text that is no subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubjectError(String);

impl fmt::Display for SubjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no subject; write `global`, or scopes and values in order such as `user:alice:model:m`",
            self.0
        )
    }
}

impl std::error::Error for SubjectError {}

impl FromStr for Subject {
    type Err = SubjectError;

    /// Reads the canonical text back.
    fn from_str(text: &str) -> Result<Subject, SubjectError> {
        let wrong = || SubjectError(crate::names::excerpt(text));
        let mut parts = text.split(':');
        let mut last = None;
        while let Some(name) = parts.next() {
            if text == "global" {
                break;
            }
            let dimension: Dimension = name.parse().map_err(|_| wrong())?;
            let value = parts.next().ok_or_else(wrong)?;
            if last >= Some(dimension) || value.chars().any(|c| c.is_control() || matches!(c, '{' | '}')) {
                return Err(wrong());
            }
            last = Some(dimension);
        }
        Ok(Subject {
            text: text.into(),
            unauthenticated: false,
        })
    }
}

/// One quota of one rule: what is counted, how, and per what. One that exists can be counted exactly.
#[derive(Clone, Debug)]
pub struct Limit {
    id: String,
    rule: String,
    quota: Quota,
    scope: Scope,
    rate: Rate,
    shadow: bool,
}

impl Limit {
    /// The gate: refuses what cannot be counted exactly, and a burst on anything but a token bucket. A calendar
    /// month is a fixed window whatever `algorithm` says.
    pub fn new(rule: &str, quota: Quota, algorithm: Algorithm, scope: Scope) -> Result<Limit, LimitError> {
        let refused = |problem: String| {
            Err(LimitError {
                rule: crate::names::excerpt(rule),
                problem,
            })
        };
        if rule.is_empty() || rule.len() > RULE_BYTES_MAX || rule.chars().any(|c| c.is_control() || c == '"')
        {
            return refused(
                "the name of a rule is 1 to 128 bytes, without quotes and control characters".into(),
            );
        }
        let Some(window) = quota.window() else {
            return refused(format!(
                "`{quota}`: limits on calls in flight are not supported; limit requests per window"
            ));
        };
        let algorithm = if window.span() == Span::Month {
            Algorithm::FixedWindow
        } else {
            algorithm
        };
        if quota.burst().is_some() && algorithm != Algorithm::TokenBucket {
            return refused(format!(
                "`{quota}`: burst needs token_bucket, this limit is {algorithm}; leave it out"
            ));
        }
        let Some(rate) = Rate::new(&quota, window, algorithm) else {
            let advice = "write fixed_window for it";
            return refused(format!(
                "`{quota}` is too large to be counted exactly as {algorithm}; {advice}"
            ));
        };
        let id = format!("{rule}-{}-{}", quota.unit(), window.to_string().replace(' ', "-"));
        Ok(Limit {
            id,
            rule: rule.to_string(),
            quota,
            scope,
            rate,
            shadow: false,
        })
    }

    /// The same limit, counting and reporting but never refusing. Charged only when it fits.
    pub fn shadow(self) -> Limit {
        Limit { shadow: true, ..self }
    }

    /// Whether it only counts and reports.
    pub const fn is_shadow(&self) -> bool {
        self.shadow
    }

    /// `<rule>-<unit>-<window>`: `free-requests-minute`, `free-requests-15-minutes`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of its rule.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// Its quota.
    pub const fn quota(&self) -> &Quota {
        &self.quota
    }

    /// What is counted.
    pub const fn unit(&self) -> Unit {
        self.quota.unit()
    }

    /// How long it lasts.
    pub const fn window(&self) -> Window {
        self.rate.window()
    }

    /// How it is counted.
    pub const fn algorithm(&self) -> Algorithm {
        self.rate.algorithm()
    }

    /// What it is per.
    pub const fn scope(&self) -> Scope {
        self.scope
    }

    /// The most that can be taken at once: the quota, or the size of the bucket. More than that is refused for ever.
    pub const fn capacity(&self) -> u64 {
        self.rate.at_once()
    }

    /// The numbers the definition works with.
    pub const fn rate(&self) -> &Rate {
        &self.rate
    }

    /// What it promises at worst: `at most 60 per minute window, at most 120 in any 60 s`.
    pub fn guarantee(&self) -> String {
        let noun = match self.unit() {
            Unit::Requests | Unit::Cost => String::new(),
            unit => format!(" {}", unit.as_str().replace('_', " ")),
        };
        let amount = |n: u64| format!("{}{noun}", self.quota.show(n));
        let (limit, window, any) = (self.quota.amount(), self.window(), self.window().in_smaller());
        match self.algorithm() {
            Algorithm::FixedWindow => {
                let name = if window.span() == Span::Month {
                    "calendar month (UTC)"
                } else {
                    &format!("{window} window")
                };
                format!(
                    "at most {} per {name}, at most {} in any {any}",
                    amount(limit),
                    self.quota.show(2 * limit)
                )
            }
            Algorithm::SlidingWindow => {
                format!(
                    "at most {} per {window} on average, fewer than {} in any {any}",
                    amount(limit),
                    self.quota.show(2 * limit)
                )
            }
            Algorithm::MovingWindow => format!("at most {} in any {any}", amount(limit)),
            Algorithm::TokenBucket => {
                let burst = self.capacity();
                format!(
                    "at most {} at once, at most {} in any {any}",
                    amount(burst),
                    self.quota.show(limit + burst)
                )
            }
        }
    }

    /// Whether both count in the same counter of a subject. The capacity is not compared: a limit that was raised
    /// or lowered keeps what was used.
    pub fn same_counter(&self, other: &Limit) -> bool {
        self.algorithm() == other.algorithm() && self.window() == other.window() && self.id == other.id
    }
}

/// A limit that was refused: of which rule, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitError {
    rule: String,
    problem: String,
}

impl LimitError {
    /// What is wrong, without the rule's name.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl fmt::Display for LimitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule `{}`: {}", self.rule, self.problem)
    }
}

impl std::error::Error for LimitError {}

/// One limit met by one request: whose counter, and how much.
#[derive(Clone, Debug)]
pub struct Charge {
    limit: Arc<Limit>,
    subject: Subject,
    amount: u64,
}

impl Charge {
    /// Takes exactly `amount`; more than the limit's capacity is refused for ever.
    pub fn new(limit: Arc<Limit>, subject: Subject, amount: u64) -> Charge {
        Charge {
            limit,
            subject,
            amount,
        }
    }

    /// Takes an estimate: at most the limit's capacity, so that a small limit can be met at all.
    pub fn estimate(limit: Arc<Limit>, subject: Subject, amount: u64) -> Charge {
        let amount = amount.min(limit.capacity());
        Charge {
            limit,
            subject,
            amount,
        }
    }

    /// The limit that is met.
    pub const fn limit(&self) -> &Arc<Limit> {
        &self.limit
    }

    /// Whose counter.
    pub const fn subject(&self) -> &Subject {
        &self.subject
    }

    /// How much.
    pub const fn amount(&self) -> u64 {
        self.amount
    }

    pub(crate) fn into_parts(self) -> (Arc<Limit>, Subject, u64) {
        (self.limit, self.subject, self.amount)
    }
}

/// What charge `index` needs from its counter when the ones before it are taken: its own amount, and that of any
/// earlier charge on the same counter.
pub(crate) fn demand(charges: &[Charge], index: usize) -> u64 {
    let charge = &charges[index];
    let same = |other: &&Charge| {
        (Arc::ptr_eq(&other.limit, &charge.limit) || other.limit.same_counter(&charge.limit))
            && other.subject == charge.subject
    };
    let earlier = charges[..index].iter().filter(same);
    earlier.fold(charge.amount, |sum, other| sum.saturating_add(other.amount))
}

fn encode(value: &str, out: &mut String) {
    let plain = |c: char| !(c.is_control() || matches!(c, '{' | '}' | ':' | '%'));
    let mut rest = value;
    while let Some(at) = rest.find(|c| !plain(c)) {
        let (before, after) = rest.split_at(at);
        out.push_str(before);
        let length = after.chars().next().map_or(0, char::len_utf8);
        let (special, after) = after.split_at(length);
        for byte in special.bytes() {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
            }
        }
        rest = after;
    }
    out.push_str(rest);
}
