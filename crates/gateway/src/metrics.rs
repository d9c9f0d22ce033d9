//! Every Prometheus series, in one struct. Written everywhere, read only by the scrape.
//!
//! Labels are bounded by construction: endpoints are the router's own routes, models and providers come from the
//! configuration, codes are HTTP statuses. Nothing a caller sends becomes a label; unknown models are [`OTHER`].

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tollgate_limiter::resilient::Failure;
use tollgate_limiter::{Limit, ServerInfo, Source};

use crate::dialect::Usage;
use crate::router;
pub use crate::router::OTHER;

/// Whoever decides about limits.
const SOURCES: [Source; 6] =
    [Source::Memory, Source::Redis, Source::DenialMemory, Source::Share, Source::Open, Source::Closed];

/// A figure that goes up and down.
pub type Gauge = prometheus_client::metrics::gauge::Gauge;

/// How figures are spread.
pub type Histogram = prometheus_client::metrics::histogram::Histogram;

/// A label value: the configuration's own string, shared.
pub type Name = std::sync::Arc<str>;

/// `{endpoint}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByEndpoint {
    /// Canonical route or `other`.
    pub endpoint: &'static str,
}

/// `{endpoint, code}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByEndpointCode {
    /// Canonical route or `other`.
    pub endpoint: &'static str,
    /// HTTP status.
    pub code: u16,
}

/// `{endpoint, model}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByEndpointModel {
    /// Canonical route or `other`.
    pub endpoint: &'static str,
    /// Name of a configured model or `other`.
    pub model: Name,
}

/// `{model, provider}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByProvider {
    /// Name of a configured model.
    pub model: Name,
    /// Name of one of its providers.
    pub provider: Name,
}

/// `{model, provider, code}`; the code is a status, `timeout`, `error` or `cancelled` (the caller left).
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByProviderCode {
    /// Name of a configured model.
    pub model: Name,
    /// Name of one of its providers.
    pub provider: Name,
    /// How the attempt went.
    pub code: String,
}

/// `{model, provider, type}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByTokens {
    /// Name of a configured model.
    pub model: Name,
    /// Name of one of its providers.
    pub provider: Name,
    /// `prompt`, `completion`, `cached`, `reasoning`.
    pub r#type: &'static str,
}

/// `{strategy, status, rule}`: one limit met by one request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByRule {
    /// What the limit is per: `user,model`, `global`.
    pub strategy: Name,
    /// `allowed`, `blocked`, `shadow` (would have been blocked), `error` (the store did not answer).
    pub status: &'static str,
    /// The limit's id: `free-requests-minute`.
    pub rule: Name,
}

/// `{rule, unit}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByRuleUnit {
    /// The limit's id.
    pub rule: Name,
    /// What it counts: `requests`, `tokens`, …
    pub unit: &'static str,
}

/// `{source}`: who decided.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct BySource {
    /// `memory`, `redis`, `denial_memory`, …
    pub source: &'static str,
}

/// `{kind}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByKind {
    /// Of what kind.
    pub kind: &'static str,
}

/// `{outcome}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByOutcome {
    /// How it went.
    pub outcome: &'static str,
}

/// `{source, result}` of a change of the configuration.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByUpdate {
    /// `file`, `signal`, `admin`.
    pub source: &'static str,
    /// `applied`, `refused`.
    pub result: &'static str,
}

/// `{model}`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByModel {
    /// Name of a configured model or `other`.
    pub model: Name,
}

/// `{by}`: who ended a stream before its end.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByWhom {
    /// `client`, `upstream`, `timeout`, `shutdown`, `panic`.
    pub by: &'static str,
}

/// `{reason}`: why a connection was refused or closed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByReason {
    /// `per_ip`, `total`, `malformed`.
    pub reason: &'static str,
}

/// The series of one process.
pub struct Metrics {
    /// Requests by route and status.
    pub http_requests: Family<ByEndpointCode, Counter>,
    /// From the request's head to the last byte handed over.
    http_request_duration: Family<ByEndpointModel, Histogram, Buckets>,
    /// Requests between head and end.
    pub http_requests_in_flight: Family<ByEndpoint, Gauge>,
    /// What the gateway itself adds before an answer starts.
    pub overhead_duration: Family<ByEndpoint, Histogram, Buckets>,
    /// Attempts at providers.
    pub upstream_requests: Family<ByProviderCode, Counter>,
    /// Duration of attempts that answered.
    pub upstream_request_duration: Family<ByProvider, Histogram, Buckets>,
    /// 1 while a provider is tried first, 0 while it is passed over.
    pub upstream_healthy: Family<ByProvider, Gauge>,
    /// From sending a streamed request to its first event.
    pub time_to_first_token: Family<ByProvider, Histogram, Buckets>,
    /// Mean pace of a stream after its first event.
    pub time_per_output_token: Family<ByProvider, Histogram, Buckets>,
    /// Tokens by kind.
    pub tokens: Family<ByTokens, Counter>,
    /// What answers cost, in the unit of money of the prices.
    pub cost: Family<ByProvider, Counter<f64, AtomicU64>>,
    /// Limits met, by what they said.
    pub rate_limit_requests: Family<ByRule, Counter>,
    /// Refusals by limit.
    pub rate_limit_blocked: Family<ByRuleUnit, Counter>,
    /// What a decision took, by who decided.
    rate_limit_decision_duration: Family<BySource, Histogram, Buckets>,
    decisions: Vec<(Source, Histogram)>,
    routes: Vec<RouteSeries>,
    /// Tokens reserved, used, returned, forgiven.
    pub rate_limit_tokens: TokenCounters,
    /// Reservations settled, refunded, lost.
    pub rate_limit_settlements: SettlementCounters,
    /// Failed calls of Redis.
    rate_limit_redis_errors: Family<ByKind, Counter>,
    /// 1 while counters are kept in Redis and it answers.
    pub rate_limit_redis_connected: Gauge,
    /// 1 while limits do what they say for when Redis is down.
    pub rate_limit_degraded: Gauge,
    /// 1 while the Redis may evict counters.
    pub rate_limit_evicting_store: Gauge,
    redis_used_memory_bytes: Gauge,
    redis_evicted_keys: Counter,
    redis_connected_clients: Gauge,
    redis_replication_lag: prometheus_client::metrics::gauge::Gauge<f64, AtomicU64>,
    /// Configurations that were to be taken over.
    rate_limit_config_updates: Family<ByUpdate, Counter>,
    /// How many times what a request used was reserved for it.
    pub estimate_error_ratio: Family<ByModel, Histogram, Buckets>,
    /// Streams that ended early.
    pub streams_aborted: Family<ByWhom, Counter>,
    /// Connections refused before a request.
    pub connections_refused: Family<ByReason, Counter>,
    /// Open connections on the data listener.
    pub connections: Gauge,
    /// 1 while the running configuration is the one in the file.
    config_last_reload_successful: Gauge,
    registry: Registry,
}

impl Metrics {
    /// All series, their names beginning with `prefix` and an underscore.
    pub fn new(prefix: &str, log: crate::log::Log) -> Self {
        let mut registry = Registry::with_prefix(prefix);
        let tokens = Family::<ByKind, Counter>::default();
        let settlements = Family::<ByOutcome, Counter>::default();
        let token = |kind| tokens.get_or_create_owned(&ByKind { kind });
        let settlement = |outcome| settlements.get_or_create_owned(&ByOutcome { outcome });
        let mut this = Self {
            http_requests: Family::default(),
            http_request_duration: Family::new_with_constructor(LATENCY),
            http_requests_in_flight: Family::default(),
            overhead_duration: Family::new_with_constructor(OVERHEAD),
            upstream_requests: Family::default(),
            upstream_request_duration: Family::new_with_constructor(LATENCY),
            upstream_healthy: Family::default(),
            time_to_first_token: Family::new_with_constructor(LATENCY),
            time_per_output_token: Family::new_with_constructor(PACE),
            tokens: Family::default(),
            cost: Family::default(),
            rate_limit_requests: Family::default(),
            rate_limit_blocked: Family::default(),
            rate_limit_decision_duration: Family::new_with_constructor(DECISION),
            decisions: Vec::new(),
            routes: Vec::new(),
            rate_limit_tokens: TokenCounters {
                reserved: token("reserved"),
                used: token("used"),
                returned: token("returned"),
                forgiven: token("forgiven"),
            },
            rate_limit_settlements: SettlementCounters {
                settled: settlement("settled"),
                refunded: settlement("refunded"),
                lost: settlement("lost"),
            },
            rate_limit_redis_errors: Family::default(),
            rate_limit_redis_connected: Gauge::default(),
            rate_limit_degraded: Gauge::default(),
            rate_limit_evicting_store: Gauge::default(),
            redis_used_memory_bytes: Gauge::default(),
            redis_evicted_keys: Counter::default(),
            redis_connected_clients: Gauge::default(),
            redis_replication_lag: Default::default(),
            rate_limit_config_updates: Family::default(),
            estimate_error_ratio: Family::new_with_constructor(ERROR_RATIO),
            streams_aborted: Family::default(),
            connections_refused: Family::default(),
            connections: Gauge::default(),
            config_last_reload_successful: Gauge::default(),
            registry: Registry::default(),
        };
        let r = &mut registry;
        r.register("http_requests", "Requests by route and status", this.http_requests.clone());
        let duration = "From a request's head to its last byte handed over";
        r.register_with_unit(
            "http_request_duration",
            duration,
            Unit::Seconds,
            this.http_request_duration.clone(),
        );
        let in_flight = "Requests between head and end";
        r.register("http_requests_in_flight", in_flight, this.http_requests_in_flight.clone());
        let overhead = "What the gateway adds before an answer starts";
        r.register_with_unit("overhead_duration", overhead, Unit::Seconds, this.overhead_duration.clone());
        r.register("upstream_requests", "Attempts at providers by outcome", this.upstream_requests.clone());
        let upstream = "Duration of attempts that were answered";
        let family = this.upstream_request_duration.clone();
        r.register_with_unit("upstream_request_duration", upstream, Unit::Seconds, family);
        let healthy = "1: tried in its turn, 0: passed over after failures";
        r.register("upstream_healthy", healthy, this.upstream_healthy.clone());
        let first = "From sending a streamed request to its first event";
        r.register_with_unit("time_to_first_token", first, Unit::Seconds, this.time_to_first_token.clone());
        let pace = "Mean time per token after the first event";
        r.register_with_unit(
            "time_per_output_token",
            pace,
            Unit::Seconds,
            this.time_per_output_token.clone(),
        );
        r.register("tokens", "Tokens by kind", this.tokens.clone());
        r.register("cost", "What answers cost, by the prices of the configuration", this.cost.clone());
        this.register_limits(r);
        this.register_redis(r);
        let r = registry.sub_registry_with_prefix("rate_limit");
        r.register("tokens", "Tokens of requests that met limits in tokens", tokens);
        r.register("settlements", "Reservations and how they ended", settlements);
        let r = &mut registry;
        let ratio = "Tokens estimated before a request, divided by those it used";
        r.register("estimate_error_ratio", ratio, this.estimate_error_ratio.clone());
        r.register("streams_aborted", "Streams that ended early, by whom", this.streams_aborted.clone());
        let refused = "Connections refused or closed before a request was understood";
        r.register("connections_refused", refused, this.connections_refused.clone());
        r.register("connections", "Open connections of callers", this.connections.clone());
        let reload = "1 while the running configuration is the one in the file";
        r.register("config_last_reload_successful", reload, this.config_last_reload_successful.clone());
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        // `Info` appends `_info`.
        r.register("build", "What is running", build);
        r.register_collector(Box::new(DroppedLines(log)));
        this.config_last_reload_successful.set(1);
        let decision = |source: Source| {
            let by = BySource { source: source.as_str() };
            (source, this.rate_limit_decision_duration.get_or_create_owned(&by))
        };
        this.decisions = SOURCES.into_iter().map(decision).collect();
        this.routes = router::NAMES.into_iter().map(|endpoint| this.route_series(endpoint)).collect();
        this.registry = registry;
        this
    }

    fn register_redis(&self, r: &mut Registry) {
        r.register(
            "redis_used_memory_bytes",
            "used_memory of its masters",
            self.redis_used_memory_bytes.clone(),
        );
        r.register("redis_evicted_keys", "Keys it evicted", self.redis_evicted_keys.clone());
        r.register("redis_connected_clients", "Its clients", self.redis_connected_clients.clone());
        let lag = "The replica that is furthest behind";
        r.register_with_unit("redis_replication_lag", lag, Unit::Seconds, self.redis_replication_lag.clone());
        let evicts = "1 while the Redis of the counters may evict them";
        r.register("rate_limit_evicting_store", evicts, self.rate_limit_evicting_store.clone());
    }

    fn register_limits(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("rate_limit");
        let met = "Limits met by requests, and what they said; one request meets several";
        r.register("requests", met, self.rate_limit_requests.clone());
        r.register("blocked", "Requests refused, by the limit that refused", self.rate_limit_blocked.clone());
        let took = "From asking for a decision to having it";
        let family = self.rate_limit_decision_duration.clone();
        r.register_with_unit("decision_duration", took, Unit::Seconds, family);
        r.register("redis_errors", "Failed calls of Redis", self.rate_limit_redis_errors.clone());
        let connected = "1 while counters are kept in Redis and it answers";
        r.register("redis_connected", connected, self.rate_limit_redis_connected.clone());
        let degraded = "1 while limits do what they say for when Redis is down";
        r.register("degraded", degraded, self.rate_limit_degraded.clone());
        let updates = "Configurations to take over, by where they came from";
        r.register("config_updates", updates, self.rate_limit_config_updates.clone());
    }

    fn route_series(&self, endpoint: &'static str) -> RouteSeries {
        let by = ByEndpoint { endpoint };
        RouteSeries {
            endpoint,
            ok: self.http_requests.get_or_create_owned(&ByEndpointCode { endpoint, code: 200 }),
            in_flight: self.http_requests_in_flight.get_or_create_owned(&by),
            overhead: self.overhead_duration.get_or_create_owned(&by),
        }
    }

    /// The number of a route's series; what is none of ours is `other`, which is the last.
    pub fn route(&self, endpoint: &str) -> RouteNumber {
        let own = self.routes.iter().position(|route| route.endpoint == endpoint);
        RouteNumber(own.unwrap_or(self.routes.len() - 1))
    }

    /// The series of a route.
    pub fn of_route(&self, RouteNumber(number): RouteNumber) -> &RouteSeries {
        &self.routes[number]
    }

    /// What the servers of the counters say of themselves.
    pub fn redis_said(&self, info: &ServerInfo) {
        let gauge = |gauge: &Gauge, value: Option<u64>| {
            if let Some(value) = value {
                gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        };
        gauge(&self.redis_used_memory_bytes, info.used_memory);
        gauge(&self.redis_connected_clients, info.connected_clients);
        catch_up(&self.redis_evicted_keys, info.evicted_keys.unwrap_or_default());
        if let Some(lag) = info.replication_lag {
            self.redis_replication_lag.set(lag.as_secs_f64());
        }
        self.rate_limit_evicting_store.set(i64::from(info.evicts()));
    }

    /// Failed calls of Redis so far, by their place in [`Failure::ALL`], and grants that no replica acknowledged.
    pub fn redis_failed(&self, failures: [u64; Failure::ALL.len()], unreplicated: u64) {
        let failed = Failure::ALL.into_iter().map(Failure::as_str).zip(failures);
        for (kind, count) in failed.chain([("unreplicated", unreplicated)]) {
            let by = ByKind { kind };
            catch_up(&self.rate_limit_redis_errors.get_or_create_owned(&by), count);
        }
    }

    /// Settlements so far that were never answered, or found no room to wait in.
    pub fn settlements_lost(&self, count: u64) {
        catch_up(&self.rate_limit_settlements.lost, count);
    }

    /// A configuration that was to be taken over: the `file` changed, or by `signal` or `admin`.
    pub fn config_update(&self, source: &'static str, applied: bool) {
        self.config_last_reload_successful.set(i64::from(applied));
        let result = if applied { "applied" } else { "refused" };
        self.rate_limit_config_updates.get_or_create(&ByUpdate { source, result }).inc();
    }

    /// Durations of requests to a route for a model.
    pub fn durations(&self, endpoint: &'static str, model: &Name) -> Histogram {
        self.http_request_duration.get_or_create_owned(&ByEndpointModel { endpoint, model: model.clone() })
    }

    /// The series of a provider of a model.
    pub fn provider(&self, label: ByProvider) -> ProviderSeries {
        let ByProvider { model, provider } = &label;
        let tokens = |r#type| {
            let (model, provider) = (model.clone(), provider.clone());
            self.tokens.get_or_create_owned(&ByTokens { model, provider, r#type })
        };
        let (model, provider) = (model.clone(), provider.clone());
        let ok = ByProviderCode { model, provider, code: "200".to_owned() };
        ProviderSeries {
            ok: self.upstream_requests.get_or_create_owned(&ok),
            duration: self.upstream_request_duration.get_or_create_owned(&label),
            first_token: self.time_to_first_token.get_or_create_owned(&label),
            pace: self.time_per_output_token.get_or_create_owned(&label),
            cost: self.cost.get_or_create_owned(&label),
            prompt: tokens("prompt"),
            completion: tokens("completion"),
            cached: tokens("cached"),
            reasoning: tokens("reasoning"),
            label,
        }
    }

    /// How long a decision took.
    pub fn decided(&self, source: Source, took: Duration) {
        match self.decisions.iter().find(|(of, _)| *of == source) {
            Some((_, series)) => series.observe(took.as_secs_f64()),
            None => {
                let by = BySource { source: source.as_str() };
                self.rate_limit_decision_duration.get_or_create(&by).observe(took.as_secs_f64());
            }
        }
    }

    /// Where the answers of one limit are counted.
    pub fn limit(&self, limit: &Limit) -> LimitSeries {
        let (strategy, rule) = (Name::from(limit.scope().to_string()), Name::from(limit.id()));
        let by = |status| {
            let (strategy, rule) = (strategy.clone(), rule.clone());
            self.rate_limit_requests.get_or_create_owned(&ByRule { strategy, status, rule })
        };
        let by_unit = ByRuleUnit { rule: rule.clone(), unit: limit.unit().as_str() };
        LimitSeries {
            allowed: by("allowed"),
            blocked: by("blocked"),
            shadow: by("shadow"),
            error: by("error"),
            refusals: self.rate_limit_blocked.get_or_create_owned(&by_unit),
        }
    }

    /// Where estimates for a model, each divided by what was used, are counted; `model` is a configured one or [`OTHER`].
    pub fn estimate_errors(&self, model: &Name) -> Histogram {
        self.estimate_error_ratio.get_or_create_owned(&ByModel { model: model.clone() })
    }

    /// The scrape: OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        let mut process = Registry::default();
        process.register_collector(Box::new(Process));
        let encoded = prometheus_client::encoding::text::encode_registry(&mut text, &self.registry)
            .and_then(|()| prometheus_client::encoding::text::encode(&mut text, &process));
        encoded.expect("writing to a String does not fail");
        text
    }
}

/// Brings a counter up to a count that is kept elsewhere; a count that began anew leaves it as it is.
fn catch_up(counter: &Counter, count: u64) {
    counter.inc_by(count.saturating_sub(counter.get()));
}

/// Where the answers of one limit are counted; looked up once, not for each request.
pub struct LimitSeries {
    /// It had room.
    pub allowed: Counter,
    /// It had none.
    pub blocked: Counter,
    /// It had none, and is a shadow.
    pub shadow: Counter,
    /// The store did not answer.
    pub error: Counter,
    /// Requests that it refused: one limit for each.
    pub refusals: Counter,
}

/// What is counted of one provider, looked up once.
#[derive(Debug)]
pub struct ProviderSeries {
    /// Model and provider.
    pub label: ByProvider,
    /// Attempts that were answered with a 200.
    pub ok: Counter,
    /// Duration of attempts that were answered.
    pub duration: Histogram,
    /// From sending a streamed request to its first event.
    pub first_token: Histogram,
    /// Mean time per token after the first event.
    pub pace: Histogram,
    /// Money.
    pub cost: Counter<f64, AtomicU64>,
    prompt: Counter,
    completion: Counter,
    cached: Counter,
    reasoning: Counter,
}

impl ProviderSeries {
    /// Counts the tokens of one answer.
    pub fn count_tokens(&self, usage: &Usage) {
        for (series, amount) in [
            (&self.prompt, usage.prompt),
            (&self.completion, usage.completion),
            (&self.cached, usage.cached),
            (&self.reasoning, usage.reasoning),
        ] {
            if amount > 0 {
                series.inc_by(amount);
            }
        }
    }
}

/// Which of the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteNumber(usize);

/// What is counted of one route, looked up once.
#[derive(Debug)]
pub struct RouteSeries {
    /// Canonical route or `other`.
    pub endpoint: &'static str,
    /// Requests answered with a 200.
    pub ok: Counter,
    /// Requests between head and end.
    pub in_flight: Gauge,
    /// What the gateway adds before an answer starts.
    pub overhead: Histogram,
}

/// Counters of a few kinds that are all known beforehand.
#[derive(Debug)]
pub struct TokenCounters {
    /// Taken before.
    pub reserved: Counter,
    /// Used.
    pub used: Counter,
    /// Reserved and not used.
    pub returned: Counter,
    /// Used beyond what a limit remembers.
    pub forgiven: Counter,
}

/// How reservations ended.
#[derive(Debug)]
pub struct SettlementCounters {
    /// By what was used.
    pub settled: Counter,
    /// Given back: nobody answered.
    pub refunded: Counter,
    /// Never answered by the store, or given up: the estimate may stand.
    pub lost: Counter,
}

/// Histogram constructor with fixed bounds, in seconds.
/// Histogram constructor with fixed bounds, of durations in seconds.
#[derive(Clone, Copy)]
pub struct Buckets(&'static [f64]);

/// Answers of models: 5 ms to 5 minutes.
const LATENCY: Buckets =
    Buckets(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0]);
/// Our own work: 10 µs to 1 s.
const OVERHEAD: Buckets =
    Buckets(&[1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.05, 0.25, 1.0]);
/// One decision about limits: 500 ns in memory, milliseconds where a store is asked.
const DECISION: Buckets = Buckets(&[
    1e-6, 2.5e-6, 5e-6, 1e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1,
]);
/// Between tokens: 1 ms to 1 s.
const PACE: Buckets = Buckets(&[0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0]);

/// Estimated by used: a quarter to eight times.
const ERROR_RATIO: Buckets = Buckets(&[0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

#[derive(Debug)]
struct DroppedLines(crate::log::Log);

impl Collector for DroppedLines {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(self.0.dropped());
        let help = "Log lines dropped because nobody read the log";
        let metric = encoder.encode_descriptor("log_lines_dropped", help, None, counter.metric_type())?;
        counter.encode(metric)
    }
}

/// The usual `process_*` series, read from `/proc` when scraped; absent where there is no `/proc`.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(usage) = ProcessUsage::read() else {
            return Ok(());
        };
        let cpu = ConstCounter::new(usage.cpu_seconds);
        let metric = encoder.encode_descriptor(
            "process_cpu",
            "User and system time",
            Some(&Unit::Seconds),
            cpu.metric_type(),
        )?;
        cpu.encode(metric)?;
        let gauges = [
            ("process_resident_memory_bytes", "Resident memory", usage.resident_bytes),
            ("process_open_fds", "Open file descriptors", usage.open_files),
            ("process_max_fds", "Most file descriptors it may open", usage.max_files),
            ("process_threads", "Threads", usage.threads),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::<f64>::new(value);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

struct ProcessUsage {
    cpu_seconds: f64,
    resident_bytes: f64,
    open_files: f64,
    max_files: f64,
    threads: f64,
}

impl ProcessUsage {
    /// `proc(5)`: fields 14 and 15 of `stat` are ticks, 20 the threads, 24 the resident pages.
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / rustix::param::clock_ticks_per_second() as f64,
            resident_bytes: field(24)? * rustix::param::page_size() as f64,
            open_files: std::fs::read_dir("/proc/self/fd").ok()?.count() as f64,
            max_files: rustix::process::getrlimit(rustix::process::Resource::Nofile)
                .current
                .map_or(f64::INFINITY, |limit| limit as f64),
            threads: field(20)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogFormat;

    #[test]
    fn errors_of_estimates_are_shown_by_model() {
        let metrics = Metrics::new("tollgate", crate::log::Log::to(std::io::sink(), LogFormat::Json));
        for ratio in [1.9, 1e18] {
            metrics.estimate_errors(&Name::from("chat")).observe(ratio);
        }
        let text = metrics.encode();
        for (bound, count) in [("0.25", 0), ("1.5", 0), ("2.0", 1), ("8.0", 1), ("+Inf", 2)] {
            let series =
                format!("tollgate_estimate_error_ratio_bucket{{le=\"{bound}\",model=\"chat\"}} {count}\n");
            assert!(text.contains(&series), "{series}{text}");
        }
    }
}
