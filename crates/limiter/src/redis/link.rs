//! One connection to one server, and what can be asked on it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ::redis::{AsyncConnectionConfig, Cmd, RedisConnectionInfo, RedisError, Value};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use super::address::Endpoint;
use super::dial::{CONNECT_DEADLINE, Dialer, Socket};
use super::epoch;
use super::scripts::{Name, Scripts};
use crate::store::StoreError;

/// Timeouts in a row after which a connection is given up.
const TIMEOUTS_MAX: u32 = 3;
/// How often a script that the server forgot again and again is asked for by its digest.
const DIGEST_ATTEMPTS: usize = 3;
/// How many replicas are waited for, and for how long.
const REPLICAS: i64 = 1;
const REPLICA_PATIENCE_MS: u64 = 20;
/// The first version that reads the flags of a script.
const FLAGS_SINCE: u32 = 7;

/// Called at the deadline of a question that was not answered. Says whether the answer is waited for even so: what it
/// grants, nobody will use.
pub(super) type Overdue<'q> = &'q (dyn Fn() -> bool + Sync);

/// What a server is asked.
#[derive(Clone, Copy)]
pub(super) enum Question<'q> {
    /// The charging script, over these keys, with these arguments.
    Charge(&'q [String], &'q [&'q [u8]], Overdue<'q>),
    /// The same; when it took something, a replica is waited for. Answers with the script's answer, and how many replicas
    /// have acknowledged it.
    ChargeReplicated(&'q [String], &'q [&'q [u8]], Overdue<'q>),
    /// The settling script; it gets through when the server is out of memory, where the server has that. With a history,
    /// only the server of that history is asked.
    Settle(&'q [String], &'q [&'q [u8]], Option<u32>),
    /// The healing script.
    Heal(&'q [String], &'q [&'q [u8]]),
    Command(&'q Cmd),
}

/// What a server said.
pub(super) struct Said {
    pub(super) value: Value,
    /// Tells the time of this server as a master from any other; 0: nobody knows.
    pub(super) history: u32,
}

impl<'q> Question<'q> {
    /// Whether this server must not be asked.
    pub(super) fn is_not_for(&self, link: &Link) -> bool {
        matches!(self, Question::Settle(_, _, Some(history)) if *history == 0 || *history != link.history)
    }

    /// The same, with something else called at the deadline.
    pub(super) fn when_overdue(self, overdue: Overdue<'q>) -> Question<'q> {
        match self {
            Question::Charge(keys, args, _) => Question::Charge(keys, args, overdue),
            Question::ChargeReplicated(keys, args, _) => Question::ChargeReplicated(keys, args, overdue),
            other => other,
        }
    }

    /// To be called when its deadline has passed. Says whether the answer is waited for even so.
    pub(super) fn overdue(&self) -> bool {
        match self {
            Question::Charge(_, _, overdue) | Question::ChargeReplicated(_, _, overdue) => overdue(),
            Question::Settle(..) | Question::Heal(..) | Question::Command(_) => false,
        }
    }
}

/// Whether a server of a cluster answers for a slot that is on its way to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    Owned,
    Arriving,
}

/// One connection that was made.
pub(super) struct Link {
    pub(super) endpoint: Endpoint,
    pub(super) made: Instant,
    /// As far as the server tells.
    pub(super) version: Option<String>,
    /// As far as the server tells: `master`.
    pub(super) role: Option<String>,
    /// Tells the runs of servers apart, as far as the server tells; else 0.
    pub(super) term: u32,
    /// As in [`Said`].
    pub(super) history: u32,
    socket: Socket,
    timeouts: AtomicU32,
    replicas: Replicas,
    loads: [Load; Name::ALL.len()],
}

/// Whoever first learns that the server does not know a script sends its text; the others wait for that.
#[derive(Default)]
struct Load {
    turn: Mutex<()>,
    count: AtomicU64,
}

/// Waiting for replicas, one at a time: whoever was answered before it began waits with it.
#[derive(Default)]
struct Replicas {
    begun: AtomicU64,
    /// The number of the last one, and how many had acknowledged by its end.
    last: Mutex<(u64, i64)>,
}

impl Link {
    /// Connects, and waits for a first answer: the version. A server that does not tell it is taken for an old one.
    pub(super) async fn connect(
        dialer: &Dialer,
        endpoint: Endpoint,
        login: &RedisConnectionInfo,
    ) -> Result<Link, RedisError> {
        let socket = dialer.dial(&endpoint, login, AsyncConnectionConfig::new()).await?;
        let mut link = Link {
            endpoint,
            made: Instant::now(),
            version: None,
            role: None,
            term: 0,
            history: 0,
            socket,
            timeouts: AtomicU32::new(0),
            replicas: Replicas::default(),
            loads: Default::default(),
        };
        let about = link.told(&::redis::cmd("INFO")).await?;
        if let Some(Value::BulkString(text)) = about {
            let text = String::from_utf8_lossy(&text);
            let said = |name: &str| text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
            link.version = said("redis_version:").map(str::to_string);
            link.term = said("run_id:").map_or(0, epoch::term);
            // A replica has its master's, and gets one of its own when it takes over: it may not have all that its master had.
            if said("role:").is_none_or(|role| role == "master") {
                link.history = said("master_replid:").or(said("run_id:")).map_or(0, epoch::leading);
            }
        }
        link.role = link.ask_role().await?;
        Ok(link)
    }

    /// `master`, `slave`, `sentinel`; `None` when the server does not tell.
    pub(super) async fn ask_role(&self) -> Result<Option<String>, RedisError> {
        let Some(Value::Array(parts)) = self.told(&::redis::cmd("ROLE")).await? else {
            return Ok(None);
        };
        let Some(Value::BulkString(role)) = parts.first() else {
            return Ok(None);
        };
        Ok(Some(String::from_utf8_lossy(role).into_owned()))
    }

    /// The answer to a question that a server may refuse, as many do that are rented.
    async fn told(&self, command: &Cmd) -> Result<Option<Value>, RedisError> {
        match timeout(CONNECT_DEADLINE, self.send(command, Slot::Owned)).await {
            Ok(Ok(value)) => Ok(Some(value)),
            Ok(Err(error)) if error.is_io_error() || error.is_unrecoverable_error() => Err(error),
            Ok(Err(_)) => Ok(None),
            Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time").into()),
        }
    }

    /// Whether it answered lately, as far as it was asked.
    pub(super) fn answers(&self) -> bool {
        self.timeouts.load(Ordering::Relaxed) < TIMEOUTS_MAX
    }

    /// Says whether it answers again.
    pub(super) fn has_answered(&self) -> bool {
        self.timeouts.load(Ordering::Relaxed) > 0 && self.timeouts.swap(0, Ordering::Relaxed) >= TIMEOUTS_MAX
    }

    /// Says whether that was once too often.
    pub(super) fn has_timed_out(&self) -> bool {
        self.timeouts.fetch_add(1, Ordering::Relaxed) + 1 == TIMEOUTS_MAX
    }

    pub(super) async fn ask(
        &self,
        scripts: &Scripts,
        question: Question<'_>,
        slot: Slot,
        until: Instant,
    ) -> Result<Value, RedisError> {
        let settle = if self.reads_flags() { Name::SettleAllowOom } else { Name::Settle };
        match question {
            Question::Charge(keys, args, _) => self.run(scripts, Name::Charge, keys, args, slot, until).await,
            Question::ChargeReplicated(keys, args, _) => {
                let answer = self.run(scripts, Name::Charge, keys, args, slot, until).await?;
                let acknowledged = self.replicated(&answer, until).await;
                Ok(Value::Array(vec![answer, Value::Int(acknowledged)]))
            }
            Question::Settle(keys, args, _) => self.run(scripts, settle, keys, args, slot, until).await,
            Question::Heal(keys, args) => self.run(scripts, Name::Heal, keys, args, slot, until).await,
            Question::Command(command) => self.send(command, slot).await,
        }
    }

    /// How many replicas have what the script wrote right before. None, when nobody can tell; when it took nothing, there
    /// is nothing to wait for.
    async fn replicated(&self, answer: &Value, until: Instant) -> i64 {
        let took = |verdicts: &Value| matches!(verdicts, Value::BulkString(all) if all.contains(&b'1'));
        if !matches!(answer, Value::Array(parts) if parts.get(1).is_some_and(took)) {
            return REPLICAS;
        }
        let before = self.replicas.begun.load(Ordering::SeqCst);
        let mut last = self.replicas.last.lock().await;
        if last.0 > before {
            return last.1;
        }
        if Instant::now() >= until {
            // Whoever wanted a replica has left.
            return REPLICAS;
        }
        let number = self.replicas.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let wait = ::redis::cmd("WAIT").arg(REPLICAS).arg(REPLICA_PATIENCE_MS).clone();
        let acknowledged = match self.send(&wait, Slot::Owned).await {
            Ok(Value::Int(acknowledged)) => acknowledged,
            _ => 0,
        };
        *last = (number, acknowledged);
        acknowledged
    }

    fn reads_flags(&self) -> bool {
        let major = self.version.as_ref().and_then(|version| version.split('.').next()?.parse::<u32>().ok());
        major.is_some_and(|major| major >= FLAGS_SINCE)
    }

    async fn send(&self, command: &Cmd, slot: Slot) -> Result<Value, RedisError> {
        let mut connection = self.socket.connection.clone();
        if slot == Slot::Owned {
            return command.query_async(&mut connection).await;
        }
        // As one message, so that nobody else's command comes between.
        let mut both = ::redis::pipe();
        both.cmd("ASKING").add_command(command.clone());
        let mut answers = connection.send_packed_commands(&both, 0, 2).await?;
        match answers.pop() {
            Some(Value::ServerError(error)) => Err(error.into()),
            Some(value) => Ok(value),
            None => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// By digest; when the server does not know it, one caller sends the text and the others ask again. What the
    /// server did not know it did not do, so asking again is safe; but not for somebody who has left meanwhile.
    async fn run(
        &self,
        scripts: &Scripts,
        name: Name,
        keys: &[String],
        args: &[&[u8]],
        slot: Slot,
        until: Instant,
    ) -> Result<Value, RedisError> {
        let (script, load) = (scripts.get(name), &self.loads[name as usize]);
        let call = |how: &str, what: &str| {
            let mut command = ::redis::cmd(how);
            command.arg(what).arg(keys.len()).arg(keys).arg(args);
            if name == Name::Heal {
                command.arg(self.history);
            }
            command.arg(self.term);
            command
        };
        let by_digest = call("EVALSHA", &script.digest);
        for _ in 0..DIGEST_ATTEMPTS {
            let loads = load.count.load(Ordering::Acquire);
            let unknown = match self.send(&by_digest, slot).await {
                Err(error) if error.code() == Some("NOSCRIPT") => error,
                answer => return answer,
            };
            let turn = timeout_at(until, load.turn.lock()).await;
            let Some(turn) = turn.ok().filter(|_| Instant::now() < until) else {
                return Err(unknown);
            };
            if load.count.load(Ordering::Acquire) == loads {
                let answer = self.send(&call("EVAL", &script.text), slot).await;
                load.count.fetch_add(1, Ordering::Release);
                drop(turn);
                return answer;
            }
        }
        self.send(&call("EVAL", &script.text), slot).await
    }
}

/// What a server's refusal is called here.
pub(super) fn refused(error: &RedisError) -> StoreError {
    let message = error.detail().map_or_else(|| error.to_string(), str::to_string);
    let code = error.code().unwrap_or("ERR");
    // Before 7.0 what stopped a script is only named in its words: `@user_script:231: -OOM command not allowed`.
    let inner = message.split_once(": -").and_then(|(_, inner)| inner.split_whitespace().next());
    let inner = inner.filter(|inner| inner.chars().all(|c| c.is_ascii_uppercase()));
    let code = if code == "ERR" { inner.unwrap_or(code) } else { code }.to_string();
    StoreError::Refused { code, message }
}
