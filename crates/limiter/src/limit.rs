//! A limit, and one request's charge against it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::names::UnknownName;
use crate::quota::{Algorithm, Quota, Span, Unit, Window};
use crate::scope::{Scope, Subject};
use crate::spec::Rate;

/// The longest name of a rule.
const RULE_BYTES_MAX: usize = 128;

/// What a limit says while the store that everybody shares does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenDown {
    /// This process counts by itself, up to its share of the limit: an equal part for every process.
    #[default]
    Share,
    /// Everything is allowed, and nothing is counted.
    Open,
    /// Nothing is allowed: an error, never a refusal.
    Closed,
}

impl WhenDown {
    /// Every one of them.
    pub const ALL: [WhenDown; 3] = [WhenDown::Share, WhenDown::Open, WhenDown::Closed];

    /// The name used in configuration: `share`.
    pub const fn as_str(self) -> &'static str {
        match self {
            WhenDown::Share => "share",
            WhenDown::Open => "open",
            WhenDown::Closed => "closed",
        }
    }
}

impl fmt::Display for WhenDown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for WhenDown {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<WhenDown, UnknownName> {
        let found = WhenDown::ALL.into_iter().find(|mode| mode.as_str() == name);
        found.ok_or_else(|| UnknownName::new("mode", name, WhenDown::ALL.map(WhenDown::as_str)))
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
    when_down: WhenDown,
    replicated: bool,
}

impl Limit {
    /// The gate: refuses what cannot be counted exactly, and a burst on anything but a token bucket. A calendar
    /// month is a fixed window and calls in flight are leases, whatever `algorithm` says.
    pub fn new(rule: &str, quota: Quota, algorithm: Algorithm, scope: Scope) -> Result<Limit, LimitError> {
        let refused = |problem: String| Err(LimitError { rule: crate::names::excerpt(rule), problem });
        if rule.is_empty() || rule.len() > RULE_BYTES_MAX || rule.chars().any(|c| c.is_control() || c == '"')
        {
            return refused(
                "the name of a rule is 1 to 128 bytes, without quotes and control characters".into(),
            );
        }
        let window = quota.window().unwrap_or(Window::LEASE);
        let algorithm = match quota.window() {
            None => Algorithm::Concurrency,
            Some(_) if algorithm == Algorithm::Concurrency => {
                return refused(format!("`{quota}`: only calls in flight are leases; write `20 concurrent`"));
            }
            Some(window) if window.span() == Span::Month => Algorithm::FixedWindow,
            Some(_) => algorithm,
        };
        if quota.burst().is_some() && algorithm != Algorithm::TokenBucket {
            return refused(format!(
                "`{quota}`: burst needs token_bucket, this limit is {algorithm}; leave it out"
            ));
        }
        let Some(rate) = Rate::new(&quota, window, algorithm) else {
            let advice = "write fixed_window for it";
            return refused(format!("`{quota}` is too large to be counted exactly as {algorithm}; {advice}"));
        };
        let id = match quota.window() {
            None => format!("{rule}-{}", quota.unit()),
            Some(window) => format!("{rule}-{}-{}", quota.unit(), window.to_string().replace(' ', "-")),
        };
        Ok(Limit {
            id,
            rule: rule.to_string(),
            quota,
            scope,
            rate,
            shadow: false,
            when_down: WhenDown::Share,
            replicated: false,
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

    /// The same limit, saying this while a shared store does not answer, instead of [`WhenDown::Share`].
    pub fn when_down(self, when_down: WhenDown) -> Limit {
        Limit { when_down, ..self }
    }

    /// What it says while a shared store does not answer.
    pub const fn while_down(&self) -> WhenDown {
        self.when_down
    }

    /// The same limit, granting only what a replica of the shared store has, too, so that a failover never forgets it.
    /// Without the word of one in time, the charge stands and the answer is that of [`Limit::when_down`]. Calls in flight
    /// are renewed all the time, so those on them do not wait.
    pub fn replicated(self) -> Limit {
        Limit { replicated: true, ..self }
    }

    /// Whether it grants only what a replica has, too.
    pub const fn is_replicated(&self) -> bool {
        self.replicated
    }

    /// Whether a grant waits for a replica.
    #[cfg(feature = "redis")]
    pub(crate) fn waits(&self) -> bool {
        self.replicated && !self.shadow && self.algorithm() != Algorithm::Concurrency
    }

    /// The part of one of `instances`: quota and burst divided, rounded up. Counts in the same counter.
    #[cfg(feature = "redis")]
    pub(crate) fn share(&self, instances: u32) -> Limit {
        let quota = self.quota.share(instances);
        // A smaller amount passes every gate that a larger one passed.
        let rate = Rate::new(&quota, self.rate.window(), self.rate.algorithm()).unwrap_or(self.rate);
        Limit { quota, rate, ..self.clone() }
    }

    /// With room for everything that may have been granted elsewhere. Counts in the same counter.
    #[cfg(feature = "redis")]
    pub(crate) fn without_bound(&self) -> Limit {
        let quota = self.quota.without_bound();
        let rate = Rate::new(&quota, self.rate.window(), self.rate.algorithm()).unwrap_or(self.rate);
        Limit { quota, rate, ..self.clone() }
    }

    /// `<rule>-<unit>-<window>`: `free-requests-minute`, `free-requests-15-minutes`, `free-concurrency`.
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

    /// How long it lasts. Of calls in flight: how long a lease does, [`LEASE`](crate::spec::LEASE).
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
            Unit::Requests | Unit::Cost | Unit::Concurrency => String::new(),
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
            Algorithm::Concurrency => format!("at most {limit} in flight at any moment"),
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
    #[cfg(feature = "tower")]
    pub(crate) fn new(rule: &str, problem: String) -> LimitError {
        LimitError { rule: crate::names::excerpt(rule), problem }
    }

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
        Charge { limit, subject, amount }
    }

    /// Takes an estimate: at most the limit's capacity, so that a small limit can be met at all.
    pub fn estimate(limit: Arc<Limit>, subject: Subject, amount: u64) -> Charge {
        let amount = amount.min(limit.capacity());
        Charge { limit, subject, amount }
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

/// What asks a counter for an amount: a charge, or what was said to one.
pub(crate) trait Claim {
    fn limit(&self) -> &Arc<Limit>;
    fn subject(&self) -> &Subject;
    fn amount(&self) -> u64;
}

impl Claim for Charge {
    fn limit(&self) -> &Arc<Limit> {
        &self.limit
    }

    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn amount(&self) -> u64 {
        self.amount
    }
}

/// What claim `index` needs from its counter when the ones before it are taken: its own amount, and that of any
/// earlier claim on the same counter.
pub(crate) fn demand<C: Claim>(claims: &[C], index: usize) -> u64 {
    let claim = &claims[index];
    let same = |other: &&C| {
        let one_limit =
            Arc::ptr_eq(other.limit(), claim.limit()) || other.limit().same_counter(claim.limit());
        one_limit && other.subject() == claim.subject()
    };
    let earlier = claims[..index].iter().filter(same);
    earlier.fold(claim.amount(), |sum, other| sum.saturating_add(other.amount()))
}
