//! Whether the shared store is asked, and why not.

use std::fmt;

use crate::clock::Millis;
use crate::store::StoreError;

/// Whether the shared store is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Circuit {
    /// It is.
    Closed,
    /// It is not, but for a probe now and then: every limit says what it says while the store does not answer.
    Open {
        /// Since when, by the store's time.
        since: Millis,
        /// The failure that was one too many.
        why: Failure,
    },
}

impl Circuit {
    /// Whether the store is not asked.
    pub const fn is_open(self) -> bool {
        matches!(self, Circuit::Open { .. })
    }
}

impl fmt::Display for Circuit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Circuit::Closed => f.write_str("closed"),
            Circuit::Open { why, .. } => write!(f, "open: {why}"),
        }
    }
}

/// How a store failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Failure {
    /// There is no connection.
    Unreachable,
    /// Too many were waiting already.
    Busy,
    /// No answer in time.
    Timeout,
    /// The connection broke.
    Lost,
    /// It has no memory left to count in. Settlements still get through, where the server lets them.
    OutOfMemory,
    /// It answered with another error: a replica, loading, a wrong password.
    Refused,
    /// Its answer made no sense.
    Reply,
}

impl Failure {
    /// Every one of them.
    pub const ALL: [Failure; 7] = [
        Failure::Unreachable,
        Failure::Busy,
        Failure::Timeout,
        Failure::Lost,
        Failure::OutOfMemory,
        Failure::Refused,
        Failure::Reply,
    ];

    /// The name used in metrics: `out_of_memory`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Failure::Unreachable => "unreachable",
            Failure::Busy => "busy",
            Failure::Timeout => "timeout",
            Failure::Lost => "lost",
            Failure::OutOfMemory => "out_of_memory",
            Failure::Refused => "refused",
            Failure::Reply => "reply",
        }
    }

    /// `None`: the question was wrong, not the store.
    pub(super) fn of(error: &StoreError) -> Option<Failure> {
        Some(match error {
            StoreError::Unreachable => Failure::Unreachable,
            StoreError::Busy => Failure::Busy,
            StoreError::Timeout => Failure::Timeout,
            StoreError::Lost => Failure::Lost,
            StoreError::Refused { code, .. } if code == "OOM" => Failure::OutOfMemory,
            StoreError::Refused { .. } => Failure::Refused,
            StoreError::Reply(_) => Failure::Reply,
            StoreError::Charges(_) | StoreError::Closed { .. } => return None,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
