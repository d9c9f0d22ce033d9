//! A redis-server of a test's own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::SOON;

/// Another program may take the free port before redis-server does.
const STARTS_MAX: usize = 5;

/// A redis-server without persistence, in a folder of its own; killed when dropped.
pub struct Redis {
    child: Child,
    dir: tempfile::TempDir,
    arguments: Vec<String>,
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
}

impl Redis {
    /// Starts one, and waits until it answers.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with more arguments: `["--requirepass", "secret"]`.
    pub fn start_with(arguments: &[&str]) -> Self {
        for _ in 0..STARTS_MAX {
            let free = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
            let port = free.local_addr().expect("its address").port();
            drop(free);
            let dir = tempfile::tempdir().expect("a temporary directory");
            let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            let child = spawn(port, &dir, &arguments);
            let mut this = Self { child, dir, arguments, port };
            if this.answers() {
                return this;
            }
        }
        panic!("redis-server does not start");
    }

    /// `redis://127.0.0.1:PORT/0`.
    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Sends a command, and gives back the answer as `redis-cli` prints it when nobody looks: items of a list a line
    /// each, nothing for nil. Panics on an error.
    pub fn cli(&self, command: &[&str]) -> String {
        match ask(self.address(), command) {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => panic!("{command:?}: {error}"),
            Err(error) => panic!("{command:?}: redis-server does not answer: {error}"),
        }
    }

    /// Sends the process a signal: `Signal::STOP` freezes it, `Signal::CONT` lets it go on.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process takes a signal");
    }

    /// Ends it at once. The port stays its own only by luck: whoever asks it is refused.
    pub fn kill(&mut self) {
        // Fails only when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again on the same port, empty, after [`Redis::kill`].
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.port, &self.dir, &self.arguments);
        assert!(self.answers(), "redis-server does not start again");
    }

    /// Waits until it answers anything at all; `false`: it has ended.
    fn answers(&mut self) -> bool {
        let started = Instant::now();
        while ask(self.address(), &["PING"]).is_err() {
            if self.child.try_wait().expect("its status").is_some() {
                return false;
            }
            assert!(started.elapsed() < SOON, "redis-server does not answer");
            // Polling is the only way to see a port open; the pause only spares the processor.
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(port: u16, dir: &tempfile::TempDir, arguments: &Vec<String>) -> Child {
    Command::new("redis-server")
        .args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
        ])
        .arg(dir.path())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("redis-server is needed for this test: {error}"))
}

/// One command over a connection of its own; the inner error is the server's.
fn ask(address: SocketAddr, command: &[&str]) -> std::io::Result<Result<String, String>> {
    let stream = TcpStream::connect_timeout(&address, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut request = format!("*{}\r\n", command.len());
    for part in command {
        request += &format!("${}\r\n{part}\r\n", part.len());
    }
    (&stream).write_all(request.as_bytes())?;
    read(&mut BufReader::new(stream))
}

/// One value of RESP2.
fn read(from: &mut BufReader<TcpStream>) -> std::io::Result<Result<String, String>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let line = line.trim_end();
    let (kind, rest) = line.split_at(1);
    let length = || rest.parse::<i64>().expect("a length");
    Ok(match kind {
        "+" | ":" => Ok(rest.to_owned()),
        "-" => Err(rest.to_owned()),
        "$" => match usize::try_from(length()) {
            Ok(length) => {
                let mut bytes = vec![0; length + 2];
                from.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Err(_) => Ok(String::new()),
        },
        "*" => {
            let mut items = Vec::new();
            for _ in 0..length() {
                match read(from)? {
                    Ok(item) => items.push(item),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(items.join("\n"))
        }
        other => panic!("{other:?} begins no value of RESP2"),
    })
}
