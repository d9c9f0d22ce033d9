//! Every way to reach one Redis, and what is told of it.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::time::{Duration, Instant};

use support::fleet::{Authority, Instance, free_port, until};
use support::server::Server;
use support::{charge, granted, limit};
use tollgate_limiter::{Algorithm, RedisOptions, RedisStore, Store, StoreError, Tls, Topology};

/// A deadline that a busy machine keeps.
const PATIENT: Duration = Duration::from_secs(10);

async fn counts(store: &RedisStore) -> u64 {
    let limit = limit("r", "100000/day", Algorithm::FixedWindow);
    let decision = store.reserve(charge(&limit, "alice", 1)).await;
    drop(granted(decision.unwrap_or_else(|error| panic!("{error}: {:?}", store.status()))));
    store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used
}

/// Why a store that never connects does not.
async fn problem(store: &RedisStore) -> String {
    until("a problem is told", async || store.status().problem.is_some()).await;
    assert!(!store.status().connected);
    store.status().problem.unwrap()
}

struct Encrypted {
    server: Instance,
    authority: Authority,
}

impl Encrypted {
    fn start(name: &str, clients: &str) -> Encrypted {
        let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
        let files = authority.files(folder.path(), name);
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        let port = free_port();
        let number = port.to_string();
        let more = ["--port", "0", "--tls-port", &number, "--tls-auth-clients", clients];
        Encrypted { server: Instance::spawn_in(folder, port, &[&more[..], &files[..]].concat()), authority }
    }

    fn store(&self, host: &str, tls: Tls) -> RedisStore {
        let url = format!("rediss://{host}:{}", self.server.port);
        RedisStore::open(RedisOptions::new(&url).deadline(PATIENT).tls(tls)).unwrap()
    }
}

#[tokio::test]
async fn encrypted_connections_check_names_and_signatures() {
    let redis = Encrypted::start("localhost", "no");
    let tls = |ca: Vec<u8>| Tls { ca: Some(ca), ..Tls::default() };
    let store = redis.store("localhost", tls(redis.authority.pem()));
    assert_eq!(counts(&store).await, 1);
    assert_eq!(store.status().address, format!("localhost:{}", redis.server.port));
    // Another name than the certificate's, another signature, and the system's authorities.
    let named = redis.store("127.0.0.1", tls(redis.authority.pem()));
    assert!(
        problem(&named).await.contains("NotValidForName") || problem(&named).await.contains("not valid for")
    );
    for ca in [Some(Authority::new().pem()), None] {
        let strange = redis.store("localhost", Tls { ca, ..Tls::default() });
        assert!(problem(&strange).await.contains("UnknownIssuer"), "{:?}", strange.status());
    }
    let plain = RedisStore::open(RedisOptions::new(&format!("redis://localhost:{}", redis.server.port)));
    problem(&plain.unwrap()).await;
}

#[tokio::test]
async fn a_server_may_ask_who_the_client_is() {
    let redis = Encrypted::start("localhost", "yes");
    let (cert, key) = redis.authority.sign("gateway");
    let ca = Some(redis.authority.pem());
    let known = Tls { ca: ca.clone(), cert: Some(cert.clone()), key: Some(key.clone()) };
    assert_eq!(counts(&redis.store("localhost", known)).await, 1);
    let nobody = redis.store("localhost", Tls { ca: ca.clone(), ..Tls::default() });
    problem(&nobody).await;
    let (cert, key) = Authority::new().sign("gateway");
    let stranger = redis.store("localhost", Tls { ca, cert: Some(cert), key: Some(key) });
    problem(&stranger).await;
}

#[tokio::test]
async fn users_are_those_of_the_server_s_list() {
    let server = Server::start();
    let mut client = server.client().await;
    // All that a store needs of its commands, and no more.
    for words in [
        "ACL SETUSER gate on >se/cr@t ~tollgate:* +evalsha +eval +time +hmget +hset +hgetall +hdel +hlen +pttl \
         +pexpireat +del +ping",
        "ACL SETUSER default off",
    ] {
        let mut words = words.split_whitespace();
        let mut command = redis::cmd(words.next().unwrap());
        words.for_each(|word| {
            command.arg(word);
        });
        command.query_async::<()>(&mut client).await.unwrap();
    }
    let url = |user: &str, password: &str| format!("{}?user={user}&pass={password}", server.url());
    let open = |url: &str| RedisStore::open(RedisOptions::new(url).deadline(PATIENT)).unwrap();
    let store = open(&url("gate", "se%2Fcr%40t"));
    assert_eq!(counts(&store).await, 1);
    // INFO and ROLE are refused: it is an old server of an unknown role.
    let status = store.status();
    assert!(status.connected && status.version.is_none() && status.role.is_none(), "{status:?}");
    assert!(matches!(store.info().await, Err(StoreError::Refused { code, .. }) if code == "NOPERM"));
    assert!(store.ping().await.unwrap() < PATIENT);
    let wrong = open(&url("gate", "hunter2"));
    let told = problem(&wrong).await;
    assert!(!told.contains("hunter2"), "{told}");
    assert!(
        !format!("{:?} {:?}", wrong.status(), RedisOptions::new(&url("gate", "hunter2"))).contains("hunter2")
    );
}

#[tokio::test]
async fn it_is_told_how_a_store_is_connected() {
    let mut server = Instance::start(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]).await;
    let replica = Instance::start(&["--replicaof", "127.0.0.1", &server.port.to_string()]).await;
    until("a replica is there", async || {
        server.ask::<String>("INFO replication").await.contains("state=online")
    })
    .await;
    let url = format!("redis://{}/2", server.address());
    let store = RedisStore::open(RedisOptions::new(&url).deadline(PATIENT)).unwrap();
    assert_eq!(counts(&store).await, 1);
    let status = store.status();
    assert!(status.connected && status.problem.is_none(), "{status:?}");
    assert_eq!((status.topology, status.topology.as_str()), (Topology::Single, "single"));
    assert_eq!((status.address, status.role.as_deref()), (server.address(), Some("master")));
    assert!(status.version.unwrap().split('.').count() == 3);
    let info = store.info().await.unwrap();
    assert_eq!((info.maxmemory, info.maxmemory_policy.as_deref()), (Some(100 << 20), Some("allkeys-lru")));
    assert!(info.evicts() && info.evicted_keys == Some(0) && info.used_memory > Some(100_000));
    assert!(info.connected_clients >= Some(1) && info.replicas == Some(1), "{info:?}");
    assert!(info.replication_lag.is_some());
    // The database that was asked for.
    let keys: String = server.ask("INFO keyspace").await;
    assert!(keys.contains("db2:keys=2"), "{keys}");
    let before = Instant::now();
    server.kill();
    until("the loss is noticed", async || store.ping().await.is_ok() || !store.status().connected).await;
    let status = store.status();
    assert!(!status.connected && status.since >= before, "{status:?}");
    assert_eq!(status.address, server.address());
    assert!(problem(&store).await.contains("refused"));
    drop(replica);
}

#[tokio::test]
async fn a_store_that_is_dropped_leaves_no_connection() {
    let server = Instance::start(&[]).await;
    let store = RedisStore::open(RedisOptions::new(&format!("redis://{}", server.address()))).unwrap();
    until("it is connected", async || store.ping().await.is_ok()).await;
    let clients = async || server.ask::<String>("CLIENT LIST").await.lines().count();
    until("there is its connection and that of the test", async || clients().await == 2).await;
    drop(store);
    until("only that of the test is left", async || clients().await == 1).await;
}

/// As when a name means another server after a failover: what was certainly not done is asked again.
#[tokio::test]
async fn a_server_that_is_no_master_any_more_is_left() {
    let (server, other) = (Instance::start(&[]).await, Instance::start(&[]).await);
    let url = format!("redis://{}", server.address());
    let store = RedisStore::open(RedisOptions::new(&url).deadline(Duration::from_millis(200))).unwrap();
    until("it counts", async || store.ping().await.is_ok()).await;
    assert_eq!(counts(&store).await, 1);
    server.ask::<()>(&format!("REPLICAOF 127.0.0.1 {}", other.port)).await;
    let limit = limit("r", "100000/day", Algorithm::FixedWindow);
    let made = store.counts().connections;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1_200) {
        let refused = store.reserve(charge(&limit, "alice", 1)).await;
        assert!(refused.is_err(), "{refused:?}");
    }
    let again = store.counts().connections - made;
    assert!((1..=3).contains(&again), "{again} connections");
    server.ask::<()>("REPLICAOF NO ONE").await;
    until("it counts again", async || store.reserve(charge(&limit, "alice", 1)).await.is_ok()).await;
}

/// Many questions to a server that is frozen: few sockets, and a bounded queue.
#[tokio::test]
async fn a_frozen_server_gets_few_connections() {
    let server = Instance::start(&[]).await;
    let url = format!("redis://{}", server.address());
    let options = RedisOptions::new(&url).deadline(Duration::from_millis(50)).without_coalescing();
    let store = RedisStore::open(options).unwrap();
    until("it is connected", async || store.ping().await.is_ok()).await;
    let sockets = || {
        let mine = format!("/proc/{}/fd", std::process::id());
        std::fs::read_dir(mine).map_or(0, |open| {
            let target =
                |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
            open.filter_map(target).filter(|path| path.to_string_lossy().starts_with("socket:")).count()
        })
    };
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        pages.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default() / 256
    };
    let (before, memory) = (sockets(), resident());
    server.signal("STOP");
    let limit = limit("r", "1000000/day", Algorithm::FixedWindow);
    let ask = |number: u64| {
        let (store, charges) = (store.clone(), charge(&limit, &format!("user{}", number % 500), 1));
        tokio::spawn(async move { store.reserve(charges).await.is_err() })
    };
    let (mut most, mut failed) = (0, 0);
    for round in 0..10 {
        let asked: Vec<_> = (0..5_000).map(|number| ask(round * 5_000 + number)).collect();
        for asked in asked {
            failed += u64::from(asked.await.unwrap());
        }
        most = most.max(sockets().saturating_sub(before));
    }
    server.signal("CONT");
    assert_eq!(failed, 50_000);
    let more = resident().saturating_sub(memory);
    println!("{most} more sockets at most, {} connections made, {more} MiB more", store.counts().connections);
    assert!(most <= 7, "{most} more sockets");
    // 40 to 50: a decision that waits is a few KB.
    assert!(more <= 64, "{more} MiB");
    until("it answers", async || store.ping().await.is_ok()).await;
}
