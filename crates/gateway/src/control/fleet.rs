//! What instances tell each other of themselves, over Redis: who they are, what they have counted, what is fullest.
//! Nothing of it is needed to decide anything, and nothing of it outlives the instance by more than a minute but the totals.

use std::sync::PoisonError;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::redis::Redis;
use super::{Time, Unavailable};
use crate::rates::{Rate, Totals};

/// An instance that was not heard of for so long is gone.
const ALIVE: Duration = Duration::from_secs(5);
/// Slow commands told of.
const SLOW_MAX: usize = 10;
/// What it said is kept longer, so that it is not counted twice after a pause.
const KEPT: Duration = Duration::from_secs(60);

const PUBLISH: &str = include_str!("publish.lua");

/// One instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    /// Unlike that of any other: host and a random number.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// SHA-256 of the configuration with its defaults, without its secrets: 16 hex digits.
    pub config_hash: String,
    /// Version of the control data that is in force there.
    pub control_version: u64,
    /// When it started.
    pub started: Time,
    /// Whether it counts in Redis: `shared`; cannot at the moment: `degraded`; or counts by itself: `memory`.
    pub store: String,
    /// When it said so.
    pub seen: Time,
}

/// One slow command of a server, without what it was asked with.
#[derive(Clone, Debug, Serialize)]
pub struct Slow {
    /// When.
    pub at: Time,
    /// How long it took, microseconds.
    pub micros: u64,
    /// Its name.
    pub command: String,
}

impl Redis {
    /// Tells what this instance is and has counted; gives back what the fleet has.
    pub(super) async fn publish(
        &self,
        about: &About,
        rates: &[Rate],
        own: Totals,
    ) -> Result<Totals, Unavailable> {
        let told = *self.told_totals.lock().unwrap_or_else(PoisonError::into_inner);
        let json = |value: serde_json::Result<String>| value.map_err(|error| Unavailable(error.to_string()));
        let (said, rates) = (json(serde_json::to_string(about))?, json(serde_json::to_string(rates))?);
        let keys = [self.usage("alive"), self.usage("totals"), self.usage(&format!("of:{}", about.name))];
        let mut call = self.call(PUBLISH, &keys);
        call.arg(&about.name).arg(millis(ALIVE)).arg(millis(KEPT)).arg(said).arg(rates);
        for total in [own, told] {
            call.arg(total.requests).arg(total.blocked);
        }
        let (requests, blocked) = self.ask(&call).await?;
        let mut known = self.told_totals.lock().unwrap_or_else(PoisonError::into_inner);
        known.requests = known.requests.max(own.requests);
        known.blocked = known.blocked.max(own.blocked);
        Ok(Totals { requests, blocked })
    }

    /// The instances that were heard of lately.
    pub(super) async fn instances(&self) -> Result<Vec<About>, Unavailable> {
        let said = self.said("about").await?;
        Ok(said.iter().filter_map(|json| serde_json::from_str(json).ok()).collect())
    }

    /// What each of them has of the fullest.
    pub(super) async fn rates(&self) -> Result<Vec<Vec<Rate>>, Unavailable> {
        let said = self.said("rates").await?;
        Ok(said.iter().filter_map(|json| serde_json::from_str(json).ok()).collect())
    }

    /// The last slow commands.
    pub(super) async fn slowlog(&self) -> Result<Vec<Slow>, Unavailable> {
        let mut command = redis::cmd("SLOWLOG");
        command.arg("GET").arg(SLOW_MAX);
        type Told = (u64, u64, u64, Vec<Vec<u8>>);
        let told: Vec<redis::Value> = self.ask(&command).await?;
        let slow = told.iter().filter_map(|entry| {
            // Later servers tell more: the client's address and name.
            let redis::Value::Array(fields) = entry else { return None };
            let told: Told = redis::from_redis_value(redis::Value::Array(fields.get(..4)?.to_vec())).ok()?;
            let (_, seconds, micros, words) = told;
            let at = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
            let command = String::from_utf8_lossy(words.first()?).into_owned();
            Some(Slow { at: at.into(), micros, command })
        });
        Ok(slow.collect())
    }

    async fn said(&self, field: &str) -> Result<Vec<String>, Unavailable> {
        let mut command = redis::cmd("ZRANGE");
        command.arg(self.usage("alive")).arg(0).arg(-1);
        let names: Vec<String> = self.ask(&command).await?;
        let mut said = Vec::with_capacity(names.len());
        for name in &names {
            let mut command = redis::cmd("HGET");
            command.arg(self.usage(&format!("of:{name}"))).arg(field);
            said.extend(self.ask::<Option<String>>(&command).await?);
        }
        Ok(said)
    }

    fn usage(&self, what: &str) -> String {
        format!("{}:{{ctl}}:use:{what}", self.prefix)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
