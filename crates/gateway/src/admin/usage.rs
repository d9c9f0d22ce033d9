//! `GET /admin/usage`: what was used, by user, key, team or model, in a time or in each hour or day of it.

mod asked;
mod shown;

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::response::IntoResponse;
use http::{StatusCode, header};

use self::asked::{Format, Question, Slot};
use super::ask::json;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::control::{Counts, Unavailable};
use crate::{Gateway, usage};

/// Rows of one CSV document.
const CSV_ROWS_MAX: usize = 100_000;

/// What somebody used in one slot of time.
struct Line {
    slot: Slot,
    /// `None`: nobody, none.
    name: Option<String>,
    counts: Counts,
}

/// `GET /admin/usage?by=&from=&to=&step=&user=&api_key=&team=&model=&format=&limit=&cursor=`
pub(super) async fn report(State(gateway): Shared, ask: Ask) -> Reply {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let retention = gateway.snapshot.load().config.settings.usage;
    let question = Question::read(&ask, now, &retention)?;
    // What this instance knows belongs to it; what others have not written is less than a second old.
    usage::flush(&gateway).await.map_err(away)?;
    match question.format {
        Format::Csv => {
            let lines = lines(&gateway, &question, CSV_ROWS_MAX).await?;
            if lines.len() > CSV_ROWS_MAX {
                let detail =
                    format!("there are more than {CSV_ROWS_MAX} rows: ask for less time, or a longer step");
                return Err(Problem::field("from", detail));
            }
            let content = [(header::CONTENT_TYPE, "text/csv; charset=utf-8; header=present")];
            Ok((StatusCode::OK, content, shown::csv(question.by, &lines)).into_response())
        }
        Format::Json => {
            let page = ask.page()?;
            let lines = lines(&gateway, &question, page.size).await?;
            let entries = lines.iter().map(|line| (question.place(line), shown::object(question.by, line)));
            Ok(json(StatusCode::OK, &page.of(entries)))
        }
    }
}

/// The lines from where the question goes on, in the order of time and names: more than `enough` where there are more.
async fn lines(gateway: &Gateway, question: &Question, enough: usize) -> Result<Vec<Line>, Problem> {
    let model = question.model().and_then(|asked| Some(gateway.snapshot.load().model(asked)?.name.clone()));
    let mut lines = Vec::new();
    for slot in question.slots() {
        let folded = folded(gateway, question, model.as_deref(), slot).await?;
        let wanted = folded.into_iter().filter(|(name, _)| question.is_ahead(slot, name.as_deref()));
        lines.extend(wanted.map(|(name, counts)| Line { slot, name, counts }));
        if lines.len() > enough {
            break;
        }
    }
    Ok(lines)
}

/// What everybody used in a slot; `model` is the resolved name of the one that is asked about.
async fn folded(
    gateway: &Gateway,
    question: &Question,
    model: Option<&str>,
    slot: Slot,
) -> Result<BTreeMap<Option<String>, Counts>, Problem> {
    let mut folded: BTreeMap<Option<String>, Counts> = BTreeMap::new();
    for bucket in slot.buckets() {
        let rows = gateway.control.usage(bucket).await.map_err(away)?;
        for (row, counts) in rows.into_iter().filter(|(row, _)| question.wants(row, model)) {
            *folded.entry(question.by.take(row)).or_default() += counts;
        }
    }
    Ok(folded)
}

fn away(Unavailable(why): Unavailable) -> Problem {
    tracing::warn!(%why, "usage cannot be read");
    Problem::unavailable(
        "the store of usage does not answer: what was used meanwhile is not lost, ask again later",
    )
}
