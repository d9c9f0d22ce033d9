//! `/admin/keys`: keys that callers send. A secret is shown when it is made, and never again.

use std::collections::HashSet;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::ask::{Path, gone, json, record, write};
use super::fields::{Fields, Given};
use super::problem::{Fault, Problem};
use super::{Ask, Reply, Shared};
use crate::config::{self, Config, Known};
use crate::control::{
    self, Change, Control, KEY_RULE, KeyRecord, Minted, Previous, Record, Room, Stored, Time, mint,
};
use crate::snapshot::Snapshot;

/// Keys that can be kept.
const KEYS_MAX: usize = 1_000_000;
/// Keys of one import.
const IMPORT_MAX: usize = 1_000;
/// Quotas of one key.
const LIMITS_MAX: usize = 4;
/// Models of one key.
const MODELS_MAX: usize = 1_000;

/// `GET /admin/keys?user=&team=&limit=&cursor=`
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (control, now) = (gateway.control.now(), gateway.snapshot.load_full());
    let wanted = |name: &str, value: &Option<String>| {
        ask.parameter(name).is_none_or(|wanted| value.as_deref() == Some(wanted))
    };
    let page = ask.page()?.of_table(&control.keys, |id, key| {
        let fits = wanted("user", &key.value.user) && wanted("team", &key.value.team);
        fits.then(|| in_force(&now, id, key))
    });
    Ok(json(StatusCode::OK, &page))
}

/// `GET /admin/keys/{id}`
pub(super) async fn show(State(gateway): Shared, Path(id): Path<String>) -> Reply {
    let control = gateway.control.now();
    let key = known(&control, &id)?;
    Ok(record(StatusCode::OK, &in_force(&gateway.snapshot.load(), &id, key), key.version))
}

/// `POST /admin/keys`
pub(super) async fn create(State(gateway): Shared, ask: Ask) -> Reply {
    let (made, version) = write(&gateway, &ask, |now| {
        let config = &gateway.snapshot.load().config;
        let mut fields = Fields::of(&ask.body)?;
        let mut key = blank();
        change(&mut fields, &mut key, config, &control::known(config, now));
        fields.finish()?;
        room(now, 1)?;
        let minted = unused(now)?;
        key.hash = minted.hash;
        fits(&mut Room::under(config, now), &minted.id, None, &key)?;
        let mut change = Change::default();
        change.put("keys.create", now, &minted.id, &key);
        let version = now.version + 1;
        Ok((change, (with_secret(shown(&minted.id, &key, version), &minted), version)))
    })
    .await?;
    Ok(record(StatusCode::CREATED, &made, version))
}

/// `POST /admin/keys/import`: `{"keys":[{"hash":"sha256:…", …}]}`, all of them or none.
pub(super) async fn import(State(gateway): Shared, ask: Ask) -> Reply {
    let data = write(&gateway, &ask, |now| {
        let config = &gateway.snapshot.load().config;
        let mut there = There::now(config, now);
        let (known, mut rules) = (control::known(config, now), Room::under(config, now));
        let (mut change, mut data, mut faults) = (Change::default(), Vec::new(), Vec::new());
        for (index, entry) in entries(&ask)?.into_iter().enumerate() {
            let taken = imported(entry, config, &known, &mut there).and_then(|(id, key)| {
                fits(&mut rules, &id, None, &key).map_err(Problem::into_faults)?;
                Ok((id, key))
            });
            match taken {
                Ok((id, key)) => {
                    change.put_unnoted(&id, &key);
                    data.push(shown(&id, &key, now.version + 1));
                }
                Err(wrong) => faults.extend(
                    wrong
                        .into_iter()
                        .map(|fault| Fault { field: format!("keys[{index}].{}", fault.field), ..fault }),
                ),
            }
        }
        super::ask::refuse(faults)?;
        room(now, data.len())?;
        let ids: Vec<&Value> = data.iter().map(|key| &key["id"]).collect();
        change.note("keys.import", "keys".to_owned(), Value::Null, json!({ "ids": ids }));
        Ok((change, data))
    })
    .await?;
    Ok(json(StatusCode::CREATED, &json!({ "imported": data.len(), "data": data })))
}

/// `PATCH /admin/keys/{id}`: what is not named stays, `null` takes away.
pub(super) async fn patch(State(gateway): Shared, Path(id): Path<String>, ask: Ask) -> Reply {
    let (after, version) = write(&gateway, &ask, |now| {
        let config = &gateway.snapshot.load().config;
        let mut fields = Fields::of(&ask.body)?;
        let before = known(now, &id)?;
        ask.still(before)?;
        let mut key = before.value.clone();
        change(&mut fields, &mut key, config, &control::known(config, now));
        fields.finish()?;
        fits(&mut Room::under(config, now), &id, Some(&before.value), &key)?;
        Ok(put("keys.patch", now, &id, &key))
    })
    .await?;
    Ok(record(StatusCode::OK, &after, version))
}

/// `POST /admin/keys/{id}/rotate`: `{"overlap":"1h"}`: a new secret; the old one is accepted for so long, without it no more.
pub(super) async fn rotate(State(gateway): Shared, Path(id): Path<String>, ask: Ask) -> Reply {
    let (after, version) = write(&gateway, &ask, |now| {
        let mut fields = Fields::of(&ask.body)?;
        let overlap = fields.text("overlap", config::duration).value();
        let expires = fields.end("expires");
        fields.finish()?;
        let before = known(now, &id)?;
        ask.still(before)?;
        let mut key = before.value.clone();
        if key.revoked.is_some() {
            return Err(Problem::conflict(format!("the key `{id}` is revoked: make a new one")));
        }
        // An imported key has an id of another form; from now on it is one of ours.
        let minted =
            mint(Some(&id).filter(|id| id.len() == 8).map(String::as_str)).map_err(Problem::unavailable)?;
        let until = overlap.map(Time::after);
        key.previous = until.map(|until| Previous { hash: key.hash, until });
        key.hash = minted.hash;
        key.expires = expires.or(key.expires);
        let (change, (view, version)) = put("keys.rotate", now, &id, &key);
        Ok((change, (with_secret(view, &minted), version)))
    })
    .await?;
    Ok(record(StatusCode::OK, &after, version))
}

/// `POST /admin/keys/{id}/revoke`: refused everywhere within a second; the record stays.
pub(super) async fn revoke(State(gateway): Shared, Path(id): Path<String>, ask: Ask) -> Reply {
    let (after, version) = write(&gateway, &ask, |now| {
        let before = known(now, &id)?;
        ask.still(before)?;
        let mut key = before.value.clone();
        if key.revoked.is_some() {
            return Ok((Change::default(), (shown(&id, &key, before.version), before.version)));
        }
        key.revoked = Some(Time::now());
        key.previous = None;
        Ok(put("keys.revoke", now, &id, &key))
    })
    .await?;
    Ok(record(StatusCode::OK, &after, version))
}

/// `DELETE /admin/keys/{id}`: refused everywhere within a second; nothing stays but the audit.
pub(super) async fn delete(State(gateway): Shared, Path(id): Path<String>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| {
        ask.still(known(now, &id)?)?;
        let mut change = Change::default();
        change.delete::<KeyRecord>("keys.delete", now, &id);
        Ok((change, ()))
    })
    .await?;
    Ok(gone())
}

fn known<'a>(control: &'a Control, id: &str) -> Result<&'a Record<KeyRecord>, Problem> {
    control.keys.get(id).map(|key| &**key).ok_or_else(|| Problem::absent("key of the admin API", id))
}

fn put(action: &'static str, now: &Control, id: &str, key: &KeyRecord) -> (Change, (Value, u64)) {
    let mut change = Change::default();
    change.put(action, now, id, key);
    (change, (shown(id, key, now.version + 1), now.version + 1))
}

fn shown(id: &str, key: &KeyRecord, version: u64) -> Value {
    let status = match key {
        KeyRecord { revoked: Some(_), .. } => "revoked",
        KeyRecord { expires: Some(end), .. } if end.has_come() => "expired",
        _ => "active",
    };
    let mut shown = json!({ "id": id, "status": status });
    if let (Some(shown), Value::Object(fields)) = (shown.as_object_mut(), key.shown()) {
        shown.extend(fields);
        shown.insert("version".to_owned(), version.into());
    }
    shown
}

/// The same, where it is known whether the file has a key in its place.
fn in_force(now: &Snapshot, id: &str, key: &Record<KeyRecord>) -> Value {
    let mut shown = shown(id, &key.value, key.version);
    if let Some(what) = now.displaced().get(id) {
        shown["displaced"] = (*what).into();
    }
    shown
}

fn with_secret(mut shown: Value, minted: &Minted) -> Value {
    shown["key"] = minted.secret.as_str().into();
    shown
}

fn blank() -> KeyRecord {
    KeyRecord {
        hash: [0; 32],
        name: None,
        user: None,
        team: None,
        tier: None,
        models: None,
        limits: Vec::new(),
        metadata: Default::default(),
        created: Time::now(),
        expires: None,
        revoked: None,
        previous: None,
    }
}

/// What a body says of a key, over what it was.
fn change(fields: &mut Fields, key: &mut KeyRecord, config: &Config, known: &Known) {
    key.name = fields.text("name", config::name).or(key.name.take());
    key.user = fields.text("user", |name| known.user(name)).or(key.user.take());
    key.team = fields.text("team", config::name).or(key.team.take());
    key.tier = fields.text("tier", |name| known.tier(name)).or(key.tier.take());
    key.models = fields.texts("models", MODELS_MAX, |name| known.model(name)).or(key.models.take());
    let limits = fields.texts("limits", LIMITS_MAX, |text| Ok(text.to_owned()));
    if let Given::Value(quotas) = &limits
        && let Err(problems) = config::key_limits(KEY_RULE, config.settings.defaults, quotas)
    {
        fields.faults.extend(problems.into_iter().map(Fault::from));
    }
    key.limits = limits.or(Some(std::mem::take(&mut key.limits))).unwrap_or_default();
    key.metadata = fields.metadata().or(Some(std::mem::take(&mut key.metadata))).unwrap_or_default();
    key.expires = fields.end("expires").or(key.expires);
}

fn room(now: &Control, more: usize) -> Result<(), Problem> {
    match now.keys.len() + more > KEYS_MAX {
        true => Err(Problem::conflict(format!("there are {KEYS_MAX} keys at most: delete some first"))),
        false => Ok(()),
    }
}

/// Refuses a key whose requests could meet too many limits.
fn fits(room: &mut Room<'_>, id: &str, before: Option<&KeyRecord>, after: &KeyRecord) -> Result<(), Problem> {
    let field = if after.limits.is_empty() { "user" } else { "limits" };
    room.for_key(id, before, after).map_err(|overlap| Problem::overlap(field, &overlap))
}

/// A new key with an id that nobody has.
fn unused(now: &Control) -> Result<Minted, Problem> {
    loop {
        let minted = mint(None).map_err(Problem::unavailable)?;
        if !now.keys.contains_key(&minted.id) {
            return Ok(minted);
        }
    }
}

fn entries(ask: &Ask) -> Result<Vec<Map<String, Value>>, Problem> {
    let (mut body, _) = Fields::of(&ask.body)?.rest();
    let keys = body.shift_remove("keys");
    if let Some(unknown) = body.keys().next() {
        return Err(Problem::field(unknown, "unknown field; allowed: keys"));
    }
    let entries = match keys {
        Some(Value::Array(entries)) if (1..=IMPORT_MAX).contains(&entries.len()) => entries,
        _ => return Err(Problem::field("keys", format!("is no list of 1 to {IMPORT_MAX} keys"))),
    };
    let object = |(index, entry)| match entry {
        Value::Object(entry) => Ok(entry),
        _ => Err(Problem::field(format!("keys[{index}]"), "is no object")),
    };
    entries.into_iter().enumerate().map(object).collect()
}

/// Keys that are known, with those of an import so far: nobody may come to another's id, or be a key twice.
struct There {
    hashes: HashSet<[u8; 32]>,
    ids: HashSet<String>,
}

impl There {
    fn now(config: &Config, now: &Control) -> Self {
        let kept = now.keys.values().flat_map(|key| {
            [Some(key.value.hash), key.value.previous.as_ref().map(|previous| previous.hash)]
        });
        let hashes = kept.flatten().chain(config.keys.iter().map(|key| key.hash)).collect();
        let ids = now.keys.keys().chain(config.keys.iter().map(|key| &key.id)).cloned().collect();
        Self { hashes, ids }
    }

    fn add(&mut self, hash: [u8; 32], id: &str) -> Result<(), String> {
        if !self.hashes.insert(hash) {
            return Err("this key is there already".to_owned());
        }
        match self.ids.insert(id.to_owned()) {
            true => Ok(()),
            false => Err(format!("another key has the id `{id}`, the first 12 hex digits of the hash")),
        }
    }
}

/// A key of which only the hash is known; its id is the first 12 hex digits of it, as for keys of the file.
fn imported(
    entry: Map<String, Value>,
    config: &Config,
    known: &Known,
    there: &mut There,
) -> Result<(String, KeyRecord), Vec<Fault>> {
    let mut fields = Fields::of_map(entry);
    let mut key = blank();
    let hash = fields.text("hash", config::sha256);
    let hash = fields.needed("hash", hash);
    change(&mut fields, &mut key, config, known);
    let id: String = hash.unwrap_or_default().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    if let Some(hash) = hash {
        key.hash = hash;
        if let Err(why) = there.add(hash, &id) {
            let _: Given<()> = fields.wrong("hash", why);
        }
    }
    fields.finish().map_err(Problem::into_faults)?;
    Ok((id, key))
}
