//! New configuration while running: build, then swap, or keep the last good one and say so.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use sha2::{Digest, Sha256};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::Gateway;
use crate::config::{self, Config, Loaded, Problem};
use crate::snapshot::Snapshot;

/// Editors and ConfigMaps change a file in several steps; it is read when they have been quiet this long.
const QUIET: Duration = Duration::from_millis(150);

/// A file is read at the latest after this time, however many changes there still are around it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where a process has its configuration from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file; `None`: from the environment alone.
    pub file: Option<PathBuf>,
}

/// A configuration that cannot be used.
#[derive(Debug)]
pub enum Refused {
    /// The file cannot be read.
    Unreadable(PathBuf, std::io::Error),
    /// Its faults, all of them.
    Faulty(Vec<Problem>),
}

impl Source {
    /// Reads and resolves the configuration.
    ///
    /// # Errors
    /// When the file cannot be read, or for every fault in it.
    pub fn load(&self) -> Result<Loaded, Refused> {
        Ok(self.load_seen()?.0)
    }

    /// The same, with what tells the file's text from a later one.
    ///
    /// # Errors
    /// As [`Source::load`].
    pub fn load_seen(&self) -> Result<(Loaded, Seen), Refused> {
        let text = self.read();
        let seen = Seen::of(&text);
        Ok((self.resolve(text?.as_deref())?, seen))
    }

    /// The file's text.
    fn read(&self) -> Result<Option<String>, Refused> {
        let Some(path) = &self.file else { return Ok(None) };
        read(path).map(Some).map_err(|error| Refused::Unreadable(path.clone(), error))
    }

    fn resolve(&self, text: Option<&str>) -> Result<Loaded, Refused> {
        let environment = |name: &str| std::env::var(name).ok();
        let name = self.file.as_ref().map(|path| path.display().to_string());
        config::load(name.as_deref().zip(text), &environment).map_err(Refused::Faulty)
    }
}

/// The file that `TOLLGATE_CONFIG` names; empty is as unset.
pub fn configured_file() -> Option<PathBuf> {
    std::env::var_os("TOLLGATE_CONFIG").filter(|file| !file.is_empty()).map(PathBuf::from)
}

/// At most one byte more than a configuration may have: the loader refuses it then.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let bound = config::FILE_BYTES_MAX as u64 + 1;
    std::fs::File::open(path)?.take(bound).read_to_string(&mut text)?;
    Ok(text)
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(path, error) => write!(f, "{}: cannot be read: {error}", path.display()),
            Self::Faulty(problems) => {
                for (index, problem) in problems.iter().enumerate() {
                    write!(f, "{}{problem}", if index > 0 { "\n" } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

/// Swaps a configuration in. Requests under way keep the one they began with.
pub fn apply(gateway: &Gateway, config: Config) {
    let before = gateway.snapshot.load_full();
    for (what, was, is) in [
        ("server.listen", before.config.server.listen, config.server.listen),
        ("server.admin", before.config.server.admin, config.server.admin),
    ] {
        if was != is {
            tracing::warn!(%was, %is, "{what} takes effect at the next start");
        }
    }
    if before.config.redis != config.redis {
        let address =
            |config: &Config| config.redis.as_ref().map_or("none", |redis| &redis.address).to_owned();
        let (was, is) = (address(&before.config), address(&config));
        tracing::warn!(%was, %is, "dependencies.redis takes effect at the next start");
    }
    gateway.snapshot.store(Arc::new(Snapshot::new(config, Some(&before), gateway.metrics())));
}

/// Reloads on SIGHUP, and with `watch` whenever the file's content is no longer `seen`, until the process ends.
///
/// # Errors
/// When signals or the file's directory cannot be watched.
pub async fn run(gateway: Arc<Gateway>, source: Source, mut seen: Seen, watch: bool) -> std::io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    let (changed, mut changes) = mpsc::channel(1);
    let _watcher = match &source.file {
        Some(file) if watch => watch_directory(file, changed.clone())
            .inspect_err(|error| tracing::error!(%error, "the file is not watched; SIGHUP still reloads it"))
            .ok(),
        _ => None,
    };
    // It may have changed before it was watched.
    let _ = changed.try_send(());
    loop {
        let asked = tokio::select! {
            hangup = hangups.recv() => hangup.is_some(),
            Some(()) = changes.recv() => {
                quiet(&mut changes).await;
                false
            }
            () = gateway.closing.cancelled() => return Ok(()),
        };
        // Reading is quick, but the disk may not be.
        let reading = source.clone();
        let text =
            tokio::task::spawn_blocking(move || reading.read()).await.map_err(std::io::Error::other)?;
        let before = std::mem::replace(&mut seen, Seen::of(&text));
        // Another file of the directory changed (the log, perhaps): good or bad, this one was looked at.
        if !asked && before == seen {
            continue;
        }
        let resolving = source.clone();
        let result = tokio::task::spawn_blocking(move || resolving.resolve(text?.as_deref()));
        let result = result.await.map_err(std::io::Error::other)?;
        let source = if asked { "signal" } else { "file" };
        gateway.metrics().config_update(source, result.is_ok());
        match result {
            Ok(loaded) => {
                for warning in &loaded.warnings {
                    tracing::warn!("{warning}");
                }
                apply(&gateway, loaded.config);
                tracing::info!("configuration reloaded");
            }
            Err(refused) => {
                tracing::error!("configuration not reloaded, the last good one stays:\n{refused}")
            }
        }
    }
}

/// Waits until changes have been quiet for a moment, but not for ever: a log in the same directory never is.
async fn quiet(changes: &mut mpsc::Receiver<()>) {
    let patience = tokio::time::sleep(PATIENCE);
    tokio::pin!(patience);
    loop {
        tokio::select! {
            () = &mut patience => return,
            more = tokio::time::timeout(QUIET, changes.recv()) => match more {
                Ok(Some(())) => {}
                _ => return,
            },
        }
    }
}

/// What is compared to see whether a file changed: its text, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen([u8; 32]);

impl Seen {
    fn of(text: &Result<Option<String>, Refused>) -> Self {
        match text {
            Ok(text) => Self(Sha256::digest(text.as_deref().unwrap_or_default()).into()),
            Err(refused) => Self(Sha256::digest(refused.to_string()).into()),
        }
    }
}

/// The directory, not the file: editors replace files, and a ConfigMap is a symlink that moves.
fn watch_directory(file: &Path, changed: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // Full: a change is already waiting to be looked at.
            let _ = changed.try_send(());
        }
    })?;
    let parent = file.parent().filter(|parent| parent.as_os_str() != OsStr::new(""));
    watcher.watch(parent.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
