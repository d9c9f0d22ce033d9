//! What a client is told: the header families in use, all from the one decision.

use std::fmt::Write;

use http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};

use crate::clock::Millis;
use crate::quota::{Algorithm, Unit};
use crate::reservation::{Denial, Reservation, Standing};
use crate::spec::Retry;
use crate::store::Source;

/// A wait longer than this is not worth a client's own retry.
const RETRY_WORTHWHILE_MAX: Millis = Millis::from_secs(60);

/// A set of headers that some clients read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `ratelimit-policy: "free-requests-minute";q=60;w=60` and `ratelimit: "free-requests-minute";r=12;t=3`, one
    /// item per limit (IETF draft-ietf-httpapi-ratelimit-headers).
    RateLimit,
    /// `x-ratelimit-limit`, `-remaining`, `-reset` (Unix seconds) of the limit that refused, or has the least left.
    XRateLimit,
    /// `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` as OpenAI sends them; a reset is a Go duration: `6m0s`.
    OpenAi,
    /// `anthropic-ratelimit-{requests,tokens}-{limit,remaining,reset}`; a reset is a date of RFC 3339.
    Anthropic,
    /// `x-tollgate-source`: where the decision came from.
    Source,
}

/// Of a request that was let through.
pub(super) fn granted(headers: &mut HeaderMap, families: &[Family], reservation: &Reservation) {
    let (standings, now, source) = (reservation.standings(), reservation.now(), reservation.source());
    Told { standings, refused: None, now, source }.tell(headers, families);
}

/// Of a request that was refused.
pub(super) fn denial(headers: &mut HeaderMap, families: &[Family], denial: &Denial) {
    let wait = wait(denial);
    if let Some(wait) = wait {
        headers.insert(RETRY_AFTER, wait.ceil_secs().into());
        headers.insert(HeaderName::from_static("retry-after-ms"), wait.get().into());
    }
    if wait.is_none_or(|wait| wait > RETRY_WORTHWHILE_MAX) {
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
    let (standings, now, source) = (denial.standings(), denial.now(), denial.source());
    Told { standings, refused: Some(denial.binding()), now, source }.tell(headers, families);
}

/// The sentence of a refusal.
pub(super) fn sentence(denial: &Denial) -> String {
    let Standing { limit, used, requested, .. } = denial.binding();
    let advice = match wait(denial) {
        Some(wait) => format!("Please try again in {}.", go_duration(wait)),
        None => "It asks for more than the limit ever allows.".to_owned(),
    };
    let (id, capacity) = (limit.id(), limit.capacity());
    format!("Rate limit reached: {id}. Limit {capacity}, Used {used}, Requested {requested}. {advice}")
}

/// `None`: for ever.
fn wait(denial: &Denial) -> Option<Millis> {
    match denial.retry() {
        Retry::After(wait) => Some(wait),
        Retry::Now => Some(Millis::ZERO),
        Retry::Never => None,
    }
}

/// One decision, to be told.
struct Told<'d> {
    standings: &'d [Standing],
    refused: Option<&'d Standing>,
    now: Millis,
    source: Source,
}

impl<'d> Told<'d> {
    fn tell(&self, headers: &mut HeaderMap, families: &[Family]) {
        for family in families {
            match family {
                Family::RateLimit => self.rate_limit(headers),
                Family::XRateLimit => self.x_rate_limit(headers),
                Family::OpenAi => self.units(
                    headers,
                    |what, unit| format!("x-ratelimit-{what}-{unit}"),
                    |_, reset| go_duration(reset),
                ),
                Family::Anthropic => self.units(
                    headers,
                    |what, unit| format!("anthropic-ratelimit-{unit}-{what}"),
                    |now, reset| date(now + reset),
                ),
                Family::Source => insert(headers, "x-tollgate-source", self.source.as_str()),
            }
        }
    }

    /// Enforced limits; those on calls in flight, which change all the time, only when they refuse.
    fn shown(&self) -> impl Iterator<Item = &'d Standing> {
        let refused = self.refused;
        self.standings.iter().filter(move |standing| {
            let refuses = refused.is_some_and(|refused| std::ptr::eq(refused, *standing));
            refuses || (!standing.limit.is_shadow() && standing.limit.algorithm() != Algorithm::Concurrency)
        })
    }

    /// The one that refused, if it counts this; else the one with the least left of its limit, of equals that with
    /// the shortest window.
    fn binding(&self, counts: impl Fn(Unit) -> bool) -> Option<&'d Standing> {
        let counted = |standing: &&Standing| counts(standing.limit.unit());
        self.refused.filter(counted).or_else(|| {
            self.shown().filter(counted).min_by(|a, b| {
                // a.remaining / a.capacity against b.remaining / b.capacity, without division.
                let left = u128::from(a.remaining) * u128::from(b.limit.capacity());
                let right = u128::from(b.remaining) * u128::from(a.limit.capacity());
                left.cmp(&right).then(a.limit.window().longest().cmp(&b.limit.window().longest()))
            })
        })
    }

    fn rate_limit(&self, headers: &mut HeaderMap) {
        let (mut policies, mut states) = (String::new(), String::new());
        for standing in self.shown() {
            let (limit, separator) = (&standing.limit, if policies.is_empty() { "" } else { ", " });
            let (id, reset) = (quoted(limit.id()), standing.reset.ceil_secs());
            // Writing to a String cannot fail.
            let _ = write!(policies, "{separator}{id};q={}", limit.capacity());
            if limit.algorithm() != Algorithm::Concurrency {
                let _ = write!(policies, ";w={}", limit.window().longest().ceil_secs());
            }
            let _ = write!(states, "{separator}{id};r={};t={reset}", standing.remaining);
        }
        if !policies.is_empty() {
            insert(headers, "ratelimit-policy", &policies);
            insert(headers, "ratelimit", &states);
        }
    }

    fn x_rate_limit(&self, headers: &mut HeaderMap) {
        let requests = || self.binding(|unit| unit == Unit::Requests);
        let Some(standing) = self.refused.or_else(requests).or_else(|| self.binding(|_| true)) else {
            return;
        };
        headers.insert(HeaderName::from_static("x-ratelimit-limit"), standing.limit.capacity().into());
        headers.insert(HeaderName::from_static("x-ratelimit-remaining"), standing.remaining.into());
        let reset = (self.now + standing.reset).ceil_secs();
        headers.insert(HeaderName::from_static("x-ratelimit-reset"), reset.into());
    }

    /// Limit, remaining and reset, once for requests and once for tokens.
    fn units(
        &self,
        headers: &mut HeaderMap,
        name: impl Fn(&str, &str) -> String,
        reset: impl Fn(Millis, Millis) -> String,
    ) {
        let requests = self.binding(|unit| unit == Unit::Requests);
        let tokens =
            self.binding(|unit| matches!(unit, Unit::Tokens | Unit::InputTokens | Unit::OutputTokens));
        for (unit, standing) in [("requests", requests), ("tokens", tokens)] {
            let Some(standing) = standing else { continue };
            insert(headers, &name("limit", unit), &standing.limit.capacity().to_string());
            insert(headers, &name("remaining", unit), &standing.remaining.to_string());
            insert(headers, &name("reset", unit), &reset(self.now, standing.reset));
        }
    }
}

/// Inserts a header of ours: name and value are printable ASCII.
fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
        headers.insert(name, value);
    }
}

/// A string of structured fields (RFC 9651 3.3.3): printable ASCII; anything else of a name becomes `?`.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            ' '..='~' => out.push(character),
            _ => out.push('?'),
        }
    }
    out.push('"');
    out
}

/// As Go prints a `time.Duration`: `6m0s`, `40.21s`, `17ms`, `0s`.
fn go_duration(span: Millis) -> String {
    let millis = span.get();
    if (1..1_000).contains(&millis) {
        return format!("{millis}ms");
    }
    let (hours, minutes) = (millis / 3_600_000, millis / 60_000 % 60);
    let mut seconds = format!("{}.{:03}", millis / 1_000 % 60, millis % 1_000);
    seconds.truncate(seconds.trim_end_matches('0').trim_end_matches('.').len());
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// A moment in UTC as RFC 3339 writes it, rounded up to a second. After Howard Hinnant's `civil_from_days`.
fn date(at: Millis) -> String {
    let seconds = at.ceil_secs();
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_spans_as_clients_read_them() {
        for (millis, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399_001, "2000-02-29T00:00:00Z"),
            (1_835_438_400_000, "2028-02-29T12:00:00Z"),
            (1_798_761_599_000, "2026-12-31T23:59:59Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(date(Millis(millis)), expected);
        }
        for (millis, expected) in [
            (0, "0s"),
            (17, "17ms"),
            (1_000, "1s"),
            (40_210, "40.21s"),
            (360_000, "6m0s"),
            (86_399_999, "23h59m59.999s"),
        ] {
            assert_eq!(go_duration(Millis(millis)), expected);
        }
        assert_eq!(quoted("a\"é\\"), "\"a\\\"?\\\\\"");
    }
}
