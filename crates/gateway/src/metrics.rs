//! Every Prometheus series, in one struct. Written everywhere, read only by the scrape.
//!
//! Labels are bounded by construction: endpoints are the router's own routes, models and providers come from the
//! configuration, codes are HTTP statuses. Nothing a caller sends becomes a label; unknown models are [`OTHER`].

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// The label of whatever is not ours: unknown paths, unknown models.
pub const OTHER: &str = "other";

/// A figure that goes up and down.
pub type Gauge = prometheus_client::metrics::gauge::Gauge;

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
    pub http_request_duration: Family<ByEndpointModel, Histogram, Buckets>,
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
    /// How many times what a request used was reserved for it.
    pub estimate_error_ratio: Family<ByModel, Histogram, Buckets>,
    /// Streams that ended early.
    pub streams_aborted: Family<ByWhom, Counter>,
    /// Connections refused before a request.
    pub connections_refused: Family<ByReason, Counter>,
    /// Open connections on the data listener.
    pub connections: Gauge,
    /// 1 while the running configuration is the one in the file.
    pub config_last_reload_successful: Gauge,
    registry: Registry,
}

impl Metrics {
    /// All series, registered under `tollgate_`.
    pub fn new(log: crate::log::Log) -> Self {
        let mut registry = Registry::with_prefix("tollgate");
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
        this.registry = registry;
        this
    }

    /// One request's estimate, divided by what it used; `model` is a configured one or [`OTHER`].
    pub fn observe_estimate(&self, model: &Name, ratio: f64) {
        self.estimate_error_ratio.get_or_create(&ByModel { model: model.clone() }).observe(ratio);
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

/// Histogram constructor with fixed bounds, of durations in seconds.
#[derive(Clone, Copy)]
pub struct Buckets(&'static [f64]);

/// Answers of models: 5 ms to 5 minutes.
const LATENCY: Buckets =
    Buckets(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0]);
/// Our own work: 10 µs to 1 s.
const OVERHEAD: Buckets =
    Buckets(&[1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.05, 0.25, 1.0]);
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
        let metrics = Metrics::new(crate::log::Log::to(std::io::sink(), LogFormat::Json));
        metrics.observe_estimate(&Name::from("chat"), 1.9);
        metrics.observe_estimate(&Name::from("chat"), 1e18);
        let text = metrics.encode();
        for (bound, count) in [("0.25", 0), ("1.5", 0), ("2.0", 1), ("8.0", 1), ("+Inf", 2)] {
            let series =
                format!("tollgate_estimate_error_ratio_bucket{{le=\"{bound}\",model=\"chat\"}} {count}\n");
            assert!(text.contains(&series), "{series}{text}");
        }
    }
}
