//! The one place where connections of the control data to Redis are made.

use std::time::Duration;

use redis::aio::PubSub;
use redis::{Client, Cmd, FromRedisValue, RedisError, Value, from_redis_value};
use tollgate_limiter::RedisStore;

use super::Unavailable;
use crate::limits;

/// Where connections come from, whatever the topology. They are not the limiter's: a large answer must not stand before a
/// decision.
pub(super) struct Dial {
    store: RedisStore,
    /// Of one plain server, which can be listened to. Elsewhere changes are found by polling.
    server: Option<Client>,
}

impl Dial {
    /// Whom to call, and how long one question may take; connects in the background.
    pub(super) fn new(redis: &crate::config::Redis, deadline: Duration) -> Result<Self, String> {
        let wrong = |error: String| {
            format!("dependencies.redis: {} cannot be used for control data: {error}", redis.address)
        };
        let options = limits::options(redis).map_err(|error| wrong(error.to_string()))?.deadline(deadline);
        let store = RedisStore::open(options).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { store, server: Client::open(redis.url.expose()).ok() })
    }

    /// Asks the server that `key` is on.
    pub(super) async fn ask<T: FromRedisValue>(&self, key: &str, command: &Cmd) -> Result<T, Unavailable> {
        let answer = self.store.command(key, command).await;
        let value: Value = answer.map_err(|error| Unavailable(error.to_string()))?;
        from_redis_value(value).map_err(|error| Unavailable(error.to_string()))
    }

    /// Whether there is anybody who answers.
    pub(super) async fn answers(&self, within: Duration) -> Result<(), Unavailable> {
        match tokio::time::timeout(within, self.store.ping()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Unavailable(error.to_string())),
            Err(_) => Err(Unavailable(self.store.status().problem.unwrap_or_else(|| "no answer".into()))),
        }
    }

    /// For messages of one channel; `None`: this topology is polled.
    pub(super) async fn listen(&self, channel: &str) -> Option<Result<PubSub, RedisError>> {
        let server = self.server.as_ref()?;
        Some(
            async {
                let mut messages = server.get_async_pubsub().await?;
                messages.subscribe(channel).await?;
                Ok(messages)
            }
            .await,
        )
    }
}
