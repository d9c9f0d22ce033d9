//! One provider of one model: asking it, with deadlines, and knowing whether it answers these days.
//!
//! An attempt ends in an [`Answer`] only once something worth sending has arrived: a small JSON answer whole, a stream up to
//! its first event. Until then nothing was sent to the caller and the next provider may be asked.

mod connect;
mod connection;
mod head;
mod health;
mod in_flight;
mod models;
mod pool;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use http::StatusCode;
use http::header::HeaderValue;
use tokio::time::timeout_at;

pub use self::connect::{Connector, Trust, connector};
use self::connection::Outgoing;
pub use self::head::Head;
use self::health::Health;
pub use self::in_flight::{Flight, InFlight};
pub use self::models::probe;
pub use self::pool::Lane;
use self::pool::{Client, Flow};
use crate::call::{Call, Endpoint};
use crate::config::{Provider, ProviderKind, Secret};
use crate::dialect::openai;
use crate::fields::Fields;
use crate::headers;
use crate::ids::{RequestId, Trace};
use crate::metrics::{ByProvider, ByProviderCode, Metrics, Name, ProviderSeries};
use crate::recent::Recent;
use crate::simulated::{Simulated, Simulation};
use crate::sse;

/// JSON answers up to this size are read whole before the caller gets the first byte.
const WHOLE_BYTES_MAX: usize = 1 << 20;

/// Comments and other bytes before the first event of a stream.
const PREAMBLE_BYTES_MAX: usize = 64 << 10;

/// One provider of one model.
pub struct Deployment {
    /// The model's name.
    pub model: Name,
    /// The provider's name, unique within the model.
    pub name: Name,
    /// Its settings.
    pub provider: Provider,
    /// What is counted of it.
    pub series: Arc<ProviderSeries>,
    /// Whether it answers these days.
    pub health: Health,
    /// How long it took lately to begin its answers.
    pub latency: Recent,
    /// The same, of streams alone.
    pub first_token: Recent,
    /// Requests it is busy with.
    pub in_flight: InFlight,
    link: Link,
}

enum Link {
    Http(Box<Http>),
    Simulated(Simulated),
}

/// A server that speaks OpenAI's HTTP API.
struct Http {
    client: Client,
    stream_usage: bool,
}

/// What a provider is asked.
pub struct Question<'a> {
    /// The caller's request.
    pub call: &'a Call,
    /// The headers it came with.
    pub sent: &'a Fields,
    /// The trace it belongs to.
    pub trace: &'a Trace,
    /// Its id.
    pub request_id: &'a RequestId,
    /// Whose idle connections may be used.
    pub lane: Lane,
}

/// What a provider answered, with a status that is the caller's business (2xx, and 4xx about the request).
pub struct Answer {
    /// Its status and header fields.
    pub head: Head,
    /// What its body is.
    pub kind: Kind,
    /// Its body.
    pub body: AnswerBody,
}

/// What a body is, as its `Content-Type` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Server-sent events.
    Events,
    /// JSON.
    Json,
    /// Something else.
    Other,
}

impl Kind {
    fn of(fields: &Fields) -> Self {
        let value = fields.get("content-type").unwrap_or_default();
        let essence = value.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        if essence.eq_ignore_ascii_case(b"application/json") {
            Self::Json
        } else if essence.eq_ignore_ascii_case(b"text/event-stream") {
            Self::Events
        } else {
            Self::Other
        }
    }
}

/// The body of an [`Answer`].
pub enum AnswerBody {
    /// All of it.
    Whole(Bytes),
    /// More is to come.
    Open {
        /// Chunks read already.
        head: VecDeque<Bytes>,
        /// Where the rest comes from.
        rest: Source,
    },
}

/// Why a provider did not answer.
#[derive(Debug)]
pub enum Failure {
    /// No connection: the request was never sent.
    Unreachable(String),
    /// A deadline passed; its name and length.
    TimedOut(&'static str, Duration),
    /// A status that says nothing about the request itself, and how long it wants to be left alone.
    Status(StatusCode, Option<Duration>),
    /// The answer broke off, or was not HTTP as asked for.
    Broken(String),
    /// This process has no file descriptor left for a connection.
    NoDescriptors,
}

impl Failure {
    /// The `code` it is counted under.
    fn code(&self) -> Name {
        match self {
            Self::Status(status, _) => status.as_str().into(),
            Self::TimedOut(..) => "timeout".into(),
            Self::Unreachable(_) | Self::Broken(_) | Self::NoDescriptors => "error".into(),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable(why) => write!(f, "not reached ({why})"),
            Self::TimedOut(what, bound) => write!(f, "no {what} within {bound:?}"),
            Self::Status(status, _) => write!(f, "status {}", status.as_u16()),
            Self::Broken(why) => write!(f, "{why}"),
            Self::NoDescriptors => f.write_str("no file descriptor left for a connection"),
        }
    }
}

/// The bytes of an answer as they come.
pub enum Source {
    /// From a connection.
    Http(Flow),
    /// From ourselves.
    Simulated(Simulation),
}

impl Source {
    /// The next bytes; `None` behind the last.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        match self {
            Self::Http(flow) => flow.poll_chunk(cx),
            Self::Simulated(simulation) => simulation.poll_chunk(cx).map(|chunk| chunk.map(Ok)),
        }
    }

    /// Lets go of it, with its connection where it can be used again.
    fn discard(self) {
        if let Self::Http(flow) = self {
            flow.discard();
        }
    }

    /// Whether it is known that nothing will come.
    fn is_empty(&self) -> bool {
        match self {
            Self::Http(flow) => flow.is_empty(),
            Self::Simulated(_) => false,
        }
    }
}

impl Deployment {
    /// Sets up the provider; opens no connection yet.
    pub fn new(model: Name, provider: Provider, trust: &mut Trust, metrics: &Metrics) -> Self {
        let name = Name::from(provider.name.as_str());
        let link = match &provider.kind {
            ProviderKind::Openai { base, key, stream_usage } => Link::Http(Box::new(Http {
                client: Client::new(
                    base,
                    connector(base, trust, provider.deadlines.connect),
                    key.as_ref().and_then(authorization).as_ref(),
                ),
                stream_usage: *stream_usage,
            })),
            ProviderKind::Simulated { .. } => Link::Simulated(Simulated::new(&provider.kind)),
        };
        let label = ByProvider { model: model.clone(), provider: name.clone() };
        let healthy = metrics.upstream_healthy.get_or_create_owned(&label);
        let series = Arc::new(metrics.provider(label));
        Self {
            model,
            name,
            provider,
            series,
            health: Health::new(healthy),
            latency: Recent::default(),
            first_token: Recent::default(),
            in_flight: InFlight::default(),
            link,
        }
    }

    /// Its label in metrics.
    pub fn label(&self) -> &ByProvider {
        &self.series.label
    }

    /// Closes connections that are not used any more.
    pub fn reap(&self) {
        if let Link::Http(http) = &self.link {
            http.client.reap();
        }
    }

    /// Whether it serves this endpoint.
    pub fn serves(&self, endpoint: Endpoint) -> bool {
        match &self.link {
            Link::Http(_) => true,
            Link::Simulated(_) => Simulated::serves(endpoint),
        }
    }

    /// An answer of its that had begun has ended rightly.
    pub fn ended(&self) {
        self.health.answered();
    }

    /// An answer of its broke off or stalled in the middle.
    pub fn broke_off(&self) {
        self.health.failed(&Failure::Broken(String::new()));
    }

    /// Whether an answer without `usage` has one token in each delta.
    pub fn counts_deltas(&self) -> bool {
        matches!(self.link, Link::Simulated(_))
    }

    /// Asks once. Counts the attempt and remembers whether it was answered. `reached` becomes true when there is a
    /// connection to send the request on: whoever is dropped before has asked nobody.
    ///
    /// # Errors
    /// A [`Failure`] when the next provider should be asked: no byte of this attempt may reach the caller.
    pub async fn ask(
        &self,
        question: &Question<'_>,
        reached: &AtomicBool,
        metrics: &Metrics,
        now: Instant,
    ) -> Result<Box<Answer>, Failure> {
        let mut asking = Asking { deployment: self, metrics, ended: false };
        let result = self.attempt(question, reached, now).await;
        asking.ended(&result);
        result
    }

    async fn attempt(
        &self,
        question: &Question<'_>,
        reached: &AtomicBool,
        asked: Instant,
    ) -> Result<Box<Answer>, Failure> {
        let deadlines = self.provider.deadlines;
        let total = asked + deadlines.total;
        let stream = question.call.streamed();
        // A plain answer is written when it is finished: only the total bounds its head.
        let (what, bound, head_by) = match asked + deadlines.first_token {
            first if stream && first < total => ("first token", deadlines.first_token, first),
            _ => ("answer", deadlines.total, total),
        };
        let by = tokio::time::Instant::from_std(head_by);
        let (head, body) = match &self.link {
            Link::Http(http) => {
                let body = question.call.render(self.provider.model_name.as_deref(), http.stream_usage);
                let request = http.request(question, body);
                let sent = http.client.send(request, question.lane, reached, by).await?;
                let (head, flow) = sent.ok_or(Failure::TimedOut(what, bound))?;
                (head, Source::Http(flow))
            }
            Link::Simulated(simulated) => {
                reached.store(true, Ordering::Relaxed);
                let answer = timeout_at(by, simulated.ask(question.call)).await;
                answer.map_err(|_| Failure::TimedOut(what, bound))?
            }
        };
        if let Err(failure) = acceptable(&head) {
            body.discard();
            return Err(failure);
        }
        let mut reading = Reading::of(body);
        let kind = Kind::of(&head.fields);
        let body = match kind {
            Kind::Events => {
                let first = timeout_at(by, reading.until_first_event()).await;
                first.map_err(|_| Failure::TimedOut("first token", bound))??;
                reading.open()
            }
            Kind::Json => reading.whole(deadlines.idle, deadlines.total, total).await?,
            Kind::Other if reading.source.is_empty() => {
                reading.source.discard();
                AnswerBody::Whole(Bytes::new())
            }
            Kind::Other => reading.open(),
        };
        Ok(Box::new(Answer { head, kind, body }))
    }
}

/// One attempt, counted however it ends: also when its caller leaves in the middle of it.
struct Asking<'a> {
    deployment: &'a Deployment,
    metrics: &'a Metrics,
    ended: bool,
}

impl Asking<'_> {
    fn ended(&mut self, result: &Result<Box<Answer>, Failure>) {
        self.ended = true;
        match result {
            Ok(answer) => self.count(answer.head.status.as_str()),
            Err(failure) => self.count(&failure.code()),
        }
        match result {
            Ok(answer) if matches!(answer.body, AnswerBody::Whole(_)) => self.deployment.health.answered(),
            Ok(_) => self.deployment.health.began(),
            Err(failure) => self.deployment.health.failed(failure),
        }
    }

    fn count(&self, code: &str) {
        if code == "200" {
            self.deployment.series.ok.inc();
            return;
        }
        let ByProvider { model, provider } = self.deployment.label().clone();
        let label = ByProviderCode { model, provider, code: code.to_owned() };
        self.metrics.upstream_requests.get_or_create(&label).inc();
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.count("cancelled");
            self.deployment.health.pass_turn();
        }
    }
}

/// An answer being read before any of it is sent.
struct Reading {
    source: Source,
    /// The first chunk, which is often the only one, and those behind it.
    first: Option<Bytes>,
    rest: VecDeque<Bytes>,
    bytes: usize,
}

impl Reading {
    fn of(source: Source) -> Self {
        Self { source, first: None, rest: VecDeque::new(), bytes: 0 }
    }

    /// Whether there was more.
    async fn more(&mut self) -> Result<bool, Failure> {
        match poll_fn(|cx| self.source.poll_chunk(cx)).await {
            None => Ok(false),
            Some(Err(_)) => Err(Failure::Broken("connection closed in the middle of the answer".into())),
            Some(Ok(chunk)) => {
                self.bytes += chunk.len();
                match &self.first {
                    None => self.first = Some(chunk),
                    Some(_) => self.rest.push_back(chunk),
                }
                Ok(true)
            }
        }
    }

    /// What came last.
    fn last(&self) -> Bytes {
        self.rest.back().or(self.first.as_ref()).cloned().unwrap_or_default()
    }

    /// What was read, and what is to come.
    fn open(self) -> AnswerBody {
        let mut head = self.rest;
        if let Some(first) = self.first {
            head.push_front(first);
        }
        AnswerBody::Open { head, rest: self.source }
    }

    async fn until_first_event(&mut self) -> Result<(), Failure> {
        let mut splitter = sse::Splitter::new();
        while self.bytes < PREAMBLE_BYTES_MAX {
            if !self.more().await? {
                return if self.bytes > 0 {
                    Ok(())
                } else {
                    Err(Failure::Broken("empty event stream".into()))
                };
            };
            let first = splitter
                .push(self.last())
                .find_map(|event| event.data().map(|data| openai::read_event(&data).error));
            match first {
                Some(true) => return Err(Failure::Broken("error event before the first token".into())),
                Some(false) => return Ok(()),
                None => {}
            }
        }
        Ok(())
    }

    async fn whole(mut self, idle: Duration, total: Duration, by: Instant) -> Result<AnswerBody, Failure> {
        while self.bytes <= WHOLE_BYTES_MAX {
            let read = match self.more().now_or_never() {
                // It came with the head.
                Some(read) => read?,
                None => {
                    let (due, what, bound) = match Instant::now() + idle {
                        stalled if stalled < by => (stalled, "more of the answer", idle),
                        _ => (by, "end of the answer", total),
                    };
                    let read = timeout_at(due.into(), self.more()).await;
                    read.map_err(|_| Failure::TimedOut(what, bound))??
                }
            };
            if !read {
                let only = self.first.take_if(|_| self.rest.is_empty());
                return Ok(AnswerBody::Whole(only.unwrap_or_else(|| self.joined())));
            }
        }
        Ok(self.open())
    }

    fn joined(&self) -> Bytes {
        let mut all = Vec::with_capacity(self.bytes);
        self.first.iter().chain(&self.rest).for_each(|chunk| all.extend_from_slice(chunk));
        all.into()
    }
}

impl Http {
    fn request(&self, question: &Question<'_>, body: Bytes) -> Outgoing {
        let mut head = self.client.head("POST", question.call.endpoint().upstream_path(), &body);
        let Question { call, sent, trace, request_id, .. } = question;
        headers::to_provider(&mut head, sent, call.content_type(sent), trace, request_id);
        Outgoing::new(head, body)
    }
}

/// Whether an answer is about the request (2xx, most of 4xx) or about the provider.
fn acceptable(Head { status, fields }: &Head) -> Result<(), Failure> {
    let status = *status;
    let about_the_provider = match status {
        // Ours is the credential it refuses, not the caller's.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => true,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => true,
        _ => !(status.is_success() || status.is_client_error()),
    };
    if about_the_provider {
        return Err(Failure::Status(status, retry_after(fields)));
    }
    match fields.get("content-encoding") {
        Some(encoding) if encoding != b"identity" => {
            Err(Failure::Broken("compressed answer to a request for an uncompressed one".into()))
        }
        _ => Ok(()),
    }
}

/// `Retry-After` in seconds, or `retry-after-ms`; dates (RFC 9110 10.2.3) are not sent by these APIs.
fn retry_after(fields: &Fields) -> Option<Duration> {
    let number = |name| std::str::from_utf8(fields.get(name)?).ok()?.trim().parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|ms| ms / 1e3);
    Duration::try_from_secs_f64(seconds.or_else(|| number("retry-after"))?).ok()
}

/// An answer of ours as if it had come over HTTP.
pub fn local_answer(status: StatusCode, content_type: &'static str, body: Simulation) -> (Head, Source) {
    (Head { status, fields: Fields::from_iter([("content-type", content_type)]) }, Source::Simulated(body))
}

fn authorization(key: &Secret) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose())).ok()?;
    value.set_sensitive(true);
    Some(value)
}
