//! What is wrong with a request of an operator: RFC 9457, `application/problem+json`.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::json;

use crate::config;

/// One answer that is none.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    status: StatusCode,
    detail: String,
    errors: Vec<Fault>,
    retry_after: Option<Duration>,
}

/// What is wrong with one field.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// `models[0]`; the name of a parameter of the query.
    pub(super) field: String,
    /// What is wrong, and what is allowed.
    pub(super) detail: String,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new(), retry_after: None }
    }

    /// 422: these fields.
    pub(super) fn fields(errors: Vec<Fault>) -> Self {
        let named: Vec<String> =
            errors.iter().map(|fault| format!("{}: {}", fault.field, fault.detail)).collect();
        Self { errors, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, named.join("; ")) }
    }

    /// With `Retry-After`: worth another try after this time.
    pub(super) fn after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }

    /// 422: one field.
    pub(super) fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::fields(vec![Fault { field: field.into(), detail: detail.into() }])
    }

    /// 422: a field that makes a request meet more limits than it may.
    pub(super) fn overlap(field: &str, overlap: &config::Overlap) -> Self {
        Self::field(field, overlap.sentence())
    }

    /// The fields that are wrong.
    pub(super) fn into_faults(self) -> Vec<Fault> {
        self.errors
    }

    /// 404: `there is no key `a``.
    pub(super) fn absent(what: &str, id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no {what} `{id}`"))
    }

    /// 409.
    pub(super) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    /// 503: what is asked cannot be had at the moment.
    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }
}

impl From<config::Problem> for Fault {
    fn from(problem: config::Problem) -> Self {
        let config::Problem { path, message, help, .. } = problem;
        let detail = if help.is_empty() { message } else { format!("{message}; {help}") };
        Self { field: path, detail }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let title = self.status.canonical_reason().unwrap_or_default();
        let mut body = json!({ "type": "about:blank", "title": title, "status": self.status.as_u16(),
                               "detail": self.detail });
        if !self.errors.is_empty() {
            let errors = self.errors.iter().map(|f| json!({ "field": f.field, "detail": f.detail }));
            body["errors"] = errors.collect();
        }
        let content = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (self.status, content, body.to_string()).into_response();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
