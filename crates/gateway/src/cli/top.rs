//! `top`: what a gateway does now, once a second, on a whole screen.

mod frame;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Args;
use rustix::stdio::{stdin, stdout};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use self::frame::{Line, frame};
use super::client::{Admin, Connection, Heard, Listener, Told};
use super::paint::Colours;
use super::screen::{self, Screen};
use super::{Outcome, Stopped, exit};

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    colours: Colours,
    /// One frame as plain text, and end. So it is anyway where there is no terminal.
    #[arg(long)]
    once: bool,
}

/// What is pressed to leave: q, Ctrl-C and Ctrl-D, as a raw terminal gives them.
const LEAVING: [u8; 4] = [b'q', b'Q', 0x03, 0x04];

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    let is_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    admin.block_on(async {
        let mut listener = Listener::open(&admin, vec![("figures", "true")]).await?;
        if admin.is_json() || options.once || !is_terminal {
            return text(&admin, &mut listener, options.once).await;
        }
        let colours = options.colours.wanted(true);
        watch(&mut listener, colours).await
    })
}

/// Figures as text: one frame, or with `--json` a line for each second.
async fn text(admin: &Admin, listener: &mut Listener<'_>, once: bool) -> Outcome {
    loop {
        match listener.next().await? {
            Heard::Told(Told::Figures(figures)) if admin.is_json() => {
                use std::io::Write;
                let mut out = std::io::stdout().lock();
                let said = writeln!(out, "{figures}").and_then(|()| out.flush());
                match said {
                    Ok(()) if once => return Ok(ExitCode::SUCCESS),
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                        return Ok(ExitCode::SUCCESS);
                    }
                    Err(error) => return Err(Stopped::new(exit::NO, error)),
                }
            }
            Heard::Told(Told::Figures(figures)) => {
                let lines = frame(&figures, usize::MAX, usize::MAX, "");
                return super::print(&lines.into_iter().map(Line::plain).collect::<Vec<_>>().join("\n"));
            }
            Heard::Told(_) | Heard::Back => {}
            Heard::Gone(why, _) if !admin.is_json() || once => {
                return Err(Stopped::new(exit::UNAVAILABLE, why));
            }
            Heard::Gone(why, wait) => eprintln!("top: {why}; trying again in {wait:?}"),
        }
    }
}

/// The whole screen, until somebody leaves.
async fn watch(listener: &mut Listener<'_>, colours: bool) -> Outcome {
    let failed = |error: std::io::Error| Stopped::new(exit::NO, error);
    let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hung_up = signal(SignalKind::hangup()).map_err(failed)?;
    let screen = Screen::enter(stdin(), stdout()).map_err(failed)?;
    let mut keys = screen::keys(stdin()).map_err(failed)?;
    let (mut figures, mut note) = (Value::Null, "waiting for the first second".to_owned());
    loop {
        let (width, height) = screen.size();
        let lines = frame(&figures, width, height, &note);
        let lines: Vec<String> = lines.into_iter().map(|line| line.painted(colours)).collect();
        screen.draw(&lines).map_err(failed)?;
        tokio::select! {
            key = keys.recv() => match key {
                Some(key) if !LEAVING.contains(&key) => {}
                // Or nobody can press any more.
                _ => return Ok(ExitCode::SUCCESS),
            },
            heard = listener.next() => match heard? {
                Heard::Told(Told::Figures(told)) => (figures, note) = (told, String::new()),
                Heard::Told(_) => {}
                Heard::Gone(why, wait) => note = format!("trying again in {wait:?}: {why}"),
                Heard::Back => note = "there again".to_owned(),
            },
            _ = resized.recv() => {}
            _ = terminated.recv() => return Ok(ended_by(SignalKind::terminate())),
            _ = interrupted.recv() => return Ok(ended_by(SignalKind::interrupt())),
            _ = hung_up.recv() => return Ok(ended_by(SignalKind::hangup())),
        }
    }
}

/// As a shell says it of what a signal ended.
fn ended_by(kind: SignalKind) -> ExitCode {
    ExitCode::from(128 + u8::try_from(kind.as_raw_value()).unwrap_or_default())
}
