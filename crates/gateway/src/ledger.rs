//! The one place where a request ends.
//!
//! An [`Entry`] is opened when a request's head has arrived and travels with it: through the pipeline, then inside the
//! answer's body. Wherever it is dropped (answer complete, error, client gone, provider dead, panic, shutdown) the request
//! ends: counted, settled, logged, exactly once. Nobody has to remember to call anything, and a client that leaves,
//! which drops the request's future at whatever await it stands, cannot skip it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use http::{Method, StatusCode};
use tokio_util::sync::CancellationToken;
use tollgate_limiter::{Cost, Denial, Source};

use crate::admission::{self, Admitted, Plan, Used};
use crate::call::{Content, Endpoint};
use crate::config::{Key, TokenWeights};
use crate::dialect;
use crate::estimate::Estimates;
use crate::ids::{RequestId, TraceId};
use crate::journal::{Ended, Journal};
use crate::log::{Line, Log, field};
use crate::metrics::{ByEndpointCode, ByWhom, Metrics, Name, OTHER, RouteNumber, RouteSeries};
use crate::refusals::Refusals;
use crate::route::Attempts;
use crate::usage::{self, Usage};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The whole answer was handed over.
    Done,
    /// Answered with an error of ours before it reached a provider's answer.
    Refused,
    /// The caller went away first.
    ClientLeft,
    /// The provider broke off in the middle of its answer.
    UpstreamDied,
    /// The provider stalled, or took longer in all than it may.
    TimedOut,
    /// The process ended first.
    Shutdown,
    /// A defect of ours.
    Panicked,
}

impl Outcome {
    /// As in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::ClientLeft => "client_left",
            Self::UpstreamDied => "upstream_died",
            Self::TimedOut => "timed_out",
            Self::Shutdown => "shutdown",
            Self::Panicked => "panicked",
        }
    }

    /// Who aborted, for `streams_aborted_total`; `None`: nobody.
    fn aborted_by(self) -> Option<&'static str> {
        match self {
            Self::Done | Self::Refused => None,
            Self::ClientLeft => Some("client"),
            Self::UpstreamDied => Some("upstream"),
            Self::TimedOut => Some("timeout"),
            Self::Shutdown => Some("shutdown"),
            Self::Panicked => Some("panic"),
        }
    }
}

/// Tokens of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// What was used.
    pub usage: dialect::Usage,
    /// Counted here, because the provider did not say.
    pub estimated: bool,
}

/// What a request shares with the rest of the process when it ends. One count holds all of it: each request takes part,
/// from every core.
pub struct Ledger {
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
    /// Where it is written down.
    pub log: Log,
    /// What is learned from it.
    pub estimates: Arc<Estimates>,
    /// How often refusals are written down.
    pub refusals: Arc<Refusals>,
    /// Where it is told what was used.
    pub usage: Arc<Usage>,
    /// Where it is remembered for a while.
    pub journal: Arc<Journal>,
    /// Cancelled when requests must end because the process does.
    pub ending: CancellationToken,
}

/// One request from head to end. See the module.
pub struct Entry {
    ledger: Arc<Ledger>,
    route: RouteNumber,
    started: Instant,
    method: &'static str,
    /// Returned to the caller as `x-request-id`.
    pub request_id: RequestId,
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// The client's address.
    pub address: IpAddr,
    /// The key it came with.
    pub key: Option<Arc<Key>>,
    /// The resolved model.
    pub model: Option<Name>,
    /// What providers were asked.
    pub attempts: Attempts,
    /// Whether an event stream was asked for.
    pub streamed: bool,
    /// The status sent, once there is one.
    pub status: Option<StatusCode>,
    /// `code` of the error sent.
    pub code: Option<&'static str>,
    /// The limit that refused.
    pub rule: Option<Name>,
    /// Who decided about its limits.
    pub source: Option<Source>,
    /// Set on the way; what is not set when the entry is dropped was cut by the client.
    pub outcome: Option<Outcome>,
    /// Tokens used, once known.
    pub tokens: Option<Tokens>,
    /// What it cost.
    cost: Cost,
    /// From the request's head to the first byte of the provider's answer.
    pub first_byte: Option<Duration>,
    /// When the body was complete: our own work is counted from here.
    pub received: Option<Instant>,
    /// What was asked.
    pub content: Option<Content>,
    /// What limits it met; known when what it held of them was given back or settled.
    plan: Option<Arc<Plan>>,
    /// What it holds of them.
    pub admitted: Option<Admitted>,
    /// How much special tokens count.
    pub weights: TokenWeights,
    /// When the first event of a stream came.
    pub first_event: Option<Instant>,
    /// What we added to the wait for an answer.
    overhead: Option<Duration>,
}

impl Entry {
    /// Opens the account of a request whose head has just arrived.
    pub fn open(
        ledger: &Arc<Ledger>,
        endpoint: &'static str,
        method: Option<&Method>,
        request_id: RequestId,
        trace_id: TraceId,
        address: IpAddr,
    ) -> Self {
        let route = ledger.metrics.route(endpoint);
        ledger.metrics.of_route(route).in_flight.inc();
        ledger.journal.begin();
        let started = Instant::now();
        Self {
            ledger: ledger.clone(),
            route,
            started,
            method: method.map_or("-", known),
            request_id,
            trace_id,
            address,
            key: None,
            model: None,
            attempts: Attempts::new(started),
            streamed: false,
            status: None,
            code: None,
            rule: None,
            source: None,
            outcome: None,
            tokens: None,
            cost: Cost::ZERO,
            first_byte: None,
            received: None,
            content: None,
            plan: None,
            admitted: None,
            weights: TokenWeights::default(),
            first_event: None,
            overhead: None,
        }
    }

    fn route(&self) -> &RouteSeries {
        self.ledger.metrics.of_route(self.route)
    }

    /// When the request's head arrived.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Nobody answered it: it costs nothing.
    pub fn refund(&mut self) {
        if let Some(admitted) = self.admitted.take() {
            self.plan = Some(admitted.refund(&self.ledger.metrics));
        }
    }

    /// What its prompt was taken to be, tokens; `None` where no tokens of text are counted.
    pub fn expected_prompt(&self) -> Option<u64> {
        self.content.filter(|content| content.endpoint.reads_text())?;
        Some(self.admitted.as_ref()?.demand().estimate.input)
    }

    /// What text that its model wrote is taken to be, tokens.
    pub fn tokens_of_text(&self, bytes: u64) -> u64 {
        self.ledger.estimates.tokens_of_text(self.model.as_deref().unwrap_or(OTHER), bytes)
    }

    /// A limit refused it.
    pub fn limited(&mut self, denial: &Denial) {
        self.rule = Some(Name::from(denial.binding().limit.id()));
        self.source = Some(denial.source());
        self.ledger.refusals.note(&self.ledger.log, self.request_id.as_str(), denial);
    }

    /// The metrics of this process.
    pub fn metrics(&self) -> &Metrics {
        &self.ledger.metrics
    }

    /// An answer starts now: its status, and what we added to the wait for it.
    pub fn answer_starts(&mut self, status: StatusCode) {
        self.status = Some(status);
        let ours = self.received.unwrap_or(self.started).elapsed().saturating_sub(self.attempts.waited);
        self.route().overhead.observe(ours.as_secs_f64());
        self.overhead = Some(ours);
    }

    fn outcome_at_end(&self) -> Outcome {
        match self.outcome {
            _ if std::thread::panicking() => Outcome::Panicked,
            Some(outcome) => outcome,
            None if self.ledger.ending.is_cancelled() => Outcome::Shutdown,
            None => Outcome::ClientLeft,
        }
    }

    /// Settles what it holds: by what was used, or by what it was expected to read where a provider was asked and cut off.
    /// What reached no provider costs nothing.
    fn settle(&mut self, outcome: Outcome) {
        let Some(admitted) = self.admitted.take() else { return };
        if !self.attempts.reached.load(Ordering::Relaxed) {
            self.plan = Some(admitted.refund(&self.ledger.metrics));
            return;
        }
        let cut = !matches!(outcome, Outcome::Done | Outcome::Refused);
        if cut && self.tokens.is_none() && self.status.is_none_or(|status| status.is_success()) {
            let prompt = admitted.demand().estimate.input;
            let usage = dialect::Usage { prompt, total: prompt, ..dialect::Usage::default() };
            self.tokens = (prompt > 0).then_some(Tokens { usage, estimated: true });
        }
        self.learn(&admitted);
        let usage = self.tokens.map(|tokens| tokens.usage).unwrap_or_default();
        self.cost = self.attempts.price.map_or(Cost::ZERO, |price| admission::cost(&price, &usage));
        let used = Used { usage, weights: self.weights, cost: self.cost };
        self.plan = Some(admitted.settle(&used, &self.ledger.metrics));
    }

    /// The next estimate is the better for it, where the provider itself said what was used.
    fn learn(&self, admitted: &Admitted) {
        let (Some(Tokens { usage, estimated: false }), Some(content), Some(model)) =
            (self.tokens, &self.content, &self.model)
        else {
            return;
        };
        let key = self.key.as_ref().map(|key| key.id.as_str());
        self.ledger.estimates.learn(key, model, content, &usage);
        if let Some(ratio) = admitted.demand().estimate.error_ratio(&usage) {
            admitted.plan().estimate_errors.observe(ratio);
        }
    }

    /// Tells what was used, of requests that ask a model for something.
    fn report(&mut self, outcome: Outcome, now: SystemTime) {
        if !Endpoint::ALL.iter().any(|endpoint| endpoint.route() == self.route().endpoint) {
            return;
        }
        let refused = outcome == Outcome::Refused && self.attempts.count == 0;
        let (key, model) = (self.key.take(), self.model.take());
        let mut ended = usage::Ended { key, model, refused, tokens: self.tokens, cost: self.cost };
        self.ledger.usage.note(now, &mut ended);
        (self.key, self.model) = (ended.key, ended.model);
    }

    fn count(&self, outcome: Outcome, status: u16, latency: Duration) {
        let metrics = &self.ledger.metrics;
        let endpoint = self.route().endpoint;
        match status {
            200 => self.route().ok.inc(),
            code => metrics.http_requests.get_or_create(&ByEndpointCode { endpoint, code }).inc(),
        };
        match (&self.plan, &self.model) {
            (Some(plan), _) => plan.duration.observe(latency.as_secs_f64()),
            (None, model) => {
                let model = model.clone().unwrap_or_else(|| Name::from(OTHER));
                metrics.durations(endpoint, &model).observe(latency.as_secs_f64());
            }
        }
        if let (true, Some(by)) = (self.streamed, outcome.aborted_by()) {
            metrics.streams_aborted.get_or_create(&ByWhom { by }).inc();
        }
        let (Some(asked), Some(tokens)) = (&self.attempts.asked, self.tokens) else {
            return;
        };
        asked.count_tokens(&tokens.usage);
        if self.cost > Cost::ZERO {
            asked.cost.inc_by(self.cost.micros() as f64 / 1e6);
        }
        let Some(first) = self.first_event.filter(|_| tokens.usage.completion > 1) else {
            return;
        };
        let pace = first.elapsed().as_secs_f64() / (tokens.usage.completion - 1) as f64;
        asked.pace.observe(pace);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let (now, latency) = (SystemTime::now(), self.started.elapsed());
        let outcome = self.outcome_at_end();
        // 499 is what nginx logs for a client that left before there was a status.
        let left_early = if outcome == Outcome::Panicked { 500 } else { 499 };
        let status = self.status.map_or(left_early, |status| status.as_u16());
        self.settle(outcome);
        self.count(outcome, status, latency);
        self.report(outcome, now);
        self.ledger.log.line_at(now, if status >= 500 { "WARN" } else { "INFO" }, "request", |line| {
            self.write(line, status, outcome, latency);
        });
        let ended = self.ended(now, status, outcome, latency);
        self.ledger.journal.end(ended);
        // Last: who sees that nothing is under way finds all of it counted and written down.
        self.route().in_flight.dec();
    }
}

impl Entry {
    /// What is remembered of it: no prompt, no answer, no secret. It is over, so what it holds is taken.
    fn ended(&mut self, time: SystemTime, status: u16, outcome: Outcome, latency: Duration) -> Ended {
        let asked = self.attempts.asked.take();
        Ended {
            time,
            at: self.started + latency,
            request_id: self.request_id,
            method: self.method,
            endpoint: self.route().endpoint,
            status,
            outcome: outcome.as_str(),
            code: self.code,
            rule: self.rule.take(),
            source: self.source,
            key: self.key.take(),
            address: self.address,
            model: self.model.take(),
            upstream: asked.is_some().then_some(self.attempts.waited),
            provider: asked,
            streamed: self.streamed,
            usage: self.tokens.map(|tokens| tokens.usage),
            estimated: self.tokens.is_some_and(|tokens| tokens.estimated),
            cost: self.cost,
            latency,
            first_token: self.first_byte.filter(|_| self.first_event.is_some()),
            overhead: self.overhead,
        }
    }

    /// A request's line in the log. No prompt, no answer, no secret: only what is listed here.
    fn write(&self, line: &mut Line<'_>, status: u16, outcome: Outcome, latency: Duration) {
        line.text(field!("request_id"), self.request_id.as_str());
        line.word(field!("trace_id"), self.trace_id.as_str());
        line.word(field!("method"), self.method);
        line.word(field!("endpoint"), self.route().endpoint);
        line.number(field!("status"), u64::from(status));
        line.word(field!("outcome"), outcome.as_str());
        let key = self.key.as_deref();
        for (name, value) in [
            (field!("code"), self.code),
            (field!("rule"), self.rule.as_deref()),
            (field!("user"), key.and_then(|key| Some(key.user.as_ref()?.name.as_str()))),
            (field!("api_key"), key.map(|key| key.id.as_str())),
            (field!("model"), self.model.as_deref()),
        ] {
            if let Some(value) = value {
                line.text(name, value);
            }
        }
        line.address(field!("ip"), self.address);
        if let Some(asked) = &self.attempts.asked {
            line.text(field!("provider"), &asked.label.provider);
            if self.model.as_ref() != Some(&asked.label.model) {
                line.text(field!("fallback_model"), &asked.label.model);
            }
        }
        line.number(field!("attempts"), u64::from(self.attempts.count));
        line.flag(field!("stream"), self.streamed);
        if let Some(Tokens { usage, estimated }) = self.tokens {
            line.number(field!("prompt_tokens"), usage.prompt);
            line.number(field!("completion_tokens"), usage.completion);
            for (name, amount) in
                [(field!("cached_tokens"), usage.cached), (field!("reasoning_tokens"), usage.reasoning)]
            {
                if amount > 0 {
                    line.number(name, amount);
                }
            }
            if estimated {
                line.flag(field!("estimated"), true);
            }
        }
        if self.cost > Cost::ZERO {
            line.number(field!("cost_micros"), self.cost.micros());
        }
        line.millis(field!("latency_ms"), latency);
        if let Some(first_byte) = self.first_byte {
            line.millis(field!("first_byte_ms"), first_byte);
        }
    }
}

/// A method of the standard, or `other`: what callers make up is not written down.
fn known(method: &Method) -> &'static str {
    const STANDARD: [&str; 9] =
        ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PATCH", "TRACE"];
    STANDARD.into_iter().find(|name| *name == method.as_str()).unwrap_or("other")
}
