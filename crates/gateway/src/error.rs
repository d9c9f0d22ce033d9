//! The one place where errors become responses, in the shape OpenAI's SDKs parse.
//!
//! What a caller reads and what the log says are different things: messages here name what the caller can change, never
//! an address or a credential of ours.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tollgate_limiter::{Denial, Retry, Source, Unit};

use crate::call::CallError;
use crate::dialect::openai;
use crate::headers::{self, Lines, Words};
use crate::metrics::Name;

/// Why a request's body ends early.
#[derive(Debug)]
pub enum BodyError {
    /// It is not framed as HTTP wants it: a sentence for the caller.
    Malformed(String),
    /// The caller went away.
    Left,
}

impl std::fmt::Display for BodyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Malformed(why) => why,
            Self::Left => "the caller went away",
        })
    }
}

impl std::error::Error for BodyError {}

/// Every way a request is refused or fails before its answer starts.
#[derive(Debug)]
pub enum Error {
    /// The body is not a request: 400.
    Call(CallError),
    /// Anything else malformed: 400, with a sentence that says what.
    Malformed(Cow<'static, str>),
    /// Two credentials that differ: 400.
    AmbiguousCredentials,
    /// No credential where one is required: 401.
    MissingKey,
    /// A credential nobody has: 401.
    UnknownKey,
    /// Its day has come: 401.
    ExpiredKey,
    /// It was taken back: 401.
    RevokedKey,
    /// A key of the admin API, before it is known which there are: 503.
    KeysUnavailable,
    /// An operator's ban: 403, with the sentence for who is banned.
    Banned(String),
    /// `/admin/*` without the admin key: 401.
    AdminKey,
    /// The caller may not use this model: 403.
    ModelNotAllowed(String),
    /// No model of that name: 404.
    ModelNotFound(String),
    /// None of the model's providers serves this endpoint: 404.
    UnsupportedEndpoint(String, &'static str),
    /// No such path: 404.
    UnknownUrl(String),
    /// The path exists for other methods: 405 with `allow`.
    MethodNotSupported(String, &'static str),
    /// The body did not come at the least pace: 408.
    SlowBody,
    /// Body above the bound in bytes: 413.
    BodyTooLarge(usize),
    /// A compressed body: 415.
    CompressedBody,
    /// A rule that refuses everything it matches: 403, with its name.
    Denied(Name),
    /// A limit said no: 429.
    Limited(Box<Denial>, Arc<Words>),
    /// The counters cannot be reached, and a limit is not to be passed uncounted: 503.
    LimiterUnavailable(Option<Duration>),
    /// The provider limits us and nobody else could answer: 429, with its own retry time.
    UpstreamLimited(Option<Duration>, Tried),
    /// Nobody answered: 502.
    UpstreamFailed(Tried),
    /// Nobody answered in time: 504.
    UpstreamTimeout(Tried),
    /// The caller went away while it was sending: nobody reads this.
    CallerLeft,
    /// The process is ending: 503.
    ShuttingDown,
    /// A defect of ours: 500.
    Internal,
}

/// The providers tried and why each did not answer, for messages: `chat at api.openai.com: status 500`.
pub type Tried = Vec<String>;

/// Seconds a caller is told to wait when the process is ending: another instance answers at once.
const SHUTDOWN_RETRY: Duration = Duration::from_secs(1);
/// Seconds a caller is told to wait when the counters cannot be reached.
const STORE_RETRY: Duration = Duration::from_secs(1);

impl Error {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.row().0
    }

    /// The `code` of the body; `None`: null.
    pub fn code(&self) -> Option<&'static str> {
        self.row().2
    }

    /// How long until another attempt makes sense, where that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::UpstreamLimited(wait, _) => *wait,
            Self::ShuttingDown => Some(SHUTDOWN_RETRY),
            Self::KeysUnavailable => Some(STORE_RETRY),
            Self::LimiterUnavailable(wait) => Some(wait.unwrap_or(STORE_RETRY)),
            _ => None,
        }
    }

    /// The JSON body.
    pub fn body(&self) -> Bytes {
        let (_, kind, code) = self.row();
        let body = |extra: &[_]| openai::error_body(&self.message(), kind, self.param(), code, extra);
        match self {
            Self::Limited(denial, _) => body(&headers::denial_fields(denial)),
            _ => body(&[]),
        }
        .into()
    }

    /// Headers beyond those that every answer has.
    pub fn headers(&self, lines: &mut Lines) {
        lines.add("content-type", b"application/json");
        if let Some(wait) = self.retry_after() {
            headers::retry_after(lines, Some(wait));
        }
        match self {
            Self::Limited(denial, words) => headers::denial(lines, denial, words),
            Self::LimiterUnavailable(_) => headers::source(lines, Source::Closed),
            Self::MethodNotSupported(_, allow) => lines.add("allow", allow.as_bytes()),
            Self::MissingKey | Self::UnknownKey | Self::ExpiredKey | Self::RevokedKey => {
                lines.add("www-authenticate", b"Bearer");
            }
            Self::Call(_) | Self::ModelNotFound(_) | Self::ModelNotAllowed(_) | Self::Banned(..) => {
                // The official SDKs retry on some statuses; these never change by waiting.
                lines.add(headers::SHOULD_RETRY, b"false");
            }
            _ => {}
        }
    }

    /// Status, type, code: the table of the contract.
    fn row(&self) -> (StatusCode, &'static str, Option<&'static str>) {
        const REQUEST: &str = "invalid_request_error";
        match self {
            Self::Call(_) | Self::Malformed(_) => (StatusCode::BAD_REQUEST, REQUEST, None),
            Self::AmbiguousCredentials => (StatusCode::BAD_REQUEST, REQUEST, Some("ambiguous_credentials")),
            Self::MissingKey | Self::UnknownKey | Self::ExpiredKey | Self::RevokedKey | Self::AdminKey => {
                (StatusCode::UNAUTHORIZED, REQUEST, Some("invalid_api_key"))
            }
            Self::KeysUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", Some("keys_unavailable"))
            }
            Self::Banned(..) => (StatusCode::FORBIDDEN, "permission_error", Some("banned")),
            Self::ModelNotAllowed(_) => {
                (StatusCode::FORBIDDEN, "permission_error", Some("model_not_allowed"))
            }
            Self::ModelNotFound(_) => (StatusCode::NOT_FOUND, REQUEST, Some("model_not_found")),
            Self::UnsupportedEndpoint(..) => (StatusCode::NOT_FOUND, REQUEST, Some("unsupported_endpoint")),
            Self::UnknownUrl(_) => (StatusCode::NOT_FOUND, REQUEST, Some("unknown_url")),
            Self::MethodNotSupported(..) => {
                (StatusCode::METHOD_NOT_ALLOWED, REQUEST, Some("method_not_supported"))
            }
            Self::SlowBody => (StatusCode::REQUEST_TIMEOUT, REQUEST, Some("request_timeout")),
            Self::BodyTooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, REQUEST, Some("body_too_large")),
            Self::CompressedBody => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, REQUEST, Some("unsupported_encoding"))
            }
            Self::Denied(_) => (StatusCode::FORBIDDEN, "permission_error", Some("denied")),
            Self::Limited(denial, _) => {
                let (kind, code) = limited(denial);
                (StatusCode::TOO_MANY_REQUESTS, kind, Some(code))
            }
            Self::LimiterUnavailable(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", Some("limiter_unavailable"))
            }
            Self::UpstreamLimited(..) => {
                (StatusCode::TOO_MANY_REQUESTS, "upstream_rate_limit", Some("upstream_rate_limit_exceeded"))
            }
            Self::UpstreamFailed(_) => (StatusCode::BAD_GATEWAY, "upstream_error", Some("upstream_failed")),
            Self::UpstreamTimeout(_) => {
                (StatusCode::GATEWAY_TIMEOUT, "upstream_error", Some("upstream_timeout"))
            }
            Self::ShuttingDown => {
                (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", Some("shutting_down"))
            }
            Self::CallerLeft => (StatusCode::BAD_REQUEST, REQUEST, None),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error")),
        }
    }

    fn param(&self) -> Option<&'static str> {
        match self {
            Self::Call(error) => error.param(),
            Self::ModelNotAllowed(_) | Self::ModelNotFound(_) => Some("model"),
            _ => None,
        }
    }

    /// The sentence for the caller.
    pub fn message(&self) -> String {
        match self {
            Self::Call(error) => error.to_string(),
            Self::Malformed(what) => what.to_string(),
            Self::AmbiguousCredentials => {
                "Authorization and X-API-Key carry different keys. Send one key, or the same in both.".into()
            }
            Self::MissingKey => "You didn't provide an API key. Send it as 'Authorization: Bearer KEY' \
                                 or 'X-API-Key: KEY'."
                .into(),
            Self::UnknownKey => "Incorrect API key provided. The key is not known here.".into(),
            Self::ExpiredKey => "This API key has expired. Ask whoever gave it to you for a new one.".into(),
            Self::RevokedKey => {
                "This API key has been revoked. Ask whoever gave it to you for a new one.".into()
            }
            Self::KeysUnavailable => {
                "It cannot be known at the moment whether this key is good. Try again.".into()
            }
            Self::Banned(sentence) => sentence.clone(),
            Self::AdminKey => "The admin key is missing or wrong. Send it as 'X-Admin-Key: KEY' or \
                               'Authorization: Bearer KEY'."
                .into(),
            Self::ModelNotAllowed(model) => format!("Your key may not use the model `{model}`."),
            Self::ModelNotFound(model) => {
                format!("The model `{model}` does not exist. GET /v1/models lists those you may use.")
            }
            Self::UnsupportedEndpoint(model, route) => {
                format!("No provider of the model `{model}` serves {route}.")
            }
            Self::UnknownUrl(what) => format!("Unknown request URL: {what}. Paths are matched exactly."),
            Self::MethodNotSupported(what, allow) => format!("Not allowed: {what}. Allowed here: {allow}."),
            Self::SlowBody => {
                "The request body came too slowly: at least 1 KiB per second is expected.".into()
            }
            Self::BodyTooLarge(bound) => format!("The request body is larger than {bound} bytes."),
            Self::CompressedBody => {
                "Compressed request bodies are not accepted. Send the body without Content-Encoding.".into()
            }
            Self::Denied(rule) => format!("The rule `{rule}` does not allow this request."),
            Self::Limited(denial, _) => headers::denial_sentence(denial),
            Self::LimiterUnavailable(_) => {
                "The counters of a limit that may not be passed uncounted cannot be reached. Try again."
                    .into()
            }
            Self::UpstreamLimited(_, tried) => {
                format!("Every provider of this model is rate limited. Tried: {}.", tried.join("; "))
            }
            Self::UpstreamFailed(tried) => {
                format!("No provider of this model answered. Tried: {}.", tried.join("; "))
            }
            Self::UpstreamTimeout(tried) => {
                format!("No provider of this model answered in time. Tried: {}.", tried.join("; "))
            }
            Self::CallerLeft => "The request body broke off.".into(),
            Self::ShuttingDown => {
                "This instance is shutting down. Try again: another one will answer.".into()
            }
            Self::Internal => {
                "The gateway failed to handle this request. The request id finds it in the log.".into()
            }
        }
    }
}

/// Type and code of a 429 of ours.
fn limited(denial: &Denial) -> (&'static str, &'static str) {
    let never = denial.retry() == Retry::Never;
    match denial.binding().limit.unit() {
        Unit::Concurrency => ("requests", "concurrency_limit_exceeded"),
        Unit::Cost => ("insufficient_quota", "insufficient_quota"),
        Unit::Tokens | Unit::InputTokens | Unit::OutputTokens if never => ("tokens", "request_too_large"),
        Unit::Tokens | Unit::InputTokens | Unit::OutputTokens => ("tokens", "rate_limit_exceeded"),
        Unit::Requests => ("requests", "rate_limit_exceeded"),
    }
}

/// A whole HTTP/1.1 response for refusals that happen below HTTP, on the connection itself.
pub fn raw_response(status: StatusCode, message: &str, request_id: &str) -> Bytes {
    let body = openai::error_body(message, "invalid_request_error", None, None, &[]);
    let reason = status.canonical_reason().unwrap_or_default();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         x-request-id: {request_id}\r\nconnection: close\r\n\r\n",
        status.as_u16(),
    );
    [head.into_bytes(), body].concat().into()
}
