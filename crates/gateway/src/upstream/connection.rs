//! One connection to a provider: a request goes out, its answer comes in, HTTP/1.1.
//!
//! There is no task behind it and no channel. Whoever waits for the answer moves the bytes: the request leaves in one
//! write, what one read brings is handed on as it is, and dropping the connection closes it.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tokio::task::unconstrained;
use tokio::time::{Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

use super::Failure;
use super::connect::Stream;
use super::head::{Begun, Head, HeadReader};
use crate::http1::{Body, Malformed};

/// A connection is used no longer than this, so that a name that moved is looked up again.
const AGE_MAX: Duration = Duration::from_secs(300);

/// Idle connections are closed before the usual 60 s of servers and balancers run out.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// What is read at once.
const READ_BYTES: usize = 16 << 10;

/// Room that a read must have: with less, new room is made.
const READ_BYTES_MIN: usize = 4 << 10;

/// Bodies up to this size are copied behind the head and sent with it.
pub(super) const COPIED_BYTES_MAX: usize = 4 << 10;

/// A request as it is sent.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    head: BytesMut,
    body: Bytes,
}

impl Outgoing {
    /// `head`: the request line and header fields, without those about the length of the body.
    pub(super) fn new(mut head: BytesMut, body: Bytes) -> Self {
        if !body.is_empty() {
            head.extend_from_slice(b"content-length: ");
            head.extend_from_slice(itoa::Buffer::new().format(body.len()).as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        if body.len() > COPIED_BYTES_MAX {
            return Self { head, body };
        }
        head.extend_from_slice(&body);
        Self { head, body: Bytes::new() }
    }

    fn is_empty(&self) -> bool {
        self.head.is_empty() && self.body.is_empty()
    }
}

/// Why there is no answer.
pub(super) enum Unanswered {
    /// Not a byte of the request left: here it is.
    Unsent(Outgoing, Failure),
    /// The provider may have seen it.
    Failed(Failure),
}

/// One connection, with at most one request on it.
pub(super) struct Connection {
    stream: Stream,
    /// What of the request is still to be sent.
    unsent: Outgoing,
    /// The stream may hold back what it was given.
    unflushed: bool,
    /// Something of the request was sent.
    begun: bool,
    /// Received and not looked at.
    received: BytesMut,
    head: HeadReader,
    body: Body,
    reusable: bool,
    opened: Instant,
    used: Instant,
    /// Armed for when an answer is due, or before: moved when it fires, not with each request.
    timer: Pin<Box<Sleep>>,
}

impl Connection {
    /// One that was just opened. Must be called inside a tokio runtime with time enabled.
    pub(super) fn new(stream: Stream) -> Self {
        let now = Instant::now();
        Self {
            stream,
            unsent: Outgoing::default(),
            unflushed: false,
            begun: false,
            received: BytesMut::new(),
            head: HeadReader::default(),
            body: Body::Ended,
            reusable: true,
            opened: now,
            used: now,
            timer: Box::pin(sleep_until((now + AGE_MAX).into())),
        }
    }

    /// Begins a request. The one before has ended.
    pub(super) fn begin(&mut self, request: Outgoing) {
        // Nobody looks at the last answer any more: the next comes to the same place, which is in a cache.
        let _ = self.received.try_reclaim(READ_BYTES);
        self.unsent = request;
        self.begun = false;
        self.head = HeadReader::default();
    }

    /// Sends the request and waits for the head of the answer, which may come before all is sent.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, Unanswered>> {
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            if !self.begun {
                return Poll::Ready(Err(Unanswered::Unsent(
                    std::mem::take(&mut self.unsent),
                    broken(&error),
                )));
            }
            // It may have answered all the same, before it closed.
            self.give_up_sending();
        }
        loop {
            let read = self.head.read(&mut self.received);
            if let Some(Begun { head, body, reusable }) =
                read.map_err(|why| Unanswered::Failed(why.into()))?
            {
                (self.body, self.reusable) = (body, self.reusable && reusable);
                return Poll::Ready(Ok(head));
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) => return Poll::Ready(Err(Unanswered::Failed(CLOSED.into()))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Unanswered::Failed(broken(&error)))),
            }
        }
    }

    /// Ready at that time.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>, by: tokio::time::Instant) -> Poll<()> {
        if by < self.timer.deadline() {
            self.timer.as_mut().reset(by);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if tokio::time::Instant::now() >= by {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(by);
        }
    }

    /// The next bytes of the body, as many as have come; `None` behind the last.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        loop {
            match self.body.take(&mut self.received) {
                Ok(data) if !data.is_empty() => return Poll::Ready(Some(Ok(data))),
                Ok(_) if self.body.is_ended() => return Poll::Ready(None),
                Ok(_) => {}
                Err(why) => return Poll::Ready(Some(Err(why.into()))),
            }
            // An answer may begin while the request is still being sent.
            if let Poll::Ready(Err(_)) = self.poll_send(cx) {
                self.give_up_sending();
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) if self.body == Body::UntilClosed => self.body = Body::Ended,
                Ok(0) => return Poll::Ready(Some(Err(CLOSED.into()))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(broken(&error)))),
            }
        }
    }

    /// Whether the body was handed over to its end.
    pub(super) fn is_ended(&self) -> bool {
        self.body.is_ended()
    }

    /// Its answer has ended; whether another request may follow.
    pub(super) fn rest(&mut self) -> bool {
        self.used = Instant::now();
        let sent = self.unsent.is_empty() && !self.unflushed;
        self.reusable && sent && self.is_ended() && self.received.is_empty()
    }

    /// Whether another request can be sent on it now. Nobody is woken for what this finds out.
    pub(super) fn is_usable(&mut self) -> bool {
        let now = Instant::now();
        if now.duration_since(self.used) >= IDLE_MAX || now.duration_since(self.opened) >= AGE_MAX {
            return false;
        }
        // Outside of the task's budget, or a closed connection could not say so behind many others. An idle one has nothing
        // to say but that it is closed.
        let silent = |cx: &mut Context<'_>| Poll::Ready(self.poll_receive(cx).is_pending());
        let look = pin!(unconstrained(poll_fn(silent)));
        matches!(look.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(true))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Outgoing { head, body } = &mut self.unsent;
        while !head.is_empty() || !body.is_empty() {
            let stream = Pin::new(&mut self.stream);
            let sent = if body.is_empty() {
                ready!(stream.poll_write(cx, head))?
            } else {
                ready!(stream.poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(body)]))?
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            (self.begun, self.unflushed) = (true, true);
            let of_head = sent.min(head.len());
            head.advance(of_head);
            body.advance(sent - of_head);
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn give_up_sending(&mut self) {
        (self.unsent, self.unflushed, self.reusable) = (Outgoing::default(), false, false);
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.received.capacity() - self.received.len() < READ_BYTES_MIN {
            self.received.reserve(READ_BYTES);
        }
        poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.received)
    }
}

const CLOSED: Malformed = Malformed("connection closed in the middle of the answer");

impl From<Malformed> for Failure {
    fn from(Malformed(why): Malformed) -> Self {
        Self::Broken(why.to_owned())
    }
}

fn broken(error: &io::Error) -> Failure {
    Failure::Broken(error.to_string())
}
