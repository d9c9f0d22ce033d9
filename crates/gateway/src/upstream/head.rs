//! The head of an answer as HTTP/1.1 writes it: what it says, and where its body will end (RFC 9112). Bytes in, values out.
//!
//! A provider is not trusted to be right. What could be read in two ways is refused, or its connection is not used again.

use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::StatusCode;

use crate::fields::{self, Fields, Place};
use crate::http1::{Body, Malformed};

/// A head, its last CRLF included.
pub(super) const HEAD_BYTES_MAX: usize = 32 << 10;
const HEAD_FIELDS_MAX: usize = 100;
/// Heads with a status of 1xx before the one that counts.
const INTERIM_MAX: u8 = 16;

/// The head of an answer.
#[derive(Debug)]
pub struct Head {
    /// Its status, never 1xx.
    pub status: StatusCode,
    /// Its header fields.
    pub fields: Fields,
}

/// Finds the head of the next answer.
#[derive(Debug, Default)]
pub(super) struct HeadReader {
    /// No head ends before.
    searched: usize,
    interim: u8,
}

/// A head that is here, with what it says about its body and its connection.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) head: Head,
    pub(super) body: Body,
    /// Another request may follow on the connection.
    pub(super) reusable: bool,
}

impl HeadReader {
    /// Takes the head out of what was received; `None`: more of it must come.
    pub(super) fn read(&mut self, received: &mut BytesMut) -> Result<Option<Begun>, Malformed> {
        loop {
            // Parsed when it may be complete, not with each byte that comes; the first time in any case, for what is no
            // HTTP need not be waited for.
            let from = self.searched.saturating_sub(2);
            if received.is_empty() || (self.searched > 0 && !ends_head(&received[from..])) {
                self.searched = received.len();
                return if received.len() > HEAD_BYTES_MAX { Err(TOO_LONG) } else { Ok(None) };
            }
            self.searched = received.len();
            let Some((begun, places, bytes)) = parse(received)? else {
                return if received.len() > HEAD_BYTES_MAX { Err(TOO_LONG) } else { Ok(None) };
            };
            if bytes > HEAD_BYTES_MAX {
                return Err(TOO_LONG);
            }
            let text = received.split_to(bytes).freeze();
            self.searched = 0;
            let status = begun.head.status;
            if !status.is_informational() {
                let fields = Fields::new(text, places);
                return Ok(Some(Begun { head: Head { fields, ..begun.head }, ..begun }));
            }
            self.interim += 1;
            if status == StatusCode::SWITCHING_PROTOCOLS || self.interim == INTERIM_MAX {
                return Err(Malformed("statuses of 1xx that were not asked for"));
            }
        }
    }
}

const TOO_LONG: Malformed = Malformed("a head of the answer that is too long");

/// Whether an empty line may be in it.
fn ends_head(bytes: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', bytes)
        .any(|at| bytes[at + 1..].starts_with(b"\n") || bytes[at + 1..].starts_with(b"\r\n"))
}

/// The head at the beginning, still without its fields; their places in it, and its length.
fn parse(received: &[u8]) -> Result<Option<(Begun, Vec<Place>, usize)>, Malformed> {
    let mut space = [const { MaybeUninit::uninit() }; HEAD_FIELDS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        received,
        &mut space,
    );
    let bytes = match parsed {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Malformed("too many header fields in the answer"));
        }
        Err(_) => return Err(Malformed("an answer that is not HTTP")),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(Malformed("an answer without a status"))?;
    let mut framing = Framing { http_1_1: response.version == Some(1), ..Framing::default() };
    let mut places = Vec::new();
    let place = |part: &[u8]| {
        let start = part.as_ptr().addr() - received.as_ptr().addr();
        start..start + part.len()
    };
    for field in response.headers.iter() {
        framing.note(field.name, field.value)?;
        fields::add(&mut places, Place::new(place(field.name.as_bytes()), place(field.value)));
    }
    let body = framing.body(status)?;
    let reusable = framing.keeps_alive() && body != Body::UntilClosed;
    let fields = Fields::default();
    Ok(Some((Begun { head: Head { status, fields }, body, reusable }, places, bytes)))
}

/// What header fields say about the end of the body and of the connection.
#[derive(Default)]
struct Framing {
    http_1_1: bool,
    length: Option<u64>,
    /// There is a transfer coding; whether the last is `chunked`.
    chunked: Option<bool>,
    close: bool,
    keep_alive: bool,
}

impl Framing {
    fn note(&mut self, name: &str, value: &[u8]) -> Result<(), Malformed> {
        let items = || value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        if name.eq_ignore_ascii_case("content-length") {
            for item in items() {
                let length = length(item).ok_or(Malformed("a content-length that is no number"))?;
                if self.length.replace(length).is_some_and(|other| other != length) {
                    return Err(Malformed("two content-lengths"));
                }
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            self.chunked =
                Some(items().next_back().is_some_and(|coding| coding.eq_ignore_ascii_case(b"chunked")));
        } else if name.eq_ignore_ascii_case("connection") {
            self.close |= items().any(|option| option.eq_ignore_ascii_case(b"close"));
            self.keep_alive |= items().any(|option| option.eq_ignore_ascii_case(b"keep-alive"));
        }
        Ok(())
    }

    /// RFC 9112, section 6.3, of an answer to anything but HEAD and CONNECT.
    fn body(&self, status: StatusCode) -> Result<Body, Malformed> {
        Ok(match (self.chunked, self.length) {
            _ if status.is_informational() => Body::Ended,
            _ if matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) => Body::Ended,
            (Some(_), _) if !self.http_1_1 => return Err(Malformed("a transfer coding in HTTP/1.0")),
            (Some(true), _) => Body::chunked(),
            (Some(false), _) | (None, None) => Body::UntilClosed,
            (None, Some(length)) => Body::of_length(length),
        })
    }

    fn keeps_alive(&self) -> bool {
        // Whoever sends both lengths may mean either with the next answer.
        let clear = self.chunked.is_none() || self.length.is_none();
        clear && !self.close && (self.http_1_1 || self.keep_alive)
    }
}

fn length(written: &[u8]) -> Option<u64> {
    let digits = !written.is_empty() && written.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(written).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests;
