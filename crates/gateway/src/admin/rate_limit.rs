//! `/admin/rate-limit/*`: two of the endpoints whose shapes existing scripts parse.

use std::borrow::Cow;
use std::net::IpAddr;

use axum::extract::State;
use http::{Method, StatusCode};
use serde_json::{Map, json};
use tollgate_limiter::{Dimension, Scope, Subject};

use super::ask::{json, write};
use super::fields::Fields;
use super::limits;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::control::{Change, Clear, Control, Time};
use crate::identity::counted;
use crate::router::{self, Route};
use crate::snapshot::Snapshot;

/// The largest amount of requests.
const REQUESTS_MAX: u64 = 1_000_000_000;
/// The longest window, seconds: a week.
const WINDOW_MAX: u64 = 7 * 86_400;
/// Clears that instances can still learn of.
const CLEARS_MAX: usize = 256;
/// The longest name of a subject.
const KEY_BYTES_MAX: usize = 1_024;

/// `PUT /admin/rate-limit/config`: sets the rule `endpoint:<path>`, per endpoint and address, above the file.
pub(super) async fn configure(State(gateway): Shared, ask: Ask) -> Reply {
    let (endpoint, requests, window) = write(&gateway, &ask, |now| {
        let mut fields = Fields::of(&ask.body)?;
        let endpoint = fields.text("endpoint", |path| Ok((path.to_owned(), canonical(path)?)));
        let endpoint = fields.needed("endpoint", endpoint);
        let requests = fields.number("requests", 1, REQUESTS_MAX);
        let window = fields.number("window", 1, WINDOW_MAX);
        for (name, missing) in [("requests", requests.is_none()), ("window", window.is_none())] {
            if missing && !fields.faults.iter().any(|fault| fault.field == name) {
                let _: super::fields::Given<()> = fields.wrong(name, "is missing");
            }
        }
        fields.finish()?;
        let (Some((said, route)), Some(requests), Some(window)) = (endpoint, requests, window) else {
            return Err(Problem::new(StatusCode::BAD_REQUEST, "endpoint, requests and window are needed"));
        };
        let spec: Map<_, _> = [
            ("match".to_owned(), json!({ "endpoint": [route] })),
            ("per".to_owned(), json!(["endpoint", "ip"])),
            ("limit".to_owned(), quota(requests, window).into()),
        ]
        .into_iter()
        .collect();
        let (change, _) =
            limits::set(&gateway, &ask, now, ("endpoint", &format!("endpoint:{route}"), "put"), spec, None)?;
        Ok((change, (said, requests, window)))
    })
    .await?;
    let answer = json!({ "status": "success", "message": "Rate limit configuration updated",
                         "endpoint": endpoint, "requests": requests, "window_seconds": window });
    Ok(json(StatusCode::OK, &answer))
}

/// `POST /admin/rate-limit/clear?key=rate_limit:ip:192.0.2.1`. Other instances forget within a second what they
/// remember of it; counters in Redis are everybody's.
pub(super) async fn clear(State(gateway): Shared, ask: Ask) -> Reply {
    let key = ask.parameter("key").ok_or_else(|| Problem::field("key", "is missing"))?;
    let subject = subject(&gateway.snapshot.load(), key)?;
    let existed = match ask.is_dry_run()? {
        true => false,
        false => gateway
            .limits
            .clear(&subject)
            .await
            .map_err(|error| Problem::unavailable(format!("the counters cannot be reached: {error}")))?,
    };
    if !ask.is_dry_run()? {
        gateway.rates.forget(subject.as_str());
    }
    let note = |now: &Control| {
        let mut change = Change::default();
        let oldest = now.clears.iter().min_by_key(|(_, clear)| clear.version);
        if let (Some((oldest, _)), CLEARS_MAX..) = (oldest, now.clears.len()) {
            change.forget::<Clear>(oldest);
        }
        change.put_unnoted(subject.as_str(), &Clear { created: Time::now() });
        change.note(
            "rate-limit.clear",
            key.to_owned(),
            serde_json::Value::Null,
            json!({ "existed": existed }),
        );
        Ok((change, ()))
    };
    // It is cleared, whether that can be written down or not.
    if let Err(problem) = write(&gateway, &ask, note).await {
        tracing::warn!(?problem, %key, "a clear is not in the audit");
    }
    let answer =
        json!({ "status": "success", "message": "Rate limit cleared", "key": key, "existed": existed });
    Ok(json(StatusCode::OK, &answer))
}

/// What an endpoint is counted as.
fn canonical(path: &str) -> Result<&'static str, String> {
    match router::route(&Method::POST, path) {
        Ok(Route::Call(endpoint)) => Ok(endpoint.route()),
        _ => Err("is no endpoint that is limited; write /v1/chat/completions".to_owned()),
    }
}

/// The notation's largest unit in which a window is whole.
fn quota(requests: u64, window: u64) -> String {
    let units = [(86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")];
    let unit = units.into_iter().find(|(seconds, _)| window.is_multiple_of(*seconds));
    let (seconds, name) = unit.unwrap_or((1, "second"));
    match window / seconds {
        1 => format!("{requests}/{name}"),
        count => format!("{requests}/{count} {name}s"),
    }
}

/// The subject that is publicly called so: `rate_limit:ip:192.0.2.1`, `rate_limit:endpoint:<path>:<ip>`,
/// `rate_limit:user:alice:model:chat`, with or without `rate_limit:`.
fn subject(now: &Snapshot, key: &str) -> Result<Subject, Problem> {
    let wrong = || {
        let help = "write rate_limit:ip:192.0.2.1, rate_limit:user:alice, rate_limit:endpoint:<path>:<ip>";
        Problem::field("key", format!("is no subject; {help}"))
    };
    if key.len() > KEY_BYTES_MAX {
        return Err(wrong());
    }
    let name = key.strip_prefix("rate_limit:").unwrap_or(key);
    let ip = |text: &str| text.parse::<IpAddr>().ok().map(|ip| counted(ip.to_canonical()).to_string());
    if let Some(ip) = name.strip_prefix("ip:").and_then(ip) {
        return Ok(Scope::of([Dimension::Ip]).subject(|_| Cow::Borrowed(&*ip)));
    }
    if let Some((path, ip)) = name.strip_prefix("endpoint:").and_then(|rest| {
        let (path, address) = rest.split_once(':')?;
        Some((path, ip(address)?))
    }) {
        return Ok(Scope::of([Dimension::Ip, Dimension::Endpoint]).subject(|dimension| match dimension {
            Dimension::Ip => Cow::Borrowed(&*ip),
            _ => Cow::Borrowed(path),
        }));
    }
    let subject: Subject = name.parse().map_err(|_| wrong())?;
    Ok(match tenant(now, name) {
        Some(tenant) => subject.of_tenant(&tenant),
        None => subject,
    })
}

/// Whose counters a subject's are kept with, where its name does not say that.
fn tenant(now: &Snapshot, name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split(':').collect();
    let value = |scope: &str| parts.chunks(2).find(|pair| pair[0] == scope)?.get(1).copied();
    if value("team").is_some() {
        return None;
    }
    if let Some(name) = value("user") {
        let of_file = now.config.users.iter().find(|user| user.name == name).map(|user| user.team.clone());
        let team = of_file.or_else(|| Some(now.control.users.get(name)?.value.team.clone())).flatten();
        return Some(team.unwrap_or_else(|| name.to_owned()));
    }
    let key = now.key_of(value("api_key")?)?;
    let user = key.user.as_ref();
    let team = key.own.team.clone().or_else(|| user?.team.clone());
    Some(team.or_else(|| user.map(|user| user.name.clone())).unwrap_or_else(|| key.id.clone()))
}
