//! `/admin/instances`: the processes that share the limits.

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use super::ask::json;
use super::{Ask, Reply, Shared};
use crate::fleet;

/// `GET /admin/instances?limit=&cursor=`: those that were heard of in the last seconds, by name.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let page = ask.page()?;
    let own = fleet::about(&gateway).name;
    let all = fleet::instances(&gateway).await;
    let later = all.into_iter().filter(|about| page.after.as_ref().is_none_or(|after| about.name > *after));
    let entries = later.map(|about| {
        let mut shown = serde_json::to_value(&about).unwrap_or(Value::Null);
        shown["self"] = json!(about.name == own);
        (about.name, shown)
    });
    Ok(json(StatusCode::OK, &page.of(entries)))
}
