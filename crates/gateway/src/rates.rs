//! What is used just now, and of whom: of each subject seen lately the fullest limit, and how many requests met any.
//!
//! For people, never for decisions: those are the store's. Filled from what the store said to each request, bounded, and
//! split, so that two requests seldom wait for one another.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tollgate_limiter::{Decision, Limit, Millis, Source, Span, Standing, Subject, Window};

const SHARDS: usize = 64;
/// Subjects remembered in one of them.
const SUBJECTS_MAX: usize = 1_024;
/// In a full one, the emptiest of so many makes room.
const LOOKED_AT: usize = 8;

/// Requests that limits decided on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// All of them.
    pub requests: u64,
    /// Those that were refused.
    pub blocked: u64,
}

/// One subject's fullest limit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rate {
    /// Its canonical text: `ip:192.0.2.1`.
    pub subject: String,
    /// Id of the limit.
    pub rule: String,
    /// What it counts: `requests`.
    pub unit: String,
    /// In use, units.
    pub used: u64,
    /// What may be in use, units.
    pub limit: u64,
    /// `1m`; empty where calls in flight are counted.
    pub window: String,
    /// When nothing is in use any more, if nothing is taken until then; by the store's clock, milliseconds.
    pub resets: u64,
    /// When that was said, by the store's clock, milliseconds.
    pub said: u64,
}

impl Rate {
    /// What a limit says just now; `said`: by the store's clock.
    pub fn of(standing: &Standing, said: Millis) -> Self {
        Seen::new(standing, said, Instant::now()).shown(standing.subject.as_str())
    }

    /// How full it is, millionths.
    pub fn fullness(&self) -> u64 {
        fullness(self.used, self.limit)
    }

    /// As live views show it, with the time it takes until it is empty again at this moment, Unix milliseconds.
    pub fn live(&self, now: u64) -> Value {
        json!({ "key": public_name(&self.subject), "rule": self.rule, "unit": self.unit, "used": self.used,
                "limit": self.limit, "window": self.window, "reset_ms": self.resets.saturating_sub(now) })
    }
}

/// A moment as [`Rate`] has them.
pub fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What a subject is publicly called: `rate_limit:ip:192.0.2.1`. What the admin API reads.
pub fn public_name(subject: &str) -> String {
    let Some(rest) = subject.strip_prefix("ip:") else { return format!("rate_limit:{subject}") };
    // IPv6 is written with colons, which stand between names and values: those of values are written otherwise.
    let (ip, more) = rest.split_once(':').map_or((rest, None), |(ip, more)| (ip, Some(more)));
    let ip = ip.replace("%3A", ":");
    match more.map(|more| more.strip_prefix("endpoint:")) {
        None => format!("rate_limit:ip:{ip}"),
        Some(Some(path)) if !path.contains(':') => format!("rate_limit:endpoint:{path}:{ip}"),
        Some(_) => format!("rate_limit:{subject}"),
    }
}

type Shard = HashMap<Whose, Seen, foldhash::fast::RandomState>;

/// The rates of this process.
pub struct Rates {
    shards: [Mutex<Shard>; SHARDS],
    requests: AtomicU64,
    blocked: AtomicU64,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            requests: AtomicU64::new(0),
            blocked: AtomicU64::new(0),
        }
    }
}

impl Rates {
    /// Takes in what limits said to one request, at this moment of ours.
    pub fn note(&self, decision: &Decision, at: Instant) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if !decision.is_granted() {
            self.blocked.fetch_add(1, Ordering::Relaxed);
        }
        if decision.source() == Source::Open {
            // Nothing was counted, so nothing is known.
            return;
        }
        let standings = decision.standings();
        for (index, first) in standings.iter().enumerate() {
            if standings[..index].iter().any(|before| before.subject == first.subject) {
                continue;
            }
            let theirs = || standings[index..].iter().filter(|said| said.subject == first.subject);
            let enforced = theirs().filter(|said| !said.limit.is_shadow());
            if let Some(fullest) = enforced.max_by_key(|said| fullness(said.used, said.limit.capacity())) {
                let told_of = |limit: &Arc<Limit>| {
                    theirs().any(|said| Arc::ptr_eq(&said.limit, limit) || said.limit.id() == limit.id())
                };
                self.keep(fullest, decision.now(), at, told_of);
            }
        }
    }

    /// What was counted since the start.
    pub fn totals(&self) -> Totals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals { requests: read(&self.requests), blocked: read(&self.blocked) }
    }

    /// The fullest, at most `count`, in no order. Those that are empty again are forgotten.
    pub fn fullest(&self, count: usize) -> Vec<Rate> {
        let now = Instant::now();
        let mut found: Vec<(Whose, Seen)> = Vec::new();
        for shard in &self.shards {
            let mut shard = lock(shard);
            shard.retain(|_, seen| seen.until > now);
            found.extend(shard.iter().map(|(whose, seen)| (whose.clone(), seen.clone())));
        }
        if found.len() > count {
            found.select_nth_unstable_by_key(count, |(_, seen)| std::cmp::Reverse(seen.fullness()));
            found.truncate(count);
        }
        found.iter().map(|(whose, seen)| seen.shown(whose.0.as_str())).collect()
    }

    /// It was cleared.
    pub fn forget(&self, subject: &str) {
        lock(self.shard(subject)).remove(subject);
    }

    /// `told_of`: whether this decision asked that limit too. What it says now is known then, and what was seen of it
    /// earlier is out of date.
    fn keep(&self, standing: &Standing, said: Millis, at: Instant, told_of: impl Fn(&Arc<Limit>) -> bool) {
        let mut shard = lock(self.shard(standing.subject.as_str()));
        if let Some(seen) = shard.get_mut(standing.subject.as_str()) {
            let stale = told_of(&seen.limit) || seen.until <= at;
            if stale || seen.fullness() < fullness(standing.used, standing.limit.capacity()) {
                seen.update(standing, said, at);
            }
            return;
        }
        let seen = Seen::new(standing, said, at);
        if shard.len() >= SUBJECTS_MAX {
            let weighed = shard.iter().take(LOOKED_AT).map(|(whose, other)| (other.weight(at), whose));
            let Some((weight, whose)) = weighed.min_by_key(|(weight, _)| *weight) else { return };
            if weight > seen.fullness() {
                return;
            }
            let emptiest = whose.clone();
            shard.remove(&emptiest);
        }
        shard.insert(Whose(standing.subject.clone()), seen);
    }

    fn shard(&self, subject: &str) -> &Mutex<Shard> {
        // The map within hashes well; here it only matters that different subjects seldom meet.
        let end = subject.as_bytes().iter().rev().take(8);
        let sum = end.fold(subject.len(), |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte)));
        &self.shards[sum % SHARDS]
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A subject, found by its text.
#[derive(Clone, PartialEq, Eq)]
struct Whose(Subject);

impl Hash for Whose {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

impl Borrow<str> for Whose {
    fn borrow(&self) -> &str {
        self.0.as_str()
    }
}

/// What a limit said last.
#[derive(Clone)]
struct Seen {
    limit: Arc<Limit>,
    used: u64,
    said: Millis,
    reset: Millis,
    /// By our clock; the store's may be another one.
    until: Instant,
}

impl Seen {
    fn new(standing: &Standing, said: Millis, at: Instant) -> Self {
        let until = end(at, standing.reset);
        Self { limit: standing.limit.clone(), used: standing.used, said, reset: standing.reset, until }
    }

    fn update(&mut self, standing: &Standing, said: Millis, at: Instant) {
        if !Arc::ptr_eq(&self.limit, &standing.limit) {
            self.limit = standing.limit.clone();
        }
        (self.used, self.said, self.reset) = (standing.used, said, standing.reset);
        self.until = end(at, standing.reset);
    }

    fn fullness(&self) -> u64 {
        fullness(self.used, self.limit.capacity())
    }

    /// What it is worth to remember: nothing when it is over.
    fn weight(&self, now: Instant) -> u64 {
        if self.until <= now { 0 } else { self.fullness() }
    }

    fn shown(&self, subject: &str) -> Rate {
        Rate {
            subject: subject.to_owned(),
            rule: self.limit.id().to_owned(),
            unit: self.limit.unit().as_str().to_owned(),
            used: self.used,
            limit: self.limit.capacity(),
            window: self.limit.quota().window().map(window).unwrap_or_default(),
            resets: self.said.get().saturating_add(self.reset.get()),
            said: self.said.get(),
        }
    }
}

fn end(at: Instant, wait: Millis) -> Instant {
    at.checked_add(Duration::from_millis(wait.get())).unwrap_or(at)
}

/// Millionths.
fn fullness(used: u64, capacity: u64) -> u64 {
    let capacity = capacity.max(1);
    match used.checked_mul(1_000_000) {
        Some(millionths) => millionths / capacity,
        None => u64::try_from(u128::from(used) * 1_000_000 / u128::from(capacity)).unwrap_or(u64::MAX),
    }
}

/// As existing scripts read it: `30s`, `1m`, `1h`, `24h`, `7d`, `1mo`.
fn window(window: Window) -> String {
    let seconds = match (window.span(), window.length()) {
        (Span::Month, _) | (_, None) => return format!("{}mo", window.count()),
        (_, Some(length)) => length.get() / 1_000,
    };
    match seconds {
        86_400 => "24h".to_owned(),
        _ if seconds.is_multiple_of(86_400) => format!("{}d", seconds / 86_400),
        _ if seconds.is_multiple_of(3_600) => format!("{}h", seconds / 3_600),
        _ if seconds.is_multiple_of(60) => format!("{}m", seconds / 60),
        _ => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use tollgate_limiter::{Algorithm, Charge, Dimension, MemoryStore, Scope, SystemClock};

    use super::*;

    fn limit(quota: &str) -> Arc<Limit> {
        let per = Scope::of([Dimension::User]);
        let quota = quota.parse().expect("a quota");
        Arc::new(Limit::new("rule", quota, Algorithm::FixedWindow, per).expect("a limit"))
    }

    fn user(name: &str) -> Subject {
        Scope::of([Dimension::User]).subject(|_| Cow::Borrowed(name))
    }

    #[test]
    fn windows_are_written_as_scripts_read_them() {
        for (quota, written) in [
            ("1/30 seconds", "30s"),
            ("1/minute", "1m"),
            ("1/hour", "1h"),
            ("1/day", "24h"),
            ("1/week", "7d"),
            ("1/month", "1mo"),
            ("1/60 seconds", "1m"),
        ] {
            assert_eq!(limit(quota).quota().window().map(window).as_deref(), Some(written), "{quota}");
        }
    }

    #[test]
    fn each_subject_has_its_fullest_limit() {
        let (store, rates) = (MemoryStore::new(SystemClock), Rates::default());
        let (narrow, wide) = (limit("2/hour"), limit("10/day"));
        let charge = |limit: &Arc<Limit>| Charge::new(limit.clone(), user("alice"), 1);
        for _ in 0..3 {
            rates.note(&store.reserve(vec![charge(&wide), charge(&narrow)]), Instant::now());
        }
        let found = rates.fullest(10);
        assert_eq!(found.len(), 1);
        let rate = &found[0];
        assert_eq!((&*rate.subject, rate.used, rate.limit, &*rate.window), ("user:alice", 2, 2, "1h"));
        assert_eq!(rates.totals(), Totals { requests: 3, blocked: 1 });
        rates.forget("user:alice");
        assert!(rates.fullest(10).is_empty());
    }

    #[test]
    fn many_subjects_are_a_bounded_number_and_the_fullest_stay() {
        let (store, rates) = (MemoryStore::new(SystemClock), Rates::default());
        let limit = limit("100/hour");
        let full = Charge::new(limit.clone(), user("full"), 90);
        rates.note(&store.reserve(vec![full]), Instant::now());
        for number in 0..2 * SHARDS * SUBJECTS_MAX {
            let charge = Charge::new(limit.clone(), user(&number.to_string()), 1);
            rates.note(&store.reserve(vec![charge]), Instant::now());
        }
        assert!(rates.fullest(usize::MAX).len() <= SHARDS * SUBJECTS_MAX);
        assert_eq!(rates.fullest(1)[0].subject, "user:full");
    }
}
