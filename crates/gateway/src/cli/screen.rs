//! The whole terminal, borrowed: raw keys, an own screen, and everything as it was before, however this ends.
//!
//! A few control sequences (ECMA-48 and those of xterm, which every terminal in use knows) and `termios` by rustix, which is
//! here anyway.

use std::io;
use std::os::fd::BorrowedFd;
use std::panic;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

/// Another screen beside the one with the history, no cursor, no line breaks of the terminal's own.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l\u{1b}[?7l";
const LEAVE: &str = "\u{1b}[?7h\u{1b}[?25h\u{1b}[?1049l";
/// Keys pressed and not looked at.
const KEYS_MAX: usize = 16;
/// Of a terminal that does not know its size.
const SIZE: (usize, usize) = (80, 24);

/// A borrowed terminal; dropped, it is as it was.
pub(super) struct Screen {
    terminal: Terminal,
}

/// Where keys come from, where a screen is, and how it was.
#[derive(Clone)]
struct Terminal {
    input: BorrowedFd<'static>,
    output: BorrowedFd<'static>,
    before: Termios,
}

impl Screen {
    /// Borrows the terminal that these are.
    ///
    /// # Errors
    /// When they are none.
    pub(super) fn enter(input: BorrowedFd<'static>, output: BorrowedFd<'static>) -> io::Result<Self> {
        let before = tcgetattr(input)?;
        let mut raw = before.clone();
        raw.make_raw();
        let this = Self { terminal: Terminal { input, output, before } };
        tcsetattr(input, OptionalActions::Now, &raw)?;
        write(output, ENTER)?;
        // What a panic says would be said on a screen that is about to go.
        let (hook, terminal) = (panic::take_hook(), this.terminal.clone());
        panic::set_hook(Box::new(move |panicked| {
            terminal.restore();
            hook(panicked);
        }));
        Ok(this)
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(self.terminal.output) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => SIZE,
        }
    }

    /// Shows these lines in place of what is there, in one write: a frame is never seen half.
    pub(super) fn draw(&self, lines: &[String]) -> io::Result<()> {
        let mut frame = String::from("\u{1b}[H");
        for (index, line) in lines.iter().enumerate() {
            frame.push_str(if index == 0 { "" } else { "\r\n" });
            frame.push_str(line);
            frame.push_str("\u{1b}[K");
        }
        frame.push_str("\u{1b}[J");
        write(self.terminal.output, &frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.terminal.restore();
    }
}

/// Bytes of keys as they are pressed. The thread that reads them waits in the system for the next one, and ends with the
/// process.
pub(super) fn keys(input: BorrowedFd<'static>) -> io::Result<mpsc::Receiver<u8>> {
    let (send, keys) = mpsc::channel(KEYS_MAX);
    let read = move || {
        let mut byte = [0];
        while let Ok(1) = rustix::io::read(input, &mut byte) {
            if send.blocking_send(byte[0]).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(read)?;
    Ok(keys)
}

impl Terminal {
    /// As it was before. What fails now cannot be told anybody.
    fn restore(&self) {
        let _ = write(self.output, LEAVE);
        let _ = tcsetattr(self.input, OptionalActions::Now, &self.before);
    }
}

/// Past the standard library's lock, which a panic may hold.
fn write(output: BorrowedFd<'_>, text: &str) -> io::Result<()> {
    let mut left = text.as_bytes();
    while !left.is_empty() {
        match rustix::io::write(output, left) {
            Ok(count) => left = &left[count.min(left.len())..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::{Duration, Instant};

    use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    /// Both ends of a terminal, that of the program for ever.
    fn terminal() -> (OwnedFd, BorrowedFd<'static>) {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a terminal");
        let name = ptsname(&ours, Vec::new()).expect("its name");
        let theirs = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other end");
        let theirs: &'static OwnedFd = Box::leak(Box::new(theirs));
        (ours, theirs.as_fd())
    }

    /// What was written there, until the terminal is left.
    fn read(terminal: &OwnedFd) -> String {
        fcntl_setfl(terminal, OFlags::NONBLOCK).expect("a terminal");
        let (mut seen, started) = (Vec::new(), Instant::now());
        while !seen.ends_with(LEAVE.as_bytes()) && started.elapsed() < Duration::from_secs(10) {
            let mut some = [0; 256];
            match rustix::io::read(terminal, &mut some) {
                Ok(count) => seen.extend(&some[..count]),
                // The system hands it over in its own time.
                Err(_) => std::thread::yield_now(),
            }
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    fn is_raw(terminal: BorrowedFd<'_>) -> bool {
        !tcgetattr(terminal).expect("a terminal").local_modes.contains(LocalModes::ICANON)
    }

    #[test]
    fn a_terminal_is_given_back_after_a_panic_too() {
        for panics in [false, true] {
            let (ours, theirs) = terminal();
            let borrowed = std::thread::spawn(move || {
                let screen = Screen::enter(theirs, theirs).expect("a terminal");
                assert!(is_raw(theirs));
                screen.draw(&["drawn".to_owned()]).expect("it can be drawn on");
                assert!(!panics, "on purpose");
            });
            assert_eq!(borrowed.join().is_err(), panics);
            assert!(!is_raw(theirs), "{panics}");
            let seen = read(&ours);
            assert!(seen.starts_with(ENTER) && seen.contains("drawn") && seen.ends_with(LEAVE), "{seen:?}");
        }
    }
}
