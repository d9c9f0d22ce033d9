//! `/admin/limits`: the rules that hold, and rules of operators over those of the file.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Map, Value, json};
use tollgate_limiter::Limit;

use super::ask::{Path, gone, json, record, write};
use super::fields::Fields;
use super::problem::{Fault, Problem};
use super::{Ask, Reply, Shared, history};
use crate::Gateway;
use crate::config::{self, Config, Match, Rule};
use crate::control::{self, Change, Control, LimitOverride, Record, Time};
use crate::fleet::{self, Instance};
use crate::rates::{Rate, unix_millis};
use crate::snapshot::Snapshot;

/// Rules that can hold over those of the file at once.
const OVERRIDES_MAX: usize = 1_000;

/// `GET /admin/limits?limit=&cursor=`: by name; those of operators that are not in force, too.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (page, now) = (ask.page()?, gateway.snapshot.load_full());
    let named = now.rules().iter().map(|rule| (rule.name.as_str(), Some(rule)));
    let aside = now.merged.aside.iter().map(|aside| (aside.name.as_str(), None));
    let mut rules: BTreeMap<&str, Option<&Rule>> = aside.collect();
    rules.extend(named);
    let later = page.after.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
    let entries = rules.range::<str, _>((later, Bound::Unbounded));
    let live = Live::of(&gateway, &now).await;
    let entries = entries.map(|(&name, rule)| (name.to_owned(), in_force(&now, name, *rule, Some(&live)).0));
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// `GET /admin/limits/{name}`
pub(super) async fn show(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    if let Some(name) = history::of(&name) {
        return history::list(&gateway, name, &ask);
    }
    let now = gateway.snapshot.load_full();
    let rule = now.rules().iter().find(|rule| rule.name == name);
    if rule.is_none() && !now.merged.aside.iter().any(|aside| aside.name == name) {
        return Err(Problem::absent("limit", &name));
    }
    let (shown, version) = in_force(&now, &name, rule, Some(&Live::of(&gateway, &now).await));
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
        set(&gateway, &ask, now, ("limit", &name, "put"), spec, expires)
    })
    .await?;
    Ok(record(StatusCode::OK, &made, version))
}

/// `DELETE /admin/limits/{name}`: what the file says holds again.
pub(super) async fn delete(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| Ok((take_away(&gateway, &ask, now, (&name, "delete"))?, ()))).await?;
    Ok(gone())
}

/// `POST /admin/limits/{name}/rollback`
pub(super) async fn post(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    history::rollback(&gateway, &name, &ask).await
}

/// Takes a rule of an operator away; `action` is what history and audit call it.
pub(super) fn take_away(
    gateway: &Gateway,
    ask: &Ask,
    now: &Control,
    (name, action): (&str, &'static str),
) -> Result<Change, Problem> {
    let config = &gateway.snapshot.load().config;
    let Some(over) = over(now, name) else {
        return Err(match config.rules.iter().any(|rule| rule.name == name) {
            true => Problem::conflict(format!("the rule `{name}` is in the file: change it there")),
            false => Problem::absent("limit", name),
        });
    };
    ask.still(over)?;
    fits("name", config, now, &now.with_record::<LimitOverride>(name, None))?;
    let mut change = Change::default();
    change.delete::<LimitOverride>(audited(action), now, name);
    control::remember(&mut change, now, &ask.author, (name, action), None);
    Ok(change)
}

/// What the audit calls a change of a limit.
fn audited(action: &str) -> &'static str {
    match action {
        "delete" => "limits.delete",
        "rollback" => "limits.rollback",
        _ => "limits.put",
    }
}

/// Sets a rule over those of the file; `field` is what to change where a request would meet too many limits, `action` what
/// history and audit call it.
pub(super) fn set(
    gateway: &Gateway,
    ask: &Ask,
    now: &Control,
    (field, name, action): (&str, &str, &str),
    spec: Map<String, Value>,
    expires: Option<Time>,
) -> Result<(Change, (Value, u64)), Problem> {
    let config = &gateway.snapshot.load().config;
    let before = over(now, name);
    if let Some(before) = before {
        ask.still(before)?;
    } else {
        // Of a rule of the file the version is 0.
        ask.still_at(config.rules.iter().any(|rule| rule.name == name).then_some(0))?;
    }
    let held = now.limits.values().filter(|over| over.value.holds()).count();
    if before.is_none() && held >= OVERRIDES_MAX {
        return Err(Problem::conflict(format!("there are {OVERRIDES_MAX} limits of operators at most")));
    }
    let spec = Value::Object(spec);
    let rule = config::over_rule(config, &control::known(config, now), name, &spec);
    let rule = rule.map_err(|problems| Problem::fields(problems.into_iter().map(Fault::from).collect()))?;
    let over = LimitOverride { spec, expires, created: Time::now() };
    fits(field, config, now, &now.with_record(name, Some(over.clone())))?;
    let mut change = Change::default();
    let is_past = |(there, over): &(&String, &Arc<Record<LimitOverride>>)| {
        there.as_str() != name && !over.value.holds()
    };
    now.limits.iter().filter(is_past).for_each(|(name, _)| change.forget::<LimitOverride>(name));
    change.put(audited(action), now, name, &over);
    control::remember(&mut change, now, &ask.author, (name, action), Some(over.clone()));
    let version = now.version + 1;
    Ok((change, (shown(&rule, Some(&Record { version, value: over })), version)))
}

/// Refuses rules of which one request could meet too many.
fn fits(field: &str, config: &Config, now: &Control, next: &Control) -> Result<(), Problem> {
    control::fits((config, now), (config, next)).map_err(|overlap| Problem::overlap(field, &overlap))
}

/// What limits say at the moment.
pub(super) struct Live<'a> {
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
pub(super) fn over<'a>(control: &'a Control, name: &str) -> Option<&'a Record<LimitOverride>> {
    control.limits.get(name).map(|over| &**over).filter(|over| over.value.holds())
}

/// What holds under a name, and the version of what an operator said of it. A rule of an operator that is put aside is
/// told of in `aside`, beside the rule of the file that holds instead, if there is one.
pub(super) fn in_force(
    now: &Snapshot,
    name: &str,
    rule: Option<&Rule>,
    live: Option<&Live<'_>>,
) -> (Value, u64) {
    let over = over(&now.control, name);
    let aside = now.merged.aside.iter().find(|aside| aside.name == name);
    let version = over.map_or(0, |over| over.version);
    let mut shown = match rule {
        Some(rule) => {
            let over = over.filter(|_| aside.is_none());
            live.map_or_else(|| shown(rule, over), |live| live.shown(rule, over))
        }
        None => json!({ "name": name, "source": "admin", "match": {}, "per": "global", "deny": false,
                        "shadow": false, "limits": [] }),
    };
    if let (Some(aside), Some(over)) = (aside, over) {
        shown["aside"] = json!({ "why": aside.why, "rule": over.value.spec });
        shown["version"] = version.into();
    }
    (shown, version)
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
