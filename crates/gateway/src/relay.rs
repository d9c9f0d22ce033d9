//! The body of an answer on its way to the caller: bytes pass untouched, a parser beside them counts.
//!
//! The request's [`Entry`] travels in the body and ends with it. Nothing is read from the provider before the caller's
//! connection has room for it, so a slow reader holds back the provider, not our memory.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::call::{Call, Prompt};
use crate::dialect::openai::{self, Usage};
use crate::ledger::{Entry, Outcome, Tokens};
use crate::sse;
use crate::upstream::Source;

/// Plain answers are kept up to this size to find their `usage`.
const KEPT_BYTES_MAX: usize = 4 << 20;

/// A token is taken to be this much text where nobody counted it: rather too many tokens than too few.
const BYTES_PER_TOKEN: u64 = 3;

/// Tokens that an image, and a recording or another file, are taken to be: never by their size.
const TOKENS_PER_IMAGE: u64 = 1_000;
const TOKENS_PER_FILE: u64 = 1_500;

/// A response body.
pub enum Body {
    /// All there is, and the request it ends.
    Whole(Option<Bytes>, Option<Box<Entry>>),
    /// From a provider, as it comes.
    Relay(Pin<Box<Relay>>),
}

impl Body {
    /// A body that ends no request.
    pub fn plain(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(Some(bytes.into()), None)
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
        }
    }

    /// Never true while an entry is held: hyper then polls to the end and the request ends as done.
    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None, None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Relay(_) => SizeHint::default(),
        }
    }
}

/// An answer being relayed.
pub struct Relay {
    source: Source,
    /// Chunks read before the answer was started.
    head: VecDeque<Bytes>,
    /// What may be sent now.
    ready: VecDeque<Bytes>,
    meter: Meter,
    timer: Pin<Box<Sleep>>,
    last_read: Instant,
    /// The last poll found nothing to read.
    waiting: bool,
    idle: Duration,
    deadline: Instant,
    ending: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: Option<Result<(), io::ErrorKind>>,
    entry: Box<Entry>,
}

/// What is needed to relay an answer.
pub struct Terms<'a> {
    /// The caller's request.
    pub call: &'a Call,
    /// The answer is server-sent events.
    pub events: bool,
    /// The provider sends one token in each delta.
    pub counts_deltas: bool,
    /// Longest time between two reads.
    pub idle: Duration,
    /// When the whole attempt must be over.
    pub deadline: Instant,
    /// Cancelled when streams must end because the process does.
    pub ending: &'a CancellationToken,
}

impl Relay {
    /// Relays `head`, then the rest from `source`.
    pub fn new(terms: &Terms<'_>, head: VecDeque<Bytes>, source: Source, entry: Box<Entry>) -> Self {
        let now = Instant::now();
        Self {
            source,
            head,
            ready: VecDeque::new(),
            meter: Meter::new(terms),
            timer: Box::pin(sleep_until(terms.deadline.min(now + terms.idle).into())),
            last_read: now,
            waiting: false,
            idle: terms.idle,
            deadline: terms.deadline,
            ending: Box::pin(terms.ending.clone().cancelled_owned()),
            ended: None,
            entry,
        }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, io::Error>>> {
        if !std::mem::take(&mut self.waiting) {
            // Since the last chunk was handed over the caller was being waited for, not the provider.
            self.last_read = Instant::now();
        }
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(chunk)));
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
            match self.source.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.last_read = Instant::now();
                    if let Ok(chunk) = frame.into_data() {
                        self.meter.take(chunk, &mut self.ready);
                    }
                }
                Poll::Ready(Some(Err(_))) if self.meter.finished() => self.end(Outcome::Done),
                Poll::Ready(Some(Err(_))) => self.end(Outcome::UpstreamDied),
                Poll::Ready(None) => self.end(Outcome::Done),
                Poll::Pending => match self.interrupted(cx) {
                    Some(outcome) => self.end(outcome),
                    None => {
                        self.waiting = true;
                        return Poll::Pending;
                    }
                },
            }
        }
    }

    /// The timer is armed for the earliest time at which it could matter and looked at when it rings, not moved with each
    /// read.
    fn interrupted(&mut self, cx: &mut Context<'_>) -> Option<Outcome> {
        if self.ending.as_mut().poll(cx).is_ready() {
            return Some(Outcome::Shutdown);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let due = self.deadline.min(self.last_read + self.idle);
            if due <= Instant::now() {
                return Some(Outcome::TimedOut);
            }
            self.timer.as_mut().reset(due.into());
        }
        None
    }

    /// Ends the answer: rightly, with an error event where one can be sent, else by breaking the connection off, so that
    /// half an answer is never taken for a whole one.
    fn end(&mut self, outcome: Outcome) {
        let (message, code) = match outcome {
            Outcome::Done => {
                self.meter.finish(&mut self.ready);
                self.ended = Some(Ok(()));
                self.entry.outcome = Some(outcome);
                return;
            }
            Outcome::Shutdown => ("This instance is shutting down. The answer is cut here.", "shutting_down"),
            Outcome::TimedOut => {
                ("The provider stopped sending. The answer is cut here.", "upstream_timeout")
            }
            _ => ("The provider broke off in the middle of its answer.", "upstream_failed"),
        };
        let kind = if outcome == Outcome::Shutdown { "service_unavailable" } else { "upstream_error" };
        self.entry.outcome = Some(outcome);
        self.entry.code = Some(code);
        self.ended = Some(match self.meter.is_events() {
            true => {
                self.ready.push_back(openai::error_event(message, kind, Some(code)));
                Ok(())
            }
            false => Err(io::ErrorKind::ConnectionAborted),
        });
    }
}

impl Drop for Relay {
    /// However the answer ends, what was produced is counted.
    fn drop(&mut self) {
        self.entry.tokens = self.meter.tokens();
    }
}

/// Counts what passes.
enum Meter {
    Events { splitter: sse::Splitter, counted: Counted },
    Plain { kept: Vec<u8>, too_long: bool },
}

struct Counted {
    hide_usage: bool,
    done: bool,
    usage: Option<Usage>,
    estimate: Estimate,
}

/// What a prompt is taken to be.
fn prompt_tokens(prompt: &Prompt) -> u64 {
    let files = TOKENS_PER_FILE * (prompt.audio + prompt.files);
    prompt.text_bytes.div_ceil(BYTES_PER_TOKEN) + prompt.token_ids + TOKENS_PER_IMAGE * prompt.images + files
}

/// What is counted here when the provider does not say.
#[derive(Clone, Copy)]
pub struct Estimate {
    prompt: u64,
    counts_deltas: bool,
    deltas: u64,
    content_bytes: u64,
}

impl Estimate {
    /// For an answer to `call` of which nothing has come yet.
    pub fn new(call: &Call, counts_deltas: bool) -> Self {
        Self { prompt: prompt_tokens(&call.prompt()), counts_deltas, deltas: 0, content_bytes: 0 }
    }

    /// A piece of the answer with this much text.
    pub fn add(&mut self, content_bytes: u64) {
        self.deltas += u64::from(content_bytes > 0);
        self.content_bytes += content_bytes;
    }

    /// The tokens so far.
    pub fn tokens(&self) -> Tokens {
        let completion =
            if self.counts_deltas { self.deltas } else { self.content_bytes.div_ceil(BYTES_PER_TOKEN) };
        let usage =
            Usage { prompt: self.prompt, completion, total: self.prompt + completion, ..Usage::default() };
        Tokens { usage, estimated: true }
    }
}

impl Meter {
    fn new(terms: &Terms<'_>) -> Self {
        if !terms.events {
            return Self::Plain { kept: Vec::new(), too_long: false };
        }
        let hide_usage = terms.call.endpoint().streams() && !terms.call.usage_asked();
        let estimate = Estimate::new(terms.call, terms.counts_deltas);
        let counted = Counted { hide_usage, done: false, usage: None, estimate };
        Self::Events { splitter: sse::Splitter::new(), counted }
    }

    fn is_events(&self) -> bool {
        matches!(self, Self::Events { .. })
    }

    /// Whether the stream said itself that it is complete.
    fn finished(&self) -> bool {
        matches!(self, Self::Events { counted, .. } if counted.done)
    }

    /// Looks at a chunk and puts what of it may be sent into `ready`.
    fn take(&mut self, chunk: Bytes, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain { kept, too_long } => {
                *too_long |= kept.len() + chunk.len() > KEPT_BYTES_MAX;
                if !*too_long {
                    kept.extend_from_slice(&chunk);
                }
                ready.push_back(chunk);
            }
            Self::Events { splitter, counted } => {
                let passing = splitter.push(chunk).filter(|event| counted.passes(event));
                ready.extend(passing.map(|event| event.raw));
            }
        }
    }

    /// The rest, when the answer ended rightly.
    fn finish(&mut self, ready: &mut VecDeque<Bytes>) {
        if let Self::Events { splitter, counted } = self {
            ready.extend(splitter.finish().filter(|event| counted.passes(event)).map(|event| event.raw));
        }
    }

    fn tokens(&self) -> Option<Tokens> {
        match self {
            Self::Events { counted, .. } => Some(match counted.usage {
                Some(usage) => Tokens { usage, estimated: false },
                None => counted.estimate.tokens(),
            }),
            // Of audio and images without `usage` there is nothing to count.
            Self::Plain { kept, too_long: false } => {
                openai::usage_of_answer(kept).map(|usage| Tokens { usage, estimated: false })
            }
            Self::Plain { too_long: true, .. } => None,
        }
    }
}

impl Counted {
    /// Counts an event and says whether the caller gets it: all but the `usage` that only we asked for.
    fn passes(&mut self, event: &sse::Event) -> bool {
        let Some(data) = event.data() else { return true };
        let delta = openai::read_event(&data);
        self.done |= delta.done;
        self.usage = delta.usage.or(self.usage);
        self.estimate.add(delta.content_bytes);
        !(self.hide_usage && delta.usage_only)
    }
}
