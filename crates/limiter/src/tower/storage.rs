//! Where counters are, by URL.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::clock::SystemClock;
use crate::limit::Charge;
use crate::memory::MemoryStore;
use crate::names::excerpt;
use crate::reservation::Decision;
use crate::store::{Store, StoreError};

/// Where the counters of a layer are. Clones share them.
#[derive(Clone)]
pub struct Storage {
    store: Arc<dyn Store>,
    memory: Option<MemoryStore>,
}

impl Storage {
    /// Any store.
    pub fn new(store: impl Store + 'static) -> Storage {
        Storage { store: Arc::new(store), memory: None }
    }

    /// - `memory://`: in this process, forgotten when it ends
    /// - `memory:///var/lib/app/limits.redb`: the same, and kept in this file over restarts (feature `persist`)
    /// - `redis://host:6379/0`, `unix:///run/redis.sock` and the other forms of [`RedisOptions`]: shared by many
    ///   processes (feature `redis`); inside a tokio runtime
    ///
    /// [`RedisOptions`]: https://docs.rs/tollgate-limiter/latest/tollgate_limiter/struct.RedisOptions.html#method.new
    pub fn from_url(url: &str) -> Result<Storage, StorageError> {
        let refused = |problem: String| Err(StorageError { url: masked(url), problem });
        let Some((scheme, rest)) = url.split_once("://") else {
            return refused("no storage; write `memory://`, or `redis://host:6379`".into());
        };
        let kind = scheme.split('+').next().unwrap_or(scheme);
        match (kind, rest) {
            ("memory", "") => Ok(MemoryStore::new(SystemClock).into()),
            ("memory", path) => persisted(path).or_else(refused),
            ("redis" | "rediss" | "unix", _) => in_redis(url).or_else(refused),
            _ => refused("an unknown storage; allowed: memory://, redis://, rediss://, unix://".into()),
        }
    }

    /// The store in memory, if it is one, to look at it or clear a subject.
    pub fn as_memory(&self) -> Option<&MemoryStore> {
        self.memory.as_ref()
    }

    /// Takes every charge, or none.
    pub(super) async fn reserve(&self, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        match &self.memory {
            Some(memory) => Ok(memory.reserve(charges)),
            None => self.store.reserve(charges).await,
        }
    }
}

impl From<MemoryStore> for Storage {
    fn from(store: MemoryStore) -> Storage {
        Storage { store: Arc::new(store.clone()), memory: Some(store) }
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storage").field("memory", &self.memory).finish_non_exhaustive()
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
    store.map(Storage::from).map_err(|error| error.problem().to_string())
}

#[cfg(not(feature = "persist"))]
fn persisted(_: &str) -> Result<Storage, String> {
    Err("a file needs the feature `persist` of tollgate-limiter, which is not built in".into())
}

#[cfg(feature = "redis")]
fn in_redis(url: &str) -> Result<Storage, String> {
    let store = crate::redis::RedisStore::open(crate::redis::RedisOptions::new(url));
    store.map(Storage::new).map_err(|error| error.to_string())
}

#[cfg(not(feature = "redis"))]
fn in_redis(_: &str) -> Result<Storage, String> {
    Err("Redis needs the feature `redis` of tollgate-limiter, which is not built in".into())
}

/// Without what may be a password.
fn masked(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => excerpt(&format!("{scheme}://…@{host}")),
        _ => excerpt(url),
    }
}
