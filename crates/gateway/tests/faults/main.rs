//! Everything that happens to a Redis, under four gateways that callers ask without a pause. What is asserted is what was
//! admitted, counted at the provider, with which status, and which source decided; how long things took is printed, for
//! the machine that runs this may be busy.

mod rig;
#[path = "../support/mod.rs"]
mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig::{BACK, N, Rig, WIDE, admitted, decisions, is, windows_hold};
use rustix::process::Signal;
use support::{
    Answer, Callers, Provider, Proxy, Redis, Tollgate, get, json_answer, post, request, users_config, windows,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_and_started_again() {
    const L: u64 = 30;
    let users = [WIDE, ("tight", "limit: 30/second, strategy: fixed_window")];
    let mut rig = Rig::start(Redis::start(), None, &users).await;
    let callers = rig.callers(&["wide", "tight"], 1);
    let whole_windows = async |callers: &Callers, wanted: usize| {
        let from = callers.count();
        callers.until("windows", from, |answers| windows(answers, "tight").len() > wanted + 1).await;
    };
    whole_windows(&callers, 1).await;
    let killed = Instant::now();
    rig.redis.kill();
    let stopped = callers.all("all stop asking", "wide", killed, is("share")).await;
    whole_windows(&callers, 2).await;
    rig.all_metrics(|metrics| {
        let source = metrics.value(r#"rate_limit_decision_duration_seconds_count{source="share"}"#);
        (metrics.value("rate_limit_degraded"), metrics.value("rate_limit_redis_connected")) == (1.0, 0.0)
            && source > 0.0
    })
    .await;
    rig.redis.restart();
    let back = Instant::now();
    let shared = callers.all("all are shared again", "wide", back, is("redis")).await;
    whole_windows(&callers, 1).await;
    rig.all_metrics(|metrics| {
        (metrics.value("rate_limit_degraded"), metrics.value("rate_limit_redis_connected")) == (0.0, 1.0)
    })
    .await;
    let answers = callers.stop().await;
    println!("killed: by shares after {stopped:?}, shared {shared:?} after it was back (500 ms)");
    println!("decisions by share: half, 99 % {:?}", decisions(&answers, "share"));
    rig.nobody_failed(&answers, 0);
    windows_hold(&answers, "tight", L);
    assert!(shared < BACK, "{shared:?}");
    rig.few_lines(6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_and_back() {
    const L: u64 = 100;
    let rig =
        Rig::start(Redis::start(), None, &[WIDE, ("tight", "limit: 100/day, strategy: fixed_window")]).await;
    let mut before = 0;
    for number in 0..L as usize / 2 {
        before += usize::from(rig.ask(number, "tight").await.status == 200);
    }
    let memory = |rig: &Rig| rig.gateways.iter().map(Tollgate::resident_bytes).max().unwrap_or(0) >> 20;
    let memory_before = memory(&rig);
    rig.redis.signal(Signal::STOP);
    let frozen = Instant::now();
    let callers = rig.callers(&["wide", "wide", "tight"], 1);
    let stopped = callers.all("all stop asking", "wide", frozen, is("share")).await;
    callers.until("2,000 answers", callers.count(), |answers| answers.len() >= 2_000).await;
    let sockets = rig.few_sockets(rig.redis.address());
    let while_frozen = callers.since(0);
    let mut once_open = while_frozen.clone();
    once_open.retain(|answer| answer.sent > frozen + stopped);
    rig.few_lines(2);
    rig.all_metrics(|now| {
        (now.value("rate_limit_degraded"), now.value("rate_limit_redis_connected")) == (1.0, 0.0)
    })
    .await;
    let memory_frozen = memory(&rig);
    rig.redis.signal(Signal::CONT);
    let back = Instant::now();
    let shared = callers.all("all are shared again", "wide", back, is("redis")).await;
    callers.until("more answers", callers.count(), |answers| answers.len() >= 500).await;
    let answers = callers.stop().await;
    let slowest = while_frozen.iter().map(|answer| answer.came - answer.sent).max();
    println!("frozen: by shares after {stopped:?}, shared {shared:?} after it went on (150 ms)");
    println!("{} answers meanwhile, the slowest {slowest:?}; {sockets} sockets", while_frozen.len());
    println!(
        "decisions once open: half, 99 % {:?}; {memory_before} MiB, {memory_frozen} MiB",
        decisions(&once_open, "share")
    );
    rig.nobody_failed(&answers, before);
    let total = |answers: &[Answer]| before as u64 + admitted(answers, "tight");
    let (alone, total) = (total(&while_frozen), total(&answers));
    println!("{alone} admitted of {L}, {total} in the end");
    // Each had seen the latest count.
    assert!(alone <= L + N, "{alone}");
    // The first that is back does not know yet what the others have to charge.
    assert!(total <= L + (N - 1) * L.div_ceil(N), "{total}");
    assert!(memory_frozen <= memory_before + 50, "{memory_before} {memory_frozen}");
    assert!(shared < BACK, "{shared:?}");
    let metrics =
        rig.gateways[0].metrics_become(|now| now.sum("rate_limit_redis_errors_total", "timeout") > 0.0).await;
    assert!(metrics.sum("rate_limit_redis_errors_total", r#"kind="busy""#) == 0.0);
    rig.few_lines(4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_swallowing_and_breaking_connections() {
    const L: u64 = 200;
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address()).await;
    // One for each fault: what is bounded is what one fault does.
    let names = ["a", "b", "c"];
    let users =
        [vec![WIDE], names.map(|name| (name, "limit: 200/day, strategy: fixed_window")).to_vec()].concat();
    let rig = Rig::start(redis, Some(&proxy), &users).await;
    let callers = rig.callers(&["wide"], 1);
    callers.all("Redis decides", "wide", Instant::now(), is("redis")).await;
    let mut answers = Vec::new();
    let (slow, hanging) = (Duration::from_millis(50), Duration::from_secs(2));
    for (fault, user) in ["50 ms", "2 s", "partition"].into_iter().zip(names) {
        let tight = rig.callers(&[user], 1);
        let begun = Instant::now();
        match fault {
            "50 ms" => proxy.delay(slow),
            "2 s" => proxy.delay(hanging),
            _ => proxy.partition(true),
        }
        let stopped = callers.all("all stop asking", "wide", begun, is("share")).await;
        callers.until("answers by share", callers.count(), |now| now.len() >= 300).await;
        rig.few_sockets(proxy.address);
        proxy.delay(Duration::ZERO);
        proxy.partition(false);
        let back = Instant::now();
        let shared = callers.all("all are shared again", "wide", back, is("redis")).await;
        tight.until("more answers", tight.count(), |now| now.len() >= 200).await;
        answers.extend(tight.stop().await);
        let total = admitted(&answers, user);
        println!(
            "{fault}: by shares after {stopped:?} (150 ms), shared again after {shared:?}, {total} of {L}"
        );
        // A charge that was on its way over a connection that was given up is not repeated: at worst what was admitted
        // without Redis is unknown to it.
        assert!(total <= 2 * L + N, "{fault}: {total}");
        assert!(shared < BACK, "{fault}: {shared:?}");
    }
    for fault in ["black hole", "reset"] {
        let begun = Instant::now();
        if fault == "reset" {
            proxy.reset()
        } else {
            proxy.swallow()
        }
        // What was under way is decided otherwise; then Redis decides again, over connections that did not exist before.
        let shared = callers.all("all are shared again", "wide", begun, is("redis")).await;
        println!("{fault}: shared again after {shared:?} (150 ms after the third timeout)");
        assert!(shared < BACK, "{fault}: {shared:?}");
    }
    answers.extend(callers.stop().await);
    rig.nobody_failed(&answers, 0);
    println!("decisions by share: half, 99 % {:?}", decisions(&answers, "share"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_and_read_only() {
    const L: u64 = 200;
    let rig = Rig::start(Redis::start(), None, &[WIDE, ("tight", "limit: 200/day")]).await;
    let callers = rig.callers(&["wide"], 1);
    callers.all("Redis decides", "wide", Instant::now(), is("redis")).await;
    let mut asked = 0;
    let faults: [(&str, &[&str], &[&str]); 2] = [
        ("out_of_memory", &["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"]),
        ("refused", &["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]),
    ];
    for (kind, fault, cure) in faults {
        let begun = Instant::now();
        rig.redis.cli(fault);
        let stopped = callers.all("all stop asking", "wide", begun, is("share")).await;
        // A part of what is left is each gateway's: nobody is refused who would not be with Redis.
        for number in 0..20 {
            let answer = rig.ask(number, "tight").await;
            asked += 1;
            assert_eq!((answer.status, answer.header("x-tollgate-source")), (200, Some("share")), "{kind}");
        }
        let failed = format!(r#"rate_limit_redis_errors_total{{kind="{kind}"}}"#);
        rig.all_metrics(|now| now.value("rate_limit_degraded") == 1.0).await;
        rig.redis.cli(cure);
        let back = Instant::now();
        let shared = callers.all("all are shared again", "wide", back, is("redis")).await;
        println!("{kind}: by shares after {stopped:?}, shared again after {shared:?} (500 ms)");
        assert!(shared < BACK, "{kind}: {shared:?}");
        rig.all_metrics(|now| now.value("rate_limit_degraded") == 0.0 && now.value(&failed) > 0.0).await;
    }
    // What was admitted by shares is charged.
    let charged = async || {
        let ask = request("GET", "/v1/limits", &[("Authorization", "Bearer sk-tight")], b"");
        post(rig.gateways[0].data, &ask).await.json()["data"][0]["used"].as_u64()
    };
    support::soon("what was admitted is charged", async {
        while charged().await < Some(asked as u64) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(charged().await <= Some(L));
    let answers = callers.stop().await;
    rig.nobody_failed(&answers, asked);
    rig.few_lines(8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_at_the_start() {
    const L: u64 = 100;
    let mut redis = Redis::start();
    redis.kill();
    let mut rig =
        Rig::unheard(redis, None, &[WIDE, ("tight", "limit: 100/day, strategy: fixed_window")]).await;
    let callers = rig.callers(&["wide", "tight"], 1);
    callers.all("shares are spent", "tight", Instant::now(), |answer| answer.status == 429).await;
    assert_eq!(get(rig.gateways[0].admin, "/readyz").await.status, 200);
    let alone = admitted(&callers.since(0), "tight");
    rig.redis.restart();
    let back = Instant::now();
    let shared = callers.all("Redis decides", "wide", back, is("redis")).await;
    callers.until("more answers", callers.count(), |answers| answers.len() >= 500).await;
    let answers = callers.stop().await;
    let total = admitted(&answers, "tight");
    println!(
        "absent: {alone} admitted of {L}, {total} in the end; shared {shared:?} after it was there (500 ms)"
    );
    rig.nobody_failed(&answers, 0);
    // The first that is back sees what itself has charged, the others a moment later: the bound of such a window.
    assert!((L..=L + N).contains(&alone) && total <= L + (N - 1) * L.div_ceil(N), "{alone} {total}");
    assert!(shared < BACK, "{shared:?}");
    rig.few_lines(4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_limit_does_what_it_says() {
    let users =
        [WIDE, ("open", "limit: 1/day, when_down: open"), ("closed", "limit: 1M/day, when_down: closed")];
    let mut rig = Rig::start(Redis::start(), None, &users).await;
    assert_eq!(rig.ask(0, "open").await.status, 200);
    assert_eq!(rig.ask(1, "closed").await.status, 200);
    assert_eq!(rig.ask(2, "open").await.status, 429);
    let callers = rig.callers(&["wide"], 1);
    rig.redis.kill();
    callers.all("all stop asking", "wide", Instant::now(), is("share")).await;
    rig.all_metrics(|now| now.value("rate_limit_degraded") == 1.0).await;
    for number in 0..12 {
        let open = rig.ask(number, "open").await;
        assert_eq!((open.status, open.header("x-tollgate-source")), (200, Some("open")));
        let closed = rig.ask(number, "closed").await;
        assert_eq!((closed.status, closed.code()), (503, "limiter_unavailable".into()));
        assert!(closed.number("retry-after") >= 1, "{closed:?}");
    }
    for gateway in &rig.gateways {
        let ready = get(gateway.admin, "/readyz").await;
        assert!(ready.status == 503 && ready.text().contains("Redis"), "{ready:?}");
        assert_eq!(get(gateway.admin, "/livez").await.status, 200);
        let metrics = gateway.metrics().await;
        for source in ["share", "open", "closed"] {
            let series = format!(r#"rate_limit_decision_duration_seconds_count{{source="{source}"}}"#);
            assert!(metrics.value(&series) > 0.0, "{series}: {}", metrics.0);
        }
    }
    rig.redis.restart();
    callers.all("all are shared again", "wide", Instant::now(), is("redis")).await;
    for gateway in &rig.gateways {
        support::soon("ready again", async {
            while get(gateway.admin, "/readyz").await.status != 200 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
    // A worker may find out later than others of its gateway; it says so, and lets nothing pass.
    support::soon("Redis decides what is closed", async {
        while rig.ask(3, "closed").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let answers = callers.stop().await;
    // Two before, twelve that passed uncounted, one after.
    rig.nobody_failed(&answers, 2 + 12 + 1);
}

#[tokio::test]
async fn a_redis_that_evicts_is_told_of_or_refused() {
    let redis = Redis::start_with(&["--maxmemory-policy", "allkeys-lru"]);
    let provider = Provider::answering(json_answer("200 OK", "", "{}")).await;
    let config = users_config(&provider, &redis.url(), ", timeout: 2s", &[WIDE]);
    let gateway = Tollgate::start(&config).await;
    gateway.logged(|line| line["level"] == "WARN" && line["policy"] == "allkeys-lru").await;
    gateway.metrics_become(|now| now.value("rate_limit_evicting_store") == 1.0).await;

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("tollgate.yml");
    let strict = config.replace("instances: 4", "instances: 4, require_noeviction: true");
    let server = "server: { listen: '127.0.0.1:0', admin: '127.0.0.2:0' }\n";
    std::fs::write(&file, format!("{server}{strict}")).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.env_clear().current_dir(dir.path()).args(["serve", "-c"]).arg(&file).stdin(Stdio::null());
    let output =
        tokio::task::spawn_blocking(move || command.output()).await.expect("it ends").expect("it runs");
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(78), "{said}");
    for part in ["settings.require_noeviction", "allkeys-lru", "noeviction"] {
        assert!(said.contains(part), "{part}: {said}");
    }

    redis.cli(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    gateway.metrics_become(|now| now.value("rate_limit_evicting_store") == 0.0).await;
    std::fs::write(&file, &strict).expect("written");
    assert_eq!(get(Tollgate::start(&strict).await.admin, "/readyz").await.status, 200);
}
