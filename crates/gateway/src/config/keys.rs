//! The one table of keys. From it come the checks of names and shapes, the defaults, the JSON Schema and the effective
//! configuration; what it does not list is an unknown key.

use super::kind::WhenAbsent::{self, List, Nothing, Required, Text};
use super::kind::{Key, Kind, Section};
use super::redis_url;

const fn key(name: &'static str, kind: Kind, default: WhenAbsent, doc: &'static str) -> Key {
    Key { name, kind, default, doc }
}

const SECOND: u64 = 1_000;
const HOUR: u64 = 3_600 * SECOND;
const GIB: usize = 1 << 30;
/// Rules, users and models a file may define, each.
const RULES_MAX: usize = 1_000;
const USERS_MAX: usize = 20_000;
const MODELS_MAX: usize = 2_000;

/// The whole file.
pub(super) const ROOT: Section = Section {
    name: "configuration",
    keys: &[
        key("server", Kind::Map(&SERVER), WhenAbsent::Section, "Listeners and bounds on input."),
        key("dependencies", Kind::Map(&DEPENDENCIES), Nothing, "Servers that the gateway uses."),
        key("settings", Kind::Map(&SETTINGS), WhenAbsent::Section, "Behaviour that is not about one rule."),
        key("telemetry", Kind::Map(&TELEMETRY), WhenAbsent::Section, "What is told to monitoring."),
        key(
            "tiers",
            Kind::Named { of: &TIER, max: RULES_MAX },
            Nothing,
            "Limits by tier, counted per user and model unless `per` says otherwise.",
        ),
        key(
            "limits",
            Kind::List { of: &Kind::Map(&LIMIT), min: 0, max: RULES_MAX },
            Nothing,
            "Rules; every rule that matches must say yes.",
        ),
        key(
            "auth",
            Kind::OneOf(&["required", "optional"]),
            Text("required"),
            "Whether a caller needs a key; optional: callers without one are anonymous.",
        ),
        key("users", Kind::List { of: &Kind::Map(&USER), min: 0, max: USERS_MAX }, Nothing, "Who may call."),
        key(
            "models",
            Kind::List { of: &Kind::Map(&MODEL), min: 1, max: MODELS_MAX },
            Required,
            "What may be called.",
        ),
    ],
};

/// `server`.
pub(super) const SERVER: Section = Section {
    name: "server",
    keys: &[
        key("listen", Kind::Address, Text("0.0.0.0:8080"), "Where SDKs talk to: /v1/*."),
        key(
            "admin",
            Kind::Address,
            Text("127.0.0.1:8081"),
            "Health, metrics, admin. The same address as `listen` puts all on one port.",
        ),
        key(
            "admin_key",
            Kind::AdminKey,
            Nothing,
            "Sent as X-Admin-Key or Bearer. Needed when `admin` is not a loopback address.",
        ),
        key(
            "admin_keys",
            Kind::List { of: &Kind::Map(&ADMIN_KEY), min: 0, max: 64 },
            Nothing,
            "Further keys, each with a name for the audit and a role.",
        ),
        key("metrics_key", Kind::Secret, Nothing, "Guards /metrics when set."),
        key(
            "trusted_proxies",
            Kind::List { of: &Kind::Network, min: 0, max: 256 },
            List(&[]),
            "Peers whose X-Forwarded-For is believed.",
        ),
        key(
            "shutdown_grace",
            Kind::Duration { min: 0, max: 24 * HOUR },
            Text("10m"),
            "How long streams may go on after SIGTERM.",
        ),
        key("max_body", Kind::Size { min: 1_000, max: GIB }, Text("10MB"), "Largest JSON body."),
        key("max_upload", Kind::Size { min: 1_000, max: GIB }, Text("64MB"), "Largest multipart body."),
        key(
            "max_connections_per_ip",
            Kind::Integer { min: 1, max: 1_000_000 },
            Text("4096"),
            "Connections one address may hold open; trusted proxies are exempt.",
        ),
    ],
};

/// `server.admin_keys[]`.
pub(super) const ADMIN_KEY: Section = Section {
    name: "admin_key",
    keys: &[
        key("name", Kind::Name, Required, "What the audit calls who has it."),
        key("key", Kind::AdminKey, Required, "Sent as X-Admin-Key or Bearer."),
        key(
            "role",
            Kind::OneOf(&["viewer", "operator", "admin"]),
            Required,
            "viewer: reads; operator: changes all but keys, users and the configuration; admin: all.",
        ),
    ],
};

/// `dependencies`.
pub(super) const DEPENDENCIES: Section = Section {
    name: "dependencies",
    keys: &[key(
        "redis",
        Kind::Map(&REDIS),
        Nothing,
        "The Redis whose counters all instances share. Default: limits are counted in this process.",
    )],
};

/// `dependencies.redis`.
pub(super) const REDIS: Section = Section {
    name: "redis",
    keys: &[
        key(
            "url",
            Kind::RedisUrl,
            Nothing,
            "redis:// rediss:// unix:// redis+sentinel://h1:26379,h2:26379/mymaster/0 redis+cluster://h1:7000,h2:7001",
        ),
        key("host", Kind::Host, Nothing, "In place of `url`: name or address."),
        key("port", Kind::Integer { min: 1, max: 65_535 }, Nothing, "With `host`; default: 6379."),
        key("username", Kind::Username, Nothing, "With `host`; empty: none."),
        key("password", Kind::Password, Nothing, "With `host`; empty: none."),
        key("db", Kind::Integer { min: 0, max: redis_url::DB_MAX }, Nothing, "With `host`; default: 0."),
        key("tls", Kind::Map(&REDIS_TLS), Nothing, "PEM files for TLS; with `host` it also turns TLS on."),
        key("timeout", Kind::Duration { min: 1, max: 10 * SECOND }, Text("50ms"), "Of one limiter call."),
        key(
            "when_down",
            WHEN_DOWN,
            Text("share"),
            "What limits that do not say do while it does not answer: count this instance's share, let everything pass, \
             or nothing.",
        ),
        key("prefix", Kind::Prefix, Text("tollgate"), "What every key begins with."),
    ],
};

/// `dependencies.redis.tls`.
pub(super) const REDIS_TLS: Section = Section {
    name: "redis_tls",
    keys: &[
        key("ca", Kind::File, Nothing, "Certificates to trust instead of the system's."),
        key("cert", Kind::File, Nothing, "Our certificate chain; needs `key`."),
        key("key", Kind::File, Nothing, "Its private key; needs `cert`."),
    ],
};

/// `settings`.
pub(super) const SETTINGS: Section = Section {
    name: "settings",
    keys: &[
        key("rate_limiting_strategy", Kind::Strategy, Text("fixed_window"), "For rules that do not say."),
        key(
            "instances",
            Kind::Integer { min: 1, max: 10_000 },
            Text("1"),
            "How many instances share the limits, until their heartbeats tell.",
        ),
        key(
            "require_noeviction",
            Kind::Bool,
            Text("false"),
            "Refuses to start with a Redis that may evict counters.",
        ),
        key(
            "state",
            Kind::File,
            Text("./tollgate.state"),
            "The file of what operators say at run time; with Redis a copy of it. `none`: it is not kept.",
        ),
        key(
            "control_poll",
            Kind::Duration { min: 50, max: 60 * SECOND },
            Text("1s"),
            "At the latest after this time an instance knows what was changed on another.",
        ),
        key(
            "usage_hours",
            Kind::Duration { min: 24 * HOUR, max: 400 * 24 * HOUR },
            Text("35d"),
            "How long it is kept what was used in each hour.",
        ),
        key(
            "usage_days",
            Kind::Duration { min: 24 * HOUR, max: 3_660 * 24 * HOUR },
            Text("400d"),
            "How long it is kept what was used on each day.",
        ),
        key("log_format", Kind::OneOf(&["json", "text"]), Text("json"), "How log lines look."),
    ],
};

/// `telemetry`.
pub(super) const TELEMETRY: Section = Section {
    name: "telemetry",
    keys: &[key(
        "metrics_prefix",
        Kind::MetricsPrefix,
        Text("tollgate_"),
        "What names of metrics begin with, but for process_*.",
    )],
};

const WHEN_DOWN: Kind = Kind::OneOf(&["share", "open", "closed"]);
const QUOTAS: Kind = Kind::OneOrMany { of: &Kind::Quota, max: 16 };
const SCOPE: Kind = Kind::OneOrMany { of: &Kind::Dimension, max: 8 };
const TIER: Kind = Kind::Either(&[QUOTAS, Kind::Map(&TIER_SECTION)]);

/// One entry of `tiers`, in its long form.
pub(super) const TIER_SECTION: Section = Section {
    name: "tier",
    keys: &[
        key("per", SCOPE, List(&["user", "model"]), "What is counted separately."),
        key("limit", QUOTAS, Required, "`60/minute`, a list, or `unlimited`."),
        key(
            "strategy",
            Kind::Strategy,
            Nothing,
            "How it is counted; default: settings.rate_limiting_strategy.",
        ),
        key("shadow", Kind::Bool, Text("false"), "Count and report, never refuse."),
        key(
            "when_down",
            WHEN_DOWN,
            Nothing,
            "What it does while Redis does not answer; default: dependencies.redis.when_down.",
        ),
        key(
            "durability",
            Kind::OneOf(&["asynchronous", "replicated"]),
            Nothing,
            "Replicated: a grant waits for one replica. Default: replicated for money under Sentinel or Cluster, else \
             asynchronous.",
        ),
    ],
};

/// One entry of `limits`.
pub(super) const LIMIT: Section = Section {
    name: "limit",
    keys: &[
        key("name", Kind::RuleName, Required, "A unique name, part of headers and metrics."),
        key(
            "match",
            Kind::Map(&MATCH),
            Nothing,
            "Which requests it is for; all conditions must hold. Default: every request.",
        ),
        // Required, unless `deny` is set.
        key("per", SCOPE, Nothing, "What is counted separately; `global`: nothing."),
        key(
            "limit",
            QUOTAS,
            Nothing,
            "`10/minute`, `10k tokens/day`, `$50/month`, `20 concurrent`, a list, or `unlimited`.",
        ),
        key(
            "strategy",
            Kind::Strategy,
            Nothing,
            "How it is counted; default: settings.rate_limiting_strategy.",
        ),
        key("mode", Kind::Mode, Text("strict"), "Strict: never more than the limit, over all instances."),
        key("shadow", Kind::Bool, Text("false"), "Count and report, never refuse."),
        key(
            "when_down",
            WHEN_DOWN,
            Nothing,
            "What it does while Redis does not answer; default: dependencies.redis.when_down.",
        ),
        key(
            "durability",
            Kind::OneOf(&["asynchronous", "replicated"]),
            Nothing,
            "Replicated: a grant waits for one replica. Default: replicated for money under Sentinel or Cluster, else \
             asynchronous.",
        ),
        key("deny", Kind::Bool, Text("false"), "Refuse what it matches, in place of `limit`."),
    ],
};

/// `limits[].match`.
pub(super) const MATCH: Section = Section {
    name: "match",
    keys: &[
        key("authenticated", Kind::Bool, Nothing, "Only callers with a key (true) or without (false)."),
        key(
            "endpoint",
            Kind::OneOrMany { of: &Kind::Endpoint, max: 64 },
            Nothing,
            "Globs on the route: /v1/images/*.",
        ),
        key(
            "model",
            Kind::OneOrMany { of: &Kind::Name, max: MODELS_MAX },
            Nothing,
            "Names or aliases of models.",
        ),
        key("user", Kind::OneOrMany { of: &Kind::Name, max: USERS_MAX }, Nothing, "Names of users."),
        key("team", Kind::OneOrMany { of: &Kind::Name, max: 1_000 }, Nothing, "Names of teams."),
        key("tier", Kind::OneOrMany { of: &Kind::Name, max: RULES_MAX }, Nothing, "Names of tiers."),
        key(
            "api_key",
            Kind::OneOrMany { of: &Kind::KeyId, max: 1_000 },
            Nothing,
            "Ids of keys: the first 12 hex digits of their SHA-256.",
        ),
        key("ip", Kind::OneOrMany { of: &Kind::Network, max: 1_000 }, Nothing, "Networks of the client."),
    ],
};

/// One entry of `users`.
pub(super) const USER: Section = Section {
    name: "user",
    keys: &[
        key("name", Kind::Name, Required, "A unique name."),
        key("team", Kind::Name, Nothing, "Any text; users with the same one share limits per team."),
        key("tier", Kind::Name, Nothing, "A name in `tiers`."),
        key(
            "models",
            Kind::List { of: &Kind::Name, min: 1, max: MODELS_MAX },
            Nothing,
            "The models it may use; default: all.",
        ),
        key(
            "keys",
            Kind::List { of: &Kind::Either(&[Kind::ApiKey, Kind::Map(&USER_KEY)]), min: 0, max: 100 },
            Nothing,
            "Its keys: text, `sha256:…`, or { hash, name, expires }.",
        ),
    ],
};

/// One entry of `users[].keys`, in its long form.
pub(super) const USER_KEY: Section = Section {
    name: "key",
    keys: &[
        key("hash", Kind::KeyHash, Required, "`sha256:` and 64 hex digits."),
        key("name", Kind::Name, Nothing, "What its owner calls it."),
        key("expires", Kind::Date, Nothing, "2027-01-01 (UTC) or RFC 3339; refused from then on."),
    ],
};

/// One entry of `models`.
pub(super) const MODEL: Section = Section {
    name: "model",
    keys: &[
        key("name", Kind::Name, Required, "A unique name, under which it is counted."),
        key("aliases", Kind::List { of: &Kind::Name, min: 0, max: 100 }, List(&[]), "Other names for it."),
        key(
            "fallback",
            Kind::OneOrMany { of: &Kind::Name, max: 16 },
            List(&[]),
            "Models to try, in order, when no provider of this one answers.",
        ),
        key(
            "count",
            Kind::OneOf(&["estimate", "exact"]),
            Text("estimate"),
            "How prompts are counted before they are sent: by their length, or by a tokenizer.",
        ),
        key(
            "token_weights",
            Kind::Map(&TOKEN_WEIGHTS),
            WhenAbsent::Section,
            "How much a token of a special kind counts towards limits in tokens.",
        ),
        key("providers", Kind::List { of: &PROVIDER, min: 1, max: 64 }, Required, "Who serves it, in order."),
    ],
};

const WEIGHT: Kind = Kind::Decimal { places: 3, max: 1 };

/// `models[].token_weights`.
pub(super) const TOKEN_WEIGHTS: Section = Section {
    name: "token_weights",
    keys: &[
        key("cached_input", WEIGHT, Text("1"), "Of prompt tokens that the provider had in its cache."),
        key("reasoning", WEIGHT, Text("1"), "Of completion tokens that were spent on reasoning."),
    ],
};

/// Money per million tokens: the sixth decimal is 10⁻¹² a token.
const MONEY: Kind = Kind::Decimal { places: 6, max: 1_000_000 };

/// `price` of a provider.
pub(super) const PRICE_SECTION: Section = Section {
    name: "price",
    keys: &[
        key("input", MONEY, Required, "Money per million prompt tokens."),
        key(
            "cached_input",
            MONEY,
            Nothing,
            "Of prompt tokens that the provider had in its cache; default: as `input`.",
        ),
        key("output", MONEY, Required, "Money per million completion tokens."),
    ],
};

const PRICE: Key = key("price", Kind::Map(&PRICE_SECTION), Nothing, "What it charges, for limits in money.");

const PROVIDER: Kind =
    Kind::Typed(&[(&["openai", "vllm", "ollama", "tei"], &OPENAI), (&["simulated"], &SIMULATED)]);

const MODEL_NAME: Key =
    key("model_name", Kind::Name, Nothing, "What the provider calls the model; default: as the caller does.");
const TIMEOUT: Key =
    key("timeout", Kind::Duration { min: 1, max: 24 * HOUR }, Text("300s"), "The whole attempt.");
const CONNECT: Key = key("connect_timeout", Kind::Duration { min: 1, max: HOUR }, Text("5s"), "TCP and TLS.");
const FIRST_TOKEN: Key = key(
    "first_token_timeout",
    Kind::Duration { min: 1, max: 24 * HOUR },
    Text("60s"),
    "From sending a streamed request to its first event.",
);
const IDLE: Key = key(
    "idle_timeout",
    Kind::Duration { min: 1, max: 24 * HOUR },
    Text("60s"),
    "Between two reads of an answer.",
);

/// A provider that speaks OpenAI's HTTP API.
pub(super) const OPENAI: Section = Section {
    name: "openai",
    keys: &[
        key(
            "type",
            Kind::OneOf(&["openai", "vllm", "ollama", "tei"]),
            Required,
            "Any server that speaks OpenAI's HTTP API.",
        ),
        key(
            "url",
            Kind::Url,
            Required,
            "Where it listens: with an empty path /v1 is added, any other path is the base as given.",
        ),
        key("key", Kind::Secret, Nothing, "Sent as Authorization: Bearer."),
        MODEL_NAME,
        TIMEOUT,
        CONNECT,
        FIRST_TOKEN,
        IDLE,
        PRICE,
        key(
            "stream_usage",
            Kind::Bool,
            Text("true"),
            "Whether stream_options.include_usage may be added to streams.",
        ),
    ],
};

/// A provider that answers by itself.
pub(super) const SIMULATED: Section = Section {
    name: "simulated",
    keys: &[
        key(
            "type",
            Kind::OneOf(&["simulated"]),
            Required,
            "Answers by itself: for demos, tests and load tests.",
        ),
        MODEL_NAME,
        key("latency", Kind::Duration { min: 0, max: HOUR }, Text("0ms"), "Before the first byte."),
        key(
            "tokens_per_second",
            Kind::Integer { min: 0, max: 1_000_000 },
            Text("0"),
            "Pace of a stream; 0: as fast as it goes.",
        ),
        key(
            "completion_tokens",
            Kind::Integer { min: 1, max: 1_000_000 },
            Text("32"),
            "Length of an answer.",
        ),
        key("fail_rate", Kind::Fraction, Text("0"), "Share of requests answered 500."),
        TIMEOUT,
        CONNECT,
        FIRST_TOKEN,
        IDLE,
        PRICE,
    ],
};
