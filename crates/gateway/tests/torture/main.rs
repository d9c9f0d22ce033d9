//! Four gateways, one Redis, callers without a pause, and one fault after the other, by a seed that is printed. Started by
//! `scripts/torture`; the report goes to standard output, or where `TORTURE_REPORT` says.

mod judge;
#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use judge::{Episode, LIMIT, N, STRATEGIES, judge, judge_statuses};
use rustix::process::Signal;
use serde_json::Value;
use support::{
    Answer, CHAT, Callers, Doors, Provider, Proxy, Redis, Response, Tollgate, json_answer, post, question,
    request, users_config,
};

const TOKENS_OF_ANSWER: u64 = 3;
/// Requests of one check that all is settled.
const SETTLED: u64 = 20;
const GROWTH_MAX_MIB: u64 = 64;
/// Shared counting may take this long on a busy machine; the target stands beside what was measured.
const BACK: Duration = Duration::from_secs(5);

const FAULTS: [&str; 13] = [
    "killed, started again",
    "frozen",
    "20 ms slower",
    "100 ms slower",
    "2 s slower",
    "connections swallowed",
    "partition",
    "connections reset",
    "SCRIPT FLUSH",
    "FLUSHALL",
    "memory full",
    "gateway killed",
    "reload",
];

struct World {
    rng: fastrand::Rng,
    config: String,
    provider: Provider,
    redis: Redis,
    proxy: Proxy,
    gateways: Vec<Tollgate>,
    doors: Doors,
    episodes: Vec<Episode>,
    /// What must not be.
    violations: Vec<String>,
    /// Sockets to Redis of one gateway, and its memory in MiB: the most.
    sockets: usize,
    memory: (u64, u64),
    settled: u64,
    not_judged: u64,
}

impl World {
    async fn start(seed: u64) -> Self {
        let answer = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let provider = Provider::answering(json_answer("200 OK", "", answer)).await;
        let redis = Redis::start();
        let proxy = Proxy::start(redis.address()).await;
        let rules = STRATEGIES.map(|strategy| format!("limit: {LIMIT}/2s, strategy: {strategy}"));
        let mut users = vec![("wide", "limit: 1M/day"), ("settled", "limit: 1G tokens/day")];
        users.extend(STRATEGIES.iter().copied().zip(rules.iter().map(String::as_str)));
        let config = users_config(&provider, &proxy.url(), "", &users);
        let mut gateways = Vec::new();
        for _ in 0..N {
            gateways.push(Tollgate::start(&config).await);
        }
        let doors = Arc::new(Mutex::new(gateways.iter().map(|gateway| gateway.data).collect()));
        let memory = gateways.iter().map(|gateway| gateway.resident_bytes() >> 20).max().unwrap_or(0);
        Self {
            rng: fastrand::Rng::with_seed(seed),
            config,
            provider,
            redis,
            proxy,
            gateways,
            doors,
            episodes: Vec::new(),
            violations: Vec::new(),
            sockets: 0,
            memory: (memory, memory),
            settled: 0,
            not_judged: 0,
        }
    }

    /// One fault, what came of it, and a while without any.
    async fn episode(&mut self, fault: &'static str, callers: &Callers, log: &mut Vec<Value>) {
        let hold = Duration::from_millis(self.rng.u64(300..3_500));
        let killed = fault == "gateway killed" || self.rng.u32(0..5) == 0;
        let began = Instant::now();
        self.begin(fault).await;
        if killed {
            self.kill_gateway(log).await;
        }
        // The fault lasts as long as the seed says: nothing is waited for.
        tokio::time::sleep(hold).await;
        self.measure();
        self.end(fault);
        let ended = Instant::now();
        let recovery = callers.all(fault, "wide", ended, |answer| answer.source == "redis").await;
        if recovery > BACK {
            self.violations.push(format!("{fault}: shared again after {recovery:?}"));
        }
        let shared = ended + recovery;
        self.episodes.push(Episode { fault, killed, began, shared, recovery });
        let quiet = Duration::from_millis(self.rng.u64(4_500..6_000));
        self.settles(fault).await;
        self.measure();
        tokio::time::sleep(quiet.saturating_sub(shared.elapsed())).await;
    }

    async fn begin(&mut self, fault: &str) {
        match fault {
            "killed, started again" => self.redis.kill(),
            "frozen" => self.redis.signal(Signal::STOP),
            "20 ms slower" => self.proxy.delay(Duration::from_millis(20)),
            "100 ms slower" => self.proxy.delay(Duration::from_millis(100)),
            "2 s slower" => self.proxy.delay(Duration::from_secs(2)),
            "connections swallowed" => self.proxy.swallow(),
            "partition" => self.proxy.partition(true),
            "connections reset" => self.proxy.reset(),
            "SCRIPT FLUSH" => drop(self.redis.cli(&["SCRIPT", "FLUSH"])),
            "FLUSHALL" => drop(self.redis.cli(&["FLUSHALL"])),
            "memory full" => drop(self.redis.cli(&["CONFIG", "SET", "maxmemory", "1"])),
            "reload" => {
                for gateway in &self.gateways {
                    let line = gateway.reload().await;
                    if line["message"] != "configuration reloaded" {
                        self.violations.push(format!("reload: {line}"));
                    }
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, fault: &str) {
        match fault {
            "killed, started again" => self.redis.restart(),
            "frozen" => self.redis.signal(Signal::CONT),
            "memory full" => drop(self.redis.cli(&["CONFIG", "SET", "maxmemory", "0"])),
            _ => {}
        }
        self.proxy.delay(Duration::ZERO);
        self.proxy.partition(false);
    }

    /// SIGKILL, and another one in its place.
    async fn kill_gateway(&mut self, log: &mut Vec<Value>) {
        let number = self.rng.usize(0..N as usize);
        let next = Tollgate::start(&self.config).await;
        self.doors.lock().expect("no test panics with it")[number] = next.data;
        let killed = std::mem::replace(&mut self.gateways[number], next);
        log.extend(told(&killed));
    }

    fn measure(&mut self) {
        for gateway in &self.gateways {
            self.sockets = self.sockets.max(gateway.sockets_to(self.proxy.address));
            self.memory.1 = self.memory.1.max(gateway.resident_bytes() >> 20);
        }
    }

    async fn as_settled(&self, number: usize) -> Response {
        let headers = [("Authorization", "Bearer sk-settled"), ("Content-Type", "application/json")];
        let bytes = request("POST", CHAT, &headers, question(false).as_bytes());
        post(self.gateways[number % N as usize].data, &bytes).await
    }

    async fn tokens_used(&self, number: usize) -> Option<u64> {
        let ask = request("GET", "/v1/limits", &[("Authorization", "Bearer sk-settled")], b"");
        post(self.gateways[number % N as usize].data, &ask).await.json()["data"][0]["used"].as_u64()
    }

    /// While Redis decides, what was used is counted to the token, once.
    async fn settles(&mut self, fault: &str) {
        let mut before = self.tokens_used(0).await;
        loop {
            // What was lost is put back by each gateway; it has come to rest when it stays the same.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = self.tokens_used(1).await;
            if now == before {
                break;
            }
            before = now;
        }
        let mut shared = true;
        for number in 0..SETTLED as usize {
            let answer = self.as_settled(number).await;
            shared &= answer.status == 200 && answer.header("x-tollgate-source") == Some("redis");
        }
        let wanted = before.map(|before| before + SETTLED * TOKENS_OF_ANSWER);
        let started = Instant::now();
        let mut used = self.tokens_used(2).await;
        while used != wanted && started.elapsed() < Duration::from_secs(2) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            used = self.tokens_used(2).await;
        }
        if !shared {
            self.not_judged += 1;
        } else if used == wanted {
            self.settled += SETTLED;
        } else {
            self.violations.push(format!("after {fault}: {used:?} tokens used, not {wanted:?}"));
        }
    }
}

/// What a gateway said beside requests.
fn told(gateway: &Tollgate) -> Vec<Value> {
    let mut lines = gateway.lines();
    lines.retain(|line| line["message"] != "request" && line["message"] != "limited");
    lines
}

fn recoveries(world: &World) -> String {
    let mut text = String::from("| fault | times | shared again after: median, most |\n|---|---|---|\n");
    for fault in FAULTS {
        let of = world.episodes.iter().filter(|episode| episode.fault == fault);
        let mut times: Vec<u128> = of.map(|episode| episode.recovery.as_millis()).collect();
        times.sort_unstable();
        if let Some(most) = times.last() {
            let _ =
                writeln!(text, "| {fault} | {} | {} ms, {most} ms |", times.len(), times[times.len() / 2]);
        }
    }
    text
}

fn percentile(answers: &[Answer], source: &str, percent: usize) -> Duration {
    let of = answers.iter().filter(|answer| answer.source == source);
    let mut took: Vec<Duration> = of.filter_map(|answer| answer.decision).collect();
    took.sort_unstable();
    took.get(took.len() * percent / 100).copied().unwrap_or_default()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: scripts/torture"]
async fn torture() {
    let seed = number("TORTURE_SEED", fastrand::u64(..) >> 32);
    let lasting = Duration::from_secs(60 * number("TORTURE_MINUTES", 10));
    println!("seed {seed}, {lasting:?}");
    let mut world = World::start(seed).await;
    let tight = Callers::start(&world.doors, &STRATEGIES, 1, Duration::from_millis(40));
    let wide = Callers::start(&world.doors, &["wide"], 1, Duration::from_millis(20));
    wide.all("Redis decides", "wide", Instant::now(), |answer| answer.source == "redis").await;
    let (started, mut log) = (Instant::now(), Vec::new());
    let mut order = FAULTS.to_vec();
    while started.elapsed() < lasting {
        world.rng.shuffle(&mut order);
        for &fault in &order {
            if started.elapsed() < lasting {
                world.episode(fault, &wide, &mut log).await;
                println!("{:?}: {fault}, {} violations", started.elapsed(), world.violations.len());
            }
        }
    }
    let mut answers = [tight.stop().await, wide.stop().await].concat();
    answers.sort_by_key(|answer| answer.came);
    let mut lost = 0.0;
    for gateway in &world.gateways {
        log.extend(told(gateway));
        lost += gateway.metrics().await.value(r#"rate_limit_settlements_total{outcome="lost"}"#);
    }
    if let Some(line) = log.iter().find(|line| line.to_string().contains("panicked")) {
        world.violations.push(line.to_string());
    }
    let statuses = judge_statuses(&mut world, &answers);
    let most = judge(&mut world, &answers);
    let (before, memory) = world.memory;
    // As in the tests of single faults: two for each event loop, and a few for control data.
    let sockets_max = 2 * std::thread::available_parallelism().map_or(1, usize::from) + 4;
    if world.sockets > sockets_max || memory > before + GROWTH_MAX_MIB {
        world.violations.push(format!("{} sockets, {before} MiB grown to {memory} MiB", world.sockets));
    }
    let changes =
        log.iter().filter(|line| line["message"].as_str().is_some_and(|text| text.contains("Redis")));
    let mut report = format!(
        "{} faults in {} s, seed {seed}, {} requests, {} calls at the provider.\n\n{}\n",
        world.episodes.len(),
        started.elapsed().as_secs(),
        answers.len(),
        world.provider.hits(),
        recoveries(&world)
    );
    let _ = writeln!(
        report,
        "| strategy | in the window or just before | windows | most admitted | at most |\n|---|---|---|---|---|"
    );
    for ((user, kind), most) in &most {
        let _ =
            writeln!(report, "| {user} | {kind} | {} | {} | {} |", most.windows, most.admitted, most.bound);
    }
    let _ = writeln!(
        report,
        "\n- answers by status (0: the connection broke, of a gateway that was killed): {statuses:?}\n\
         - settlements checked to the token: {}; {} checks not judged, for Redis did not decide all of it; {lost} lost in all\n\
         - most sockets of a gateway to Redis: {}; memory of a gateway: {before} MiB at the start, {memory} MiB at most\n\
         - lines about Redis in the logs of all gateways: {}\n\
         - decisions, half and 99 %: by Redis {:?}, {:?}; by share {:?}, {:?}\n\
         - violations: {}",
        world.settled,
        world.not_judged,
        world.sockets,
        changes.count(),
        percentile(&answers, "redis", 50),
        percentile(&answers, "redis", 99),
        percentile(&answers, "share", 50),
        percentile(&answers, "share", 99),
        world.violations.len()
    );
    for violation in world.violations.iter().take(50) {
        let _ = writeln!(report, "  - {violation}");
    }
    println!("{report}");
    if let Ok(path) = std::env::var("TORTURE_REPORT") {
        std::fs::write(path, &report).expect("the report is written");
    }
    assert!(world.violations.is_empty(), "{} violations", world.violations.len());
}
