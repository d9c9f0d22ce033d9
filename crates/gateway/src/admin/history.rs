//! What operators made of a limit, and the way back: `/admin/limits/{name}/history`, `/admin/limits/{name}/rollback`.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::ask::{json, write};
use super::fields::Fields;
use super::limits::{in_force, over, set, take_away};
use super::problem::Problem;
use super::{Ask, Reply};
use crate::Gateway;
use crate::control::{LimitOverride, Time};

/// What a name is followed by in the paths of this file. No rule is called so.
const HISTORY: &str = "/history";
const ROLLBACK: &str = "/rollback";

/// The limit whose history is asked for, if it is.
pub(super) fn of(name: &str) -> Option<&str> {
    name.strip_suffix(HISTORY)
}

/// `GET /admin/limits/{name}/history?limit=&cursor=`: the latest version first.
pub(super) fn list(gateway: &Gateway, name: &str, ask: &Ask) -> Reply {
    let (page, control) = (ask.page()?, gateway.control.now());
    let before = match page.after.as_deref().map(str::parse) {
        None => u64::MAX,
        Some(Ok(version)) => version,
        Some(Err(_)) => return Err(Problem::field("cursor", "is no cursor of this list")),
    };
    let history = control.histories.get(name);
    if history.is_none() && !gateway.snapshot.load().rules().iter().any(|rule| rule.name == name) {
        return Err(Problem::absent("limit", name));
    }
    let versions = history.into_iter().flat_map(|history| history.value.latest_first());
    let entries = versions.filter(|(version, _)| version.version < before).map(|(version, was)| {
        let shown = json!({ "version": version.version, "time": version.time, "actor": version.actor,
                            "address": version.address, "action": version.action,
                            "before": shown(was), "after": shown(version.after.as_ref()) });
        (version.version.to_string(), shown)
    });
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// `POST /admin/limits/{name}/rollback`: `{"version":7}`: what that version made of the limit holds again. A later change is
/// no reason not to, nor is its deletion.
pub(super) async fn rollback(gateway: &Arc<Gateway>, path: &str, ask: &Ask) -> Reply {
    let Some(name) = path.strip_suffix(ROLLBACK) else {
        let detail = "this path is not asked with this method";
        return Err(Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail));
    };
    let (number, version, made) = write(gateway, ask, |now| {
        let mut fields = Fields::of(&ask.body)?;
        let number = fields.number("version", 1, u64::MAX);
        fields.finish()?;
        let number = number.ok_or_else(|| Problem::field("version", "is missing"))?;
        let history = now.histories.get(name).ok_or_else(|| Problem::absent("history of a limit", name))?;
        let wanted = history.value.version(number).ok_or_else(|| {
            Problem::field("version", "is no version of this limit that is remembered; see its history")
        })?;
        match &wanted.after {
            None if over(now, name).is_none() => Err(Problem::conflict(format!(
                "version {number} took the limit away, and it is away: there is nothing to go back to"
            ))),
            None => Ok((take_away(gateway, ask, now, (name, "rollback"))?, (number, now.version + 1, None))),
            Some(LimitOverride { expires: Some(end), .. }) if end.has_come() => {
                Err(Problem::field("version", format!("that version was to end at {end}: set it anew")))
            }
            Some(LimitOverride { spec, expires, .. }) => {
                let spec = spec.as_object().cloned().unwrap_or_default();
                let (change, (made, version)) =
                    set(gateway, ask, now, ("version", name, "rollback"), spec, *expires)?;
                Ok((change, (number, version, Some(made))))
            }
        }
    })
    .await?;
    let rule = made.or_else(|| {
        let now = gateway.snapshot.load();
        let of_file = now.config.rules.iter().find(|rule| rule.name == name);
        of_file.map(|rule| in_force(&now, name, Some(rule), None).0)
    });
    let answer = json!({ "name": name, "rolled_back_to": number, "version": version, "rule": rule });
    Ok(super::ask::record(StatusCode::OK, &answer, version))
}

fn shown(over: Option<&LimitOverride>) -> Value {
    over.map_or(Value::Null, |LimitOverride { spec, expires, created }| {
        let mut shown = json!({ "rule": spec, "created": created });
        if let Some(end) = expires {
            shown["expires"] = json!(end);
            shown["ended"] = Time::has_come(*end).into();
        }
        shown
    })
}
