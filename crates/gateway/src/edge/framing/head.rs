//! Request line and field lines: heads, and the trailers of chunked bodies.

use super::octets::{TARGET, TOKEN, is, run, text_run};
use super::{EXTENSION_BYTES_MAX, NAME_MAX, Scanned, Scanner, State, TRAILER_BYTES_MAX, Text, Violation};
use crate::fields::{self, Place};

const VERSION: &[u8] = b"HTTP/1.";

impl Scanner {
    /// What is here of a head or of a trailer section, within what is left for it.
    pub(super) fn section(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let bytes = &bytes[..bytes.len().min(self.section_left)];
        if bytes.is_empty() {
            return Err(match self.in_trailers {
                true => Violation::Trailers,
                false => Violation::HeadTooLarge(self.head_bytes_max),
            });
        }
        let most = if self.in_trailers { TRAILER_BYTES_MAX } else { self.head_bytes_max };
        let start = most - self.section_left;
        let mut taken = 0;
        while let Some(&first) = bytes.get(taken) {
            let (rest, at) = (&bytes[taken..], start + taken);
            taken += match self.state {
                State::Name => self.name(rest, at)?,
                State::Value => self.value(rest, at)?,
                State::FieldStart => self.field_start(rest, first, at)?,
                State::LineLf => self.line_feed(first)?,
                State::SectionLf => {
                    self.section_end(first, at)?;
                    taken += 1;
                    break;
                }
                State::LengthValue(number, text) => self.length_value(number, text, first, at)?,
                State::CodingValue(matched, text) => self.coding_value(matched, text, first, at)?,
                _ => self.request_line(rest, first, at)?,
            };
        }
        self.section_left -= taken;
        Ok(taken)
    }

    fn request_line(&mut self, bytes: &[u8], first: u8, at: usize) -> Result<usize, Violation> {
        let (next, taken) = match self.state {
            State::Method => {
                let taken = self.word(bytes, TOKEN, State::TargetStart)?;
                self.head.method = at + taken - usize::from(self.state == State::TargetStart);
                return Ok(taken);
            }
            State::Target => {
                let taken = self.word(bytes, TARGET, State::Version(0))?;
                self.head.target.end = at + taken - usize::from(self.state == State::Version(0));
                return Ok(taken);
            }
            State::TargetStart if is(first, TARGET) => {
                self.head.target.start = at;
                (State::Target, 1)
            }
            State::Version(matched) => {
                let expected = &VERSION[matched..];
                let taken = expected.len().min(bytes.len());
                if bytes[..taken] != expected[..taken] {
                    return Err(Violation::RequestLine);
                }
                let whole = taken == expected.len();
                (if whole { State::VersionMinor } else { State::Version(matched + taken) }, taken)
            }
            State::VersionMinor if matches!(first, b'0' | b'1') => {
                self.head.http_1_1 = first == b'1';
                (State::RequestLineCr, 1)
            }
            State::RequestLineCr if first == b'\r' => (State::LineLf, 1),
            State::RequestLineCr if first == b'\n' => return Err(Violation::BareLineFeed),
            _ => return Err(Violation::RequestLine),
        };
        self.state = next;
        Ok(taken)
    }

    /// Characters of one class up to a space.
    fn word(&mut self, bytes: &[u8], class: u8, next: State) -> Result<usize, Violation> {
        let taken = run(bytes, class);
        match bytes.get(taken) {
            None => Ok(taken),
            Some(b' ') => {
                self.state = next;
                Ok(taken + 1)
            }
            Some(_) => Err(Violation::RequestLine),
        }
    }

    fn field_start(&mut self, bytes: &[u8], first: u8, at: usize) -> Result<usize, Violation> {
        match first {
            b'\r' => {
                self.state = State::SectionLf;
                Ok(1)
            }
            b'\n' => Err(Violation::BareLineFeed),
            b' ' | b'\t' => Err(Violation::FoldedField),
            byte if !is(byte, TOKEN) => Err(Violation::FieldName),
            _ if self.fields_left == 0 && self.in_trailers => Err(Violation::Trailers),
            _ if self.fields_left == 0 => Err(Violation::TooManyFields(self.head_fields_max)),
            _ => {
                self.fields_left -= 1;
                self.name_len = 0;
                self.field_at = at;
                self.state = State::Name;
                self.name(bytes, at)
            }
        }
    }

    fn name(&mut self, bytes: &[u8], at: usize) -> Result<usize, Violation> {
        let taken = run(bytes, TOKEN);
        match bytes.get(taken) {
            None => {
                self.keep_name(&bytes[..taken]);
                Ok(taken)
            }
            Some(b':') => {
                let kind = if self.name_len == 0 {
                    Field::of(&bytes[..taken])
                } else {
                    self.keep_name(&bytes[..taken]);
                    self.name.get(..self.name_len).map_or(Field::Other, Field::of)
                };
                self.state = self.value_state(kind)?;
                self.value_at = at + taken + 1;
                let rest = &bytes[taken + 1..];
                let value = if self.state == State::Value { self.value(rest, self.value_at)? } else { 0 };
                Ok(taken + 1 + value)
            }
            Some(b' ' | b'\t') => Err(Violation::SpaceBeforeColon),
            Some(b'\n') => Err(Violation::BareLineFeed),
            Some(_) => Err(Violation::FieldName),
        }
    }

    fn keep_name(&mut self, part: &[u8]) {
        let end = (self.name_len + part.len()).min(NAME_MAX + 1);
        if let Some(room) = self.name.get_mut(self.name_len..end) {
            room.copy_from_slice(part);
        }
        self.name_len = end;
    }

    fn value_state(&mut self, field: Field) -> Result<State, Violation> {
        match field {
            Field::Other => Ok(State::Value),
            _ if self.in_trailers => Err(Violation::Trailers),
            Field::Host if self.host => Err(Violation::SeveralHosts),
            Field::Host => {
                self.host = true;
                Ok(State::Value)
            }
            Field::ContentLength if self.head.chunked => Err(Violation::LengthAndCoding),
            Field::ContentLength if self.head.length.is_some() => Err(Violation::SeveralLengths),
            Field::ContentLength => Ok(State::LengthValue(0, Text::Before)),
            Field::TransferEncoding if self.head.length.is_some() => Err(Violation::LengthAndCoding),
            Field::TransferEncoding if self.head.chunked || !self.head.http_1_1 => Err(Violation::Coding),
            Field::TransferEncoding => Ok(State::CodingValue(0, Text::Before)),
        }
    }

    fn value(&mut self, bytes: &[u8], at: usize) -> Result<usize, Violation> {
        let taken = text_run(bytes);
        match bytes.get(taken) {
            None => Ok(taken),
            Some(b'\r') => {
                self.field_ends(at + taken);
                Ok(taken + 1)
            }
            Some(b'\n') => Err(Violation::BareLineFeed),
            Some(_) => Err(Violation::FieldValue),
        }
    }

    /// The value of a field ends here.
    fn field_ends(&mut self, at: usize) {
        self.state = State::LineLf;
        if !self.in_trailers {
            let name = self.field_at..self.value_at - 1;
            fields::add(&mut self.head.fields, Place::new(name, self.value_at..at));
        }
    }

    fn length_value(&mut self, number: u64, text: Text, byte: u8, at: usize) -> Result<usize, Violation> {
        self.state = match (text, byte) {
            (Text::Before | Text::Inside, b'0'..=b'9') => {
                let number = number.checked_mul(10).and_then(|ten| ten.checked_add(u64::from(byte - b'0')));
                match number {
                    Some(number) if i64::try_from(number).is_ok() => State::LengthValue(number, Text::Inside),
                    _ => return Err(Violation::Length),
                }
            }
            (Text::Before, b' ' | b'\t') => State::LengthValue(0, Text::Before),
            (_, b' ' | b'\t') => State::LengthValue(number, Text::After),
            (Text::Inside | Text::After, b'\r') => {
                self.head.length = Some(number);
                self.field_ends(at);
                return Ok(1);
            }
            (_, b'\n') => return Err(Violation::BareLineFeed),
            _ => return Err(Violation::Length),
        };
        Ok(1)
    }

    /// Codings are compared without regard to case (RFC 9112, section 7).
    fn coding_value(&mut self, matched: usize, text: Text, byte: u8, at: usize) -> Result<usize, Violation> {
        let whole = matched == b"chunked".len();
        self.state = match byte {
            b' ' | b'\t' if text == Text::Before => State::CodingValue(0, Text::Before),
            b' ' | b'\t' if whole => State::CodingValue(matched, Text::After),
            b'\r' if whole => {
                self.head.chunked = true;
                self.field_ends(at);
                return Ok(1);
            }
            b'\n' => return Err(Violation::BareLineFeed),
            byte if b"chunked".get(matched) == Some(&byte.to_ascii_lowercase()) => {
                State::CodingValue(matched + 1, Text::Inside)
            }
            _ => return Err(Violation::Coding),
        };
        Ok(1)
    }

    fn line_feed(&mut self, byte: u8) -> Result<usize, Violation> {
        if byte != b'\n' {
            return Err(Violation::StrayCarriageReturn);
        }
        self.state = State::FieldStart;
        Ok(1)
    }

    /// The last line feed of a head or of trailers.
    fn section_end(&mut self, byte: u8, at: usize) -> Result<(), Violation> {
        if byte != b'\n' {
            return Err(Violation::StrayCarriageReturn);
        }
        self.state = if self.in_trailers { self.message_end() } else { self.head_end(at + 1)? };
        Ok(())
    }

    fn head_end(&mut self, bytes: usize) -> Result<State, Violation> {
        if self.head.http_1_1 && !self.host {
            return Err(Violation::NoHost);
        }
        let head = Scanned { bytes, ..std::mem::take(&mut self.head) };
        self.heads += 1;
        self.extensions_left = EXTENSION_BYTES_MAX;
        let state = match head.length {
            _ if head.chunked => State::ChunkSize(0, 0),
            Some(length) if length > 0 => State::Body(length),
            _ => self.message_end(),
        };
        self.scanned.push_back(head);
        Ok(state)
    }
}

/// The fields that decide where a message ends, or whose it is.
#[derive(Clone, Copy)]
enum Field {
    Host,
    ContentLength,
    TransferEncoding,
    Other,
}

impl Field {
    fn of(name: &[u8]) -> Field {
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => Field::Host,
            14 if name.eq_ignore_ascii_case(b"content-length") => Field::ContentLength,
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => Field::TransferEncoding,
            _ => Field::Other,
        }
    }
}
