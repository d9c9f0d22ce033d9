//! `/admin/requests`: the requests that ended last on this instance, the latest first.

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};
use tollgate_limiter::Cost;

use super::ask::json;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::control;
use crate::journal::{Ended, Found, Journal};
use crate::snapshot::Snapshot;

/// The longest name in a filter.
const NAME_BYTES_MAX: usize = 256;
/// What may be asked for, beside what every list takes.
pub(super) const FILTERS: &[&str] = &["status", "user", "api_key", "model", "rule", "refused"];

/// `GET /admin/requests?limit=&cursor=&status=&user=&api_key=&model=&rule=&refused=`
pub(super) async fn list(State(gateway): Shared, ask: Ask) -> Reply {
    let (page, filter) = (ask.page()?, Filter::of(&ask, &gateway.snapshot.load())?);
    let (own, journal) = (gateway.instance.name(), &gateway.ledger.journal);
    let last = match &page.after {
        None => journal.last(),
        Some(after) => before(after, own)?.min(journal.last()),
    };
    let entries = Journal::kept(last).rev().filter_map(|number| {
        let look = |ended: &Ended| filter.wants(ended).then(|| shown(ended, own));
        match journal.look(number, look) {
            Found::There(Some(shown)) => Some((format!("{number} {own}"), shown)),
            _ => None,
        }
    });
    Ok(json(StatusCode::OK, &page.of(entries)))
}

/// Where the page after this cursor begins.
fn before(cursor: &str, own: &str) -> Result<u64, Problem> {
    let wrong = |why| Problem::field("cursor", why);
    let parts = cursor.split_once(' ').and_then(|(number, name)| Some((number.parse::<u64>().ok()?, name)));
    match parts {
        Some((number @ 1.., name)) if name == own => Ok(number - 1),
        Some((1.., _)) => {
            Err(wrong("is of another instance, or from before this one was started: begin without a cursor"))
        }
        _ => Err(wrong("is no cursor of this list")),
    }
}

/// Which requests are wanted: those for which everything holds that was said.
pub(super) struct Filter {
    status: Option<Status>,
    user: Option<String>,
    api_key: Option<String>,
    model: Option<String>,
    rule: Option<String>,
    refused: Option<bool>,
}

/// A status, or all that begin with its digit.
enum Status {
    One(u16),
    Class(u16),
}

impl Filter {
    /// As the query says; a model by its name or an alias.
    pub(super) fn of(ask: &Ask, now: &Snapshot) -> Result<Self, Problem> {
        let name = |field: &'static str| match ask.parameter(field) {
            Some(text) if text.len() > NAME_BYTES_MAX => {
                Err(Problem::field(field, format!("is longer than {NAME_BYTES_MAX} bytes")))
            }
            text => Ok(text.filter(|text| !text.is_empty()).map(str::to_owned)),
        };
        Ok(Self {
            status: ask.parameter("status").filter(|text| !text.is_empty()).map(status).transpose()?,
            user: name("user")?,
            api_key: name("api_key")?,
            model: name("model")?.map(|asked| {
                let model = now.model(&asked).map(|model| model.name.to_string());
                model.unwrap_or(asked)
            }),
            rule: name("rule")?,
            refused: ask.flag("refused")?,
        })
    }

    /// Whether it is wanted.
    pub(super) fn wants(&self, ended: &Ended) -> bool {
        let is = |wanted: &Option<String>, value: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| value == Some(wanted))
        };
        let status = match self.status {
            None => true,
            Some(Status::One(status)) => ended.status == status,
            Some(Status::Class(digit)) => ended.status / 100 == digit,
        };
        status
            && is(&self.user, ended.user())
            && is(&self.api_key, ended.key.as_ref().map(|key| key.id.as_str()))
            && is(&self.model, ended.model.as_deref())
            && is(&self.rule, ended.rule.as_deref())
            && self.refused.is_none_or(|wanted| ended.rule.is_some() == wanted)
    }
}

fn status(text: &str) -> Result<Status, Problem> {
    let digits = text.strip_suffix("xx").unwrap_or(text);
    match (digits.parse(), digits.len(), text.len()) {
        (Ok(digit @ 1..=5), 1, 3) => Ok(Status::Class(digit)),
        (Ok(status @ 100..=599), 3, 3) => Ok(Status::One(status)),
        _ => Err(Problem::field("status", "is neither a status nor a class of them; write 429 or 4xx")),
    }
}

/// As operators see it; `instance` is where it ended.
pub(super) fn shown(ended: &Ended, instance: &str) -> Value {
    let millis = |took: std::time::Duration| took.as_micros() as f64 / 1e3;
    let key = ended.key.as_deref();
    let provider = ended.provider.as_ref().map(|series| &series.label);
    let fallback = provider.filter(|label| Some(&label.model) != ended.model.as_ref());
    json!({
        "time": control::precise(ended.time),
        "instance": instance,
        "request_id": ended.request_id.as_str(),
        "method": ended.method,
        "endpoint": ended.endpoint,
        "status": ended.status,
        "outcome": ended.outcome,
        "code": ended.code,
        "rule": ended.rule.as_deref(),
        "source": ended.source.map(|source| source.as_str()),
        "user": ended.user(),
        "api_key": key.map(|key| &key.id),
        "ip": ended.address.to_string(),
        "model": ended.model.as_deref(),
        "provider": provider.map(|label| &*label.provider),
        "fallback_model": fallback.map(|label| &*label.model),
        "stream": ended.streamed,
        "prompt_tokens": ended.usage.map(|usage| usage.prompt),
        "completion_tokens": ended.usage.map(|usage| usage.completion),
        "estimated": ended.estimated,
        "cost_micros": (ended.cost > Cost::ZERO).then(|| ended.cost.micros()),
        "latency_ms": millis(ended.latency),
        "first_token_ms": ended.first_token.map(millis),
        "overhead_ms": ended.overhead.map(millis),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_or_a_class() {
        for (text, wanted, other) in [("429", 429, 428), ("4xx", 404, 500), ("5xx", 599, 499)] {
            let status = status(text).ok();
            let filter = Filter { status, user: None, api_key: None, model: None, rule: None, refused: None };
            assert!(filter.wants(&crate::journal::tests::ended(wanted)), "{text}");
            assert!(!filter.wants(&crate::journal::tests::ended(other)), "{text}");
        }
        for text in
            ["", "x", "xx", "4x", "04xx", "99", "600", "6xx", "0xx", "42xx", "4294967725", "-200", "+20"]
        {
            assert!(status(text).is_err(), "{text}");
        }
    }
}
