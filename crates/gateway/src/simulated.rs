//! The provider that answers by itself: deterministic text, real streaming, `usage`. For demos, tests and load tests.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::call::{Call, Endpoint};
use crate::config::ProviderKind;
use crate::upstream::{Head, Source, local_answer};

/// Longest answer, tokens.
const TOKENS_MAX: u64 = 100_000;

/// What an answer is made of, over and over; one word is one token.
const WORDS: [&str; 8] = ["The ", "gate ", "opens ", "for ", "those ", "who ", "may ", "pass. "];

/// Vectors in one answer at most, as with OpenAI.
const EMBEDDINGS_MAX: usize = 2_048;

/// Length of a simulated embedding.
const DIMENSIONS: usize = 16;

/// A simulated provider's settings.
pub struct Simulated {
    latency: Duration,
    per_token: Duration,
    completion_tokens: u32,
    fail_rate: f64,
}

impl Simulated {
    /// From the configuration of a provider of type `simulated`; the defaults of that type for any other.
    pub fn new(kind: &ProviderKind) -> Self {
        let quick = Self {
            latency: Duration::ZERO,
            per_token: Duration::ZERO,
            completion_tokens: 16,
            fail_rate: 0.0,
        };
        match *kind {
            ProviderKind::Simulated { latency, tokens_per_second, completion_tokens, fail_rate } => {
                let per_token = match tokens_per_second {
                    0 => Duration::ZERO,
                    pace => Duration::from_secs(1) / pace,
                };
                Self { latency, per_token, completion_tokens, fail_rate }
            }
            ProviderKind::Openai { .. } => quick,
        }
    }

    /// Whether there is a simulated answer for this endpoint.
    pub fn serves(endpoint: Endpoint) -> bool {
        matches!(
            endpoint,
            Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Embeddings | Endpoint::Moderations
        )
    }

    /// Answers after the configured latency.
    pub async fn ask(&self, call: &Call) -> (Head, Source) {
        let tokens = call.output_max().unwrap_or(TOKENS_MAX).min(u64::from(self.completion_tokens));
        let writing =
            if call.streamed() { Duration::ZERO } else { self.per_token.saturating_mul(tokens as u32) };
        let wait = self.latency + writing;
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        if fastrand::f64() < self.fail_rate {
            let error = json!({ "error": { "message": "simulated failure", "type": "server_error" } });
            return whole(StatusCode::INTERNAL_SERVER_ERROR, &error);
        }
        let answer = Answer { chat: call.endpoint() == Endpoint::ChatCompletions, call, tokens };
        match call.endpoint() {
            Endpoint::ChatCompletions | Endpoint::Completions if call.streamed() => {
                local_answer(StatusCode::OK, "text/event-stream", answer.stream(self.per_token))
            }
            Endpoint::ChatCompletions | Endpoint::Completions => whole(StatusCode::OK, &answer.whole()),
            Endpoint::Embeddings => whole(StatusCode::OK, &answer.embedding()),
            Endpoint::Moderations => whole(StatusCode::OK, &answer.moderation()),
            _ => {
                let error =
                    json!({ "error": { "message": "not simulated", "type": "invalid_request_error" } });
                whole(StatusCode::NOT_FOUND, &error)
            }
        }
    }
}

struct Answer<'a> {
    chat: bool,
    call: &'a Call,
    tokens: u64,
}

impl Answer<'_> {
    fn prompt_tokens(&self) -> u64 {
        self.call.prompt().text_bytes.div_ceil(4).max(1)
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.prompt_tokens(), self.tokens);
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }

    fn text(&self) -> String {
        WORDS.iter().cycle().take(self.tokens as usize).copied().collect()
    }

    fn object(&self, suffix: &str) -> String {
        if self.chat { format!("chat.completion{suffix}") } else { "text_completion".to_owned() }
    }

    fn whole(&self) -> Value {
        let choice = if self.chat {
            json!({ "index": 0, "message": { "role": "assistant", "content": self.text() }, "finish_reason": "stop" })
        } else {
            json!({ "index": 0, "text": self.text(), "logprobs": null, "finish_reason": "stop" })
        };
        json!({ "id": "chatcmpl-simulated", "object": self.object(""), "created": 0, "model": self.call.model(),
                "choices": [choice], "usage": self.usage() })
    }

    /// The events of a stream, all made now: each token is one delta.
    fn stream(&self, pace: Duration) -> Simulation {
        let event = |choices: Value, usage: Value| {
            let chunk = json!({ "id": "chatcmpl-simulated", "object": self.object(".chunk"), "created": 0,
                                "model": self.call.model(), "choices": choices, "usage": usage });
            Bytes::from(format!("data: {chunk}\n\n"))
        };
        let delta = |content: &str, finish: Value| {
            if self.chat {
                json!([{ "index": 0, "delta": { "content": content }, "finish_reason": finish }])
            } else {
                json!([{ "index": 0, "text": content, "logprobs": null, "finish_reason": finish }])
            }
        };
        let words: Vec<Bytes> =
            WORDS.iter().map(|word| event(delta(word, Value::Null), Value::Null)).collect();
        let mut end = vec![event(delta("", "stop".into()), Value::Null)];
        end.push(event(json!([]), self.usage()));
        end.push(Bytes::from_static(b"data: [DONE]\n\n"));
        Simulation { tokens: words, left: self.tokens, next: 0, end: end.concat().into(), pace, pause: None }
    }

    /// One vector for each input, as numbers or, as the official SDKs ask for it, base64 of little-endian `f32`.
    fn embedding(&self) -> Value {
        let asked: EmbeddingInput =
            serde_json::from_slice(&self.call.render(None, false)).unwrap_or_default();
        let seed = self.call.prompt().text_bytes as usize;
        let vector = |index: usize| (0..DIMENSIONS).map(move |i| ((seed + index + i) % 7) as f32 / 7.0);
        let written = |index: usize| match asked.encoding_format.as_deref() {
            Some("base64") => {
                let bytes: Vec<u8> = vector(index).flat_map(f32::to_le_bytes).collect();
                Value::from(BASE64_STANDARD.encode(bytes))
            }
            _ => vector(index).collect(),
        };
        let data: Vec<Value> = (0..asked.count())
            .map(|index| json!({ "object": "embedding", "index": index, "embedding": written(index) }))
            .collect();
        let prompt = self.prompt_tokens();
        json!({ "object": "list", "model": self.call.model(), "data": data,
                "usage": { "prompt_tokens": prompt, "total_tokens": prompt } })
    }

    fn moderation(&self) -> Value {
        json!({ "id": "modr-simulated", "model": self.call.model(),
                "results": [{ "flagged": false, "categories": {}, "category_scores": {} }] })
    }
}

/// What an embedding is asked for, besides its model.
#[derive(Default, Deserialize)]
struct EmbeddingInput {
    #[serde(default)]
    input: Value,
    #[serde(default)]
    encoding_format: Option<String>,
}

impl EmbeddingInput {
    /// How many vectors: one for a text or its token ids, one for each of several.
    fn count(&self) -> usize {
        match &self.input {
            Value::Array(inputs) if !inputs.iter().all(Value::is_number) => inputs.len().min(EMBEDDINGS_MAX),
            _ => 1,
        }
    }
}

fn whole(status: StatusCode, body: &Value) -> (Head, Source) {
    local_answer(status, "application/json", Simulation::whole(body.to_string().into()))
}

/// The body of a simulated answer.
pub struct Simulation {
    tokens: Vec<Bytes>,
    left: u64,
    next: usize,
    end: Bytes,
    pace: Duration,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Simulation {
    fn whole(body: Bytes) -> Self {
        Self { tokens: Vec::new(), left: 0, next: 0, end: body, pace: Duration::ZERO, pause: None }
    }

    /// The next chunk: a token in its time, then the end, then none.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.left == 0 {
            let end = std::mem::take(&mut self.end);
            return Poll::Ready(Some(end).filter(|end| !end.is_empty()));
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
        }
        if !self.pace.is_zero() {
            let next = Instant::now() + self.pace;
            match &mut self.pause {
                Some(pause) => pause.as_mut().reset(next),
                None => self.pause = Some(Box::pin(sleep_until(next))),
            }
        }
        let token = self.tokens[self.next % self.tokens.len()].clone();
        (self.next, self.left) = (self.next + 1, self.left - 1);
        Poll::Ready(Some(token))
    }
}
