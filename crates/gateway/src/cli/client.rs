//! The admin API of a running gateway, asked: one bounded answer after the other, and what each means for the exit code.

mod events;

use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, StatusCode, Uri, response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

pub(super) use self::events::{Heard, Listener, Told};
use super::table::plain;
use super::{Outcome, Stopped, exit};
use crate::upstream::{Connector, Trust, connector};

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest answer.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// What is not written as it is in a part of a path; dots neither, because `..` would be a part of its own meaning.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');
/// Entries of one page: the most there can be.
const PAGE: &str = "1000";

/// Where a gateway is asked when nothing says so.
const HERE: &str = "http://127.0.0.1:8081";
/// What the options of all these verbs stand under.
const HEADING: &str = "Gateway";

/// Which gateway is asked, and how its answer is printed.
#[derive(Args)]
pub(super) struct Connection {
    /// The admin address of the gateway. Default: `http://127.0.0.1:8081`.
    #[arg(long, global = true, env = "TOLLGATE_URL", value_name = "URL", help_heading = HEADING)]
    url: Option<String>,
    /// Its `server.admin_key`. Better in the variable: arguments are seen by everybody on a machine.
    #[arg(
        long,
        global = true,
        env = "TOLLGATE_ADMIN_KEY",
        hide_env_values = true,
        value_name = "KEY",
        help_heading = HEADING
    )]
    admin_key: Option<String>,
    /// One JSON document.
    #[arg(long, global = true, help_heading = HEADING)]
    pub(super) json: bool,
}

/// A gateway that can be asked.
pub(super) struct Admin {
    /// Without a slash at its end.
    base: String,
    key: Option<HeaderValue>,
    client: Client<Connector, Full<Bytes>>,
    runtime: tokio::runtime::Runtime,
    json: bool,
}

impl Connection {
    /// Makes it ready to be asked; connects to nothing yet.
    pub(super) fn open(&self) -> Result<Admin, Stopped> {
        // A variable that is set to nothing is one that is not set.
        let url = self.url.as_deref().filter(|url| !url.is_empty()).unwrap_or(HERE);
        let base = url.trim_end_matches('/').to_owned();
        let usable = |uri: &Uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.query().is_none()
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        };
        let uri = base.parse::<Uri>().ok().filter(usable).ok_or_else(|| {
            let wrong = format!("--url: `{}` is no URL of a gateway", plain(url));
            Stopped::new(exit::USAGE, format!("{wrong}; write {HERE}"))
        })?;
        let key = match self.admin_key.as_deref().filter(|key| !key.is_empty()) {
            None => None,
            Some(key) => {
                let wrong = "--admin-key: has characters that no header can carry";
                let mut key = HeaderValue::from_str(key).map_err(|_| Stopped::new(exit::USAGE, wrong))?;
                key.set_sensitive(true);
                Some(key)
            }
        };
        let connector = connector(&uri, &mut Trust::default(), PATIENCE);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Admin { base, key, client, runtime: super::runtime()?, json: self.json })
    }
}

impl Admin {
    /// One record.
    pub(super) fn get(&self, path: &[&str]) -> Result<Value, Stopped> {
        self.find(path, &[])
    }

    /// What a query finds.
    pub(super) fn find(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, Stopped> {
        self.ask(&Method::GET, path, query, None)
    }

    /// Runs what asks this gateway again and again.
    pub(super) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Whether results are wanted as JSON.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// A document that is no JSON.
    pub(super) fn text(&self, path: &[&str], query: &[(&str, &str)]) -> Result<String, Stopped> {
        let (head, body) = self.exchange(&Method::GET, path, query, None)?;
        if !head.status.is_success() {
            self.judge(head.status, is_problem(&head.headers), &body)?;
        }
        String::from_utf8(body.into()).map_err(|_| self.strange("something that is no text"))
    }

    /// All entries of a list, page after page.
    pub(super) fn list(&self, path: &[&str], filter: &[(&str, &str)]) -> Result<Vec<Value>, Stopped> {
        let mut all = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut query = filter.to_vec();
            query.push(("limit", PAGE));
            query.extend(cursor.as_deref().map(|cursor| ("cursor", cursor)));
            let mut page = self.ask(&Method::GET, path, &query, None)?;
            let Value::Array(data) = page["data"].take() else {
                return Err(self.strange("a list without `data`"));
            };
            let is_empty = data.is_empty();
            all.extend(data);
            cursor = match page["next_cursor"].take() {
                Value::Null => return Ok(all),
                Value::String(next) if !is_empty && cursor.as_ref() != Some(&next) => Some(next),
                _ => return Err(self.strange("a list that does not go on")),
            };
        }
    }

    /// Changes something, or with `dry_run` asks what would change.
    pub(super) fn write(
        &self,
        method: &Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
        dry_run: bool,
    ) -> Result<Value, Stopped> {
        let mut query = query.to_vec();
        if dry_run {
            query.push(("dry_run", "true"));
        }
        let answer = self.ask(method, path, &query, body)?;
        if dry_run {
            eprintln!("dry run: nothing was changed");
        }
        Ok(answer)
    }

    /// Prints a result: as JSON when that is wanted, else as `text` says it.
    pub(super) fn print(&self, result: &Value, text: impl FnOnce(&Value) -> String) -> Outcome {
        super::print(&if self.json { format!("{result:#}") } else { text(result) })
    }

    /// Prints a list the same way.
    pub(super) fn print_list(&self, data: Vec<Value>, text: impl FnOnce(&[Value]) -> String) -> Outcome {
        super::print(&if self.json { format!("{:#}", json!({ "data": data })) } else { text(&data) })
    }

    fn ask(
        &self,
        method: &Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, Stopped> {
        let (head, body) = self.exchange(method, path, query, body)?;
        self.judge(head.status, is_problem(&head.headers), &body)
    }

    fn exchange(
        &self,
        method: &Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<(response::Parts, Bytes), Stopped> {
        let request = self.request(method, path, query, body)?;
        let exchange = async {
            let sent = self.client.request(request).await;
            let (head, body) = sent.map_err(|error| (error.is_connect(), cause(&error)))?.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let too_large = || format!("it answers with more than {ANSWER_BYTES_MAX} bytes");
            let why = |error: Box<dyn std::error::Error + Send + Sync>| {
                if error.is::<LengthLimitError>() { too_large() } else { cause(&*error) }
            };
            Ok((head, body.map_err(|error| (false, why(error)))?.to_bytes()))
        };
        // The timer wants a runtime around it.
        let answered = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, exchange).await });
        match answered {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err((unsent, why))) => Err(self.unreachable(unsent || method.is_safe(), &why)),
            Err(_) => {
                let why = format!("no answer within {PATIENCE:?}");
                Err(self.unreachable(method.is_safe(), &why))
            }
        }
    }

    fn request(
        &self,
        method: &Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Request<Full<Bytes>>, Stopped> {
        let mut request = Request::builder().method(method).uri(self.address(path, query));
        if let Some(key) = &self.key {
            request = request.header("x-admin-key", key);
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map(ToString::to_string).unwrap_or_default();
        request.body(Full::from(body)).map_err(|error| Stopped::new(exit::USAGE, error))
    }

    fn address(&self, path: &[&str], query: &[(&str, &str)]) -> String {
        let mut address = format!("{}/admin", self.base);
        for part in path {
            address.push('/');
            address.extend(utf8_percent_encode(part, RESERVED));
        }
        if !query.is_empty() {
            let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
            address.push('?');
            address.push_str(&query);
        }
        address
    }

    /// What an answer means: what it says, or why this ends.
    fn judge(&self, status: StatusCode, is_problem: bool, body: &[u8]) -> Result<Value, Stopped> {
        if status.is_success() {
            return match body {
                [] => Ok(Value::Null),
                body => serde_json::from_slice(body).map_err(|_| self.strange("something that is no JSON")),
            };
        }
        if status == StatusCode::UNAUTHORIZED {
            let (state, what) = match self.key {
                None => ("missing", "set"),
                Some(_) => ("wrong", "look at"),
            };
            let hint =
                format!("{what} TOLLGATE_ADMIN_KEY, or --admin-key: `server.admin_key` of that gateway");
            return Err(Stopped::new(
                exit::UNAVAILABLE,
                format!("{}: the admin key is {state}; {hint}", self.base),
            ));
        }
        if !is_problem {
            return Err(self.strange(&format!("status {}", status.as_u16())));
        }
        let said = explain(body);
        Err(match status.is_client_error() {
            true => Stopped::new(exit::NO, said),
            false => Stopped::new(exit::UNAVAILABLE, format!("{}: {said}", self.base)),
        })
    }

    fn unreachable(&self, changes_nothing: bool, why: &str) -> Stopped {
        let hint = match changes_nothing {
            true => "TOLLGATE_URL, or --url, says which admin address is asked",
            false => "whether the change happened is not known",
        };
        Stopped::new(exit::UNAVAILABLE, format!("{} cannot be asked: {}; {hint}", self.base, plain(why)))
    }

    fn strange(&self, what: &str) -> Stopped {
        let hint = "is it the admin address of a gateway (TOLLGATE_URL, or --url)?";
        Stopped::new(exit::UNAVAILABLE, format!("{} answers with {what}; {hint}", self.base))
    }
}

fn is_problem(headers: &HeaderMap) -> bool {
    let content = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    content.starts_with(b"application/problem+json")
}

/// A problem (RFC 9457) in words: a line for each field, or its detail.
fn explain(body: &[u8]) -> String {
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |value: &Value| plain(value.as_str().unwrap_or("?"));
    match problem["errors"].as_array().map(Vec::as_slice) {
        None | Some([]) => text(&problem["detail"]),
        Some(faults) => {
            let line = |fault: &Value| format!("{}: {}", text(&fault["field"]), text(&fault["detail"]));
            faults.iter().map(line).collect::<Vec<_>>().join("\n")
        }
    }
}

/// The innermost error says what happened.
fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
