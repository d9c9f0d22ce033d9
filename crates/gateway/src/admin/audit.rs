//! `/admin/audit`: who changed what, when, from where; what it was before and after, without secrets.

use axum::extract::State;
use http::StatusCode;
use serde_json::Value;

use super::ask::json;
use super::problem::Problem;
use super::{Ask, Reply, Shared};

/// `GET /admin/audit?limit=&cursor=`: the latest first.
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let page = ask.page()?;
    let before = match page.after.as_deref() {
        None => None,
        Some(place) => {
            let place = place
                .split_once('-')
                .and_then(|(version, within)| Some((version.parse().ok()?, within.parse().ok()?)));
            Some(place.ok_or_else(|| Problem::field("cursor", "is no cursor of ours"))?)
        }
    };
    let found = gateway.control.audit(before, page.size + 1).await;
    let found = found.map_err(|why| Problem::unavailable(format!("the audit cannot be read: {}", why.0)))?;
    let entries = found.into_iter().map(|((version, within), note)| {
        let place = format!("{version}-{within}");
        let mut entry: Value = serde_json::from_str(&note).unwrap_or_default();
        if let Some(fields) = entry.as_object_mut() {
            fields.insert("id".to_owned(), place.clone().into());
        }
        (place, entry)
    });
    Ok(json(StatusCode::OK, &page.of(entries)))
}
