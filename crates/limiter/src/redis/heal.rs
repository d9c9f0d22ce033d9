//! Making good what a server has lost: telling it what was seen of counters before.

use std::sync::Arc;

use ::redis::Value;
use tokio::sync::watch;

use super::RedisStore;
use super::pack::Packer;
use super::plan::{self, Plan};
use crate::clock::Millis;
use crate::limit::Limit;
use crate::scope::Subject;
use crate::store::StoreError;

/// How many counters one script heals: a server serves nobody else meanwhile.
const AT_ONCE_MAX: usize = 64;

/// What was seen of one counter.
#[derive(Clone, Debug)]
pub(crate) struct Sighting {
    pub(crate) limit: Arc<Limit>,
    pub(crate) subject: Subject,
    /// Units in use by now.
    pub(crate) used: u64,
    /// Units in use when it was seen.
    pub(crate) used_then: u64,
    /// When it was seen, by the store's time.
    pub(crate) at: Millis,
    /// The life that the counter had then.
    pub(crate) life: u64,
    /// Who showed it, as in [`crate::Standing`].
    pub(crate) history: u32,
}

impl RedisStore {
    /// Counts how often somebody else may have become a master: another server, or the same one started again.
    pub(crate) fn masters_changed(&self) -> watch::Receiver<u64> {
        self.0.connection.masters_changed()
    }

    /// Those that can be [healed](RedisStore::heal) by one script each.
    pub(crate) fn healed_together(&self, mut seen: Vec<Sighting>) -> Vec<Vec<Sighting>> {
        if !self.0.connection.is_cluster() {
            return seen.chunks(AT_ONCE_MAX).map(<[Sighting]>::to_vec).collect();
        }
        let slot = |sighting: &Sighting| super::cluster::slot(&plan::key(&self.0.prefix, &sighting.subject));
        seen.sort_by_cached_key(slot);
        let together = seen.chunk_by(|one, other| slot(one) == slot(other));
        together.flat_map(|slot| slot.chunks(AT_ONCE_MAX)).map(<[Sighting]>::to_vec).collect()
    }

    /// Charges counters up to what was seen of them, if they were lost since. Doing it again, here or elsewhere, changes
    /// nothing. Returns the lives that they have now, and who says so.
    pub(crate) async fn heal(&self, seen: &[Sighting]) -> Result<(Vec<u64>, u32), StoreError> {
        let met = seen.iter().map(|sighting| (&sighting.limit, &sighting.subject));
        let plan = Plan::of_counters(&self.0.prefix, Some(&self.0.epochs), met, AT_ONCE_MAX)?;
        let mut order = Packer::default();
        order.list(3);
        order.number(self.0.life());
        order.list(5 * seen.len());
        for (sighting, place) in seen.iter().zip(&plan.places) {
            order.number(*place as u64 + 1);
            order.number(sighting.used.min(super::AMOUNT_MAX));
            order.number(sighting.at.get());
            order.number(sighting.life);
            order.number(sighting.history.into());
        }
        order.number(plan.epochs as u64);
        let now = self.0.time_given();
        let args: [&[u8]; 3] = [&plan.set, &order.0, now.as_bytes()];
        let used = if self.0.clock.is_some() { 3 } else { 2 };
        let reply = self.0.connection.heal(&plan.keys, &args[..used]).await?;
        let Value::Array(lives) = reply.value else {
            return Err(StoreError::Reply("no list".into()));
        };
        let life = |life: &Value| match life {
            Value::Int(life) => u64::try_from(*life).ok(),
            _ => None,
        };
        let lives: Option<Vec<u64>> = lives.iter().map(life).collect();
        let lives = lives.filter(|lives| lives.len() == seen.len());
        let lives = lives.ok_or_else(|| StoreError::Reply("not a life for each counter".into()))?;
        Ok((lives, reply.history))
    }
}
