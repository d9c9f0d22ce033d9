//! What a script did, done again on the states it found: that gives standings and receipts, and shows that script
//! and definition agree.

use ::redis::Value;

use super::epoch::life_in;
use super::pack::numbers;
use super::plan::Plan;
use crate::clock::Millis;
use crate::limit::{Charge, demand};
use crate::quota::Algorithm;
use crate::reservation::{Denial, Standing};
use crate::spec::{Rate, Receipt, Retry, State};
use crate::store::StoreError;

/// The counters of a plan, as a script found them.
#[derive(Clone, Debug)]
pub(super) struct Counters {
    pub(super) now: Millis,
    /// Whose they were: tells the time of one server as a master from any other. 0: nobody knows.
    pub(super) history: u32,
    /// Nobody else has what was written, although that was waited for.
    pub(super) unreplicated: bool,
    states: Vec<State>,
    found: Vec<bool>,
}

/// What one request came to.
pub(super) enum Outcome {
    Granted(Vec<Standing>, Vec<Option<Receipt>>),
    Denied(Denial),
}

impl Counters {
    /// Reads `values`: one per counter; its epoch where there was none.
    pub(super) fn read<'r>(
        plan: &Plan,
        rates: impl Iterator<Item = &'r Rate>,
        (now, history): (i64, u32),
        values: &[Value],
        life: u64,
    ) -> Result<Counters, StoreError> {
        let wrong = |problem: &str| StoreError::Reply(problem.to_string());
        let now = Millis(u64::try_from(now).map_err(|_| wrong("a time before 1970"))?);
        if values.len() != plan.counters {
            return Err(wrong("another number of counters than was asked for"));
        }
        let mut states: Vec<Option<State>> = vec![None; plan.counters];
        for (place, rate) in plan.places.iter().zip(rates) {
            states[*place] = Some(match &values[*place] {
                Value::Int(epoch) => State::new(rate, life_in(u64::try_from(*epoch).unwrap_or(0), life)),
                Value::BulkString(packed) => numbers(packed)
                    .and_then(|numbers| State::from_numbers(rate, numbers.get(1..)?))
                    .ok_or_else(|| wrong("a counter that is none"))?,
                _ => return Err(wrong("a counter that is no text")),
            });
        }
        let found = values.iter().map(|value| !matches!(value, Value::Int(_))).collect();
        let states = states.into_iter().collect::<Option<Vec<State>>>();
        let states = states.ok_or_else(|| wrong("a counter without a charge"))?;
        Ok(Counters { now, history, unreplicated: false, states, found })
    }

    pub(super) fn found(&self, place: usize) -> bool {
        self.found[place]
    }

    pub(super) fn state(&mut self, place: usize) -> &mut State {
        &mut self.states[place]
    }

    /// Whether what was written is only where it was written, although a replica was waited for.
    pub(super) fn unreplicated(self, unreplicated: bool) -> Counters {
        Counters { unreplicated, ..self }
    }

    /// As if the time were this.
    pub(super) fn at(&self, now: Millis) -> Counters {
        Counters { now, ..self.clone() }
    }

    /// Takes every charge, or none.
    pub(super) fn reserve(&mut self, plan: &Plan, charges: Vec<Charge>) -> Outcome {
        let now = self.now;
        let mut fits = Vec::with_capacity(charges.len());
        for (index, charge) in charges.iter().enumerate() {
            let (rate, state) = (charge.limit().rate(), &mut self.states[plan.places[index]]);
            state.redate(rate, now);
            fits.push(state.fits(rate, now, demand(&charges, index)));
        }
        let refused = |(fits, charge): (&bool, &Charge)| !fits && !charge.limit().is_shadow();
        if fits.iter().zip(&charges).any(refused) {
            return Outcome::Denied(Denial::new(self.stand(plan, charges), now));
        }
        let mut standings = Vec::with_capacity(charges.len());
        let mut receipts = Vec::with_capacity(charges.len());
        for ((charge, place), fits) in charges.into_iter().zip(&plan.places).zip(fits) {
            let (rate, state) = (*charge.limit().rate(), &mut self.states[*place]);
            let receipt = fits.then(|| state.charge(&rate, now, charge.amount()));
            let retry = if fits { Retry::Now } else { state.wait(&rate, now, charge.amount()) };
            standings.push(standing(charge, state, (now, self.history), fits, retry));
            receipts.push(receipt);
        }
        Outcome::Granted(standings, receipts)
    }

    /// The standings of charges that are not taken.
    pub(super) fn stand(&self, plan: &Plan, charges: Vec<Charge>) -> Vec<Standing> {
        let demands: Vec<u64> = (0..charges.len()).map(|index| demand(&charges, index)).collect();
        let mut standings = Vec::with_capacity(charges.len());
        for ((charge, place), demand) in charges.into_iter().zip(&plan.places).zip(demands) {
            let rate = *charge.limit().rate();
            let mut state = self.states[*place].clone();
            state.redate(&rate, self.now);
            let retry = state.wait(&rate, self.now, demand);
            standings.push(standing(charge, &state, (self.now, self.history), false, retry));
        }
        standings
    }

    /// Whether an enforced limit has no room for these charges. Not one on calls in flight: what is known of them is
    /// too old as soon as one ends.
    pub(super) fn refuse(&self, plan: &Plan, charges: &[Charge]) -> bool {
        charges.iter().enumerate().any(|(index, charge)| {
            let limit = charge.limit();
            let state = &self.states[plan.places[index]];
            let asked_each_time = limit.is_shadow() || limit.algorithm() == Algorithm::Concurrency;
            !asked_each_time && !state.fits(limit.rate(), self.now, demand(charges, index))
        })
    }
}

fn standing(
    charge: Charge,
    state: &State,
    (now, history): (Millis, u32),
    taken: bool,
    retry: Retry,
) -> Standing {
    let reading = state.reading(charge.limit().rate(), now);
    let (limit, subject, requested) = charge.into_parts();
    let (used, remaining, reset) = (reading.used, reading.remaining, reading.reset);
    Standing { limit, subject, requested, taken, used, remaining, reset, retry, life: state.life(), history }
}
