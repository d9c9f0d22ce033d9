//! `check`: what a configuration means, before it is deployed.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tollgate_limiter::{
    Algorithm, Charge, Dimension, Limit, Quota, RedisStore, Scope, ServerInfo, Span, Store, StoreError, Unit,
    Window,
};

use super::{Configuration, Outcome, Stopped, block_on, exit};
use crate::config::{self, Config, Loaded, Problem, ProviderKind, Rule, Severity};
use crate::reload::Refused;
use crate::{limits, upstream};

/// Longest wait for one provider, or for Redis.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub(super) struct Options {
    /// The file. Default: as for `serve`.
    #[arg(value_name = "FILE")]
    file: Option<std::path::PathBuf>,
    #[command(flatten)]
    configuration: Configuration,
    /// Do not reach out to Redis and providers.
    #[arg(long)]
    offline: bool,
    /// Warnings count as errors.
    #[arg(long)]
    deny_warnings: bool,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    /// Print the whole configuration with all defaults, secrets masked, each value with its origin.
    #[arg(long)]
    show_effective: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let mut source = options.configuration.source();
    source.file = options.file.clone().or(source.file);
    let loaded = match source.load() {
        Ok(loaded) => Ok(loaded),
        Err(Refused::Faulty(problems)) => Err(problems),
        Err(unreadable) => return Err(Stopped::new(exit::UNAVAILABLE, unreadable)),
    };
    let (store, probes) = match &loaded {
        Ok(loaded) if !options.offline => {
            block_on(async { tokio::join!(probe_redis(&loaded.config), probe(&loaded.config)) })?
        }
        _ => (None, Vec::new()),
    };
    let problems = match &loaded {
        Ok(loaded) => &loaded.warnings,
        Err(problems) => problems,
    };
    let report = Report { loaded: loaded.as_ref().ok(), problems, store: store.as_ref(), probes: &probes };
    let verdict = report.verdict(options.deny_warnings);
    super::print(&if options.json { report.json(verdict, options) } else { report.text(verdict, options) })?;
    Ok(ExitCode::from(verdict))
}

/// One provider, asked for its models.
struct Probe {
    model: String,
    provider: String,
    /// Its status, or why there is none.
    result: Result<u16, String>,
}

impl Probe {
    /// Any answer but a refusal of our key will do: not every compatible server lists models.
    fn trouble(&self) -> Option<(u8, String)> {
        match &self.result {
            Ok(status @ (401 | 403)) => Some((exit::NO, format!("refuses its key (status {status})"))),
            Ok(_) => None,
            Err(why) => Some((exit::UNAVAILABLE, why.clone())),
        }
    }
}

/// Redis, asked for a counter.
struct StoreProbe {
    address: String,
    /// Why it does not answer.
    trouble: Option<String>,
}

async fn probe_redis(config: &Config) -> Option<StoreProbe> {
    let redis = config.redis.as_ref()?;
    Some(StoreProbe { address: redis.address.clone(), trouble: ask(config, redis).await.err() })
}

/// What a counter that nobody uses says. Changes nothing there, and takes no longer than the deadline.
async fn ask(config: &Config, redis: &config::Redis) -> Result<(), String> {
    let options = limits::options(redis).map_err(|error| error.to_string())?.deadline(PATIENCE);
    let store = RedisStore::open(options).map_err(|error| error.to_string())?;
    let window = Window::new(1, Span::Minute).and_then(|minute| Quota::new(1, Unit::Requests, minute));
    let quota = window.map_err(|error| error.to_string())?;
    let scope = Scope::of([Dimension::Session]);
    let limit =
        Limit::new("check", quota, Algorithm::FixedWindow, scope).map_err(|error| error.to_string())?;
    let charge = Charge::new(limit.into(), scope.subject(|_| "tollgate-check".into()), 1);
    let replicated = config.limits().find(|(_, limit)| limit.is_replicated());
    match (store.peek(vec![charge]).await, replicated) {
        (Ok(_), None) => Ok(()),
        (Ok(_), Some((_, limit))) => match store.info().await {
            Ok(ServerInfo { replicas: Some(0), .. }) => {
                Err(format!("it has no replica, and `{}` is `durability: replicated`", limit.id()))
            }
            // One that does not say may have some.
            _ => Ok(()),
        },
        (Err(StoreError::Unreachable), _) => {
            Err(format!("no connection within {PATIENCE:?}: is it there, are user and password right?"))
        }
        (Err(error), _) => Err(error.to_string()),
    }
}

async fn probe(config: &Config) -> Vec<Probe> {
    let providers = config.models.iter().flat_map(|model| model.providers.iter().map(move |p| (model, p)));
    let probes = providers.filter_map(|(model, provider)| {
        let ProviderKind::Openai { base, key, .. } = &provider.kind else {
            return None;
        };
        let asking = upstream::probe(base, key.as_ref(), provider.deadlines.connect);
        Some(async move {
            let result = match tokio::time::timeout(PATIENCE, asking).await {
                Ok(Ok(status)) => Ok(status.as_u16()),
                Ok(Err(failure)) => Err(failure.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            };
            Probe { model: model.name.clone(), provider: provider.name.clone(), result }
        })
    });
    futures_util::future::join_all(probes).await
}

struct Report<'a> {
    loaded: Option<&'a Loaded>,
    problems: &'a [Problem],
    store: Option<&'a StoreProbe>,
    probes: &'a [Probe],
}

impl Report<'_> {
    fn verdict(&self, deny_warnings: bool) -> u8 {
        if self.loaded.is_none() || (deny_warnings && !self.problems.is_empty()) {
            return exit::NO;
        }
        // A refused key is a fault here; a provider that is away is a fault elsewhere.
        let providers = self.probes.iter().filter_map(Probe::trouble).map(|(code, _)| code);
        let away = self.store.is_some_and(|store| store.trouble.is_some());
        providers.chain(away.then_some(exit::UNAVAILABLE)).min().unwrap_or(0)
    }

    fn text(&self, verdict: u8, options: &Options) -> String {
        let mut lines: Vec<String> = self.problems.iter().map(ToString::to_string).collect();
        if let Some(StoreProbe { address, trouble }) = self.store {
            lines.push(format!("redis {address}: {}", trouble.as_deref().unwrap_or("reachable")));
        }
        for probe in self.probes {
            let state = probe.trouble().map_or("reachable".to_owned(), |(_, why)| why);
            lines.push(format!("provider {} of model {}: {state}", probe.provider, probe.model));
        }
        if let Some(loaded) = self.loaded {
            lines.extend(loaded.config.rules.iter().flat_map(promises));
            if options.show_effective {
                lines.push(format!("{:#}", loaded.effective));
            }
        }
        let errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error).count();
        let warnings = self.problems.len() - errors;
        let word = if verdict == 0 { "ok" } else { "not ok" };
        lines.push(format!("{word}: {errors} errors, {warnings} warnings"));
        lines.join("\n")
    }

    fn json(&self, verdict: u8, options: &Options) -> String {
        let problems = self.problems.iter().map(|problem| {
            json!({ "severity": if problem.severity == Severity::Error { "error" } else { "warning" },
                    "file": problem.file, "line": problem.line, "col": problem.col, "path": problem.path,
                    "message": problem.message, "help": problem.help })
        });
        let probes = self.probes.iter().map(|probe| {
            json!({ "model": probe.model, "provider": probe.provider, "status": probe.result.as_ref().ok(),
                    "problem": probe.trouble().map(|(_, why)| why) })
        });
        let limits = self.loaded.iter().flat_map(|loaded| loaded.config.limits()).map(|(rule, limit)| {
            json!({ "id": limit.id(), "per": rule.per.to_string(), "algorithm": limit.algorithm().as_str(),
                    "rule": rule.name, "unit": limit.unit().as_str(), "quota": limit.quota().to_string(),
                    "shadow": limit.is_shadow(), "guarantee": limit.guarantee() })
        });
        let redis = self.store.map(|store| json!({ "address": store.address, "problem": store.trouble }));
        let rules = self.loaded.iter().flat_map(|loaded| &loaded.config.rules);
        let denies: Vec<&str> = rules.filter(|rule| rule.deny).map(|rule| rule.name.as_str()).collect();
        let mut report = json!({
            "ok": verdict == 0,
            "problems": problems.collect::<Vec<_>>(),
            "redis": redis,
            "providers": probes.collect::<Vec<_>>(),
            "limits": limits.collect::<Vec<_>>(),
            "denies": denies,
        });
        if let (true, Some(loaded)) = (options.show_effective, self.loaded) {
            report["effective"] = loaded.effective.clone();
        }
        format!("{report:#}")
    }
}

/// A rule in words: a line for each of its limits.
fn promises(rule: &Rule) -> Vec<String> {
    if rule.deny {
        return vec![format!("rule {}: refuses every request it matches", rule.name)];
    }
    if rule.limits.is_empty() {
        return vec![format!("rule {}: unlimited", rule.name)];
    }
    let line = |limit: &std::sync::Arc<Limit>| {
        let shadow = if limit.is_shadow() { " (shadow: counted and reported, never refused)" } else { "" };
        format!("limit {}: per {}, {}{shadow}", limit.id(), rule.per, limit.guarantee())
    };
    rule.limits.iter().map(line).collect()
}
