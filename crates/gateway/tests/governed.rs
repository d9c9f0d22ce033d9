//! Every algorithm, scope and unit, counted in this process and in a shared Redis: the same requests, the same answers.
//!
//! All windows are weeks, so that none ends while a test runs (but at midnight before a Monday, UTC).

mod support;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use support::{Ask, Provider, Redis, Response, Store, Tollgate, obedient, start_counting, start_governed};
use tokio::task::JoinSet;

const WEEK_MS: u64 = 7 * 86_400_000;
/// How long a row may take, as far as its waits depend on it.
const SLACK_MS: u64 = 120_000;

const ALGORITHMS: [&str; 4] = ["fixed_window", "sliding_window", "moving_window", "token_bucket"];

/// What one request takes of each unit before it is sent, and what it turns out to have used.
const UNITS: [(&str, u64, u64); 5] = [
    ("requests", 1, 1),
    ("tokens", 40, 35),
    // More than was expected,
    ("input_tokens", 10, 15),
    // and less.
    ("output_tokens", 30, 20),
    ("cost", 70, 55),
];
const BODY: &str = r#","messages":[],"prompt":[1,1,1,1,1,1,1,1,1,1],"max_tokens":30,
    "x_usage":{"prompt_tokens":15,"completion_tokens":20,"total_tokens":35}"#;

const ALICE: Ask<'static> = Ask { body: BODY, ..Ask::PLAIN };
const BOB: Ask<'static> = Ask { key: "sk-bob", ip: "203.0.113.9", agent: "z", ..ALICE };

/// `m-alias` and `m-other` stand for the alias of a row's model and for its other model, `chat` for its model.
struct Scope {
    per: &'static str,
    /// Somebody else, counted with alice.
    same: Ask<'static>,
    /// The nearest to alice that is counted apart.
    apart: Option<Ask<'static>>,
}

const SCOPES: [Scope; 11] = [
    Scope { per: "ip", same: Ask { ip: ALICE.ip, ..BOB }, apart: Some(Ask { ip: "203.0.113.2", ..ALICE }) },
    Scope {
        per: "session",
        same: Ask { ip: ALICE.ip, agent: "a", ..BOB },
        apart: Some(Ask { agent: "b", ..ALICE }),
    },
    Scope {
        per: "api_key",
        same: Ask { key: ALICE.key, ..BOB },
        apart: Some(Ask { key: "sk-alice-2", ..ALICE }),
    },
    Scope {
        per: "user",
        same: Ask { key: "sk-alice-2", ..BOB },
        apart: Some(Ask { key: "sk-carol", ..ALICE }),
    },
    Scope { per: "team", same: Ask { key: "sk-carol", ..BOB }, apart: Some(Ask { key: "sk-bob", ..ALICE }) },
    Scope { per: "tier", same: BOB, apart: Some(Ask { key: "sk-carol", ..ALICE }) },
    Scope {
        per: "model",
        same: Ask { model: "m-alias", ..BOB },
        apart: Some(Ask { model: "m-other", ..ALICE }),
    },
    Scope {
        per: "endpoint",
        same: Ask { path: "/api/v1/chat", ..BOB },
        apart: Some(Ask { path: "/v1/completions", ..ALICE }),
    },
    Scope {
        per: "user,model",
        same: Ask { key: "sk-alice-2", model: "m-alias", ..BOB },
        apart: Some(Ask { model: "m-other", ..ALICE }),
    },
    Scope {
        per: "api_key,endpoint",
        same: Ask { key: ALICE.key, path: "/api/v1/chat", ..BOB },
        apart: Some(Ask { key: "sk-alice-2", ..ALICE }),
    },
    Scope { per: "global", same: Ask { path: "/v1/completions", model: "m-other", ..BOB }, apart: None },
];

/// One row of the table: a rule of its own, for models of its own.
#[derive(Clone, Copy)]
struct Row {
    algorithm: &'static str,
    scope: &'static Scope,
    unit: &'static str,
    reserved: u64,
    used: u64,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for algorithm in ALGORITHMS {
        for scope in &SCOPES {
            for (unit, reserved, used) in UNITS {
                rows.push(Row { algorithm, scope, unit, reserved, used });
            }
        }
    }
    rows
}

impl Row {
    /// Of its rule, and of its model.
    fn name(&self) -> String {
        format!("{}.{}.{}", self.scope.per.replace(',', "-"), self.algorithm, self.unit)
    }

    /// `<rule>-<unit>-<window>`.
    fn id(&self) -> String {
        format!("{}-{}-week", self.name(), self.unit)
    }

    /// Room for one request that is settled and one that is not.
    fn limit(&self) -> u64 {
        self.used + self.reserved
    }

    fn model(&self) -> String {
        let m = self.name();
        format!(
            "  - {{ name: {m}, aliases: [{m}-alias], providers: [*upstream] }}\n  \
             - {{ name: {m}-other, providers: [*upstream] }}\n"
        )
    }

    fn rule(&self) -> String {
        let (m, amount) = (self.name(), self.limit());
        let limit = match self.unit {
            "cost" => format!("$0.{amount:06}/week"),
            unit => format!("{amount} {}/week", unit.replace('_', " ")),
        };
        format!(
            "  - {{ name: {m}, match: {{ model: [{m}, {m}-other] }}, per: [{}], strategy: {}, limit: {limit} }}\n",
            self.scope.per, self.algorithm
        )
    }

    /// What is known of the time until there is room again, and until all is gone, when twice [`Row::used`] is in use:
    /// at most so many milliseconds, at least [`SLACK_MS`] less.
    fn waits(&self) -> (u64, u64) {
        let to_monday = to_monday();
        match self.algorithm {
            "fixed_window" => (to_monday, to_monday),
            // Of what is in use, half must have faded: with the next week's half.
            "sliding_window" => (to_monday + WEEK_MS / 2, to_monday + WEEK_MS),
            "moving_window" => (WEEK_MS, WEEK_MS),
            "token_bucket" => {
                let drains_in = |units: u64| (units * WEEK_MS).div_ceil(self.limit());
                (drains_in(self.used), drains_in(2 * self.used))
            }
            other => panic!("{other}"),
        }
    }

    /// Runs through the row: two that are counted together are all that fits, whoever is counted apart has all of it left.
    async fn hold(&self, gateway: &Tollgate, source: &str) {
        let (name, id) = (self.name(), self.id());
        let model = |ask: &Ask<'static>| match ask.model.strip_prefix('m') {
            Some(which) => format!("{name}{which}"),
            None => name.clone(),
        };
        let [alice_model, same_model] = [&ALICE, &self.scope.same].map(model);
        let alice = Ask { model: &alice_model, ..ALICE };
        let same = Ask { model: &same_model, ..self.scope.same };

        self.granted(&alice.send(gateway).await, self.used, source);
        alice.level_becomes(gateway, &id, self.used).await;
        self.granted(&same.send(gateway).await, 0, source);
        alice.level_becomes(gateway, &id, 2 * self.used).await;
        self.refused(&alice.send(gateway).await);
        self.refused(&same.send(gateway).await);
        if let Some(apart) = &self.scope.apart {
            let model = model(apart);
            self.granted(&Ask { model: &model, ..*apart }.send(gateway).await, self.used, source);
        }
        assert_eq!(alice.level(gateway, &id).await, 2 * self.used, "{id}");
    }

    fn granted(&self, answer: &Response, left: u64, source: &str) {
        let id = self.id();
        assert_eq!(answer.status, 200, "{id}: {}", answer.text());
        assert_eq!(answer.header("x-tollgate-source"), Some(source), "{id}");
        assert_eq!(answer.header("retry-after"), None, "{id}");
        assert_eq!(answer.header("x-should-retry"), None, "{id}");
        self.families(answer, left);
        // The general family is that of requests, unless another limit refuses.
        let general = (self.unit == "requests").then_some(self.limit());
        assert_eq!(answer.header("x-ratelimit-limit").map(number), general, "{id}");
        assert_eq!(answer.header("x-ratelimit-remaining").map(number), general.map(|_| left), "{id}");
    }

    fn refused(&self, answer: &Response) {
        let id = self.id();
        let (kind, code) = match self.unit {
            "requests" => ("requests", "rate_limit_exceeded"),
            "cost" => ("insufficient_quota", "insufficient_quota"),
            _ => ("tokens", "rate_limit_exceeded"),
        };
        assert_eq!((answer.status, answer.code()), (429, code.into()), "{id}: {}", answer.text());
        let error = &answer.json()["error"];
        assert_eq!((&error["type"], &error["rule"]), (&kind.into(), &id.as_str().into()));
        assert_eq!(
            (&error["scope"], &error["limit"]),
            (&self.scope.per.into(), &self.limit().into()),
            "{id}"
        );
        assert_eq!(error["used"], 2 * self.used, "{id}");
        let said = match self.unit {
            "cost" => "Limit $0.000125, Used $0.00011, Requested $0.00007. ".to_owned(),
            _ => format!("Limit {}, Used {}, Requested {}. ", self.limit(), 2 * self.used, self.reserved),
        };
        let message = answer.message();
        assert!(message.contains(&(said + "Please try again in ")), "{id}: {message}");

        let (retry, reset) = self.waits();
        let told = error["retry_after_ms"].as_u64().expect("milliseconds");
        near(&id, told, retry);
        assert_eq!(answer.number("retry-after-ms"), told);
        assert_eq!(answer.number("retry-after"), told.div_ceil(1_000));
        assert_eq!(answer.header("x-should-retry"), (told > 60_000).then_some("false"), "{id}");
        // What is left is too little, and never less than nothing.
        let left = self.limit().saturating_sub(2 * self.used);
        self.families(answer, left);
        let general = (answer.number("x-ratelimit-limit"), answer.number("x-ratelimit-remaining"));
        assert_eq!(general, (self.limit(), left), "{id}");
        near(&id, answer.number("x-ratelimit-reset") * 1_000 - now_ms(), reset);
    }

    /// `RateLimit*`, and OpenAI's where its limits have that unit.
    fn families(&self, answer: &Response, left: u64) {
        let (id, limit) = (self.id(), self.limit());
        assert_eq!(answer.header("ratelimit-policy"), Some(format!("\"{id}\";q={limit};w=604800").as_str()));
        let state = answer.header("ratelimit").expect("a state");
        let rest =
            state.strip_prefix(&format!("\"{id}\";r={left};t=")).unwrap_or_else(|| panic!("{left}: {state}"));
        let reset = number(rest) * 1_000;
        assert!((1..=2 * WEEK_MS).contains(&reset), "{state}");
        for unit in ["requests", "tokens"] {
            let said = |what| answer.header(&format!("x-ratelimit-{what}-{unit}"));
            let own = unit == self.unit;
            assert_eq!(said("limit").map(number), own.then_some(limit), "{id}");
            assert_eq!(said("remaining").map(number), own.then_some(left), "{id}");
            assert_eq!(said("reset").is_some(), own, "{id}");
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64
}

/// Until the week ends. The epoch began on a Thursday, weeks do on Mondays.
fn to_monday() -> u64 {
    WEEK_MS - (now_ms() + 3 * 86_400_000) % WEEK_MS
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text} is no number"))
}

fn near(id: &str, told: u64, latest: u64) {
    let expected = latest.saturating_sub(SLACK_MS)..=latest + 1_000;
    assert!(expected.contains(&told), "{id}: {told} ms, not {expected:?}");
}

/// A gateway with all rows.
async fn start(store: &Store, provider: &Provider, rows: &[Row]) -> Tollgate {
    let models: String = rows.iter().map(Row::model).collect();
    let limits: String = rows.iter().map(Row::rule).collect();
    let rest = format!("models:\n  - {{ name: chat, providers: [*upstream] }}\n{models}limits:\n{limits}");
    start_counting(store, provider, &rest).await
}

async fn hold(store: &Store) -> (Tollgate, Provider) {
    let provider = obedient().await;
    let rows = rows();
    let gateway = Arc::new(start(store, &provider, &rows).await);
    let mut tasks = JoinSet::new();
    for rows in rows.chunks(rows.len() / ALGORITHMS.len()) {
        let (rows, gateway, source) = (rows.to_vec(), gateway.clone(), store.source());
        tasks.spawn(async move {
            for row in rows {
                row.hold(&gateway, source).await;
            }
        });
    }
    tasks.join_all().await;
    (Arc::into_inner(gateway).expect("no task is left"), provider)
}

#[tokio::test]
async fn every_algorithm_scope_and_unit_in_memory() {
    hold(&Store::Memory).await;
}

#[tokio::test]
async fn every_algorithm_scope_and_unit_in_redis() {
    let store = Store::redis();
    let (gateway, provider) = hold(&store).await;
    let Store::Redis(redis) = &store else { panic!("it is one") };

    // Now every limit is used up for alice, and what refuses her writes nothing.
    let before = counters(redis);
    assert!(before.lines().count() > SCOPES.len(), "{before}");
    let (hits, mut asked) = (provider.hits(), 0);
    for row in rows() {
        let model = row.name();
        let refused = Ask { model: &model, ..ALICE }.send(&gateway).await;
        assert_eq!(refused.status, 429, "{}", row.id());
        asked += usize::from(refused.header("x-tollgate-source") == Some("redis"));
    }
    assert!(asked > rows().len() / 2, "Redis was asked {asked} times");
    assert_eq!(counters(redis), before);
    assert_eq!(provider.hits(), hits, "a refused request reaches nobody");

    let eternal = "local n = 0 for _, k in ipairs(redis.call('KEYS', '*')) do if redis.call('TTL', k) < 0 then n = n + 1 end end return n";
    assert_eq!(redis.cli(&["EVAL", eternal, "0"]), "0", "keys that live for ever");
}

/// In each unit and scope the first request leaves too little; the second one asks for more of that unit than is left.
#[tokio::test]
async fn one_that_refuses_leaves_all_others_as_they_were() {
    for store in [Store::Memory, Store::redis()] {
        let provider = obedient().await;
        let roomy = ["1k/week", "1M tokens/week", "1M input tokens/week", "1M output tokens/week", "$1/week"];
        let tight =
            ["1/week", "60 tokens/week", "20 input tokens/week", "40 output tokens/week", "$0.0001/week"];
        let mut models = "models:\n  - { name: chat, providers: [*upstream] }\n".to_owned();
        let mut limits = "limits:\n".to_owned();
        for (index, (unit, ..)) in UNITS.iter().enumerate() {
            let mut own = roomy;
            own[index] = tight[index];
            models += &format!("  - {{ name: {unit}, providers: [*upstream] }}\n");
            let rule = |name: &str, per: &str, limits: &[&str]| {
                let limits = limits.join(", ");
                format!(
                    "  - {{ name: {unit}-{name}, match: {{ model: {unit} }}, per: {per}, limit: [{limits}] }}\n"
                )
            };
            limits += &rule("all", "global", &roomy);
            limits += &rule("address", "ip", &roomy);
            limits += &rule("own", "user", &own);
        }
        let gateway = start_counting(&store, &provider, &format!("{models}{limits}")).await;
        for (unit, _, used) in UNITS {
            let ask = Ask { model: unit, ..ALICE };
            assert_eq!(ask.send(&gateway).await.status, 200, "{unit}");
            let own = format!("{unit}-own-{unit}-week");
            ask.level_becomes(&gateway, &own, used).await;
            let before = ask.limits(&gateway).await.json();
            assert_eq!(before["data"].as_array().map(Vec::len), Some(15));
            for _ in 0..2 {
                let refused = ask.send(&gateway).await;
                assert_eq!(
                    (refused.status, &refused.json()["error"]["rule"]),
                    (429, &own.as_str().into()),
                    "{unit}"
                );
            }
            let [before, after] = [before, ask.limits(&gateway).await.json()].map(levels);
            assert_eq!(before, after, "{unit}");
        }
    }
}

#[tokio::test]
async fn the_limit_that_binds_is_the_one_told() {
    for store in [Store::Memory, Store::redis()] {
        let provider = obedient().await;
        // A burst is what fits at once, a month is of the calendar whatever the strategy; of equals the shorter one is told.
        let limits = "limits:\n  - { name: b, match: { model: chat }, per: user, strategy: token_bucket, \
                      limit: [1k/week burst 3, 4/month] }\n  \
                      - { name: t, match: { model: other }, per: user, limit: [2/month, 2/week, 1k tokens/month, 10k tokens/week] }\n";
        let gateway = start_governed(&store, &provider, limits).await;
        for (model, number, limit, left, status) in [
            ("chat", 1, 3, 2, 200),
            ("chat", 2, 3, 1, 200),
            ("chat", 3, 3, 0, 200),
            ("chat", 4, 3, 0, 429),
            ("other", 1, 2, 1, 200),
            ("other", 2, 2, 0, 200),
            ("other", 3, 2, 0, 429),
        ] {
            let answer = Ask { model, ..ALICE }.send(&gateway).await;
            assert_eq!(answer.status, status, "{model} {number}: {}", answer.text());
            let told = (
                answer.number("x-ratelimit-limit-requests"),
                answer.number("x-ratelimit-remaining-requests"),
            );
            assert_eq!(told, (limit, left), "{model} {number}");
            assert_eq!((answer.number("x-ratelimit-limit"), answer.number("x-ratelimit-remaining")), told);
            if model == "other" {
                assert_eq!(answer.number("x-ratelimit-limit-tokens"), 1_000, "less is left of it");
                let rest = answer.number("x-ratelimit-reset") - now_ms() / 1_000;
                let week = to_monday() / 1_000;
                // Where both refuse, the longer wait is told.
                assert!(status == 429 || rest.abs_diff(week) <= 120, "{rest} {week}");
            }
        }
        let refused = Ask { model: "other", ..ALICE }.send(&gateway).await;
        // Which of the two depends on the day.
        let rule = refused.json()["error"]["rule"].to_string();
        assert!(rule.starts_with("\"t-requests-"), "{rule}");
        let refused = Ask { model: "chat", ..ALICE }.send(&gateway).await;
        assert_eq!(refused.json()["error"]["rule"], "b-requests-week");
        assert!(
            refused.json()["error"]["retry_after_ms"].as_u64().is_some_and(|wait| wait <= WEEK_MS / 1_000)
        );
    }
}

/// What of `GET /v1/limits` does not change by itself.
fn levels(said: serde_json::Value) -> Vec<(String, u64, u64)> {
    let entries = said["data"].as_array().expect("a list").iter();
    let level = |entry: &serde_json::Value| {
        let number = |name: &str| entry[name].as_u64().expect("a number");
        (entry["rule"].to_string(), number("used"), number("remaining"))
    };
    entries.map(level).collect()
}

/// Every counter and the hash of its dump, a line each.
fn counters(redis: &Redis) -> String {
    let script = "local all = {} for _, k in ipairs(redis.call('KEYS', '*:rl:*')) do \
                  all[#all + 1] = k .. ' ' .. redis.sha1hex(redis.call('DUMP', k)) end table.sort(all) return all";
    redis.cli(&["EVAL", script, "0"])
}
