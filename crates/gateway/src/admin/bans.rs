//! `/admin/bans`: who is let in no more, why, and until when.

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::ask::{Path, gone, json, record, write};
use super::fields::{Fields, sentence};
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::control::{Ban, BanSubject, Change, Control, Record, Stored, Time};

/// Bans that can hold at once.
const BANS_MAX: usize = 100_000;
/// Bans that are over, forgotten with one that is set: more at once than can be added, so that they become fewer.
const FORGOTTEN_MAX: usize = 100;

/// `GET /admin/bans?subject=&limit=&cursor=`
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let control = gateway.control.now();
    let subject = ask.parameter("subject");
    let page = ask.page()?.of_table(&control.bans, |id, ban| {
        let wanted = subject.is_none_or(|subject| ban.value.subject.to_string() == subject);
        (wanted && !is_over(&ban.value)).then(|| shown(id, ban))
    });
    Ok(json(StatusCode::OK, &page))
}

/// `GET /admin/bans/{id}`
pub(super) async fn show(State(gateway): Shared, Path(id): Path<String>) -> Reply {
    let control = gateway.control.now();
    let ban = known(&control, &id)?;
    Ok(record(StatusCode::OK, &shown(&id, ban), ban.version))
}

/// `POST /admin/bans`: `{"subject":"ip:192.0.2.1","reason":"…","until":…}`. A second one of a subject takes the place of
/// the first.
pub(super) async fn create(State(gateway): Shared, ask: Ask) -> Reply {
    let (status, made, version) = write(&gateway, &ask, |now| {
        let mut fields = Fields::of(&ask.body)?;
        let (subject, reason) = (fields.text("subject", BanSubject::parse), fields.text("reason", sentence));
        let (subject, reason) = (fields.needed("subject", subject), fields.needed("reason", reason));
        let until = fields.end("until").value();
        fields.finish()?;
        let (Some(subject), Some(reason)) = (subject, reason) else {
            return Err(Problem::new(StatusCode::BAD_REQUEST, "a subject and a reason are needed"));
        };
        let id = id_of(&subject);
        now.bans.get(&id).map_or(Ok(()), |before| ask.still(before))?;
        let ban = Ban { subject, reason, until, created: Time::now() };
        let mut change = Change::default();
        let over = now.bans.iter().filter(|(there, ban)| **there != id && is_over(&ban.value));
        over.take(FORGOTTEN_MAX).for_each(|(id, _)| change.forget::<Ban>(id));
        let status = match now.bans.contains_key(&id) {
            true => StatusCode::OK,
            false if now.bans.values().filter(|ban| !is_over(&ban.value)).count() >= BANS_MAX => {
                return Err(Problem::conflict(format!("there are {BANS_MAX} bans at most: ban networks")));
            }
            false => StatusCode::CREATED,
        };
        change.put("bans.create", now, &id, &ban);
        let version = now.version + 1;
        Ok((change, (status, shown(&id, &Record { version, value: ban }), version)))
    })
    .await?;
    Ok(record(status, &made, version))
}

/// `DELETE /admin/bans/{id}`
pub(super) async fn delete(State(gateway): Shared, Path(id): Path<String>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| {
        ask.still(known(now, &id)?)?;
        let mut change = Change::default();
        change.delete::<Ban>("bans.delete", now, &id);
        Ok((change, ()))
    })
    .await?;
    Ok(gone())
}

fn known<'a>(control: &'a Control, id: &str) -> Result<&'a Record<Ban>, Problem> {
    control.bans.get(id).map(|ban| &**ban).ok_or_else(|| Problem::absent("ban", id))
}

fn is_over(ban: &Ban) -> bool {
    ban.until.is_some_and(Time::has_come)
}

/// One ban of a subject, so one id: the first 12 hex digits of its hash.
fn id_of(subject: &BanSubject) -> String {
    Sha256::digest(subject.to_string()).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

fn shown(id: &str, ban: &Record<Ban>) -> Value {
    let mut shown = json!({ "id": id });
    if let (Some(shown), Value::Object(fields)) = (shown.as_object_mut(), ban.value.shown()) {
        shown.extend(fields);
        shown.insert("version".to_owned(), ban.version.into());
    }
    shown
}
