//! OpenAI's dialect, as OpenAI and the many compatible servers speak it: chat, completions, embeddings, images, audio,
//! moderations, rerank.
//!
//! Providers are not trusted to be right: what cannot be read counts as saying nothing, and is relayed all the same.

mod skim;

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

pub use super::{Delta, Usage};
use crate::call::{Part, text_bytes};
use crate::json;

/// Most tokens that one answer can have used; a provider that says more is not believed.
pub const TOKENS_MAX: u64 = 1 << 40;

/// Longest event that the next one is compared with, bytes.
const REMEMBERED_BYTES_MAX: usize = 4 << 10;

/// The `data` of a stream's last event.
const DONE: &[u8] = b"[DONE]";

/// Reads the `data` of one event of a stream.
pub fn read_event(data: &[u8]) -> Delta {
    Events::default().read(data)
}

/// Reads the events of a stream, one after the other.
///
/// Most are the one before with another piece of text between the same bytes. Those are not parsed again: what was
/// valid JSON around one plain string is so around another.
#[derive(Default)]
pub struct Events {
    /// The last one that was parsed and holds one plain text; empty: there is none.
    last: Vec<u8>,
    /// Where that text is written.
    text: Range<usize>,
    /// What else it says.
    delta: Delta,
}

impl Events {
    /// Reads the `data` of the next one.
    pub fn read(&mut self, data: &[u8]) -> Delta {
        if let Some(delta) = self.like_the_last(data) {
            return delta;
        }
        if data.trim_ascii() == DONE {
            return Delta { done: true, ..Delta::default() };
        }
        let Some((delta, text)) = skim::delta(data) else {
            return parsed(data).unwrap_or_default();
        };
        if let Some(text) = text.filter(|_| data.len() <= REMEMBERED_BYTES_MAX) {
            self.last.clear();
            self.last.extend_from_slice(data);
            (self.text, self.delta) = (text, delta);
        }
        delta
    }

    fn like_the_last(&self, data: &[u8]) -> Option<Delta> {
        let (before, after) = (&self.last[..self.text.start], &self.last[self.text.end..]);
        let text = data.strip_prefix(before)?.strip_suffix(after)?;
        let same = !self.last.is_empty() && json::is_plain(text);
        same.then_some(Delta { content_bytes: text.len() as u64, ..self.delta })
    }
}

/// [`read_event`] by serde_json; `None`: it is no JSON, or none of an answer.
fn parsed(data: &[u8]) -> Option<Delta> {
    let answer = serde_json::from_slice::<Answer<'_>>(data).ok()?;
    let no_choices = answer.choices.as_ref().is_some_and(|choices| choices.items == 0);
    Some(Delta {
        content_bytes: answer.content_bytes(),
        has_choices: answer.choices.as_ref().is_some_and(|choices| choices.items > 0),
        usage: answer.usage.map(RawValue::get).and_then(usage),
        usage_only: no_choices && answer.usage.is_some_and(|usage| usage.get().starts_with('{')),
        error: answer.error.is_some() || answer.object.is_some_and(|object| object.get() == r#""error""#),
        done: false,
    })
}

/// The usage that a whole answer reports; `None` when it reports none, or one that cannot be.
pub fn usage_of_answer(body: &[u8]) -> Option<Usage> {
    /// All but one member is skipped, not read.
    #[derive(serde::Deserialize)]
    struct OnlyUsage<'a> {
        #[serde(borrow)]
        usage: Option<&'a RawValue>,
    }
    let found = match skim::usage_at_end(body) {
        Some(skim::Found::Usual(usage)) => return Some(usage),
        Some(skim::Found::Written(written)) => counted(written),
        None => None,
    };
    if found.is_some() {
        return found;
    }
    let answer: OnlyUsage<'_> = serde_json::from_str(std::str::from_utf8(body).ok()?).ok()?;
    usage(answer.usage?.get())
}

/// Generated text in a whole answer, bytes of UTF-8: for one that reports no usage.
pub fn answer_content_bytes(body: &[u8]) -> u64 {
    read(body).map_or(0, |answer| answer.content_bytes())
}

/// An error as an event, for a stream that has begun: `data: {"error":{…}}` and a blank line.
pub fn error_event(message: &str, kind: &str, code: Option<&str>) -> Bytes {
    let mut event = b"data: ".to_vec();
    event.extend_from_slice(&error_body(message, kind, None, code, &[]));
    event.extend_from_slice(b"\n\n");
    event.into()
}

/// An error as a body: `{"error":{"message","type","param","code", …}}`, `extra` behind the four.
pub fn error_body(
    message: &str,
    kind: &str,
    param: Option<&str>,
    code: Option<&str>,
    extra: &[(&str, Value)],
) -> Vec<u8> {
    let mut body = Vec::with_capacity(512);
    body.extend_from_slice(b"{\"error\":{\"message\":");
    push_text(&mut body, message);
    for (name, value) in [("type", Some(kind)), ("param", param), ("code", code)] {
        body.extend_from_slice(b",\"");
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(b"\":");
        match value {
            Some(value) => push_text(&mut body, value),
            None => body.extend_from_slice(b"null"),
        }
    }
    for (name, value) in extra {
        body.push(b',');
        push_text(&mut body, name);
        body.push(b':');
        match value {
            Value::String(value) => push_text(&mut body, value),
            value => push(&mut body, value),
        }
    }
    body.extend_from_slice(b"}}");
    body
}

/// Most texts need no escapes, which is seen many bytes at a time.
fn push_text(out: &mut Vec<u8>, text: &str) {
    let special = |byte: u8| !matches!(byte, b' ' | b'!' | b'#'..=b'[' | b']'..=b'~');
    if text.bytes().fold(false, |found, byte| found | special(byte)) {
        return push(out, &text);
    }
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

fn push(out: &mut Vec<u8>, value: &impl serde::Serialize) {
    serde_json::to_writer(out, value).expect("strings and JSON values can always be written to memory");
}

fn read(json: &[u8]) -> Option<Answer<'_>> {
    // UTF-8 is checked once for all, which is faster than string by string.
    serde_json::from_str(std::str::from_utf8(json).ok()?).ok()
}

/// An answer or a piece of one: the members that matter here.
#[derive(serde::Deserialize)]
struct Answer<'a> {
    choices: Option<Choices>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    object: Option<&'a RawValue>,
    /// Of a transcription that streams,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    /// and of one that does not.
    #[serde(borrow)]
    text: Option<&'a RawValue>,
}

impl Answer<'_> {
    fn content_bytes(&self) -> u64 {
        match (&self.choices, self.delta) {
            (Some(choices), _) => choices.bytes,
            (None, Some(delta)) => text_of(delta),
            (None, None) => self.text.map_or(0, text_of),
        }
    }
}

#[derive(serde::Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    delta: Option<Message<'a>>,
    #[serde(borrow)]
    message: Option<Message<'a>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
}

#[derive(serde::Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
    #[serde(borrow)]
    function_call: Option<&'a RawValue>,
}

impl Choice<'_> {
    fn text_bytes(&self) -> u64 {
        let messages = [&self.delta, &self.message];
        messages.into_iter().flatten().map(Message::text_bytes).sum::<u64>() + self.text.map_or(0, text_of)
    }
}

impl Message<'_> {
    fn text_bytes(&self) -> u64 {
        // Some servers send the same reasoning under both names.
        let reasoning = self.reasoning_content.map_or(0, text_of).max(self.reasoning.map_or(0, text_of));
        let others = [self.content, self.refusal, self.tool_calls, self.function_call];
        reasoning + others.into_iter().flatten().map(text_of).sum::<u64>()
    }
}

/// A string, or the text in a list of parts or tool calls.
fn text_of(value: &RawValue) -> u64 {
    text_in(value.get())
}

/// The same of a value as it is written.
fn text_in(value: &str) -> u64 {
    text_bytes(value, |name| match name {
        "id" | "type" | "index" | "signature" => Part::Nothing,
        _ => Part::Text,
    })
}

/// All choices together; they are read one by one and not kept.
#[derive(Default)]
struct Choices {
    items: u64,
    bytes: u64,
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ChoicesVisitor)
    }
}

struct ChoicesVisitor;

impl<'de> Visitor<'de> for ChoicesVisitor {
    type Value = Choices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Choices, A::Error> {
        let mut choices = Choices::default();
        while let Some(choice) = array.next_element::<Choice<'de>>()? {
            choices.items += 1;
            choices.bytes += choice.text_bytes();
        }
        Ok(choices)
    }
}

/// Reads a `usage` object under the names of any endpoint. `None` without a count, or with one that is no count.
fn usage(written: &str) -> Option<Usage> {
    skim::usual_usage(written).or_else(|| counted(written))
}

/// [`usage`] by serde_json.
fn counted(written: &str) -> Option<Usage> {
    let counts: Counts = serde_json::from_str(written).ok()?;
    let completion = counts.completion.unwrap_or(0);
    let prompt = match (counts.prompt, counts.total) {
        (Some(prompt), _) => prompt,
        (None, Some(total)) => total.saturating_sub(completion),
        (None, None) => counts.completion.map(|_| 0)?,
    };
    Some(Usage {
        prompt,
        completion,
        total: counts.total.unwrap_or(0).max(prompt + completion),
        cached: counts.cached.unwrap_or(0).min(prompt),
        reasoning: counts.reasoning.unwrap_or(0).min(completion),
    })
}

#[derive(Default)]
struct Counts {
    prompt: Option<u64>,
    completion: Option<u64>,
    total: Option<u64>,
    cached: Option<u64>,
    reasoning: Option<u64>,
}

impl<'de> Deserialize<'de> for Counts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(CountsVisitor)
    }
}

#[derive(serde::Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum CountsMember {
    PromptTokens,
    InputTokens,
    CompletionTokens,
    OutputTokens,
    TotalTokens,
    PromptTokensDetails,
    InputTokensDetails,
    CompletionTokensDetails,
    OutputTokensDetails,
    CachedTokens,
    ReasoningTokens,
    #[serde(other)]
    Other,
}

struct CountsVisitor;

impl<'de> Visitor<'de> for CountsVisitor {
    type Value = Counts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    /// The details have the same visitor: each of the two counts it looks for has one name wherever it stands.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Counts, A::Error> {
        let mut counts = Counts::default();
        while let Some(member) = map.next_key()? {
            match member {
                CountsMember::PromptTokens | CountsMember::InputTokens => {
                    counts.prompt =
                        counts.prompt.max(map.next_value::<Option<Count>>()?.map(|count| count.0));
                }
                CountsMember::CompletionTokens | CountsMember::OutputTokens => {
                    counts.completion =
                        counts.completion.max(map.next_value::<Option<Count>>()?.map(|count| count.0));
                }
                CountsMember::TotalTokens => {
                    counts.total = map.next_value::<Option<Count>>()?.map(|count| count.0)
                }
                CountsMember::CachedTokens => {
                    counts.cached = map.next_value::<Option<Count>>()?.map(|count| count.0)
                }
                CountsMember::ReasoningTokens => {
                    counts.reasoning = map.next_value::<Option<Count>>()?.map(|count| count.0);
                }
                CountsMember::PromptTokensDetails | CountsMember::InputTokensDetails => {
                    let details = map.next_value::<Option<Counts>>()?.unwrap_or_default();
                    counts.cached = counts.cached.or(details.cached);
                }
                CountsMember::CompletionTokensDetails | CountsMember::OutputTokensDetails => {
                    let details = map.next_value::<Option<Counts>>()?.unwrap_or_default();
                    counts.reasoning = counts.reasoning.or(details.reasoning);
                }
                CountsMember::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(counts)
    }
}

/// A count of tokens that can be: a whole number from 0 to [`TOKENS_MAX`], however it is written.
struct Count(u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let count = f64::deserialize(deserializer)?;
        if count.fract() == 0.0 && (0.0..=TOKENS_MAX as f64).contains(&count) {
            return Ok(Count(count as u64));
        }
        Err(serde::de::Error::custom("not a count of tokens"))
    }
}

#[cfg(test)]
mod tests;
