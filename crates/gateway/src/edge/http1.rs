//! HTTP/1.1 with one caller: requests in, answers out, one after the other (RFC 9112).
//!
//! Where each request ends the guard's scanner has decided before a byte of it is seen here, and what it lets pass can be
//! read in one way only. What is left is to take the bytes apart, to hand the request on, and to write what comes back.
//!
//! A request is served by the task of its connection: while it is, the caller's end is watched, and a caller that leaves
//! drops everything done for it.

mod sending;
#[cfg(test)]
mod tests;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::Method;
use http_body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use self::sending::{Date, Sending};
use super::framing::{Scanned, Violation};
use super::guard::Guard;
use super::poll_told;
use crate::error::BodyError;
use crate::fields::Fields;
use crate::http1::Body;
use crate::relay::Reply;
use crate::request::{Head, Request, Target};

/// What is read at once where heads may be, which are noted as they come.
const READ_BYTES: usize = 8 << 10;

/// What is read at once of what is certainly a body.
const READ_BODY_BYTES: usize = 64 << 10;

/// With so many other requests waiting behind the one that is served, no more are read, and a caller that leaves is not
/// noticed until it is their turn.
const HEADS_WAITING_MAX: usize = 100;

/// What of a body that nobody wants is taken for the sake of the connection.
const DISCARDED_BYTES_MAX: usize = 64 << 10;

/// What one read brought, before it is known what the caller speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    /// HTTP/1.x, or nothing that is one.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// Reads until it is known what the caller speaks; `None`: it left before, or `closing` was cancelled.
pub(super) async fn greeting<S>(
    guard: &mut Guard<S>,
    received: &mut BytesMut,
    closing: &CancellationToken,
) -> Option<Speaks>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut closed = pin!(closing.cancelled());
    loop {
        received.reserve(READ_BYTES);
        let read = poll_fn(|cx| match poll_read_buf(Pin::new(&mut *guard), cx, received) {
            Poll::Pending => closed.as_mut().poll(cx).map(|()| None),
            Poll::Ready(read) => Poll::Ready(read.ok().filter(|bytes| *bytes > 0)),
        });
        read.await?;
        if received.starts_with(PREFACE) {
            return Some(Speaks::Http2);
        }
        if !PREFACE.starts_with(received) {
            return Some(Speaks::Http1);
        }
    }
}

/// Serves a connection of which `received` was read already, until it ends, or until the answer under way has when
/// `closing` is cancelled. When `ending` is, the answer is polled.
///
/// # Errors
/// When the connection breaks. Whatever was being done for it is dropped then.
pub(super) async fn serve<S, A, F, B>(
    guard: Guard<S>,
    received: BytesMut,
    closing: &CancellationToken,
    ending: &CancellationToken,
    answer: A,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Fn(Request<RequestBody<S>>) -> F,
    F: Future<Output = Reply<B>>,
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let shared = Arc::new(Mutex::new(Connection::new(guard, received)));
    let (mut closed, mut ended) = (pin!(closing.cancelled()), pin!(ending.cancelled()));
    let (mut date, mut space) = (Date::default(), BytesMut::new());
    loop {
        let next = poll_fn(|cx| match lock(&shared).poll_head(cx) {
            // Whoever has not sent a whole head is not waited for.
            Poll::Pending => closed.as_mut().poll(cx).map(|()| Ok(None)),
            ready => ready,
        });
        let Some(head) = next.await? else { break };
        let Some((head, whole, terms)) = lock(&shared).take_request(head) else {
            return poll_fn(|cx| lock(&shared).guard.poll_refuse_last(cx, Violation::RequestLine)).await;
        };
        let body = RequestBody { whole, rest: shared.clone() };
        let mut answering = pin!(answer(Request { head, body }));
        let answered = poll_fn(|cx| match poll_told(cx, ended.as_mut(), answering.as_mut()) {
            Poll::Ready(reply) => Poll::Ready(Ok(reply)),
            Poll::Pending => lock(&shared).poll_left(cx).map(Err),
        });
        let reply = answered.await?;
        let wanted = terms.persists && !closing.is_cancelled();
        let persists = poll_fn(|cx| Poll::Ready(wanted && lock(&shared).discard(cx))).await;
        let mut sending = Sending::new(reply, &terms, persists, &mut date, std::mem::take(&mut space));
        poll_fn(|cx| lock(&shared).poll_answer(cx, &mut sending)).await?;
        if !sending.persists() {
            break;
        }
        space = sending.into_space();
    }
    poll_fn(|cx| Pin::new(&mut lock(&shared).guard).poll_shutdown(cx)).await
}

/// The head of a request, what has come of its body if that is all of it, and how it wants to be answered.
type Asked = (Box<Head>, Option<Bytes>, Terms);

/// What a request says about its answer.
struct Terms {
    /// HTTP/1.1: it knows chunks.
    http_1_1: bool,
    /// It is asked for the head of an answer only.
    head_only: bool,
    /// Another request may follow.
    persists: bool,
}

/// One caller's connection. Shared between its task and the body of the request that is being served, which the task
/// polls too: nobody ever waits for the lock.
struct Connection<S> {
    guard: Guard<S>,
    /// Received and not looked at.
    received: BytesMut,
    /// What of the last request's body is still to come.
    body: Body,
    /// It waits to be told that its body is wanted (RFC 9110, 10.1.1): what of that is still to be said.
    invitation: &'static [u8],
}

/// The whole of it, as the caller is told.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

fn lock<S>(shared: &Mutex<Connection<S>>) -> MutexGuard<'_, Connection<S>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn new(guard: Guard<S>, received: BytesMut) -> Self {
        Self { guard, received, body: Body::Ended, invitation: &[] }
    }

    /// The head of the next request; `None`: there will be none.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Scanned>>> {
        loop {
            if let Some(head) = self.guard.take_head() {
                return Poll::Ready(Ok(Some(head)));
            }
            if self.received.is_empty() {
                // Nobody looks at the last request any more: the next comes to the same place, which is in a cache.
                let _ = self.received.try_reclaim(READ_BYTES);
            }
            if ready!(self.poll_read(cx, READ_BYTES))? == 0 {
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Takes the request of this head, which stands at the beginning. `None`: the scanner let it pass, but it is no
    /// request.
    fn take_request(&mut self, head: Scanned) -> Option<Asked> {
        let Scanned { before, bytes, method, target, http_1_1, fields, length, chunked } = head;
        // What is said of a head is true of these bytes, or of none.
        let here = self.received.get(before..before + bytes)?;
        if !here.ends_with(b"\r\n\r\n") || target.end > bytes {
            return None;
        }
        self.received.advance(before);
        let length = if chunked { None } else { Some(length.unwrap_or(0)) };
        let whole = length.and_then(|length| bytes.checked_add(usize::try_from(length).ok()?));
        let text = match whole.filter(|whole| *whole <= self.received.len()) {
            Some(whole) => self.received.split_to(whole).freeze(),
            None => self.received.split_to(bytes).freeze(),
        };
        let method = Method::from_bytes(text.get(..method)?).ok()?;
        let target = Target::parse(text.slice(target))?;
        let fields = Fields::new(text.clone(), fields);
        let body = if whole == Some(text.len()) {
            self.body = Body::Ended;
            Some(text.slice(bytes..))
        } else {
            self.body = length.map_or_else(Body::chunked, Body::of_length);
            None
        };
        let says = |name, option: &[u8]| {
            let options = fields.get_all(name).flat_map(|value: &[u8]| value.split(|byte| *byte == b','));
            options.map(<[u8]>::trim_ascii).any(|said| said.eq_ignore_ascii_case(option))
        };
        // HTTP/1.0 knows no such thing; whoever has sent all of it waits for nothing.
        let invited = http_1_1 && !self.body.is_ended() && says("expect", b"100-continue");
        self.invitation = if invited { CONTINUE } else { &[] };
        let persists = !says("connection", b"close") && (http_1_1 || says("connection", b"keep-alive"));
        let terms = Terms { http_1_1, head_only: method == Method::HEAD, persists };
        Some((Box::new(Head { method, target, fields }), body, terms))
    }

    /// More of the body of the request being served.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        loop {
            match self.body.take(&mut self.received) {
                Ok(data) if !data.is_empty() => return Poll::Ready(Some(Ok(data))),
                Ok(_) if self.body.is_ended() => return Poll::Ready(None),
                Ok(_) => {}
                // The scanner says so first, and better.
                Err(_) => return Poll::Ready(Some(Err(BodyError::Malformed(Violation::Chunk.to_string())))),
            }
            if let Err(error) = ready!(self.poll_invite(cx)) {
                return Poll::Ready(Some(Err(broken(&error))));
            }
            // Behind the end of a body heads may be.
            let bytes = self.body.certain().map_or(READ_BYTES, |left| left.min(READ_BODY_BYTES));
            match ready!(self.poll_read(cx, bytes)) {
                Ok(0) => return Poll::Ready(Some(Err(BodyError::Left))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(broken(&error)))),
            }
        }
    }

    fn poll_invite(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.invitation.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.invitation.is_empty() {
            let written = ready!(Pin::new(&mut self.guard).poll_write(cx, self.invitation))?;
            self.invitation = &self.invitation[written..];
        }
        Pin::new(&mut self.guard).poll_flush(cx)
    }

    /// Ready when the caller is gone, which nobody else would notice while its request is served.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        // Behind a body that is still to come, or more than a little of other requests, only who reads those gets to know.
        let little =
            |all: &Self| all.received.len() < READ_BYTES && all.guard.heads_waiting() < HEADS_WAITING_MAX;
        while self.body.is_ended() && little(self) {
            match ready!(self.poll_read(cx, READ_BYTES)) {
                Ok(0) => return Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                // Of a later request, whose body will say so. Nothing more can be read.
                Err(error) if Violation::at_root_of(&error).is_some() => break,
                Err(error) => return Poll::Ready(error),
            }
        }
        Poll::Pending
    }

    /// Takes what is here of a body that nobody took; whether that is all of it, so that another request can follow.
    fn discard(&mut self, cx: &mut Context<'_>) -> bool {
        let mut taken = 0;
        // Whoever waits to be invited may send its body or leave it: what comes next is not known.
        while !self.body.is_ended() && self.invitation.len() < CONTINUE.len() && taken <= DISCARDED_BYTES_MAX
        {
            match self.body.take(&mut self.received) {
                Ok(data) if !data.is_empty() => taken += data.len(),
                Ok(_) if self.body.is_ended() => {}
                Ok(_) => match self.poll_read(cx, READ_BYTES) {
                    Poll::Ready(Ok(bytes)) if bytes > 0 => {}
                    _ => return false,
                },
                Err(_) => return false,
            }
        }
        self.body.is_ended()
    }

    /// Writes an answer to its end.
    fn poll_answer<B>(&mut self, cx: &mut Context<'_>, answer: &mut Sending<B>) -> Poll<io::Result<()>>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        // Half an invitation cannot be taken back.
        if self.invitation.len() < CONTINUE.len() {
            ready!(self.poll_invite(cx))?;
        }
        self.invitation = &[];
        match answer.poll(cx, &mut self.guard) {
            Poll::Pending if answer.waits() => self.poll_left(cx).map(Err),
            polled => polled,
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<io::Result<usize>> {
        if self.received.capacity() - self.received.len() < bytes.div_ceil(4) {
            self.received.reserve(bytes);
        }
        poll_read_buf(Pin::new(&mut self.guard), cx, &mut (&mut self.received).limit(bytes))
    }
}

/// Why a request's body broke off.
fn broken(error: &io::Error) -> BodyError {
    let violation = Violation::at_root_of(error);
    violation.map_or(BodyError::Left, |violation| BodyError::Malformed(violation.to_string()))
}

/// The body of a request.
pub(super) struct RequestBody<S> {
    /// All of it, where it came with the head.
    whole: Option<Bytes>,
    /// Where the rest comes from.
    rest: Arc<Mutex<Connection<S>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> http_body::Body for RequestBody<S> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.whole.take() {
            Some(whole) if !whole.is_empty() => Poll::Ready(Some(Ok(Frame::data(whole)))),
            Some(_) => Poll::Ready(None),
            None => lock(&self.rest).poll_body(cx).map(|data| data.map(|data| data.map(Frame::data))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.whole, &lock(&self.rest).body) {
            (Some(whole), _) => SizeHint::with_exact(whole.len() as u64),
            (None, Body::Length(length)) => SizeHint::with_exact(*length),
            (None, _) => SizeHint::default(),
        }
    }
}
