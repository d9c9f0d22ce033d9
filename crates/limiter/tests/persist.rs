//! A store in memory with a file: what survives a restart, a kill, and a damaged disk.
#![cfg(feature = "persist")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::{Random, START, charge, granted, limit, user};
use tollgate_limiter::{Algorithm, Budgets, Limit, ManualClock, MemoryStore, Millis, PersistError, Standing};

const DAY: u64 = 86_400_000;

fn open_at(path: &Path, now: u64) -> Result<MemoryStore, PersistError> {
    MemoryStore::open(path, ManualClock::at(Millis(now)), Budgets::default())
}

fn look(store: &MemoryStore, limit: &Arc<Limit>, name: &str, amount: u64) -> Standing {
    store.peek(charge(limit, name, amount)).remove(0)
}

fn figures(standing: &Standing) -> (u64, u64, Millis, tollgate_limiter::Retry) {
    (standing.used, standing.remaining, standing.reset, standing.retry)
}

#[test]
fn every_algorithm_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let mut random = Random(3);
    let limits: Vec<Arc<Limit>> = Algorithm::ALL
        .into_iter()
        .flat_map(|algorithm| {
            ["100/day", "7000000/hour"].map(|quota| limit(algorithm.as_str(), quota, algorithm))
        })
        .chain([
            limit("m", "$50/month", Algorithm::FixedWindow),
            limit("b", "10/week burst 50", Algorithm::TokenBucket),
        ])
        .collect();
    let clock = ManualClock::at(Millis(START + 12_345));
    let store = MemoryStore::open(&path, clock.clone(), Budgets::default()).unwrap();
    for _ in 0..1_000 {
        clock.advance(Millis(random.below(20_000)));
        let limit = &limits[random.below(limits.len() as u64) as usize];
        let name = format!("u{}", random.below(20));
        drop(store.reserve(charge(limit, &name, random.below(10))));
    }
    let everything = |store: &MemoryStore| -> Vec<_> {
        let mut all = Vec::new();
        for limit in &limits {
            for name in 0..20 {
                all.push(figures(&look(store, limit, &format!("u{name}"), 9)));
            }
        }
        all
    };
    let before = everything(&store);
    let occupancy = store.occupancy();
    assert!(before.iter().filter(|figures| figures.0 > 0).count() > 100);
    drop(store);
    for _ in 0..2 {
        let again = MemoryStore::open(&path, clock.clone(), Budgets::default()).unwrap();
        assert_eq!(everything(&again), before);
        assert_eq!(again.occupancy(), occupancy);
        again.sync().unwrap();
        assert_eq!(again.persist_problem(), None);
    }
}

#[test]
fn what_is_over_is_forgotten_and_what_is_cleared_stays_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let (day, minute) =
        (limit("d", "10/day", Algorithm::FixedWindow), limit("m", "10/minute", Algorithm::FixedWindow));
    let store = open_at(&path, START).unwrap();
    for name in ["a", "b"] {
        drop(store.reserve(charge(&day, name, 4)));
        drop(store.reserve(charge(&minute, &format!("{name}m"), 4)));
    }
    let slot = granted(store.reserve(charge(&limit("s", "2 concurrent", Algorithm::FixedWindow), "s", 1)));
    drop(store.reserve(vec![tollgate_limiter::Charge::new(
        Arc::clone(&day),
        user("stranger").unauthenticated(),
        3,
    )]));
    store.sync().unwrap();
    assert!(store.clear(&user("b")));
    drop((store, slot));
    let store = open_at(&path, START + 60_000).unwrap();
    assert_eq!((store.occupancy().keyed, store.occupancy().unauthenticated), (1, 1));
    assert_eq!(["a", "b", "stranger"].map(|name| look(&store, &day, name, 0).used), [4, 0, 3]);
    drop(store);
    // A limit that was raised meanwhile keeps what was used; one more restart, and the day is over.
    let store = open_at(&path, START + 70_000).unwrap();
    assert_eq!(look(&store, &limit("d", "20/day", Algorithm::FixedWindow), "a", 0).remaining, 16);
    drop(store);
    let store = open_at(&path, START + DAY).unwrap();
    assert_eq!(store.occupancy().keyed, 0);
}

#[test]
fn a_smaller_budget_forgets_in_the_file_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let day = limit("d", "10/day", Algorithm::FixedWindow);
    let store = open_at(&path, START).unwrap();
    for n in 0..100 {
        drop(store.reserve(charge(&day, &n.to_string(), 1)));
    }
    drop(store);
    let few = Budgets { keyed: 10, unauthenticated: 10 };
    drop(MemoryStore::open(&path, ManualClock::at(Millis(START)), few).unwrap());
    assert_eq!(open_at(&path, START).unwrap().occupancy().keyed, 10);
}

#[test]
fn one_store_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let store = open_at(&path, START).unwrap();
    let error = open_at(&path, START).expect_err("open already");
    assert!(error.problem().contains("another store has it open"), "{error}");
    drop(store);
    open_at(&path, START).unwrap();
    let error = open_at(&folder.path().join("no/such/folder"), START).expect_err("there is no folder");
    assert!(error.to_string().contains("no/such/folder"), "{error}");
    // A store without a file has nothing to write.
    assert_eq!(MemoryStore::new(ManualClock::default()).sync(), Ok(()));
}

/// A file that holds something, and its bytes.
fn written(path: &Path) -> Vec<u8> {
    let day = limit("d", "1000/day", Algorithm::FixedWindow);
    let store = open_at(path, START).expect("it can be made");
    for n in 0..200 {
        drop(store.reserve(charge(&day, &format!("user-{n}"), n)));
    }
    drop(store);
    fs::read(path).expect("it is there")
}

#[test]
fn files_of_others_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other");
    for content in [
        b"hello, I am a text file\n".to_vec(),
        vec![0; 5_000],
        vec![0xa5; 70_000],
        b"redb\x1a\x0a\xa9\x0d\x0a".to_vec(),
    ] {
        fs::write(&path, &content).unwrap();
        let error = open_at(&path, START).expect_err("no database");
        assert!(error.problem().contains("no store of limits"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), content);
    }
    let path = folder.path().join("other.redb");
    let database = redb::Database::create(&path).unwrap();
    let write = database.begin_write().unwrap();
    write.open_table(redb::TableDefinition::<&str, u64>::new("theirs")).unwrap().insert("a", 1).unwrap();
    write.commit().unwrap();
    drop(database);
    let error = open_at(&path, START).expect_err("somebody else's");
    assert!(error.problem().contains("something else"), "{error}");
}

/// 300 times: some bytes of a good file are turned, or its end is cut off. It opens with exactly what was counted, or
/// with less because redb went back to an earlier commit, or it is refused; it never panics, and never invents a count.
#[test]
fn a_damaged_file_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let good = written(&path);
    let day = limit("d", "1000/day", Algorithm::FixedWindow);
    let mut random = Random(11);
    let (mut opened, mut refused) = (0, 0);
    for round in 0..300 {
        let mut bad = good.clone();
        if round % 5 == 0 {
            bad.truncate(random.below(good.len() as u64) as usize);
        } else {
            // Most of the file is empty; damage where it hurts, and in the first pages.
            for _ in 0..1 + random.below(8) {
                let place = loop {
                    let place = random.below(good.len() as u64) as usize;
                    if good[place] != 0 || random.one_in(50) {
                        break place;
                    }
                };
                bad[place] ^= 1 << random.below(8);
            }
        }
        fs::write(&path, &bad).unwrap();
        match open_at(&path, START) {
            Ok(store) => {
                opened += 1;
                for n in 0..200 {
                    let used = look(&store, &day, &format!("user-{n}"), 0).used;
                    assert!(used == n || used == 0, "round {round}: user-{n} has used {used}");
                }
            }
            Err(error) => {
                refused += 1;
                assert!(!error.problem().is_empty());
            }
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(refused > 50, "{opened} opened, {refused} refused");
}

/// What the child of the next test does, when that starts it: counts as fast as it can, and says how far it is.
#[test]
fn child() {
    let Some(path) = std::env::var_os("TOLLGATE_TEST_CHILD") else { return };
    let store = open_at(Path::new(&path), START).unwrap();
    let limit = limit("kill", "1G/day", Algorithm::FixedWindow);
    let mut random = Random(std::process::id().into());
    let mut out = std::io::stdout().lock();
    writeln!(out, "\ncounted {}", counted(&store, &limit)).unwrap();
    loop {
        for _ in 0..20 {
            drop(granted(store.reserve(charge(&limit, &format!("u{}", random.below(50)), 1))));
        }
        writeln!(out, "counted {}", counted(&store, &limit)).unwrap();
        out.flush().unwrap();
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn counted(store: &MemoryStore, limit: &Arc<Limit>) -> u64 {
    (0..50).map(|n| look(store, limit, &format!("u{n}"), 0).used).sum()
}

/// Killed while it makes the file: there is one that opens, or none.
#[test]
fn a_kill_while_the_file_is_made_leaves_all_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(std::process::id().into());
    for round in 0..40 {
        let path = folder.path().join(format!("{round}.redb"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("TOLLGATE_TEST_CHILD", &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        open_at(&path, START).unwrap();
    }
}

/// 24 times a real process is killed at a random moment while it counts: the file always opens, everything the process
/// had said a second before its death is there, and nothing it had not counted.
#[test]
fn a_kill_loses_no_more_than_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("limits.redb");
    let limit = limit("kill", "1G/day", Algorithm::FixedWindow);
    let mut random = Random(std::process::id().into());
    let (mut kept, mut worst) = (0, Duration::ZERO);
    for round in 0..24 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("TOLLGATE_TEST_CHILD", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (lines, heard) = (BufReader::new(child.stdout.take().unwrap()).lines(), Arc::clone(&said));
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(count) = line.strip_prefix("counted ").and_then(|count| count.parse::<u64>().ok())
                {
                    heard.lock().unwrap().push((Instant::now(), count));
                }
            }
        });
        while said.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Random moments are what is tested: some before the first write, most between later ones.
        std::thread::sleep(Duration::from_millis(random.below(if round % 4 == 0 { 400 } else { 2_200 })));
        let killed = Instant::now();
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        let said = said.lock().unwrap();
        let store = open_at(&path, START).unwrap();
        let found = counted(&store, &limit);
        assert!(said[0].1 == kept, "round {round}: the child began with {}, not {kept}", said[0].1);
        let safe = said.iter().rev().find(|(when, _)| *when + Duration::from_secs(1) <= killed);
        let safe = safe.map_or(kept, |(_, count)| *count);
        let last = said.last().map_or(0, |(_, count)| *count);
        assert!(found >= safe, "round {round}: {found} kept, {safe} were counted a second before");
        // At most one more turn than it had time to say.
        assert!(found <= last + 20, "round {round}: {found} kept, {last} counted");
        let lost = said.iter().find(|(_, count)| *count > found).map_or(killed, |(when, _)| *when);
        worst = worst.max(killed.saturating_duration_since(lost));
        kept = found;
    }
    println!("the most that was lost: {} ms", worst.as_millis());
}
