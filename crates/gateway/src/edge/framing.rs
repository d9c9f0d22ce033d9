//! Where one HTTP/1.x request ends and the next begins, decided strictly (RFC 9112). Pure: bytes in, verdict out.
//!
//! The scanner is a state machine: it keeps no byte of a body and none of a head beyond the first 17 of a field name. It
//! judges each byte as it comes, so its verdict cannot depend on how the stream was cut into reads, and it is never later
//! than that of a parser that is fed the same bytes. It is stricter than the standard where leniency is what request
//! smuggling is made of.
//!
//! Of each head it notes where its parts stand, until somebody takes that: whoever feeds it bounds how many heads that can
//! be, as a short one is noted in a dozen times as many bytes.

mod head;
mod octets;
#[cfg(test)]
mod tests;
mod violation;

use std::collections::VecDeque;
use std::ops::Range;

use octets::{TOKEN, is, text_run};
pub use violation::Violation;

use crate::fields::Place;

/// Where in the stream the next byte falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Between requests: nothing of the next one has come, save empty lines.
    Between,
    /// Inside a head.
    Head,
    /// Inside a body, its chunk framing or its trailers.
    Body,
    /// The connection began with the HTTP/2 preface: nothing is looked at any more.
    Http2,
}

/// A violation, and what of the bytes just fed may still be handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was wrong.
    pub violation: Violation,
    /// Where to cut.
    pub cut: Cut,
}

/// How much of the bytes fed is untouched by a violation in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// That many belong to earlier, complete requests; the head of the refused one was never complete outside.
    Before(usize),
    /// None: the refused request's head was complete in bytes fed before, so it may be in service already.
    Within,
}

/// A complete head: where in its bytes is what, and what it says about its body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Bytes of empty lines before it.
    pub before: usize,
    /// Its length from the first byte of its method to its last CRLF; the places below count from there.
    pub bytes: usize,
    /// The method ends here.
    pub method: usize,
    /// The target.
    pub target: Range<usize>,
    /// HTTP/1.1, not 1.0.
    pub http_1_1: bool,
    /// The fields.
    pub fields: Vec<Place>,
    /// What `Content-Length` says.
    pub length: Option<u64>,
    /// The body comes in chunks.
    pub chunked: bool,
}

/// Follows one connection's requests from its first byte.
#[derive(Debug)]
pub struct Scanner {
    head_bytes_max: usize,
    head_fields_max: usize,
    state: State,
    heads: u64,
    /// Those of them that nobody has taken.
    scanned: VecDeque<Scanned>,
    /// What is known of the head that is being read.
    head: Scanned,
    /// Where the field that is being read begins, and its value.
    field_at: usize,
    value_at: usize,
    empty_lines: u8,
    /// Bytes and field lines left for this head or trailer section; extension bytes left for this body.
    section_left: usize,
    fields_left: usize,
    extensions_left: usize,
    in_trailers: bool,
    host: bool,
    /// A field name cut by the end of a read: its beginning, and its length (`NAME_MAX + 1`: longer).
    name: [u8; NAME_MAX],
    name_len: usize,
}

/// The longest field name that matters, `transfer-encoding`.
const NAME_MAX: usize = 17;
const EMPTY_LINES_MAX: u8 = 4;
/// All chunk extensions of one body together. Servers refuse 16 KiB.
const EXTENSION_BYTES_MAX: usize = 8 * 1024;
/// Servers refuse 16 KiB of trailers.
const TRAILER_BYTES_MAX: usize = 8 * 1024;
const TRAILER_FIELDS_MAX: usize = 32;
const CHUNK_SIZE_DIGITS_MAX: u8 = 16;
/// Room that is kept for heads that wait.
const SCANNED_KEPT: usize = 4;
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The connection began with that many bytes of the preface. Zero: nothing has come.
    Preface(usize),
    Http2,
    Start,
    StartLf,
    Method,
    TargetStart,
    Target,
    /// That many bytes of `VERSION` have matched.
    Version(usize),
    VersionMinor,
    RequestLineCr,
    LineLf,
    FieldStart,
    Name,
    Value,
    LengthValue(u64, Text),
    /// That many bytes of `chunked` have matched.
    CodingValue(usize, Text),
    SectionLf,
    /// Bytes left of a body with Content-Length; never zero.
    Body(u64),
    /// The size so far and its digits.
    ChunkSize(u64, u8),
    ChunkBlank(u64),
    ChunkExtension(u64),
    ChunkSizeLf(u64),
    /// Bytes left of a chunk; never zero.
    ChunkData(u64),
    ChunkDataCr,
    ChunkDataLf,
}

/// Which part of a value surrounded by optional white space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    Before,
    Inside,
    After,
}

impl Scanner {
    /// A scanner for a new connection, refusing heads above either maximum.
    pub fn new(head_bytes_max: usize, head_fields_max: usize) -> Scanner {
        Scanner {
            head_bytes_max,
            head_fields_max,
            state: State::Preface(0),
            heads: 0,
            scanned: VecDeque::new(),
            head: Scanned::default(),
            field_at: 0,
            value_at: 0,
            empty_lines: 0,
            section_left: 0,
            fields_left: 0,
            extensions_left: 0,
            in_trailers: false,
            host: false,
            name: [0; NAME_MAX],
            name_len: 0,
        }
    }

    /// Takes the next bytes of the stream. After a refusal the scanner stays where it was refused: feed no more.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let mut whole = 0;
        let mut handed_on = self.position() == Position::Body;
        let mut at = 0;
        while at < bytes.len() {
            match self.step(&bytes[at..]) {
                Ok(taken) => at += taken,
                Err(violation) if handed_on => {
                    return Err(Refusal { violation, cut: Cut::Within });
                }
                Err(violation) => {
                    if self.position() == Position::Body {
                        self.heads -= 1;
                        self.scanned.pop_back();
                    }
                    return Err(Refusal { violation, cut: Cut::Before(whole) });
                }
            }
            if self.state == State::Start {
                (whole, handed_on) = (at, false);
            }
        }
        Ok(())
    }

    /// Where the next byte falls.
    pub fn position(&self) -> Position {
        match self.state {
            State::Preface(0) | State::Start | State::StartLf => Position::Between,
            State::Http2 => Position::Http2,
            State::Body(_) | State::ChunkSize(..) | State::ChunkBlank(_) | State::ChunkExtension(_) => {
                Position::Body
            }
            State::ChunkSizeLf(_) | State::ChunkData(_) | State::ChunkDataCr | State::ChunkDataLf => {
                Position::Body
            }
            _ if self.in_trailers => Position::Body,
            _ => Position::Head,
        }
    }

    /// How many heads were complete in bytes that may be handed on.
    pub fn heads(&self) -> u64 {
        self.heads
    }

    /// Takes the first of the complete heads, in the order in which they came.
    pub fn take(&mut self) -> Option<Scanned> {
        let first = self.scanned.pop_front();
        if self.scanned.is_empty() {
            // A burst is over: most connections never have a second head here.
            self.scanned.shrink_to(SCANNED_KEPT);
        }
        first
    }

    /// How many complete heads nobody has taken.
    pub fn waiting(&self) -> usize {
        self.scanned.len()
    }

    /// One part's worth of bytes; may take none if the state changes instead.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        match self.state {
            State::Http2 => Ok(bytes.len()),
            State::Preface(matched) => self.preface(matched, bytes),
            State::Start | State::StartLf => self.start(bytes[0]),
            State::Body(left) => {
                let (taken, left) = skip(bytes, left);
                self.state = if left == 0 { self.message_end() } else { State::Body(left) };
                Ok(taken)
            }
            State::ChunkData(left) => {
                let (taken, left) = skip(bytes, left);
                self.state = if left == 0 { State::ChunkDataCr } else { State::ChunkData(left) };
                Ok(taken)
            }
            State::ChunkExtension(size) => self.extension(size, bytes),
            State::ChunkSize(..)
            | State::ChunkBlank(_)
            | State::ChunkSizeLf(_)
            | State::ChunkDataCr
            | State::ChunkDataLf => self.chunk(bytes[0]),
            _ => self.section(bytes),
        }
    }

    /// Looks for the HTTP/2 preface; a connection that only began like it is scanned from its first byte.
    fn preface(&mut self, matched: usize, bytes: &[u8]) -> Result<usize, Violation> {
        let same = HTTP2_PREFACE[matched..].iter().zip(bytes).take_while(|(a, b)| a == b).count();
        let matched = matched + same;
        if matched == HTTP2_PREFACE.len() {
            self.state = State::Http2;
        } else if same == bytes.len() {
            self.state = State::Preface(matched);
        } else {
            self.state = State::Start;
            let mut at = 0;
            while at < matched {
                at += self.step(&HTTP2_PREFACE[at..matched])?;
            }
        }
        Ok(same)
    }

    fn start(&mut self, byte: u8) -> Result<usize, Violation> {
        self.state = match (self.state, byte) {
            (State::StartLf, b'\n') => State::Start,
            (State::StartLf, _) => return Err(Violation::StrayCarriageReturn),
            (_, b'\n') => return Err(Violation::BareLineFeed),
            (_, b'\r') if self.empty_lines == EMPTY_LINES_MAX => return Err(Violation::EmptyLines),
            (_, b'\r') => {
                self.empty_lines += 1;
                State::StartLf
            }
            (_, byte) if is(byte, TOKEN) => {
                self.section_left = self.head_bytes_max;
                self.fields_left = self.head_fields_max;
                self.host = false;
                self.head.before = 2 * usize::from(self.empty_lines);
                self.state = State::Method;
                return Ok(0);
            }
            _ => return Err(Violation::RequestLine),
        };
        Ok(1)
    }

    fn message_end(&mut self) -> State {
        self.in_trailers = false;
        self.empty_lines = 0;
        State::Start
    }

    fn chunk(&mut self, byte: u8) -> Result<usize, Violation> {
        self.state = match (self.state, byte) {
            (State::ChunkSize(size, digits), _)
                if digits < CHUNK_SIZE_DIGITS_MAX
                    && let Some(digit) = char::from(byte).to_digit(16) =>
            {
                State::ChunkSize(size << 4 | u64::from(digit), digits + 1)
            }
            (State::ChunkSize(_, 0), _) => return Err(Violation::Chunk),
            (State::ChunkSize(size, _), b'\r') => State::ChunkSizeLf(size),
            (State::ChunkSize(size, _) | State::ChunkBlank(size), b';') => State::ChunkExtension(size),
            (State::ChunkSize(size, _) | State::ChunkBlank(size), b' ' | b'\t')
                if self.extensions_left > 0 =>
            {
                self.extensions_left -= 1;
                State::ChunkBlank(size)
            }
            (State::ChunkSizeLf(0), b'\n') => {
                self.in_trailers = true;
                self.section_left = TRAILER_BYTES_MAX;
                self.fields_left = TRAILER_FIELDS_MAX;
                State::FieldStart
            }
            (State::ChunkSizeLf(size), b'\n') => State::ChunkData(size),
            (State::ChunkDataCr, b'\r') => State::ChunkDataLf,
            (State::ChunkDataLf, b'\n') => State::ChunkSize(0, 0),
            _ => return Err(Violation::Chunk),
        };
        Ok(1)
    }

    fn extension(&mut self, size: u64, bytes: &[u8]) -> Result<usize, Violation> {
        let taken = text_run(&bytes[..bytes.len().min(self.extensions_left)]);
        self.extensions_left -= taken;
        match bytes.get(taken) {
            None => Ok(taken),
            Some(b'\r') => {
                self.state = State::ChunkSizeLf(size);
                Ok(taken + 1)
            }
            Some(_) => Err(Violation::Chunk),
        }
    }
}

/// How many of `bytes` fall into the next `left` ones, and how many are left then.
fn skip(bytes: &[u8], left: u64) -> (usize, u64) {
    let taken = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
    (taken, left - taken as u64)
}
