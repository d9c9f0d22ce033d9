//! All control data as one immutable value, and how one becomes the next.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::history::History;
use super::records::{Ban, Clear, Drain, KeyRecord, LimitOverride, Stored, UserRecord};
use super::time::Time;

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`KeyRecord`]
    Key,
    /// [`UserRecord`]
    User,
    /// [`Ban`]
    Ban,
    /// [`LimitOverride`]
    Limit,
    /// [`Drain`]
    Drain,
    /// [`Clear`]
    Clear,
    /// [`History`]
    History,
}

impl Kind {
    /// All of them, in the order in which stores number them.
    pub const ALL: [Self; 7] =
        [Self::Key, Self::User, Self::Ban, Self::Limit, Self::Drain, Self::Clear, Self::History];

    /// As in the names of stores and of the audit: `keys`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key => "keys",
            Self::User => "users",
            Self::Ban => "bans",
            Self::Limit => "limits",
            Self::Drain => "drains",
            Self::Clear => "clears",
            Self::History => "histories",
        }
    }

    /// The kind of this name.
    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// A record as stores have it.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) kind: Kind,
    pub(super) id: String,
    /// The version with which it became what it is.
    pub(super) version: u64,
    /// `None`: it is gone.
    pub(super) json: Option<String>,
}

/// A record, and since which version it is what it is.
#[derive(Debug)]
pub struct Record<T> {
    /// Of the whole control data.
    pub version: u64,
    /// What it says.
    pub value: T,
}

/// Records of one kind by id, in the order of ids.
pub type Table<T> = Arc<BTreeMap<String, Arc<Record<T>>>>;

/// All control data.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// Goes up by one with each change; 0: nothing was ever said.
    pub version: u64,
    /// Whether it is known what there is; before, keys can be neither accepted nor refused.
    pub loaded: bool,
    /// By id.
    pub keys: Table<KeyRecord>,
    /// By name.
    pub users: Table<UserRecord>,
    /// By id.
    pub bans: Table<Ban>,
    /// By name of the rule.
    pub limits: Table<LimitOverride>,
    /// By `MODEL/PROVIDER`.
    pub drains: Table<Drain>,
    /// By subject; the latest ones.
    pub clears: Table<Clear>,
    /// By name of the rule, of those that are gone, too.
    pub histories: Table<History>,
}

impl Control {
    /// When the next override is over; the rules change then.
    pub fn next_expiry(&self) -> Option<Time> {
        self.limits.values().filter_map(|limit| limit.value.expires).filter(|end| !end.has_come()).min()
    }

    /// The same after these changes. Tables that they do not touch are shared.
    pub(super) fn with(&self, version: u64, rows: Vec<Row>) -> Self {
        let mut next = self.clone();
        next.version = version;
        for row in rows {
            match row.kind {
                Kind::Key => put(&mut next.keys, row),
                Kind::User => put(&mut next.users, row),
                Kind::Ban => put(&mut next.bans, row),
                Kind::Limit => put(&mut next.limits, row),
                Kind::Drain => put(&mut next.drains, row),
                Kind::Clear => put(&mut next.clears, row),
                Kind::History => put(&mut next.histories, row),
            }
        }
        next
    }

    /// All of it, as stores have it.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        add(&mut rows, &self.keys);
        add(&mut rows, &self.users);
        add(&mut rows, &self.bans);
        add(&mut rows, &self.limits);
        add(&mut rows, &self.drains);
        add(&mut rows, &self.clears);
        add(&mut rows, &self.histories);
        rows
    }
}

fn put<T: Stored + Clone>(table: &mut Table<T>, row: Row) {
    let Row { kind, id, version, json } = row;
    match json.map(|json| serde_json::from_str(&json)) {
        Some(Ok(value)) => {
            Arc::make_mut(table).insert(id, Arc::new(Record { version, value }));
        }
        Some(Err(error)) => {
            // What it was before must not hold on: it may have been a key that is revoked now.
            tracing::error!(kind = kind.as_str(), %id, %error, "control data that makes no sense is passed over");
            Arc::make_mut(table).remove(&id);
        }
        None => drop(Arc::make_mut(table).remove(&id)),
    }
}

fn add<T: Stored>(rows: &mut Vec<Row>, table: &Table<T>) {
    rows.extend(table.iter().filter_map(|(id, record)| {
        let json = serde_json::to_string(&record.value).ok()?;
        Some(Row { kind: T::KIND, id: id.clone(), version: record.version, json: Some(json) })
    }));
}

/// Who changes something.
#[derive(Clone, Debug)]
pub struct Author {
    /// Name of the admin key; `admin` where it has none.
    pub name: String,
    /// Where from.
    pub address: IpAddr,
}

/// What is to be changed together, and what the audit says of it.
#[derive(Debug, Default)]
pub struct Change {
    rows: Vec<(Kind, String, Option<String>)>,
    notes: Vec<Note>,
}

#[derive(Debug)]
struct Note {
    action: &'static str,
    subject: String,
    before: Value,
    after: Value,
}

impl Change {
    /// Nothing is changed, and nothing said.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.notes.is_empty()
    }

    /// Sets a record. `action` is what the audit calls it: `keys.create`.
    pub fn put<T: Stored>(&mut self, action: &'static str, now: &Control, id: &str, value: &T) {
        self.note(action, format!("{}/{id}", T::KIND.as_str()), shown::<T>(now, id), value.shown());
        self.put_unnoted(id, value);
    }

    /// Sets a record of which the audit is told otherwise.
    pub fn put_unnoted<T: Stored>(&mut self, id: &str, value: &T) {
        // Made of strings and numbers: it always is JSON.
        let json = serde_json::to_string(value).unwrap_or_default();
        self.rows.push((T::KIND, id.to_owned(), Some(json)));
    }

    /// Removes a record.
    pub fn delete<T: Stored>(&mut self, action: &'static str, now: &Control, id: &str) {
        self.note(action, format!("{}/{id}", T::KIND.as_str()), shown::<T>(now, id), Value::Null);
        self.rows.push((T::KIND, id.to_owned(), None));
    }

    /// Removes a record whose time is over.
    pub fn forget<T: Stored>(&mut self, id: &str) {
        self.rows.push((T::KIND, id.to_owned(), None));
    }

    /// Tells the audit of something.
    pub fn note(&mut self, action: &'static str, subject: String, before: Value, after: Value) {
        self.notes.push(Note { action, subject, before, after });
    }

    /// As stores take it: rows of this version, and records of the audit.
    pub(super) fn into_rows(self, author: &Author, version: u64) -> (Vec<Row>, Vec<String>) {
        let row = |(kind, id, json)| Row { kind, id, version, json };
        let time = Time::now();
        let note = |note: Note| {
            let Note { action, subject, before, after } = note;
            json!({ "time": time, "version": version, "actor": author.name, "address": author.address,
                    "action": action, "subject": subject, "before": before, "after": after })
            .to_string()
        };
        (self.rows.into_iter().map(row).collect(), self.notes.into_iter().map(note).collect())
    }
}

fn shown<T: Stored>(now: &Control, id: &str) -> Value {
    T::table(now).get(id).map_or(Value::Null, |record| record.value.shown())
}
