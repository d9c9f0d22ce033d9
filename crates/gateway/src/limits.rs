//! Where counters are kept: in this process, or in a Redis that many share.

use tollgate_limiter::redis::OpenError;
use tollgate_limiter::{
    Charge, Decision, MemoryStore, RedisOptions, RedisStore, Standing, Store, StoreError, Subject,
    SystemClock,
};

use crate::config::Config;

/// The store of a gateway's limits.
pub enum Limits {
    /// Of this process alone. Answers at once.
    Memory(MemoryStore),
    /// Shared.
    Redis(Box<dyn Store>),
}

impl Limits {
    /// The store that a configuration asks for; one in Redis is connected to in the background, on the runtime this is
    /// called in.
    ///
    /// # Errors
    /// When the address of the Redis cannot be used.
    pub fn open(config: &Config) -> Result<Self, OpenError> {
        let Some(redis) = &config.redis else {
            return Ok(Self::Memory(MemoryStore::new(SystemClock)));
        };
        let options = RedisOptions::new(redis.url.expose()).prefix(&redis.prefix).deadline(redis.timeout);
        Ok(Self::Redis(Box::new(RedisStore::open(options)?)))
    }

    /// Takes every charge, or none.
    pub async fn reserve(&self, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.reserve(charges)),
            Self::Redis(store) => store.reserve(charges).await,
        }
    }

    /// What every limit would say. Changes nothing.
    pub async fn peek(&self, charges: Vec<Charge>) -> Result<Vec<Standing>, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.peek(charges)),
            Self::Redis(store) => store.peek(charges).await,
        }
    }

    /// Waits until what was settled has reached the store.
    pub async fn flush(&self) {
        match self {
            Self::Memory(_) => {}
            Self::Redis(store) => store.flush().await,
        }
    }

    /// Forgets what was counted for a subject.
    pub async fn clear(&self, subject: &Subject) -> Result<bool, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.clear(subject)),
            Self::Redis(store) => store.clear(subject).await,
        }
    }
}
