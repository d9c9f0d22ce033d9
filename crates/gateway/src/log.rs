//! The log: lines of JSON (or text) to standard error, bounded, never in the way of a request.
//!
//! Lines are appended to one buffer under a lock held for a copy; a thread of its own writes the buffer out in
//! batches. When whoever reads standard error stops reading, the buffer fills to [`BUFFERED_BYTES_MAX`] and further
//! lines are dropped and counted, not waited for.

use std::io::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// Unwritten bytes kept before lines are dropped.
pub const BUFFERED_BYTES_MAX: usize = 4 << 20;

/// Room for a line as most are.
const LINE_BYTES: usize = 640;

/// Lines gathered this long go out as one write, or sooner when they are so many bytes: what is written soon is still in a
/// cache.
const BATCH: Duration = Duration::from_millis(20);
const BATCH_BYTES: usize = 64 << 10;

/// A handle on the log. Clones share one buffer and one writer thread.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    format: LogFormat,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    writing: bool,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Log {
    /// A log that writes to `sink`, from a thread that ends with the process.
    pub fn to(sink: impl Write + Send + 'static, format: LogFormat) -> Self {
        let shared =
            Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), dropped: AtomicU64::new(0) });
        let thread = shared.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || thread.write_out(sink))
            .expect("a process that cannot start one thread cannot start at all");
        Self { shared, format }
    }

    /// The format lines are written in.
    pub fn format(&self) -> LogFormat {
        self.format
    }

    /// How many lines were dropped because nobody read the log.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Writes one line: time, level and message, then the fields that `fields` adds.
    pub fn line(&self, level: &'static str, message: &'static str, fields: impl FnOnce(&mut Line<'_>)) {
        self.line_at(SystemTime::now(), level, message, fields);
    }

    /// The same, of something that happened then.
    pub fn line_at(
        &self,
        time: SystemTime,
        level: &'static str,
        message: &'static str,
        fields: impl FnOnce(&mut Line<'_>),
    ) {
        let mut bytes = Vec::with_capacity(LINE_BYTES);
        let mut line = Line { bytes: &mut bytes, format: self.format };
        line.begin(time, level, message);
        fields(&mut line);
        line.end();
        self.shared.append(&bytes);
    }

    /// Waits until everything appended so far is written, at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let state = self.shared.lock();
        let unwritten = |state: &mut State| state.writing || !state.buffer.is_empty();
        drop(self.shared.changed.wait_timeout_while(state, patience, unwritten));
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.buffer.len() + line.len() > BUFFERED_BYTES_MAX {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let before = state.buffer.len();
        state.buffer.extend_from_slice(line);
        let crossed = before < BATCH_BYTES && before + line.len() >= BATCH_BYTES;
        drop(state);
        if before == 0 || crossed {
            self.changed.notify_all();
        }
    }

    fn write_out(&self, mut sink: impl Write) {
        let mut batch = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            self.changed.notify_all();
            while state.buffer.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.writing = true;
            let few = |state: &mut State| state.buffer.len() < BATCH_BYTES;
            let waited = self.changed.wait_timeout_while(state, BATCH, few);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut batch, &mut state.buffer);
            drop(state);
            // A closed standard error is nobody's to repair: the lines are gone either way.
            let _ = sink.write_all(&batch).and_then(|()| sink.flush());
            batch.clear();
        }
    }
}

/// A line being written. Names are ours; values are escaped.
pub struct Line<'a> {
    bytes: &'a mut Vec<u8>,
    format: LogFormat,
}

impl Line<'_> {
    fn begin(&mut self, time: SystemTime, level: &str, message: &str) {
        let (json, json_text) = ("{\"timestamp\":", "{\"timestamp\":\"");
        self.time(Field { json, json_text, text: "timestamp=" }, time);
        self.word(field!("level"), level);
        self.text(field!("message"), message);
    }

    fn end(&mut self) {
        self.bytes.extend_from_slice(if self.format == LogFormat::Json { b"}\n" } else { b"\n" });
    }

    /// A string.
    pub fn text(&mut self, name: Field, value: &str) {
        // Without branches: looked at many bytes at a time.
        let special = |byte: u8| !matches!(byte, b'!' | b'#'..=b'<' | b'>'..=b'[' | b']'..=b'~');
        let plain = !value.bytes().fold(false, |found, byte| found | special(byte));
        if plain && !value.is_empty() {
            return self.word(name, value);
        }
        self.name(name);
        // Writing a string to memory does not fail.
        drop(serde_json::to_writer(&mut *self.bytes, value));
    }

    /// A word that needs no escaping, as ours do not: visible ASCII without quotes, `\` and `=`, and not empty.
    pub fn word(&mut self, name: Field, value: &str) {
        if self.format == LogFormat::Json {
            self.bytes.extend_from_slice(name.json_text.as_bytes());
            self.bytes.extend_from_slice(value.as_bytes());
            self.bytes.push(b'"');
        } else {
            self.bytes.extend_from_slice(name.text.as_bytes());
            self.bytes.extend_from_slice(value.as_bytes());
        }
    }

    /// An address.
    pub fn address(&mut self, name: Field, value: IpAddr) {
        let IpAddr::V4(address) = value else { return self.display(name, &value) };
        let mut text = [0; "255.255.255.255".len()];
        let mut length = 0;
        for (index, octet) in address.octets().into_iter().enumerate() {
            for part in [if index > 0 { "." } else { "" }, itoa::Buffer::new().format(octet)] {
                text[length..length + part.len()].copy_from_slice(part.as_bytes());
                length += part.len();
            }
        }
        self.word(name, std::str::from_utf8(&text[..length]).unwrap_or_default());
    }

    /// What is written without anything that needs escaping: a time.
    pub fn display(&mut self, name: Field, value: &impl std::fmt::Display) {
        self.name(name);
        let quote: &[u8] = if self.format == LogFormat::Json { b"\"" } else { b"" };
        self.bytes.extend_from_slice(quote);
        let _ = write!(self.bytes, "{value}");
        self.bytes.extend_from_slice(quote);
    }

    /// A time: RFC 3339 with milliseconds, UTC.
    fn time(&mut self, name: Field, value: SystemTime) {
        let time = jiff::Timestamp::try_from(value).unwrap_or_default();
        let time = jiff::tz::Offset::UTC.to_datetime(time);
        let mut text = *b"0000-00-00T00:00:00.000Z";
        for (at, digits, number) in [
            (0, 4, time.year()),
            (5, 2, i16::from(time.month())),
            (8, 2, i16::from(time.day())),
            (11, 2, i16::from(time.hour())),
            (14, 2, i16::from(time.minute())),
            (17, 2, i16::from(time.second())),
            (20, 3, time.millisecond()),
        ] {
            let mut rest = number.unsigned_abs();
            for digit in text[at..at + digits].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
        self.word(name, std::str::from_utf8(&text).unwrap_or_default());
    }

    /// A number.
    pub fn number(&mut self, name: Field, value: u64) {
        self.name(name);
        self.bytes.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    /// A truth value.
    pub fn flag(&mut self, name: Field, value: bool) {
        self.name(name);
        self.bytes.extend_from_slice(if value { b"true" } else { b"false" });
    }

    /// A duration in milliseconds, to the microsecond.
    pub fn millis(&mut self, name: Field, value: Duration) {
        self.name(name);
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        self.bytes.extend_from_slice(itoa::Buffer::new().format(micros / 1_000).as_bytes());
        // A leading one keeps the zeroes behind the point.
        let mut fraction = itoa::Buffer::new();
        self.bytes.push(b'.');
        self.bytes.extend_from_slice(&fraction.format(1_000 + micros % 1_000).as_bytes()[1..]);
    }

    #[inline]
    fn name(&mut self, name: Field) {
        let name = if self.format == LogFormat::Json { name.json } else { name.text };
        self.bytes.extend_from_slice(name.as_bytes());
    }
}

/// The name of a field, as it is written before its value; made by `field!`.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub(crate) json: &'static str,
    /// With the beginning of a string.
    pub(crate) json_text: &'static str,
    pub(crate) text: &'static str,
}

/// A [`Field`] of this name: letters and `_`.
macro_rules! field {
    ($name:literal) => {
        $crate::log::Field {
            json: concat!(",\"", $name, "\":"),
            json_text: concat!(",\"", $name, "\":\""),
            text: concat!(" ", $name, "="),
        }
    };
}
pub(crate) use field;

impl<'a> MakeWriter<'a> for Log {
    type Writer = Event<'a>;
    fn make_writer(&'a self) -> Event<'a> {
        Event(&self.shared)
    }
}

/// One event of the `tracing` formatter on its way into the buffer.
pub struct Event<'a>(&'a Shared);

impl Write for Event<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Sink(mpsc::Sender<Vec<u8>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_whole_and_in_order() {
        let (send, receive) = mpsc::channel();
        let log = Log::to(Sink(send), LogFormat::Json);
        for n in 0..100 {
            log.line("INFO", "request", |line| line.number(field!("n"), n));
        }
        log.flush(Duration::from_secs(10));
        let all: Vec<u8> = receive.try_iter().flatten().collect();
        let all = String::from_utf8(all).unwrap();
        let numbers = all.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!((&line["level"], &line["message"]), (&"INFO".into(), &"request".into()));
            line["n"].as_u64().unwrap()
        });
        assert!(numbers.eq(0..100));
    }

    fn written(format: LogFormat, fields: impl FnOnce(&mut Line<'_>)) -> String {
        let mut bytes = Vec::new();
        fields(&mut Line { bytes: &mut bytes, format });
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn values_are_escaped() {
        let fields = |line: &mut Line<'_>| {
            line.text(field!("a"), "x");
            line.word(field!("z"), "v1/x");
            line.address(field!("y"), "203.0.113.7".parse().unwrap());
            line.address(field!("x"), "2001:db8::1".parse().unwrap());
            line.text(field!("b"), "two words");
            line.text(field!("c"), "a=\"b\"\n\\");
            line.text(field!("d"), "");
            line.number(field!("e"), 7);
            line.flag(field!("f"), true);
            line.millis(field!("g"), Duration::from_micros(1_020));
        };
        let json: serde_json::Value =
            serde_json::from_str(&format!("{{{}}}", &written(LogFormat::Json, fields)[1..])).unwrap();
        let expected = serde_json::json!({
            "a": "x", "z": "v1/x", "y": "203.0.113.7", "x": "2001:db8::1", "b": "two words", "c": "a=\"b\"\n\\", "d": "", "e": 7, "f": true, "g": 1.02 });
        assert_eq!(json, expected);
        let text = written(LogFormat::Text, fields);
        assert_eq!(
            text,
            r#" a=x z=v1/x y=203.0.113.7 x=2001:db8::1 b="two words" c="a=\"b\"\n\\" d="" e=7 f=true g=1.020"#
        );
    }

    #[test]
    fn times_are_those_of_rfc_3339() {
        for text in ["1970-01-01T00:00:00.000Z", "2024-02-29T23:59:59.007Z", "2026-11-21T03:04:05.678Z"] {
            let time = text.parse::<jiff::Timestamp>().unwrap() + Duration::from_micros(999);
            let line = written(LogFormat::Json, |line| line.time(field!("t"), time.into()));
            assert_eq!(line, format!(",\"t\":\"{text}\""));
        }
    }

    #[test]
    fn a_reader_that_stops_costs_lines_not_time() {
        struct Stuck(mpsc::Receiver<()>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = mpsc::channel::<()>();
        let log = Log::to(Stuck(stuck), LogFormat::Json);
        let long = "x".repeat(10_000);
        for _ in 0..2_000 {
            log.line("INFO", "request", |line| line.text(field!("long"), &long));
        }
        assert!(log.dropped() >= 1_000, "20 MB offered, 4 MiB kept twice at most: {}", log.dropped());
        drop(release);
    }
}
