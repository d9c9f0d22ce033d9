//! Control data: what operators say while the gateway runs (keys, users, bans, limits, drains), and who said it.
//!
//! It is kept in one place: in Redis where one is configured, else in an embedded file; an instance with Redis keeps a copy
//! in its file. Each instance holds all of it as one immutable [`Control`], which the snapshot is built from: no request
//! ever asks a store for it. A write says which version it has seen and is refused when there is a later one, so nobody
//! overwrites what he has not read; an acknowledged one is durable. Others hear of it by a message, and poll besides.

mod compile;
mod connection;
mod file;
mod fleet;
mod history;
mod merge;
mod mint;
mod records;
mod redis;
mod time;
mod usage;
mod value;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

pub use self::compile::{Bans, KEY_RULE, Keys, keys, known};
use self::file::File;
pub use self::fleet::{About, Slow};
pub use self::history::{History, remember};
pub use self::merge::{Aside, Merged, Room, fits, merged};
pub use self::mint::{Form, Minted, form, mint};
pub use self::records::{
    Ban, BanSubject, Clear, Drain, KeyRecord, LimitOverride, Previous, Stored, UserRecord,
};
use self::redis::{Redis, Synced};
pub use self::time::{Time, precise};
pub use self::usage::{Batch, Bucket, COUNT_MAX, Counts, OTHER, Row as UsageRow, Span};
use self::value::Row;
pub use self::value::{Author, Change, Control, Kind, Record, Table};
use crate::config::Config;
use crate::rates::{Rate, Totals};

/// How often a change is worked out anew because somebody else was faster.
const ATTEMPTS_MAX: usize = 16;
/// At the start, Redis has this long to answer at all; nobody is served meanwhile.
const FIRST_ANSWER: Duration = Duration::from_millis(300);
/// One that answers has this long to say what there is.
const FIRST_LOAD: Duration = Duration::from_secs(2);
/// Rows and records of the audit that one write may have.
pub const CHANGES_MAX: usize = 2_000;

/// The store of control data.
pub struct Store {
    place: Place,
    now: watch::Sender<Arc<Control>>,
    /// One change of `now` at a time.
    turn: Mutex<()>,
}

enum Place {
    File(Arc<File>),
    Redis { redis: Box<Redis>, copy: Option<Arc<File>> },
}

/// Control data that cannot be used at the start: where, and why.
#[derive(Debug)]
pub struct OpenError(String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OpenError {}

/// Where a record of the audit stands: the version it came with, and its place among those.
pub type NotePlace = (u64, u64);

/// Why a write did not happen.
#[derive(Debug)]
pub enum WriteError<E> {
    /// What was asked for is not possible.
    Refused(E),
    /// Others were faster, again and again.
    Contended,
    /// The store did not acknowledge it: why. It may have happened all the same.
    Unavailable(String),
}

/// A store that did not answer: why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl Store {
    /// Opens the store that the configuration asks for, with what is in it. A Redis that is away is not waited for: what
    /// the copy says holds until it is back.
    ///
    /// # Errors
    /// When the file cannot be used, or the address of the Redis.
    pub async fn open(config: &Config) -> Result<Self, OpenError> {
        let file = open_file(config)?;
        let Some(redis) = &config.redis else {
            let file = match file {
                Some(file) => file,
                None => File::in_memory().map_err(OpenError)?,
            };
            let control = load(&file)?;
            let now = watch::Sender::new(Arc::new(Control { loaded: true, ..control }));
            return Ok(Self { place: Place::File(Arc::new(file)), now, turn: Mutex::default() });
        };
        let control = match &file {
            // A copy that was never written to knows nothing; it does not say that there is nothing.
            Some(file) => load(file).map(|control| Control { loaded: control.version > 0, ..control })?,
            None => Control::default(),
        };
        let epoch = match &file {
            Some(file) => file.epoch().map_err(OpenError)?,
            None => String::new(),
        };
        let redis = Redis::new(redis, config.settings.control_poll, epoch).map_err(OpenError)?;
        let answers = redis.answers(FIRST_ANSWER).await;
        let place = Place::Redis { redis: Box::new(redis), copy: file.map(Arc::new) };
        let this = Self { place, now: watch::Sender::new(Arc::new(control)), turn: Mutex::default() };
        let loaded = async {
            answers?;
            this.refresh().await
        };
        match tokio::time::timeout(FIRST_LOAD, loaded).await {
            Ok(Ok(())) => {}
            Ok(Err(Unavailable(why))) => this.note_missing(&why),
            Err(_) => this.note_missing("no answer"),
        }
        Ok(this)
    }

    /// All of it, as far as is known here.
    pub fn now(&self) -> Arc<Control> {
        self.now.borrow().clone()
    }

    /// Tells of every change, by whomever.
    pub fn changes(&self) -> watch::Receiver<Arc<Control>> {
        self.now.subscribe()
    }

    /// Changes something: `decide` says what from what there is, and is asked again when that has changed meanwhile. Gives
    /// back what the last `decide` gave. When this returns, the change is durable, and [`Store::now`] has it.
    ///
    /// # Errors
    /// What `decide` refuses; and when the store does not acknowledge it.
    pub async fn write<T, E>(
        &self,
        author: &Author,
        mut decide: impl FnMut(&Control) -> Result<(Change, T), E>,
    ) -> Result<T, WriteError<E>> {
        let _turn = self.turn.lock().await;
        for attempt in 0..ATTEMPTS_MAX {
            if attempt > 0 {
                self.synchronize().await.map_err(|Unavailable(why)| WriteError::Unavailable(why))?;
            }
            let before = self.now();
            if !before.loaded {
                // It must be known what there is before it is changed.
                self.synchronize().await.map_err(|Unavailable(why)| WriteError::Unavailable(why))?;
                continue;
            }
            let (change, value) = decide(&before).map_err(WriteError::Refused)?;
            if change.is_empty() {
                return Ok(value);
            }
            let (rows, notes) = change.into_rows(author, before.version + 1);
            match self.commit(&before, rows, notes).await {
                Ok(true) => return Ok(value),
                Ok(false) => {}
                Err(Unavailable(why)) => return Err(WriteError::Unavailable(why)),
            }
        }
        Err(WriteError::Contended)
    }

    /// Records of the audit, the latest first: at most `count` of those before `before` (all, when `None`). Each is JSON
    /// with its place, which the next page begins before.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn audit(
        &self,
        before: Option<NotePlace>,
        count: usize,
    ) -> Result<Vec<(NotePlace, String)>, Unavailable> {
        match &self.place {
            Place::File(file) => blocking(file, move |file| file.audit(before, count)).await,
            Place::Redis { redis, .. } => redis.audit(before, count).await,
        }
    }

    /// Tells the other instances what this one is and has counted since its start, and gives back what all of them have;
    /// `None`: there are no others.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn publish(
        &self,
        about: &About,
        rates: &[Rate],
        own: Totals,
    ) -> Result<Option<Totals>, Unavailable> {
        let Place::Redis { redis, .. } = &self.place else { return Ok(None) };
        redis.publish(about, rates, own).await.map(Some)
    }

    /// The instances that were heard of lately; none where there are no others.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn instances(&self) -> Result<Vec<About>, Unavailable> {
        let Place::Redis { redis, .. } = &self.place else { return Ok(Vec::new()) };
        redis.instances().await
    }

    /// What each of those instances says is fullest.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn rates(&self) -> Result<Vec<Vec<Rate>>, Unavailable> {
        let Place::Redis { redis, .. } = &self.place else { return Ok(Vec::new()) };
        redis.rates().await
    }

    /// The last slow commands of the Redis, by name; `None`: there is no Redis.
    ///
    /// # Errors
    /// When it does not answer, or does not tell.
    pub async fn slowlog(&self) -> Result<Option<Vec<Slow>>, Unavailable> {
        let Place::Redis { redis, .. } = &self.place else { return Ok(None) };
        redis.slowlog().await.map(Some)
    }

    /// Looks now for what others changed.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn refresh(&self) -> Result<(), Unavailable> {
        let _turn = self.turn.lock().await;
        self.synchronize().await
    }

    /// Learns what others change, until `stop`. Returns at once where there are no others.
    pub async fn follow(&self, stop: CancellationToken) {
        let Place::Redis { redis, .. } = &self.place else { return };
        let following = async {
            let mut away = false;
            loop {
                redis.wait().await;
                match (self.refresh().await, away) {
                    (Ok(()), true) => {
                        tracing::info!("control data is read from Redis again");
                        away = false;
                    }
                    (Err(Unavailable(why)), false) => {
                        tracing::warn!(%why, "control data cannot be read from Redis: the last known stays");
                        away = true;
                    }
                    _ => {}
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = redis.listen() => {}
            () = following => {}
        }
    }

    /// `true`: it is done. `false`: there is a later version.
    async fn commit(
        &self,
        before: &Control,
        rows: Vec<Row>,
        notes: Vec<String>,
    ) -> Result<bool, Unavailable> {
        let version = before.version + 1;
        let done = match &self.place {
            Place::File(file) => {
                let (expected, rows) = (before.version, rows.clone());
                blocking(file, move |file| file.commit(expected, &rows, &notes)).await?
            }
            Place::Redis { redis, copy } => {
                let done = redis.commit(before.version, &rows, &notes).await?;
                if done {
                    self.copy(copy.as_ref(), redis, version, rows.clone(), false).await;
                }
                done
            }
        };
        if done {
            self.now.send_replace(Arc::new(before.with(version, rows)));
        }
        Ok(done)
    }

    async fn synchronize(&self) -> Result<(), Unavailable> {
        let Place::Redis { redis, copy } = &self.place else { return Ok(()) };
        let before = self.now();
        match redis.synchronize(before.version).await? {
            Synced::Same if before.loaded => {}
            Synced::Same => {
                drop(self.now.send_replace(Arc::new(Control { loaded: true, ..(*before).clone() })))
            }
            Synced::Some(version, rows) => {
                self.copy(copy.as_ref(), redis, version, rows.clone(), false).await;
                self.now.send_replace(Arc::new(Control { loaded: true, ..before.with(version, rows) }));
            }
            Synced::All(version, rows) => {
                self.copy(copy.as_ref(), redis, version, rows.clone(), true).await;
                let all = Control { loaded: true, ..Control::default() };
                self.now.send_replace(Arc::new(all.with(version, rows)));
            }
            Synced::Nothing if before.version == 0 => {
                self.now.send_replace(Arc::new(Control { loaded: true, ..Control::default() }));
            }
            Synced::Nothing => {
                let version = before.version + 1;
                if redis.restore(version, before.rows()).await? {
                    tracing::warn!(
                        version,
                        "Redis had lost the control data; it was given back what is known here"
                    );
                    self.copy(copy.as_ref(), redis, version, Vec::new(), false).await;
                    self.now.send_replace(Arc::new(Control { version, ..(*before).clone() }));
                }
            }
        }
        Ok(())
    }

    /// A copy that cannot be written is not worth refusing a change that everybody has: it is said, and written anew with
    /// the next change.
    async fn copy(&self, copy: Option<&Arc<File>>, redis: &Redis, version: u64, rows: Vec<Row>, whole: bool) {
        let Some(file) = copy else { return };
        let epoch = redis.epoch();
        let written = blocking(file, move |file| file.copy(version, &epoch, &rows, whole)).await;
        if let Err(Unavailable(why)) = written {
            tracing::warn!(%why, "the copy of the control data is out of date");
        }
    }

    fn note_missing(&self, why: &str) {
        let now = self.now();
        if now.loaded {
            tracing::warn!(%why, version = now.version, "Redis is away: control data is that of the copy");
        } else {
            tracing::warn!(%why, "Redis is away and there is no copy: keys of the admin API get 503");
        }
    }
}

/// The file of the configuration. One that nobody asked for by name is done without where it cannot be had, unless control
/// data would be lost that way.
fn open_file(config: &Config) -> Result<Option<File>, OpenError> {
    let Some(state) = &config.settings.state else { return Ok(None) };
    match File::open(Path::new(&state.path)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if state.is_default && (error.nowhere || (error.locked && config.redis.is_some())) => {
            let kept = if config.redis.is_some() { "in Redis alone" } else { "until the process ends" };
            tracing::warn!("settings.state: {error}; control data is kept {kept}");
            Ok(None)
        }
        Err(error) => Err(OpenError(format!("settings.state: {error}"))),
    }
}

fn load(file: &File) -> Result<Control, OpenError> {
    let (version, rows) = file.load().map_err(OpenError)?;
    Ok(Control::default().with(version, rows))
}

async fn blocking<T: Send + 'static>(
    file: &Arc<File>,
    work: impl FnOnce(&File) -> Result<T, String> + Send + 'static,
) -> Result<T, Unavailable> {
    let file = file.clone();
    let done = tokio::task::spawn_blocking(move || work(&file)).await;
    done.map_err(|error| Unavailable(error.to_string()))?.map_err(Unavailable)
}
