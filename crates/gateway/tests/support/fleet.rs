//! Gateways that share one Redis, or one that counts by itself; and what they say was used.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Provider, Redis, SOON, Tollgate, chat_config, get, openai, post, request};

pub const CHAT: &str = "/v1/chat/completions";

/// Between two looks at something that can only be polled.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Gateways with the same configuration.
pub struct Fleet {
    pub gateways: Vec<Tollgate>,
    /// Where they count; none: the only one counts by itself.
    pub redis: Option<Redis>,
}

impl Fleet {
    /// `size` gateways on one Redis; `limits` is what follows `limits:`, on the same line.
    pub async fn sharing(redis: Redis, size: usize, provider: &Provider, limits: &str) -> Self {
        Self::start(Some(redis), size, "", provider, limits).await
    }

    /// One that counts in memory.
    pub async fn alone(provider: &Provider, limits: &str) -> Self {
        Self::start(None, 1, "", provider, limits).await
    }

    /// With more lines in `server`.
    pub async fn start(
        redis: Option<Redis>,
        size: usize,
        server: &str,
        provider: &Provider,
        limits: &str,
    ) -> Self {
        let config = Self::config(redis.as_ref(), provider, limits);
        let mut gateways = Vec::new();
        for _ in 0..size {
            gateways.push(Tollgate::start_with(server, &config, &[]).await);
        }
        Self { gateways, redis }
    }

    /// What they are started with. A Redis is waited for long: what is shown is how they count, not how fast they are on
    /// a busy machine.
    pub fn config(redis: Option<&Redis>, provider: &Provider, limits: &str) -> String {
        let store = redis.map_or_else(String::new, |redis| {
            format!("dependencies: {{ redis: {{ url: '{}', timeout: 5s }} }}\n", redis.url())
        });
        format!("{}{store}limits: {limits}\n", chat_config(&[openai(provider)]))
    }

    /// Whoever takes the request with this number.
    pub fn of(&self, number: usize) -> &Tollgate {
        &self.gateways[number % self.gateways.len()]
    }

    /// What alice has used of a limit.
    pub async fn used(&self, limit: &str) -> u64 {
        self.used_says(0, limit).await
    }

    /// What one of the gateways says of it.
    async fn used_says(&self, gateway: usize, limit: &str) -> u64 {
        let ask = request("GET", "/v1/limits", &[("Authorization", "Bearer sk-alice")], b"");
        let standings = post(self.of(gateway).data, &ask).await.json();
        let of = |entry: &&Value| entry["rule"] == limit;
        let found = standings["data"].as_array().and_then(|limits| limits.iter().find(of));
        let found = found.unwrap_or_else(|| panic!("no {limit}: {standings}"));
        found["used"].as_u64().expect("a number")
    }

    /// Waits until so much is used of a limit: settlements are sent, not waited for.
    pub async fn used_becomes(&self, limit: &str, wanted: u64) {
        let started = Instant::now();
        loop {
            let used = self.used(limit).await;
            if used == wanted {
                // All see the same; and what is counted twice is counted late: it must stay.
                for gateway in 0..self.gateways.len() {
                    assert_eq!(self.used_says(gateway, limit).await, wanted, "{limit}");
                }
                return;
            }
            assert!(started.elapsed() < SOON, "{limit}: used {used}, not {wanted}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until every gateway tells of so many requests and tokens in all; of what another one has counted within the
    /// last second it does not know yet.
    pub async fn usage_becomes(&self, requests: u64, tokens: u64) {
        for gateway in &self.gateways {
            let started = Instant::now();
            loop {
                let said = get(gateway.admin, "/admin/usage?by=model").await.json();
                let lines = said["data"].as_array().unwrap_or_else(|| panic!("{said}"));
                let sum =
                    |of: fn(&Value) -> &Value| lines.iter().filter_map(|line| of(line).as_u64()).sum::<u64>();
                let told = (sum(|line| &line["requests"]), sum(|line| &line["tokens"]["total"]));
                if told == (requests, tokens) {
                    break;
                }
                assert!(started.elapsed() < SOON, "{told:?}, not {requests} requests and {tokens} tokens");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }

    /// The sum of series over all gateways, as [`super::Metrics::sum`].
    pub async fn sum(&self, family: &str, label: &str) -> u64 {
        let mut sum = 0.0;
        for gateway in &self.gateways {
            sum += gateway.metrics().await.sum(family, label);
        }
        sum as u64
    }

    /// Prompt and completion tokens in the metrics of all gateways.
    pub async fn tokens_counted(&self) -> u64 {
        let (prompt, completion) = (r#"type="prompt""#, r#"type="completion""#);
        self.sum("tokens_total", prompt).await + self.sum("tokens_total", completion).await
    }

    /// The lines of all chat requests, once all have ended.
    pub async fn ended(&self) -> Vec<Value> {
        let mut all = Vec::new();
        for gateway in &self.gateways {
            let idle = |metrics: &super::Metrics| metrics.sum("http_requests_in_flight", "") == 0.0;
            gateway.metrics_become(idle).await;
            // A scrape is no instant: a request may end in the middle of it.
            let metrics = gateway.metrics().await;
            assert_eq!(metrics.value("log_lines_dropped_total"), 0.0);
            let count = metrics.sum("http_requests_total", &format!(r#"endpoint="{CHAT}""#)) as usize;
            let started = Instant::now();
            loop {
                let lines = gateway.lines().into_iter();
                let lines: Vec<Value> =
                    lines.filter(|line| line["message"] == "request" && line["endpoint"] == CHAT).collect();
                assert!(lines.len() <= count, "{} lines of {count} requests", lines.len());
                if lines.len() == count {
                    all.extend(lines);
                    break;
                }
                assert!(started.elapsed() < SOON, "{} lines of {count} requests", lines.len());
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        all
    }
}

/// Prompt and completion tokens that these lines tell of.
pub fn tokens_of<'a>(lines: impl IntoIterator<Item = &'a Value>) -> u64 {
    let of = |line: &Value, name: &str| line[name].as_u64().unwrap_or(0);
    lines.into_iter().map(|line| of(line, "prompt_tokens") + of(line, "completion_tokens")).sum()
}
