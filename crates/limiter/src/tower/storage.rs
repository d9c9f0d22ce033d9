//! Where counters are, by URL.

use std::fmt;
use std::str::FromStr;

use crate::clock::SystemClock;
use crate::limit::Charge;
use crate::memory::MemoryStore;
use crate::names::excerpt;
use crate::reservation::Decision;

/// Where the counters of a layer are. Clones share them.
#[derive(Clone, Debug)]
pub struct Storage(MemoryStore);

impl Storage {
    /// - `memory://`: in this process, forgotten when it ends
    /// - `memory:///var/lib/app/limits.redb`: the same, and kept in this file over restarts (feature `persist`)
    ///
    /// `redis://` and its kin need the feature `redis`.
    pub fn from_url(url: &str) -> Result<Storage, StorageError> {
        let refused = |problem: String| Err(StorageError { url: masked(url), problem });
        let Some((scheme, rest)) = url.split_once("://") else {
            return refused("no storage; write `memory://`, or `redis://host:6379`".into());
        };
        match (scheme, rest) {
            ("memory", "") => Ok(Storage(MemoryStore::new(SystemClock))),
            ("memory", path) => persisted(path).or_else(refused),
            ("redis" | "rediss" | "unix" | "redis+sentinel" | "redis+cluster", _) => {
                refused("Redis needs the feature `redis` of tollgate-limiter, which is not built in".into())
            }
            _ => refused("an unknown storage; allowed: memory://, redis://, rediss://, unix://".into()),
        }
    }

    /// The store in memory, to look at it or clear a subject.
    pub fn as_memory(&self) -> Option<&MemoryStore> {
        Some(&self.0)
    }

    /// Takes every charge, or none.
    pub(super) async fn reserve(&self, charges: Vec<Charge>) -> Decision {
        self.0.reserve(charges)
    }
}

impl From<MemoryStore> for Storage {
    fn from(store: MemoryStore) -> Storage {
        Storage(store)
    }
}

impl FromStr for Storage {
    type Err = StorageError;

    fn from_str(url: &str) -> Result<Storage, StorageError> {
        Storage::from_url(url)
    }
}

/// A URL that is no storage, or one that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageError {
    url: String,
    problem: String,
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.url, self.problem)
    }
}

impl std::error::Error for StorageError {}

#[cfg(feature = "persist")]
fn persisted(path: &str) -> Result<Storage, String> {
    let store = MemoryStore::open(path, SystemClock, crate::memory::Budgets::default());
    store.map(Storage).map_err(|error| error.problem().to_string())
}

#[cfg(not(feature = "persist"))]
fn persisted(_: &str) -> Result<Storage, String> {
    Err("a file needs the feature `persist` of tollgate-limiter, which is not built in".into())
}

/// Without what may be a password.
fn masked(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => excerpt(&format!("{scheme}://…@{host}")),
        _ => excerpt(url),
    }
}
