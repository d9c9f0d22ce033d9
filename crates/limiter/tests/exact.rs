//! Many processes, one Redis: exactly as many requests are admitted as the limit says.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use support::server::Server;
use support::{limit, user};
use tollgate_limiter::{Algorithm, Charge, RedisOptions, RedisStore, Store};

const PROCESSES: usize = 8;
const TASKS: usize = 64;
const RUNS: usize = 20;
/// Calls in flight are held by leases that nobody ends: those of a run outlast it.
const KINDS: [Algorithm; 5] = [
    Algorithm::FixedWindow,
    Algorithm::SlidingWindow,
    Algorithm::MovingWindow,
    Algorithm::TokenBucket,
    Algorithm::Concurrency,
];
const LIMITS: [u64; 3] = [1, 5, 1_000];
/// Where a process finds its Redis.
const ADDRESS: &str = "LIMITER_TEST_REDIS";

#[tokio::test]
async fn admitted_is_the_limit_whoever_asks() {
    let server = Server::start();
    server.client().await;
    let mut processes: Vec<Process> = (0..PROCESSES).map(|_| Process::start(&server.url())).collect();
    let mut wrong = Vec::new();
    for run in 0..RUNS {
        for (kind, algorithm) in KINDS.into_iter().enumerate() {
            for limit in LIMITS {
                processes.iter_mut().for_each(|process| process.tell(&format!("{kind} {limit} {run}")));
                let admitted: u64 = processes.iter_mut().map(Process::answer).sum();
                if admitted != limit {
                    wrong.push(format!("run {run}: {admitted} admitted, {limit} by {algorithm}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Not a test of its own: what each process does for the one above.
#[test]
#[ignore = "run by the test above, in processes of its own"]
fn process() {
    let Ok(url) = std::env::var(ADDRESS) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = RedisOptions::new(&url).deadline(std::time::Duration::from_secs(30));
        let plain = options.clone().without_coalescing().without_denial_memory();
        let stores = [RedisStore::open(options).unwrap(), RedisStore::open(plain).unwrap()];
        for line in std::io::stdin().lines() {
            let numbers: Vec<u64> = line.unwrap().split(' ').map(|part| part.parse().unwrap()).collect();
            let [kind, capacity, run] = numbers[..] else { panic!("{numbers:?}") };
            let charges = charges(kind as usize, capacity, run);
            // Both ways, and both at once.
            let tasks = (0..TASKS).map(|task| {
                let store = stores[(task + run as usize) % if run % 2 == 0 { 1 } else { 2 }].clone();
                tokio::spawn(ask(store, charges.clone(), 2 + 2 * capacity / (TASKS * PROCESSES) as u64))
            });
            let mut admitted = 0;
            for task in tasks.collect::<Vec<_>>() {
                admitted += task.await.unwrap();
            }
            println!("\nadmitted {admitted}");
        }
    });
}

async fn ask(store: RedisStore, charges: Vec<Charge>, times: u64) -> u64 {
    let mut admitted = 0;
    for _ in 0..times {
        let decision = store.reserve(charges.clone()).await.unwrap();
        admitted += u64::from(decision.is_granted());
    }
    admitted
}

/// Three limits of two subjects, one of which binds. The windows neither roll nor drain while the test runs.
fn charges(kind: usize, capacity: u64, run: u64) -> Vec<Charge> {
    let quota = |n: u64, kind: usize| match KINDS[kind % 5] {
        Algorithm::Concurrency => format!("{n} concurrent"),
        _ => format!("{n}/366 days"),
    };
    let name = format!("{kind}-{capacity}-{run}");
    let of = |rule: &str, n: u64, kind: usize| limit(rule, &quota(n, kind), KINDS[kind % 5]);
    let binding = of("binding", capacity, kind);
    let wider = of("wider", capacity + 1, kind + 1);
    let shared = of("shared", 100_000, kind + 2);
    vec![
        Charge::new(wider, user(&name), 1),
        Charge::new(shared, user("everybody"), 1),
        Charge::new(Arc::clone(&binding), user(&name), 1),
    ]
}

struct Process {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(url: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["process", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ADDRESS, url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Process { child, orders, answers }
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn answer(&mut self) -> u64 {
        loop {
            let line = self.answers.next().expect("the process ended").unwrap();
            if let Some(number) = line.strip_prefix("admitted ") {
                return number.parse().unwrap();
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
