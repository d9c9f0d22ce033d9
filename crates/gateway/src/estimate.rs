//! What a request will probably use, said before it is sent and learned from what requests did use.
//!
//! ```text
//! model        → tokens a byte of text is, tokens an image is      (mean and deviation of what providers said)
//! key × model  → the answers of late that nobody bounded           (their 95th percentile)
//! ```
//!
//! Estimates are reserved, and settled to the truth afterwards: they need not be exact, only cheap, bounded in memory,
//! rather too high than too low, and safe from callers. So a key's answers are estimated by its own answers alone; what
//! all keys teach a model has bounds, and a key that asks a hundred times as often teaches no more than another.

mod exact;
mod series;
mod table;

use std::hash::BuildHasher;

pub use exact::{COUNTED_BYTES_MAX, Counted, Tokenizer, Tokenizers};
use series::{Answers, Level};
use table::Table;

use crate::call::Content;
use crate::dialect::Usage;

/// Most models, and most pairs of key and model, that are remembered; beyond, the least recently used are forgotten.
pub const MODELS_MAX: usize = 512;
/// See [`MODELS_MAX`].
pub const KEYS_MAX: usize = 10_000;

/// Tokens of one answer, before any was seen.
pub const OUTPUT_START: u64 = 512;
/// Tokens of a recording, and of any other file.
pub const TOKENS_PER_FILE: u64 = 1_500;

/// Tokens that a byte of text is: before any was seen, at least, at most.
const TEXT: Bounds = Bounds { start: 1.0 / 3.0, min: 1.0 / 16.0, max: 2.0 };
/// Tokens that an image is.
const IMAGE: Bounds = Bounds { start: 1_000.0, min: 64.0, max: 65_536.0 };

/// A prompt teaches in proportion to its text, up to this much: a short one is mostly the format around it.
const TEACHING_BYTES: u64 = 1_024;
/// What one request moves a mean at most.
const GAIN: f64 = 1.0 / 8.0;
/// A request has that weight when this many others of its model came since its key's last.
const GAP_MAX: u64 = 8;

#[derive(Clone, Copy)]
struct Bounds {
    start: f64,
    min: f64,
    max: f64,
}

/// What a request will use, in tokens. The default is a request that reserves none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Read.
    pub input: u64,
    /// Written, all answers together.
    pub output: u64,
    /// `input` is no estimate: it was counted, or given as token ids.
    pub input_exact: bool,
    /// `output` is the client's own bound.
    pub output_bounded: bool,
}

impl Estimate {
    /// Read and written.
    pub fn total(&self) -> u64 {
        self.input.saturating_add(self.output)
    }

    /// How many times what was used was estimated; `None` when nothing was, or nothing was used. Where the output was the
    /// client's bound, the input alone: a generous bound is no error of ours.
    pub fn error_ratio(&self, used: &Usage) -> Option<f64> {
        let (estimated, used) = match self.output_bounded {
            true => (self.input, used.prompt),
            false => (self.total(), used.prompt.saturating_add(used.completion)),
        };
        (estimated > 0 && used > 0).then(|| estimated as f64 / used as f64)
    }
}

/// What all requests taught. Shared by all; every look-up is one or two short locks and no allocation.
pub struct Estimates {
    hasher: foldhash::quality::RandomState,
    models: Table<Model>,
    keys: Table<Key>,
}

/// What is known of a model.
struct Model {
    text: Level,
    image: Level,
    /// Requests that taught it.
    taught: u64,
    /// The answers that forgotten keys would have been estimated at: one value a key, however much it asked. The estimate
    /// for keys that nothing is known of.
    forgotten: Answers,
}

/// What is known of a key's use of a model; all callers without a key are one.
struct Key {
    model: u64,
    answers: Answers,
    /// [`Model::taught`] when it taught last.
    taught: u64,
}

impl Default for Estimates {
    fn default() -> Self {
        Self::new(MODELS_MAX, KEYS_MAX)
    }
}

impl Estimates {
    /// Remembers about this many models and pairs of key and model.
    pub fn new(models_max: usize, keys_max: usize) -> Self {
        Self {
            hasher: foldhash::quality::RandomState::default(),
            models: Table::new(models_max),
            keys: Table::new(keys_max),
        }
    }

    /// What a request of `key` (its id; `None`: anonymous) to `model` (resolved) will use. `counted`: its text, where a
    /// tokenizer counted it.
    pub fn before(
        &self,
        key: Option<&str>,
        model: &str,
        content: &Content,
        counted: Option<Counted>,
    ) -> Estimate {
        if !content.endpoint.reads_text() {
            return Estimate::default();
        }
        let prompt = &content.prompt;
        let (text, image, forgotten) = self.model(model);
        let of_text =
            counted.map_or_else(|| tokens(prompt.text_bytes as f64 * text), |counted| counted.tokens);
        let of_images = tokens(prompt.images as f64 * image);
        let of_files = prompt.audio.saturating_add(prompt.files).saturating_mul(TOKENS_PER_FILE);
        let one_answer = || {
            let own = self.keys.get(self.pair(key, model), |key| key.answers.high());
            own.unwrap_or(forgotten)
        };
        // To some servers a bound of nothing is no bound.
        let bound = content.output_max.filter(|bound| *bound > 0);
        let output = match bound {
            _ if !content.endpoint.writes_text() => 0,
            Some(bound) => bound,
            None => one_answer(),
        };
        let media = prompt.images + prompt.audio + prompt.files;
        Estimate {
            input: of_text
                .saturating_add(prompt.token_ids)
                .saturating_add(of_images)
                .saturating_add(of_files),
            output: output.saturating_mul(content.answers),
            input_exact: media == 0 && counted.map_or(prompt.text_bytes == 0, |counted| counted.whole),
            output_bounded: content.endpoint.writes_text() && bound.is_some(),
        }
    }

    /// Learns what a request did use. `used` is what its provider said: nothing is to be learned from our own guesses, nor
    /// from an answer that was cut.
    pub fn learn(&self, key: Option<&str>, model: &str, content: &Content, used: &Usage) {
        if !content.endpoint.reads_text() {
            return;
        }
        let tag = self.hasher.hash_one(model);
        let taught = self.models.update(tag, Model::default, |model| {
            model.taught += 1;
            model.taught
        });
        let first = || Key { model: tag, answers: Answers::new(OUTPUT_START), taught: 0 };
        let pair = self.pair(key, model);
        let since = self.keys.update(pair, first, |key| {
            // A bounded answer does not tell how long an unbounded one would be.
            if content.output_max.is_none() && content.endpoint.writes_text() && used.completion > 0 {
                key.answers.add(used.completion.div_ceil(content.answers.max(1)));
            }
            let since = if key.taught == 0 { GAP_MAX } else { taught.value.saturating_sub(key.taught) };
            key.taught = taught.value;
            since
        });
        // Weight by the gap: over time every key weighs the same, however often it asks.
        let gain = GAIN * since.value.clamp(1, GAP_MAX) as f64 / GAP_MAX as f64;
        self.models.update(tag, Model::default, |model| model.learn(content, used, gain));
        if let Some(key) = since.evicted {
            let high = key.answers.high();
            self.models.update_present(key.model, |model| model.forgotten.add(high));
        }
    }

    /// Tokens of an answer that nobody counted, by its text: of a stream that was cut.
    pub fn tokens_of_text(&self, model: &str, text_bytes: u64) -> u64 {
        tokens(text_bytes as f64 * self.model(model).0)
    }

    /// Tokens a byte of text is and an image is, and the answer of a key that nothing is known of.
    fn model(&self, model: &str) -> (f64, f64, u64) {
        let known = self.models.get(self.hasher.hash_one(model), |model| {
            (model.text.high(), model.image.high(), model.forgotten.high())
        });
        known.unwrap_or((TEXT.start, IMAGE.start, OUTPUT_START))
    }

    fn pair(&self, key: Option<&str>, model: &str) -> u64 {
        self.hasher.hash_one((key, model))
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            text: Level::new(TEXT),
            image: Level::new(IMAGE),
            taught: 0,
            forgotten: Answers::new(OUTPUT_START),
        }
    }
}

impl Model {
    /// Learns only where it is clear what the tokens of a prompt are of.
    fn learn(&mut self, content: &Content, used: &Usage, gain: f64) {
        let prompt = &content.prompt;
        let rest = used.prompt.saturating_sub(prompt.token_ids) as f64;
        if rest == 0.0 || prompt.audio > 0 || prompt.files > 0 {
            return;
        }
        let bytes = prompt.text_bytes as f64;
        if prompt.images == 0 && prompt.text_bytes > 0 {
            let weight = prompt.text_bytes.min(TEACHING_BYTES) as f64 / TEACHING_BYTES as f64;
            self.text.learn(rest / bytes, gain * weight);
        }
        let of_text = bytes * self.text.mean();
        if prompt.images > 0 && of_text < rest / 2.0 {
            self.image.learn((rest - of_text) / prompt.images as f64, gain);
        }
    }
}

/// Whole tokens, rounded up; more than can be becomes the most that can be.
fn tokens(figure: f64) -> u64 {
    figure.ceil() as u64
}

#[cfg(test)]
mod tests;
