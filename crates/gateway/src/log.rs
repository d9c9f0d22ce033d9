//! The log: lines of JSON (or text) to standard error, bounded, never in the way of a request.
//!
//! Lines are appended to one buffer under a lock held for a copy; a thread of its own writes the buffer out in
//! batches. When whoever reads standard error stops reading, the buffer fills to [`BUFFERED_BYTES_MAX`] and further
//! lines are dropped and counted, not waited for.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// Unwritten bytes kept before lines are dropped.
pub const BUFFERED_BYTES_MAX: usize = 1 << 20;

/// Lines gathered this long go out as one write.
const BATCH: Duration = Duration::from_millis(20);

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

    /// Writes one record as a line. Text: `key=value` pairs of the same fields.
    pub fn record(&self, record: &impl Serialize) {
        let mut line = Vec::with_capacity(512);
        let serialized = match self.format {
            LogFormat::Json => serde_json::to_writer(&mut line, record),
            LogFormat::Text => text(&mut line, record),
        };
        if serialized.is_ok() {
            line.push(b'\n');
            self.shared.append(&line);
        }
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
        let was_empty = state.buffer.is_empty();
        state.buffer.extend_from_slice(line);
        drop(state);
        if was_empty {
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
            drop(state);
            std::thread::sleep(BATCH);
            std::mem::swap(&mut batch, &mut self.lock().buffer);
            // A closed standard error is nobody's to repair: the lines are gone either way.
            let _ = sink.write_all(&batch).and_then(|()| sink.flush());
            batch.clear();
        }
    }
}

/// `key=value` pairs of the top-level fields, in order.
fn text(line: &mut Vec<u8>, record: &impl Serialize) -> serde_json::Result<()> {
    let serde_json::Value::Object(fields) = serde_json::to_value(record)? else {
        return serde_json::to_writer(line, record);
    };
    for (index, (name, value)) in fields.iter().enumerate() {
        if index > 0 {
            line.push(b' ');
        }
        line.extend_from_slice(name.as_bytes());
        line.push(b'=');
        match value {
            serde_json::Value::String(word) if !word.is_empty() && !word.contains([' ', '"', '=', '\n']) => {
                line.extend_from_slice(word.as_bytes());
            }
            other => serde_json::to_writer(&mut *line, other)?,
        }
    }
    Ok(())
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;
    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.shared)
    }
}

/// One event of the `tracing` formatter on its way into the buffer.
pub struct Line<'a>(&'a Shared);

impl Write for Line<'_> {
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
            log.record(&serde_json::json!({ "n": n }));
        }
        log.flush(Duration::from_secs(10));
        let all: Vec<u8> = receive.try_iter().flatten().collect();
        let lines: Vec<String> = (0..100).map(|n| format!("{{\"n\":{n}}}\n")).collect();
        assert_eq!(String::from_utf8(all).unwrap(), lines.concat());
    }

    #[test]
    fn text_is_pairs() {
        let mut line = Vec::new();
        text(&mut line, &serde_json::json!({"a": 1, "b": "x", "c": "two words", "d": null})).unwrap();
        assert_eq!(line, br#"a=1 b=x c="two words" d=null"#);
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
        let line = serde_json::json!({ "line": "x".repeat(10_000) });
        for _ in 0..1_000 {
            log.record(&line);
        }
        assert!(log.dropped() >= 700, "10 MB offered, 1 MiB kept twice at most: {}", log.dropped());
        drop(release);
    }
}
