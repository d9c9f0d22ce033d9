//! All subjects that have counters, a page at a time, each with its fullest limit.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use tollgate_limiter::{CHARGES_MAX, Charge, Limit, Millis, Place, Subject};

use crate::Gateway;
use crate::control::KEY_RULE;
use crate::rates::Rate;
use crate::snapshot::Snapshot;

/// Slices of the store that one page looks at: a page may be short where the store is full of other things.
const SLICES_MAX: usize = 100;
/// Subjects asked about at the same time.
const AT_ONCE: usize = 50;

/// Where a walk goes on: a slice of the store, and how many of its subjects were told of.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    place: Place,
    told: usize,
}

impl Step {
    /// Reads what [`fmt::Display`] writes.
    pub(super) fn read(text: &str) -> Option<Self> {
        let mut numbers = text.strip_prefix('~')?.split(':');
        let place = Place { shard: numbers.next()?.parse().ok()?, cursor: numbers.next()?.parse().ok()? };
        let told = numbers.next()?.parse().ok()?;
        numbers.next().is_none().then_some(Self { place, told })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "~{}:{}:{}", self.place.shard, self.place.cursor, self.told)
    }
}

/// At most `count` rates of subjects for which `wanted` holds, and where the next are; `None`: there are no others, or the
/// store does not tell.
pub(super) async fn rates(
    gateway: &Gateway,
    mut step: Step,
    count: usize,
    wanted: impl Fn(&Rate) -> bool,
) -> (Vec<Rate>, Option<Step>) {
    let now = gateway.snapshot.load_full();
    let limits: HashMap<&str, &Arc<Limit>> =
        now.rules().iter().flat_map(|rule| &rule.limits).map(|limit| (limit.id(), limit)).collect();
    let mut found = Vec::new();
    for _ in 0..SLICES_MAX {
        let slice = gateway.limits.walk(step.place).await;
        let Ok((subjects, next)) = slice.inspect_err(|error| tracing::warn!(%error, "no walk over subjects"))
        else {
            return (found, None);
        };
        let mut left = subjects.get(step.told..).unwrap_or_default();
        while !left.is_empty() && found.len() < count {
            // No more than there is room for: each of them may be told of.
            let (these, rest) = left.split_at(left.len().min(AT_ONCE).min(count - found.len()));
            let asked = these.iter().map(|subject| fullest(gateway, &now, &limits, subject));
            found.extend(join_all(asked).await.into_iter().flatten().filter(&wanted));
            (left, step.told) = (rest, step.told + these.len());
        }
        if !left.is_empty() {
            return (found, Some(step));
        }
        match next {
            None => return (found, None),
            Some(place) => step = Step { place, told: 0 },
        }
    }
    (found, Some(step))
}

/// The fullest enforced limit of a subject, if anything of it is in use.
async fn fullest(
    gateway: &Gateway,
    now: &Snapshot,
    limits: &HashMap<&str, &Arc<Limit>>,
    subject: &Subject,
) -> Option<Rate> {
    let ids = gateway.limits.limits_of(subject).await.ok()?;
    let key = subject.as_str().strip_prefix("api_key:").and_then(|id| now.key_of(id));
    let own = |id: &str| key?.own.limits.iter().find(|limit| limit.id() == id);
    let known = |id: &String| match id.strip_prefix(KEY_RULE) {
        Some(_) => own(id),
        None => limits.get(id.as_str()).copied(),
    };
    let enforced = ids.iter().filter_map(known).filter(|limit| !limit.is_shadow());
    let charges: Vec<Charge> =
        enforced.take(CHARGES_MAX).map(|limit| Charge::new(limit.clone(), subject.clone(), 1)).collect();
    let said = gateway.limits.peek(charges).await.ok()?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = Millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let used = said.iter().filter(|standing| standing.used > 0).map(|standing| Rate::of(standing, time));
    used.max_by_key(Rate::fullness)
}
