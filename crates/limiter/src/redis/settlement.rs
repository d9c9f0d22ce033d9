//! Settling in Redis: sent once, awaited by nobody who does not want to know.

use std::sync::atomic::Ordering;

use ::redis::Value;
use tokio::sync::oneshot;

use super::RedisStore;
use super::pack::Packer;
use super::plan::Plan;
use super::replay::Counters;
use crate::reservation::{Hold, Standing};
use crate::spec::{Correction, Receipt};
use crate::store::{Answer, StoreError};

/// The largest number that the script counts exactly; settlements stop below it.
const ACTUAL_MAX: u64 = (1 << 53) - 1;

/// What a reservation holds of a store in Redis.
pub(super) struct Held {
    pub(super) store: RedisStore,
    pub(super) receipts: Vec<Option<Receipt>>,
}

/// One charge that is settled.
struct Settlement {
    /// Its position among the charges.
    index: usize,
    standing: Standing,
    receipt: Receipt,
    actual: u64,
}

impl Hold for Held {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        drop(self.settled(standings, actual));
        Vec::new()
    }

    fn settled(&self, standings: &[Standing], actual: &[u64]) -> Answer<'static, Vec<Correction>> {
        let charges = standings.len();
        let changed = standings.iter().zip(&self.receipts).zip(actual).enumerate();
        let settlements: Vec<Settlement> = changed
            .filter_map(|(index, ((standing, receipt), actual))| {
                let receipt = receipt.filter(|_| *actual != standing.requested)?;
                Some(Settlement { index, standing: standing.clone(), receipt, actual: *actual })
            })
            .collect();
        if settlements.is_empty() {
            return Box::pin(std::future::ready(Ok(vec![Correction::default(); charges])));
        }
        let standings: Vec<&Standing> = settlements.iter().map(|settlement| &settlement.standing).collect();
        let plan = match Plan::of_standings(&self.store.0.prefix, &standings) {
            Ok(plan) => plan,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        plan.keys.iter().for_each(|key| self.store.0.forget(key));
        let (reply, answer) = oneshot::channel();
        let (store, piece) = (self.store.clone(), self.store.0.underway.begin());
        drop(self.store.0.connection.runtime().spawn(async move {
            let corrections = store.correct(&plan, &settlements, charges).await;
            if corrections.is_err() {
                store.0.settlements_lost.fetch_add(1, Ordering::Relaxed);
            }
            // Nobody who wants to know is the usual case.
            let _ = reply.send(corrections);
            drop(piece);
        }));
        Box::pin(async move { answer.await.unwrap_or(Err(StoreError::Lost)) })
    }
}

impl RedisStore {
    async fn correct(
        &self,
        plan: &Plan,
        settlements: &[Settlement],
        charges: usize,
    ) -> Result<Vec<Correction>, StoreError> {
        let life = self.0.life();
        let mut order = Packer::default();
        order.list(2);
        order.number(life);
        order.list(8 * settlements.len());
        for (settlement, place) in settlements.iter().zip(&plan.places) {
            order.number(*place as u64 + 1);
            settlement.receipt.numbers().into_iter().for_each(|number| order.number(number));
            order.number(settlement.actual.min(ACTUAL_MAX));
        }
        let now = self.0.time_given();
        let args: [&[u8]; 3] = [&plan.set, &order.0, now.as_bytes()];
        let used = if self.0.clock.is_some() { 3 } else { 2 };
        let reply = self.0.connection.settle(&plan.keys, &args[..used]).await;
        // Forgotten once when it was sent, and once more for what left meanwhile.
        plan.keys.iter().for_each(|key| self.0.forget(key));
        let Value::Array(parts) = reply? else {
            return Err(StoreError::Reply("no list".into()));
        };
        let [Value::Int(now), states @ ..] = &parts[..] else {
            return Err(StoreError::Reply("not a time and counters".into()));
        };
        let rates = settlements.iter().map(|settlement| settlement.standing.limit.rate());
        let mut counters = Counters::read(plan, rates, *now, states, life)?;
        let mut corrections = vec![Correction::default(); charges];
        let mut born = vec![false; plan.counters];
        for (Settlement { index, standing, receipt, actual }, &place) in settlements.iter().zip(&plan.places)
        {
            born[place] |= *actual > standing.requested;
            if counters.found(place) || born[place] {
                let (rate, now) = (standing.limit.rate(), counters.now);
                let state = counters.state(place);
                state.redate(rate, now);
                corrections[*index] = state.correct(rate, now, receipt, *actual);
            }
        }
        Ok(corrections)
    }
}
