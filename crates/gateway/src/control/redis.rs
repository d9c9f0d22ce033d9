//! Control data in Redis: hashes of records, a sorted set of what changed when, a stream for the audit. All keys have one
//! hash tag, so a script that changes several is one transaction, on a cluster too.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use redis::{Cmd, FromRedisValue};
use tokio::sync::Notify;

use super::connection::Dial;
use super::value::{Kind, Row};
use super::{NotePlace, Unavailable};
use crate::config;
use crate::rates::Totals;

/// Of one question; a page of a large store needs its time.
const DEADLINE: Duration = Duration::from_secs(2);
/// Before a lost subscription is tried anew.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// Rows told as changes; above it everything is read.
const ROWS_MAX: usize = 5_000;
/// Changes that are remembered.
const CHANGES_MAX: usize = 20_000;
/// Records of the audit that are kept, about.
const AUDIT_MAX: usize = 10_000;
/// Records read or written at a time, so that no decision waits long behind them.
const SLICE: usize = 500;
/// How often everything is read anew because it changed too much meanwhile.
const LOADS_MAX: usize = 5;

/// A Redis with control data.
pub(super) struct Redis {
    dial: Dial,
    pub(super) prefix: String,
    keys: Vec<String>,
    channel: String,
    /// Which life of the data is known here: another one begins when it was lost.
    epoch: Mutex<String>,
    told: Notify,
    pause: Duration,
    /// Of what this instance has counted, this is known here.
    pub(super) told_totals: Mutex<Totals>,
}

/// Sent as they are: they run a few times a second at most, and a server may forbid SCRIPT.
const CHANGE: &str = include_str!("change.lua");
const CHANGES: &str = include_str!("changes.lua");
const RESTORE: &str = include_str!("restore.lua");

/// What there is that was not known.
pub(super) enum Synced {
    /// Nothing.
    Same,
    /// These rows.
    Some(u64, Vec<Row>),
    /// Everything: these rows and no others.
    All(u64, Vec<Row>),
    /// There is no control data at all.
    Nothing,
}

impl Redis {
    /// Connects to nothing yet. `poll`: a change is known at the latest after this time.
    pub(super) fn new(config: &config::Redis, poll: Duration, epoch: String) -> Result<Self, String> {
        let name = |what: &str| format!("{}:{{ctl}}:ctl:{what}", config.prefix);
        let kinds = Kind::ALL.into_iter().map(Kind::as_str);
        Ok(Self {
            prefix: config.prefix.clone(),
            dial: Dial::new(config, DEADLINE)?,
            keys: ["about", "changes", "audit"].into_iter().chain(kinds).map(name).collect(),
            channel: name("told"),
            epoch: Mutex::new(epoch),
            told: Notify::new(),
            // Reading and compiling must fit into the time as well.
            pause: poll / 2,
            told_totals: Mutex::default(),
        })
    }

    /// Whether there is anybody.
    pub(super) async fn answers(&self, within: Duration) -> Result<(), Unavailable> {
        self.dial.answers(within).await
    }

    /// Which life of the data is known here.
    pub(super) fn epoch(&self) -> String {
        self.epoch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Until there may be something new.
    pub(super) async fn wait(&self) {
        // Told or not, it is looked.
        let _ = tokio::time::timeout(self.pause, self.told.notified()).await;
    }

    /// Hears of changes; never ends.
    pub(super) async fn listen(&self) {
        loop {
            // Without it changes are found by polling.
            let listening = tokio::time::timeout(DEADLINE, self.dial.listen(&self.channel)).await;
            if let Ok(None) = listening {
                return std::future::pending().await;
            }
            if let Ok(Some(Ok(mut messages))) = listening {
                // Something may have been said before.
                self.told.notify_one();
                let mut messages = messages.on_message();
                while messages.next().await.is_some() {
                    self.told.notify_one();
                }
            }
            tokio::time::sleep(LISTEN_PAUSE).await;
        }
    }

    /// What changed since `version`.
    pub(super) async fn synchronize(&self, version: u64) -> Result<Synced, Unavailable> {
        let said = self.changes_since(version).await?;
        match said.word.as_str() {
            "same" => Ok(Synced::Same),
            "some" => Ok(Synced::Some(said.version, said.rows)),
            "nothing" => Ok(Synced::Nothing),
            _ => self.load(said).await,
        }
    }

    /// Makes the next version. `false`: there is a later one than `expected`.
    pub(super) async fn commit(
        &self,
        expected: u64,
        rows: &[Row],
        notes: &[String],
    ) -> Result<bool, Unavailable> {
        let epoch = random_epoch()?;
        let mut call = self.call(CHANGE, &self.keys);
        call.arg(expected).arg(&epoch).arg(&self.channel).arg(CHANGES_MAX).arg(AUDIT_MAX).arg(rows.len());
        for row in rows {
            call.arg(row.kind as usize + 1).arg(&row.id).arg(row.json.as_deref().unwrap_or_default());
        }
        for note in notes {
            call.arg(note);
        }
        let version: i64 = self.ask(&call).await?;
        if version == 1 {
            // The first change of all made an epoch; if not this one, the next look reads everything.
            *self.epoch.lock().unwrap_or_else(PoisonError::into_inner) = epoch;
        }
        Ok(version >= 0)
    }

    /// Gives back to an empty Redis what is known here. `false`: somebody else did, or something else was said.
    pub(super) async fn restore(&self, version: u64, rows: Vec<Row>) -> Result<bool, Unavailable> {
        for slice in rows.chunks(SLICE) {
            for kind in Kind::ALL {
                let mut command = redis::cmd("HSET");
                command.arg(self.records(kind));
                let rows: Vec<&Row> = slice.iter().filter(|row| row.kind == kind).collect();
                for row in &rows {
                    let record = format!("{} {}", row.version, row.json.as_deref().unwrap_or_default());
                    command.arg(&row.id).arg(record);
                }
                if !rows.is_empty() {
                    let _: u64 = self.ask(&command).await?;
                }
            }
        }
        let epoch = random_epoch()?;
        let mut call = self.call(RESTORE, &self.keys[..1]);
        call.arg(version).arg(&epoch).arg(&self.channel);
        let done: bool = self.ask(&call).await?;
        if done {
            *self.epoch.lock().unwrap_or_else(PoisonError::into_inner) = epoch;
        }
        Ok(done)
    }

    /// Records of the audit before a place, the latest first.
    pub(super) async fn audit(
        &self,
        before: Option<NotePlace>,
        count: usize,
    ) -> Result<Vec<(NotePlace, String)>, Unavailable> {
        let newest = before.map_or_else(|| "+".to_owned(), |(version, place)| format!("({version}-{place}"));
        let mut command = redis::cmd("XREVRANGE");
        command.arg(&self.keys[2]).arg(newest).arg("-").arg("COUNT").arg(count);
        let found: Vec<(String, Vec<String>)> = self.ask(&command).await?;
        let entry = |(place, fields): (String, Vec<String>)| {
            let (version, within) = place.split_once('-')?;
            Some(((version.parse().ok()?, within.parse().ok()?), fields.into_iter().nth(1)?))
        };
        Ok(found.into_iter().filter_map(entry).collect())
    }

    /// Everything, in slices, and then what changed while it was read.
    async fn load(&self, mut said: Said) -> Result<Synced, Unavailable> {
        for _ in 0..LOADS_MAX {
            *self.epoch.lock().unwrap_or_else(PoisonError::into_inner) = said.epoch;
            let mut rows = Vec::new();
            for kind in Kind::ALL {
                let mut cursor = 0_u64;
                loop {
                    let mut command = redis::cmd("HSCAN");
                    command.arg(self.records(kind)).arg(cursor).arg("COUNT").arg(SLICE);
                    let (next, found): (u64, Vec<(String, String)>) = self.ask(&command).await?;
                    rows.extend(found.into_iter().filter_map(|(id, record)| row(kind, id, &record)));
                    cursor = next;
                    if cursor == 0 {
                        break;
                    }
                }
            }
            let since = self.changes_since(said.version).await?;
            match since.word.as_str() {
                "same" => return Ok(Synced::All(said.version, rows)),
                "some" => {
                    rows.extend(since.rows);
                    return Ok(Synced::All(since.version, rows));
                }
                "nothing" => return Ok(Synced::Nothing),
                _ => said = since,
            }
        }
        Err(Unavailable("control data changes faster than it can be read".to_owned()))
    }

    async fn changes_since(&self, version: u64) -> Result<Said, Unavailable> {
        let mut call = self.call(CHANGES, &self.keys);
        call.arg(version).arg(self.epoch()).arg(ROWS_MAX);
        let said: Vec<String> = self.ask(&call).await?;
        Said::read(said).ok_or_else(|| Unavailable("its answer makes no sense".to_owned()))
    }

    fn records(&self, kind: Kind) -> &str {
        &self.keys[3 + kind as usize]
    }

    pub(super) fn call(&self, script: &str, keys: &[String]) -> Cmd {
        let mut call = redis::cmd("EVAL");
        call.arg(script).arg(keys.len()).arg(keys);
        call
    }

    /// All keys are in one slot.
    pub(super) async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Unavailable> {
        self.ask_about(&self.keys[0], command).await
    }

    /// Asks the server that a key is on.
    pub(super) async fn ask_about<T: FromRedisValue>(
        &self,
        key: &str,
        command: &Cmd,
    ) -> Result<T, Unavailable> {
        self.dial.ask(key, command).await
    }
}

/// The answer of `changes.lua`.
struct Said {
    version: u64,
    epoch: String,
    word: String,
    rows: Vec<Row>,
}

impl Said {
    fn read(said: Vec<String>) -> Option<Self> {
        let mut said = said.into_iter();
        let (version, epoch, word) = (said.next()?.parse().ok()?, said.next()?, said.next()?);
        let mut rows = Vec::new();
        while let (Some(kind), Some(id), Some(record)) = (said.next(), said.next(), said.next()) {
            // A kind of a later version of the program.
            let Some(kind) = kind.parse::<usize>().ok().and_then(|kind| Kind::ALL.get(kind.checked_sub(1)?))
            else {
                continue;
            };
            rows.extend(match record.is_empty() {
                true => Some(Row { kind: *kind, id, version, json: None }),
                false => row(*kind, id, &record),
            });
        }
        Some(Self { version, epoch, word, rows })
    }
}

/// `VERSION JSON`.
fn row(kind: Kind, id: String, record: &str) -> Option<Row> {
    let (version, json) = record.split_once(' ')?;
    Some(Row { kind, id, version: version.parse().ok()?, json: Some(json.to_owned()) })
}

fn random_epoch() -> Result<String, Unavailable> {
    super::mint(None).map(|minted| minted.id).map_err(Unavailable)
}
