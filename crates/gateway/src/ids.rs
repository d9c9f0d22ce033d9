//! What a request is known by: its id, and the trace it belongs to.

use std::fmt;

use bytes::Bytes;

use crate::fields::Fields;

/// The field a request's id comes and goes in.
pub const X_REQUEST_ID: &str = "x-request-id";

/// W3C Trace Context, level 1.
pub const TRACEPARENT: &str = "traceparent";
/// What belongs to it.
pub const TRACESTATE: &str = "tracestate";

/// Longest request id taken over from a caller.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// A request's id: 1 to 64 bytes of visible ASCII. In place: each request is remembered for a while with its own.
#[derive(Clone, Copy)]
pub struct RequestId {
    text: [u8; REQUEST_ID_BYTES_MAX],
    length: u8,
}

impl RequestId {
    /// The caller's where it is short and printable, else a new one.
    pub fn of(sent: &Fields) -> Self {
        sent.get(X_REQUEST_ID).and_then(Self::parse).unwrap_or_else(|| {
            let mut id = *b"req_00000000000000000000000000000000";
            id[4..].copy_from_slice(&Hex::of(fastrand::u128(..)).0);
            Self::filled(&id)
        })
    }

    /// Of this text; `None`: it is none.
    pub fn parse(id: &[u8]) -> Option<Self> {
        let printable = id.iter().all(u8::is_ascii_graphic);
        ((1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && printable).then(|| Self::filled(id))
    }

    fn filled(id: &[u8]) -> Self {
        let mut text = [0; REQUEST_ID_BYTES_MAX];
        text[..id.len()].copy_from_slice(id);
        Self { text, length: id.len() as u8 }
    }

    /// As it is written in a header field.
    pub fn as_bytes(&self) -> &[u8] {
        &self.text[..usize::from(self.length)]
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The trace a request belongs to.
pub struct Trace {
    /// By which it is known.
    pub id: TraceId,
    flags: [u8; 2],
    /// What other tracers want passed on with it.
    pub state: Option<Bytes>,
}

impl Trace {
    /// The caller's trace, or a new one where it sent none that is valid.
    pub fn of(sent: &Fields) -> Self {
        let parent = sent.get(TRACEPARENT).and_then(|value| parse_traceparent(str::from_utf8(value).ok()?));
        match parent {
            Some((id, flags)) => Self { id, flags, state: sent.owned(TRACESTATE) },
            None => Self { id: TraceId(Hex::of(fastrand::u128(1..))), flags: *b"00", state: None },
        }
    }

    /// A `traceparent` for what is asked on its behalf, with a new span each time.
    pub fn parent(&self) -> [u8; 55] {
        let span = Hex::of(u128::from(fastrand::u64(1..)) << 64);
        let mut parent = *b"00-00000000000000000000000000000000-0000000000000000-00";
        parent[3..35].copy_from_slice(&self.id.0.0);
        parent[36..52].copy_from_slice(&span.0[..16]);
        parent[53..].copy_from_slice(&self.flags);
        parent
    }
}

/// W3C trace id.
#[derive(Clone, Copy, Debug)]
pub struct TraceId(Hex);

impl TraceId {
    /// 32 hex digits.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.0.0).unwrap_or_default()
    }
}

/// `00-<trace>-<parent>-<flags>`: trace and flags.
fn parse_traceparent(value: &str) -> Option<(TraceId, [u8; 2])> {
    let mut parts = value.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let zero = |text: &str| text.bytes().all(|byte| byte == b'0');
    let valid = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    // Version 00 has nothing after the flags; later versions may.
    let complete = version != "ff" && (version != "00" || parts.next().is_none());
    if !valid || !complete || zero(trace) || zero(parent) {
        return None;
    }
    Some((TraceId(Hex(trace.as_bytes().try_into().ok()?)), flags.as_bytes().try_into().ok()?))
}

/// 32 hex digits.
#[derive(Clone, Copy, Debug)]
struct Hex([u8; 32]);

impl Hex {
    fn of(value: u128) -> Self {
        let mut digits = [0; 32];
        for (two, byte) in digits.chunks_exact_mut(2).zip(value.to_be_bytes()) {
            two.copy_from_slice(&PAIRS[usize::from(byte)]);
        }
        Self(digits)
    }
}

/// Each byte in hex.
static PAIRS: [[u8; 2]; 256] = {
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [b"0123456789abcdef"[byte >> 4], b"0123456789abcdef"[byte & 15]];
        byte += 1;
    }
    pairs
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        for (value, expected) in [
            (format!("00-{trace}-00f067aa0ba902b7-01"), true),
            (format!("cc-{trace}-00f067aa0ba902b7-01-more"), true),
            (format!("00-{trace}-00f067aa0ba902b7-01-more"), false),
            (format!("ff-{trace}-00f067aa0ba902b7-01"), false),
            (format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)), false),
            (format!("00-{trace}-0000000000000000-01"), false),
            (format!("00-{}-00f067aa0ba902b7-01", trace.to_uppercase()), false),
            ("00".to_owned(), false),
        ] {
            assert_eq!(parse_traceparent(&value).is_some(), expected, "{value}");
        }
    }

    #[test]
    fn what_is_asked_belongs_to_the_same_trace() {
        let sent = format!("00-{}-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736");
        let trace = Trace::of(&Fields::from_iter([(TRACEPARENT, &*sent), (TRACESTATE, "a=b")]));
        let [one, two] =
            [trace.parent(), trace.parent()].map(|said| str::from_utf8(&said).unwrap().to_owned());
        assert!(parse_traceparent(&one).is_some() && one != two && one != sent, "{one} {two}");
        assert!(one.starts_with(&sent[..36]) && one.ends_with("-01"), "{one}");
        assert_eq!(trace.state, Some(Bytes::from("a=b")));
        let new = Trace::of(&Fields::default()).parent();
        assert!(parse_traceparent(str::from_utf8(&new).unwrap()).is_some());
    }

    #[test]
    fn request_ids_are_short_and_printable() {
        let sent = |value: &[u8]| RequestId::of(&Fields::from_iter([(X_REQUEST_ID, value)])).to_string();
        assert_eq!(sent(b"abc-123"), "abc-123");
        assert_eq!(sent(&[b'a'; 64]), "a".repeat(64));
        for bad in [&b""[..], b"a b", b"\xff", &[b'a'; 65]] {
            assert!(sent(bad).starts_with("req_"));
        }
    }

    #[test]
    fn hex_is_as_others_write_it() {
        for value in [0, 1, u128::MAX, 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210] {
            assert_eq!(str::from_utf8(&Hex::of(value).0).unwrap(), format!("{value:032x}"));
        }
    }
}
