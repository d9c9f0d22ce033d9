//! `GET /admin/rate-limit/stats`, `GET /admin/redis/status`: what existing scripts and monitoring read.

use std::cmp::Reverse;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Map, Value, json};
use tollgate_limiter::{Circuit, ResilientStore, ServerInfo};

use super::ask::json;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::config::Redis;
use crate::control::Time;
use crate::fleet::Told;
use crate::limits::Limits;
use crate::rates::{Rate, public_name};
use crate::{Gateway, fleet};

/// `GET /admin/rate-limit/stats?limit=&cursor=&prefix=`: totals of the fleet, and of each subject its fullest limit, the
/// fullest first.
pub(super) async fn stats(State(gateway): Shared, ask: Ask) -> Reply {
    let page = ask.page()?;
    let after = page.after.as_deref().map(place_of).transpose()?;
    let prefix = ask.parameter("prefix").unwrap_or_default();
    let Told { totals, rates, .. } = fleet::rates(&gateway).await;
    let wanted = |name: &str| {
        let key = name.strip_prefix("rate_limit:").unwrap_or(name);
        name.starts_with(prefix) || key.starts_with(prefix)
    };
    let mut named: Vec<(Reverse<u64>, String, Rate)> = rates
        .into_iter()
        .map(|rate| (Reverse(rate.fullness()), public_name(&rate.subject), rate))
        .filter(|(fullness, name, _)| {
            wanted(name) && after.as_ref().is_none_or(|(full, last)| (fullness, name) > (full, last))
        })
        .collect();
    named.sort_unstable_by(|one, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
    let entries = named.iter().map(|(Reverse(fullness), name, rate)| {
        (format!("{fullness} {name}"), json!([json_key(name), shown(name, rate)]))
    });
    let mut listed = page.of(entries);
    let rates: Map<String, Value> =
        listed["data"].as_array_mut().map(std::mem::take).into_iter().flatten().filter_map(pair).collect();
    let stats = json!({
        "total_requests": totals.requests,
        "blocked_requests": totals.blocked,
        "current_rates": rates,
        "redis_connected": is_connected(&gateway),
        "last_update": Time::now(),
    });
    let answer = json!({ "status": "success", "stats": stats, "next_cursor": listed["next_cursor"] });
    Ok(json(StatusCode::OK, &answer))
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

/// Where a page ends: fullness, a space, name.
fn place_of(after: &str) -> Result<(Reverse<u64>, String), Problem> {
    let parts = after.split_once(' ').and_then(|(full, name)| Some((full.parse().ok()?, name)));
    let (full, name) = parts.ok_or_else(|| Problem::field("cursor", "is no cursor of this list"))?;
    Ok((Reverse(full), name.to_owned()))
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

fn pair(entry: Value) -> Option<(String, Value)> {
    let Value::Array(pair) = entry else { return None };
    let mut pair = pair.into_iter();
    match (pair.next(), pair.next()) {
        (Some(Value::String(key)), Some(value)) => Some((key, value)),
        _ => None,
    }
}
