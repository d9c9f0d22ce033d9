//! Real servers that belong together: with sentinels, as a cluster, or with certificates.
#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, Value};
use tempfile::TempDir;

/// A port that nobody listens on.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One redis-server that listens on a port, gone when dropped.
pub(crate) struct Instance {
    process: Child,
    folder: TempDir,
    pub(crate) port: u16,
    /// Empty: there is none.
    pub(crate) password: &'static str,
}

impl Instance {
    pub(crate) async fn start(more: &[&str]) -> Instance {
        Instance::start_in(tempfile::tempdir().unwrap(), more).await
    }

    /// Does not wait: the server may not speak to everybody.
    pub(crate) fn spawn_in(folder: TempDir, port: u16, more: &[&str]) -> Instance {
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
            .arg(folder.path())
            .args(more)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("redis-server is needed for this test: {error}"));
        Instance { process, folder, port, password: "" }
    }

    pub(crate) async fn start_in(folder: TempDir, more: &[&str]) -> Instance {
        let port = free_port();
        let number = port.to_string();
        let instance = Instance::spawn_in(folder, port, &[&["--port", &number], more].concat());
        instance.client().await;
        instance
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A connection of the test's own; waits until the server answers.
    pub(crate) async fn client(&self) -> MultiplexedConnection {
        let client = redis::Client::open(format!("redis://:{}@{}", self.password, self.address())).unwrap();
        let start = Instant::now();
        loop {
            match client.get_multiplexed_async_connection().await {
                Ok(connection) => return connection,
                Err(error) if start.elapsed().as_secs() > 20 => panic!("no answer: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// `CONFIG GET maxmemory`, in words.
    pub(crate) async fn ask<T: FromRedisValue>(&self, words: &str) -> T {
        let answer = self.try_ask(words).await;
        answer.unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    pub(crate) async fn try_ask<T: FromRedisValue>(&self, words: &str) -> redis::RedisResult<T> {
        let mut words = words.split_whitespace();
        let mut command = redis::cmd(words.next().unwrap());
        words.for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut self.client().await).await
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.process.id().to_string()).status();
        assert!(sent.unwrap().success());
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits for what has to come.
pub(crate) async fn until(what: &str, mut come: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !come().await {
        assert!(start.elapsed().as_secs() < 30, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A sentinel that watches a master called `mymaster`, and has seen so many failovers.
pub(crate) async fn sentinel(master: &Instance, quorum: usize, epoch: u64) -> Instance {
    sentinel_with(master, quorum, epoch, "").await
}

/// With more lines of its file.
pub(crate) async fn sentinel_with(master: &Instance, quorum: usize, epoch: u64, more: &str) -> Instance {
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    let text = format!(
        "port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {} {quorum}\n\
         sentinel down-after-milliseconds mymaster 1000\nsentinel failover-timeout mymaster 4000\n\
         sentinel config-epoch mymaster {epoch}\nsentinel current-epoch {epoch}\n{more}",
        master.port
    );
    let file = write(folder.path(), "sentinel.conf", text.as_bytes());
    let process = Command::new("redis-server")
        .arg(&file)
        .arg("--sentinel")
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let sentinel = Instance { process, folder, port, password: "" };
    sentinel.client().await;
    sentinel
}

pub(crate) async fn sentinels(count: usize, master: &Instance, quorum: usize) -> Vec<Instance> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(sentinel(master, quorum, 0).await);
    }
    all
}

pub(crate) fn addresses(instances: &[Instance]) -> String {
    instances.iter().map(Instance::address).collect::<Vec<_>>().join(",")
}

/// A cluster: three masters with a third of the slots each, then their replicas.
pub(crate) async fn cluster(replicas: bool) -> Vec<Instance> {
    let mut nodes = Vec::new();
    for _ in 0..if replicas { 6 } else { 3 } {
        let bus = free_port().to_string();
        let args = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &bus];
        let more = ["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"];
        let node = Instance::start(&[&args[..], &more[..]].concat()).await;
        node.ask::<()>(&format!("CLUSTER SET-CONFIG-EPOCH {}", nodes.len() + 1)).await;
        if nodes.len() < 3 {
            let (first, last) = [(0, 5_460), (5_461, 10_922), (10_923, 16_383)][nodes.len()];
            node.ask::<()>(&format!("CLUSTER ADDSLOTSRANGE {first} {last}")).await;
        }
        let met: &Instance = nodes.first().unwrap_or(&node);
        node.ask::<()>(&format!("CLUSTER MEET 127.0.0.1 {} {}", met.port, bus_of(met).await)).await;
        nodes.push(node);
    }
    let all = nodes.len();
    for node in &nodes {
        until("the cluster's nodes know each other", async || {
            let known: String = node.ask("CLUSTER INFO").await;
            known.contains(&format!("cluster_known_nodes:{all}\r")) && known.contains("cluster_state:ok")
        })
        .await;
    }
    for (index, replica) in nodes.iter().enumerate().skip(3) {
        let master: String = nodes[index - 3].ask("CLUSTER MYID").await;
        replica.ask::<()>(&format!("CLUSTER REPLICATE {master}")).await;
        until("a replica has caught up", async || {
            let role: Vec<Value> = replica.ask("ROLE").await;
            role.get(3) == Some(&Value::BulkString(b"connected".to_vec()))
        })
        .await;
    }
    nodes
}

async fn bus_of(node: &Instance) -> u16 {
    let found: Vec<String> = node.ask("CONFIG GET cluster-port").await;
    found[1].parse().unwrap()
}

/// Certificates of a test's own: one who signs, and those who are signed.
pub(crate) struct Authority {
    certificate: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut parameters = rcgen::CertificateParams::new(vec![]).unwrap();
        // Those who are looked for by name have one each.
        let name = format!("authority {}", free_port());
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Authority { certificate: rcgen::CertifiedIssuer::self_signed(parameters, key).unwrap() }
    }

    pub(crate) fn pem(&self) -> Vec<u8> {
        self.certificate.pem().into_bytes()
    }

    /// Writes what a server needs to be `name`, and says how it is told to use that.
    pub(crate) fn files(&self, folder: &Path, name: &str) -> Vec<String> {
        let (cert, key) = self.sign(name);
        let files = [("ca-cert", self.pem()), ("cert", cert), ("key", key)];
        let each = |(what, pem): (&str, Vec<u8>)| {
            [format!("--tls-{what}-file"), write(folder, what, &pem).display().to_string()]
        };
        files.into_iter().flat_map(each).collect()
    }

    /// A certificate for a name, and its key.
    pub(crate) fn sign(&self, name: &str) -> (Vec<u8>, Vec<u8>) {
        let parameters = rcgen::CertificateParams::new(vec![name.to_string()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.certificate).unwrap();
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    }
}

/// Writes a file, and says where.
pub(crate) fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}
