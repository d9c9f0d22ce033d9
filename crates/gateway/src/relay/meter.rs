//! Counts what passes: the provider's own `usage`, else an estimate.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::call::Call;
use crate::dialect::Usage;
use crate::dialect::openai;
use crate::ledger::Tokens;
use crate::sse;

/// Plain answers are kept whole up to this size to find their `usage`, of longer ones only the end.
const KEPT_BYTES_MAX: usize = 4 << 20;
const KEPT_END_BYTES: usize = 4 << 10;

/// What is taken to be used where the provider does not say.
#[derive(Clone, Copy)]
pub struct Basis {
    /// Tokens of the prompt; `None`: of what this endpoint answers no tokens are counted.
    pub prompt: Option<u64>,
    /// Each piece of a streamed answer is one token.
    pub counts_deltas: bool,
}

/// The tokens of an answer that is here as a whole; `None`: there is nothing to count. `per_text`: tokens of this many
/// bytes of text.
pub fn tokens_of_answer(basis: Basis, answer: &[u8], per_text: impl Fn(u64) -> u64) -> Option<Tokens> {
    let said = openai::usage_of_answer(answer);
    Counting::new(basis).tokens(said, || openai::answer_content_bytes(answer), per_text)
}

/// Looks at an answer while it passes.
pub(super) enum Meter {
    Events { splitter: sse::Splitter, counted: Box<Counted>, open: bool },
    Plain { kept: Vec<u8>, too_long: bool, counting: Counting },
}

pub(super) struct Counted {
    events: openai::Events,
    hide_usage: bool,
    done: bool,
    usage: Option<Usage>,
    counting: Counting,
}

impl Meter {
    pub(super) fn new(call: &Call, basis: Basis, events: bool) -> Self {
        let counting = Counting::new(basis);
        if !events {
            return Self::Plain { kept: Vec::new(), too_long: false, counting };
        }
        let hide_usage = call.endpoint().streams() && !call.usage_asked();
        let counted =
            Counted { events: openai::Events::default(), hide_usage, done: false, usage: None, counting };
        Self::Events { splitter: sse::Splitter::new(), counted: Box::new(counted), open: false }
    }

    pub(super) fn is_events(&self) -> bool {
        matches!(self, Self::Events { .. })
    }

    /// Whether the stream said itself that it is complete.
    pub(super) fn finished(&self) -> bool {
        matches!(self, Self::Events { counted, .. } if counted.done)
    }

    /// Whether the last thing sent was the beginning of an event that is too long to be held.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Events { open: true, .. })
    }

    /// Looks at a chunk and puts what of it may be sent into `ready`.
    pub(super) fn take(&mut self, chunk: Bytes, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain { kept, too_long, .. } => {
                kept.extend_from_slice(&chunk);
                *too_long |= kept.len() > KEPT_BYTES_MAX;
                if *too_long {
                    kept.drain(..kept.len().saturating_sub(KEPT_END_BYTES));
                }
                ready.push_back(chunk);
            }
            Self::Events { splitter, counted, open } => {
                let before = ready.len();
                let (mut hidden, mut bytes) = (false, 0);
                for event in splitter.push(chunk.clone()) {
                    bytes += event.raw.len();
                    *open = event.is_oversize();
                    if counted.passes(&event) {
                        ready.push_back(event.raw);
                    } else {
                        hidden = true;
                    }
                }
                // A chunk of whole events, which is the rule: sent as it came.
                if !hidden && bytes == chunk.len() && !splitter.mid_event() && ready.len() > before + 1 {
                    ready.truncate(before);
                    ready.push_back(chunk);
                }
            }
        }
    }

    /// The rest of a stream whose provider said no more: whether it is complete. The end of an event may be missing where
    /// a server forgets the blank line, not where it was cut.
    pub(super) fn finish(&mut self, ready: &mut VecDeque<Bytes>) -> bool {
        let Self::Events { splitter, counted, .. } = self else { return true };
        let Some(event) = splitter.finish() else { return true };
        let json = |data: &[u8]| serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok();
        let passes = counted.passes(&event);
        if !counted.done && event.data().is_some_and(|data| !json(&data)) {
            return false;
        }
        ready.extend(passes.then_some(event.raw));
        true
    }

    /// When a stream broke off: an event held only because its last CR might have been half of a CRLF came whole.
    pub(super) fn finish_held(&mut self, ready: &mut VecDeque<Bytes>) {
        if matches!(self, Self::Events { splitter, .. } if !splitter.mid_event()) {
            self.finish(ready);
        }
    }

    /// What was used so far; `per_text`: tokens of this many bytes of text.
    pub(super) fn tokens(&self, per_text: impl Fn(u64) -> u64) -> Option<Tokens> {
        match self {
            Self::Events { counted, .. } => counted.counting.tokens(counted.usage, || 0, per_text),
            Self::Plain { kept, too_long, counting } => {
                let content = || if *too_long { 0 } else { openai::answer_content_bytes(kept) };
                counting.tokens(openai::usage_of_answer(kept), content, per_text)
            }
        }
    }
}

impl Counted {
    /// Counts an event and says whether the caller gets it: all but the `usage` that only we asked for.
    fn passes(&mut self, event: &sse::Event) -> bool {
        let Some(data) = event.data() else { return true };
        let delta = self.events.read(&data);
        self.done |= delta.done;
        self.usage = delta.usage.or(self.usage);
        self.counting.add(delta.content_bytes);
        !(self.hide_usage && delta.usage_only)
    }
}

/// What is counted here in case the provider does not say.
#[derive(Clone, Copy)]
pub(super) struct Counting {
    basis: Basis,
    deltas: u64,
    content_bytes: u64,
}

impl Counting {
    fn new(basis: Basis) -> Self {
        Self { basis, deltas: 0, content_bytes: 0 }
    }

    /// A piece of the answer with this much text.
    fn add(&mut self, content_bytes: u64) {
        self.deltas += u64::from(content_bytes > 0);
        self.content_bytes += content_bytes;
    }

    /// What the provider says, else what was counted and `more` bytes of text.
    fn tokens(
        mut self,
        said: Option<Usage>,
        more: impl FnOnce() -> u64,
        per_text: impl Fn(u64) -> u64,
    ) -> Option<Tokens> {
        if let Some(usage) = said {
            return Some(Tokens { usage, estimated: false });
        }
        let prompt = self.basis.prompt?;
        self.add(more());
        let completion = if self.basis.counts_deltas { self.deltas } else { per_text(self.content_bytes) };
        let usage =
            Usage { prompt, completion, total: prompt.saturating_add(completion), ..Usage::default() };
        Some(Tokens { usage, estimated: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Endpoint;

    const TEXT: Basis = Basis { prompt: Some(6), counts_deltas: false };

    fn call(endpoint: Endpoint) -> Call {
        let body = r#"{"model":"m","prompt":"123456789","input":"123456789"}"#;
        Call::from_json(endpoint, body.into()).unwrap()
    }

    #[test]
    fn a_chunk_of_whole_events_is_sent_as_it_came() {
        let mut meter = Meter::new(&call(Endpoint::Completions), TEXT, true);
        let chunk = Bytes::from_static(b"data: {\"choices\":[]}\n\ndata: {\"choices\":[]}\n\n");
        let mut ready = VecDeque::new();
        meter.take(chunk.clone(), &mut ready);
        assert_eq!(ready.len(), 1);
        assert_eq!(ready[0].as_ptr(), chunk.as_ptr());
    }

    #[test]
    fn only_a_cut_event_is_incomplete() {
        for (end, complete) in [
            (&b"data: [DONE]"[..], true),
            (b"data: [DONE]\n", true),
            (b"data: {\"choices\":[]}\n", true),
            (b": bye", true),
            (b"data: {\"choices\":[", false),
            (b"data: [DON", false),
        ] {
            let mut meter = Meter::new(&call(Endpoint::Completions), TEXT, true);
            let mut ready = VecDeque::new();
            meter.take(Bytes::from_static(b"data: {}\n\n"), &mut ready);
            meter.take(Bytes::copy_from_slice(end), &mut ready);
            assert_eq!(meter.finish(&mut ready), complete, "{end:?}");
            let expected = if complete { [b"data: {}\n\n", end].concat() } else { b"data: {}\n\n".to_vec() };
            assert_eq!(ready.into_iter().flatten().collect::<Vec<u8>>(), expected);
        }
    }

    #[test]
    fn usage_at_the_end_of_a_long_answer() {
        let mut meter = Meter::new(&call(Endpoint::Embeddings), TEXT, false);
        let mut ready = VecDeque::new();
        meter.take(Bytes::from(vec![b'1'; KEPT_BYTES_MAX + 1]), &mut ready);
        let end = br#"],"usage":{"prompt_tokens":7,"total_tokens":7}}"#;
        meter.take(Bytes::from_static(end), &mut ready);
        let tokens = meter.tokens(|_| 0).unwrap();
        assert_eq!((tokens.usage.prompt, tokens.estimated), (7, false));
    }

    #[test]
    fn images_without_usage_have_no_tokens() {
        let none = Basis { prompt: None, counts_deltas: false };
        assert_eq!(tokens_of_answer(none, b"{}", |bytes| bytes), None);
        let estimated = tokens_of_answer(TEXT, br#"{"text":"four"}"#, |bytes| 2 * bytes).unwrap();
        assert_eq!(estimated.usage.completion, 8);
        assert_eq!((estimated.usage.prompt, estimated.estimated), (6, true));
    }
}
