//! What the configuration says, resolved: every value typed, every name looked up, every default filled in.
//!
//! A [`Config`] that exists is right. [`load()`] reads the file into a tree with positions (`parse`), replaces variables
//! (`substitute`), adds what the environment says (`environment`), checks it against one table of keys (`keys`, from
//! which the JSON Schema is made too), and resolves it (`resolve`). All faults are found in one run; see [`Problem`].

mod check;
mod effective;
mod environment;
mod keys;
mod kind;
mod load;
mod outside;
mod overlap;
mod parse;
mod pem;
mod problem;
mod redis_url;
mod resolve;
mod resolve_models;
mod resolve_redis;
mod resolve_rules;
mod resolve_users;
mod review;
mod scalar;
mod schema;
mod substitute;
mod tree;
mod withheld;

#[cfg(test)]
mod tests;

pub use load::{Environment, Loaded, load};
pub use outside::{
    Fault, Known, date, duration, key_limits, name, network, over_rule, sha256, table_of_names,
};
pub use overlap::{MET_MAX, Overlap, Overlaps, Who};
pub use parse::FILE_BYTES_MAX;
pub use problem::{Problem, Severity};
pub(crate) use problem::{shown, suggest};
pub use schema::schema;
pub use withheld::Withheld;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tollgate_limiter::{Algorithm, Limit, Scope, WhenDown};

/// The whole configuration of one gateway.
#[derive(Clone, Debug)]
pub struct Config {
    /// Listeners and bounds on input.
    pub server: Server,
    /// The Redis whose counters are everybody's; `None`: limits are counted in this process.
    pub redis: Option<Redis>,
    /// Behaviour that is not about one rule.
    pub settings: Settings,
    /// What is told to monitoring.
    pub telemetry: Telemetry,
    /// Whether a caller needs a key.
    pub auth: Auth,
    /// Tiers and limits, in the order of the file, tiers first.
    pub rules: Vec<Rule>,
    /// Who may call.
    pub users: Vec<Arc<User>>,
    /// Every key, of users and (from `API_KEYS`) of nobody in particular.
    pub keys: Vec<Key>,
    /// What may be called.
    pub models: Vec<Model>,
}

impl Config {
    /// What every limit promises, in the order of the rules: rule and limit; [`Limit::guarantee`] says it in words.
    /// A rule without limits (`unlimited`) does not appear.
    pub fn limits(&self) -> impl Iterator<Item = (&Rule, &Arc<Limit>)> {
        self.rules.iter().flat_map(|rule| rule.limits.iter().map(move |limit| (rule, limit)))
    }
}

/// One entry of `server.admin_keys`.
#[derive(Clone, Debug)]
pub struct AdminKey {
    /// As in the audit.
    pub name: String,
    /// What is sent.
    pub key: Secret,
    /// What it may do.
    pub role: Role,
}

/// What somebody may do who has an admin key; each may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Read.
    Viewer,
    /// Change everything but keys, users and the configuration.
    Operator,
    /// Everything.
    Admin,
}

impl Role {
    /// `viewer`, `operator`, `admin`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// The role of this name.
    fn of(name: &str) -> Option<Self> {
        [Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|role| role.as_str() == name)
    }
}

/// `server`.
#[derive(Clone, Debug)]
pub struct Server {
    /// Where SDKs talk to.
    pub listen: SocketAddr,
    /// Health, metrics, admin. Equal to `listen`: one port for all.
    pub admin: SocketAddr,
    /// Needed by `/admin/*`; needed at all when `admin` is not a loopback address.
    pub admin_key: Option<Secret>,
    /// Further keys for `/admin/*`, each with its name and role.
    pub admin_keys: Vec<AdminKey>,
    /// Guards `/metrics` when set.
    pub metrics_key: Option<Secret>,
    /// Peers whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// How long streams may go on after SIGTERM.
    pub shutdown_grace: Duration,
    /// Largest JSON body, bytes.
    pub max_body: usize,
    /// Largest multipart body, bytes.
    pub max_upload: usize,
    /// Connections one address may hold open at a time; trusted proxies are exempt.
    pub max_connections_per_ip: usize,
}

/// `dependencies.redis`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redis {
    /// Where it is, with user and password, percent-encoded, ports and database written out:
    /// `redis://user:password@host:6379/0`, `unix:///path?db=1&user=u&pass=p`,
    /// `redis+sentinel://user:password@h1:26379,h2:26379/master/0`, `redis+cluster://user:password@h1:6379,h2:6379`.
    /// `rediss` in place of `redis`, also before `+`, is over TLS; an IPv6 address stands in brackets.
    pub url: Secret,
    /// Where it is, for people: the URL without user and password.
    pub address: String,
    /// Of a URL that begins with `rediss`: PEM files, each looked at when the configuration was read.
    pub tls: RedisTls,
    /// Of one limiter call; 1 ms to 10 s.
    pub timeout: Duration,
    /// What every key begins with: 1 to 64 bytes without braces, spaces and control characters.
    pub prefix: String,
}

impl Redis {
    /// The number of its database; 0 of a cluster.
    pub fn database(&self) -> u32 {
        let url = self.url.expose();
        let (_, written) = url.rsplit_once("?db=").or_else(|| url.rsplit_once('/')).unwrap_or_default();
        written.split('&').next().and_then(|number| number.parse().ok()).unwrap_or(0)
    }
}

/// `dependencies.redis.tls`: paths of PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisTls {
    /// Certificates to trust instead of the usual ones.
    pub ca: Option<PathBuf>,
    /// Our certificate chain; needs `key`.
    pub cert: Option<PathBuf>,
    /// Its private key; needs `cert`.
    pub key: Option<PathBuf>,
}

/// `settings`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How rules count that do not say.
    pub defaults: Defaults,
    /// Where control data is kept.
    pub state: Option<State>,
    /// An instance knows a change of control data at the latest after this time.
    pub control_poll: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// How many instances share the limits, until their heartbeats tell.
    pub instances: u32,
    /// Refuses to start with a Redis that may evict counters.
    pub require_noeviction: bool,
    /// How long it is known what was used.
    pub usage: Retention,
}

/// How long it is kept what was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// By the hour.
    pub hours: Duration,
    /// By the day.
    pub days: Duration,
}

/// `telemetry`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// What names of metrics begin with, without the underscore that follows it.
    pub metrics_prefix: String,
}

/// `settings.state`; absent where the file says `none`, and without a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The file.
    pub path: PathBuf,
    /// Nobody wrote it down: a place that cannot be written to is no reason not to start.
    pub is_default: bool,
}

/// What limits do that do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// `settings.rate_limiting_strategy`.
    pub strategy: Algorithm,
    /// `dependencies.redis.when_down`.
    pub when_down: WhenDown,
    /// Grants of money wait for a replica: counters are in a Redis that fails over.
    pub money_is_replicated: bool,
}

/// `settings.log_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// `auth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// 401 without a valid key.
    Required,
    /// Callers without a key are anonymous; a wrong key is still 401.
    Optional,
}

/// One entry of `tiers` or `limits`.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name: `anonymous`, or the tier's.
    pub name: String,
    /// Which requests it is for.
    pub matches: Match,
    /// What it is counted per.
    pub per: Scope,
    /// Its limits; id `<rule>-<unit>-<window>`. Empty for `unlimited`, and where `deny` is set.
    pub limits: Vec<Arc<Limit>>,
    /// Refuses what it matches. `per` says nothing then.
    pub deny: bool,
}

/// The conditions of a rule: all that are present must hold; within one, any value.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// Only callers with (or without) a key.
    pub authenticated: Option<bool>,
    /// Globs on the canonical route: `/v1/images/*`.
    pub endpoint: Vec<String>,
    /// Resolved model names.
    pub model: Vec<String>,
    /// User names.
    pub user: Vec<String>,
    /// Team names.
    pub team: Vec<String>,
    /// Tier names.
    pub tier: Vec<String>,
    /// Key ids: 12 hex digits.
    pub api_key: Vec<String>,
    /// Networks of the client address.
    pub ip: Vec<IpNet>,
}

/// One entry of `users`.
#[derive(Clone, Debug)]
pub struct User {
    /// Unique.
    pub name: String,
    /// Free text.
    pub team: Option<String>,
    /// A name in `tiers`.
    pub tier: Option<String>,
    /// Resolved names of the models it may use; `None`: all.
    pub models: Option<Vec<String>>,
}

/// One accepted key.
#[derive(Clone, Debug)]
pub struct Key {
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// The first 12 hex digits of `hash`.
    pub id: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Refused from then on.
    pub expires: Option<SystemTime>,
    /// Refused, whatever else holds.
    pub revoked: bool,
    /// Whose it is; `None` for keys from the environment.
    pub user: Option<Arc<User>>,
    /// What it has beyond, or in place of, what its user has.
    pub own: Own,
}

impl Key {
    /// Its team, else its user's.
    pub fn team(&self) -> Option<&str> {
        self.own.team.as_deref().or_else(|| self.user.as_ref()?.team.as_deref())
    }
}

/// What a key has of its own. Only keys that the admin API made have any.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// In place of the user's.
    pub team: Option<String>,
    /// In place of the user's.
    pub tier: Option<String>,
    /// Resolved names; what the user may not use it may not use either.
    pub models: Option<Vec<String>>,
    /// Met by its requests beside those of the rules.
    pub limits: Vec<Arc<Limit>>,
}

/// One entry of `models`.
#[derive(Clone, Debug)]
pub struct Model {
    /// The name it is counted under. `*` (environment only): every name.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// Models to try, in order, when no provider of this one answers. Resolved names.
    pub fallback: Vec<String>,
    /// Who serves it, in order. Never empty.
    pub providers: Vec<Provider>,
    /// How prompts are counted before they are sent.
    pub count: Count,
    /// How much a token of a special kind counts towards limits in tokens.
    pub token_weights: TokenWeights,
}

/// `models[].count`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Count {
    /// By their length, with what was learned of the model.
    #[default]
    Estimate,
    /// By a tokenizer.
    Exact,
}

/// `models[].token_weights`, in thousandths of a token: 0 to 1000. What counts less counts less towards limits in
/// tokens, input tokens and output tokens; never towards money, which has prices of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenWeights {
    /// Of prompt tokens that the provider had in its cache.
    pub cached_input: u16,
    /// Of completion tokens that were spent on reasoning.
    pub reasoning: u16,
}

impl Default for TokenWeights {
    fn default() -> Self {
        Self { cached_input: 1_000, reasoning: 1_000 }
    }
}

/// One entry of `models[].providers`.
#[derive(Clone, Debug, PartialEq)]
pub struct Provider {
    /// Unique within its model: host and port of `url`, or `simulated`; `…-2` for a second one.
    pub name: String,
    /// What is spoken, and to whom.
    pub kind: ProviderKind,
    /// What the provider calls the model; `None`: as the caller does.
    pub model_name: Option<String>,
    /// Deadlines of one attempt.
    pub deadlines: Deadlines,
    /// What it charges for tokens.
    pub price: Option<Price>,
}

/// `price` of a provider, in 10⁻¹² of the unit of money per token: 0.15 per million tokens are 150,000. At most 10¹²,
/// so that a price times a number of tokens below 2²⁴ fits 64 bits; who multiplies more needs 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Price {
    /// Prompt tokens.
    pub input: u64,
    /// Prompt tokens that the provider had in its cache; where the file leaves it out, as `input`.
    pub cached_input: u64,
    /// Completion tokens.
    pub output: u64,
}

/// `type` of a provider with what only that type has.
#[derive(Clone, Debug, PartialEq)]
pub enum ProviderKind {
    /// Any server that speaks OpenAI's HTTP API.
    Openai {
        /// Scheme, authority and base path without a trailing slash: `https://api.openai.com/v1`.
        base: http::Uri,
        /// Sent as `Authorization: Bearer`.
        key: Option<Secret>,
        /// Whether `stream_options.include_usage` may be added to its streams.
        stream_usage: bool,
    },
    /// Answers by itself.
    Simulated {
        /// Before the first byte.
        latency: Duration,
        /// Pace of a stream; 0: as fast as it goes.
        tokens_per_second: u32,
        /// Length of an answer.
        completion_tokens: u32,
        /// Share of requests answered 500, 0 to 1.
        fail_rate: f64,
    },
}

/// The deadlines of one attempt at one provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// TCP and TLS.
    pub connect: Duration,
    /// From sending a streamed request to its first event.
    pub first_token: Duration,
    /// Between two reads of an answer.
    pub idle: Duration,
    /// The whole attempt.
    pub total: Duration,
}

/// A value that never shows itself: `Debug` and `Display` print `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the value in.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }
    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Whether a canonical route fits a glob of `match.endpoint`: `*` is any number of characters, `/` included.
pub fn endpoint_matches(glob: &str, route: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = route.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}
