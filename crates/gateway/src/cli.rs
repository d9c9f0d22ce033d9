//! The command line: one file per verb.

mod bans;
mod check;
mod client;
mod demo;
mod explain;
mod health;
mod keys;
mod limits;
mod paint;
mod screen;
mod serve;
mod table;
mod tail;
mod top;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::reload::Source;

/// Where the configuration is looked for when nothing says so, in order.
const FILES: [&str; 2] = ["./tollgate.yml", "/etc/tollgate/tollgate.yml"];

/// Exit codes, as in `sysexits.h` where it has one.
mod exit {
    /// It ran and the answer is no.
    pub(super) const NO: u8 = 1;
    /// Wrong usage; clap exits so by itself.
    pub(super) const USAGE: u8 = 2;
    /// Something is not reachable.
    pub(super) const UNAVAILABLE: u8 = 69;
    /// The configuration was refused at start.
    pub(super) const CONFIG: u8 = 78;
}

/// A self-hosted gateway in front of LLM providers, with limits that hold.
#[derive(Parser)]
#[command(name = "tollgate", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the gateway.
    Serve(serve::Options),
    /// Try it: a simulated provider, two keys, synthetic traffic. No key, no file, no network.
    Demo(demo::Options),
    /// Validate a configuration and print each limit with its guarantee.
    Check(check::Options),
    /// Keys of callers: make, list, show, rotate, revoke, take in.
    #[command(disable_help_subcommand = true)]
    Keys(keys::Options),
    /// Limits that hold: list, show, set over those of the file, delete again, clear counters.
    #[command(disable_help_subcommand = true)]
    Limits(limits::Options),
    /// Who is let in no more: add, list, remove.
    #[command(disable_help_subcommand = true)]
    Bans(bans::Options),
    /// What a request would meet: every rule, what it says, where it is defined. Exit 0: let in, 1: refused.
    Explain(explain::Options),
    /// What a gateway does now, once a second, on a whole screen. q leaves.
    Top(top::Options),
    /// A line for each request as it ends.
    Tail(tail::Options),
    /// What was used: by user, key, team or model; in all, by the hour or by the day.
    Usage(usage::Options),
    /// Print a machine-readable description.
    Schema {
        #[command(subcommand)]
        of: Schema,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Ask a running gateway whether it is ready: exit 0 yes, 1 no, 69 not reachable.
    Health(health::Options),
    /// Print the version.
    Version,
}

#[derive(Subcommand)]
enum Schema {
    /// JSON Schema of the configuration file.
    Config,
    /// OpenAPI 3.1 of the admin API.
    Admin,
}

/// Where the configuration is.
#[derive(Args)]
struct Configuration {
    /// Configuration file. Default: $TOLLGATE_CONFIG, ./tollgate.yml, /etc/tollgate/tollgate.yml, else the environment.
    #[arg(short, long = "config", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Configuration {
    fn source(&self) -> Source {
        let found = || FILES.iter().map(PathBuf::from).find(|path| path.exists());
        Source { file: self.config.clone().or_else(crate::reload::configured_file).or_else(found) }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Serve(options) => serve::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Check(options) => check::run(&options),
        Verb::Keys(options) => keys::run(&options),
        Verb::Limits(options) => limits::run(&options),
        Verb::Bans(options) => bans::run(&options),
        Verb::Explain(options) => explain::run(&options),
        Verb::Top(options) => top::run(&options),
        Verb::Tail(options) => tail::run(&options),
        Verb::Usage(options) => usage::run(&options),
        Verb::Health(options) => health::run(&options),
        Verb::Schema { of: Schema::Config } => print(&format!("{:#}", crate::config::schema())),
        Verb::Schema { of: Schema::Admin } => print(&format!("{:#}", crate::admin::openapi())),
        Verb::Version => print(concat!("tollgate ", env!("CARGO_PKG_VERSION"))),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tollgate", &mut script);
            print(String::from_utf8_lossy(&script).trim_end())
        }
    };
    done.unwrap_or_else(|stopped| {
        eprintln!("{}", stopped.message);
        ExitCode::from(stopped.code)
    })
}

/// Why a verb stopped: what to say on standard error, and how to exit.
struct Stopped {
    code: u8,
    message: String,
}

impl Stopped {
    fn new(code: u8, message: impl std::fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }
}

type Outcome = Result<ExitCode, Stopped>;

/// Prints a result. A reader that stopped reading (`| head`) is no failure.
fn print(text: &str) -> Outcome {
    use std::io::Write;
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Stopped::new(exit::NO, error)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// A runtime for a verb that only asks others.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Stopped> {
    Ok(runtime()?.block_on(future))
}

fn runtime() -> Result<tokio::runtime::Runtime, Stopped> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Stopped::new(exit::NO, error))
}
