//! What a request can be refused for before it is one.

use std::error::Error;
use std::fmt;
use std::time::Duration;

/// What is wrong with the bytes of a connection. `Display` is a sentence that may be shown to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A line ends in LF without CR.
    BareLineFeed,
    /// A CR that no LF follows.
    StrayCarriageReturn,
    /// More than four empty lines before a request line.
    EmptyLines,
    /// Not `METHOD SP target SP HTTP/1.x`.
    RequestLine,
    /// A field name that is empty, not a token, or has no colon.
    FieldName,
    /// White space between a field name and its colon.
    SpaceBeforeColon,
    /// A field line that begins with white space (obs-fold).
    FoldedField,
    /// A control character in a field value.
    FieldValue,
    /// A head of more bytes than this.
    HeadTooLarge(usize),
    /// More field lines than this.
    TooManyFields(usize),
    /// HTTP/1.1 without `Host`.
    NoHost,
    /// More than one `Host` line.
    SeveralHosts,
    /// Both framings at once, in either order.
    LengthAndCoding,
    /// More than one `Content-Length` line.
    SeveralLengths,
    /// A `Content-Length` that is not a decimal number below 2^63.
    Length,
    /// A `Transfer-Encoding` that is not one line saying `chunked`, or in HTTP/1.0.
    Coding,
    /// A malformed chunk, or too many bytes of chunk extensions.
    Chunk,
    /// Trailer fields that are too large, too many or about framing.
    Trailers,
    /// The head was not complete this long after its first byte.
    HeadTimeout(Duration),
}

impl Violation {
    /// The status that answers it: 400, 408 or 431.
    pub fn status(&self) -> u16 {
        match self {
            Violation::HeadTooLarge(_) | Violation::TooManyFields(_) => 431,
            Violation::HeadTimeout(_) => 408,
            _ => 400,
        }
    }

    /// The violation at the root of an error that came out of a request's body, if there is one.
    pub fn at_root_of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Violation> {
        let mut next = Some(error);
        while let Some(error) = next {
            // The `source` of an `io::Error` is that of the error inside it, not the error itself.
            let inner = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
            if let Some(violation) = inner.and_then(|inner| inner.downcast_ref()) {
                return Some(violation);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sentence = match self {
            Violation::BareLineFeed => "A line of the request ends in LF alone; every line must end in CRLF.",
            Violation::StrayCarriageReturn => "A CR in the request is not followed by LF.",
            Violation::EmptyLines => "More than 4 empty lines came before the request line.",
            Violation::RequestLine => {
                "The request line must be a method, a target without control characters, and HTTP/1.1 or \
                 HTTP/1.0, separated by single spaces."
            }
            Violation::FieldName => {
                "A header line has no valid name: it must be a token followed by a colon."
            }
            Violation::SpaceBeforeColon => "A header line has white space before its colon.",
            Violation::FoldedField => "A header line begins with white space; folded lines are not allowed.",
            Violation::FieldValue => "A header value contains a control character.",
            Violation::HeadTooLarge(bytes) => {
                return write!(f, "The request head is larger than the {bytes} bytes allowed.");
            }
            Violation::TooManyFields(lines) => {
                return write!(f, "The request has more than the {lines} header lines allowed.");
            }
            Violation::NoHost => "The request has no Host header; HTTP/1.1 requires one.",
            Violation::SeveralHosts => "The request has more than one Host header.",
            Violation::LengthAndCoding => {
                "The request has both Content-Length and Transfer-Encoding; only one may frame its body."
            }
            Violation::SeveralLengths => "The request has more than one Content-Length header.",
            Violation::Length => "Content-Length must be a single decimal number below 2^63.",
            Violation::Coding => {
                "Transfer-Encoding must be one header saying exactly `chunked`, in HTTP/1.1 only."
            }
            Violation::Chunk => "The chunked body is malformed.",
            Violation::Trailers => "The trailer section of the chunked body is too large or not allowed.",
            Violation::HeadTimeout(limit) => {
                return write!(f, "The request head was not complete {limit:?} after its first byte.");
            }
        };
        f.write_str(sentence)
    }
}

impl Error for Violation {}
