//! The body of an answer on its way to the caller: bytes pass untouched, a parser beside them counts.
//!
//! The request's [`Entry`] travels in the body and ends with it. Nothing is read from the provider before the caller's
//! connection has room for it, so a slow reader holds back the provider, not our memory.

mod meter;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use self::meter::Meter;
pub use self::meter::{Basis, tokens_of_answer};
use crate::call::Call;
use crate::dialect::openai;
use crate::headers::Lines;
use crate::ledger::{Entry, Outcome};
use crate::upstream::{Deployment, Source};

/// Events that came together are sent together, up to this size.
const GATHERED_BYTES_MAX: usize = 16 << 10;

/// After a stream has said that it is complete, its provider has this long to end it: then the connection can be used again.
const DRAIN: Duration = Duration::from_millis(250);

/// An answer to a caller.
#[derive(Debug)]
pub struct Reply<B = Body> {
    /// Its status.
    pub status: StatusCode,
    /// Its header fields, without those about its length and its connection.
    pub fields: Lines,
    /// Its body.
    pub body: B,
}

impl<B> Reply<B> {
    /// The same with another body.
    pub fn map<T>(self, change: impl FnOnce(B) -> T) -> Reply<T> {
        Reply { status: self.status, fields: self.fields, body: change(self.body) }
    }
}

impl<B: http_body::Body> From<Response<B>> for Reply<B> {
    fn from(response: Response<B>) -> Self {
        let (head, body) = response.into_parts();
        let of_connection =
            [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::DATE];
        let mut fields = Lines::new();
        for (name, value) in head.headers.iter().filter(|(name, _)| !of_connection.contains(name)) {
            fields.add(name.as_str(), value.as_bytes());
        }
        // To a HEAD, without the body that it is about.
        let length = head.headers.get(header::CONTENT_LENGTH).filter(|length| *length != "0");
        if let (Some(length), Some(0)) = (length, body.size_hint().exact()) {
            fields.add("content-length", length.as_bytes());
        }
        Self { status: head.status, fields, body }
    }
}

impl<B> From<Reply<B>> for Response<B> {
    fn from(reply: Reply<B>) -> Self {
        let mut response = Response::new(reply.body);
        *response.status_mut() = reply.status;
        for (name, value) in reply.fields.iter() {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

/// A response body.
pub enum Body {
    /// All there is, and the request it ends.
    Whole(Option<Bytes>, Option<Box<Entry>>),
    /// From a provider, as it comes.
    Relay(Pin<Box<Relay>>),
    /// Of ours, as it comes; it ends no request.
    Open(Pin<Box<dyn http_body::Body<Data = Bytes, Error = io::Error> + Send>>),
}

impl Body {
    /// A body that ends no request.
    pub fn plain(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(Some(bytes.into()), None)
    }

    /// A body that ends its request when it is sent.
    pub fn whole(bytes: Bytes, mut entry: Box<Entry>) -> Self {
        if bytes.is_empty() {
            // A server may ask a body of no length for nothing.
            entry.outcome.get_or_insert(Outcome::Done);
        }
        Self::Whole(Some(bytes), Some(entry))
    }

    /// When it must have ended; a body that is never asked for more cannot notice by itself.
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Whole(..) | Self::Open(_) => None,
            Self::Relay(relay) => Some(relay.deadline),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes, entry) => {
                let bytes = bytes.take().filter(|bytes| !bytes.is_empty());
                if let Some(mut entry) = entry.take() {
                    entry.outcome.get_or_insert(Outcome::Done);
                }
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Self::Relay(relay) => {
                relay.as_mut().get_mut().poll_chunk(cx).map(|chunk| chunk.map(|c| c.map(Frame::data)))
            }
            Self::Open(body) => body.as_mut().poll_frame(cx),
        }
    }

    /// Never true while an entry is held: the server then polls to the end and the request ends as done.
    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None, None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Relay(_) | Self::Open(_) => SizeHint::default(),
        }
    }
}

/// An answer being relayed.
pub struct Relay {
    source: Source,
    deployment: Arc<Deployment>,
    /// Chunks read before the answer was started.
    head: VecDeque<Bytes>,
    /// What may be sent now.
    ready: VecDeque<Bytes>,
    meter: Meter,
    timer: Pin<Box<Sleep>>,
    last_read: Instant,
    /// The provider has sent nothing for its idle limit, unless it stands in the socket.
    overdue: bool,
    /// The stream is complete; only its connection is waited for.
    draining: bool,
    deadline: Instant,
    told_to_end: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: Option<Result<(), io::ErrorKind>>,
    entry: Box<Entry>,
}

/// What is needed to relay an answer.
pub struct Terms<'a> {
    /// The caller's request.
    pub call: &'a Call,
    /// Who answers.
    pub deployment: Arc<Deployment>,
    /// What is taken to be used where the provider does not say.
    pub basis: Basis,
    /// The answer is server-sent events.
    pub events: bool,
    /// When the whole attempt must be over.
    pub deadline: Instant,
    /// Cancelled when streams must end because the process does.
    pub ending: &'a CancellationToken,
}

impl Relay {
    /// Relays `head`, then the rest from `source`.
    pub fn new(terms: Terms<'_>, head: VecDeque<Bytes>, source: Source, entry: Box<Entry>) -> Self {
        let now = Instant::now();
        let first_due = terms.deadline.min(now + terms.deployment.provider.deadlines.idle);
        Self {
            source,
            head,
            ready: VecDeque::new(),
            meter: Meter::new(terms.call, terms.basis, terms.events),
            deployment: terms.deployment,
            timer: Box::pin(sleep_until(first_due.into())),
            last_read: now,
            overdue: false,
            draining: false,
            deadline: terms.deadline,
            told_to_end: Box::pin(terms.ending.clone().cancelled_owned()),
            ended: None,
            entry,
        }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, io::Error>>> {
        // First, because a provider that always has more would never let it come to that.
        if let (None, Some(outcome)) = (self.ended, self.interrupted(cx)) {
            self.end(outcome);
        }
        loop {
            // What comes at once goes out at once: gathered while the provider has more to give this instant.
            let gathered: usize = self.ready.iter().map(Bytes::len).sum();
            if gathered >= GATHERED_BYTES_MAX || (self.ended.is_some() && gathered > 0) {
                return Poll::Ready(Some(Ok(self.gather(gathered))));
            }
            match self.ended {
                Some(Ok(())) => return Poll::Ready(None),
                Some(Err(kind)) => {
                    self.ended = Some(Ok(()));
                    return Poll::Ready(Some(Err(kind.into())));
                }
                None => {}
            }
            if let Some(chunk) = self.head.pop_front() {
                self.meter.take(chunk, &mut self.ready);
                continue;
            }
            match self.source.poll_chunk(cx) {
                Poll::Ready(Some(Ok(chunk))) => {
                    (self.last_read, self.overdue) = (Instant::now(), false);
                    self.meter.take(chunk, &mut self.ready);
                }
                Poll::Ready(Some(Err(_))) if self.meter.finished() => self.end(Outcome::Done),
                Poll::Ready(Some(Err(_))) => self.end(Outcome::UpstreamDied),
                Poll::Ready(None) if self.meter.finish(&mut self.ready) => self.end(Outcome::Done),
                Poll::Ready(None) => self.end(Outcome::UpstreamDied),
                Poll::Pending if gathered > 0 => return Poll::Ready(Some(Ok(self.gather(gathered)))),
                Poll::Pending if self.meter.finished() && !self.draining => {
                    self.draining = true;
                    self.timer.as_mut().reset((Instant::now() + DRAIN).into());
                    if self.timer.as_mut().poll(cx).is_ready() {
                        self.end(Outcome::Done);
                    }
                }
                // Judged only here: while the caller did not read, what the provider sent stayed in the socket.
                Poll::Pending if self.overdue && !self.draining => self.end(Outcome::TimedOut),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn gather(&mut self, bytes: usize) -> Bytes {
        if let (1, Some(only)) = (self.ready.len(), self.ready.front_mut()) {
            let only = std::mem::take(only);
            self.ready.clear();
            return only;
        }
        let mut all = Vec::with_capacity(bytes);
        self.ready.drain(..).for_each(|chunk| all.extend_from_slice(&chunk));
        all.into()
    }

    /// The timer is armed for the earliest time at which it could matter and looked at when it rings, not moved with each
    /// read.
    fn interrupted(&mut self, cx: &mut Context<'_>) -> Option<Outcome> {
        if self.told_to_end.as_mut().poll(cx).is_ready() {
            return Some(Outcome::Shutdown);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.draining {
                return Some(Outcome::Done);
            }
            let (now, idle) = (Instant::now(), self.deployment.provider.deadlines.idle);
            if self.deadline <= now {
                return Some(Outcome::TimedOut);
            }
            self.overdue = self.last_read + idle <= now;
            let due = if self.overdue { now + idle } else { self.last_read + idle };
            self.timer.as_mut().reset(self.deadline.min(due).into());
        }
        None
    }

    /// Ends the answer: rightly, with an error event where one can be sent, else by breaking the connection off, so that
    /// half an answer is never taken for a whole one.
    fn end(&mut self, outcome: Outcome) {
        self.entry.outcome = Some(outcome);
        self.ended = Some(Ok(()));
        let (message, code) = match outcome {
            Outcome::Done => {
                self.deployment.ended();
                return;
            }
            Outcome::Shutdown => ("This instance is shutting down. The answer is cut here.", "shutting_down"),
            Outcome::TimedOut => {
                ("The provider stopped sending. The answer is cut here.", "upstream_timeout")
            }
            _ => ("The provider broke off in the middle of its answer.", "upstream_failed"),
        };
        if outcome != Outcome::Shutdown {
            self.deployment.broke_off();
        }
        self.entry.code = Some(code);
        if !self.meter.is_events() {
            self.ended = Some(Err(io::ErrorKind::ConnectionAborted));
            return;
        }
        self.meter.finish_held(&mut self.ready);
        if self.meter.is_open() {
            // Of an event too long to be held its beginning was sent: it must end before another can begin.
            self.ready.push_back(Bytes::from_static(b"\n\n"));
        }
        let kind = if outcome == Outcome::Shutdown { "service_unavailable" } else { "upstream_error" };
        self.ready.push_back(openai::error_event(message, kind, Some(code)));
    }

    /// What a body that was dropped before its end says of it.
    fn outcome_of_drop(&self) -> Option<Outcome> {
        if self.meter.finished() && self.ready.is_empty() {
            return Some(Outcome::Done);
        }
        (self.deadline <= Instant::now()).then_some(Outcome::TimedOut)
    }
}

impl Drop for Relay {
    /// However the answer ends, what was produced is counted. An error produced nothing.
    fn drop(&mut self) {
        if self.entry.status.is_some_and(|status| status.is_success()) {
            self.entry.tokens = self.meter.tokens(|bytes| self.entry.tokens_of_text(bytes));
        }
        self.entry.outcome = self.entry.outcome.or_else(|| self.outcome_of_drop());
    }
}
