//! Server-sent events: a byte stream cut into events without changing a byte.
//!
//! [`Splitter`] finds where events end; [`Event`] reads the fields of one. The format is WHATWG HTML, section 9.2
//! "Server-sent events": lines end in LF, CR or CRLF, a blank line ends an event, a line that starts with `:` is a
//! comment. Concatenating the `raw` of everything a splitter gives out yields exactly what was pushed into it.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use memchr::memchr2;

/// Longest event that is kept together, bytes. A longer one is handed on in pieces, unread.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// Cuts a stream into events, whatever the chunks are.
///
/// An event that lies within a chunk is a slice of it; only one that crosses chunks is copied. Which events come out
/// does not depend on the chunking, so a blank line that ends in CR is held until the next byte tells CR from CRLF.
#[derive(Debug, Default)]
pub struct Splitter {
    /// Pushed and not looked at.
    chunk: Bytes,
    /// The beginning of an event whose end has not come.
    held: BytesMut,
    /// Where in its line the last byte looked at was.
    line: Line,
    /// Inside an event that grew beyond the bound: its bytes go out as they come.
    oversize: bool,
    /// Something was given out, so a byte order mark is none any more.
    begun: bool,
}

/// The events that are complete so far; those not taken are given by the next [`Splitter::push`].
#[derive(Debug)]
pub struct Events<'a>(&'a mut Splitter);

/// One event, or a piece of one that is too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Every byte of it, with the blank line that ends it.
    pub raw: Bytes,
    oversize: bool,
    fields_at: usize,
    /// It is nothing but one `data:` field, ended by LF twice: this long, its name included.
    one_field: Option<usize>,
}

const DATA: &[u8] = b"data:";

impl Splitter {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream and gives the events they complete.
    pub fn push(&mut self, chunk: Bytes) -> Events<'_> {
        if self.chunk.is_empty() {
            self.chunk = chunk;
        } else {
            self.chunk = [&self.chunk[..], &chunk[..]].concat().into();
        }
        Events(self)
    }

    /// Whether the stream stands inside an event: writing another one here needs a blank line first.
    pub fn mid_event(&self) -> bool {
        (self.oversize || !self.held.is_empty() || !self.chunk.is_empty()) && self.line != Line::BlankCr
    }

    /// The stream is over: what is left and was not taken, usually an event without its blank line. The splitter is
    /// as new.
    pub fn finish(&mut self) -> Option<Event> {
        let mut splitter = std::mem::take(self);
        splitter.held.extend_from_slice(&splitter.chunk);
        let rest = splitter.held.split().freeze();
        let oversize = splitter.oversize;
        (!rest.is_empty()).then(|| splitter.event(rest, oversize))
    }

    fn next_event(&mut self) -> Option<Event> {
        while !self.chunk.is_empty() {
            if let Some(event) = self.usual_event() {
                return Some(event);
            }
            let Some(end) = self.line.end_of_event(&self.chunk) else {
                return self.hold();
            };
            let tail = self.chunk.split_to(end);
            let raw = if self.held.is_empty() {
                tail
            } else {
                self.held.extend_from_slice(&tail);
                self.held.split().freeze()
            };
            let oversize = std::mem::take(&mut self.oversize);
            // Nothing is left of an event that went out in pieces when its last CR turns out to stand alone.
            if !raw.is_empty() {
                return Some(self.event(raw, oversize));
            }
        }
        None
    }

    /// The next event where it is one `data:` field that lies within the chunk, which is the rule.
    fn usual_event(&mut self) -> Option<Event> {
        let between = self.line == Line::Start && self.held.is_empty() && !self.oversize && self.begun;
        if !between || !self.chunk.starts_with(DATA) {
            return None;
        }
        let length = memchr2(b'\n', b'\r', &self.chunk)?;
        if length + 2 > EVENT_BYTES_MAX || !self.chunk[length..].starts_with(b"\n\n") {
            return None;
        }
        let raw = self.chunk.split_to(length + 2);
        Some(Event { raw, oversize: false, fields_at: 0, one_field: Some(length) })
    }

    /// Keeps a chunk without an end of event, or gives it out when that would be too much.
    fn hold(&mut self) -> Option<Event> {
        let chunk = std::mem::take(&mut self.chunk);
        if self.held.is_empty() && (self.oversize || chunk.len() > EVENT_BYTES_MAX) {
            self.oversize = true;
            return Some(self.event(chunk, true));
        }
        self.held.extend_from_slice(&chunk);
        if self.held.len() <= EVENT_BYTES_MAX {
            return None;
        }
        self.oversize = true;
        let piece = std::mem::take(&mut self.held).freeze();
        Some(self.event(piece, true))
    }

    fn event(&mut self, raw: Bytes, oversize: bool) -> Event {
        let first = !std::mem::replace(&mut self.begun, true);
        let fields_at = if first && raw.starts_with(BOM) { BOM.len() } else { 0 };
        let oversize = oversize || raw.len() > EVENT_BYTES_MAX;
        let field = if oversize || !raw.starts_with(DATA) { None } else { memchr2(b'\n', b'\r', &raw) };
        let one_field = field.filter(|length| raw[*length..] == *b"\n\n");
        Event { raw, oversize, fields_at, one_field }
    }
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.0.next_event()
    }
}

impl Event {
    /// The `data:` fields joined by LF; `None` without one, or when the event is too long to be read. One field, the
    /// usual case, is borrowed.
    pub fn data(&self) -> Option<Cow<'_, [u8]>> {
        if let Some(length) = self.one_field {
            let value = &self.raw[DATA.len()..length];
            return Some(Cow::Borrowed(value.strip_prefix(b" ").unwrap_or(value)));
        }
        let mut data: Option<Cow<'_, [u8]>> = None;
        for value in self.values(b"data") {
            match &mut data {
                None => data = Some(Cow::Borrowed(value)),
                Some(joined) => {
                    let joined = joined.to_mut();
                    joined.push(b'\n');
                    joined.extend_from_slice(value);
                }
            }
        }
        data
    }

    /// The last `event:` field, unless it is empty or not UTF-8.
    pub fn name(&self) -> Option<&str> {
        let name = std::str::from_utf8(self.values(b"event").last()?).ok()?;
        (!name.is_empty()).then_some(name)
    }

    /// Whether it holds comments and nothing else (a keep-alive).
    pub fn is_comment(&self) -> bool {
        let mut lines = self.lines().filter(|line| !line.is_empty()).peekable();
        lines.peek().is_some() && lines.all(|line| line[0] == b':')
    }

    /// Whether this is an event beyond [`EVENT_BYTES_MAX`], or a piece of one: pass it on, it has no fields.
    pub fn is_oversize(&self) -> bool {
        self.oversize
    }

    fn values<'a>(&'a self, field: &'static [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.lines().filter_map(move |line| match line.strip_prefix(field)? {
            [] => Some(&[][..]),
            [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
            _ => None,
        })
    }

    fn lines(&self) -> Lines<'_> {
        Lines(if self.oversize { &[] } else { &self.raw[self.fields_at..] })
    }
}

/// The lines of an event without their ends; CRLF gives an empty line more, which no reader minds.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let end = memchr2(b'\n', b'\r', self.0).unwrap_or(self.0.len());
        let line = &self.0[..end];
        self.0 = self.0.get(end + 1..).unwrap_or_default();
        Some(line)
    }
}

/// The place between two bytes of a stream, all that finding the next blank line needs to know of the past.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Line {
    /// At the beginning of a line.
    #[default]
    Start,
    /// Behind at least one byte of a line.
    Inside,
    /// Behind a CR that ended a line; an LF may belong to it.
    Cr,
    /// Behind a CR that ended a blank line; an LF may belong to it.
    BlankCr,
}

impl Line {
    /// Looks at `bytes` and returns the index behind the first event that ends in them; else all of them were looked at.
    fn end_of_event(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            let next = *bytes.get(at)?;
            match *self {
                Line::Cr => {
                    at += usize::from(next == b'\n');
                    *self = Line::Start;
                }
                Line::BlankCr => {
                    *self = Line::Start;
                    return Some(at + usize::from(next == b'\n'));
                }
                Line::Start if next == b'\n' => return Some(at + 1),
                Line::Start if next == b'\r' => {
                    at += 1;
                    *self = Line::BlankCr;
                }
                Line::Start | Line::Inside => match memchr2(b'\n', b'\r', &bytes[at..]) {
                    Some(length) => {
                        at += length + 1;
                        *self = if bytes[at - 1] == b'\n' { Line::Start } else { Line::Cr };
                    }
                    None => {
                        *self = Line::Inside;
                        return None;
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests;
