//! What providers' answers mean. Pure: bytes in, values out; one module per dialect, all speaking of [`Usage`] and
//! [`Delta`].

pub mod openai;

/// What a provider says an answer used, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Read, cached ones included.
    pub prompt: u64,
    /// Written, reasoning included.
    pub completion: u64,
    /// As the provider adds up; at least the sum of both.
    pub total: u64,
    /// Of the prompt, how many came from the provider's cache.
    pub cached: u64,
    /// Of the completion, how many were reasoning.
    pub reasoning: u64,
}

/// What one event of a stream holds. The default is an event that says nothing to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Generated text of every kind (content, reasoning, refusal, tool calls), bytes of UTF-8.
    pub content_bytes: u64,
    /// At least one choice is in it.
    pub has_choices: bool,
    /// What the answer used, when the event says so in numbers that can be.
    pub usage: Option<Usage>,
    /// It has no choices and reports usage: the event that a client who did not ask for it must not see.
    pub usage_only: bool,
    /// It reports an error.
    pub error: bool,
    /// It says that the stream is complete.
    pub done: bool,
}
