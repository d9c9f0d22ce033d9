//! Four gateways on one Redis, and what callers may see of them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use super::support::{
    self, Answer, CHAT, Callers, Doors, Metrics, Provider, Proxy, Redis, Tollgate, json_answer, post,
    question, request, users_config, windows,
};

/// Gateways.
pub(crate) const N: u64 = 4;
/// A user whom nothing holds up: what she sees is who decides.
pub(crate) const WIDE: (&str, &str) = ("wide", "limit: 1M/day");
/// Nobody on a busy machine is to wait longer for shared counting than this; the targets are printed beside.
pub(crate) const BACK: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(4);

pub(crate) struct Rig {
    pub(crate) provider: Provider,
    pub(crate) redis: Redis,
    pub(crate) gateways: Vec<Tollgate>,
    pub(crate) doors: Doors,
}

impl Rig {
    /// Four gateways that have heard of each other; they reach Redis by `by`, or directly.
    pub(crate) async fn start(redis: Redis, by: Option<&Proxy>, users: &[(&str, &str)]) -> Self {
        let rig = Self::unheard(redis, by, users).await;
        support::soon("all gateways are counted", async {
            while rig.redis.cli(&["ZCARD", "tollgate:ctl:instances"]) != N.to_string() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        rig
    }

    pub(crate) async fn unheard(redis: Redis, by: Option<&Proxy>, users: &[(&str, &str)]) -> Self {
        let answer = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let provider = Provider::answering(json_answer("200 OK", "", answer)).await;
        let config = users_config(&provider, &by.map_or_else(|| redis.url(), Proxy::url), "", users);
        // At once: one that finds no Redis looks for control data there for a while before it listens.
        let gateways = futures_util::future::join_all((0..N).map(|_| Tollgate::start(&config))).await;
        let doors = Arc::new(Mutex::new(gateways.iter().map(|gateway| gateway.data).collect()));
        Self { provider, redis, gateways, doors }
    }

    pub(crate) fn callers(&self, users: &[&'static str], each: usize) -> Callers {
        Callers::start(&self.doors, users, each, PAUSE)
    }

    /// One request of a user's.
    pub(crate) async fn ask(&self, number: usize, user: &str) -> support::Response {
        let key = format!("Bearer sk-{user}");
        let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
        let bytes = request("POST", CHAT, &headers, question(false).as_bytes());
        post(self.gateways[number % N as usize].data, &bytes).await
    }

    pub(crate) async fn all_metrics(&self, wanted: impl Fn(&Metrics) -> bool) {
        for gateway in &self.gateways {
            gateway.metrics_become(&wanted).await;
        }
    }

    /// Lines about Redis: each gateway logs one for each change, and changed so often at most.
    pub(crate) fn few_lines(&self, changes_max: usize) {
        for gateway in &self.gateways {
            let mut lines = gateway.lines();
            lines.retain(|line| line["message"] != "request" && line["message"] != "limited");
            let of = |what: &str| {
                let says =
                    |line: &&Value| line["message"].as_str().is_some_and(|said| said.starts_with(what));
                lines.iter().filter(says).count()
            };
            let (away, back) = (of("Redis does not answer"), of("Redis answers"));
            assert!((back..=back + 1).contains(&away) && away + back <= changes_max, "{lines:#?}");
            // Besides: where it listens, and once for each change that control data is, or is not, read.
            assert!(lines.len() <= 2 + 2 * changes_max, "{lines:#?}");
        }
    }

    /// The most sockets that any gateway holds to Redis, which does not answer.
    pub(crate) fn few_sockets(&self, to: SocketAddr) -> usize {
        let most = self.gateways.iter().map(|gateway| gateway.sockets_to(to)).max().unwrap_or(0);
        assert!(most <= sockets_max(), "{most} sockets");
        most
    }

    /// At the provider came what was admitted, and nobody was told of a failure.
    pub(crate) fn nobody_failed(&self, answers: &[Answer], asked_else: usize) {
        let wrong = answers.iter().find(|answer| !matches!(answer.status, 200 | 429));
        assert!(wrong.is_none(), "{wrong:?}");
        let admitted = answers.iter().filter(|answer| answer.is_admitted()).count();
        assert_eq!(self.provider.hits(), admitted + asked_else);
    }
}

/// Each event loop holds a connection to Redis; and decisions and control data the one that may still answer and two that are
/// being made, or listen.
fn sockets_max() -> usize {
    2 * std::thread::available_parallelism().map_or(1, usize::from) + 4
}

pub(crate) fn admitted(answers: &[Answer], user: &str) -> u64 {
    answers.iter().filter(|answer| answer.user == user && answer.is_admitted()).count() as u64
}

/// Half of the decisions that a source made took no longer than the first, 99 % than the second.
pub(crate) fn decisions(answers: &[Answer], source: &str) -> (Duration, Duration) {
    let of = answers.iter().filter(|answer| answer.source == source);
    let mut took: Vec<Duration> = of.filter_map(|answer| answer.decision).collect();
    took.sort_unstable();
    assert!(!took.is_empty(), "nothing was decided by {source}");
    (took[took.len() / 2], took[took.len() * 99 / 100])
}

pub(crate) fn is(source: &'static str) -> impl Fn(&Answer) -> bool {
    move |answer| answer.source == source
}

/// Windows without Redis admit L + N, those with it L, and those of a change what each gateway may have not seen.
pub(crate) fn windows_hold(answers: &[Answer], user: &str, limit: u64) {
    let mut most = [0; 3];
    for window in windows(answers, user) {
        let (kind, bound) = match (window.shared, window.alone) {
            (true, _) => (0, limit),
            (_, true) => (1, limit + N),
            _ => (2, limit + (N - 1) * limit.div_ceil(N)),
        };
        assert!(window.admitted <= bound, "at most {bound}: {window:?}");
        most[kind] = most[kind].max(window.admitted);
    }
    println!(
        "{limit} in a window; most: shared {}, without Redis {}, where it changed {}",
        most[0], most[1], most[2]
    );
}
