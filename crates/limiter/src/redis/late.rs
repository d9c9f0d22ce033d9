//! For a store that counts by itself while Redis does not answer: who else is there, and telling Redis afterwards.

use std::sync::Arc;

use ::redis::Value;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::RedisStore;
use super::pack::Packer;
use super::plan::{self, Plan};
use super::replay::Counters;
use super::settlement::Held;
use crate::clock::{Clock, Millis};
use crate::limit::Limit;
use crate::quota::Algorithm;
use crate::reservation::{Hold, Standing};
use crate::scope::Subject;
use crate::spec::{Reading, Receipt, Retry, State};
use crate::store::StoreError;

/// Writes an instance among those that live, by the server's time, and counts them, and those that were written since a
/// time. A write, so that a server which answers but takes no writes (full, a replica) is not taken for one that is
/// well; and the first thing, because a script that has written anything is let through by a server that is full. One
/// that only asks, or was under way for so long that nobody waits for it any more, writes a time that is always over.
const BEAT: &str = "
local time = redis.call('TIME')
local now, live = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[2])
local at = now <= tonumber(ARGV[3]) and now or 0
local new = redis.call('ZADD', KEYS[1], 'GT', string.format('%.0f', at), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - live))
redis.call('ZREMRANGEBYSCORE', KEYS[1], string.format('%.0f', now + live), '+inf')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return { now, redis.call('ZCARD', KEYS[1]), redis.call('ZCOUNT', KEYS[1], ARGV[4], '+inf'), new, at > 0 and 1 or 0 }
";

/// A counter that was charged late.
pub(crate) struct Charged {
    pub(crate) reading: Reading,
    pub(crate) life: u64,
    /// Who says so, as in [`Standing`].
    pub(crate) history: u32,
    /// To give some of it back.
    pub(crate) receipt: Receipt,
    /// It was charged under this number before, so not again.
    pub(crate) before: bool,
}

/// What a heartbeat was answered.
pub(crate) struct Beat {
    /// The store's time.
    pub(crate) now: Millis,
    /// How many instances live.
    pub(crate) count: u64,
    /// How many of them have said so since the time that was asked about.
    pub(crate) since: u64,
    /// Whether this one was not among them.
    pub(crate) new: bool,
    /// Whether it is now.
    pub(crate) written: bool,
}

/// What a counter is charged without being asked.
#[derive(Clone, Debug)]
pub(crate) struct Late {
    pub(crate) limit: Arc<Limit>,
    pub(crate) subject: Subject,
    pub(crate) amount: u64,
    /// More than those before of the same process.
    pub(crate) number: u64,
}

impl RedisStore {
    pub(crate) fn runtime(&self) -> &Handle {
        self.0.connection.runtime()
    }

    /// Whether the masters of these subjects' counters may answer, as far as that is known without asking. One master of
    /// several may be gone; one alone is asked.
    pub(crate) fn reaches<'s>(&self, mut subjects: impl Iterator<Item = &'s Subject>) -> bool {
        !self.0.connection.is_cluster()
            || subjects.all(|subject| self.0.connection.reaches(&plan::key(&self.0.prefix, subject)))
    }

    /// Whether one of several masters answers, whatever the others do.
    pub(crate) fn answers_in_part(&self) -> bool {
        self.0.connection.answers_in_part()
    }

    /// Gives up connections that do not answer, of runtimes that [joined](RedisStore::join_runtime).
    pub(crate) async fn check_lanes(&self) {
        self.0.connection.check_lanes().await;
    }

    /// Counts the connections that were made.
    pub(crate) fn connections(&self) -> watch::Receiver<u64> {
        self.0.connection.connections()
    }

    /// Says that `instance` lives, for as long as this, if the store hears it before its time is `until`; and asks who
    /// has done so since a time.
    pub(crate) async fn beat(
        &self,
        instance: &str,
        live: Millis,
        until: Millis,
        since: Millis,
    ) -> Result<Beat, StoreError> {
        let mut command = ::redis::cmd("EVAL");
        let key = format!("{}:ctl:instances", self.0.prefix);
        command.arg(BEAT).arg(1).arg(&key);
        command.arg(instance).arg(live.get());
        // Another clock than the server's says nothing about its time.
        let until =
            if self.0.clock.is_some() && until > Millis::ZERO { Millis(u64::MAX >> 11) } else { until };
        command.arg(until.get()).arg(since.get());
        let reply = self.0.connection.command(&key, &command).await?;
        let Value::Array(parts) = &reply else {
            return Err(StoreError::Reply("no list".into()));
        };
        let &[Value::Int(now), Value::Int(count), Value::Int(since), Value::Int(new), Value::Int(written)] =
            &parts[..]
        else {
            return Err(StoreError::Reply("not a time and four counts".into()));
        };
        let positive =
            |number: i64| u64::try_from(number).map_err(|_| StoreError::Reply("a count below 0".into()));
        let now = match &self.0.clock {
            Some(clock) => clock.now(),
            None => Millis(positive(now)?),
        };
        let (count, since) = (positive(count)?, positive(since)?);
        Ok(Beat { now, count, since, new: new > 0, written: written > 0 })
    }

    /// This store's side of calls in flight that somebody else granted: it holds them from their first renewal on,
    /// whether there is room for them or not.
    pub(crate) fn adopt(&self, standings: &[Standing]) -> Arc<dyn Hold> {
        let receipt = |standing: &Standing| {
            let rate = standing.limit.rate();
            let granted = standing.taken && rate.algorithm() == Algorithm::Concurrency;
            granted.then(|| State::new(rate, self.0.life()).charge(rate, Millis::ZERO, standing.requested))
        };
        let held = Held::new(self.clone(), standings.iter().map(receipt).collect());
        if self.0.connection.is_cluster() { Arc::from(held.spread()) } else { Arc::new(held) }
    }

    /// What was charged late, to be settled as if it had been reserved.
    pub(crate) fn held_late(&self, receipt: Receipt) -> Arc<dyn Hold> {
        Arc::new(Held::new(self.clone(), vec![Some(receipt)]))
    }

    /// Charges unconditionally, like a settlement that used more than was reserved; but nothing that `instance` has
    /// charged under the same number or a later one before. Sent once. Returns the store's time, and what became of
    /// each counter.
    pub(crate) async fn charge_late(
        &self,
        instance: &str,
        late: &[Late],
    ) -> Result<(Millis, Vec<Charged>), StoreError> {
        let standing = |late: &Late| standing(&late.limit, &late.subject, 0);
        let standings: Vec<Standing> = late.iter().map(standing).collect();
        let epochs = Some(&self.0.epochs);
        let plan = Plan::of_standings(&self.0.prefix, epochs, &standings.iter().collect::<Vec<_>>())?;
        let life = self.0.life();
        let nothing = |rate| State::new(rate, life).charge(rate, Millis::ZERO, 0);
        let width = late.first().map_or(0, |late| 2 + nothing(late.limit.rate()).numbers().len());
        let mut order = Packer::default();
        order.list(5);
        order.number(life);
        order.list(width * late.len());
        for (late, place) in late.iter().zip(&plan.places) {
            order.number(*place as u64 + 1);
            let receipt = nothing(late.limit.rate());
            receipt.numbers().into_iter().for_each(|number| order.number(number));
            order.number(late.amount.min(super::AMOUNT_MAX));
        }
        order.number(plan.epochs as u64);
        order.text(instance);
        order.list(late.len());
        late.iter().for_each(|late| order.number(late.number));
        plan.subjects().iter().for_each(|key| self.0.forget(key));
        let now = self.0.time_given();
        let args: [&[u8]; 3] = [&plan.set, &order.0, now.as_bytes()];
        let used = if self.0.clock.is_some() { 3 } else { 2 };
        let reply = self.0.connection.settle(&plan.keys, &args[..used], None).await?;
        let Value::Array(parts) = reply.value else {
            return Err(StoreError::Reply("no list".into()));
        };
        let [Value::Int(now), Value::Array(before), states @ ..] = &parts[..] else {
            return Err(StoreError::Reply("not a time, what was charged before and counters".into()));
        };
        if before.len() != late.len() {
            return Err(StoreError::Reply("another number of charges than was sent".into()));
        }
        let rates = late.iter().map(|late| late.limit.rate());
        let mut counters = Counters::read(&plan, rates, (*now, reply.history), states, life)?;
        let now = counters.now;
        let readings = late.iter().zip(&plan.places).zip(before).map(|((late, place), before)| {
            let rate = late.limit.rate();
            let state = counters.state(*place);
            state.redate(rate, now);
            let before = matches!(before, Value::Int(1..));
            let amount = if before { 0 } else { late.amount };
            let charged = state.correct(rate, now, &nothing(rate), amount).charged;
            let receipt = state.receipt(charged);
            Charged {
                reading: state.reading(rate, now),
                life: state.life(),
                history: reply.history,
                receipt,
                before,
            }
        });
        Ok((now, readings.collect()))
    }
}

/// As if so much had been reserved.
pub(crate) fn standing(limit: &Arc<Limit>, subject: &Subject, requested: u64) -> Standing {
    Standing {
        limit: Arc::clone(limit),
        subject: subject.clone(),
        requested,
        taken: true,
        used: 0,
        remaining: 0,
        reset: Millis::ZERO,
        retry: Retry::Now,
        life: 0,
        history: 0,
    }
}
