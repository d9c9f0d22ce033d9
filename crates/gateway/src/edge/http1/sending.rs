//! An answer on its way to a caller: its head, and its body framed as the caller knows it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes, BytesMut};
use http::StatusCode;
use http_body::Body;
use httpdate::HttpDate;
use tokio::io::AsyncWrite;

use super::Terms;
use crate::relay::Reply;

/// Data up to this size is copied behind what stands before it, and leaves with it in one write of one piece.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// Room for a head as most are.
const HEAD_BYTES: usize = 2 << 10;

/// The time as answers say it, written anew once a second.
#[derive(Default)]
pub(super) struct Date {
    second: u64,
    line: String,
}

impl Date {
    /// The last line of a head, and the empty one behind it.
    fn line(&mut self, now: SystemTime) -> &str {
        let second = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if self.line.is_empty() || self.second != second {
            self.second = second;
            self.line = format!("date: {}\r\n\r\n", HttpDate::from(UNIX_EPOCH + Duration::from_secs(second)));
        }
        &self.line
    }
}

/// How a body ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// After as many bytes as the head says.
    Length,
    Chunked,
    /// With the connection.
    Closed,
}

/// An answer being written.
pub(super) struct Sending<B> {
    /// `None`: no more will come.
    body: Option<B>,
    framing: Framing,
    /// What is to be written now, in this order.
    before: BytesMut,
    data: Bytes,
    after: &'static [u8],
    /// Looked at, and not yet its turn.
    next: Option<Bytes>,
    /// Something of the body stands among what is to be written, or has been.
    begun: bool,
    /// The body broke off: so must the connection, once what came before is written.
    broken: bool,
    /// The caller was not told that this is the last answer.
    persists: bool,
}

impl<B: Body<Data = Bytes> + Unpin> Sending<B> {
    /// Begins an answer; `persists`: another may follow on its connection, if that need not end with its body. `space` is
    /// where it is put together, without what was left there.
    pub(super) fn new(
        reply: Reply<B>,
        terms: &Terms,
        persists: bool,
        date: &mut Date,
        space: BytesMut,
    ) -> Self {
        let Reply { status, fields, body } = reply;
        let bare = terms.head_only || without_body(status);
        let length = body.size_hint().exact();
        let framing = match length {
            Some(_) => Framing::Length,
            None if terms.http_1_1 => Framing::Chunked,
            None => Framing::Closed,
        };
        let persists = persists && (bare || framing != Framing::Closed);
        let mut before = space;
        before.clear();
        before.reserve(HEAD_BYTES);
        status_line(&mut before, terms, status);
        before.extend_from_slice(fields.as_bytes());
        match (length, framing) {
            // With 204 it is as good as nothing (RFC 9110, 8.6, wants none), but there are clients that look for it.
            (Some(0), _) if status == StatusCode::NO_CONTENT => {
                before.extend_from_slice(b"content-length: 0\r\n");
            }
            _ if without_body(status) => {}
            // The answer's own fields say how long it would be, if that is known.
            (Some(0), _) if terms.head_only => {}
            (Some(length), _) => {
                before.extend_from_slice(b"content-length: ");
                before.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
                before.extend_from_slice(b"\r\n");
            }
            (None, Framing::Chunked) => before.extend_from_slice(b"transfer-encoding: chunked\r\n"),
            (None, _) => {}
        }
        match (persists, terms.http_1_1) {
            (false, _) => before.extend_from_slice(b"connection: close\r\n"),
            (true, false) => before.extend_from_slice(b"connection: keep-alive\r\n"),
            (true, true) => {}
        }
        before.extend_from_slice(date.line(SystemTime::now()).as_bytes());
        let body = (!bare).then_some(body);
        let (data, after, next) = (Bytes::new(), &[][..], None);
        Self { body, framing, before, data, after, next, begun: false, broken: false, persists }
    }

    /// Writes what there is, until the whole answer has left. The body is let go of before that.
    pub(super) fn poll<W>(&mut self, cx: &mut Context<'_>, socket: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        loop {
            self.fill(cx);
            if !self.waits() {
                ready!(self.poll_write(cx, socket))?;
                continue;
            }
            // Nobody waits for bytes that the socket holds back.
            ready!(Pin::new(&mut *socket).poll_flush(cx))?;
            return match self.body {
                Some(_) => Poll::Pending,
                None if self.broken => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
                None => Poll::Ready(Ok(())),
            };
        }
    }

    /// The space for the next answer.
    pub(super) fn into_space(self) -> BytesMut {
        self.before
    }

    /// Whether another answer may follow.
    pub(super) fn persists(&self) -> bool {
        self.persists
    }

    /// Whether nothing is to be written now.
    pub(super) fn waits(&self) -> bool {
        self.before.is_empty() && self.data.is_empty() && self.after.is_empty()
    }

    /// Asks the body for what comes next, once what came before is written, except for the head: whoever does not read
    /// holds the body back.
    fn fill(&mut self, cx: &mut Context<'_>) {
        if self.begun && !self.waits() {
            return;
        }
        let Some(data) = self.next.take().or_else(|| self.ask(cx)) else { return };
        self.begun = true;
        if self.framing == Framing::Chunked {
            size_line(&mut self.before, data.len());
            self.after = b"\r\n";
        }
        self.data = data;
        // One look ahead, so that the end leaves with the last of the data.
        self.next = self.ask(cx);
        if self.data.len() <= COPIED_BYTES_MAX {
            self.before.extend_from_slice(&std::mem::take(&mut self.data));
            self.before.extend_from_slice(std::mem::take(&mut self.after));
        }
    }

    /// The next data of the body that is not empty, if there is some now.
    fn ask(&mut self, cx: &mut Context<'_>) -> Option<Bytes> {
        loop {
            let Poll::Ready(frame) = Pin::new(self.body.as_mut()?).poll_frame(cx) else { return None };
            match frame.map(|frame| frame.map(http_body::Frame::into_data)) {
                Some(Ok(Ok(data))) if !data.is_empty() => return Some(data),
                // Nothing, or trailers, which no answer has.
                Some(Ok(_)) => {}
                Some(Err(_)) => {
                    (self.body, self.broken) = (None, true);
                    return None;
                }
                None => {
                    self.body = None;
                    if self.framing == Framing::Chunked {
                        self.after = if self.after.is_empty() { b"0\r\n\r\n" } else { b"\r\n0\r\n\r\n" };
                    }
                    return None;
                }
            }
        }
    }

    fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut W,
    ) -> Poll<io::Result<()>> {
        let Self { before, data, after, .. } = self;
        let socket = Pin::new(socket);
        let mut written = if data.is_empty() && after.is_empty() {
            ready!(socket.poll_write(cx, before))?
        } else {
            let pieces = [IoSlice::new(before), IoSlice::new(data), IoSlice::new(after)];
            ready!(socket.poll_write_vectored(cx, &pieces))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let of_before = written.min(before.len());
        before.advance(of_before);
        written -= of_before;
        let of_data = written.min(data.len());
        data.advance(of_data);
        *after = &after[written - of_data..];
        Poll::Ready(Ok(()))
    }
}

/// Statuses whose answers never have a body (RFC 9110, 15.3.5 and 15.4.5).
fn without_body(status: StatusCode) -> bool {
    status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

fn status_line(head: &mut BytesMut, terms: &Terms, status: StatusCode) {
    if terms.http_1_1 && status == StatusCode::OK {
        head.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    let version = if terms.http_1_1 { "HTTP/1.1 " } else { "HTTP/1.0 " };
    for part in [version, status.as_str(), " ", status.canonical_reason().unwrap_or_default(), "\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
}

/// The length of a chunk in hex.
fn size_line(out: &mut BytesMut, length: usize) {
    let digits = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        out.extend_from_slice(&[b"0123456789abcdef"[length >> (4 * place) & 15]]);
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_that_of_its_second() {
        let mut date = Date::default();
        for (millis, said) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (999, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (1_000, "Thu, 01 Jan 1970 00:00:01 GMT"),
            (784_111_777_500, "Sun, 06 Nov 1994 08:49:37 GMT"),
            // A clock may be set back.
            (1_000, "Thu, 01 Jan 1970 00:00:01 GMT"),
        ] {
            let now = UNIX_EPOCH + Duration::from_millis(millis);
            assert_eq!(date.line(now), format!("date: {said}\r\n\r\n"));
        }
    }
}
