//! The whole terminal, borrowed: raw keys, an own screen, and everything as it was before, however this ends.
//!
//! A few control sequences (ECMA-48 and those of xterm, which every terminal in use knows) and `termios` by rustix, which is
//! here anyway.

use std::io;
use std::panic;

use rustix::stdio::{stdin, stdout};
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
    before: Termios,
}

impl Screen {
    /// Borrows the terminal that standard input and output are.
    ///
    /// # Errors
    /// When they are none.
    pub(super) fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        let this = Self { before: before.clone() };
        write(ENTER)?;
        // What a panic says would be said on a screen that is about to go.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |panicked| {
            restore(&before);
            hook(panicked);
        }));
        Ok(this)
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(stdout()) {
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
        write(&frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore(&self.before);
    }
}

/// Bytes of keys as they are pressed. The thread that reads them waits in the system for the next one, and ends with the
/// process.
pub(super) fn keys() -> io::Result<mpsc::Receiver<u8>> {
    let (send, keys) = mpsc::channel(KEYS_MAX);
    let read = move || {
        let mut byte = [0];
        while let Ok(1) = rustix::io::read(stdin(), &mut byte) {
            if send.blocking_send(byte[0]).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(read)?;
    Ok(keys)
}

/// As it was before. What fails now cannot be told anybody.
fn restore(before: &Termios) {
    let _ = write(LEAVE);
    let _ = tcsetattr(stdin(), OptionalActions::Now, before);
}

/// Past the standard library's lock, which a panic may hold.
fn write(text: &str) -> io::Result<()> {
    let mut left = text.as_bytes();
    while !left.is_empty() {
        match rustix::io::write(stdout(), left) {
            Ok(count) => left = &left[count.min(left.len())..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
