//! `GET /admin/rate-limit/stats`, `GET /admin/redis/status`: what existing scripts and monitoring read.

use std::cmp::Reverse;
use std::collections::HashSet;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Map, Value, json};
use tollgate_limiter::{Circuit, ResilientStore, ServerInfo};

use super::ask::{self, json};
use super::problem::Problem;
use super::walk::{self, Step};
use super::{Ask, Reply, Shared};
use crate::config::Redis;
use crate::control::Time;
use crate::fleet::Told;
use crate::limits::Limits;
use crate::rates::{Rate, public_name};
use crate::{Gateway, fleet};

/// `GET /admin/rate-limit/stats?limit=&cursor=&prefix=`: totals of the fleet, and of each subject its fullest limit: first
/// those that instances say are fullest, in that order, then all others as the store comes upon them.
pub(super) async fn stats(State(gateway): Shared, ask: Ask) -> Reply {
    let page = ask.page()?;
    let after = page.after.as_deref().map(After::read).transpose()?;
    let prefix = ask.parameter("prefix").unwrap_or_default();
    let Told { totals, rates, .. } = fleet::rates(&gateway).await;
    let wanted = |name: &str| {
        let key = name.strip_prefix("rate_limit:").unwrap_or(name);
        name.starts_with(prefix) || key.starts_with(prefix)
    };
    let told: HashSet<String> = rates.iter().map(|rate| rate.subject.clone()).collect();
    let mut fullest: Vec<(Reverse<u64>, String, Rate)> = rates
        .into_iter()
        .map(|rate| (Reverse(rate.fullness()), public_name(&rate.subject), rate))
        .filter(|(fullness, name, _)| {
            let later = match &after {
                None => true,
                Some(After::Fullest(full, last)) => (fullness, name) > (full, last),
                Some(After::Walk(_)) => false,
            };
            wanted(name) && later
        })
        .collect();
    fullest.sort_unstable_by(|one, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
    let mut entries: Vec<(String, String, Rate)> = fullest
        .into_iter()
        .map(|(Reverse(full), name, rate)| (format!("{full} {name}"), name, rate))
        .collect();
    let mut next = entries.get(page.size).is_some().then(|| entries[page.size - 1].0.clone());
    entries.truncate(page.size);
    if next.is_none() {
        let from = if let Some(After::Walk(step)) = after { step } else { Step::default() };
        let others = |rate: &Rate| !told.contains(&rate.subject) && wanted(&public_name(&rate.subject));
        let (found, goes_on) = walk::rates(&gateway, from, page.size - entries.len(), others).await;
        entries.extend(found.into_iter().map(|rate| (String::new(), public_name(&rate.subject), rate)));
        next = goes_on.map(|step| step.to_string());
    }
    let rates: Map<String, Value> =
        entries.iter().map(|(_, name, rate)| (json_key(name).to_owned(), shown(name, rate))).collect();
    let stats = json!({
        "total_requests": totals.requests,
        "blocked_requests": totals.blocked,
        "current_rates": rates,
        "redis_connected": is_connected(&gateway),
        "last_update": Time::now(),
    });
    let next = next.map(ask::cursor);
    Ok(json(StatusCode::OK, &json!({ "status": "success", "stats": stats, "next_cursor": next })))
}

/// Where a page ends.
enum After {
    /// Among the fullest: fullness and name of the last.
    Fullest(Reverse<u64>, String),
    /// Among all others.
    Walk(Step),
}

impl After {
    fn read(text: &str) -> Result<Self, Problem> {
        let wrong = || Problem::field("cursor", "is no cursor of this list");
        if let Some(step) = Step::read(text) {
            return Ok(Self::Walk(step));
        }
        let (full, name) = text.split_once(' ').ok_or_else(wrong)?;
        Ok(Self::Fullest(Reverse(full.parse().map_err(|_| wrong())?), name.to_owned()))
    }
}

/// `GET /admin/redis/status`
pub(super) async fn redis(State(gateway): Shared) -> Reply {
    let shown = match (&gateway.limits, &gateway.redis) {
        (Limits::Redis(store), Some(redis)) => status(&gateway, store, redis).await,
        _ => json!({ "enabled": false, "connected": false, "addr": "", "db": 0, "pool_size": 0 }),
    };
    Ok(json(StatusCode::OK, &json!({ "status": "success", "redis": shown })))
}

async fn status(gateway: &Gateway, store: &ResilientStore, redis: &Redis) -> Value {
    let status = store.redis().status();
    let degraded = store.state().is_open();
    let (info, slowlog) = match degraded {
        true => (ServerInfo::default(), None),
        false => {
            let (info, slowlog) = tokio::join!(store.redis().info(), gateway.control.slowlog());
            (info.unwrap_or_default(), slowlog.ok().flatten())
        }
    };
    let (since, why) = match store.state() {
        Circuit::Closed => (None, None),
        Circuit::Open { since, why } => {
            let moment = std::time::UNIX_EPOCH + std::time::Duration::from_millis(since.get());
            (Some(Time::from(moment)), Some(why.as_str()))
        }
    };
    let counts = store.counts();
    json!({
        "enabled": true,
        "connected": status.connected && !degraded,
        "addr": status.address,
        "db": redis.database(),
        "pool_size": gateway.limits.connections(),
        "topology": status.topology.as_str(),
        "version": status.version.or(info.version),
        "role": info.role.or(status.role),
        "latency_ms": gateway.store_latency.percentiles(),
        "used_memory": info.used_memory,
        "maxmemory": info.maxmemory,
        "maxmemory_policy": info.maxmemory_policy,
        "evicted_keys": info.evicted_keys,
        "connected_clients": info.connected_clients,
        "replicas": info.replicas,
        "replication_lag": info.replication_lag.map(|lag| lag.as_secs()),
        "slowlog": slowlog,
        "degraded_since": since,
        "degraded_why": why,
        "problem": status.problem,
        "instances": store.instances().count,
        "settlements_waiting": counts.settlements_waiting,
    })
}

/// Whether limits are counted in Redis at the moment.
fn is_connected(gateway: &Gateway) -> bool {
    match &gateway.limits {
        Limits::Memory(_) => false,
        Limits::Redis(store) => store.redis().status().connected && !store.state().is_open(),
    }
}

/// The name after `rate_limit:ip:`, for other scopes after `rate_limit:`.
fn json_key(name: &str) -> &str {
    let short = name.strip_prefix("rate_limit:").unwrap_or(name);
    // An address with something else beside it keeps its scope, or two would be called the same.
    match short.strip_prefix("ip:") {
        Some(ip) if ip.parse::<std::net::IpAddr>().is_ok() => ip,
        _ => short,
    }
}

fn shown(name: &str, rate: &Rate) -> Value {
    json!({
        "key": name,
        "current_count": rate.used,
        "limit": rate.limit,
        "window": rate.window,
        "reset_time": rate.resets.div_ceil(1_000),
        "rule": rate.rule,
        "unit": rate.unit,
    })
}
