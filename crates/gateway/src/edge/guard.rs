//! The socket of one client, watched: strict HTTP/1.x framing, the timers of the connection, and a lingering close.
//!
//! The server reads and writes through a [`Guard`]. Every byte it is about to read goes past a
//! [`Scanner`] first; on a violation it sees nothing of the offending request, and the guard
//! answers instead. HTTP/2 connections pass through; only the timers stay.
//!
//! What the guard must know and cannot see is whether an answer is under way: the service tells it by holding an
//! [`Exchange`] from its call to the end of the response body ([`Exchange::hold`]).
//!
//! After a violation:
//! - Answers to earlier requests on the connection are written first, then the refusal, then the connection closes.
//! - If the head of the request is already in service (a malformed chunk), only the service knows whether it has
//!   begun to answer: its body fails with an error that [`Violation::at_root_of`] recognizes, and it answers.
//! - The refusal is written without waiting: a client that left no room for it in its socket goes without.

mod exchange;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

pub use self::exchange::{Exchange, Exchanges, Held};
use super::framing::{Cut, Position, Refusal, Scanned, Scanner, Violation};

/// What a connection may take, in bytes, lines and time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A request head, from the first byte of its method to its last CRLF. At most 64 KiB make sense: places in a head are
    /// counted so far.
    pub head_bytes: usize,
    /// Field lines in a head.
    pub head_fields: usize,
    /// Silence on a new connection: closed without an answer.
    pub first_byte: Duration,
    /// From the first byte of a head to its last: 408.
    pub head: Duration,
    /// From the end of an answer to the next request: closed without an answer.
    pub idle: Duration,
    /// A write that makes no progress: the connection fails.
    pub write: Duration,
    /// How long after its deadline an answer may end itself, before the connection is ended.
    pub overdue: Duration,
    /// How long to read and discard input that comes after our last answer.
    pub linger: Duration,
    /// How many bytes of it.
    pub linger_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head_bytes: 32 * 1024,
            head_fields: 100,
            first_byte: Duration::from_secs(5),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            write: Duration::from_secs(60),
            overdue: Duration::from_secs(2),
            linger: Duration::from_secs(1),
            linger_bytes: 1024 * 1024,
        }
    }
}

/// Makes the complete HTTP/1.1 response (head and body, `connection: close`) to a violation. Called once per refusal
/// that is answered, so it may count too.
pub type Answer = Arc<dyn Fn(&Violation) -> Bytes + Send + Sync>;

/// A socket that a server may be given. See the [module](self).
pub struct Guard<S> {
    socket: S,
    limits: Limits,
    answer: Answer,
    scanner: Scanner,
    exchanges: Exchanges,
    phase: Phase,
    /// The writer above has bytes that it has not flushed: an answer is not wholly written.
    unflushed: bool,
    /// The wait that `read_due` is the end of.
    waiting: Waiting,
    read_due: Option<Instant>,
    /// Set while a write makes no progress.
    write_due: Option<Instant>,
    /// The one timer, armed for the earliest due time or before it: moved when it fires, not at each read.
    timer: Pin<Box<Sleep>>,
}

enum Phase {
    Open,
    /// A request was refused before it reached the server; the answer waits for those before it.
    Refused(Violation),
    /// A request that is in service was refused: its body fails.
    BodyFailed(Violation),
    /// A wait ended: reads say end of file.
    ReadEnded,
    Closing(Closing),
    Closed,
}

struct Closing {
    until: Instant,
    bytes_left: usize,
    shut_down: bool,
    /// More input is likely: wait for it. Else only take what is there.
    linger: bool,
}

/// What the client is waited for, and at which point of the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Waiting {
    what: Wait,
    heads: u64,
    ended: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    FirstByte,
    Head,
    Idle,
    /// Nothing: it waits for us.
    Nothing,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Guard<S> {
    /// Watches a connection just accepted. Must be called inside a tokio runtime with time enabled.
    pub fn new(socket: S, limits: Limits, answer: Answer) -> Guard<S> {
        let due = Instant::now() + limits.first_byte;
        Guard {
            socket,
            limits,
            answer,
            scanner: Scanner::new(limits.head_bytes, limits.head_fields),
            exchanges: Exchanges::default(),
            phase: Phase::Open,
            unflushed: false,
            waiting: Waiting { what: Wait::FirstByte, heads: 0, ended: 0 },
            read_due: Some(due),
            write_due: None,
            timer: Box::pin(tokio::time::sleep_until(due)),
        }
    }

    /// Where the service of this connection counts its requests.
    pub fn exchanges(&self) -> Exchanges {
        self.exchanges.clone()
    }

    /// How many heads were complete in what was read and were not taken.
    pub fn heads_waiting(&self) -> usize {
        self.scanner.waiting()
    }

    /// The next head that was complete in what was read.
    pub fn take_head(&mut self) -> Option<Scanned> {
        self.scanner.take()
    }

    /// An answer is owed or not wholly written.
    fn is_busy(&self) -> bool {
        let (begun, ended) = self.exchanges.counts();
        let taken = match self.scanner.position() {
            Position::Http2 => begun,
            _ => self.scanner.heads(),
        };
        self.unflushed || taken != ended
    }

    /// Notes what is waited for now; a new wait begins now.
    fn observe(&mut self) {
        let heads = self.scanner.heads();
        let (begun, ended) = self.exchanges.counts();
        let what = match self.scanner.position() {
            _ if !matches!(self.phase, Phase::Open) || self.is_busy() => Wait::Nothing,
            Position::Between if heads == 0 => Wait::FirstByte,
            // A preface is no request yet: its first headers must not take their time.
            Position::Http2 if begun == 0 => Wait::FirstByte,
            Position::Head => Wait::Head,
            // A body whose request nobody serves does not keep a connection.
            Position::Between | Position::Body | Position::Http2 => Wait::Idle,
        };
        let waiting = Waiting { what, heads, ended };
        if waiting == self.waiting {
            return;
        }
        self.waiting = waiting;
        let limit = match what {
            Wait::FirstByte => self.limits.first_byte,
            Wait::Head => self.limits.head,
            Wait::Idle => self.limits.idle,
            Wait::Nothing => {
                self.read_due = None;
                return;
            }
        };
        self.read_due = Some(Instant::now() + limit);
    }

    /// When an answer is overdue that should have ended itself before.
    fn overdue(&self) -> Option<Instant> {
        Some(self.exchanges.due()? + self.limits.overdue)
    }

    fn not_overdue(&self, now: Instant) -> io::Result<()> {
        if self.overdue().is_none_or(|due| now < due) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the answer is overdue"))
    }

    /// Ready, with the time, when the earliest of what is due is due. With nothing due it still wakes the task now
    /// and then, so that an exchange that ended without a flush after it is noticed.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Instant> {
        let due = match &self.phase {
            Phase::Closing(closing) => Some(closing.until),
            _ => self.read_due.into_iter().chain(self.write_due).chain(self.overdue()).min(),
        };
        if let Some(due) = due
            && due < self.timer.deadline()
        {
            self.timer.as_mut().reset(due);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            match due {
                Some(due) if due <= now => return Poll::Ready(now),
                Some(due) => self.timer.as_mut().reset(due),
                None => self.timer.as_mut().reset(now + self.limits.idle),
            }
        }
    }

    fn poll_open_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut self.socket).poll_read(cx, buf) {
            result?;
            let Err(Refusal { violation, cut }) = self.scanner.feed(&buf.filled()[before..]) else {
                return Poll::Ready(Ok(()));
            };
            return match cut {
                Cut::Within => {
                    buf.set_filled(before);
                    self.phase = Phase::BodyFailed(violation);
                    Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)))
                }
                Cut::Before(bytes) => {
                    buf.set_filled(before + bytes);
                    self.phase = Phase::Refused(violation);
                    // Not a byte would mean end of file.
                    if bytes > 0 { Poll::Ready(Ok(())) } else { self.poll_refuse(cx, violation) }
                }
            };
        }
        self.observe();
        let now = ready!(self.poll_due(cx));
        self.not_overdue(now)?;
        if self.read_due.is_none_or(|due| now < due) {
            return Poll::Pending;
        }
        if self.waiting.what == Wait::Head {
            let violation = Violation::HeadTimeout(self.limits.head);
            self.phase = Phase::Refused(violation);
            return self.poll_refuse(cx, violation);
        }
        self.phase = Phase::ReadEnded;
        Poll::Ready(Ok(()))
    }

    /// Answers a refusal when it is its turn, closes, and then says end of file.
    fn poll_refuse(&mut self, cx: &mut Context<'_>, violation: Violation) -> Poll<io::Result<()>> {
        if self.is_busy() {
            self.observe();
            // Only for its wake-up: nothing is due but, perhaps, a write, which will find that out.
            let _ = self.poll_due(cx);
            return Poll::Pending;
        }
        // The connection ends here whether or not the socket could be shut down.
        self.poll_refuse_last(cx, violation).map(|_| Ok(()))
    }

    /// Answers a refusal and closes; every answer before was written.
    pub(super) fn poll_refuse_last(
        &mut self,
        cx: &mut Context<'_>,
        violation: Violation,
    ) -> Poll<io::Result<()>> {
        if !self.is_closing() {
            let mut answer = (self.answer)(&violation);
            while !answer.is_empty() {
                match Pin::new(&mut self.socket).poll_write(cx, &answer) {
                    Poll::Ready(Ok(written)) if written > 0 => answer.advance(written),
                    _ => break,
                }
            }
            self.begin_close(true);
        }
        self.poll_close(cx)
    }

    fn begin_close(&mut self, linger: bool) {
        self.phase = Phase::Closing(Closing {
            until: Instant::now() + self.limits.linger,
            bytes_left: self.limits.linger_bytes,
            shut_down: false,
            linger,
        });
    }

    /// Shuts the write side down, then discards input for a while: closing a socket with unread input makes the
    /// kernel reset the connection, and the client may lose the answer it was about to read (RFC 9112, 9.6).
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = match self.poll_discard(cx) {
            Poll::Ready(result) => result,
            Poll::Pending => {
                ready!(self.poll_due(cx));
                Ok(())
            }
        };
        self.phase = Phase::Closed;
        Poll::Ready(result)
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Phase::Closing(closing) = &mut self.phase else {
            return Poll::Ready(Ok(()));
        };
        if !closing.shut_down {
            ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
            closing.shut_down = true;
        }
        while closing.bytes_left > 0 {
            let mut space = [MaybeUninit::uninit(); 8 * 1024];
            let mut discarded = ReadBuf::uninit(&mut space);
            match Pin::new(&mut self.socket).poll_read(cx, &mut discarded) {
                Poll::Ready(Ok(())) if !discarded.filled().is_empty() => {
                    closing.bytes_left = closing.bytes_left.saturating_sub(discarded.filled().len());
                }
                Poll::Pending if closing.linger => return Poll::Pending,
                // All of it, or an error: either way there is nobody to wait for.
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Runs a write or flush of the socket under the stall timer.
    fn poll_writing<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(result) = write(Pin::new(&mut self.socket), cx) {
            self.write_due = None;
            return Poll::Ready(result);
        }
        let due = *self.write_due.get_or_insert_with(|| Instant::now() + self.limits.write);
        // While an answer is written nothing is read, and what was waited for before is over.
        self.observe();
        let now = ready!(self.poll_due(cx));
        // Who writes need not read: here is the only look at a client that takes its answer in drops.
        self.not_overdue(now)?;
        if now < due {
            return Poll::Pending;
        }
        let stalled = format!("the client took nothing of the answer for {:?}", self.limits.write);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, stalled)))
    }

    fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing(_) | Phase::Closed)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.phase {
            Phase::Open => self.poll_open_read(cx, buf),
            Phase::Refused(violation) => self.poll_refuse(cx, violation),
            Phase::BodyFailed(violation) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)))
            }
            Phase::Closing(_) => self.poll_close(cx).map(|_| Ok(())),
            Phase::ReadEnded | Phase::Closed => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_closing() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.unflushed = true;
        self.poll_writing(cx, |socket, cx| socket.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.is_closing() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.unflushed = true;
        self.poll_writing(cx, |socket, cx| socket.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    /// A server flushes when it has written all it has, and drops a response body before the last flush: this is
    /// where the end of an answer is noticed.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_closing() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_writing(cx, |socket, cx| socket.poll_flush(cx)))?;
        self.unflushed = false;
        if !self.is_busy() {
            match self.phase {
                // The server may be waiting for a read that is to answer now.
                Phase::Refused(_) => cx.waker().wake_by_ref(),
                _ => {
                    self.observe();
                    // Only to arm the timer: what is due is done by the next read.
                    let _ = self.poll_due(cx);
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.is_closing() {
            let mid_request = matches!(self.scanner.position(), Position::Head | Position::Body);
            let refused = matches!(self.phase, Phase::Refused(_) | Phase::BodyFailed(_));
            self.begin_close(mid_request || refused);
        }
        self.poll_close(cx)
    }
}
