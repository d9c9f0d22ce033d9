//! `/admin/limits`: the rules that hold, and rules of operators over those of the file.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{Path, State};
use http::StatusCode;
use serde_json::{Map, Value, json};
use tollgate_limiter::Limit;

use super::ask::{gone, json, record, write};
use super::fields::Fields;
use super::problem::{Fault, Problem};
use super::{Ask, Reply, Shared};
use crate::Gateway;
use crate::config::{self, Match, Rule};
use crate::control::{self, Change, Control, LimitOverride, Record, Time};
use crate::fleet::{self, Instance};
use crate::rates::{Rate, unix_millis};
use crate::snapshot::Snapshot;

/// Rules that can be kept over those of the file.
const OVERRIDES_MAX: usize = 1_000;

/// `GET /admin/limits?limit=&cursor=`: by name.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (page, now) = (ask.page()?, gateway.snapshot.load_full());
    let mut rules: Vec<&Rule> = now.rules().iter().collect();
    rules.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    let later =
        rules.into_iter().filter(|rule| page.after.as_deref().is_none_or(|after| *rule.name > *after));
    let live = Live::of(&gateway, &now).await;
    let entries = later.map(|rule| (rule.name.clone(), live.shown(rule, over(&now.control, &rule.name))));
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// `GET /admin/limits/{name}`
pub(super) async fn show(State(gateway): Shared, Path(name): Path<String>) -> Reply {
    let now = gateway.snapshot.load_full();
    let rule = now.rules().iter().find(|rule| rule.name == name);
    let rule = rule.ok_or_else(|| Problem::absent("limit", &name))?;
    let over = over(&now.control, &name);
    let version = over.map_or(0, |over| over.version);
    let shown = Live::of(&gateway, &now).await.shown(rule, over);
    Ok(record(StatusCode::OK, &shown, version))
}

/// `PUT /admin/limits/{name}`: as an entry of `limits` in the file, without its name, and with `expires` or `expires_in`.
/// What it leaves out of `match`, `per` and `strategy` is as in the file's rule of that name. Counters go on.
pub(super) async fn put(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    let (made, version) = write(&gateway, &ask, |now| {
        let mut fields = Fields::of(&ask.body)?;
        let expires = fields.end("expires").value();
        let (mut spec, faults) = fields.rest();
        super::ask::refuse(faults)?;
        if spec.shift_remove("name").is_some_and(|said| said != *name) {
            return Err(Problem::field("name", "is not that of the path"));
        }
        set(&gateway, &ask, now, &name, spec, expires)
    })
    .await?;
    Ok(record(StatusCode::OK, &made, version))
}

/// `DELETE /admin/limits/{name}`: what the file says holds again.
pub(super) async fn delete(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| {
        let Some(over) = now.limits.get(&name) else {
            let config = &gateway.snapshot.load().config;
            return Err(match config.rules.iter().any(|rule| rule.name == name) {
                true => Problem::conflict(format!("the rule `{name}` is in the file: change it there")),
                false => Problem::absent("limit", &name),
            });
        };
        ask.still(over)?;
        let mut change = Change::default();
        change.delete::<LimitOverride>("limits.delete", now, &name);
        Ok((change, ()))
    })
    .await?;
    Ok(gone())
}

/// Sets a rule over those of the file.
pub(super) fn set(
    gateway: &Arc<Gateway>,
    ask: &Ask,
    now: &Control,
    name: &str,
    spec: Map<String, Value>,
    expires: Option<Time>,
) -> Result<(Change, (Value, u64)), Problem> {
    let config = &gateway.snapshot.load().config;
    if let Some(before) = now.limits.get(name) {
        ask.still(before)?;
    } else if now.limits.len() >= OVERRIDES_MAX {
        return Err(Problem::conflict(format!("there are {OVERRIDES_MAX} limits of operators at most")));
    }
    let spec = Value::Object(spec);
    let rule = config::over_rule(config, &control::known(config, now), name, &spec);
    let rule = rule.map_err(|problems| Problem::fields(problems.into_iter().map(Fault::from).collect()))?;
    let over = LimitOverride { spec, expires, created: Time::now() };
    let mut change = Change::default();
    let is_past = |(there, over): &(&String, &Arc<Record<LimitOverride>>)| {
        there.as_str() != name && !over.value.holds()
    };
    now.limits.iter().filter(is_past).for_each(|(name, _)| change.forget::<LimitOverride>(name));
    change.put("limits.put", now, name, &over);
    let version = now.version + 1;
    Ok((change, (shown(&rule, Some(&Record { version, value: over })), version)))
}

/// What limits say at the moment.
struct Live<'a> {
    now: &'a Snapshot,
    instance: &'a Instance,
    of_fleet: bool,
    /// Of each limit, by its id, the fullest of those of which it is the fullest.
    fullest: HashMap<String, Rate>,
}

impl<'a> Live<'a> {
    async fn of(gateway: &'a Gateway, now: &'a Snapshot) -> Self {
        let told = fleet::rates(gateway).await;
        let mut fullest: HashMap<String, Rate> = HashMap::new();
        for rate in told.rates {
            match fullest.get_mut(&rate.rule) {
                Some(before) if before.fullness() >= rate.fullness() => {}
                Some(before) => *before = rate,
                None => drop(fullest.insert(rate.rule.clone(), rate)),
            }
        }
        Self { now, instance: &gateway.instance, of_fleet: told.of_fleet, fullest }
    }

    /// A rule with what its limits said to requests of this instance, and who has used most of them.
    fn shown(&self, rule: &Rule, over: Option<&Record<LimitOverride>>) -> Value {
        let mut shown = shown(rule, over);
        let at = unix_millis(SystemTime::now());
        let limits = shown["limits"].as_array_mut().into_iter().flatten();
        for (shown, limit) in limits.zip(&rule.limits) {
            let said = self.now.plans.counts().said(limit.id());
            shown["live"] = json!({
                "allowed": said.allowed,
                "refused": said.refused,
                "shadow": said.shadow,
                "failed": said.failed,
                "fullest": self.fullest.get(limit.id()).map(|rate| rate.live(at)),
            });
        }
        shown["live"] = json!({
            "counted_by": self.instance.name(),
            "since": self.instance.started(),
            "fullest_of": if self.of_fleet { "fleet" } else { "instance" },
        });
        shown
    }
}

/// The rule of an operator that holds under a name.
fn over<'a>(control: &'a Control, name: &str) -> Option<&'a Record<LimitOverride>> {
    control.limits.get(name).map(|over| &**over).filter(|over| over.value.holds())
}

fn shown(rule: &Rule, over: Option<&Record<LimitOverride>>) -> Value {
    let limits: Vec<Value> = rule.limits.iter().map(|limit| shown_limit(limit)).collect();
    let shadow = rule.limits.iter().any(|limit| limit.is_shadow());
    let mut shown = json!({
        "name": rule.name,
        "source": if over.is_some() { "admin" } else { "file" },
        "match": shown_match(&rule.matches),
        "per": rule.per.to_string(),
        "deny": rule.deny,
        "shadow": shadow,
        "limits": limits,
    });
    if let Some(Record { version, value }) = over {
        shown["created"] = json!(value.created);
        shown["expires"] = json!(value.expires);
        shown["version"] = (*version).into();
    }
    shown
}

fn shown_limit(limit: &Limit) -> Value {
    json!({ "id": limit.id(), "quota": limit.quota().to_string(), "unit": limit.unit().as_str(),
            "window": limit.quota().window().map(|window| window.to_string()), "limit": limit.capacity(),
            "strategy": limit.algorithm().as_str(), "guarantee": limit.guarantee() })
}

/// As it is written, without what is left out.
pub(super) fn shown_match(matches: &Match) -> Value {
    let Match { authenticated, endpoint, model, user, team, tier, api_key, ip } = matches;
    let mut shown = Map::new();
    if let Some(authenticated) = authenticated {
        shown.insert("authenticated".to_owned(), (*authenticated).into());
    }
    let ip: Vec<String> = ip.iter().map(ToString::to_string).collect();
    let lists = [
        ("endpoint", endpoint),
        ("model", model),
        ("user", user),
        ("team", team),
        ("tier", tier),
        ("api_key", api_key),
        ("ip", &ip),
    ];
    for (name, values) in lists.into_iter().filter(|(_, values)| !values.is_empty()) {
        shown.insert(name.to_owned(), json!(values));
    }
    Value::Object(shown)
}
