//! The figures of one second: what was counted between two moments, and how long the last requests took.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::Gateway;
use crate::control::{About, Time};
use crate::fleet::{self, Told};
use crate::journal::{Counts, Ended, Journal, KEPT};
use crate::limits::Limits;
use crate::rates::{Rate, Totals, unix_millis};
use crate::snapshot::{Model, Snapshot};

/// Requests that ended longer ago say nothing of how long they take now.
const LATELY: Duration = Duration::from_secs(60);
/// Limits told of, the fullest.
const FULLEST: usize = 20;
/// Models told of, those with the most requests first.
const MODELS_MAX: usize = 50;
/// Instances told of.
const INSTANCES_MAX: usize = 50;

/// What was counted at one moment.
pub(super) struct Sample {
    at: Instant,
    counts: Counts,
    told: Told,
    instances: Vec<About>,
}

impl Sample {
    /// Of now. Others are waited for so long at most.
    pub(super) async fn take(gateway: &Gateway, patience: Duration) -> Self {
        let of_fleet = async {
            let told = fleet::rates(gateway).await;
            let instances = match told.of_fleet {
                true => gateway.control.instances().await.ok(),
                false => None,
            };
            (told, instances)
        };
        let (told, instances) =
            tokio::time::timeout(patience, of_fleet).await.unwrap_or_else(|_| (fleet::own(gateway), None));
        let mut instances = instances.unwrap_or_else(|| vec![fleet::about(gateway)]);
        instances.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Self { at: Instant::now(), counts: gateway.ledger.journal.counts(), told, instances }
    }
}

/// Figures of the time between two samples.
pub(super) fn between(gateway: &Gateway, before: &Sample, now: &Sample) -> Value {
    let seconds = (now.at - before.at).as_secs_f64();
    let rate = |before: u64, now: u64| per_second(before, now, seconds);
    let (then, counts) = (&before.counts, &now.counts);
    let snapshot = gateway.snapshot.load_full();
    let mut lately = Lately::default();
    let journal = &gateway.ledger.journal;
    for number in Journal::kept(journal.last()) {
        let _ = journal.look(number, |ended| lately.add(ended));
    }
    let span = lately.span(gateway.instance.uptime()).as_secs_f64();
    json!({
        "time": Time::now(),
        "instance": gateway.instance.name(),
        "version": env!("CARGO_PKG_VERSION"),
        "started": gateway.instance.started(),
        "state": if gateway.leaving.is_cancelled() { "leaving" } else { "serving" },
        "requests": {
            "per_second": rate(then.ended, counts.ended),
            "refused_per_second": rate(then.refused, counts.refused),
            "failed_per_second": rate(then.failed, counts.failed),
            "in_flight": counts.begun - counts.ended,
            "total": counts.ended,
            "refused": counts.refused,
            "failed": counts.failed,
        },
        "tokens": {
            "input_per_second": rate(then.input_tokens, counts.input_tokens),
            "output_per_second": rate(then.output_tokens, counts.output_tokens),
            "input": counts.input_tokens,
            "output": counts.output_tokens,
        },
        "overhead_ms": spread(&mut lately.overhead),
        "models": models(&snapshot, &mut lately.models, span),
        "limits": fullest(&now.told.rates),
        "limits_of": if now.told.of_fleet { "fleet" } else { "instance" },
        "redis": redis(gateway),
        "fleet": of_fleet(&before.told, &now.told, seconds),
        "instances": now.instances.iter().take(INSTANCES_MAX).collect::<Vec<_>>(),
    })
}

/// To the thousandth. A count that was smaller before has begun anew.
fn per_second(before: u64, now: u64, seconds: f64) -> f64 {
    let rate = now.saturating_sub(before) as f64 / seconds.max(1e-3);
    (rate * 1e3).round() / 1e3
}

/// How long requests took lately, microseconds.
#[derive(Default)]
struct Lately {
    overhead: Vec<u64>,
    models: HashMap<String, OfModel>,
    /// How many are remembered, and how long ago the first of them ended.
    remembered: u64,
    oldest: Duration,
}

#[derive(Default)]
struct OfModel {
    requests: u64,
    upstream: Vec<u64>,
    first_token: Vec<u64>,
}

impl Lately {
    fn add(&mut self, ended: &Ended) {
        let age = ended.at.elapsed();
        (self.remembered, self.oldest) = (self.remembered + 1, self.oldest.max(age));
        if age > LATELY {
            return;
        }
        let micros = |took: Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        // Of requests that no provider was asked for, what we add is all there is.
        self.overhead.extend(ended.overhead.filter(|_| ended.upstream.is_some()).map(micros));
        let Some(model) = ended.model.as_deref() else { return };
        if !self.models.contains_key(model) {
            self.models.insert(model.to_owned(), OfModel::default());
        }
        let Some(of) = self.models.get_mut(model) else { return };
        of.requests += 1;
        of.upstream.extend(ended.upstream.map(micros));
        of.first_token.extend(ended.first_token.map(micros));
    }

    /// The time these are the requests of: all of it, unless they are more than are remembered.
    fn span(&self, uptime: Duration) -> Duration {
        let known = if self.remembered < KEPT { uptime } else { self.oldest };
        known.min(LATELY)
    }
}

/// `{"p50":…,"p95":…,"count":…}`, milliseconds; `null` of nothing.
fn spread(micros: &mut [u64]) -> Value {
    if micros.is_empty() {
        return Value::Null;
    }
    micros.sort_unstable();
    // The smallest value that so many of a hundred do not exceed.
    let rank = |percent: usize| (micros.len() * percent).div_ceil(100).saturating_sub(1);
    let millis = |percent| micros[rank(percent)] as f64 / 1e3;
    json!({ "p50": millis(50), "p95": millis(95), "count": micros.len() })
}

/// Those that were used most lately, by name where nobody did.
fn models(now: &Snapshot, lately: &mut HashMap<String, OfModel>, span: f64) -> Vec<Value> {
    let own = now.models().filter(|(name, model)| *name == &*model.name);
    let mut found: Vec<(&Model, OfModel)> =
        own.map(|(name, model)| (&**model, lately.remove(name).unwrap_or_default())).collect();
    found.sort_by_key(|(_, of)| std::cmp::Reverse(of.requests));
    found.truncate(MODELS_MAX);
    let at = Instant::now();
    let shown = |(model, mut of): (&Model, OfModel)| {
        let deployments = &model.deployments;
        let healthy = deployments.iter().filter(|deployment| {
            !now.is_drained(deployment) && deployment.health.rests_until().is_none_or(|until| until <= at)
        });
        json!({
            "name": &*model.name,
            "providers": deployments.len(),
            "healthy": healthy.count(),
            "in_flight": deployments.iter().map(|deployment| deployment.in_flight.count()).sum::<u64>(),
            "requests_per_second": per_second(0, of.requests, span),
            "upstream_ms": spread(&mut of.upstream),
            "first_token_ms": spread(&mut of.first_token),
        })
    };
    found.into_iter().map(shown).collect()
}

/// The fullest first; of those as full as each other, by name.
fn fullest(rates: &[Rate]) -> Vec<Value> {
    let mut rates: Vec<&Rate> = rates.iter().collect();
    let fuller = |one: &&Rate, other: &&Rate| {
        other.fullness().cmp(&one.fullness()).then_with(|| one.subject.cmp(&other.subject))
    };
    if rates.len() > FULLEST {
        rates.select_nth_unstable_by(FULLEST, fuller);
        rates.truncate(FULLEST);
    }
    rates.sort_unstable_by(fuller);
    let now = unix_millis(SystemTime::now());
    rates.into_iter().map(|rate| rate.live(now)).collect()
}

fn redis(gateway: &Gateway) -> Value {
    let Limits::Redis(store) = &gateway.limits else {
        return json!({ "enabled": false, "connected": false, "degraded": false });
    };
    let degraded = store.state().is_open();
    let connected = store.redis().status().connected && !degraded;
    json!({ "enabled": true, "connected": connected, "degraded": degraded })
}

/// Requests that limits decided on, anywhere; `null` where there is no fleet, or it is not heard.
fn of_fleet(before: &Told, now: &Told, seconds: f64) -> Value {
    if !now.of_fleet {
        return Value::Null;
    }
    let Totals { requests, blocked } = now.totals;
    let rate = |before: u64, now: u64| per_second(before, now, seconds);
    // While it was not heard, the totals were those of this instance.
    let known = before.of_fleet;
    json!({
        "requests": requests,
        "refused": blocked,
        "requests_per_second": known.then(|| rate(before.totals.requests, requests)),
        "refused_per_second": known.then(|| rate(before.totals.blocked, blocked)),
    })
}
