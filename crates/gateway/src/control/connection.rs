//! The one place where connections of the control data to Redis are made.

use std::time::Duration;

use redis::aio::{MultiplexedConnection, PubSub};
use redis::{AsyncConnectionConfig, Client, RedisError};

/// How long a connection may take to be made.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);

/// Where connections come from. They are not the limiter's: a large answer must not stand before a decision.
pub(super) struct Dial(Client);

impl Dial {
    /// Whom to call; nothing is connected yet.
    pub(super) fn new(redis: &crate::config::Redis) -> Result<Self, String> {
        Client::open(redis.url.expose()).map(Self).map_err(|error| {
            format!("dependencies.redis: {} cannot be used for control data: {error}", redis.address)
        })
    }

    /// For questions.
    pub(super) async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_DEADLINE))
            .set_response_timeout(None);
        self.0.get_multiplexed_async_connection_with_config(&config).await
    }

    /// For messages of one channel.
    pub(super) async fn listen(&self, channel: &str) -> Result<PubSub, RedisError> {
        let mut messages = self.0.get_async_pubsub().await?;
        messages.subscribe(channel).await?;
        Ok(messages)
    }
}
