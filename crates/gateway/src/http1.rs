//! Where a body ends in HTTP/1.1 (RFC 9112, sections 6 and 7), of requests and of answers. Pure: bytes in, values out.

use bytes::{Buf, Bytes, BytesMut};

/// Of one body together.
const EXTENSION_BYTES_MAX: usize = 16 << 10;
const TRAILER_BYTES_MAX: usize = 16 << 10;
const SIZE_DIGITS_MAX: u8 = 16;

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// What of a body is still to come.
#[derive(Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    Ended,
    /// That many bytes; never zero.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
    /// Everything until the connection ends.
    UntilClosed,
}

impl Body {
    /// One of so many bytes.
    pub fn of_length(length: u64) -> Self {
        if length == 0 { Self::Ended } else { Self::Length(length) }
    }

    /// One in chunks.
    pub fn chunked() -> Self {
        Self::Chunked(Chunks::default())
    }

    /// Takes what of the body was received; empty: more must come, or it has ended.
    ///
    /// # Errors
    /// When it is framed wrongly, once everything before was taken.
    pub fn take(&mut self, received: &mut BytesMut) -> Result<Bytes, Malformed> {
        match self {
            Self::Ended => Ok(Bytes::new()),
            Self::UntilClosed => Ok(received.split().freeze()),
            Self::Length(left) => {
                let taken = usize::try_from(*left).map_or(received.len(), |left| left.min(received.len()));
                *left -= taken as u64;
                if *left == 0 {
                    *self = Self::Ended;
                }
                Ok(received.split_to(taken).freeze())
            }
            Self::Chunked(chunks) => {
                let decoded = chunks.decode(received)?;
                if chunks.state == Chunk::Ended {
                    *self = Self::Ended;
                }
                let data = received.split_to(decoded.data).freeze();
                received.advance(decoded.taken - decoded.data);
                Ok(data)
            }
        }
    }

    /// How many of the next bytes are certainly part of it; `None`: not one for sure.
    pub fn certain(&self) -> Option<usize> {
        let left = match self {
            Self::Length(left) | Self::Chunked(Chunks { state: Chunk::Data(left), .. }) => *left,
            Self::UntilClosed => u64::MAX,
            Self::Ended | Self::Chunked(_) => return None,
        };
        Some(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Whether all of it was taken.
    pub fn is_ended(&self) -> bool {
        *self == Self::Ended
    }
}

/// Where in a chunked body the next byte falls.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunks {
    state: Chunk,
    extensions_left: usize,
    trailers_left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    /// The size so far and its digits.
    Size(u64, u8),
    Extension(u64),
    SizeLf(u64),
    /// Bytes left of a chunk; never zero.
    Data(u64),
    DataCr,
    DataLf,
    /// At the beginning of a line behind the last chunk.
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
    Ended,
    /// Something else came.
    Broken,
}

/// Of bytes received: how many were taken, and how much data, which now stands at their beginning.
struct Decoded {
    taken: usize,
    data: usize,
}

impl Default for Chunks {
    fn default() -> Self {
        let (extensions_left, trailers_left) = (EXTENSION_BYTES_MAX, TRAILER_BYTES_MAX);
        Self { state: Chunk::Size(0, 0), extensions_left, trailers_left }
    }
}

impl Chunks {
    /// Moves the data of the chunks together. What is wrong is said when the data before it was given out.
    fn decode(&mut self, bytes: &mut [u8]) -> Result<Decoded, Malformed> {
        let (mut at, mut data) = (0, 0);
        while at < bytes.len() && !matches!(self.state, Chunk::Ended | Chunk::Broken) {
            if let Chunk::Data(left) = self.state {
                let length = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                bytes.copy_within(at..at + length, data);
                (at, data) = (at + length, data + length);
                let left = left - length as u64;
                self.state = if left == 0 { Chunk::DataCr } else { Chunk::Data(left) };
            } else {
                self.state = self.step(bytes[at]);
                at += 1;
            }
        }
        if self.state == Chunk::Broken && data == 0 {
            return Err(Malformed("chunks that are none"));
        }
        Ok(Decoded { taken: at, data })
    }

    /// Where the byte behind this one falls, which is not data.
    fn step(&mut self, byte: u8) -> Chunk {
        match (self.state, byte) {
            (Chunk::Size(size, digits), byte) if digits < SIZE_DIGITS_MAX && byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).map_or(0, u64::from);
                Chunk::Size(size << 4 | digit, digits + 1)
            }
            (Chunk::Size(_, 0), _) => Chunk::Broken,
            (Chunk::Size(size, _) | Chunk::Extension(size), b'\r') => Chunk::SizeLf(size),
            (Chunk::Size(size, _), b';' | b' ' | b'\t') => self.extension(size),
            (Chunk::Extension(size), byte) if byte != b'\n' => self.extension(size),
            (Chunk::SizeLf(0), b'\n') => Chunk::TrailerStart,
            (Chunk::SizeLf(size), b'\n') => Chunk::Data(size),
            (Chunk::DataCr, b'\r') => Chunk::DataLf,
            (Chunk::DataLf, b'\n') => Chunk::Size(0, 0),
            (Chunk::TrailerStart, b'\r') => Chunk::EndLf,
            (Chunk::Trailer, b'\r') => Chunk::TrailerLf,
            (Chunk::TrailerStart | Chunk::Trailer, byte) if byte != b'\n' && self.trailers_left > 0 => {
                self.trailers_left -= 1;
                Chunk::Trailer
            }
            (Chunk::TrailerLf, b'\n') => Chunk::TrailerStart,
            (Chunk::EndLf, b'\n') => Chunk::Ended,
            _ => Chunk::Broken,
        }
    }

    fn extension(&mut self, size: u64) -> Chunk {
        self.extensions_left = self.extensions_left.saturating_sub(1);
        if self.extensions_left == 0 { Chunk::Broken } else { Chunk::Extension(size) }
    }
}
