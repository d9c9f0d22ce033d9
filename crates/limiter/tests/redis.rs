//! What only a store in Redis promises: names, lifetimes, silence on denial, and what it does when Redis does not answer.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use support::agreement::FUTURE;
use support::proxy::Proxy;
use support::server::Server;
use support::{Random, charge, denied, granted, limit, slots, user};
use tollgate_limiter::{
    Algorithm, Charge, Decision, Limit, ManualClock, Millis, RedisOptions, RedisStore, Retry, Source, Store,
    StoreError,
};

/// Every counter, byte for byte.
async fn dump(client: &mut MultiplexedConnection) -> BTreeMap<String, Vec<u8>> {
    let keys: Vec<String> = redis::cmd("KEYS").arg("*:rl:*").query_async(client).await.unwrap();
    let mut all = BTreeMap::new();
    for key in keys {
        let bytes = redis::cmd("DUMP").arg(&key).query_async(client).await.unwrap();
        all.insert(key, bytes);
    }
    all
}

async fn lifetime(client: &mut MultiplexedConnection, key: &str) -> i64 {
    redis::cmd("PTTL").arg(key).query_async(client).await.unwrap()
}

fn limits() -> Vec<Arc<Limit>> {
    let quotas = ["20/second", "60/minute", "500/hour", "1000000000/day", "90/month"];
    let kinds = Algorithm::ALL.into_iter().flat_map(|algorithm| quotas.map(|quota| (algorithm, quota)));
    let windows = kinds.enumerate().map(|(n, (algorithm, quota))| limit(&format!("r{n}"), quota, algorithm));
    windows.chain([slots("few", 6), slots("many", 30)]).collect()
}

fn random_charges(random: &mut Random, limits: &[Arc<Limit>]) -> Vec<Charge> {
    let one = |random: &mut Random| {
        let limit = &limits[random.below(limits.len() as u64) as usize];
        let name = ["alice", "bob"][random.below(2) as usize];
        Charge::new(Arc::clone(limit), user(name), 1 + random.below(limit.capacity() / 3))
    };
    (0..1 + random.below(4)).map(|_| one(random)).collect()
}

#[tokio::test]
async fn who_leaves_without_a_look_at_the_answer_holds_nothing() {
    let server = Server::start_with(&[]);
    let store = server.store(server.options()).await;
    let limit = limit("r", "10/day", Algorithm::FixedWindow);
    let charges = || vec![Charge::new(Arc::clone(&limit), user("alice"), 4)];
    let mut asking = store.reserve(charges());
    tokio::select! {
        biased;
        _ = &mut asking => panic!("answered before it can be"),
        () = std::future::ready(()) => {}
    }
    // Now it is answered, and nobody has looked.
    store.flush().await;
    assert_eq!(store.peek(charges()).await.unwrap()[0].used, 4);
    drop(asking);
    store.flush().await;
    assert_eq!(store.peek(charges()).await.unwrap()[0].used, 0);
}

#[tokio::test]
async fn a_denial_writes_nothing_and_no_key_lives_for_ever() {
    // A large hash moves its fields about while it is only read: these stay compact, and DUMP tells the same.
    let server = Server::start_with(&["--hash-max-ziplist-value", "100000"]);
    let store = server.store(server.options().without_denial_memory()).await;
    let mut client = server.client().await;
    let (limits, mut random, mut denials) = (limits(), Random(5), 0);
    let mut held = Vec::new();
    for _ in 0..1_500 {
        let charges = random_charges(&mut random, &limits);
        let before = dump(&mut client).await;
        match store.reserve(charges).await.unwrap() {
            Decision::Denied(_) => {
                denials += 1;
                assert_eq!(dump(&mut client).await, before);
            }
            Decision::Granted(reservation) => {
                for standing in reservation.standings() {
                    let key = format!("tollgate:{{{}}}:rl:{}", standing.subject.tag(), standing.subject);
                    let left = lifetime(&mut client, &key).await;
                    let left = if standing.limit.algorithm() == Algorithm::Concurrency {
                        left.min(lifetime(&mut client, &format!("{key}:c")).await)
                    } else {
                        left
                    };
                    // What the reset has shrunk by meanwhile is the lifetime's, too.
                    assert!(left + 2_000 >= standing.reset.get() as i64, "{left} ms for {standing:?}");
                }
                held.push(reservation);
            }
        }
        if held.len() > 10 {
            let reservation = held.swap_remove(random.below(10) as usize);
            let actual: Vec<u64> = reservation.standings().iter().map(|_| random.below(40)).collect();
            reservation.settled(&actual).await.unwrap();
        }
        for key in dump(&mut client).await.keys() {
            assert!(lifetime(&mut client, key).await > 0, "{key} lives for ever");
        }
    }
    assert!(denials > 300, "{denials}");
}

#[tokio::test]
async fn names_are_those_of_the_contract() {
    let server = Server::start();
    let store = server.store(server.options().prefix("mine")).await;
    let limit = limit("free", "60/minute", Algorithm::TokenBucket);
    let subjects = ["user:alice:model:m", "ip:10.0.0.1", "global", "api_key:k1", "user:a%7Bb"];
    for subject in subjects {
        let charge = Charge::new(Arc::clone(&limit), subject.parse().unwrap(), 1);
        drop(granted(store.reserve(vec![charge]).await.unwrap()));
    }
    let tenant = Charge::new(Arc::clone(&limit), user("carol").of_tenant("team{1}"), 1);
    drop(granted(store.reserve(vec![tenant]).await.unwrap()));
    let slot = Charge::new(slots("slots", 2), user("dave"), 1);
    drop(granted(store.reserve(vec![slot]).await.unwrap()));
    let mut client = server.client().await;
    let names: Vec<String> = dump(&mut client).await.into_keys().collect();
    assert_eq!(
        names,
        [
            "mine:{a%7Bb}:rl:user:a%7Bb",
            "mine:{alice}:rl:user:alice:model:m",
            "mine:{dave}:rl:user:dave",
            "mine:{dave}:rl:user:dave:c",
            "mine:{global}:rl:global",
            "mine:{ip:10.0.0.1}:rl:ip:10.0.0.1",
            "mine:{k1}:rl:api_key:k1",
            "mine:{team%7B1%7D}:rl:user:carol",
        ]
    );
    assert!(RedisStore::open(server.options().prefix("a{b}")).is_err());
    assert!(RedisStore::open(RedisOptions::new("no address")).is_err());
}

#[tokio::test]
async fn fields_of_limits_that_are_no_more_leave() {
    let server = Server::start();
    let clock = ManualClock::at(Millis(FUTURE));
    let store = server.store(server.options().rehearse(clock.clone(), &[])).await;
    let take = async |rule: &str, quota: &str| {
        let limit = limit(rule, quota, Algorithm::MovingWindow);
        drop(granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap()));
    };
    for number in 0..5 {
        take(&format!("old{number}"), "9/second").await;
    }
    take("lasting", "9/day").await;
    clock.advance(Millis(2_000));
    take("new", "9/second").await;
    let mut client = server.client().await;
    let key = "tollgate:{alice}:rl:user:alice";
    let fields: Vec<String> = redis::cmd("HKEYS").arg(key).query_async(&mut client).await.unwrap();
    assert_eq!(fields, ["m:lasting-requests-day", "m:new-requests-second"]);
}

#[tokio::test]
async fn scripts_may_be_forgotten_at_any_time() {
    let server = Server::start();
    let options = server.options().without_coalescing().without_denial_memory();
    let store = server.store(options).await;
    let limit = limit("r", "100000/366 days", Algorithm::SlidingWindow);
    for _ in 0..5 {
        let asked: Vec<_> = (0..1_000)
            .map(|_| {
                let (store, charges) = (store.clone(), charge(&limit, "alice", 1));
                tokio::spawn(async move { store.reserve(charges).await })
            })
            .collect();
        let mut client = server.client().await;
        for asked in asked {
            redis::cmd("SCRIPT").arg("FLUSH").query_async::<()>(&mut client).await.unwrap();
            drop(granted(asked.await.unwrap().unwrap()));
        }
    }
    let standing = store.peek(charge(&limit, "alice", 0)).await.unwrap().remove(0);
    assert_eq!(standing.used, 5_000);
}

#[tokio::test]
async fn what_gathers_goes_as_one_script() {
    let server = Server::start();
    for (algorithm, coalescing) in Algorithm::ALL.into_iter().flat_map(|a| [(a, true), (a, false)]) {
        let options = server.options().prefix(&format!("{algorithm}{coalescing}")).without_denial_memory();
        let store = server.store(if coalescing { options } else { options.without_coalescing() }).await;
        let limit = limit("r", "3000/366 days", algorithm);
        let mut random = Random(3);
        let asked: Vec<_> = (0..1_000)
            .map(|_| {
                let (store, charges) = (store.clone(), charge(&limit, "alice", 1 + random.below(9)));
                tokio::spawn(async move { store.reserve(charges).await.unwrap() })
            })
            .collect();
        let (mut taken, mut least_refused, mut left) = (0, u64::MAX, Vec::new());
        for asked in asked {
            match asked.await.unwrap() {
                Decision::Granted(reservation) => {
                    taken += reservation.standings()[0].requested;
                    left.push(reservation.standings()[0].remaining);
                }
                Decision::Denied(denial) => least_refused = least_refused.min(denial.requested()),
            }
        }
        let standing = store.peek(charge(&limit, "alice", 0)).await.unwrap().remove(0);
        assert_eq!(standing.used, taken, "{algorithm}");
        assert!(taken + least_refused > 3_000, "{algorithm}: {least_refused} was refused at {taken}");
        // Each was decided after the one before it.
        left.sort_unstable();
        left.dedup();
        assert_eq!(left.last().map(|most| 3_000 - most <= 9), Some(true));
        let scripts = store.counts().scripts;
        assert!(if coalescing { scripts < 200 } else { scripts == 1_000 }, "{scripts} scripts");
    }
}

#[tokio::test]
async fn whoever_leaves_uses_nothing() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let limit = limit("r", "1000/366 days", Algorithm::TokenBucket);
    for number in 0..100 {
        let (store, charges) = (store.clone(), charge(&limit, "alice", 5));
        let asked = tokio::spawn(async move { store.reserve(charges).await });
        if number % 2 == 0 {
            tokio::task::yield_now().await;
        }
        asked.abort();
    }
    let start = Instant::now();
    while store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used > 0 {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}

#[tokio::test]
async fn a_denial_is_remembered() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    for algorithm in Algorithm::ALL {
        let small = limit(algorithm.as_str(), "10/366 days", algorithm);
        let raised = limit(algorithm.as_str(), "11/366 days", algorithm);
        let ask =
            async |limit: &Arc<Limit>, amount| store.reserve(charge(limit, "alice", amount)).await.unwrap();
        let held = granted(ask(&small, 4).await);
        let refund = granted(ask(&small, 4).await);
        // A sliding window may have shrunk by some milliseconds' worth of it: never by a unit of a year.
        let first = denied(ask(&small, 5).await);
        assert_eq!(first.source(), Source::Redis);
        let scripts = store.counts().scripts;
        for amount in [5, 6, 10] {
            let again = denied(ask(&small, amount).await);
            assert_eq!(again.source(), Source::DenialMemory, "{algorithm}");
            assert_eq!((again.requested(), again.binding().remaining), (amount, 2));
            if let (Retry::After(first), Retry::After(again), 5) = (first.retry(), again.retry(), amount) {
                assert!(again <= first, "{algorithm}: {first}, then {again}");
            }
        }
        assert_eq!(store.counts().scripts, scripts, "nobody was asked");
        // A smaller one has room.
        assert_eq!(granted(ask(&small, 2).await).standings()[0].remaining, 0);
        assert_eq!(denied(ask(&small, 1).await).source(), Source::Redis);
        assert_eq!(denied(ask(&small, 1).await).source(), Source::DenialMemory);
        // A settlement, a refund, a raised limit, a clear.
        assert_eq!(held.settled(&[3]).await.unwrap()[0].returned, 1);
        drop(granted(ask(&small, 1).await));
        assert_eq!(denied(ask(&small, 1).await).source(), Source::Redis);
        assert_eq!(refund.settled(&[0]).await.unwrap()[0].returned, 4);
        drop(granted(ask(&small, 4).await));
        assert_eq!(denied(ask(&small, 1).await).source(), Source::Redis);
        drop(granted(ask(&raised, 1).await));
        assert_eq!(denied(ask(&raised, 1).await).source(), Source::Redis);
        assert!(store.clear(&user("alice")).await.unwrap());
        drop(granted(ask(&raised, 11).await));
        // What another process gives back is seen before long.
        let other = server.store(server.options()).await;
        assert!(!ask(&raised, 1).await.is_granted());
        assert!(other.clear(&user("alice")).await.unwrap());
        let start = Instant::now();
        while !ask(&raised, 1).await.is_granted() {
            assert!(start.elapsed() < Duration::from_secs(10));
            tokio::task::yield_now().await;
        }
        assert!(store.clear(&user("alice")).await.unwrap());
    }
}

/// With and without what spares round trips: who waits as promised gets in, and nobody gets in before.
#[tokio::test]
async fn memory_of_denials_keeps_promises() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let limit = limit("r", "20/second", Algorithm::TokenBucket);
    let (start, mut admitted) = (Instant::now(), 0_u32);
    let mut remembered = 0;
    while admitted < 40 {
        match store.reserve(charge(&limit, "alice", 1)).await.unwrap() {
            Decision::Granted(_) => admitted += 1,
            Decision::Denied(denial) => remembered += u32::from(denial.source() == Source::DenialMemory),
        }
        let most = 20.0 + start.elapsed().as_secs_f64() * 20.0 + 1.0;
        assert!(f64::from(admitted) <= most, "{admitted} after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(30));
    }
    assert!(remembered > store.counts().scripts as u32, "{remembered} of memory");
}

#[tokio::test]
async fn settlements_get_through_a_full_server() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let limit = limit("r", "1000/day", Algorithm::FixedWindow);
    let held = granted(store.reserve(charge(&limit, "alice", 500)).await.unwrap());
    let mut client = server.client().await;
    let set = |what: &str, to: &str| redis::cmd("CONFIG").arg("SET").arg(what).arg(to).clone();
    set("maxmemory", "1").query_async::<()>(&mut client).await.unwrap();
    let refused = store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Refused { code, .. } if code == "OOM"), "{refused:?}");
    assert!(!refused.outcome_unknown());
    let settled = held.settled(&[10]).await;
    let about: String = redis::cmd("INFO").arg("server").query_async(&mut client).await.unwrap();
    if about.contains("redis_version:6") {
        // It cannot read the flag that lets settlements through; the estimate stands, and that is counted.
        assert!(matches!(settled, Err(StoreError::Refused { code, .. }) if code == "OOM"));
        assert_eq!(store.counts().settlements_lost, 1);
        return;
    }
    assert_eq!(settled.unwrap()[0].returned, 490);
    set("maxmemory", "0").query_async::<()>(&mut client).await.unwrap();
    assert_eq!(store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used, 10);
}

#[tokio::test]
async fn nonsense_in_a_counter_is_an_error() {
    let server = Server::start();
    let store = server.store(server.options()).await;
    let mut client = server.client().await;
    let limit = limit("r", "10/day", Algorithm::TokenBucket);
    let key = "tollgate:{alice}:rl:user:alice";
    for nonsense in
        [&b"hello"[..], b"", b"\x90", b"\x93\x01\x02\x03", b"\x99\x01\x01\x01\x01\x01\x01\x00\x00\x00"]
    {
        let set = redis::cmd("HSET").arg(key).arg("b:r-requests-day").arg(nonsense).clone();
        set.query_async::<i64>(&mut client).await.unwrap();
        store.peek(charge(&limit, "alice", 1)).await.unwrap_err();
        store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
    }
    redis::cmd("SET").arg(key).arg("text").query_async::<()>(&mut client).await.unwrap();
    let refused = store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused:?}");
    assert!(store.clear(&user("alice")).await.unwrap());
    drop(granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap()));
    // More charges than one request may meet; one counter at two capacities.
    let many = vec![charge(&limit, "alice", 0).remove(0); 17];
    assert!(matches!(store.reserve(many).await, Err(StoreError::Charges(_))));
    let wider = crate::limit("r", "11/day", Algorithm::TokenBucket);
    let both = [charge(&limit, "alice", 1), charge(&wider, "alice", 1)].concat();
    assert!(matches!(store.reserve(both).await, Err(StoreError::Charges(_))));
}

/// Keeps asking until the store answers again; how long that took.
async fn until_it_answers(store: &RedisStore, limit: &Arc<Limit>) -> Duration {
    let start = Instant::now();
    while store.reserve(charge(limit, "alice", 1)).await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "it never recovered");
        tokio::task::yield_now().await;
    }
    start.elapsed()
}

const DEADLINE: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_frozen_server_costs_a_deadline_each() {
    let server = Server::start();
    let store = server.store(RedisOptions::new(&server.url()).deadline(DEADLINE)).await;
    let limit = limit("r", "100000/day", Algorithm::FixedWindow);
    until_it_answers(&store, &limit).await;
    server.signal("STOP");
    for _ in 0..20 {
        let start = Instant::now();
        let failed = store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
        assert!(matches!(failed, StoreError::Timeout | StoreError::Unreachable), "{failed:?}");
        assert!(start.elapsed() < 10 * DEADLINE, "{:?}", start.elapsed());
    }
    server.signal("CONT");
    println!("answered {:?} after it went on", until_it_answers(&store, &limit).await);
}

/// How many scripts the server has run.
async fn scripts_run(server: &Server) -> u64 {
    let stats: String =
        redis::cmd("INFO").arg("commandstats").query_async(&mut server.client().await).await.unwrap();
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    line.and_then(|line| line.split(',').next()).map_or(0, |calls| calls.parse().unwrap())
}

/// Whoever asked was told that it took too long, and has gone elsewhere.
#[tokio::test]
async fn what_is_granted_too_late_is_given_back() {
    let server = Server::start();
    for (name, options) in [
        ("bob", RedisOptions::new(&server.url())),
        ("carol", RedisOptions::new(&server.url()).without_coalescing()),
    ] {
        let store = server.store(options.deadline(DEADLINE)).await;
        let limits = Algorithm::ALL.map(|algorithm| limit(algorithm.as_str(), "1000/day", algorithm));
        let charges = |amount| limits.iter().flat_map(|limit| charge(limit, name, amount)).collect();
        until_it_answers(&store, &limits[0]).await;
        let kept = loop {
            if let Ok(decision) = store.reserve(charges(5)).await {
                break granted(decision);
            }
        };
        let (run, sent) = (scripts_run(&server).await, store.counts().scripts);
        server.signal("STOP");
        let asked: Vec<_> = (0..4)
            .map(|_| {
                let (store, charges) = (store.clone(), charges(7));
                tokio::spawn(async move { store.reserve(charges).await.map(drop) })
            })
            .collect();
        for asked in asked {
            assert_eq!(asked.await.unwrap(), Err(StoreError::Timeout));
        }
        // Who ends now waits for no answer that comes too late.
        tokio::time::timeout(Duration::from_secs(1), store.flush()).await.unwrap();
        let late = store.counts().scripts - sent;
        server.signal("CONT");
        let start = Instant::now();
        let used = async || {
            let told = store.peek(charges(0)).await.unwrap_or_default();
            told.iter().map(|standing| standing.used).collect::<Vec<u64>>()
        };
        // First what was sent is done: nothing else is asked meanwhile.
        while scripts_run(&server).await < run + late {
            assert!(start.elapsed() < Duration::from_secs(20), "never done");
        }
        // Of a bucket that also depends on which comes first: what may have drained from it is not given back.
        while used().await.iter().zip([5, 5, 5, 14]).any(|(used, most)| !(5..=most).contains(used)) {
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}, not 5", used().await);
        }
        drop(kept);
    }
}

/// Another server has taken over meanwhile, and knows the counter as it was.
#[tokio::test]
async fn what_a_server_that_was_left_grants_too_late_is_its_own() {
    let (old, new) = (Server::start(), Server::start());
    let folder = tempfile::tempdir().unwrap();
    let (name, next) = (folder.path().join("redis.sock"), folder.path().join("next"));
    std::os::unix::fs::symlink(old.socket(), &name).unwrap();
    let url = format!("unix://{}", name.display());
    let store = old.store(RedisOptions::new(&url).deadline(DEADLINE)).await;
    let limit = limit("r", "1000/day", Algorithm::FixedWindow);
    until_it_answers(&store, &limit).await;
    let bob = |amount| charge(&limit, "bob", amount);
    while store.reserve(bob(10)).await.is_err() {}
    let (mut here, mut there) = (old.client().await, new.client().await);
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut here).await.unwrap();
    for key in keys {
        let state: Vec<u8> = redis::cmd("DUMP").arg(&key).query_async(&mut here).await.unwrap();
        redis::cmd("RESTORE").arg(&key).arg(0).arg(state).query_async::<()>(&mut there).await.unwrap();
    }
    let lost = store.counts().settlements_lost;
    old.signal("STOP");
    std::os::unix::fs::symlink(new.socket(), &next).unwrap();
    std::fs::rename(&next, &name).unwrap();
    // After so many it is given up.
    for _ in 0..3 {
        assert_eq!(store.reserve(bob(3)).await.map(drop), Err(StoreError::Timeout));
    }
    let start = Instant::now();
    let before = loop {
        match store.peek(bob(0)).await {
            Ok(standings) => break standings[0].used,
            Err(_) => assert!(start.elapsed() < Duration::from_secs(20), "nobody has taken over"),
        }
    };
    assert!(before >= 10);
    old.signal("CONT");
    while store.counts().settlements_lost < lost + 3 {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", store.counts());
        tokio::task::yield_now().await;
    }
    assert_eq!(store.peek(bob(0)).await.unwrap()[0].used, before);
}

#[tokio::test]
async fn no_more_wait_than_there_is_room_for() {
    let server = Server::start();
    let store = server.store(RedisOptions::new(&server.url()).deadline(Duration::from_secs(3))).await;
    server.signal("STOP");
    let limit = limit("r", "100000/day", Algorithm::FixedWindow);
    let ask = |number: u64| {
        let (store, charges) = (store.clone(), charge(&limit, &format!("user{}", number % 100), 1));
        tokio::spawn(async move { store.reserve(charges).await })
    };
    let asked: Vec<_> = (0..20_000).map(ask).collect();
    let mut busy = 0;
    for asked in asked {
        match asked.await.unwrap().unwrap_err() {
            StoreError::Busy => busy += 1,
            other => assert!(matches!(other, StoreError::Timeout | StoreError::Unreachable), "{other:?}"),
        }
    }
    assert_eq!(busy, 20_000 - 16_384);
    server.signal("CONT");
    until_it_answers(&store, &limit).await;
}

#[tokio::test]
async fn a_connection_that_swallows_everything_is_replaced() {
    let server = Server::start();
    server.client().await;
    let proxy = Proxy::start(server.socket()).await;
    let store = RedisStore::open(RedisOptions::new(&proxy.url()).deadline(DEADLINE)).unwrap();
    let limit = limit("r", "100000/day", Algorithm::MovingWindow);
    until_it_answers(&store, &limit).await;
    let (made, mut slowest) = (store.counts().connections, Duration::ZERO);
    for _ in 0..5 {
        proxy.swallow();
        slowest = slowest.max(until_it_answers(&store, &limit).await);
    }
    println!("replaced after {slowest:?} at most");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    // One for each, not one for each caller that timed out.
    let replaced = store.counts().connections - made;
    assert!((5..=10).contains(&replaced), "{replaced} connections");
}

#[tokio::test]
async fn an_unanswered_settlement_is_counted_and_not_repeated() {
    let server = Server::start();
    let store = server.store(RedisOptions::new(&server.url()).deadline(DEADLINE)).await;
    let limit = limit("r", "100000/day", Algorithm::FixedWindow);
    until_it_answers(&store, &limit).await;
    let used = async || store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used;
    let held = loop {
        if let Ok(decision) = store.reserve(charge(&limit, "alice", 100)).await {
            break granted(decision);
        }
    };
    let before = used().await;
    server.signal("STOP");
    assert_eq!(held.settled(&[0]).await, Err(StoreError::Timeout));
    assert_eq!(store.counts().settlements_lost, 1);
    server.signal("CONT");
    until_it_answers(&store, &limit).await;
    // Once, or not at all: the bytes may have been on their way.
    let after = used().await;
    assert!(after == before + 1 || after == before + 1 - 100, "{before}, then {after}");
}

#[tokio::test]
async fn a_store_may_open_before_its_server() {
    let server = Server::start();
    let gone = RedisOptions::new(&server.url().replace("redis.sock", "none.sock")).deadline(DEADLINE);
    let store = RedisStore::open(gone).unwrap();
    let limit = limit("r", "10/day", Algorithm::FixedWindow);
    let start = Instant::now();
    let failed = store.reserve(charge(&limit, "alice", 1)).await.unwrap_err();
    // On a machine too busy to say why in time it is a timeout, which claims less.
    assert!(matches!(failed, StoreError::Unreachable | StoreError::Timeout), "{failed:?}");
    assert!(start.elapsed() < 10 * DEADLINE);
    // A broken connection is replaced.
    let store = server.store(server.options()).await;
    drop(granted(store.reserve(charge(&limit, "alice", 1)).await.unwrap()));
    let mut client = server.client().await;
    let kill = redis::cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes").clone();
    kill.query_async::<i64>(&mut client).await.unwrap();
    until_it_answers(&store, &limit).await;
    assert_eq!(store.counts().connections, 2);
}
