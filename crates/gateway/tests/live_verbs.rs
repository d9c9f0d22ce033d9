//! The verbs `explain`, `top` and `tail`, run as people and scripts run them.

mod support;

use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;
use support::{Provider, Proxy, Redis, SOON, Tollgate, json_answer, post, question, refusing, request};
use tokio::sync::mpsc;

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}"#;

async fn start(provider: &Provider, redis: Option<&Redis>) -> Tollgate {
    let store = redis.map_or_else(String::new, |redis| {
        format!("dependencies: {{ redis: {{ url: '{}', timeout: 5s }} }}\n", redis.url())
    });
    let config = format!(
        "{store}users:\n  - {{ name: alice, tier: free, keys: [sk-alice] }}\n  - {{ name: bob, keys: [sk-bob] }}\n\
         tiers: {{ free: {{ per: user, limit: 2/day }} }}\nsettings: {{ state: none }}\n\
         limits: [{{ name: shut, match: {{ user: bob, model: other }}, deny: true }}]\n\
         models:\n  - {{ name: chat, providers: [&p {{ type: openai, url: 'http://{}' }}] }}\n  \
         - {{ name: other, providers: [*p] }}\n",
        provider.address
    );
    let gateway = Tollgate::start_with("  admin_key: sesame\n", &config, &[]).await;
    if redis.is_some() {
        gateway.metrics_become(|metrics| metrics.value("rate_limit_redis_connected") == 1.0).await;
    }
    gateway
}

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "", ANSWER)).await
}

async fn chat(address: SocketAddr, key: &str, model: &str) -> u16 {
    let bearer = format!("Bearer {key}");
    let body = question(false).replace("\"chat\"", &format!("\"{model}\""));
    let headers = [("Authorization", bearer.as_str())];
    post(address, &request("POST", "/v1/chat/completions", &headers, body.as_bytes())).await.status
}

fn command(gateway: &Tollgate, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(arguments).env_clear();
    command.env("TOLLGATE_URL", format!("http://{}", gateway.admin)).env("TOLLGATE_ADMIN_KEY", "sesame");
    command
}

/// Exit code, standard output, standard error.
async fn run(gateway: &Tollgate, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = command(gateway, arguments);
    let ran =
        tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (ran.status.code(), text(ran.stdout), text(ran.stderr))
}

/// A verb that goes on; killed when dropped.
struct Running {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    complaints: mpsc::UnboundedReceiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
        let lines = lines_of(child.stdout.take().expect("a pipe"));
        let complaints = lines_of(child.stderr.take().expect("a pipe"));
        Self { child, lines, complaints }
    }

    async fn line(&mut self) -> String {
        support::soon("a line", self.lines.recv()).await.expect("it goes on")
    }

    async fn complaint(&mut self) -> String {
        support::soon("a complaint", self.complaints.recv()).await.expect("it goes on")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(from: impl Read + Send + 'static) -> mpsc::UnboundedReceiver<String> {
    let (send, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        use std::io::BufRead;
        for line in std::io::BufReader::new(from).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

#[tokio::test]
async fn explain_agrees_with_what_a_request_gets_and_spends_nothing() {
    for redis in [None, Some(Redis::start())] {
        let provider = provider().await;
        let gateway = start(&provider, redis.as_ref()).await;
        let counters = || {
            let redis = redis.as_ref()?;
            let mut keys: Vec<String> = redis.cli(&["KEYS", "*:rl:*"]).lines().map(str::to_owned).collect();
            keys.sort();
            Some(keys.iter().map(|key| (key.clone(), redis.cli(&["DUMP", key]))).collect::<Vec<_>>())
        };
        for (user, key, model) in [
            ("alice", "sk-alice", "chat"),
            ("alice", "sk-alice", "chat"),
            ("alice", "sk-alice", "chat"),
            ("bob", "sk-bob", "chat"),
            ("bob", "sk-bob", "other"),
            ("bob", "sk-bob", "nothing"),
        ] {
            let before = counters();
            for _ in 0..3 {
                let said = run(&gateway, &["explain", "--user", user, "--model", model, "--json"]).await;
                let document: Value = serde_json::from_str(&said.1).expect("JSON");
                assert_eq!(said.0, Some(i32::from(document["allowed"] != true)), "{}", said.2);
            }
            assert_eq!(counters(), before, "{user}");
            let (code, out, err) = run(&gateway, &["explain", "--user", user, "--model", model]).await;
            let status = chat(gateway.data, key, model).await;
            assert_eq!(code, Some(i32::from(status != 200)), "{user} {model} {status}: {out}{err}");
            let verdict = if status == 200 { "admitted: user " } else { "refused: user " };
            assert!(out.starts_with(verdict), "{out}");
        }
        let (_, out, _) = run(&gateway, &["explain", "--user", "alice", "--model", "chat"]).await;
        let row = out.lines().find(|line| line.starts_with("free-requests-day")).expect("its line");
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(&cells[1..5], ["requests", "2/day", "2", "0"], "{row}");
        assert!(
            row.contains("full, room in")
                && cells.last().is_some_and(|place| place.contains("tollgate.yml:")),
            "{row}"
        );
        assert!(out.contains("not met: `model` is chat, the rule is for other"), "{out}");
    }
}

#[tokio::test]
async fn what_live_verbs_cannot_do_is_said_by_how_they_exit() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    let (_socket, gone) = refusing();
    let gone = format!("http://{gone}");
    for verb in [&["explain", "--model", "chat"][..], &["top"], &["top", "--json"], &["tail"]] {
        let (code, out, err) = run(&gateway, &[verb, &["--url", &gone]].concat()).await;
        assert_eq!((code, out.as_str()), (Some(69), ""), "{verb:?}: {err}");
        assert!(err.contains("cannot be asked"), "{verb:?}: {err}");
        let (code, _, err) = run(&gateway, &[verb, &["--admin-key", "wrong"]].concat()).await;
        assert!(code == Some(69) && err.contains("the admin key is wrong"), "{verb:?}: {err}");
    }
    for (verb, code, why) in [
        (&["explain"][..], 2, "--model"),
        (&["explain", "--model", "chat", "--user", "alice", "--key-id", "x"], 2, "cannot be used with"),
        (&["explain", "--model", "chat", "--user", "zoe"], 1, "there is no user `zoe`"),
        (&["explain", "--model", "chat", "--ip", "here"], 1, "ip: is no address"),
        (&["tail", "--status", "ok"], 1, "status: is neither a status"),
        (&["tail", "--colour"], 2, "unexpected argument"),
        (&["top", "everything"], 2, "unexpected argument"),
    ] {
        let (exit, out, err) = run(&gateway, verb).await;
        assert_eq!((exit, out.as_str()), (Some(code), ""), "{verb:?}: {err}");
        assert!(err.contains(why), "{verb:?}: {err}");
    }
}

#[tokio::test]
async fn tail_prints_requests_as_they_end() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    let mut all = Running::start(command(&gateway, &["tail"]));
    let mut refused = Running::start(command(&gateway, &["tail", "--refused", "--user", "alice"]));
    for tail in [&mut all, &mut refused] {
        // Printed once it listens: from then on it misses nothing.
        let header = tail.line().await;
        assert!(header.starts_with("TIME") && header.contains("USER"), "{header}");
    }
    for key in ["sk-bob", "sk-alice", "sk-alice", "sk-alice"] {
        chat(gateway.data, key, "chat").await;
    }
    let first = all.line().await;
    let cells: Vec<&str> = first.split_whitespace().collect();
    assert_eq!(&cells[1..4], ["200", "bob", "chat"], "{first}");
    assert!(first.contains("5+7") && first.ends_with(" /v1/chat/completions"), "{first}");
    for status in ["200", "200", "429"] {
        let line = all.line().await;
        assert!(line.contains(&format!(" {status} ")), "{line}");
        assert_eq!(line.contains("free-requests-day"), status == "429", "{line}");
        assert!(!line.contains('\u{1b}'), "no colours where nobody looks: {line:?}");
    }
    assert!(refused.line().await.ends_with("free-requests-day"));

    let mut json = Running::start(command(&gateway, &["tail", "--json", "--status", "4xx"]));
    let line = loop {
        // Nothing says when it listens.
        chat(gateway.data, "sk-alice", "chat").await;
        if let Ok(line) = tokio::time::timeout(Duration::from_millis(50), json.lines.recv()).await {
            break line.expect("it goes on");
        }
    };
    let document: Value = serde_json::from_str(&line).expect("a document in each line");
    assert_eq!((&document["status"], &document["rule"]), (&429.into(), &"free-requests-day".into()));
}

#[tokio::test]
async fn tail_goes_on_when_the_gateway_is_back() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    let proxy = Proxy::start(gateway.admin).await;
    let url = format!("http://{}", proxy.address);
    let mut tail = Running::start(command(&gateway, &["tail", "--url", &url]));
    tail.line().await;
    proxy.reset();
    let gone = tail.complaint().await;
    assert!(gone.starts_with("tail: ") && gone.contains("trying again in"), "{gone}");
    while !tail.complaint().await.contains("listening again") {}
    chat(gateway.data, "sk-bob", "chat").await;
    assert!(tail.line().await.contains(" bob "));
}

#[tokio::test]
async fn tail_ends_when_nobody_reads() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    let mut child = command(&gateway, &["tail"]).stdout(Stdio::piped()).spawn().expect("it runs");
    drop(child.stdout.take());
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("its status") {
            break status;
        }
        if started.elapsed() > SOON {
            let _ = child.kill();
            panic!("it goes on");
        }
        chat(gateway.data, "sk-bob", "chat").await;
    };
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn top_is_text_where_there_is_no_terminal() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    for _ in 0..3 {
        chat(gateway.data, "sk-alice", "chat").await;
    }
    for arguments in [&["top"][..], &["top", "--once"]] {
        let (code, out, err) = run(&gateway, arguments).await;
        assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
        assert!(out.starts_with("tollgate ") && !out.contains('\u{1b}'), "{out}");
        assert!(
            out.lines().any(|line| line.starts_with("user:alice") && line.contains("2/2 requests")),
            "{out}"
        );
    }
    let (code, out, _) = run(&gateway, &["top", "--once", "--json"]).await;
    let document: Value = serde_json::from_str(&out).expect("one document");
    assert_eq!((code, &document["requests"]["total"]), (Some(0), &3.into()));
    let mut stream = Running::start(command(&gateway, &["top", "--json"]));
    for _ in 0..2 {
        let document: Value = serde_json::from_str(&stream.line().await).expect("a document in each line");
        assert_eq!(document["requests"]["refused"], 1);
    }
}

/// `top` on a terminal of its own, and both ends of that.
struct OnTerminal {
    child: Child,
    ours: OwnedFd,
    theirs: OwnedFd,
    seen: Arc<Mutex<String>>,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a terminal");
        let name = ptsname(&ours, Vec::new()).expect("its name");
        let theirs = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other end");
        let size = Winsize { ws_row: 20, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&theirs, size).expect("a size");
        let end = || Stdio::from(theirs.try_clone().expect("a descriptor"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("it runs");
        let (seen, reading) = (Arc::<Mutex<String>>::default(), ours.try_clone().expect("a descriptor"));
        let shared = seen.clone();
        std::thread::spawn(move || {
            let mut some = [0; 4_096];
            while let Ok(count @ 1..) = rustix::io::read(&reading, &mut some) {
                shared
                    .lock()
                    .expect("no test panics with it")
                    .push_str(&String::from_utf8_lossy(&some[..count]));
            }
        });
        Self { child, ours, theirs, seen }
    }

    fn seen(&self) -> String {
        self.seen.lock().expect("no test panics with it").clone()
    }

    /// Waits until that was shown.
    async fn shows(&self, wanted: &str) {
        let started = Instant::now();
        while !self.seen().contains(wanted) {
            assert!(started.elapsed() < SOON, "no {wanted}: {:?}", self.seen());
            // What a terminal shows can only be looked at again; the pause only spares the processor.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn press(&self, keys: &[u8]) {
        rustix::io::write(&self.ours, keys).expect("keys");
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs).expect("a terminal").local_modes.contains(LocalModes::ICANON)
    }

    /// How it ends, once it does, and that the terminal is as it was.
    async fn ended(mut self) -> Option<i32> {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("its status") {
                break status;
            }
            assert!(started.elapsed() < SOON, "it goes on: {:?}", self.seen());
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(!self.is_raw(), "keys are as before");
        self.shows("\u{1b}[?1049l").await;
        assert!(self.seen().ends_with("\u{1b}[?7h\u{1b}[?25h\u{1b}[?1049l"), "{:?}", self.seen());
        status.code()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // Fails only when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn top_borrows_the_terminal_and_gives_it_back() {
    let provider = provider().await;
    let gateway = start(&provider, None).await;
    for _ in 0..3 {
        chat(gateway.data, "sk-alice", "chat").await;
    }
    type Leave = fn(&OnTerminal);
    let ways: [(Leave, i32); 4] = [
        (|top| top.press(b"xq"), 0),
        (|top| top.press(b"\x03"), 0),
        (|top| kill_process(Pid::from_child(&top.child), Signal::TERM).expect("a signal"), 143),
        (|top| kill_process(Pid::from_child(&top.child), Signal::HUP).expect("a signal"), 129),
    ];
    for (number, (leave, code)) in ways.into_iter().enumerate() {
        let mut command = command(&gateway, &["top"]);
        if number == 0 {
            command.env("NO_COLOR", "1");
        }
        let top = OnTerminal::start(command);
        top.shows("2/2 requests").await;
        assert!(top.is_raw() && top.seen().starts_with("\u{1b}[?1049h"), "{:?}", top.seen());
        // Alice has used up what she has: that is red, where colours are wanted.
        assert_eq!(top.seen().contains("\u{1b}[31muser:alice"), number > 0, "{:?}", top.seen());
        leave(&top);
        assert_eq!(top.ended().await, Some(code), "{number}");
    }
}
