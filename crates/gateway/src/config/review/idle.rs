//! Limits that can never refuse, because another limit of their rule always does first. Said only where it is certain.
//!
//! Requests are counted exactly: each is one, taken once and at most given back. Tokens and money are settled later, past a
//! limit if need be, and a short window forgets that debt while a long one still holds it; so of those only windows
//! inside each other are compared, and only in the direction in which debt cannot matter.

use std::sync::Arc;

use tollgate_limiter::{Algorithm, Limit, Span, Unit};

use super::super::problem::Problems;
use super::{Whole, place_of_limits};

const DAY_MS: u64 = 86_400_000;
/// Days of the longest month, and of the shortest.
const MONTH_DAYS: (u64, u64) = (31, 28);

/// Warns of each of them.
pub(super) fn idle_limits(whole: &Whole<'_>, problems: &mut Problems) {
    for rule in whole.rules {
        for (index, idle) in rule.limits.iter().enumerate() {
            // Of two that say the same, the later one is too many.
            let is_first = |(other_index, other): &(usize, &Arc<Limit>)| {
                forestalls(other, idle) && (*other_index < index || !forestalls(idle, other))
            };
            if let Some((_, other)) = rule.limits.iter().enumerate().find(is_first) {
                let (at, path) = place_of_limits(whole.root, rule);
                let message =
                    format!("`{}` can never refuse: `{}` always does first", idle.quota(), other.quota());
                problems.warning(at, &path, message, "remove it");
            }
        }
    }
}

/// Whether `strict` refuses whatever `idle` would.
fn forestalls(strict: &Limit, idle: &Limit) -> bool {
    let (strict_amount, idle_amount) =
        (u128::from(strict.quota().amount()), u128::from(idle.quota().amount()));
    let fixed = |limit: &Limit| limit.algorithm() == Algorithm::FixedWindow;
    if strict.unit() != idle.unit() {
        // Every token of a prompt or an answer is a token.
        return strict.unit() == Unit::Tokens
            && matches!(idle.unit(), Unit::InputTokens | Unit::OutputTokens)
            && fixed(strict)
            && fixed(idle)
            && strict.window() == idle.window()
            && idle_amount >= strict_amount;
    }
    if std::ptr::eq(strict, idle) || strict.unit() == Unit::Concurrency {
        return false;
    }
    if fixed(strict) && fixed(idle) {
        if parts(strict, idle).is_some() {
            // 60/minute beside 50/day.
            return idle_amount >= strict_amount;
        }
        if let (Some(parts), Unit::Requests) = (parts(idle, strict), strict.unit()) {
            // 1000/hour beside 10/minute.
            return idle_amount >= strict_amount * u128::from(parts);
        }
    }
    if strict.unit() != Unit::Requests {
        return false;
    }
    if (strict.algorithm(), idle.algorithm()) == (Algorithm::TokenBucket, Algorithm::TokenBucket) {
        // One that is larger and gains no slower is never the emptier one.
        let (strict_ms, idle_ms) = (length(strict), length(idle));
        return idle.capacity() >= strict.capacity()
            && idle_amount * u128::from(strict_ms) >= strict_amount * u128::from(idle_ms);
    }
    looks_back(idle).is_some_and(|stretch| idle_amount >= most(strict, stretch))
}

/// How many windows of `inner` make up one of `outer`, where all borders of `outer` are borders of `inner`.
fn parts(outer: &Limit, inner: &Limit) -> Option<u64> {
    let (outer_span, inner_span) = (outer.window().span(), inner.window().span());
    let inner_ms = inner.window().length()?.get();
    if outer_span == Span::Month {
        return (inner_span != Span::Week && DAY_MS.is_multiple_of(inner_ms))
            .then(|| MONTH_DAYS.0 * (DAY_MS / inner_ms));
    }
    let outer_ms = length(outer);
    // Weeks begin on Mondays; every other window is counted from a Thursday.
    let begin_together = (outer_span == Span::Week) == (inner_span == Span::Week)
        || (outer_span == Span::Week && DAY_MS.is_multiple_of(inner_ms));
    (begin_together && outer_ms > inner_ms && outer_ms.is_multiple_of(inner_ms)).then(|| outer_ms / inner_ms)
}

/// The stretch of time, up to now, whose requests can matter to a decision, milliseconds.
fn looks_back(limit: &Limit) -> Option<u64> {
    let ms = limit.window().longest().get();
    match limit.algorithm() {
        Algorithm::FixedWindow => Some(ms),
        // The window before; or the buckets that keep entries a little longer.
        Algorithm::SlidingWindow | Algorithm::MovingWindow => Some(2 * ms),
        // A full bucket remembers for ever.
        Algorithm::TokenBucket | Algorithm::Concurrency => None,
    }
}

/// The most requests that a limit lets through in any stretch of so many milliseconds.
fn most(limit: &Limit, stretch_ms: u64) -> u128 {
    let amount = u128::from(limit.quota().amount());
    let (stretch, window) = (u128::from(stretch_ms), u128::from(length(limit)));
    match limit.algorithm() {
        Algorithm::MovingWindow => amount * stretch.div_ceil(window),
        Algorithm::FixedWindow | Algorithm::SlidingWindow => amount * (stretch.div_ceil(window) + 1),
        Algorithm::TokenBucket => u128::from(limit.capacity()) + (amount * stretch).div_ceil(window),
        Algorithm::Concurrency => u128::MAX,
    }
}

/// Milliseconds of a window; of a month, the shortest one.
fn length(limit: &Limit) -> u64 {
    limit.window().length().map_or(MONTH_DAYS.1 * DAY_MS, |length| length.get())
}
