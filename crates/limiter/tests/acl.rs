//! The files in `deploy/redis`, run by real servers: they start, their users may do what they need, and nothing else.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisResult, Value};
use support::fleet::{free_port, until};
use support::{charge, denied, granted, limit, slots};
use tempfile::TempDir;
use tollgate_limiter::{
    Algorithm, Circuit, Limit, RedisOptions, RedisStore, ResilientOptions, ResilientStore, Store, Topology,
};

const PATIENT: Duration = Duration::from_secs(10);
const USERS: [&str; 5] = ["tollgate", "monitor", "replica", "sentinel", "operator"];

fn password(user: &str) -> String {
    format!("the-password-of-{user}")
}

/// A server or sentinel, started as in production.
struct Guarded {
    process: Child,
    folder: TempDir,
    port: u16,
}

impl Guarded {
    fn start(conf: &str, environment: &[(&str, &str)], more: &[&str]) -> Guarded {
        let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
        let mut guarded = Guarded { process: Command::new("true").spawn().unwrap(), folder, port };
        guarded.run(conf, environment, more);
        guarded
    }

    fn run(&mut self, conf: &str, environment: &[(&str, &str)], more: &[&str]) {
        self.kill();
        let run = self.folder.path().join("run");
        std::fs::create_dir_all(&run).unwrap();
        let mut command = Command::new("sh");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/redis/start.sh")).arg(conf);
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"]).args(more);
        command.env("DATA", self.folder.path()).env("RUN", run).envs(environment.iter().copied());
        for user in USERS {
            command.env(format!("REDIS_PASSWORD_{}", user.to_uppercase()), password(user));
        }
        self.process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn url(&self, user: &str) -> String {
        format!("redis://{user}:{}@{}/0", password(user), self.address())
    }

    /// As `host port`, the way Redis writes it.
    fn place(&self) -> String {
        format!("127.0.0.1 {}", self.port)
    }

    async fn client(&self, user: &str) -> MultiplexedConnection {
        // Commands of the test, not of the client.
        let client = redis::Client::open(self.url(user)).unwrap();
        let start = std::time::Instant::now();
        loop {
            match client.get_multiplexed_async_connection().await {
                Ok(connection) => return connection,
                Err(error) if start.elapsed().as_secs() > 20 => panic!("no answer: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    async fn ask<T: FromRedisValue>(&self, user: &str, words: &str) -> RedisResult<T> {
        let mut words = words.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        words.for_each(|word| {
            command.arg(word.replace('_', " "));
        });
        command.query_async(&mut self.client(user).await).await
    }

    async fn operator<T: FromRedisValue>(&self, words: &str) -> T {
        self.ask("operator", words).await.unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    /// What its users were refused so far: what, and to whom.
    async fn refused(&self) -> Vec<String> {
        let log: Vec<Vec<(String, Value)>> = self.operator("ACL LOG").await;
        log.into_iter().map(|entry| format!("{entry:?}")).collect()
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}

fn opened(url: &str) -> ResilientStore {
    let redis = RedisStore::open(RedisOptions::new(url).deadline(PATIENT)).unwrap();
    ResilientStore::new(redis, ResilientOptions::default())
}

/// Decisions of every kind, by every algorithm, and what follows them.
async fn use_all_of(store: &ResilientStore) {
    until("it is connected", async || store.state() == Circuit::Closed && store.instances().seen).await;
    let algorithms = Algorithm::ALL.into_iter().filter(|algorithm| *algorithm != Algorithm::Concurrency);
    let mut limits: Vec<Arc<Limit>> = algorithms.map(|a| limit(a.as_str(), "10/366 days", a)).collect();
    limits.push(slots("slots", 3));
    for limit in &limits {
        let amount = if limit.algorithm() == Algorithm::Concurrency { 1 } else { 6 };
        let first = granted(store.reserve(charge(limit, "alice", amount)).await.unwrap());
        first.renew();
        let second = granted(store.reserve(charge(limit, "alice", 1)).await.unwrap());
        denied(store.reserve(charge(limit, "alice", 6)).await.unwrap());
        assert_eq!(store.peek(charge(limit, "alice", 1)).await.unwrap()[0].used, amount + 1);
        first.settled(&[amount + 1]).await.unwrap();
        second.refund();
        let left = if amount == 1 { 0 } else { 7 };
        until("both have ended", async || {
            store.peek(charge(limit, "alice", 0)).await.unwrap()[0].used == left
        })
        .await;
    }
    assert!(store.clear(&support::user("alice")).await.unwrap());
    assert!(store.redis().ping().await.unwrap() < PATIENT);
    let info = store.redis().info().await.unwrap();
    assert!(info.maxmemory > Some(0) && info.evicted_keys == Some(0) && !info.evicts(), "{info:?}");
    let status = store.redis().status();
    assert!(status.version.is_some() && status.problem.is_none(), "{status:?}");
}

/// Whether the server refused for want of rights; the last two whatever the rights.
fn is_refused(answer: &RedisResult<Value>) -> bool {
    let words = [
        "can't run this command",
        "can't access at least one of the keys",
        "can't publish to the channel",
        "command not allowed. If the enable-",
        "not allowed from script",
        // Redis 8 and Valkey, of what a script may not.
        "ACL failure in script",
    ];
    answer.as_ref().is_err_and(|error| {
        error.code() == Some("NOPERM") || words.iter().any(|word| error.to_string().contains(word))
    })
}

#[tokio::test]
async fn a_gateway_may_do_all_that_it_does() {
    let server = Guarded::start("redis.conf", &[], &[]);
    use_all_of(&opened(&server.url("tollgate"))).await;
    // Control data, messages, waiting for a replica.
    for words in [
        "HSET tollgate:{ctl}:ctl:about version 1",
        "HSETNX tollgate:{ctl}:ctl:about epoch 1",
        "HSCAN tollgate:{ctl}:ctl:about 0",
        "ZADD tollgate:{ctl}:ctl:changes 1 a",
        "ZRANGE tollgate:{ctl}:ctl:changes 0 0 WITHSCORES",
        "ZCOUNT tollgate:{ctl}:ctl:changes 0 +inf",
        "ZREMRANGEBYRANK tollgate:{ctl}:ctl:changes 0 0",
        "XADD tollgate:{ctl}:ctl:audit MAXLEN ~ 10 * note x",
        "XREVRANGE tollgate:{ctl}:ctl:audit + - COUNT 1",
        "HINCRBY tollgate:{user:alice}:use:day tokens 5",
        "SET tollgate:{user:alice}:ep x NX PX 1000",
        "PUBLISH tollgate:{ctl}:ctl:told 1",
        "EVAL return_redis.call('PUBLISH','tollgate:x','1') 0",
        "WAIT 0 1",
        "SELECT 0",
    ] {
        let answer: RedisResult<Value> = server.ask("tollgate", words).await;
        assert!(answer.is_ok(), "{words}: {answer:?}");
    }
    let mut listener = redis::Client::open(server.url("tollgate")).unwrap().get_async_pubsub().await.unwrap();
    listener.subscribe("tollgate:{ctl}:ctl:told").await.unwrap();
    listener.unsubscribe("tollgate:{ctl}:ctl:told").await.unwrap();
    let refused = server.refused().await;
    let needless = |entry: &&String| !entry.contains("setinfo");
    assert!(refused.iter().filter(needless).count() == 0, "{refused:?}");
}

#[tokio::test]
async fn a_gateway_may_do_nothing_else() {
    let server = Guarded::start("redis.conf", &[], &[]);
    server.operator::<()>("SET other:x secret").await;
    for words in [
        "FLUSHALL",
        "FLUSHDB",
        "SWAPDB 0 1",
        "KEYS *",
        "SCAN 0",
        "RANDOMKEY",
        "DBSIZE",
        "SAVE",
        "BGSAVE",
        "BGREWRITEAOF",
        "LASTSAVE",
        "SHUTDOWN NOSAVE",
        "DEBUG SLEEP 0",
        "MONITOR",
        "SYNC",
        "PSYNC ? -1",
        "REPLICAOF NO ONE",
        "SLAVEOF NO ONE",
        "FAILOVER",
        "MIGRATE 127.0.0.1 1 other:x 0 10",
        "MODULE LIST",
        "MODULE LOAD /tmp/x.so",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "CONFIG REWRITE",
        "CONFIG RESETSTAT",
        "ACL LIST",
        "ACL WHOAMI",
        "ACL SETUSER tollgate allkeys",
        "ACL LOG RESET",
        "CLIENT LIST",
        "CLIENT KILL TYPE normal",
        "CLIENT PAUSE 1000",
        "CLIENT NO-EVICT on",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "SCRIPT LOAD return_1",
        "FUNCTION LIST",
        "FUNCTION FLUSH",
        "FCALL x 0",
        "SLOWLOG RESET",
        "LATENCY RESET",
        "MEMORY USAGE tollgate:x",
        "MEMORY PURGE",
        "OBJECT ENCODING tollgate:x",
        "DUMP tollgate:x",
        "RESTORE tollgate:x 0 x",
        "RENAME tollgate:x tollgate:y",
        "COPY tollgate:x tollgate:y",
        "MOVE tollgate:x 1",
        "SORT tollgate:x",
        "PERSIST tollgate:x",
        "BLPOP tollgate:x 1",
        "CLUSTER RESET",
        "CLUSTER FAILOVER",
        "CLUSTER NODES",
        "PSUBSCRIBE *",
        "PUBSUB CHANNELS",
        "COMMAND LIST",
        // What it may do, on what is not its own.
        "GET other:x",
        "SET other:x 1",
        "DEL other:x",
        "UNLINK other:x",
        "EXISTS other:x",
        "HGETALL other:x",
        "DEL tollgate:x other:x",
        "GET tollgatex",
        "ZADD other:x 1 a",
        "PUBLISH other 1",
        "SUBSCRIBE other",
        "SUBSCRIBE __sentinel__:hello",
        // The same from within a script.
        "EVAL return_1 1 other:x",
        "EVAL return_redis.call('GET','other:x') 0",
        "EVAL return_redis.call('FLUSHALL') 0",
        "EVAL return_redis.call('KEYS','*') 0",
        "EVAL return_redis.call('PUBLISH','other','1') 0",
        "EVAL return_redis.call('CONFIG','GET','*') 0",
    ] {
        let answer: RedisResult<Value> = server.ask("tollgate", words).await;
        assert!(is_refused(&answer), "{words}: {answer:?}");
    }
    assert_eq!(server.operator::<String>("GET other:x").await, "secret");
    // Nobody comes in without a password, or with somebody else's.
    for url in
        [format!("redis://{}", server.address()), server.url("monitor").replace("monitor:", "tollgate:")]
    {
        let store = RedisStore::open(RedisOptions::new(&url).deadline(Duration::from_millis(200))).unwrap();
        assert!(store.ping().await.is_err(), "{url}");
    }
}

#[tokio::test]
async fn who_watches_sees_no_key_and_changes_nothing() {
    let server = Guarded::start("redis.conf", &[], &[]);
    let allowed = [
        "PING",
        "INFO",
        "ROLE",
        "DBSIZE",
        "SLOWLOG GET",
        "LATENCY LATEST",
        "MEMORY STATS",
        "CLIENT LIST",
        "ACL LOG",
    ];
    for words in allowed {
        let answer: RedisResult<Value> = server.ask("monitor", words).await;
        assert!(answer.is_ok(), "{words}: {answer:?}");
    }
    let refused = [
        "GET tollgate:x",
        "HGETALL tollgate:x",
        "SET x 1",
        "EVAL return_1 0",
        "KEYS *",
        "SCAN 0",
        "FLUSHALL",
        "CONFIG GET *",
        "ACL LIST",
        "ACL SETUSER monitor allkeys",
        "MONITOR",
        "SUBSCRIBE tollgate:x",
        "SLOWLOG RESET",
        "CLIENT KILL TYPE normal",
        "SHUTDOWN NOSAVE",
        "REPLICAOF NO ONE",
        "DEBUG SLEEP 0",
    ];
    for user in ["monitor", "replica", "sentinel"] {
        for words in refused {
            // Sentinels end connections of those who were misled by the old master.
            if user == "sentinel" && words.starts_with("CLIENT KILL") {
                continue;
            }
            let answer: RedisResult<Value> = server.ask(user, words).await;
            assert!(is_refused(&answer), "{user}: {words}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn counters_are_kept_and_what_is_cached_may_go() {
    let mut counters = Guarded::start("redis.conf", &[], &[]);
    let told: Vec<String> = counters.operator("CONFIG GET maxmemory-policy appendonly appendfsync").await;
    for value in ["noeviction", "yes", "everysec"] {
        assert!(told.iter().any(|told| told == value), "{told:?}");
    }
    // Killed, it comes back with what it had counted. Scripts are in the file as transactions, and a server loads those
    // as its default user (redis/redis#14541): one without rights would drop them all, without a word.
    let store = opened(&counters.url("tollgate"));
    until("it is connected", async || store.state() == Circuit::Closed && store.instances().seen).await;
    let limit = limit("kept", "10/366 days", Algorithm::FixedWindow);
    drop(granted(store.reserve(charge(&limit, "alice", 7)).await.unwrap()));
    assert_eq!(store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used, 7);
    drop(store);
    until("it is on the disk", async || {
        let about: String = counters.operator("INFO persistence").await;
        about.contains("aof_buffer_length:0\r") && about.contains("aof_pending_bio_fsync:0\r")
    })
    .await;
    counters.kill();
    counters.run("redis.conf", &[], &[]);
    let store = opened(&counters.url("tollgate"));
    until("it is connected", async || store.state() == Circuit::Closed && store.instances().seen).await;
    assert_eq!(store.peek(charge(&limit, "alice", 0)).await.unwrap()[0].used, 7);

    let cache = Guarded::start("redis-cache.conf", &[], &[]);
    let told: Vec<String> = cache.operator("CONFIG GET maxmemory-policy appendonly").await;
    assert!(told.contains(&"allkeys-lfu".to_string()) && told.contains(&"no".to_string()), "{told:?}");
    let store = RedisStore::open(RedisOptions::new(&cache.url("tollgate")).deadline(PATIENT)).unwrap();
    assert!(store.info().await.unwrap().evicts());
}

#[tokio::test]
async fn passwords_that_are_none_are_refused() {
    for password in ["", "short", "with spaces in between them"] {
        let folder = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/redis/start.sh");
        let mut command = Command::new("sh");
        command.args([script, "sentinel.conf"]).env("DATA", folder.path()).env("RUN", folder.path());
        let output = command.env("REDIS_PASSWORD_SENTINEL", password).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("REDIS_PASSWORD_SENTINEL"), "{output:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_with_least_rights_fail_over() {
    let mut master = Guarded::start("redis.conf", &[], &[]);
    let place = master.place();
    let replica = Guarded::start("redis.conf", &[("REPLICA_OF", &place)], &[]);
    until("the replica is there", async || {
        master.operator::<String>("INFO replication").await.contains("state=online")
    })
    .await;
    let environment = [("SENTINEL_MASTER", place.as_str()), ("SENTINEL_QUORUM", "1")];
    let sentinel = Guarded::start("sentinel.conf", &environment, &[]);
    let user = format!("tollgate:{}", password("tollgate"));
    let store = opened(&format!(
        "redis+sentinel://{user}@{}/mymaster/0?sentinel_username=tollgate&sentinel_password={}",
        sentinel.address(),
        password("tollgate")
    ));
    use_all_of(&store).await;
    assert_eq!(store.redis().status().topology, Topology::Sentinel);
    let words = "SENTINEL REPLICAS mymaster";
    // To sentinels the default user has the sentinels' password.
    let url = format!("redis://:{}@{}", password("sentinel"), sentinel.address());
    let mut asked = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
    until("the sentinel knows the replica", async || {
        let mut command = redis::cmd("SENTINEL");
        command.arg("REPLICAS").arg("mymaster");
        let known: Vec<Value> = command.query_async(&mut asked).await.unwrap();
        known.len() == 1
    })
    .await;
    let refused: RedisResult<Value> = sentinel.ask("tollgate", words).await;
    assert!(is_refused(&refused), "{refused:?}");
    for words in
        ["SENTINEL FAILOVER mymaster", "SENTINEL REMOVE mymaster", "SENTINEL CONFIG GET *", "SHUTDOWN"]
    {
        let refused: RedisResult<Value> = sentinel.ask("tollgate", words).await;
        assert!(is_refused(&refused), "{words}: {refused:?}");
    }
    master.kill();
    until("the replica is master", async || store.redis().status().address == replica.address()).await;
    use_all_of(&store).await;
    let refused = replica.refused().await;
    assert!(refused.iter().filter(|entry| !entry.contains("setinfo")).count() == 0, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn six_servers_become_a_cluster() {
    let start = || {
        let bus = free_port().to_string();
        let more = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", &bus];
        Guarded::start("redis.conf", &[], &more)
    };
    let nodes: Vec<Guarded> = (0..6).map(|_| start()).collect();
    for node in &nodes {
        node.client("operator").await;
    }
    let join = || {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/redis/join.sh");
        let mut command = Command::new("sh");
        command.arg(script).args(nodes.iter().map(Guarded::address));
        command.env("REDIS_PASSWORD_OPERATOR", password("operator")).output().unwrap()
    };
    let joined = join();
    assert!(joined.status.success(), "{joined:?}");
    for node in &nodes {
        until("it is well", async || {
            node.operator::<String>("CLUSTER INFO").await.contains("cluster_state:ok")
        })
        .await;
    }
    // A second time is once too often, and does nothing.
    let again = join();
    assert!(
        again.status.success() && String::from_utf8_lossy(&again.stdout).contains("they are a cluster"),
        "{again:?}"
    );
    let user = format!("tollgate:{}", password("tollgate"));
    let store = opened(&format!("redis+cluster://{user}@{},{}", nodes[0].address(), nodes[5].address()));
    use_all_of(&store).await;
    let status = store.redis().status();
    assert_eq!((status.topology, status.address.split(',').count()), (Topology::Cluster, 3), "{status:?}");
    for node in &nodes {
        let refused = node.refused().await;
        assert!(refused.iter().filter(|entry| !entry.contains("setinfo")).count() == 0, "{refused:?}");
    }
}
