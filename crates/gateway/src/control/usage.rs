//! What was used, kept by hour and by day: rows of who used which model, each with its [`Counts`], in hashes in Redis or in
//! a table of the embedded file.
//!
//! Usage comes in batches. Each has a number, and is added once however often it is sent: a batch whose acknowledgement was
//! lost may be sent again.

use std::ops::AddAssign;
use std::time::Duration;

use super::redis::Redis;
use super::{Place, Store, Unavailable, blocking};
use crate::config::Retention;

const ADD: &str = include_str!("usage.lua");

/// The largest count: what doubles, and so scripts and readers of JSON, know exactly.
pub const COUNT_MAX: u64 = (1 << 53) - 1;
/// Rows of one hour or day. What is beyond them is counted as [`Row::other`].
pub(super) const ROWS_MAX: u64 = 100_000;
/// What stands for whoever and whatever is beyond a bound.
pub const OTHER: &str = "other";
/// How long it is remembered which batch of a writer was the last.
const REMEMBERED: Duration = Duration::from_secs(7 * 86_400);
/// Rows read at a time, so that no decision waits long behind them.
const SLICE: usize = 500;

/// How much time one bucket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Span {
    /// From a full hour to the next.
    Hour,
    /// From midnight to midnight, UTC.
    Day,
}

impl Span {
    /// Its length.
    pub const fn seconds(self) -> u64 {
        match self {
            Self::Hour => 3_600,
            Self::Day => 86_400,
        }
    }

    /// As in the names of stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// The last beginning of one that is not after this moment; Unix seconds.
    pub const fn start(self, at: u64) -> u64 {
        at - at % self.seconds()
    }

    /// How long one is kept after its end.
    pub const fn kept(self, retention: &Retention) -> Duration {
        match self {
            Self::Hour => retention.hours,
            Self::Day => retention.days,
        }
    }
}

/// One hour, or one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Which of both.
    pub span: Span,
    /// When it begins; Unix seconds.
    pub start: u64,
}

/// Who used what. `None`: there is nobody (a caller without a key), or none (a model that there is not).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Row {
    /// Name of the user.
    pub user: Option<String>,
    /// Id of the key.
    pub api_key: Option<String>,
    /// The key's team, or the user's.
    pub team: Option<String>,
    /// The model that was asked for, by its resolved name.
    pub model: Option<String>,
}

impl Row {
    /// All that is beyond a bound.
    pub fn other() -> Self {
        let other = || Some(OTHER.to_owned());
        Self { user: other(), api_key: other(), team: other(), model: other() }
    }

    /// As stores have it: `["alice","3f…",null,"chat"]`.
    pub(super) fn text(&self) -> String {
        let Self { user, api_key, team, model } = self;
        serde_json::json!([user, api_key, team, model]).to_string()
    }

    fn parse(text: &str) -> Option<Self> {
        let [user, api_key, team, model] = serde_json::from_str(text).ok()?;
        Some(Self { user, api_key, team, model })
    }
}

/// What was used. Each is at most [`COUNT_MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that ended, refused ones included.
    pub requests: u64,
    /// Of those, how many no provider was asked for: a limit, a ban, a wrong key, a faulty body.
    pub refused: u64,
    /// Of those, how many whose tokens were counted here, because the provider did not say.
    pub estimated: u64,
    /// Tokens read, cached ones included.
    pub input: u64,
    /// Of those, how many came from the provider's cache.
    pub cached_input: u64,
    /// Tokens written, reasoning included.
    pub output: u64,
    /// Of those, how many were reasoning.
    pub reasoning: u64,
    /// Tokens as providers add them up: at least those read and written.
    pub total: u64,
    /// Money, micro-units.
    pub cost: u64,
}

impl Counts {
    /// In the order of stores.
    fn array(&self) -> [u64; 9] {
        let Self { requests, refused, estimated, input, cached_input, output, reasoning, total, cost } =
            *self;
        [requests, refused, estimated, input, cached_input, output, reasoning, total, cost]
    }

    fn of(counts: [u64; 9]) -> Self {
        let [requests, refused, estimated, input, cached_input, output, reasoning, total, cost] = counts;
        Self { requests, refused, estimated, input, cached_input, output, reasoning, total, cost }
    }

    /// As stores have it: `1 0 0 12 …`.
    pub(super) fn text(&self) -> String {
        self.array().map(|count| count.to_string()).join(" ")
    }

    /// What is not there is 0: an earlier version of the program counted less.
    pub(super) fn parse(text: &str) -> Self {
        let mut said = text.split(' ').map(|count| count.parse().unwrap_or(0));
        Self::of(std::array::from_fn(|_| said.next().unwrap_or(0)))
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        let (own, more) = (self.array(), more.array());
        *self = Self::of(std::array::from_fn(|index| own[index].saturating_add(more[index]).min(COUNT_MAX)));
    }
}

/// Rows of one hour, to be added to it and to its day.
#[derive(Debug)]
pub struct Batch {
    /// Unlike that of any other process.
    pub writer: String,
    /// Greater than that of the writer's batch before; from 1.
    pub number: u64,
    /// When the hour begins; Unix seconds.
    pub hour: u64,
    /// Each row once.
    pub rows: Vec<(Row, Counts)>,
}

impl Batch {
    /// The hour and the day it belongs to.
    pub(super) fn buckets(&self) -> [Bucket; 2] {
        [Span::Hour, Span::Day].map(|span| Bucket { span, start: span.start(self.hour) })
    }
}

impl Store {
    /// Adds a batch, unless it was added before. What is older than `retention` is forgotten.
    ///
    /// # Errors
    /// When the store does not answer. It may be sent again, and should.
    pub async fn add_usage(
        &self,
        batch: &std::sync::Arc<Batch>,
        retention: Retention,
    ) -> Result<(), Unavailable> {
        match &self.place {
            Place::File(file) => {
                let batch = batch.clone();
                blocking(file, move |file| file.add_usage(&batch, &retention)).await
            }
            Place::Redis { redis, .. } => redis.add_usage(batch, &retention).await,
        }
    }

    /// What was used in an hour or a day: each row once, in no order.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn usage(&self, bucket: Bucket) -> Result<Vec<(Row, Counts)>, Unavailable> {
        let rows = match &self.place {
            Place::File(file) => blocking(file, move |file| file.usage(bucket)).await?,
            Place::Redis { redis, .. } => redis.usage_of(bucket).await?,
        };
        // What another version of the program wrote differently is passed over.
        let read = |(row, counts): (String, String)| Some((Row::parse(&row)?, Counts::parse(&counts)));
        Ok(rows.into_iter().filter_map(read).collect())
    }
}

impl Redis {
    async fn add_usage(&self, batch: &Batch, retention: &Retention) -> Result<(), Unavailable> {
        let [hour, day] = batch.buckets();
        let keys =
            [self.used(&format!("last:{}", batch.writer)), self.bucket_key(hour), self.bucket_key(day)];
        let mut call = self.call(ADD, &keys);
        call.arg(batch.number).arg(REMEMBERED.as_secs());
        for bucket in [hour, day] {
            call.arg(bucket.span.seconds() + bucket.span.kept(retention).as_secs());
        }
        call.arg(ROWS_MAX).arg(Row::other().text());
        for (row, counts) in &batch.rows {
            call.arg(row.text()).arg(counts.text());
        }
        self.ask_about::<u64>(&keys[0], &call).await.map(drop)
    }

    async fn usage_of(&self, bucket: Bucket) -> Result<Vec<(String, String)>, Unavailable> {
        let key = self.bucket_key(bucket);
        // A scan may tell of a row twice; the later one is the newer one.
        let mut rows = std::collections::HashMap::new();
        let mut cursor = 0_u64;
        loop {
            let mut command = redis::cmd("HSCAN");
            command.arg(&key).arg(cursor).arg("COUNT").arg(SLICE);
            let (next, found): (u64, Vec<(String, String)>) = self.ask_about(&key, &command).await?;
            rows.extend(found);
            cursor = next;
            if cursor == 0 {
                return Ok(rows.into_iter().collect());
            }
        }
    }

    fn bucket_key(&self, bucket: Bucket) -> String {
        self.used(&format!("{}:{}", bucket.span.as_str(), bucket.start))
    }

    /// One tag for all of it: a batch is one transaction, on a cluster too.
    fn used(&self, what: &str) -> String {
        format!("{}:{{use}}:use:{what}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_counts_are_read_as_they_were_written() {
        let quoted = |text: &str| Some(text.to_owned());
        for row in [
            Row::default(),
            Row::other(),
            Row { user: quoted("a\"],[ü"), api_key: quoted("id"), team: None, model: quoted("null") },
        ] {
            assert_eq!(Row::parse(&row.text()), Some(row));
        }
        for junk in ["", "[]", "[1,2,3,4]", "[null,null,null,null,null]", "{}"] {
            assert_eq!(Row::parse(junk), None, "{junk}");
        }
        let counts = Counts::of([1, 2, 3, 4, 5, 6, 7, 8, COUNT_MAX]);
        assert_eq!(Counts::parse(&counts.text()), counts);
        assert_eq!(Counts::parse("7 1"), Counts { requests: 7, refused: 1, ..Counts::default() });
        assert_eq!(Counts::parse("x"), Counts::default());
    }

    #[test]
    fn sums_stay_exact() {
        let mut sum = Counts::of([COUNT_MAX - 1; 9]);
        sum += Counts::of([1, 2, 0, u64::MAX, 0, 0, 0, 0, 1]);
        assert_eq!(
            sum.array(),
            [
                COUNT_MAX,
                COUNT_MAX,
                COUNT_MAX - 1,
                COUNT_MAX,
                COUNT_MAX - 1,
                COUNT_MAX - 1,
                COUNT_MAX - 1,
                COUNT_MAX - 1,
                COUNT_MAX
            ]
        );
    }

    #[test]
    fn an_hour_and_its_day() {
        let batch = Batch { writer: String::new(), number: 1, hour: 1_795_291_200, rows: Vec::new() };
        let [hour, day] = batch.buckets();
        assert_eq!((hour.start, day.start), (1_795_291_200, 1_795_219_200));
        assert_eq!(Span::Hour.start(1_795_294_799), hour.start);
        assert_eq!(Span::Hour.start(1_795_294_800), hour.start + 3_600);
    }
}
