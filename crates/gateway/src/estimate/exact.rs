//! Prompts counted by the tokenizer of their model, away from the path of other requests.
//!
//! A vocabulary takes a fifth of a second and up to 17 MiB to load, and a long prompt takes milliseconds to count. So
//! only the vocabularies that some model needs are loaded, at start; counting has threads of its own, at most as many
//! as there are cores; what is too long, or would wait too long for a thread, is estimated.

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use tiktoken::CoreBpe;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::call::{Call, Endpoint, Text};

/// Longest text that is counted, bytes.
pub const COUNTED_BYTES_MAX: u64 = 256 * 1024;

/// Longest wait for a thread.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// What stands around each message of a chat, its role included, and before the answer: OpenAI's chat format.
const TOKENS_PER_MESSAGE: u64 = 4;
const TOKENS_PER_NAME: u64 = 1;
const TOKENS_BEFORE_ANSWER: u64 = 3;

/// The text of a prompt in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Tokens of all its text and of the chat format; token ids and media are not in it.
    pub tokens: u64,
    /// They are exactly what the provider will count. Not so with tools and schemas, which each provider writes out in a
    /// way of its own, nor for a model whose tokenizer we do not have.
    pub whole: bool,
}

/// Splits text into tokens.
pub trait Tokenizer: Send + Sync {
    /// How many they are.
    fn count(&self, text: &str) -> usize;
}

impl Tokenizer for CoreBpe {
    fn count(&self, text: &str) -> usize {
        CoreBpe::count(self, text)
    }
}

/// The tokenizers that some model needs.
#[derive(Clone)]
pub struct Tokenizers {
    cl100k: Option<Arc<dyn Tokenizer>>,
    o200k: Option<Arc<dyn Tokenizer>>,
    threads: Arc<Semaphore>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vocabulary {
    Cl100k,
    O200k,
}

impl Tokenizers {
    /// Loads what `models` need (names as their providers know them) and `previous` does not have; keeps nothing else.
    /// Takes up to 0.3 s, for no models nothing.
    pub fn load<'a>(models: impl IntoIterator<Item = &'a str>, previous: Option<&Tokenizers>) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        let threads =
            previous.map_or_else(|| Arc::new(Semaphore::new(cores)), |before| before.threads.clone());
        let mut loaded = Self { cl100k: None, o200k: None, threads };
        for model in models {
            let (vocabulary, _) = vocabulary_of(model);
            if loaded.get(vocabulary).is_some() {
                continue;
            }
            let tokenizer = previous.and_then(|before| before.get(vocabulary)).cloned();
            match vocabulary {
                Vocabulary::Cl100k => {
                    let load = || Arc::new(tiktoken::encoding::cl100k_base()) as Arc<dyn Tokenizer>;
                    loaded.cl100k = Some(tokenizer.unwrap_or_else(load));
                }
                Vocabulary::O200k => {
                    let load = || Arc::new(tiktoken::encoding::o200k_base()) as Arc<dyn Tokenizer>;
                    loaded.o200k = Some(tokenizer.unwrap_or_else(load));
                }
            }
        }
        loaded
    }

    /// Counts the text of a prompt as `model` (the name its provider knows) does. `None`: it is to be estimated, because it
    /// is longer than [`COUNTED_BYTES_MAX`], the model's tokenizer was not loaded, or all threads are busy.
    pub async fn count(&self, model: &str, call: &Call) -> Option<Counted> {
        let content = call.content();
        if !content.endpoint.reads_text() || content.prompt.text_bytes > COUNTED_BYTES_MAX {
            return None;
        }
        let (vocabulary, known) = vocabulary_of(model);
        let tokenizer = self.get(vocabulary)?.clone();
        let thread = timeout(WAIT_MAX, self.threads.clone().acquire_owned()).await.ok()?.ok()?;
        let call = call.clone();
        let counting = spawn_blocking(move || {
            let counted = count(&*tokenizer, &call);
            drop(thread);
            counted
        });
        let counted = counting.await.ok()?;
        Some(Counted { whole: counted.whole && known, ..counted })
    }

    fn get(&self, vocabulary: Vocabulary) -> Option<&Arc<dyn Tokenizer>> {
        match vocabulary {
            Vocabulary::Cl100k => self.cl100k.as_ref(),
            Vocabulary::O200k => self.o200k.as_ref(),
        }
    }
}

/// The vocabulary of a model, and whether it is known to be its own rather than the nearest we have.
fn vocabulary_of(model: &str) -> (Vocabulary, bool) {
    const O200K: [&str; 8] = ["gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "chatgpt-4o", "o1", "o3", "o4-"];
    const CL100K: [&str; 6] = ["gpt-4", "gpt-3.5", "gpt-35", "text-embedding-", "davinci-002", "babbage-002"];
    let name = model.rsplit('/').next().unwrap_or(model);
    let name = name.strip_prefix("ft:").unwrap_or(name);
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    match (begins(&O200K), begins(&CL100K)) {
        (true, _) => (Vocabulary::O200k, true),
        (false, true) => (Vocabulary::Cl100k, true),
        (false, false) => (Vocabulary::O200k, false),
    }
}

fn count(tokenizer: &dyn Tokenizer, call: &Call) -> Counted {
    let (mut tokens, mut whole) = (0, true);
    let messages = call.texts(&mut |text: Text<'_>| {
        tokens += tokenizer.count(&text.text) as u64;
        let in_chat = text.member == "messages";
        tokens += if in_chat && text.name == "name" { TOKENS_PER_NAME } else { 0 };
        whole &= match text.member {
            "messages" => matches!(text.name, "content" | "text" | "name"),
            "prompt" | "input" => true,
            _ => false,
        };
    });
    if call.endpoint() == Endpoint::ChatCompletions {
        tokens += messages * TOKENS_PER_MESSAGE + TOKENS_BEFORE_ANSWER;
    }
    Counted { tokens, whole }
}

#[cfg(test)]
mod tests;
