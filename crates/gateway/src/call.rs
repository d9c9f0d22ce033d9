//! A request, parsed once: what it asks for, how much text it carries, and how its body goes to a provider.
//!
//! The body is never rebuilt. serde_json decides whether it is JSON and where its members lie; what a provider must
//! see differently (`model`, `stream_options.include_usage`) is spliced into the bytes that came. Whatever two readers
//! could understand differently, such as a second `model`, is refused: the model that was paid for is the one asked.

mod endpoint;
mod error;
mod json;
mod member;
mod multipart;
mod text;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

pub use endpoint::{Endpoint, Form};
pub use error::CallError;
pub use text::DEPTH_MAX;
pub(crate) use text::{Part, text_bytes};

use crate::fields::Fields;

/// Longest name of a model, bytes.
pub const MODEL_BYTES_MAX: usize = 256;

/// Most answers to one prompt; a larger `n` is counted as this many.
pub const ANSWERS_MAX: u64 = 128;

/// One request to one endpoint. `Debug` leaves the body out: it is a prompt.
#[derive(Clone)]
pub struct Call {
    endpoint: Endpoint,
    body: Bytes,
    model: Field,
    streamed: bool,
    usage: UsageReport,
    prompt: Prompt,
    prompts: u64,
    output_max: Option<u64>,
    answers: u64,
    form: Form,
}

/// What decides how many tokens a request will use, as far as it is known before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// The endpoint it came to.
    pub endpoint: Endpoint,
    /// What the model is given to read.
    pub prompt: Prompt,
    /// Most tokens of one answer, if the client set a bound.
    pub output_max: Option<u64>,
    /// How many answers the model writes, to all prompts together; at least 1.
    pub answers: u64,
}

/// One text of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text<'a> {
    /// The member of the request that it stands in.
    pub member: &'static str,
    /// The nearest member's name before it, as written: as a rule the one it is the value of. Empty: none in `member`.
    pub name: &'a str,
    /// What it says.
    pub text: Cow<'a, str>,
}

/// What a request gives a model to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Text, bytes of UTF-8; tool definitions and response schemas as they are written.
    pub text_bytes: u64,
    /// Tokens of prompts that are given as token ids.
    pub token_ids: u64,
    /// Images, linked or embedded.
    pub images: u64,
    /// Recordings.
    pub audio: u64,
    /// Other files.
    pub files: u64,
}

/// A value and where it is written in the body.
#[derive(Clone, Debug)]
struct Field {
    value: Box<str>,
    span: Range<usize>,
}

/// Whether a stream will end with an event that reports usage.
#[derive(Clone, Debug)]
enum UsageReport {
    /// The client asked for it.
    Asked,
    /// It did not; this makes the body ask.
    Unasked(Edit),
    /// The endpoint has no such option.
    NoOption,
}

/// Bytes to write in place of some of the body's.
#[derive(Clone, Debug)]
struct Edit {
    span: Range<usize>,
    with: &'static str,
}

impl Call {
    /// Reads a JSON body.
    ///
    /// # Errors
    /// When it is not one JSON object in UTF-8, is nested deeper than [`DEPTH_MAX`], has no usable `model`, or a member
    /// that matters here twice or with a value of the wrong type. Members that do not matter are not looked at.
    pub fn from_json(endpoint: Endpoint, body: Bytes) -> Result<Call, CallError> {
        json::parse(endpoint, body)
    }

    /// Reads a `multipart/form-data` body (RFC 7578); `content_type` is the request's header.
    ///
    /// # Errors
    /// When it is not a complete form with the boundary the header names, or for its fields as with JSON.
    pub fn from_multipart(endpoint: Endpoint, content_type: &str, body: Bytes) -> Result<Call, CallError> {
        multipart::parse(endpoint, content_type, body)
    }

    /// The endpoint it came to.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The content type in which its body goes to a provider; `sent`: the fields it came with.
    pub fn content_type<'a>(&self, sent: &'a Fields) -> &'a [u8] {
        match self.form {
            // A JSON body is sent as one whatever the caller called it: `curl -d` says it sends a form.
            Form::Json | Form::Either => b"application/json",
            Form::Multipart => sent.get("content-type").unwrap_or_default(),
        }
    }

    /// The model the client named: 1 to [`MODEL_BYTES_MAX`] bytes.
    pub fn model(&self) -> &str {
        &self.model.value
    }

    /// Whether the answer shall come as a stream.
    pub fn streamed(&self) -> bool {
        self.streamed
    }

    /// Whether the client itself asked for the event that reports usage.
    pub fn usage_asked(&self) -> bool {
        matches!(self.usage, UsageReport::Asked)
    }

    /// What the model is given to read.
    pub fn prompt(&self) -> Prompt {
        self.prompt
    }

    /// Most tokens of one answer, if the client set a bound; where it set several, the largest.
    pub fn output_max(&self) -> Option<u64> {
        self.output_max
    }

    /// How many answers the model writes, 1 to [`ANSWERS_MAX`]: `n`, or `best_of` when that is more.
    pub fn n(&self) -> u64 {
        self.answers
    }

    /// What decides how many tokens it will use.
    pub fn content(&self) -> Content {
        Content {
            endpoint: self.endpoint,
            prompt: self.prompt,
            output_max: self.output_max,
            answers: self.answers.saturating_mul(self.prompts),
        }
    }

    /// Gives every text of the prompt to `each`, in no promised order, and returns how many messages a chat has. Reads
    /// the whole body again: not for the path of every request. A form has no text of a prompt.
    pub fn texts(&self, each: &mut dyn FnMut(Text<'_>)) -> u64 {
        match self.form {
            Form::Json | Form::Either => json::texts(&self.body, each),
            Form::Multipart => 0,
        }
    }

    /// The body for a provider, in the content type it came in: `model` replaced when given, and with `ask_for_usage`
    /// the option set that makes a stream report its usage, where the endpoint has one. Every other byte stays; without
    /// an edit it is the same memory.
    pub fn render(&self, model: Option<&str>, ask_for_usage: bool) -> Bytes {
        let model = model.filter(|model| *model != self.model());
        let model = model.map(|model| match self.form {
            Form::Multipart => model.to_owned(),
            Form::Json | Form::Either => serde_json::Value::from(model).to_string(),
        });
        let mut edits = [model.as_deref().map(|model| (&self.model.span, model)), None];
        if let (true, true, UsageReport::Unasked(edit)) = (ask_for_usage, self.streamed, &self.usage) {
            edits[1] = Some((&edit.span, edit.with));
        }
        if edits[0].is_none() && edits[1].is_none() {
            return self.body.clone();
        }
        edits.sort_unstable_by_key(|edit| edit.map(|(span, _)| span.start));
        let added: usize = edits.iter().flatten().map(|(_, with)| with.len()).sum();
        let mut body = BytesMut::with_capacity(self.body.len() + added);
        let mut at = 0;
        for (span, with) in edits.into_iter().flatten() {
            body.extend_from_slice(&self.body[at..span.start]);
            body.extend_from_slice(with.as_bytes());
            at = span.end;
        }
        body.extend_from_slice(&self.body[at..]);
        body.freeze()
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("endpoint", &self.endpoint)
            .field("model", &self.model.value)
            .field("body_bytes", &self.body.len())
            .field("streamed", &self.streamed)
            .field("usage", &self.usage)
            .field("prompt", &self.prompt)
            .field("output_max", &self.output_max)
            .field("n", &self.answers)
            .finish_non_exhaustive()
    }
}

/// A name of a model as the client wrote it.
fn checked_model(model: &str) -> Result<Box<str>, CallError> {
    match model.len() {
        0 => Err(CallError::EmptyModel),
        1..=MODEL_BYTES_MAX => Ok(model.into()),
        length => Err(CallError::LongModel(length)),
    }
}

/// `n` and `best_of` as a number of answers.
fn answers(n: Option<u64>, best_of: Option<u64>) -> u64 {
    n.max(best_of).unwrap_or(1).clamp(1, ANSWERS_MAX)
}

/// A whole number as JSON writes it. Absurd ones become the nearest possible; negative ones, which some servers take for
/// "no bound", are as good as none. `Err`: it is not a number.
fn number(written: &str) -> Result<Option<u64>, ()> {
    if let Ok(number) = written.parse::<u64>() {
        return Ok(Some(number));
    }
    // Only what JSON calls a number: not "inf", "nan", "+1".
    if !written.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
        return Err(());
    }
    let number: f64 = written.parse().map_err(|_| ())?;
    Ok((!written.starts_with('-')).then(|| number.ceil() as u64))
}

#[cfg(test)]
mod tests;
