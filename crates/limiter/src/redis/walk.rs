//! Every subject that has counters, a slice at a time: for people who look. Nothing is locked meanwhile, and no slice is so
//! large that a decision would wait behind it.

use ::redis::{Value, cmd, from_redis_value};

use super::RedisStore;
use super::plan;
use crate::scope::Subject;
use crate::store::{Place, StoreError};

/// Keys that one slice looks at, about.
const KEYS: usize = 500;

impl RedisStore {
    /// Some of the subjects that have counters, in no order, and where the next ones are; `None`: those were the last.
    /// Every subject that is there all the time is among the slices of one walk at least once.
    ///
    /// # Errors
    /// When a server does not answer, or does not allow `SCAN`.
    pub async fn walk(&self, from: Place) -> Result<(Vec<Subject>, Option<Place>), StoreError> {
        let mut scan = cmd("SCAN");
        let begin = format!("{}:{{", self.0.prefix);
        scan.arg(from.cursor).arg("MATCH").arg(format!("{}*}}:rl:*", escaped(&begin)));
        scan.arg("COUNT").arg(KEYS);
        let Some((answer, others)) = self.0.connection.ask_one(from.shard, &scan).await? else {
            return Ok((Vec::new(), None));
        };
        let (cursor, keys): (u64, Vec<Vec<u8>>) =
            from_redis_value(answer).map_err(|error| StoreError::Reply(error.to_string()))?;
        let subject = |key: &Vec<u8>| {
            let (tag, text) = std::str::from_utf8(key).ok()?.strip_prefix(&begin)?.split_once("}:rl:")?;
            // Leases have a key of their own, which is no subject.
            Some(text.parse::<Subject>().ok()?.tagged(tag))
        };
        let next = match cursor {
            0 if others => Some(Place { shard: from.shard + 1, cursor: 0 }),
            0 => None,
            cursor => Some(Place { cursor, ..from }),
        };
        Ok((keys.iter().filter_map(subject).collect(), next))
    }

    /// The ids of the limits that have a counter of this subject; calls in flight are none.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn limits_of(&self, subject: &Subject) -> Result<Vec<String>, StoreError> {
        let key = plan::key(&self.0.prefix, subject);
        let answer = self.0.connection.command(&key, cmd("HGETALL").arg(&key)).await?;
        let fields: Vec<(Vec<u8>, Value)> =
            from_redis_value(answer).map_err(|error| StoreError::Reply(error.to_string()))?;
        let id = |(field, _): &(Vec<u8>, Value)| {
            let field = std::str::from_utf8(field).ok()?;
            Some(field.split_once(':')?.1.to_owned())
        };
        Ok(fields.iter().filter_map(id).collect())
    }
}

/// A text as a pattern that only it fits.
fn escaped(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}
