//! `serve`: the gateway, from start to the end of its last stream.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Configuration, Outcome, Stopped, exit};
use crate::config::{Loaded, LogFormat};
use crate::edge::{Plane, accept, listen};
use crate::log::Log;
use crate::reload::{self, Refused, Source};
use crate::{Gateway, control, fleet, usage};

/// After the signal to end, new connections are still accepted for this long: load balancers need it to notice.
const STILL_ACCEPTING: Duration = Duration::from_secs(5);

/// After the grace, streams have this long to get their error event out.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often idle connections are looked at.
const REAP_EVERY: Duration = Duration::from_secs(10);

/// The log has this long to be read at the end.
const LOG_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    configuration: Configuration,
    /// Reload when the file changes, not only on SIGHUP.
    #[arg(long)]
    watch: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let source = options.configuration.source();
    let (loaded, seen) = source.load_seen().map_err(|refused| refusal(&refused))?;
    let log = start_log(loaded.config.settings.log_format);
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let (known, watch) = (Some(source.clone()), options.watch);
    serve(loaded, known, log, move |gateway| async move {
        let reloading = gateway.clone();
        tokio::spawn(async move {
            if let Err(error) = reload::run(reloading, source, seen, watch).await {
                tracing::error!(%error, "the configuration is not watched");
            }
        });
    })
}

/// A configuration refused at start, and the way out for who has none.
fn refusal(refused: &Refused) -> Stopped {
    let hint = match refused {
        Refused::Unreadable(..) => "\nNo file yet? `tollgate demo` needs none.",
        Refused::Faulty(_) => "",
    };
    Stopped::new(exit::CONFIG, format!("{refused}{hint}"))
}

/// The log of this process, and of everything that speaks through `tracing`.
pub(super) fn start_log(format: LogFormat) -> Log {
    let log = Log::to(std::io::stderr(), format);
    let builder = tracing_subscriber::fmt().with_writer(log.clone()).with_max_level(tracing::Level::INFO);
    let started = match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Text => builder.with_ansi(false).try_init(),
    };
    // A second log in one process can only be a test's: the first one goes on.
    drop(started);
    log
}

/// How long a Redis is asked for its policy before it counts as absent.
const EVICTION_PATIENCE: Duration = Duration::from_secs(3);
const EVICTION_PAUSE: Duration = Duration::from_millis(20);

/// Runs a gateway until it is told to end; `started` is called once its listeners are open.
pub(super) fn serve<F, S>(loaded: Loaded, source: Option<Source>, log: Log, started: S) -> Outcome
where
    S: FnOnce(Arc<Gateway>) -> F,
    F: Future<Output = ()>,
{
    raise_descriptor_limit();
    let last = log.clone();
    let failed = |error: std::io::Error| Stopped::new(exit::NO, error);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let workers = Workers::start().map_err(failed)?;
    let (code, gateway) = runtime.block_on(async {
        let control = control::Store::open(&loaded.config).await;
        let control = control.map_err(|error| Stopped::new(exit::CONFIG, error))?;
        let gateway =
            Gateway::new(loaded, source, control, log).map_err(|error| Stopped::new(exit::CONFIG, error))?;
        refuse_eviction(&gateway).await?;
        for worker in &workers.handles {
            let gateway = gateway.clone();
            worker.spawn(async move { gateway.limits.join_runtime() });
        }
        let connections = TaskTracker::new();
        open(&gateway, &workers, &connections).map_err(|error| Stopped::new(exit::UNAVAILABLE, error))?;
        // The handler is there before anybody can have read an address to send a signal about.
        let signals = Signals::new().map_err(failed)?;
        tokio::spawn(reap(gateway.clone()));
        tokio::spawn(watch_store(gateway.clone()));
        tokio::spawn(reload::follow(gateway.clone()));
        tokio::spawn(fleet::run(gateway.clone()));
        tokio::spawn(usage::run(gateway.clone()));
        let holder = gateway.clone();
        tokio::spawn(async move { holder.control.follow(holder.ending.clone()).await });
        started(gateway.clone()).await;
        let code = until_ended(&gateway, &connections, signals).await;
        // What the workers have not sent would end with them; what does not come to an end is told of below.
        let _ = tokio::time::timeout(LAST_WORDS, gateway.limits.leave_runtimes()).await;
        Ok((code, gateway))
    })?;
    // Requests still under way are dropped here, which ends them: settled, counted and logged as all others.
    workers.stop();
    runtime.block_on(async {
        if tokio::time::timeout(LAST_WORDS, gateway.limits.flush()).await.is_err() {
            tracing::warn!("the store of limits does not answer: some estimates stand");
        }
        // The last requests are in the totals of the fleet and in the usage, if anybody hears it.
        let _ = tokio::time::timeout(LAST_WORDS, async {
            tokio::join!(fleet::tell(&gateway), usage::flush_last(&gateway))
        })
        .await;
        let rows = gateway.ledger.usage.waiting().await;
        if rows > 0 {
            tracing::warn!(rows, "usage of the last requests could not be written: it is lost");
        }
    });
    runtime.shutdown_timeout(LAST_WORDS);
    last.flush(LOG_PATIENCE);
    Ok(code)
}

/// One thread and event loop a core. A connection stays on its worker, and the connections to providers it uses too: nothing
/// of a request is ever woken on another thread. docs/decisions/0005 has the figures.
struct Workers {
    handles: Vec<Handle>,
    threads: Vec<std::thread::JoinHandle<()>>,
    stop: CancellationToken,
}

impl Workers {
    fn start() -> std::io::Result<Self> {
        let mut workers = Self { handles: Vec::new(), threads: Vec::new(), stop: CancellationToken::new() };
        for index in 0..std::thread::available_parallelism()?.get() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            workers.handles.push(runtime.handle().clone());
            let stop = workers.stop.clone();
            let run = move || {
                runtime.block_on(stop.cancelled());
                runtime.shutdown_timeout(LAST_WORDS);
            };
            workers.threads.push(std::thread::Builder::new().name(format!("worker-{index}")).spawn(run)?);
        }
        Ok(workers)
    }

    /// Drops what still runs on them.
    fn stop(self) {
        self.stop.cancel();
        for thread in self.threads {
            // A worker that panicked outside of its tasks has nothing left to say.
            let _ = thread.join();
        }
    }
}

/// Where the configuration wants it, a Redis that may evict counters is refused. One that does not answer cannot be
/// asked; it is watched, and warned of.
async fn refuse_eviction(gateway: &Gateway) -> Result<(), Stopped> {
    if !gateway.snapshot.load().config.settings.require_noeviction {
        return Ok(());
    }
    let asked = tokio::time::timeout(EVICTION_PATIENCE, async {
        loop {
            match gateway.limits.info().await {
                Some(Err(_)) => tokio::time::sleep(EVICTION_PAUSE).await,
                answered => return answered.and_then(Result::ok),
            }
        }
    });
    match asked.await {
        Ok(Some(info)) if info.evicts() => {
            let policy = info.maxmemory_policy.unwrap_or_default();
            let message = format!(
                "settings.require_noeviction: this Redis has maxmemory-policy {policy}, which may evict counters; \
                 set it to noeviction"
            );
            Err(Stopped::new(exit::CONFIG, message))
        }
        Ok(_) => Ok(()),
        Err(_) => {
            tracing::warn!(
                "settings.require_noeviction: Redis does not answer, its maxmemory-policy is not known"
            );
            Ok(())
        }
    }
}

async fn watch_store(gateway: Arc<Gateway>) {
    gateway.limits.watch(gateway.metrics()).await;
}

/// Closes connections to providers that nobody used for a while.
async fn reap(gateway: Arc<Gateway>) {
    loop {
        tokio::time::sleep(REAP_EVERY).await;
        gateway.snapshot.load().reap();
    }
}

fn open(gateway: &Arc<Gateway>, workers: &Workers, connections: &TaskTracker) -> std::io::Result<()> {
    let now = gateway.snapshot.load_full();
    let (data, admin) = (now.config.server.listen, now.config.server.admin);
    // Port 0 is another one each time.
    let one = data == admin && data.port() != 0;
    let planes =
        if one { vec![(data, Plane::Both)] } else { vec![(data, Plane::Data), (admin, Plane::Admin)] };
    let opened: Vec<(TcpListener, Plane)> = planes
        .into_iter()
        .map(|(address, plane)| Ok((listen(address)?, plane)))
        .collect::<std::io::Result<_>>()?;
    for (listener, plane) in opened {
        let address = listener.local_addr()?;
        tracing::info!(%address, plane = plane.as_str(), "listening");
        // Operators are served where signals are, out of the way of callers; and who watches the end does not hold it up.
        let (workers, tracked) = match plane {
            Plane::Admin => (vec![Handle::current()], TaskTracker::new()),
            Plane::Data | Plane::Both => (workers.handles.clone(), connections.clone()),
        };
        tokio::spawn(accept(gateway.clone(), listener, plane, workers, tracked));
    }
    Ok(())
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next signal to end; its number.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.terminate.recv() => 15,
            _ = self.interrupt.recv() => 2,
        }
    }
}

/// Not ready → still accepting → closed → drained → streams ended. A second signal ends it at once.
async fn until_ended(gateway: &Gateway, connections: &TaskTracker, mut signals: Signals) -> ExitCode {
    let signal = signals.next().await;
    let grace = gateway.snapshot.load().config.server.shutdown_grace;
    tracing::info!(signal, ?grace, "ending: no longer ready, accepting a little longer");
    let drained = async {
        gateway.leaving.cancel();
        tokio::time::sleep(STILL_ACCEPTING).await;
        gateway.closing.cancel();
        connections.close();
        tracing::info!(connections = connections.len(), "closed: answers under way go on");
        if tokio::time::timeout(grace, connections.wait()).await.is_err() {
            tracing::warn!(connections = connections.len(), "the grace is over: streams are ended");
            gateway.ending.cancel();
            let _ = tokio::time::timeout(LAST_WORDS, connections.wait()).await;
        }
        // Who watches is told that this is the end.
        let _ = tokio::time::timeout(LAST_WORDS, gateway.live.left()).await;
    };
    tokio::select! {
        () = drained => {
            tracing::info!("ended");
            ExitCode::SUCCESS
        }
        signal = signals.next() => {
            tracing::warn!(signal, "a second signal: ended at once");
            gateway.ending.cancel();
            ExitCode::from(128 + signal)
        }
    }
}

/// As many descriptors as the system allows: the soft limit of 1,024 is for programs that use `select`.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}
