//! What is in `deploy/` and said in `docs/`: files that belong together, and three gateways behind a real nginx.

mod support;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::{
    Conn, Gate, Metrics, Provider, Redis, SOON, Step, Tollgate, chat, chat_config, chunk, get, json_answer,
    openai, post, question, request, sse,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every `tollgate_…` of a text that may name a series.
fn series_named(text: &str) -> BTreeSet<String> {
    let part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let words = text.match_indices("tollgate_").filter(|(at, _)| !text[..*at].ends_with(part));
    let name = |(at, _): (usize, &str)| {
        let rest = &text[at..];
        rest[..rest.find(|c: char| !part(c)).unwrap_or(rest.len())].to_owned()
    };
    words.map(name).collect()
}

/// The series that `metrics.rs` registers, as they are scraped: histograms without what is appended to them.
fn series_registered() -> BTreeSet<String> {
    let source = read("crates/gateway/src/metrics.rs");
    let mut found = BTreeSet::new();
    let mut group = "";
    for statement in source.split(';') {
        if statement.contains("sub_registry_with_prefix(\"rate_limit\")") {
            group = "rate_limit_";
        } else if statement.contains("let r = &mut registry") {
            group = "";
        }
        let Some((_, arguments)) = statement.split_once(".register") else {
            continue;
        };
        let Some(name) = arguments.split('"').nth(1) else {
            continue;
        };
        let unit = if arguments.contains("Unit::Seconds") { "_seconds" } else { "" };
        found.insert(format!("tollgate_{group}{name}{unit}"));
    }
    assert!(found.len() > 20, "{found:?}");
    found.insert("tollgate_log_lines_dropped".to_owned());
    found
}

/// A scraped name without what its type appends.
fn family(name: &str) -> &str {
    let endings = ["_total", "_bucket", "_count", "_sum", "_info"];
    endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name)
}

#[test]
fn every_series_that_is_named_exists() {
    let registered = series_registered();
    let exists = |name: &str| registered.contains(name) || registered.contains(family(name));
    let mut documents = vec!["deploy/prometheus/alerts.yml".to_owned(), "README.md".to_owned()];
    for entry in std::fs::read_dir(root().join("docs")).expect("docs") {
        let name = entry.expect("an entry").file_name().into_string().expect("a name");
        documents.extend(name.ends_with(".md").then(|| format!("docs/{name}")));
    }
    for document in documents {
        for name in series_named(&read(&document)) {
            assert!(name == "tollgate_" || exists(&name), "{document} names {name}, which nothing counts");
        }
    }
}

#[test]
fn every_series_is_explained() {
    let explained: BTreeSet<String> =
        series_named(&read("docs/metrics.md")).iter().map(|name| family(name).to_owned()).collect();
    for name in series_registered() {
        assert!(explained.contains(family(&name)), "docs/metrics.md says nothing of {name}");
    }
}

#[test]
fn every_alert_has_its_place_in_the_runbook() {
    let (alerts, runbook) = (read("deploy/prometheus/alerts.yml"), read("docs/operations.md"));
    let names: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in &names {
        assert!(runbook.contains(&format!("### {name}\n")), "docs/operations.md has no runbook for {name}");
    }
    for heading in runbook.lines().filter_map(|line| line.strip_prefix("### Tollgate")) {
        assert!(
            names.contains(&format!("Tollgate{heading}").as_str()),
            "there is no alert Tollgate{heading}"
        );
    }
}

/// The texts of all Rust and Lua files below a folder.
fn sources(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let text = |path: PathBuf| match path.extension().and_then(|ending| ending.to_str()) {
        _ if path.is_dir() => sources(&path),
        Some("rs" | "lua") => std::fs::read_to_string(&path).expect("a text"),
        _ => String::new(),
    };
    entries.map(text).collect()
}

#[test]
fn every_command_that_is_sent_is_granted() {
    let text =
        ["crates/limiter/src", "crates/gateway/src"].map(|crate_| sources(&root().join(crate_))).concat();
    let users = read("deploy/redis/users.acl");
    let gateway = users.lines().find(|line| line.starts_with("user tollgate ")).expect("the gateway's user");
    let granted: BTreeSet<&str> =
        gateway.split(" +").skip(1).map(|word| word.split('|').next().expect("one")).collect();
    let sent: BTreeSet<String> = ["redis.call('", "redis.pcall('", "cmd(\""]
        .into_iter()
        .flat_map(|before| text.split(before).skip(1))
        .map(|rest| rest.chars().take_while(char::is_ascii_uppercase).collect::<String>().to_lowercase())
        .filter(|command| !command.is_empty())
        .collect();
    assert!(sent.len() > 20, "{sent:?}");
    for command in &sent {
        // Sentinels have users of their own.
        assert!(
            command == "sentinel" || granted.contains(command.as_str()),
            "users.acl does not grant {command}"
        );
    }
}

/// The services of a compose file: name and text.
fn services(text: &str) -> Vec<(&str, String)> {
    let inside = text.lines().skip_while(|line| *line != "services:").skip(1);
    let mut found: Vec<(&str, String)> = Vec::new();
    for line in inside.take_while(|line| line.is_empty() || line.starts_with([' ', '#'])) {
        match line.strip_prefix("  ").filter(|rest| !rest.starts_with([' ', '#'])) {
            Some(rest) => found.push((rest.split(':').next().expect("a name"), format!("{line}\n"))),
            None => found.last_mut().into_iter().for_each(|(_, text)| *text += &format!("{line}\n")),
        }
    }
    found
}

#[test]
fn compose_files_name_what_exists_and_harden_it() {
    let made = Command::new("sh").arg(root().join("deploy/secrets")).output().expect("sh runs");
    let made = String::from_utf8(made.stdout).expect("UTF-8");
    let base = read("deploy/compose.yml");
    let known: Vec<&str> = services(&base).into_iter().map(|(name, _)| name).collect();
    assert_eq!(known, ["nginx", "tollgate-1", "tollgate-2", "tollgate-3", "redis"]);
    for file in ["compose.yml", "compose.sentinel.yml", "compose.cluster.yml"] {
        let text = read(&format!("deploy/{file}"));
        for wanted in
            ["read_only: true", "cap_drop: [ALL]", "no-new-privileges:true", "pids_limit:", "healthcheck:"]
        {
            assert!(text.contains(wanted), "{file}: {wanted}");
        }
        for (name, service) in services(&text) {
            let changes = file != "compose.yml" && known.contains(&name);
            assert!(changes || service.contains("<<: *"), "{file}: {name} is hardened by nothing");
            assert!(!service.contains("privileged") && !service.contains("user: root"), "{file}: {name}");
        }
        for variable in text.split("${").skip(1).filter_map(|rest| rest.split([':', '}', '-']).next()) {
            assert!(
                made.contains(&format!("{variable}=")),
                "{file}: deploy/secrets says nothing of {variable}"
            );
        }
        for mounted in text.split("\"./").skip(1).filter_map(|rest| rest.split(':').next()) {
            assert!(root().join("deploy").join(mounted).exists(), "{file}: there is no {mounted}");
        }
    }
    // No two of them are the same.
    let values: BTreeSet<&str> = made.lines().filter_map(|line| Some(line.split_once('=')?.1)).collect();
    assert_eq!(values.len(), 7, "six passwords, and nothing for what is to be filled in");
}

#[test]
fn the_gateways_of_the_compose_file_accept_their_configuration() {
    let urls = ["redis://tollgate:p@10.89.1.20:6379/0", "redis+cluster://tollgate:p@10.89.1.20:6379"];
    let sentinel = "redis+sentinel://tollgate:p@10.89.1.31:26379/mymaster/0?sentinel_username=tollgate&sentinel_password=p";
    for url in urls.into_iter().chain([sentinel]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.args(["check", "--offline", "--deny-warnings"]).arg(root().join("deploy/tollgate.yml"));
        let key = "an-admin-key-of-some-length";
        command.env_clear().env("TOLLGATE_REDIS_URL", url).env("TOLLGATE_ADMIN_KEY", key);
        command.envs([("OPENAI_API_KEY", "sk-o"), ("ALICE_KEY", "sk-alice"), ("BOB_KEY", "sk-bob")]);
        let output = command.output().expect("the binary runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

/// nginx as deployed, before gateways of a test.
struct Nginx {
    child: Child,
    dir: tempfile::TempDir,
    address: SocketAddr,
}

impl Nginx {
    async fn start(gateways: &[&Tollgate]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = free.local_addr().expect("its address");
        drop(free);
        let mut text = read("deploy/nginx.conf");
        for (number, gateway) in gateways.iter().enumerate() {
            text = text.replace(&format!("tollgate-{}:8080", number + 1), &gateway.data.to_string());
        }
        text = text.replace("listen 8080", &format!("listen {address}"));
        text = text.replace("/tmp/", &format!("{}/", dir.path().display()));
        text = text.replace("/dev/stdout", &dir.path().join("access").display().to_string());
        let file = dir.path().join("nginx.conf");
        std::fs::write(&file, text).expect("it can be written");
        let child = Command::new("nginx")
            .args(["-g", "daemon off; master_process off;", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("nginx is needed for this test: {error}"));
        let this = Self { child, dir, address };
        let ready = async {
            while Conn::try_open(address).await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, ready).await.expect("nginx listens");
        assert_eq!(get(address, "/nginx-health").await.status, 200);
        this
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("access")).expect("nginx writes a log")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Three gateways with one Redis.
async fn three(redis: &Redis, provider: &Provider, limits: &str) -> Vec<Tollgate> {
    let config = format!(
        "auth: optional\ndependencies:\n  redis:\n    url: {}\n    timeout: 5s\nlimits:\n{limits}{}",
        redis.url(),
        chat_config(&[openai(provider)])
    );
    let mut gateways = Vec::new();
    for _ in 0..3 {
        gateways.push(Tollgate::start_with("  trusted_proxies: [127.0.0.1]\n", &config, &[]).await);
    }
    gateways
}

fn answer() -> Vec<u8> {
    let body = r#"{"object":"chat.completion","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;
    json_answer("200 OK", "", body)
}

/// The status of one request from an address of this machine that is no proxy's, with a header that lies about it.
async fn ask_from(address: [u8; 4], to: SocketAddr, claimed: &str) -> u16 {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from((address, 0))).expect("all of 127/8 is ours");
    let mut stream = socket.connect(to).await.expect("nginx accepts");
    let body = question(false);
    let headers =
        [("X-Forwarded-For", claimed), ("Connection", "close"), ("Content-Type", "application/json")];
    let bytes = request("POST", "/v1/chat/completions", &headers, body.as_bytes());
    stream.write_all(&bytes).await.expect("nginx reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("an answer");
    text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

#[tokio::test]
async fn three_gateways_behind_nginx_are_one() {
    let redis = Redis::start();
    let provider = Provider::answering(answer()).await;
    let limits = "  - { name: user, match: { authenticated: true }, per: user, limit: 30/366 days }\n  \
                  - { name: ip, match: { authenticated: false }, per: ip, limit: 3/366 days }\n";
    let mut gateways = three(&redis, &provider, limits).await;
    let nginx = Nginx::start(&gateways.iter().collect::<Vec<_>>()).await;
    let mut statuses = Vec::new();
    for _ in 0..40 {
        statuses.push(post(nginx.address, &chat(&question(false))).await.status);
    }
    let admitted = statuses.iter().filter(|status| **status == 200).count();
    assert_eq!((admitted, statuses.iter().filter(|s| **s == 429).count()), (30, 10), "{statuses:?}");
    assert_eq!(provider.hits(), 30);
    for gateway in &gateways {
        let metrics: Metrics = gateway.metrics().await;
        assert!(metrics.sum("http_requests_total", "chat") >= 5.0, "nginx spreads requests: {}", nginx.log());
    }
    // An address is what nginx saw, whatever the caller says.
    let mut from_one = Vec::new();
    for claimed in ["203.0.113.1", "203.0.113.2", "127.0.0.1", "203.0.113.3, 10.0.0.1"] {
        from_one.push(ask_from([127, 0, 0, 9], nginx.address, claimed).await);
    }
    assert_eq!(from_one, [200, 200, 200, 429]);
    assert_eq!(ask_from([127, 0, 0, 10], nginx.address, "203.0.113.1").await, 200);
    // Operators' pages are not reachable from outside.
    assert_eq!(get(nginx.address, "/metrics").await.status, 404);
    // One of three is gone, and nobody notices.
    drop(gateways.remove(1));
    for last in 11..31 {
        assert_eq!(ask_from([127, 0, 1, last], nginx.address, "").await, 200, "{}", nginx.log());
    }
}

#[tokio::test]
async fn a_stream_comes_through_nginx_event_by_event() {
    let redis = Redis::start();
    let gate = Gate::new();
    let steps = vec![
        Step::Send([sse::head(), chunk(sse::delta("first").as_bytes())].concat()),
        Step::Wait(gate.clone()),
        Step::Send([chunk(sse::delta("last").as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")].concat()),
    ];
    let provider = Provider::always(steps).await;
    let limits = "  - { name: user, per: user, limit: 20 concurrent }\n";
    let gateways = three(&redis, &provider, limits).await;
    let nginx = Nginx::start(&gateways.iter().collect::<Vec<_>>()).await;
    let mut caller = Conn::ask(nginx.address, &chat(&question(true))).await;
    assert_eq!(caller.head().await.status, 200);
    // The provider has sent no more than this, and waits.
    caller.until("first").await;
    gate.open();
    caller.until("[DONE]").await;
    // A caller who leaves ends the call at the provider, through both.
    let gate = Gate::new();
    let waiting = gate.clone();
    let silent = Provider::start(move |_| {
        vec![
            Step::Send([sse::head(), chunk(sse::delta("first").as_bytes())].concat()),
            Step::Wait(waiting.clone()),
        ]
    })
    .await;
    let gateways = three(&redis, &silent, limits).await;
    let nginx = Nginx::start(&gateways.iter().collect::<Vec<_>>()).await;
    let mut caller = Conn::ask(nginx.address, &chat(&question(true))).await;
    caller.head().await;
    caller.until("first").await;
    caller.leave();
    silent.request(0).await.closed().await;
}
