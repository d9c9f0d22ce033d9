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

use crate::config::{self, Config, Loaded, Problem, Withheld};
use crate::{Gateway, control};

/// Editors and ConfigMaps change a file in several steps; it is read when they have been quiet this long.
const QUIET: Duration = Duration::from_millis(150);

/// A file is read at the latest after this time, however many changes there still are around it.
const PATIENCE: Duration = Duration::from_secs(1);

/// What ends by itself is looked at this often at least: clocks may be set.
const EXPIRY_LOOK: Duration = Duration::from_secs(1);

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

    /// Reads and resolves the configuration for a gateway that runs.
    ///
    /// # Errors
    /// As [`Source::load`], and when it does not fit what operators have said.
    pub fn load_for(&self, gateway: &Gateway) -> Result<Loaded, Refused> {
        self.fits(gateway, self.load()?)
    }

    fn fits(&self, gateway: &Gateway, loaded: Loaded) -> Result<Loaded, Refused> {
        let name =
            self.file.as_ref().map_or_else(|| "environment".to_owned(), |file| file.display().to_string());
        fits(gateway, &name, loaded).map_err(Refused::Faulty)
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

/// Refuses a configuration under which, with what operators have said, one request could meet too many limits; `file` is
/// what it is called.
///
/// # Errors
/// What such a request would meet, as a fault of the file.
fn fits(gateway: &Gateway, file: &str, loaded: Loaded) -> Result<Loaded, Vec<Problem>> {
    let (now, control) = (gateway.snapshot.load_full(), gateway.control.now());
    match control::fits((&now.config, &control), (&loaded.config, &control)) {
        Ok(()) => Ok(loaded),
        Err(overlap) => {
            let message = format!("with the limits and keys of the admin API, {overlap}");
            Err(vec![Problem::of_whole(file, "limits", message, overlap.help())])
        }
    }
}

/// Swaps a configuration in. Requests under way keep the one they began with.
pub fn apply(gateway: &Gateway, loaded: Loaded) {
    let before = gateway.snapshot.load_full();
    let config = &loaded.config;
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
        let (was, is) = (address(&before.config), address(config));
        tracing::warn!(%was, %is, "dependencies.redis takes effect at the next start");
    }
    let (was, is) = (&before.config.telemetry.metrics_prefix, &config.telemetry.metrics_prefix);
    if was != is {
        tracing::warn!(%was, %is, "telemetry.metrics_prefix takes effect at the next start");
    }
    let (was, is) = (&before.config.settings, &config.settings);
    if (&was.state, was.control_poll) != (&is.state, is.control_poll) {
        tracing::warn!("settings.state and settings.control_poll take effect at the next start");
    }
    gateway.rebuild(Some(loaded));
}

/// Reads the configuration again, and swaps it in when it is good: the last good one stays otherwise. Gives back the
/// warnings.
///
/// # Errors
/// Why it was not taken.
pub async fn again(gateway: &Arc<Gateway>, source: &Source) -> Result<Vec<Problem>, Refused> {
    // Reading and compiling are quick, but the disk may not be, nor are a hundred thousand keys.
    let (source, holder) = (source.clone(), gateway.clone());
    let work = move || {
        let loaded = source.load_for(&holder)?;
        let warnings = loaded.warnings.clone();
        apply(&holder, loaded);
        Ok(warnings)
    };
    let result = tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Refused::Unreadable(PathBuf::new(), std::io::Error::other(error))));
    note(gateway, "admin", &result);
    result
}

/// Looks at a configuration, given as its text, without taking it. Gives back the warnings. What variables hold is in no
/// message: who may ask this may not know it.
///
/// # Errors
/// Everything that is wrong with it, and with it under what operators have said.
pub fn check(gateway: &Gateway, name: &str, text: &str) -> Result<Vec<Problem>, Vec<Problem>> {
    let environment = |name: &str| std::env::var(name).ok();
    let withheld = Withheld::new(&environment);
    let loaded = config::load(Some((name, text)), &|name| withheld.get(name));
    let mut checked = loaded.and_then(|loaded| fits(gateway, name, loaded)).map(|loaded| loaded.warnings);
    let (Ok(problems) | Err(problems)) = &mut checked;
    withheld.mask(text, problems);
    checked
}

/// Puts in force what operators change, here or elsewhere, and what ends by itself, until the process closes.
pub async fn follow(gateway: Arc<Gateway>) {
    let mut changes = gateway.control.changes();
    loop {
        let expiry = gateway.control.now().next_expiry();
        let wait = expiry.map_or(EXPIRY_LOOK, |end| end.wait().min(EXPIRY_LOOK));
        tokio::select! {
            // The sender lives as long as the gateway.
            _ = changes.changed() => {}
            () = tokio::time::sleep(wait) => {}
            () = gateway.ending.cancelled() => return,
        }
        // Who changed something here has put it in force already.
        let known = Arc::ptr_eq(&gateway.snapshot.load().control, &*changes.borrow_and_update());
        if !known || expiry.is_some_and(control::Time::has_come) {
            put_in_force(&gateway).await;
        }
    }
}

/// Puts in force now what operators have said.
pub async fn put_in_force(gateway: &Arc<Gateway>) {
    let holder = gateway.clone();
    if let Err(error) = tokio::task::spawn_blocking(move || holder.rebuild(None)).await {
        tracing::error!(%error, "a change by operators is not in force");
    }
}

fn note(gateway: &Gateway, asked_by: &'static str, result: &Result<Vec<Problem>, Refused>) {
    gateway.metrics().config_update(asked_by, result.is_ok());
    match result {
        Ok(warnings) => {
            for warning in warnings {
                tracing::warn!("{warning}");
            }
            tracing::info!("configuration reloaded");
        }
        Err(refused) => {
            tracing::error!("configuration not reloaded, the last good one stays:\n{refused}")
        }
    }
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
        let (resolving, holder) = (source.clone(), gateway.clone());
        let result = tokio::task::spawn_blocking(move || {
            let loaded = resolving.fits(&holder, resolving.resolve(text?.as_deref())?)?;
            let warnings = loaded.warnings.clone();
            apply(&holder, loaded);
            Ok(warnings)
        });
        let asked_by = if asked { "signal" } else { "file" };
        note(&gateway, asked_by, &result.await.map_err(std::io::Error::other)?);
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
