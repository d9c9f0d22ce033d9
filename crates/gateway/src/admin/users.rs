//! `/admin/users`: users beside those of the file. A user of the file is changed in the file.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use super::ask::{Path, gone, json, record, write};
use super::fields::Fields;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::config::{self, Config, User};
use crate::control::{self, Change, Control, Record, Room, Stored, UserRecord};

/// Users that can be kept beside those of the file.
const USERS_MAX: usize = 100_000;
/// Models of one user.
const MODELS_MAX: usize = 1_000;

/// `GET /admin/users?limit=&cursor=`: of the file and of the admin API, by name.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (control, config) = (gateway.control.now(), gateway.snapshot.load().config.clone());
    let page = ask.page()?;
    let mut shown_by_name: BTreeMap<&str, Value> = BTreeMap::new();
    let later = |name: &str| page.after.as_deref().is_none_or(|after| name > after);
    // The first of each that may be on this page: no more of them can be.
    let added = control.users.iter().filter(|(name, _)| later(name)).take(page.size + 1);
    shown_by_name.extend(added.map(|(name, user)| (name.as_str(), shown(name, user))));
    let mut of_file: Vec<&Arc<User>> = config.users.iter().filter(|user| later(&user.name)).collect();
    of_file.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    let of_file = of_file.into_iter().take(page.size + 1);
    shown_by_name.extend(of_file.map(|user| (user.name.as_str(), shown_of_file(user))));
    let entries = shown_by_name.into_iter().map(|(name, shown)| (name.to_owned(), shown));
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// `GET /admin/users/{name}`
pub(super) async fn show(State(gateway): Shared, Path(name): Path<String>) -> Reply {
    if let Some(user) = of_file(&gateway.snapshot.load().config, &name) {
        return Ok(json(StatusCode::OK, &shown_of_file(user)));
    }
    let control = gateway.control.now();
    let user = known(&control, &name)?;
    Ok(record(StatusCode::OK, &shown(&name, user), user.version))
}

/// `POST /admin/users`
pub(super) async fn create(State(gateway): Shared, ask: Ask) -> Reply {
    let (made, version) = write(&gateway, &ask, |now| {
        let config = &gateway.snapshot.load().config;
        let mut fields = Fields::of(&ask.body)?;
        let name = fields.text("name", config::name);
        let name = fields.needed("name", name);
        let mut user = UserRecord::default();
        change(&mut fields, &mut user, config, now);
        fields.finish()?;
        let name = name.unwrap_or_default();
        if of_file(config, &name).is_some() {
            return Err(Problem::conflict(format!("the user `{name}` is in the file: change it there")));
        }
        if now.users.contains_key(&name) {
            return Err(Problem::conflict(format!("there is a user `{name}` already")));
        }
        if now.users.len() >= USERS_MAX {
            return Err(Problem::conflict(format!("there are {USERS_MAX} users at most")));
        }
        fits(config, now, &name, &user)?;
        Ok(put("users.create", now, &name, user))
    })
    .await?;
    Ok(record(StatusCode::CREATED, &made, version))
}

/// `PATCH /admin/users/{name}`: what is not named stays, `null` takes away.
pub(super) async fn patch(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    let (after, version) = write(&gateway, &ask, |now| {
        let config = &gateway.snapshot.load().config;
        let before = changeable(config, now, &name)?;
        ask.still(before)?;
        let mut fields = Fields::of(&ask.body)?;
        let mut user = before.value.clone();
        change(&mut fields, &mut user, config, now);
        fields.finish()?;
        fits(config, now, &name, &user)?;
        Ok(put("users.patch", now, &name, user))
    })
    .await?;
    Ok(record(StatusCode::OK, &after, version))
}

/// `DELETE /admin/users/{name}`: once it has no keys.
pub(super) async fn delete(State(gateway): Shared, Path(name): Path<String>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| {
        ask.still(changeable(&gateway.snapshot.load().config, now, &name)?)?;
        let keys = now.keys.values().filter(|key| key.value.user.as_ref() == Some(&name)).count();
        if keys > 0 {
            return Err(Problem::conflict(format!("`{name}` has {keys} keys: delete them first")));
        }
        let mut change = Change::default();
        change.delete::<UserRecord>("users.delete", now, &name);
        Ok((change, ()))
    })
    .await?;
    Ok(gone())
}

fn of_file<'a>(config: &'a Config, name: &str) -> Option<&'a Arc<User>> {
    config.users.iter().find(|user| user.name == name)
}

fn known<'a>(control: &'a Control, name: &str) -> Result<&'a Record<UserRecord>, Problem> {
    control.users.get(name).map(|user| &**user).ok_or_else(|| Problem::absent("user", name))
}

fn changeable<'a>(
    config: &Config,
    control: &'a Control,
    name: &str,
) -> Result<&'a Record<UserRecord>, Problem> {
    match of_file(config, name) {
        Some(_) => Err(Problem::conflict(format!("the user `{name}` is in the file: change it there"))),
        None => known(control, name),
    }
}

fn change(fields: &mut Fields, user: &mut UserRecord, config: &Config, now: &Control) {
    let known = control::known(config, now);
    user.team = fields.text("team", config::name).or(user.team.take());
    user.tier = fields.text("tier", |name| known.tier(name)).or(user.tier.take());
    user.models = fields.texts("models", MODELS_MAX, |name| known.model(name)).or(user.models.take());
    user.metadata = fields.metadata().or(Some(std::mem::take(&mut user.metadata))).unwrap_or_default();
}

/// Refuses a user with whose keys requests could meet too many limits.
fn fits(config: &Config, now: &Control, name: &str, user: &UserRecord) -> Result<(), Problem> {
    let next = now.with_record(name, Some(user.clone()));
    let fits = Room::under(config, &next).for_user(name, &mut Room::under(config, now));
    fits.map_err(|overlap| Problem::overlap("tier", &overlap))
}

fn put(action: &'static str, now: &Control, name: &str, user: UserRecord) -> (Change, (Value, u64)) {
    let mut change = Change::default();
    change.put(action, now, name, &user);
    let version = now.version + 1;
    (change, (shown(name, &Record { version, value: user }), version))
}

fn shown(name: &str, user: &Record<UserRecord>) -> Value {
    let mut shown = json!({ "name": name, "source": "admin" });
    if let (Some(shown), Value::Object(fields)) = (shown.as_object_mut(), user.value.shown()) {
        shown.extend(fields);
        shown.insert("version".to_owned(), user.version.into());
    }
    shown
}

fn shown_of_file(user: &User) -> Value {
    let User { name, team, tier, models } = user;
    let mut shown = json!({ "name": name, "source": "file" });
    for (field, value) in [("team", json!(team)), ("tier", json!(tier)), ("models", json!(models))] {
        if !value.is_null() {
            shown[field] = value;
        }
    }
    shown
}
