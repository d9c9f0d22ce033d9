//! A store in memory that survives a restart: what changed is written to an embedded file, twice a second.
//!
//! The file is a [`redb`] database: a crash at any moment leaves it as it was after one of its commits. With the half
//! second between two commits and the time a disk takes for one, what is lost with a killed process is less than the
//! last second; an orderly end loses nothing. Calls in flight end with their process and are not kept.
//!
//! That holds while a disk keeps up: 100,000 subjects that changed took a quarter of a second to write where this was
//! measured, 900,000 took three. A write takes longer with many of them, and that much more can be lost. The file holds
//! what is remembered, so it is as bounded as the budgets are: up to 300 bytes for a subject with two counters.

use std::fmt;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::key::Key;
use super::shard::{Row, Shard};
use super::{Budgets, Inner, MemoryStore, lock};
use crate::clock::Clock;

mod file;
mod row;

use file::File;

/// Between two writes.
const BEAT: Duration = Duration::from_millis(500);
/// Subjects read under one lock of a shard, and written in one commit.
const LOCKED_MAX: usize = 512;
const COMMIT_MAX: usize = 200_000;

impl MemoryStore {
    /// A store that goes on counting where the last one with this file ended. The file is made if there is none; one
    /// store at a time may have it open. One that is damaged, or of something else, is refused and left alone. When
    /// the last clone of the store is dropped, and no reservation is left, that waits for the last write.
    ///
    /// ```
    /// use tollgate_limiter::{Budgets, MemoryStore, SystemClock};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("limits.redb");
    /// let store = MemoryStore::open(&path, SystemClock, Budgets::default())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(
        path: impl AsRef<Path>,
        clock: impl Clock + 'static,
        budgets: Budgets,
    ) -> Result<MemoryStore, PersistError> {
        let mut inner = Inner::new(clock, budgets);
        for shard in &*inner.shards {
            lock(shard).keep_journal();
        }
        let mut file = File::open(path.as_ref())?;
        let now = inner.clock.now();
        file.load(|row| {
            let key = inner.key_of(Arc::clone(&row.subject));
            let mut shard = inner.shard(&key);
            let sound = shard.restore(&key, row, now);
            // A smaller budget than the last time forgets some.
            shard.make_room(now);
            sound
        })?;
        inner.keeper = Some(Keeper::start(file, &inner)?);
        Ok(MemoryStore(Arc::new(inner)))
    }

    /// Writes now what changed, and returns when it is on the disk. Nothing to do for a store without a file.
    pub fn sync(&self) -> Result<(), PersistError> {
        self.0.keeper.as_ref().map_or(Ok(()), Keeper::sync)
    }

    /// Why the last write failed, if it did. What it should have written is tried again, and counts in memory meanwhile.
    pub fn persist_problem(&self) -> Option<PersistError> {
        self.0.keeper.as_ref().and_then(|keeper| lock_problem(&keeper.problem).clone())
    }
}

/// A file that cannot be used: which, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistError {
    path: String,
    problem: String,
}

impl PersistError {
    fn new(path: &Path, problem: impl fmt::Display) -> PersistError {
        PersistError { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// What is wrong, without the path.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl fmt::Display for PersistError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.path, self.problem)
    }
}

impl std::error::Error for PersistError {}

type Problem = Arc<Mutex<Option<PersistError>>>;

/// The thread that writes. Dropped, it writes what is left and ends.
pub(super) struct Keeper {
    commands: Option<Sender<Sender<Result<(), PersistError>>>>,
    thread: Option<JoinHandle<()>>,
    problem: Problem,
}

impl Keeper {
    fn start(file: File, inner: &Inner) -> Result<Keeper, PersistError> {
        let problem = Problem::default();
        let (commands, received) = channel();
        let path = file.path().to_path_buf();
        let writer = Writer {
            file,
            shards: Arc::clone(&inner.shards),
            clock: Arc::clone(&inner.clock),
            problem: Arc::clone(&problem),
        };
        let thread = thread::Builder::new().name("tollgate-limits".into()).spawn(|| writer.run(received));
        let thread = thread.map_err(|error| PersistError::new(&path, error))?;
        Ok(Keeper { commands: Some(commands), thread: Some(thread), problem })
    }

    fn sync(&self) -> Result<(), PersistError> {
        let (answer, answered) = channel();
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(answer).is_ok());
        match answered.recv() {
            Ok(result) if sent => result,
            _ => Err(PersistError { path: String::new(), problem: "the writing thread has ended".into() }),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            // It ends by itself; one that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}

struct Writer {
    file: File,
    shards: Arc<[Mutex<Shard>]>,
    clock: Arc<dyn Clock>,
    problem: Problem,
}

impl Writer {
    fn run(mut self, commands: Receiver<Sender<Result<(), PersistError>>>) {
        loop {
            let command = commands.recv_timeout(BEAT);
            let result = self.write();
            *lock_problem(&self.problem) = result.clone().err();
            match command {
                // Who asked may have gone.
                Ok(answer) => drop(answer.send(result)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Everything that had changed when this began.
    fn write(&mut self) -> Result<(), PersistError> {
        let mut batch = Vec::new();
        for place in 0..self.shards.len() {
            let mut left = lock(&self.shards[place]).changes();
            while left > 0 {
                let now = self.clock.now();
                let some = lock(&self.shards[place]).changed(left.min(LOCKED_MAX), now);
                if some.is_empty() {
                    break;
                }
                left -= some.len().min(left);
                batch.extend(some.into_iter().map(|(key, row)| (place, key, row)));
                if batch.len() >= COMMIT_MAX {
                    self.commit(&mut batch)?;
                }
            }
        }
        self.commit(&mut batch)
    }

    fn commit(&mut self, batch: &mut Vec<(usize, Key, Row)>) -> Result<(), PersistError> {
        if batch.is_empty() {
            return Ok(());
        }
        // In the order of the file: neighbours share pages.
        batch.sort_unstable_by(|(_, _, one), (_, _, other)| one.subject.cmp(&other.subject));
        let result = self.file.write(batch.iter().map(|(_, _, row)| row));
        for (place, key, _) in batch.drain(..) {
            if result.is_err() {
                lock(&self.shards[place]).not_written(key);
            }
        }
        result
    }
}

fn lock_problem(problem: &Problem) -> std::sync::MutexGuard<'_, Option<PersistError>> {
    problem.lock().unwrap_or_else(PoisonError::into_inner)
}
