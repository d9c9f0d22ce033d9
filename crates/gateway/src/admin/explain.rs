//! `/admin/explain`: what a request would meet, in order, and what each of it says. Nothing is spent.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use bytes::Bytes;
use http::header::HeaderValue;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tollgate_limiter::{CHARGES_MAX, Charge, Retry, Standing};

use super::ask::json;
use super::fields::Fields;
use super::limits::shown_match;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::Gateway;
use crate::admission::{Demand, shown};
use crate::call::Endpoint;
use crate::config::{Auth, Key, Match, Rule};
use crate::error::Error;
use crate::identity::Caller;
use crate::router::{self, Route};
use crate::snapshot::{Model, Snapshot};

/// `GET /admin/explain?user=|api_key=&model=&endpoint=&ip=`, or `POST` with the same in the body.
pub(super) async fn explain(State(gateway): Shared, ask: Ask) -> Reply {
    let now = gateway.snapshot.load_full();
    let (caller, endpoint, asked) = read(&now, &ask)?;
    let model = now.model(&asked);
    let ban = now.bans.on(&caller);
    let name = model.map_or(&*asked, |model| &*model.name);
    let route = endpoint.route();
    let (rules, refusal) = match model {
        Some(model) => rules(&gateway, &now, &caller, route, model).await?,
        None => (now.rules().iter().map(|rule| met(&now, rule, &caller, route, name, &[])).collect(), None),
    };
    let denying = || now.rules().iter().find(|rule| rule.deny && rule.matches.holds(&caller, route, name));
    let refused = stopped(&now, &caller, endpoint, &asked, model)
        .or_else(|| denying().map(|rule| Error::Denied(rule.name.as_str().into())))
        .map(|error| json!({ "code": error.code(), "why": error.message() }))
        .or(refusal);
    let answer = json!({
        "caller": shown_caller(&caller),
        "model": model.map(|model| &*model.name),
        "endpoint": route,
        "allowed": refused.is_none(),
        "refused": refused,
        "ban": ban.map(|ban| json!({ "subject": ban.subject, "reason": ban.reason, "until": ban.until })),
        "providers": model.map(|model| providers(&now, model, &caller, endpoint)),
        "rules": rules,
    });
    Ok(json(StatusCode::OK, &answer))
}

/// Who asks for what.
fn read(now: &Snapshot, ask: &Ask) -> Result<(Caller, Endpoint, String), Problem> {
    let mut fields = Fields::of(&ask.body)?;
    let mut given = |name: &'static str| {
        let said = fields.text(name, |text| Ok(text.to_owned())).value();
        said.or_else(|| ask.parameter(name).map(str::to_owned))
    };
    let [user, key, model, endpoint, ip, agent] =
        ["user", "api_key", "model", "endpoint", "ip", "user_agent"].map(&mut given);
    fields.finish()?;
    let key = match (&key, &user) {
        (Some(_), Some(_)) => return Err(Problem::field("user", "is said by the key: give one of both")),
        (Some(id), None) => Some(now.key_of(id).ok_or_else(|| Problem::absent("key", id))?.clone()),
        (None, Some(name)) => Some(key_of_user(now, name)?),
        (None, None) => None,
    };
    let model = model.ok_or_else(|| Problem::field("model", "is missing"))?;
    let endpoint = endpoint.as_deref().unwrap_or("/v1/chat/completions");
    let endpoint = match router::route(&Method::POST, endpoint) {
        Ok(Route::Call(endpoint)) => endpoint,
        _ => {
            return Err(Problem::field(
                "endpoint",
                "is no endpoint that is limited; write /v1/chat/completions",
            ));
        }
    };
    let address = match ip {
        None => ask.author.address,
        Some(ip) => ip.parse::<IpAddr>().map_err(|_| Problem::field("ip", "is no address"))?.to_canonical(),
    };
    if agent.as_deref().is_some_and(|agent| HeaderValue::from_str(agent).is_err()) {
        return Err(Problem::field("user_agent", "cannot be sent in a header"));
    }
    let agent = agent.map(Bytes::from);
    Ok((Caller { key, address, agent }, endpoint, model))
}

/// The first key of a user: all of them meet the same limits but those per key.
fn key_of_user(now: &Snapshot, name: &str) -> Result<Arc<Key>, Problem> {
    let of_file =
        now.config.keys.iter().filter(|key| key.user.as_ref().is_some_and(|user| user.name == name));
    let of_operators = now.control.keys.iter().filter(|(_, key)| key.value.user.as_deref() == Some(name));
    let ids = of_file.map(|key| &key.id).chain(of_operators.map(|(id, _)| id));
    let known = ids.filter_map(|id| now.key_of(id)).next().cloned();
    known.ok_or_else(|| match now.config.users.iter().any(|user| user.name == name) {
        true => Problem::conflict(format!("the user `{name}` has no key, so nothing of theirs is let in")),
        false if now.control.users.contains_key(name) => {
            Problem::conflict(format!("the user `{name}` has no key, so nothing of theirs is let in"))
        }
        false => Problem::absent("user", name),
    })
}

/// What refuses the request before any limit is asked, in the order of the pipeline.
fn stopped(
    now: &Snapshot,
    caller: &Caller,
    endpoint: Endpoint,
    asked: &str,
    model: Option<&Arc<Model>>,
) -> Option<Error> {
    match &caller.key {
        Some(key) if key.revoked => return Some(Error::RevokedKey),
        Some(key) if key.expires.is_some_and(|end| end <= SystemTime::now()) => {
            return Some(Error::ExpiredKey);
        }
        None if now.config.auth != Auth::Optional => return Some(Error::MissingKey),
        _ => {}
    }
    if let Some(ban) = now.bans.on(caller) {
        return Some(Error::Banned(ban.sentence()));
    }
    let Some(model) = model else { return Some(Error::ModelNotFound(asked.to_owned())) };
    if !caller.may_use(&model.name) {
        return Some(Error::ModelNotAllowed(asked.to_owned()));
    }
    let mut serving =
        now.deployments(model, caller).filter(|deployment| deployment.serves(endpoint)).peekable();
    if serving.peek().is_none() {
        return Some(Error::UnsupportedEndpoint(asked.to_owned(), endpoint.route()));
    }
    serving
        .all(|deployment| now.is_drained(deployment))
        .then(|| Error::UpstreamFailed(vec!["every provider is drained".to_owned()]))
}

/// Every rule, and what refuses the request among the limits.
async fn rules(
    gateway: &Gateway,
    now: &Snapshot,
    caller: &Caller,
    route: &'static str,
    model: &Model,
) -> Result<(Vec<Value>, Option<Value>), Problem> {
    let plan = now.plans.plan(now.rules(), gateway.metrics(), caller, route, &model.name);
    // Asked for one unit, so that an answer can say when there is one.
    let charges: Vec<Charge> = plan
        .charges(caller, &Demand::default())
        .map(|charge| Charge::new(charge.limit().clone(), charge.subject().clone(), 1))
        .collect();
    let mut said: Vec<Standing> = Vec::with_capacity(charges.len());
    for charges in charges.chunks(CHARGES_MAX) {
        let peeked = gateway.limits.peek(charges.to_vec()).await;
        said.extend(
            peeked.map_err(|error| Problem::unavailable(format!("the limits cannot be read: {error}")))?,
        );
    }
    let mut rest = said.as_slice();
    let mut rules = Vec::new();
    for rule in now.rules() {
        let count = if rule.matches.holds(caller, route, &model.name) { rule.limits.len() } else { 0 };
        let (own, others) = rest.split_at(count.min(rest.len()));
        rest = others;
        rules.push(met(now, rule, caller, route, &model.name, own));
    }
    if let Some(key) = caller.key.as_ref().filter(|_| !rest.is_empty()) {
        rules.push(json!({ "name": crate::control::KEY_RULE, "defined": format!("/admin/keys/{}", key.id),
                           "matches": true, "deny": false, "limits": rest.iter().map(shown).collect::<Vec<_>>() }));
    }
    let refusing = said.iter().filter(|said| !said.limit.is_shadow() && said.retry != Retry::Now);
    let refusal = refusing.max_by_key(|said| said.retry).map(|said| {
        let wait = match said.retry {
            Retry::After(wait) => Some(wait.get()),
            Retry::Now | Retry::Never => None,
        };
        let why = format!("the limit `{}` has no room for {}", said.limit.id(), said.subject);
        json!({ "code": "rate_limit_exceeded", "why": why, "rule": said.limit.id(), "retry_after_ms": wait })
    });
    Ok((rules, refusal))
}

fn met(now: &Snapshot, rule: &Rule, caller: &Caller, route: &str, model: &str, said: &[Standing]) -> Value {
    let failing = rule.matches.failing(caller, route, model);
    let mut shown_rule = json!({
        "name": rule.name,
        "defined": defined(now, &rule.name),
        "match": shown_match(&rule.matches),
        "matches": failing.is_none(),
        "deny": rule.deny,
        "limits": said.iter().map(shown).collect::<Vec<_>>(),
    });
    if let Some(condition) = failing {
        shown_rule["why_not"] = why_not(condition, &rule.matches, caller, route, model).into();
    }
    shown_rule
}

/// `` `user` is bob, the rule is for alice ``
fn why_not(condition: &str, matches: &Match, caller: &Caller, route: &str, model: &str) -> String {
    let wanted = shown_match(matches);
    let wanted = match &wanted[condition] {
        Value::Array(values) => values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    };
    let address = caller.address.to_string();
    let is = match condition {
        "authenticated" => Some(if caller.key.is_some() { "true" } else { "false" }),
        "endpoint" => Some(route),
        "model" => Some(model),
        "user" => caller.user(),
        "team" => caller.team(),
        "tier" => caller.tier(),
        "api_key" => caller.key.as_ref().map(|key| key.id.as_str()),
        _ => Some(&*address),
    };
    format!("`{condition}` is {}, the rule is for {wanted}", is.unwrap_or("none"))
}

/// Where a rule comes from: `tollgate.yml:12:5`, `admin`; `null` where nobody wrote it.
fn defined(now: &Snapshot, name: &str) -> Value {
    if now.control.limits.get(name).is_some_and(|over| over.value.holds()) {
        return "admin".into();
    }
    let (config, Some(origins)) = (&now.effective["config"], now.effective["origins"].as_object()) else {
        return Value::Null;
    };
    let listed =
        config["limits"].as_array().and_then(|rules| rules.iter().position(|rule| rule["name"] == *name));
    let path = listed.map_or_else(|| format!("tiers.{name}"), |index| format!("limits[{index}]"));
    let within =
        |key: &str| key.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || ".[".contains(&rest[..1]));
    origins.iter().find(|(key, _)| within(key)).map_or(Value::Null, |(_, place)| place.clone())
}

fn shown_caller(caller: &Caller) -> Value {
    json!({
        "api_key": caller.key.as_ref().map(|key| &key.id),
        "user": caller.user(),
        "team": caller.team(),
        "tier": caller.tier(),
        "ip": caller.ip(),
        "session": caller.session(),
    })
}

fn providers(now: &Snapshot, model: &Model, caller: &Caller, endpoint: Endpoint) -> Vec<Value> {
    let shown = now.deployments(model, caller).map(|deployment| {
        let rests = deployment.health.rests_until().is_some_and(|until| until > std::time::Instant::now());
        json!({ "model": &*deployment.model, "name": &*deployment.name, "serves": deployment.serves(endpoint),
                "drained": now.is_drained(deployment), "healthy": !rests })
    });
    shown.collect()
}
