//! The requests that ended last on this instance, and how many there were: for people, never for decisions.
//!
//! A ring of fixed size. A request that ends takes the next number and the slot that belongs to it, so two that end at
//! once meet in one atomic counter and nowhere else. Nobody is told: whoever follows remembers the number it has seen
//! and looks again. One who looks too seldom finds its place overwritten and knows by the numbers how much it missed;
//! a slow reader therefore costs no memory, and none costs nothing.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tollgate_limiter::{Cost, Source};

use crate::config::Key;
use crate::dialect::Usage;
use crate::ids::RequestId;
use crate::metrics::{Name, ProviderSeries};

/// How many requests are remembered.
pub const KEPT: u64 = 1_024;

/// One request that has ended. Nothing of what was asked or answered, no secret; its texts are shared with the
/// configuration it belonged to.
pub struct Ended {
    /// When, for people.
    pub time: SystemTime,
    /// The same by a clock that never steps.
    pub at: Instant,
    /// Its `x-request-id`.
    pub request_id: RequestId,
    /// `GET`, `POST`, …; `other`, or `-` where there was none.
    pub method: &'static str,
    /// Canonical route or `other`.
    pub endpoint: &'static str,
    /// What it was answered with; 499: its caller left before.
    pub status: u16,
    /// `done`, `refused`, `client_left`, …
    pub outcome: &'static str,
    /// `code` of the error sent.
    pub code: Option<&'static str>,
    /// What refused it: the id of a limit, or the name of a rule that denies.
    pub rule: Option<Name>,
    /// Who decided about its limits.
    pub source: Option<Source>,
    /// The key it came with.
    pub key: Option<Arc<Key>>,
    /// Where it came from.
    pub address: IpAddr,
    /// The resolved model.
    pub model: Option<Name>,
    /// Who was asked last.
    pub provider: Option<Arc<ProviderSeries>>,
    /// Whether an event stream was asked for.
    pub streamed: bool,
    /// What was used, once known.
    pub usage: Option<Usage>,
    /// Counted here, because the provider did not say.
    pub estimated: bool,
    /// What it cost.
    pub cost: Cost,
    /// From its head to the last byte handed over.
    pub latency: Duration,
    /// From its head to the first event of its stream.
    pub first_token: Option<Duration>,
    /// What we added before the answer began; `None`: there was no answer.
    pub overhead: Option<Duration>,
    /// How long providers were waited for; `None`: none was asked.
    pub upstream: Option<Duration>,
}

impl Ended {
    /// Name of the user it came from.
    pub fn user(&self) -> Option<&str> {
        Some(self.key.as_ref()?.user.as_ref()?.name.as_str())
    }
}

/// Since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests whose head has arrived.
    pub begun: u64,
    /// Requests that have ended.
    pub ended: u64,
    /// Of these, those that a rule refused.
    pub refused: u64,
    /// Those answered with a 5xx.
    pub failed: u64,
    /// Tokens of prompts.
    pub input_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
}

/// What is found under a number.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// What was wanted of it.
    There(T),
    /// Its request is just being written down, or has not ended.
    NotYet,
    /// A later one stands in its place.
    Gone,
}

/// See the module.
pub struct Journal {
    slots: Box<[Mutex<Slot>]>,
    begun: AtomicU64,
    /// The number given last; the first request has 1.
    ended: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    input_tokens: AtomicU64,
    output_tokens: AtomicU64,
}

#[derive(Default)]
struct Slot {
    /// 0: nobody's yet.
    number: u64,
    ended: Option<Ended>,
}

impl Default for Journal {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            slots: (0..KEPT).map(|_| Mutex::default()).collect(),
            begun: zero(),
            ended: zero(),
            refused: zero(),
            failed: zero(),
            input_tokens: zero(),
            output_tokens: zero(),
        }
    }
}

impl Journal {
    /// A request's head has arrived.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// A request has ended.
    pub fn end(&self, ended: Ended) {
        if ended.rule.is_some() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        if ended.status >= 500 {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(usage) = ended.usage {
            self.input_tokens.fetch_add(usage.prompt, Ordering::Relaxed);
            self.output_tokens.fetch_add(usage.completion, Ordering::Relaxed);
        }
        let number = self.ended.fetch_add(1, Ordering::Relaxed) + 1;
        let mut slot = self.slot(number).lock().unwrap_or_else(PoisonError::into_inner);
        if slot.number > number {
            // Overtaken by a whole round while it waited for its turn.
            return;
        }
        slot.number = number;
        let before = slot.ended.replace(ended);
        drop(slot);
        // What it held last of an old configuration is freed without anybody waiting.
        drop(before);
    }

    /// What was counted since the start.
    pub fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        // What has ended is read before what has begun: nobody sees fewer than none under way.
        let ended = read(&self.ended);
        Counts {
            ended,
            begun: read(&self.begun).max(ended),
            refused: read(&self.refused),
            failed: read(&self.failed),
            input_tokens: read(&self.input_tokens),
            output_tokens: read(&self.output_tokens),
        }
    }

    /// The number of the request that ended last; 0: none has.
    pub fn last(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// Numbers under which something may still be found, with this the last one.
    pub fn kept(last: u64) -> std::ops::RangeInclusive<u64> {
        last.saturating_sub(KEPT) + 1..=last
    }

    /// Looks at the request with a number, without copying it; `look` holds up the one that would take its place.
    pub fn look<T>(&self, number: u64, look: impl FnOnce(&Ended) -> T) -> Found<T> {
        let slot = self.slot(number).lock().unwrap_or_else(PoisonError::into_inner);
        match (slot.number.cmp(&number), &slot.ended) {
            (std::cmp::Ordering::Equal, Some(ended)) => Found::There(look(ended)),
            (std::cmp::Ordering::Greater, _) => Found::Gone,
            _ => Found::NotYet,
        }
    }

    fn slot(&self, number: u64) -> &Mutex<Slot> {
        // The remainder is less than a number of slots that was made from the same constant.
        &self.slots[(number % KEPT) as usize]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// One that was answered.
    pub(crate) fn ended(status: u16) -> Ended {
        Ended {
            time: SystemTime::now(),
            at: Instant::now(),
            request_id: RequestId::parse(b"id").expect("one"),
            method: "POST",
            endpoint: "/v1/chat/completions",
            status,
            outcome: "done",
            code: None,
            rule: None,
            source: None,
            key: None,
            address: Ipv4Addr::LOCALHOST.into(),
            model: None,
            provider: None,
            streamed: false,
            usage: None,
            estimated: false,
            cost: Cost::ZERO,
            latency: Duration::ZERO,
            first_token: None,
            overhead: None,
            upstream: None,
        }
    }

    #[test]
    fn the_last_ones_are_found_by_their_numbers() {
        let journal = Journal::default();
        assert_eq!(journal.look(1, |_| ()), Found::NotYet);
        assert!(Journal::kept(journal.last()).is_empty());
        for status in 1..=KEPT as u16 + 3 {
            journal.begin();
            journal.end(ended(status));
        }
        journal.begin();
        let last = journal.last();
        assert_eq!(last, KEPT + 3);
        assert_eq!(journal.look(3, |_| ()), Found::Gone);
        assert_eq!(journal.look(last + 1, |_| ()), Found::NotYet);
        for number in Journal::kept(last) {
            assert_eq!(journal.look(number, |ended| u64::from(ended.status)), Found::There(number));
        }
        let counts = journal.counts();
        assert_eq!((counts.begun, counts.ended, counts.failed), (KEPT + 4, KEPT + 3, KEPT + 3 - 499));
    }

    #[test]
    fn many_at_once_are_each_written_down() {
        let journal = Journal::default();
        let workers = 4;
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| (0..10_000).for_each(|_| journal.end(ended(200))));
            }
        });
        assert_eq!(journal.last(), workers * 10_000);
        let found =
            Journal::kept(journal.last()).filter(|number| journal.look(*number, |_| ()) == Found::There(()));
        assert_eq!(found.count() as u64, KEPT);
    }
}
