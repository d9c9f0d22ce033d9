//! What every store can be asked, and how it fails.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use crate::clock::Millis;
use crate::limit::Charge;
use crate::reservation::{Decision, Standing};
use crate::scope::Subject;

/// An answer on its way.
pub type Answer<'s, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 's>>;

/// The most charges of one request: a shared store decides about no more together. Who compiles rules into limits sees to it
/// that nobody meets more.
pub const CHARGES_MAX: usize = 16;

/// Where a walk over all subjects of a store goes on. The default: at the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Number of the server, or of the part of this process's memory.
    pub shard: usize,
    /// Within that.
    pub cursor: u64,
}

/// Where counters are kept.
///
/// A trait object rather than an enum: stores wrap stores (one that survives the failure of another, one that leases
/// from another), and a service chooses its store when it reads its configuration. The boxed future costs some
/// nanoseconds; who cannot spare them asks a [`MemoryStore`](crate::MemoryStore) by its own methods.
pub trait Store: Send + Sync {
    /// Takes every charge, or none. When the answer is an error that [may have taken](StoreError::outcome_unknown),
    /// asking again could take twice.
    fn reserve(&self, charges: Vec<Charge>) -> Answer<'_, Decision>;

    /// What every limit would say to these charges. Changes nothing.
    fn peek(&self, charges: Vec<Charge>) -> Answer<'_, Vec<Standing>>;

    /// Forgets everything counted for a subject. Says whether there was anything.
    fn clear<'s>(&'s self, subject: &'s Subject) -> Answer<'s, bool>;

    /// Waits until everything that was sent and is awaited by nobody, settlements above all, has been answered or given up.
    /// For a process that ends. A store in this process has nothing to wait for.
    fn flush(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// Counters in this process.
    Memory,
    /// Counters in Redis.
    Redis,
    /// This process, which remembered that Redis had just refused the same.
    DenialMemory,
    /// This process, by its share of the limits: the shared store does not answer.
    Share,
    /// Nobody: the shared store does not answer, and every limit that was met lets everything pass then.
    Open,
    /// Nobody: the shared store does not answer, and a limit that was met lets nothing pass then. A decision never
    /// says this; it is what [`StoreError::Closed`] is labelled with.
    Closed,
}

impl Source {
    /// The name used in metrics: `denial_memory`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Memory => "memory",
            Source::Redis => "redis",
            Source::DenialMemory => "denial_memory",
            Source::Share => "share",
            Source::Open => "open",
            Source::Closed => "closed",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A store that did not answer. A refusal is none: it is a [`Decision`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no connection, and none came in time. Nothing was asked.
    Unreachable,
    /// Too many are waiting already. Nothing was asked.
    Busy,
    /// No answer in time. It may have been taken.
    Timeout,
    /// The connection broke while the answer was awaited. It may have been taken.
    Lost,
    /// The store answered with an error: its code and its words.
    Refused {
        /// `OOM`, `READONLY`, …; `ERR` for anything else.
        code: String,
        /// What the store said.
        message: String,
    },
    /// The answer makes no sense: what, and what was expected.
    Reply(String),
    /// These charges cannot be decided together: why. Nothing was asked.
    Charges(String),
    /// The store does not answer, and this limit lets nothing pass until it does. No refusal: nobody counted.
    Closed {
        /// The id of the limit.
        limit: String,
        /// When it is worth asking again.
        retry: Millis,
    },
}

impl StoreError {
    /// Whether what was asked may have been done all the same.
    pub const fn outcome_unknown(&self) -> bool {
        matches!(self, StoreError::Timeout | StoreError::Lost | StoreError::Reply(_))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unreachable => f.write_str("the store cannot be reached"),
            StoreError::Busy => f.write_str("too many requests are waiting for the store"),
            StoreError::Timeout => f.write_str("the store did not answer in time"),
            StoreError::Lost => f.write_str("the connection to the store broke"),
            StoreError::Refused { code, message } => write!(f, "the store refused: {code} {message}"),
            StoreError::Reply(problem) => write!(f, "the store's answer makes no sense: {problem}"),
            StoreError::Closed { limit, .. } => {
                write!(f, "`{limit}` lets nothing pass while the store does not answer")
            }
            StoreError::Charges(problem) => write!(f, "charges that cannot be decided together: {problem}"),
        }
    }
}

impl std::error::Error for StoreError {}
