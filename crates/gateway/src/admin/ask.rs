//! One request to the admin API, read: who asks, its query, its body; and how it changes something.

use std::borrow::Cow;
use std::ops::Bound;
use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::door;
use super::problem::{Fault, Problem};
use crate::config::Server;
use crate::control::{Author, Change, Control, Record, Table, WriteError};
use crate::{Gateway, config, reload};

/// The largest body.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Entries of one page, unless `limit` says otherwise, and at most.
const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;
/// The longest cursor.
const CURSOR_BYTES_MAX: usize = 1_024;

/// One request.
pub(super) struct Ask {
    /// Who asks.
    pub(super) author: Author,
    /// What was sent.
    pub(super) body: Bytes,
    query: Vec<(String, String)>,
    headers: HeaderMap,
}

impl<S: Send + Sync> FromRequest<S> for Ask {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (head, body) = request.into_parts();
        let author = head.extensions.get::<Author>().cloned();
        let author = author.ok_or_else(|| Problem::new(StatusCode::UNAUTHORIZED, "nobody asks"))?;
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(|_| {
            let detail = format!("the body broke off, or is larger than {BODY_BYTES_MAX} bytes");
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
        })?;
        let query = form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes());
        let query = query.map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
        Ok(Self { author, body: body.to_bytes(), query, headers: head.headers })
    }
}

/// What is named in the path.
pub(super) struct Path<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(head: &mut Parts, state: &S) -> Result<Self, Problem> {
        let named = axum::extract::Path::from_request_parts(head, state).await;
        let wrong = |_| Problem::new(StatusCode::BAD_REQUEST, "a name in the path is no UTF-8");
        named.map(|axum::extract::Path(named)| Self(named)).map_err(wrong)
    }
}

impl Ask {
    /// A parameter of the query.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Whether who asked would still be let in to read.
    pub(super) fn is_let_in(&self, server: &Server) -> bool {
        door::is_open(server, &self.headers)
    }

    /// Whether an answer of this content type is asked for by name.
    pub(super) fn accepts(&self, kind: &str) -> bool {
        let said = self.headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let kinds = said.flat_map(|value| value.split(',')).filter_map(|kind| kind.split(';').next());
        kinds.map(str::trim).any(|said| said.eq_ignore_ascii_case(kind))
    }

    /// Whether nothing is to be changed, only said what would be.
    pub(super) fn is_dry_run(&self) -> Result<bool, Problem> {
        Ok(self.flag("dry_run")?.unwrap_or(false))
    }

    /// A parameter that is `true` or `false`; there without a value, it is true.
    pub(super) fn flag(&self, name: &'static str) -> Result<Option<bool>, Problem> {
        match self.parameter(name) {
            None => Ok(None),
            Some("false") => Ok(Some(false)),
            Some("true" | "") => Ok(Some(true)),
            Some(_) => Err(Problem::field(name, "is neither true nor false")),
        }
    }

    /// Which part of a list is wanted.
    pub(super) fn page(&self) -> Result<Page, Problem> {
        let size = match self.parameter("limit").map(str::parse) {
            None => PAGE_DEFAULT,
            Some(Ok(size @ 1..=PAGE_MAX)) => size,
            Some(_) => return Err(Problem::field("limit", format!("is no number of 1 to {PAGE_MAX}"))),
        };
        let after = match self.parameter("cursor").filter(|cursor| !cursor.is_empty()) {
            None => None,
            Some(cursor) => {
                let decoded =
                    URL_SAFE_NO_PAD.decode(&cursor.as_bytes()[..cursor.len().min(CURSOR_BYTES_MAX)]);
                let text = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
                Some(text.ok_or_else(no_cursor)?)
            }
        };
        Ok(Page { size, after })
    }

    /// Refuses what was decided on a version that is no more: `If-Match` (RFC 9110) against the record's `ETag`.
    pub(super) fn still<T>(&self, record: &Record<T>) -> Result<(), Problem> {
        self.still_at(Some(record.version))
    }

    /// The same against the version that a record is at; `None`: there is none.
    pub(super) fn still_at(&self, version: Option<u64>) -> Result<(), Problem> {
        let Some(wanted) = self.headers.get(header::IF_MATCH) else { return Ok(()) };
        let current = version.map(etag);
        let wanted = wanted.to_str().unwrap_or_default();
        let is_it = |tag: &str| current.as_ref().is_some_and(|current| tag == "*" || tag == current);
        if wanted.split(',').map(str::trim).any(is_it) {
            return Ok(());
        }
        let detail = match current {
            Some(current) => format!("it was changed meanwhile: it is {current} now"),
            None => "it is not there".to_owned(),
        };
        Err(Problem::new(StatusCode::PRECONDITION_FAILED, detail))
    }
}

/// A part of a list.
pub(super) struct Page {
    pub(super) size: usize,
    /// What the page before ended with.
    pub(super) after: Option<String>,
}

impl Page {
    /// `{"data":[…],"next_cursor":…}` of entries and where each stands, in order, from this page on.
    pub(super) fn of(&self, entries: impl Iterator<Item = (String, Value)>) -> Value {
        let mut entries = entries.peekable();
        let mut data = Vec::new();
        let mut last = None;
        while data.len() < self.size {
            let Some((place, value)) = entries.next() else { break };
            data.push(value);
            last = Some(place);
        }
        let next = last.filter(|_| entries.peek().is_some()).map(cursor);
        json!({ "data": data, "next_cursor": next })
    }

    /// The same of the records of a table for which `show` has something to show.
    pub(super) fn of_table<T>(
        &self,
        table: &Table<T>,
        mut show: impl FnMut(&str, &Record<T>) -> Option<Value>,
    ) -> Value {
        let from = self.after.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let records = table.range::<str, _>((from, Bound::Unbounded));
        self.of(records.filter_map(|(id, record)| Some((id.clone(), show(id, record)?))))
    }
}

/// Changes something, unless this is a dry run: then it is only worked out. When this returns it is durable, and in force
/// here; elsewhere within a second.
pub(super) async fn write<T>(
    gateway: &Arc<Gateway>,
    ask: &Ask,
    mut decide: impl FnMut(&Control) -> Result<(Change, T), Problem>,
) -> Result<T, Problem> {
    if ask.is_dry_run()? {
        return decide(&gateway.control.now()).map(|(_, value)| value);
    }
    match gateway.control.write(&ask.author, decide).await {
        Ok(value) => {
            reload::put_in_force(gateway).await;
            Ok(value)
        }
        Err(WriteError::Refused(problem)) => Err(problem),
        Err(WriteError::Contended) => Err(Problem::conflict("too many change this at once: try again")),
        Err(WriteError::Unavailable(why)) => {
            tracing::warn!(%why, "a change of control data was not acknowledged");
            Err(Problem::unavailable(
                "the store of control data does not answer: whether it happened is not known",
            ))
        }
    }
}

/// JSON.
pub(super) fn json(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// A record, with the version `If-Match` is compared with.
pub(super) fn record(status: StatusCode, value: &Value, version: u64) -> Response {
    let content = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::ETAG, etag(version))];
    (status, content, value.to_string()).into_response()
}

/// Where a page ends, as it is told and sent back.
pub(super) fn cursor(place: String) -> String {
    URL_SAFE_NO_PAD.encode(place)
}

/// Nothing left.
pub(super) fn gone() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// What is wrong with a cursor.
pub(super) fn no_cursor() -> Problem {
    Problem::field("cursor", "is no cursor of ours; take `next_cursor` of the page before")
}

/// Refuses a query with a parameter that is not among those allowed, or is there twice: what is not understood must not
/// pass for what was not said, least of all a dry run.
pub(super) fn only(query: Option<&str>, allowed: &[&str]) -> Result<(), Problem> {
    let mut given: Vec<Cow<'_, str>> = Vec::new();
    for (name, _) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if !allowed.contains(&&*name) {
            let help = config::suggest(&name, allowed.iter().copied());
            return Err(Problem::field(config::shown(&name), format!("is no parameter of this; {help}")));
        }
        // Never longer than what is allowed.
        if given.contains(&name) {
            return Err(Problem::field(name, "is there more than once; give it once"));
        }
        given.push(name);
    }
    Ok(())
}

/// What faults there are, or nothing.
pub(super) fn refuse(faults: Vec<Fault>) -> Result<(), Problem> {
    if faults.is_empty() { Ok(()) } else { Err(Problem::fields(faults)) }
}

fn etag(version: u64) -> String {
    format!("\"{version}\"")
}
