//! The gateway as a process.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::watch;

use super::{SOON, get, soon};

/// A running gateway; killed when dropped.
pub struct Tollgate {
    child: Child,
    /// Where callers connect.
    pub data: SocketAddr,
    /// Where operators connect.
    pub admin: SocketAddr,
    dir: tempfile::TempDir,
    log: Log,
}

/// What it has said on standard error.
#[derive(Clone)]
struct Log {
    lines: Arc<Mutex<Vec<Value>>>,
    /// How many lines there are; closed when the process has closed its standard error.
    count: watch::Receiver<usize>,
}

impl Tollgate {
    /// Starts one; the `server` section is added.
    pub async fn start(config: &str) -> Self {
        Self::start_with("", config, &[]).await
    }

    /// Starts one with more lines in `server` (indented by two spaces) and more arguments.
    pub async fn start_with(server: &str, config: &str, arguments: &[&str]) -> Self {
        Self::start_in(&[], server, config, arguments).await
    }

    /// The same, with these variables in its environment.
    pub async fn start_in(
        environment: &[(&str, &str)],
        server: &str,
        config: &str,
        arguments: &[&str],
    ) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tollgate.yml");
        std::fs::write(&path, with_server(server, config)).expect("the configuration is written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.env_clear().envs(environment.iter().copied()).current_dir(dir.path());
        command.arg("serve").arg("-c").arg(&path).args(arguments);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the gateway starts");
        let log = Log::read(child.stderr.take().expect("standard error is a pipe"));
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        // Guarded before anything can fail, so that no process outlives its test.
        let mut this = Self { child, data: nowhere, admin: nowhere, dir, log };
        this.data = this.listening("data").await;
        this.admin = this.listening("admin").await;
        this
    }

    async fn listening(&self, plane: &str) -> SocketAddr {
        let line = self.logged(|line| line["message"] == "listening" && line["plane"] == plane).await;
        line["address"].as_str().and_then(|text| text.parse().ok()).expect("an address")
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.dir.path().join("tollgate.yml")
    }

    /// Replaces the configuration file; the `server` section is added.
    pub fn configure(&self, server: &str, config: &str) {
        std::fs::write(self.config_path(), with_server(server, config))
            .expect("the configuration is written");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the process takes a signal");
    }

    /// Asks it to end.
    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    /// Tells it to reload, and waits for how that went; returns the line it logs.
    pub async fn reload(&self) -> Value {
        let before = *self.log.count.borrow();
        self.signal(Signal::HUP);
        self.logged_after(before, is_reload).await
    }

    /// Everything logged so far, parsed where it is JSON.
    pub fn lines(&self) -> Vec<Value> {
        self.log.lines.lock().expect("no test panics with it").clone()
    }

    /// The first line for which `wanted` holds, now or soon.
    pub async fn logged(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        self.logged_after(0, wanted).await
    }

    /// The same, among the lines after the first `skipped`.
    pub async fn logged_after(&self, skipped: usize, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut count = self.log.count.clone();
        let search = async {
            let mut seen = skipped;
            loop {
                let now = *count.borrow_and_update();
                {
                    let lines = self.log.lines.lock().expect("no test panics with it");
                    if let Some(line) = lines[seen.min(now)..now].iter().find(|line| wanted(line)) {
                        return line.clone();
                    }
                }
                seen = seen.max(now);
                if count.changed().await.is_err() {
                    panic!("the gateway ended: {:#?}", tail(&self.lines()));
                }
            }
        };
        match tokio::time::timeout(SOON, search).await {
            Ok(line) => line,
            Err(_) => panic!("no such line in the log; the last ones: {:#?}", tail(&self.lines())),
        }
    }

    /// The lines of ended requests, once there are `count` of them.
    pub async fn requests_logged(&self, count: usize) -> Vec<Value> {
        let mut changes = self.log.count.clone();
        soon("requests in the log", async {
            loop {
                changes.borrow_and_update();
                let requests: Vec<Value> = self.lines().into_iter().filter(is_request).collect();
                if requests.len() >= count {
                    return requests;
                }
                changes.changed().await.expect("the gateway goes on");
            }
        })
        .await
    }

    /// The line of the request with this `x-request-id`.
    pub async fn request_logged(&self, id: &str) -> Value {
        self.logged(|line| is_request(line) && line["request_id"] == id).await
    }

    /// All series.
    pub async fn metrics(&self) -> Metrics {
        Metrics(get(self.admin, "/metrics").await.text())
    }

    /// Waits until the metrics are as wanted.
    pub async fn metrics_become(&self, wanted: impl Fn(&Metrics) -> bool) -> Metrics {
        let started = Instant::now();
        loop {
            let metrics = self.metrics().await;
            if wanted(&metrics) {
                return metrics;
            }
            assert!(started.elapsed() < SOON, "the metrics stay:\n{}", metrics.0);
            // Polling is the only way to see a metric change; the pause only spares the processor.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// How it ends, once it does.
    pub async fn ended(&mut self, within: Duration) -> ExitStatus {
        let mut count = self.log.count.clone();
        let closed = tokio::time::timeout(within, async { while count.changed().await.is_ok() {} });
        assert!(closed.await.is_ok(), "still running after {within:?}: {:#?}", tail(&self.lines()));
        self.child.wait().expect("its status")
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_none()
    }

    /// Resident memory, bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kilobytes * 1024
    }

    /// Sockets it holds that are connected to this address.
    pub fn sockets_to(&self, address: SocketAddr) -> usize {
        let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc");
        let SocketAddr::V4(v4) = address else { panic!("only IPv4: {address}") };
        let remote = format!("{:08X}:{:04X}", u32::from_le_bytes(v4.ip().octets()), v4.port());
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("/proc");
        let links = descriptors.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let own: Vec<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
        let connected = table.lines().filter(|line| {
            let mut fields = line.split_whitespace();
            let there = fields.nth(2) == Some(remote.as_str());
            there && fields.nth(6).is_some_and(|inode| own.contains(&format!("socket:[{inode}]")))
        });
        connected.count()
    }

    /// Sockets it holds.
    pub fn open_sockets(&self) -> usize {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("/proc");
        descriptors
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    }
}

impl Drop for Tollgate {
    fn drop(&mut self) {
        // Fails only when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    fn read(from: impl std::io::Read + Send + 'static) -> Self {
        let lines: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (counted, count) = watch::channel(0);
        let shared = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                let mut lines = shared.lock().expect("no test panics with it");
                lines.push(line);
                counted.send_replace(lines.len());
            }
        });
        Self { lines, count }
    }
}

fn with_server(server: &str, config: &str) -> String {
    // Two addresses, because two listeners are wanted and equal addresses mean one.
    format!("server:\n  listen: 127.0.0.1:0\n  admin: 127.0.0.2:0\n{server}\n{config}")
}

fn is_request(line: &Value) -> bool {
    line["message"] == "request"
}

fn is_reload(line: &Value) -> bool {
    line["message"].as_str().is_some_and(|message| message.starts_with("configuration "))
}

fn tail(lines: &[Value]) -> &[Value] {
    &lines[lines.len().saturating_sub(10)..]
}

/// One scrape.
pub struct Metrics(pub String);

impl Metrics {
    /// The value of a series, given as it is written (`name{a="b"}`) without `tollgate_`; 0 where there is none.
    pub fn value(&self, series: &str) -> f64 {
        let found = self
            .0
            .lines()
            .filter_map(|line| line.strip_prefix("tollgate_"))
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        found.map_or(0.0, |value| value.parse().expect("a number"))
    }

    /// The sum of all series of a family whose labels contain `label`.
    pub fn sum(&self, family: &str, label: &str) -> f64 {
        let of_family = |line: &&str| {
            line.strip_prefix("tollgate_")
                .and_then(|line| line.strip_prefix(family))
                .is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
        };
        let values = self.0.lines().filter(of_family);
        values.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }
}
