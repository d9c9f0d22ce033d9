//! The file: the one door to redb.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableHandle};

use super::PersistError;
use super::row;
use crate::limit::Limit;
use crate::memory::shard::Row;

const ABOUT: TableDefinition<'_, &str, &str> = TableDefinition::new("tollgate-limiter");
const LIMITS: TableDefinition<'_, u64, &str> = TableDefinition::new("limits");
const SUBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("subjects");

/// The form of rows and limits. Another one is refused.
const FORMAT: &str = "1";
/// Of pages, in memory.
const CACHE_BYTES: usize = 16 * 1024 * 1024;
/// Limits whose number is remembered; past it they are looked up anew.
const KNOWN_MAX: usize = 10_000;

pub(super) struct File {
    path: PathBuf,
    /// `None` after an error: opened anew by the next write.
    database: Option<Database>,
    /// Numbers of limits by their text.
    numbers: HashMap<String, u64>,
    /// The same by their address. They are kept alive, so that no other comes to live there.
    known: HashMap<usize, (Arc<Limit>, u64)>,
}

impl File {
    pub(super) fn open(path: &Path) -> Result<File, PersistError> {
        let database = Some(open(path)?);
        Ok(File { path: path.to_path_buf(), database, numbers: HashMap::new(), known: HashMap::new() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Hands every subject to `take`, which says whether it made sense.
    pub(super) fn load(&mut self, mut take: impl FnMut(Row) -> bool) -> Result<(), PersistError> {
        let path = self.path.clone();
        let failed = |error: &dyn Display| PersistError::new(&path, format!("it cannot be read: {error}"));
        let damaged = |what: &str| PersistError::new(&path, format!("it is damaged: {what}"));
        let Some(database) = &self.database else {
            return Err(damaged("it is not open"));
        };
        let read = database.begin_read().map_err(|error| failed(&error))?;
        let limits = read.open_table(LIMITS).map_err(|error| failed(&error))?;
        let mut by_number = HashMap::new();
        for entry in limits.iter().map_err(|error| failed(&error))? {
            let (number, text) = entry.map_err(|error| failed(&error))?;
            let limit = row::limit_of_text(text.value()).ok_or_else(|| damaged("a limit makes no sense"))?;
            self.numbers.insert(text.value().to_string(), number.value());
            by_number.insert(number.value(), limit);
        }
        let subjects = read.open_table(SUBJECTS).map_err(|error| failed(&error))?;
        for entry in subjects.iter().map_err(|error| failed(&error))? {
            let (subject, bytes) = entry.map_err(|error| failed(&error))?;
            let limit_of = |number| by_number.get(&number).cloned();
            let row = row::decode(subject.value(), bytes.value(), limit_of);
            if !row.is_some_and(&mut take) {
                return Err(damaged("what is kept of a subject makes no sense"));
            }
        }
        Ok(())
    }

    /// All of these, or none.
    pub(super) fn write<'r>(&mut self, rows: impl Iterator<Item = &'r Row>) -> Result<(), PersistError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open(&self.path)?,
        };
        // Dropped on an error: after one, redb wants to be opened anew.
        self.commit(&database, rows).map_err(|error| {
            self.numbers.clear();
            self.known.clear();
            PersistError::new(&self.path, format!("it cannot be written: {error}"))
        })?;
        self.database = Some(database);
        Ok(())
    }

    fn commit<'r>(
        &mut self,
        database: &Database,
        rows: impl Iterator<Item = &'r Row>,
    ) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        {
            let mut limits = write.open_table(LIMITS)?;
            let mut subjects = write.open_table(SUBJECTS)?;
            if self.numbers.is_empty() {
                for entry in limits.iter()? {
                    let (number, text) = entry?;
                    self.numbers.insert(text.value().to_string(), number.value());
                }
            }
            let mut new = Vec::new();
            for row in rows {
                if row.counters.is_empty() {
                    subjects.remove(&*row.subject)?;
                    continue;
                }
                let bytes = row::encode(row, |limit| self.number(limit, &mut new));
                subjects.insert(&*row.subject, &*bytes)?;
            }
            for (number, text) in new {
                limits.insert(number, &*text)?;
            }
        }
        Ok(write.commit()?)
    }

    /// The number of a limit; one that has none gets the next, and is told in `new`.
    fn number(&mut self, limit: &Arc<Limit>, new: &mut Vec<(u64, String)>) -> u64 {
        let address = Arc::as_ptr(limit).addr();
        if let Some((_, number)) = self.known.get(&address) {
            return *number;
        }
        let text = row::limit_text(limit);
        let next = self.numbers.values().max().map_or(0, |number| number + 1);
        let number = *self.numbers.entry(text).or_insert_with_key(|text| {
            new.push((next, text.clone()));
            next
        });
        if self.known.len() >= KNOWN_MAX {
            self.known.clear();
        }
        self.known.insert(address, (Arc::clone(limit), number));
        number
    }
}

/// Opens a database of ours, and makes it if there is none.
fn open(path: &Path) -> Result<Database, PersistError> {
    let refused = |problem: String| PersistError::new(path, problem);
    if !path.try_exists().map_err(|error| refused(format!("it cannot be opened: {error}")))? {
        make(path).map_err(|error| refused(format!("it cannot be made: {error}")))?;
    }
    let opened = Database::builder().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).open(path);
    let database = opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => {
            refused("another store has it open; each needs a file of its own".into())
        }
        error => refused(format!("it is no store of limits, or damaged: {error}")),
    })?;
    match about(&database).map_err(|error| refused(format!("it cannot be read: {error}")))?.as_deref() {
        Some(FORMAT) => Ok(database),
        Some(other) => Err(refused(format!("its format is {other:?}, this version knows {FORMAT:?}"))),
        None => Err(refused("it is a database of something else".into())),
    }
}

/// Makes an empty file of ours under another name and then gives it its own, so that a crash leaves all of it or
/// nothing, and of two that do it at the same time the first wins.
fn make(path: &Path) -> Result<(), redb::Error> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".new-{}", std::process::id()));
    let draft = PathBuf::from(draft);
    // Left by a process of the same number that crashed here.
    let _ = fs::remove_file(&draft);
    let database = Database::create(&draft)?;
    let write = database.begin_write()?;
    write.open_table(ABOUT)?.insert("format", FORMAT)?;
    write.open_table(LIMITS)?;
    write.open_table(SUBJECTS)?;
    write.commit()?;
    drop(database);
    let linked = match fs::hard_link(&draft, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        // Not every file system has links.
        Err(_) => fs::rename(&draft, path),
        Ok(()) => Ok(()),
    };
    let _ = fs::remove_file(&draft);
    Ok(linked?)
}

/// The format of a file of ours; `None` of any other.
fn about(database: &Database) -> Result<Option<String>, redb::Error> {
    let read = database.begin_read()?;
    if !read.list_tables()?.any(|table| table.name() == ABOUT.name()) {
        return Ok(None);
    }
    Ok(read.open_table(ABOUT)?.get("format")?.map(|format| format.value().to_string()))
}
