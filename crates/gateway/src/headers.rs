//! The one place where limits become headers, and where headers cross the gateway.
//!
//! Both crossings are by allow-list: a header nobody thought of stays on its side.

use std::borrow::Cow;
use std::time::Duration;

use bytes::BytesMut;
use serde_json::Value;
use tollgate_limiter::{Denial, Limit, Millis, Reservation, Retry, Source, Standing, Unit};

use crate::fields::Fields;
use crate::ids::{RequestId, TRACEPARENT, TRACESTATE, Trace, X_REQUEST_ID};

/// A wait longer than this is not worth a client's own retry.
const RETRY_WORTHWHILE_MAX: Duration = Duration::from_secs(60);

/// Header fields of an answer, as they are written: lines that each end in CRLF.
///
/// An answer has many and nobody looks one up, so they are never a map.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

/// Room for the fields of an answer as most are; allocators have as much at hand, and a little more not.
const LINES_BYTES: usize = 1000;

impl Lines {
    /// None, with room for many.
    pub fn new() -> Self {
        Self(Vec::with_capacity(LINES_BYTES))
    }

    /// Adds a field, unless its value is none (RFC 9110, 5.5): configured names may hold anything.
    pub fn add(&mut self, name: &str, value: &[u8]) {
        let control = |byte: u8| (byte < b' ' && byte != b'\t') || byte == 0x7f;
        if !value.iter().fold(false, |found, byte| found | control(*byte)) {
            self.add_own(name, value);
        }
    }

    /// Adds a field with a value of ours.
    fn add_own(&mut self, name: &str, value: &[u8]) {
        self.0.reserve(name.len() + value.len() + b": \r\n".len());
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            self.0.extend_from_slice(part);
        }
    }

    /// Adds a field whose value `write` writes: words and numbers of ours.
    fn add_written(&mut self, name: &str, write: impl FnOnce(&mut Text<'_>)) {
        for part in [name.as_bytes(), b": "] {
            self.0.extend_from_slice(part);
        }
        write(&mut Text(&mut self.0));
        self.0.extend_from_slice(b"\r\n");
    }

    /// Adds whole lines that `write` writes: words and numbers of ours.
    fn written(&mut self, write: impl FnOnce(&mut Text<'_>)) {
        write(&mut Text(&mut self.0));
    }

    /// Adds a field whose value is a number.
    fn add_number(&mut self, name: &str, value: u64) {
        self.add_own(name, itoa::Buffer::new().format(value).as_bytes());
    }

    /// All of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let lines = self.0.split(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\r"));
        lines.filter_map(|line| {
            let colon = memchr::memchr(b':', line)?;
            Some((&line[..colon], line.get(colon + 2..)?))
        })
    }
}

/// Text that is being written, behind whatever is there.
struct Text<'a>(&'a mut Vec<u8>);

impl Text<'_> {
    fn text(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    fn number(&mut self, number: u64) {
        self.text(itoa::Buffer::new().format(number));
    }
}

const CONTENT_TYPE: &str = "content-type";
/// Whether a client should try again by itself.
pub const SHOULD_RETRY: &str = "x-should-retry";

/// What goes to a provider from the caller's headers; its credentials, address and cookies never do.
const TO_PROVIDER: [&str; 3] = ["accept", "openai-beta", "idempotency-key"];

/// What comes back from a provider, besides `openai-*` and `anthropic-*` (without their limits).
const FROM_PROVIDER: [&str; 3] = [CONTENT_TYPE, "content-disposition", "cache-control"];

/// The content type of a multipart body.
pub fn multipart(sent: &Fields) -> Option<&str> {
    const KIND: &[u8] = b"multipart/";
    let content_type = sent.get(CONTENT_TYPE)?;
    let kind = content_type.get(..KIND.len())?;
    if !kind.eq_ignore_ascii_case(KIND) || !content_type.is_ascii() {
        return None;
    }
    str::from_utf8(content_type).ok()
}

/// On every answer: which request it was.
pub fn request(lines: &mut Lines, request_id: &RequestId) {
    lines.add_own(X_REQUEST_ID, request_id.as_bytes());
}

/// What a provider is sent along with the body besides [`TO_EVERY_PROVIDER`], as lines of a head: never anything about
/// the body's length.
pub fn to_provider(
    head: &mut BytesMut,
    sent: &Fields,
    content_type: &[u8],
    trace: &Trace,
    request_id: &RequestId,
) {
    for name in TO_PROVIDER {
        if let Some(value) = sent.get(name) {
            line(head, name, &[value]);
        }
    }
    line(head, CONTENT_TYPE, &[content_type]);
    line(head, X_REQUEST_ID, &[request_id.as_bytes()]);
    line(head, TRACEPARENT, &[&trace.parent()]);
    if let Some(state) = &trace.state {
        line(head, TRACESTATE, &[state]);
    }
}

/// What is sent to a provider with every request.
pub const TO_EVERY_PROVIDER: &[u8] =
    concat!("user-agent: tollgate/", env!("CARGO_PKG_VERSION"), "\r\naccept-encoding: identity\r\n")
        .as_bytes();

/// Writes one header field. The parts of its value come from values of header fields or are our own.
pub fn line(head: &mut BytesMut, name: &str, value: &[&[u8]]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    value.iter().for_each(|part| head.extend_from_slice(part));
    head.extend_from_slice(b"\r\n");
}

/// What the caller gets of a provider's header fields.
pub fn from_provider(lines: &mut Lines, sent: &Fields) {
    let mut request_id = None;
    for (theirs, value) in sent.iter() {
        let is = |name: &str| theirs.eq_ignore_ascii_case(name.as_bytes());
        let begins =
            |with: &[u8]| theirs.get(..with.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(with));
        let dialect = begins(b"openai-") || begins(b"anthropic-") && !begins(b"anthropic-ratelimit-");
        if let Some(name) = FROM_PROVIDER.into_iter().find(|name| is(name)) {
            lines.add(name, value);
        } else if dialect {
            lines.add(&String::from_utf8_lossy(theirs).to_ascii_lowercase(), value);
        } else if is(X_REQUEST_ID) {
            request_id = Some(value);
        }
    }
    if let Some(request_id) = request_id {
        lines.add("x-upstream-request-id", request_id);
    }
}

/// Who answered, and what took how long.
pub fn provider(lines: &mut Lines, name: &str, limit: Duration, upstream: Duration) {
    lines.add("x-tollgate-provider", name.as_bytes());
    lines.add_written("server-timing", |timing| {
        for (what, took) in [("limit;dur=", limit), (", upstream;dur=", upstream)] {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            timing.text(what);
            timing.number(micros / 1_000);
            let hundredths = [micros / 100 % 10, micros / 10 % 10].map(|digit| b'0' + digit as u8);
            timing.0.extend_from_slice(&[b'.', hundredths[0], hundredths[1]]);
        }
    });
}

/// How long to wait, in the two forms clients read; `None`: for ever.
pub fn retry_after(lines: &mut Lines, wait: Option<Duration>) {
    if let Some(wait) = wait {
        let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        lines.add_number("retry-after", millis.div_ceil(1_000));
        lines.add_number("retry-after-ms", millis);
    }
    if wait.is_none_or(|wait| wait > RETRY_WORTHWHILE_MAX) {
        lines.add_own(SHOULD_RETRY, b"false");
    }
}

/// What the headers of some limits say every time: written once for all requests that meet them.
#[derive(Debug)]
pub struct Words {
    /// `RateLimit-Policy`.
    policy: Box<str>,
    /// What is said of each limit.
    limits: Vec<Said>,
}

/// What headers say of one limit every time, up to how much of it is left.
#[derive(Clone, Debug)]
struct Said {
    /// Of this capacity: where a limit is shared out, each has less for a while.
    capacity: u64,
    /// Where it is the one that matters most.
    general: Box<str>,
    /// Where it is the one that matters most in its unit; empty where that has no headers.
    of_unit: Box<str>,
    /// In `RateLimit`.
    item: Box<str>,
}

impl Said {
    fn of(limit: &Limit) -> Self {
        let lines = |unit: &str| {
            let (name, remaining) =
                (format!("x-ratelimit-limit{unit}"), format!("x-ratelimit-remaining{unit}"));
            format!("{name}: {}\r\n{remaining}: ", limit.capacity()).into_boxed_str()
        };
        let of_unit = match limit.unit() {
            Unit::Requests => lines("-requests"),
            Unit::Tokens => lines("-tokens"),
            _ => Box::default(),
        };
        let mut item = String::new();
        quote(&mut item, limit.id());
        Self { capacity: limit.capacity(), general: lines(""), of_unit, item: (item + ";r=").into() }
    }

    /// The same of this limit, which may be a share of the one that it was written for.
    fn of_share(&self, limit: &Limit) -> Cow<'_, Self> {
        if self.capacity == limit.capacity() { Cow::Borrowed(self) } else { Cow::Owned(Self::of(limit)) }
    }
}

impl Words {
    /// Of these limits, in this order.
    pub fn of<'a>(limits: impl Iterator<Item = &'a Limit> + Clone) -> Self {
        let mut policy = String::new();
        for (index, limit) in limits.clone().filter(|limit| is_shown(limit, None)).enumerate() {
            policy_item(&mut policy, index, limit);
        }
        Self { policy: policy.into(), limits: limits.map(Said::of).collect() }
    }
}

/// What the limits say to a request that was let through; `words` are those of the same limits.
pub fn granted(reservation: &Reservation, words: &Words) -> Lines {
    let mut lines = Lines::new();
    let standings = reservation.standings();
    if !standings.is_empty() {
        let families = Families { standings, refusing: None, now: reservation.now(), words };
        families.write(&mut lines);
        source(&mut lines, reservation.source());
    }
    lines
}

/// The headers of a 429; `words` are those of the limits that were met.
pub fn denial(lines: &mut Lines, denial: &Denial, words: &Words) {
    retry_after(lines, wait(denial));
    let refusing = Some(denial.binding());
    let families = Families { standings: denial.standings(), refusing, now: denial.now(), words };
    families.write(lines);
    source(lines, denial.source());
}

/// Who decided.
pub fn source(lines: &mut Lines, source: Source) {
    lines.add_own("x-tollgate-source", source.as_str().as_bytes());
}

/// What the body of a 429 has besides what every error has.
pub fn denial_fields(denial: &Denial) -> [(&'static str, Value); 5] {
    let standing = denial.binding();
    let retry_after_ms = wait(denial).map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    [
        ("rule", standing.limit.id().into()),
        ("scope", standing.limit.scope().to_string().into()),
        ("limit", standing.limit.capacity().into()),
        ("used", standing.used.into()),
        ("retry_after_ms", retry_after_ms.into()),
    ]
}

/// The sentence of a 429.
pub fn denial_sentence(denial: &Denial) -> String {
    let Standing { limit, used, requested, .. } = denial.binding();
    let advice = match wait(denial) {
        Some(wait) => {
            let mut advice = b"Please try again in ".to_vec();
            go_duration(&mut Text(&mut advice), wait);
            String::from_utf8(advice).unwrap_or_default() + "."
        }
        None => "It asks for more than the limit ever allows.".to_owned(),
    };
    let amount = |amount| limit.quota().show(amount);
    format!(
        "Rate limit reached: {} (per {}) on {}. Limit {}, Used {}, Requested {}. {advice}",
        limit.id(),
        limit.scope(),
        limit.unit(),
        amount(limit.capacity()),
        amount(*used),
        amount(*requested),
    )
}

fn wait(denial: &Denial) -> Option<Duration> {
    match denial.retry() {
        Retry::After(wait) => Some(Duration::from_millis(wait.get())),
        Retry::Now => Some(Duration::ZERO),
        Retry::Never => None,
    }
}

/// Whether a limit appears in the header families. Shadows never do; calls in flight only when they refuse: how many
/// are left says nothing a moment later.
fn is_shown(limit: &Limit, refusing: Option<&Limit>) -> bool {
    let refuses = refusing.is_some_and(|refusing| std::ptr::eq(refusing, limit));
    !limit.is_shadow() && (limit.unit() != Unit::Concurrency || refuses)
}

/// The limits of one answer, as headers.
struct Families<'a> {
    standings: &'a [Standing],
    refusing: Option<&'a Standing>,
    now: Millis,
    words: &'a Words,
}

/// What one limit says now, and what it says every time.
type Shown<'a> = (&'a Standing, &'a Said);

impl<'a> Families<'a> {
    fn shown(&self) -> impl Iterator<Item = Shown<'a>> {
        let refusing = self.refusing.map(|standing| &*standing.limit);
        let all = self.standings.iter().zip(&self.words.limits);
        all.filter(move |(standing, _)| is_shown(&standing.limit, refusing))
    }

    /// The one that refused.
    fn refusing(&self) -> Option<Shown<'a>> {
        let refusing = self.refusing?;
        self.shown().find(|(standing, _)| std::ptr::eq(*standing, refusing))
    }

    /// The one that refused; else that with the least left of its limit, of equals that with the shortest window.
    fn binding(&self, unit: Unit) -> Option<Shown<'a>> {
        if self.refusing.is_some_and(|standing| standing.limit.unit() == unit) {
            return self.refusing();
        }
        let of_unit = self.shown().filter(|(standing, _)| standing.limit.unit() == unit);
        of_unit.min_by(|(a, _), (b, _)| {
            // a.remaining / a.capacity against b.remaining / b.capacity, without division.
            let left = u128::from(a.remaining) * u128::from(b.limit.capacity());
            let right = u128::from(b.remaining) * u128::from(a.limit.capacity());
            left.cmp(&right).then(a.limit.window().longest().cmp(&b.limit.window().longest()))
        })
    }

    fn write(&self, lines: &mut Lines) {
        let requests = self.binding(Unit::Requests);
        if let Some((general, said)) = self.refusing().or(requests) {
            lines.written(|text| {
                text.text(&said.of_share(&general.limit).general);
                text.number(general.remaining);
                text.text("\r\nx-ratelimit-reset: ");
                text.number(Millis(self.now.get() + general.reset.get()).ceil_secs());
                text.text("\r\n");
            });
        }
        for (binding, reset) in [
            (requests, "\r\nx-ratelimit-reset-requests: "),
            (self.binding(Unit::Tokens), "\r\nx-ratelimit-reset-tokens: "),
        ] {
            let Some((binding, said)) = binding else { continue };
            lines.written(|text| {
                text.text(&said.of_share(&binding.limit).of_unit);
                text.number(binding.remaining);
                text.text(reset);
                go_duration(text, Duration::from_millis(binding.reset.get()));
                text.text("\r\n");
            });
        }
        // Calls in flight are part of the policy only where they refuse.
        if self.refusing.is_some_and(|standing| standing.limit.unit() == Unit::Concurrency) {
            let mut policy = String::new();
            for (index, (standing, _)) in self.shown().enumerate() {
                policy_item(&mut policy, index, &standing.limit);
            }
            lines.add_own(POLICY, policy.as_bytes());
        } else if !self.words.policy.is_empty() {
            lines.add_own(POLICY, self.words.policy.as_bytes());
        }
        if self.shown().next().is_some() {
            lines.add_written("ratelimit", |text| {
                for (index, (standing, said)) in self.shown().enumerate() {
                    text.text(if index > 0 { ", " } else { "" });
                    text.text(&said.item);
                    text.number(standing.remaining);
                    text.text(";t=");
                    text.number(standing.reset.ceil_secs());
                }
            });
        }
    }
}

fn policy_item(text: &mut String, index: usize, limit: &Limit) {
    text.push_str(if index > 0 { ", " } else { "" });
    quote(text, limit.id());
    push(text, ";q=", limit.capacity());
    push(text, ";w=", limit.window().longest().ceil_secs());
}

const POLICY: &str = "ratelimit-policy";

/// A name and a number.
fn push(out: &mut String, name: &str, value: u64) {
    out.push_str(name);
    out.push_str(itoa::Buffer::new().format(value));
}

/// A string of structured fields (RFC 9651 3.3.3): printable ASCII; anything else of a name becomes `?`.
fn quote(out: &mut String, text: &str) {
    out.push('"');
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\') {
        out.push_str(text);
    } else {
        for character in text.chars() {
            match character {
                '"' | '\\' => out.extend(['\\', character]),
                ' '..='~' => out.push(character),
                _ => out.push('?'),
            }
        }
    }
    out.push('"');
}

/// As Go prints a `time.Duration`, which is how OpenAI writes resets: `6m0s`, `40.21s`, `17ms`, `0s`.
fn go_duration(out: &mut Text<'_>, duration: Duration) {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if (1..1_000).contains(&millis) {
        out.number(millis);
        out.text("ms");
        return;
    }
    let (hours, minutes, fraction) = (millis / 3_600_000, millis / 60_000 % 60, millis % 1_000);
    if hours > 0 {
        out.number(hours);
        out.text("h");
    }
    if hours > 0 || minutes > 0 {
        out.number(minutes);
        out.text("m");
    }
    out.number(millis / 1_000 % 60);
    if fraction > 0 {
        // A leading one keeps the zeroes behind the point.
        let mut digits = itoa::Buffer::new();
        out.text(".");
        out.text(digits.format(1_000 + fraction)[1..].trim_end_matches('0'));
    }
    out.text("s");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tollgate_limiter::{Algorithm, Charge, Decision, ManualClock, MemoryStore, Scope};

    use super::*;

    #[test]
    fn durations_as_go_prints_them() {
        for (millis, expected) in [
            (0, "0s"),
            (17, "17ms"),
            (1_000, "1s"),
            (10_000, "10s"),
            (40_210, "40.21s"),
            (40_001, "40.001s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (3_600_000, "1h0m0s"),
            (86_399_999, "23h59m59.999s"),
        ] {
            let mut written = Vec::new();
            go_duration(&mut Text(&mut written), Duration::from_millis(millis));
            assert_eq!(String::from_utf8(written).unwrap(), expected);
        }
    }

    #[test]
    fn a_share_says_what_it_is() {
        let limit = |quota: &str| {
            let quota = quota.parse().expect("a quota");
            Arc::new(Limit::new("r", quota, Algorithm::FixedWindow, Scope::GLOBAL).expect("a limit"))
        };
        let whole = limit("60/minute");
        let words = Words::of([&*whole].into_iter());
        for (limit, capacity) in [(whole, 60), (limit("30/minute"), 30)] {
            let store = MemoryStore::new(ManualClock::default());
            let subject = Scope::GLOBAL.subject(|_| unreachable!("it has no dimension"));
            let charge = Charge::new(limit, subject, 1);
            let Decision::Granted(reservation) = store.reserve([charge]) else { panic!("there is room") };
            let lines = granted(&reservation, &words);
            for name in ["x-ratelimit-limit", "x-ratelimit-limit-requests"] {
                let said = lines.iter().find(|(line, _)| *line == name.as_bytes()).map(|(_, value)| value);
                assert_eq!(said, Some(capacity.to_string().as_bytes()), "{name}");
            }
        }
    }

    #[test]
    fn what_no_value_can_hold_is_left_out() {
        let mut lines = Lines::new();
        for value in [&b"a b\t\xe9"[..], b"", b"a\r\nx: y", b"a\n", b"\x00", b"\x7f"] {
            lines.add("name", value);
        }
        lines.add_number("number", 7);
        let all: Vec<(&[u8], &[u8])> = lines.iter().collect();
        assert_eq!(all, [(&b"name"[..], &b"a b\t\xe9"[..]), (b"name", b""), (b"number", b"7")]);
        assert_eq!(lines.as_bytes(), b"name: a b\t\xe9\r\nname: \r\nnumber: 7\r\n");
    }

    #[test]
    fn providers_keep_their_limits_to_themselves() {
        let sent = [
            ("Content-Type", "application/json"),
            ("x-ratelimit-limit-requests", "7"),
            ("anthropic-ratelimit-requests-limit", "7"),
            ("Anthropic-Ratelimit-Requests-Limit", "7"),
            ("anthropic-organization-id", "o"),
            ("openai-processing-ms", "3"),
            ("set-cookie", "s"),
            ("X-Request-Id", "theirs"),
            ("retry-after", "9"),
        ];
        let mut got = Lines::new();
        from_provider(&mut got, &Fields::from_iter(sent));
        let mut names: Vec<&str> = got.iter().map(|(name, _)| std::str::from_utf8(name).unwrap()).collect();
        names.sort_unstable();
        let expected =
            ["anthropic-organization-id", "content-type", "openai-processing-ms", "x-upstream-request-id"];
        assert_eq!(names, expected);
    }
}
