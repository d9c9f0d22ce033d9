//! The embedded file: the one door to redb. What a commit has acknowledged survives whatever happens to the process.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableHandle, WriteTransaction};

use super::NotePlace;
use super::usage::{self, Batch, Bucket, Counts};
use super::value::{Kind, Row};
use crate::config::Retention;

/// `format`, `version`, `epoch`; `usage`: writer and number of the last batch.
const ABOUT: TableDefinition<'_, &str, &str> = TableDefinition::new("tollgate-control");
/// Kind and id to version and JSON.
const ROWS: TableDefinition<'_, (&str, &str), (u64, &str)> = TableDefinition::new("records");
/// Version and place in it to JSON.
const AUDIT: TableDefinition<'_, (u64, u64), &str> = TableDefinition::new("audit");
/// Span, its start and row to counts. The row of no name has the number of the others.
const USAGE: TableDefinition<'_, (&str, u64, &str), &str> = TableDefinition::new("usage");

type UsageTable<'a> = redb::Table<'a, (&'static str, u64, &'static str), &'static str>;

/// The form of what is in it. Another one is refused.
const FORMAT: &str = "1";
/// Of pages, in memory.
const CACHE_BYTES: usize = 8 << 20;
/// Records of the audit that are kept.
const AUDIT_MAX: u64 = 10_000;

/// An open file; while it is open, no other process can open it.
pub(super) struct File {
    name: String,
    database: Database,
}

/// A file that cannot be used.
#[derive(Debug)]
pub(super) struct FileError {
    message: String,
    /// Another process has it.
    pub(super) locked: bool,
    /// It cannot be made there, or not be written to.
    pub(super) nowhere: bool,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl File {
    /// Opens a file, or makes it.
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        let name = path.display().to_string();
        let database = open(path).map_err(|error| refusal(&name, &error))?;
        Ok(Self { name, database })
    }

    /// The same without a file: gone with the process.
    pub(super) fn in_memory() -> Result<Self, String> {
        let made = Database::builder().create_with_backend(InMemoryBackend::new());
        let database = made.map_err(|error| error.to_string())?;
        format(&database).map_err(|error| error.to_string())?;
        Ok(Self { name: "memory".to_owned(), database })
    }

    /// The version, and every record.
    pub(super) fn load(&self) -> Result<(u64, Vec<Row>), String> {
        self.read(|| {
            let read = self.database.begin_read()?;
            let about = read.open_table(ABOUT)?;
            let version = about.get("version")?.and_then(|text| text.value().parse().ok()).unwrap_or(0);
            let mut rows = Vec::new();
            for entry in read.open_table(ROWS)?.iter()? {
                let (key, value) = entry?;
                let ((kind, id), (version, json)) = (key.value(), value.value());
                // Of a later version of the program.
                let Some(kind) = Kind::of(kind) else { continue };
                rows.push(Row { kind, id: id.to_owned(), version, json: Some(json.to_owned()) });
            }
            Ok((version, rows))
        })
    }

    /// Which Redis this is a copy of; empty: of none.
    pub(super) fn epoch(&self) -> Result<String, String> {
        self.read(|| {
            let read = self.database.begin_read()?;
            let epoch = read.open_table(ABOUT)?.get("epoch")?;
            Ok(epoch.map(|text| text.value().to_owned()).unwrap_or_default())
        })
    }

    /// Makes the next version of the `expected` one: all of it, or nothing. `false`: there is another one already.
    pub(super) fn commit(&self, expected: u64, rows: &[Row], notes: &[String]) -> Result<bool, String> {
        self.written(|write| {
            if version(write)? != expected {
                return Ok(false);
            }
            let next = expected + 1;
            set(write, "version", &next.to_string())?;
            // What is changed here is a copy no more.
            set(write, "epoch", "")?;
            put(write, rows)?;
            let mut audit = write.open_table(AUDIT)?;
            for (place, note) in (0_u64..).zip(notes) {
                audit.insert((next, place), note.as_str())?;
            }
            let excess = redb::ReadableTableMetadata::len(&audit)?.saturating_sub(AUDIT_MAX);
            for _ in 0..excess {
                audit.pop_first()?;
            }
            Ok(true)
        })
    }

    /// Takes over what was learned from elsewhere; `whole`: it is all there is.
    pub(super) fn copy(&self, version: u64, epoch: &str, rows: &[Row], whole: bool) -> Result<(), String> {
        self.written(|write| {
            if whole {
                write.delete_table(ROWS)?;
            }
            set(write, "version", &version.to_string())?;
            set(write, "epoch", epoch)?;
            put(write, rows)
        })
    }

    /// Records of the audit before a place, the latest first.
    pub(super) fn audit(
        &self,
        before: Option<NotePlace>,
        count: usize,
    ) -> Result<Vec<(NotePlace, String)>, String> {
        self.read(|| {
            let read = self.database.begin_read()?;
            let audit = read.open_table(AUDIT)?;
            let found = audit.range(..before.unwrap_or((u64::MAX, u64::MAX)))?.rev().take(count);
            found
                .map(|entry| {
                    let (place, note) = entry?;
                    Ok((place.value(), note.value().to_owned()))
                })
                .collect()
        })
    }

    /// Adds a batch of usage, unless it was added before, and forgets what is older than `retention`.
    pub(super) fn add_usage(&self, batch: &Batch, retention: &Retention) -> Result<(), String> {
        let writer = format!("{} ", batch.writer);
        self.written(|write| {
            let last = write.open_table(ABOUT)?.get("usage")?.and_then(|last| {
                last.value().strip_prefix(&writer).and_then(|number| number.parse::<u64>().ok())
            });
            if last.is_some_and(|last| batch.number <= last) {
                return Ok(());
            }
            set(write, "usage", &format!("{writer}{}", batch.number))?;
            let mut table = write.open_table(USAGE)?;
            for bucket in batch.buckets() {
                add(&mut table, bucket, batch)?;
                let kept = bucket.span.kept(retention).as_secs() + bucket.span.seconds();
                let (span, oldest) = (bucket.span.as_str(), bucket.start.saturating_sub(kept));
                table.retain_in((span, 0, "")..(span, oldest, ""), |_, _| false)?;
            }
            Ok(())
        })
    }

    /// Rows of one hour or day and their counts, in the order of rows.
    pub(super) fn usage(&self, bucket: Bucket) -> Result<Vec<(String, String)>, String> {
        self.read(|| {
            let read = self.database.begin_read()?;
            let table = match read.open_table(USAGE) {
                // A file of an earlier version, to which nothing was added yet.
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let Bucket { span, start } = bucket;
            let rows = table.range((span.as_str(), start, "")..(span.as_str(), start + 1, ""))?;
            let rows = rows.map(|entry| {
                let (key, counts) = entry?;
                Ok((key.value().2.to_owned(), counts.value().to_owned()))
            });
            let named = |entry: &Result<(String, String), redb::Error>| {
                entry.as_ref().map_or(true, |(row, _)| !row.is_empty())
            };
            rows.filter(named).collect()
        })
    }

    fn read<T>(&self, work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, String> {
        work().map_err(|error| format!("`{}` cannot be read: {error}", self.name))
    }

    fn written<T>(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, String> {
        let committed = || {
            let write = self.database.begin_write()?;
            let value = work(&write)?;
            write.commit()?;
            Ok(value)
        };
        committed().map_err(|error: redb::Error| format!("`{}` cannot be written: {error}", self.name))
    }
}

fn version(write: &WriteTransaction) -> Result<u64, redb::Error> {
    let about = write.open_table(ABOUT)?;
    let version = about.get("version")?.and_then(|text| text.value().parse().ok());
    Ok(version.unwrap_or(0))
}

fn set(write: &WriteTransaction, key: &str, value: &str) -> Result<(), redb::Error> {
    write.open_table(ABOUT)?.insert(key, value)?;
    Ok(())
}

fn put(write: &WriteTransaction, rows: &[Row]) -> Result<(), redb::Error> {
    let mut table = write.open_table(ROWS)?;
    for row in rows {
        let key = (row.kind.as_str(), row.id.as_str());
        match &row.json {
            Some(json) => drop(table.insert(key, (row.version, json.as_str()))?),
            None => drop(table.remove(key)?),
        }
    }
    Ok(())
}

fn add(table: &mut UsageTable<'_>, bucket: Bucket, batch: &Batch) -> Result<(), redb::Error> {
    let (span, start) = (bucket.span.as_str(), bucket.start);
    let number = table.get((span, start, ""))?;
    let mut number: u64 = number.and_then(|number| number.value().parse().ok()).unwrap_or(0);
    for (row, counts) in &batch.rows {
        let mut row = row.text();
        let there = |row: &str| -> Result<Option<Counts>, redb::Error> {
            Ok(table.get((span, start, row))?.map(|counts| Counts::parse(counts.value())))
        };
        let mut before = there(&row)?;
        if before.is_none() && number >= usage::ROWS_MAX {
            row = usage::Row::other().text();
            before = there(&row)?;
        }
        number += u64::from(before.is_none());
        let mut sum = before.unwrap_or_default();
        sum += *counts;
        table.insert((span, start, row.as_str()), sum.text().as_str())?;
    }
    table.insert((span, start, ""), number.to_string().as_str())?;
    Ok(())
}

/// Opens what is there; makes it where nothing is, under another name first, so that a crash leaves all of it or nothing.
fn open(path: &Path) -> Result<Database, redb::Error> {
    if !fs::exists(path).map_err(redb::Error::Io)? {
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".new-{}", std::process::id()));
        let draft = PathBuf::from(draft);
        // Left by a process of the same number that crashed here.
        let _ = fs::remove_file(&draft);
        format(&Database::create(&draft)?)?;
        let linked = match fs::hard_link(&draft, path) {
            // Of two that do this at the same time the first wins.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // Not every file system has links.
            Err(_) => fs::rename(&draft, path),
            Ok(()) => Ok(()),
        };
        let _ = fs::remove_file(&draft);
        linked.map_err(redb::Error::Io)?;
    }
    let database = Database::builder().set_cache_size(CACHE_BYTES).open(path)?;
    check(&database)?;
    Ok(database)
}

fn format(database: &Database) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    write.open_table(ABOUT)?.insert("format", FORMAT)?;
    write.open_table(ROWS)?;
    write.open_table(AUDIT)?;
    Ok(write.commit()?)
}

/// Whether it is ours, and of this format.
fn check(database: &Database) -> Result<(), redb::Error> {
    let read = database.begin_read()?;
    let corrupted = |what: &str| redb::Error::Corrupted(what.to_owned());
    if !read.list_tables()?.any(|table| table.name() == ABOUT.name()) {
        return Err(corrupted("it is a database of something else"));
    }
    let about = read.open_table(ABOUT)?;
    let format = about.get("format")?.map(|format| format.value().to_owned());
    match format.as_deref() {
        Some(FORMAT) => Ok(()),
        other => Err(corrupted(&format!("its format is {other:?}, this version knows {FORMAT:?}"))),
    }
}

fn refusal(name: &str, error: &redb::Error) -> FileError {
    use ErrorKind::{InvalidData, NotFound, PermissionDenied, ReadOnlyFilesystem, UnexpectedEof};
    let refused =
        |why: String| FileError { message: format!("`{name}` {why}"), locked: false, nowhere: false };
    match error {
        redb::Error::DatabaseAlreadyOpen => {
            let why = "is in use by another process; give each instance a file of its own, or share a Redis";
            FileError { locked: true, ..refused(why.to_owned()) }
        }
        redb::Error::Io(io) if matches!(io.kind(), PermissionDenied | ReadOnlyFilesystem | NotFound) => {
            FileError { nowhere: true, ..refused(format!("cannot be made or written: {io}")) }
        }
        redb::Error::Io(io) if matches!(io.kind(), InvalidData | UnexpectedEof) => refused(format!(
            "is damaged, or no file of ours: {io}; put it out of the way to begin without what it knows"
        )),
        redb::Error::Corrupted(why) => refused(format!("is damaged, or no file of ours: {why}")),
        other => refused(format!("cannot be opened: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::usage::{COUNT_MAX, Row as UsageRow, Span};
    use super::*;

    const HOUR: u64 = 3_600;
    const DAY: u64 = 86_400;
    const RETENTION: Retention =
        Retention { hours: Duration::from_secs(2 * DAY), days: Duration::from_secs(10 * DAY) };

    fn batch(number: u64, hour: u64, rows: &[(&str, u64)]) -> Batch {
        let row = |user: &str| UsageRow { user: Some(user.to_owned()), ..UsageRow::default() };
        let counts = |input| Counts { requests: 1, input, ..Counts::default() };
        let rows = rows.iter().map(|(user, input)| (row(user), counts(*input))).collect();
        Batch { writer: "w".to_owned(), number, hour, rows }
    }

    /// Tokens read in an hour or a day.
    fn input(file: &File, span: Span, start: u64) -> u64 {
        let rows = file.usage(Bucket { span, start }).unwrap();
        rows.iter().map(|(_, counts)| Counts::parse(counts).input).sum()
    }

    #[test]
    fn usage_goes_to_its_hour_and_its_day_once() {
        let file = File::in_memory().unwrap();
        let start = 20_000 * DAY;
        assert_eq!(input(&file, Span::Day, start), 0);
        for batch in [
            batch(1, start, &[("alice", 1), ("bob", 2)]),
            // Its acknowledgement was lost.
            batch(1, start, &[("alice", 1), ("bob", 2)]),
            batch(2, start + 23 * HOUR, &[("alice", 4)]),
            batch(3, start + DAY, &[("alice", 8)]),
            batch(2, start + 23 * HOUR, &[("alice", 4)]),
            Batch { writer: "another".to_owned(), ..batch(1, start + DAY, &[("alice", COUNT_MAX)]) },
        ] {
            file.add_usage(&batch, &RETENTION).unwrap();
        }
        assert_eq!(input(&file, Span::Hour, start), 3);
        assert_eq!(input(&file, Span::Hour, start + 23 * HOUR), 4);
        assert_eq!(input(&file, Span::Day, start), 7);
        assert_eq!(input(&file, Span::Day, start + DAY), COUNT_MAX);
        assert_eq!(file.usage(Bucket { span: Span::Day, start }).unwrap().len(), 2);
    }

    #[test]
    fn usage_is_forgotten_when_its_time_is_over() {
        let file = File::in_memory().unwrap();
        for hour in 0..20 * 24 {
            file.add_usage(&batch(hour + 1, hour * HOUR, &[("alice", 1)]), &RETENTION).unwrap();
        }
        let (now, today) = ((20 * 24 - 1) * HOUR, 19 * DAY);
        for (ago, kept) in [(0, 1), (48, 1), (49, 1), (50, 0), (400, 0)] {
            assert_eq!(input(&file, Span::Hour, now - ago * HOUR), kept, "{ago} hours ago");
        }
        for (ago, kept) in [(0, 24), (10, 24), (11, 24), (12, 0), (19, 0)] {
            assert_eq!(input(&file, Span::Day, today - ago * DAY), kept, "{ago} days ago");
        }
        let read = file.database.begin_read().unwrap();
        let rows = redb::ReadableTableMetadata::len(&read.open_table(USAGE).unwrap()).unwrap();
        assert_eq!(rows, 2 * (50 + 12), "a row and how many there are, for each");
    }
}
