//! What limits said to requests of this process: for people, never for decisions.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::config::Rule;

/// What one limit said, since the start of the process.
#[derive(Debug, Default)]
pub(super) struct Count {
    allowed: AtomicU64,
    refused: AtomicU64,
    shadow: AtomicU64,
    failed: AtomicU64,
}

/// What one limit had said at some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// It had room.
    pub allowed: u64,
    /// It had none.
    pub refused: u64,
    /// It had none, and only counts.
    pub shadow: u64,
    /// Its store did not answer.
    pub failed: u64,
}

impl Count {
    pub(super) fn allow(&self) {
        self.allowed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn shadow(&self) {
        self.shadow.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn said(&self) -> Said {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Said {
            allowed: read(&self.allowed),
            refused: read(&self.refused),
            shadow: read(&self.shadow),
            failed: read(&self.failed),
        }
    }
}

/// Counts by the ids of limits, kept over changes of the configuration.
#[derive(Debug, Default)]
pub struct Counts(RwLock<HashMap<String, Arc<Count>>>);

impl Counts {
    /// What the limit with this id said; nothing, if no request has met it.
    pub fn said(&self, limit: &str) -> Said {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.get(limit).map(|count| count.said()).unwrap_or_default()
    }

    /// Where the limit with this id is counted.
    pub(super) fn of(&self, limit: &str) -> Arc<Count> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(limit).cloned();
        known.unwrap_or_else(|| {
            let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
            known.entry(limit.to_owned()).or_default().clone()
        })
    }

    /// Forgets limits that are in none of these rules and that no request can meet any more.
    pub(super) fn keep(&self, rules: &[Rule]) {
        let ids: HashSet<&str> = rules.iter().flat_map(|rule| &rule.limits).map(|limit| limit.id()).collect();
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|id, count| ids.contains(id.as_str()) || Arc::strong_count(count) > 1);
    }
}
