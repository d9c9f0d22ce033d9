//! `/admin/models`: who serves what, and providers that get no new requests.

use std::time::Instant;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use super::ask::{Path, gone, json, record, write};
use super::fields::{Fields, sentence};
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::control::{Change, Drain, Time};
use crate::snapshot::{Model, Snapshot, drain_id};

/// `GET /admin/models`: in the order of the file.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (page, now) = (ask.page()?, gateway.snapshot.load_full());
    let own: Vec<_> = now.models().filter(|(name, model)| *name == &*model.name).collect();
    let begin = match &page.after {
        None => 0,
        Some(after) => own.iter().position(|(name, _)| name == after).map_or(own.len(), |last| last + 1),
    };
    let entries = own[begin..].iter().map(|(name, model)| ((*name).to_owned(), shown(&now, model)));
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// `POST /admin/models/{model}/providers/{provider}/drain`: `{"reason":…}`; requests under way go on.
pub(super) async fn drain(State(gateway): Shared, Path(names): Path<(String, String)>, ask: Ask) -> Reply {
    let (after, version) = write(&gateway, &ask, |now| {
        let id = known(&gateway.snapshot.load(), &names)?;
        let mut fields = Fields::of(&ask.body)?;
        let reason = fields.text("reason", sentence).value();
        fields.finish()?;
        now.drains.get(&id).map_or(Ok(()), |before| ask.still(before))?;
        let drain = Drain { reason, created: Time::now() };
        let mut change = Change::default();
        change.put("drains.create", now, &id, &drain);
        let version = now.version + 1;
        let shown = json!({ "model": names.0, "provider": names.1, "drained": true, "reason": drain.reason,
                            "created": drain.created, "version": version });
        Ok((change, (shown, version)))
    })
    .await?;
    Ok(record(StatusCode::OK, &after, version))
}

/// `DELETE /admin/models/{model}/providers/{provider}/drain`
pub(super) async fn undrain(State(gateway): Shared, Path(names): Path<(String, String)>, ask: Ask) -> Reply {
    write(&gateway, &ask, |now| {
        // Not asked whether there is such a provider: one that the file lost can be forgotten.
        let id = drain_id(&names.0, &names.1);
        let drain = now.drains.get(&id).ok_or_else(|| Problem::absent("drained provider", &id))?;
        ask.still(drain)?;
        let mut change = Change::default();
        change.delete::<Drain>("drains.delete", now, &id);
        Ok((change, ()))
    })
    .await?;
    Ok(gone())
}

/// What the drain of a provider is kept under, where there is that provider.
fn known(now: &Snapshot, (model, provider): &(String, String)) -> Result<String, Problem> {
    let there = now.models().find(|(name, _)| name == model).map(|(_, model)| model);
    let there = there.ok_or_else(|| Problem::absent("model", model))?;
    match there.deployments.iter().any(|deployment| deployment.provider.name == *provider) {
        true => Ok(drain_id(&there.name, provider)),
        false => Err(Problem::absent(&format!("provider of `{model}`"), provider)),
    }
}

fn shown(now: &Snapshot, model: &Model) -> Value {
    let providers = model.deployments.iter().map(|deployment| {
        let rests = deployment.health.rests_until().is_some_and(|until| until > Instant::now());
        json!({
            "name": deployment.provider.name,
            "healthy": !rests,
            "drained": now.is_drained(deployment),
            "in_flight": deployment.in_flight.count(),
            "latency_ms": deployment.latency.percentiles(),
            "first_token_ms": deployment.first_token.percentiles(),
        })
    });
    json!({ "name": &*model.name, "providers": providers.collect::<Vec<_>>() })
}
