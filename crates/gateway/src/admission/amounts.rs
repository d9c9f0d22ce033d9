//! What a request is expected to use, and what it used, in the units of limits.

use tollgate_limiter::{Charge, Cost, Limit, Subject, Unit};

use std::sync::Arc;

use crate::config::{Price, TokenWeights};
use crate::dialect::Usage;
use crate::estimate::Estimate;

/// What a request may use, before it is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Tokens. A prompt that was counted, and is more than a limit ever allows, is refused for ever; what was estimated is
    /// clamped.
    pub estimate: Estimate,
    /// Money at the dearest provider that could answer.
    pub cost: Cost,
}

impl Demand {
    /// The charge of one limit.
    pub(super) fn charge(&self, limit: &Arc<Limit>, subject: Subject) -> Charge {
        let (limit, Estimate { input, output, input_exact, .. }) = (limit.clone(), self.estimate);
        let tokens = self.estimate.total();
        let never = input_exact && input > limit.capacity();
        match limit.unit() {
            Unit::Tokens if never => Charge::new(limit, subject, tokens),
            Unit::InputTokens if never => Charge::new(limit, subject, input),
            Unit::Tokens => Charge::estimate(limit, subject, tokens),
            Unit::InputTokens => Charge::estimate(limit, subject, input),
            Unit::OutputTokens => Charge::estimate(limit, subject, output),
            Unit::Cost => Charge::estimate(limit, subject, self.cost.micros()),
            _ => Charge::new(limit, subject, 1),
        }
    }
}

/// What a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Tokens, as the provider counts them or as they were estimated.
    pub usage: Usage,
    /// How much special tokens count.
    pub weights: TokenWeights,
    /// Money.
    pub cost: Cost,
}

impl Used {
    /// In one unit.
    pub(super) fn amount(&self, unit: Unit) -> u64 {
        let Usage { prompt, completion, total, cached, reasoning } = self.usage;
        // Cached and reasoning tokens are among the others: what they count less is taken off once.
        let discount = |tokens: u64, weight: u16| {
            let off = u128::from(tokens) * u128::from(1_000 - weight.min(1_000)) / 1_000;
            u64::try_from(off).unwrap_or(u64::MAX)
        };
        let cached = discount(cached.min(prompt), self.weights.cached_input);
        let reasoning = discount(reasoning.min(completion), self.weights.reasoning);
        match unit {
            Unit::Tokens => {
                total.max(prompt.saturating_add(completion)).saturating_sub(cached.saturating_add(reasoning))
            }
            Unit::InputTokens => prompt - cached,
            Unit::OutputTokens => completion - reasoning,
            Unit::Cost => self.cost.micros(),
            _ => 1,
        }
    }
}

/// What tokens cost at a price.
pub fn cost(price: &Price, usage: &Usage) -> Cost {
    let cached = usage.cached.min(usage.prompt);
    Cost::of(usage.prompt - cached, price.input)
        + Cost::of(cached, price.cached_input)
        + Cost::of(usage.completion, price.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICE: Price = Price { input: 150_000, cached_input: 75_000, output: 600_000 };

    #[test]
    fn money_is_summed_exactly_and_rounded_up_once() {
        let usage = |prompt, completion, cached| Usage { prompt, completion, cached, ..Usage::default() };
        for (used, micros) in [
            (usage(0, 0, 0), 0),
            (usage(1, 0, 0), 1),
            (usage(1_000_000, 0, 0), 150_000),
            (usage(1_000_000, 0, 1_000_000), 75_000),
            (usage(10, 10, 0), 8),
            (usage(1_000, 500, 400), 420),
            // More cached than read is not to be believed.
            (usage(10, 0, 1_000), 1),
        ] {
            assert_eq!(cost(&PRICE, &used).micros(), micros, "{used:?}");
        }
    }

    #[test]
    fn special_tokens_count_once_and_by_their_weight() {
        let usage = Usage { prompt: 1_000, completion: 100, total: 1_100, cached: 800, reasoning: 40 };
        let used = |cached_input, reasoning| Used {
            usage,
            weights: TokenWeights { cached_input, reasoning },
            cost: Cost::of(7_000_000, 1),
        };
        let full = used(1_000, 1_000);
        for (unit, amount) in [
            (Unit::Requests, 1),
            (Unit::Tokens, 1_100),
            (Unit::InputTokens, 1_000),
            (Unit::OutputTokens, 100),
            (Unit::Cost, 7),
        ] {
            assert_eq!(full.amount(unit), amount, "{unit}");
        }
        let light = used(100, 500);
        assert_eq!(light.amount(Unit::InputTokens), 280);
        assert_eq!(light.amount(Unit::OutputTokens), 80);
        assert_eq!(light.amount(Unit::Tokens), 360);
    }
}
