//! The notation once more, for the compiler: constant evaluation knows neither iterators nor formatting, so this reads
//! bytes, and says in one sentence what is wrong. Tests hold it equal to [`notation`](super::notation).

use super::{EXACT, MICROS, Quota, Span, Unit, Window};

/// The longest text that is looked at, and the most digits.
const TEXT_BYTES_MAX: usize = 512;
const DIGITS_MAX: usize = 18;

/// `?` for constant evaluation.
macro_rules! attempt {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(problem) => return Err(problem),
        }
    };
}

/// Reads one quota, written in ASCII.
pub(super) const fn parse(text: &str) -> Result<Quota, &'static str> {
    if text.len() > TEXT_BYTES_MAX {
        return Err("a limit is at most 512 bytes long");
    }
    let mut cursor = Cursor { bytes: text.as_bytes(), at: 0 };
    let quota = attempt!(cursor.quota());
    cursor.skip_blanks();
    if cursor.at < cursor.bytes.len() {
        return Err("unexpected text after the limit; it ends after its window and burst");
    }
    Ok(quota)
}

struct Cursor<'t> {
    bytes: &'t [u8],
    at: usize,
}

impl Cursor<'_> {
    const fn quota(&mut self) -> Result<Quota, &'static str> {
        let money = self.eat(b'$');
        let amount = attempt!(self.amount(money));
        let unit = if money { Unit::Cost } else { attempt!(self.unit()) };
        if let Unit::Concurrency = unit {
            return bounded(Quota { amount, unit, window: None, burst: None });
        }
        if !self.eat(b'/') && !self.eat_word(b"per") {
            return Err("a window is missing: say per what, as in `60/minute`");
        }
        let window = attempt!(self.window());
        let mut burst = None;
        if self.eat_word(b"burst") {
            if self.eat(b'$') && !money {
                return Err("a burst of money on a limit that counts none; leave the `$` out");
            }
            burst = Some(attempt!(self.amount(money)));
        }
        bounded(Quota { amount, unit, window: Some(window), burst })
    }

    const fn amount(&mut self, money: bool) -> Result<u64, &'static str> {
        let (digits, decimals) = attempt!(self.digits());
        let before = self.at;
        let (from, to) = self.word();
        let size = match (to - from, if to > from { self.bytes[from] } else { 0 }) {
            (1, b'k') => 1_000,
            (1, b'M') => 1_000_000,
            (1, b'G') => 1_000_000_000,
            (1, b'm') => return Err("`m` is not a size; for a million write M"),
            (1, b'K') => return Err("`K` is not a size; for a thousand write k"),
            _ => {
                self.at = before;
                1
            }
        };
        let scale = 10_u128.pow(decimals);
        let value = digits as u128 * size * if money { MICROS as u128 } else { 1 };
        if !value.is_multiple_of(scale) {
            return Err("not a whole number of units; money has at most six decimals");
        }
        if value / scale >= EXACT {
            return Err("too large to be counted exactly");
        }
        Ok((value / scale) as u64)
    }

    /// The digits of a number as one, and how many of them are decimals.
    const fn digits(&mut self) -> Result<(u64, u32), &'static str> {
        self.skip_blanks();
        let (mut value, mut count, mut decimals, mut point) = (0_u64, 0, 0, false);
        while self.at < self.bytes.len() {
            match self.bytes[self.at] {
                digit @ b'0'..=b'9' => {
                    count += 1;
                    if count > DIGITS_MAX {
                        return Err("too many digits; 18 is the most");
                    }
                    value = value * 10 + (digit - b'0') as u64;
                    decimals += point as u32;
                }
                b'.' if point || count == 0 => {
                    return Err("not a number; write digits, as in `1_000` or `1.5`");
                }
                b'.' => point = true,
                b'_' if count > 0 => {}
                _ => break,
            }
            self.at += 1;
        }
        if count == 0 || (point && decimals == 0) {
            return Err("a number is missing; write a limit such as `60/minute` or `$50/month`");
        }
        Ok((value, decimals))
    }

    const fn unit(&mut self) -> Result<Unit, &'static str> {
        let before = self.at;
        let (from, to) = self.word();
        if from == to || self.is(from, to, b"per") {
            self.at = before;
            return Ok(Unit::Requests);
        }
        if self.is(from, to, b"request") || self.is(from, to, b"requests") {
            return Ok(Unit::Requests);
        }
        if self.is(from, to, b"token") || self.is(from, to, b"tokens") {
            return Ok(Unit::Tokens);
        }
        if self.is(from, to, b"concurrent") {
            return Ok(Unit::Concurrency);
        }
        if self.is(from, to, b"input_tokens") {
            return Ok(Unit::InputTokens);
        }
        if self.is(from, to, b"output_tokens") {
            return Ok(Unit::OutputTokens);
        }
        let input = self.is(from, to, b"input");
        if (input || self.is(from, to, b"output")) && (self.eat_word(b"tokens") || self.eat_word(b"token")) {
            return Ok(if input { Unit::InputTokens } else { Unit::OutputTokens });
        }
        Err("unknown unit; allowed: requests, tokens, input tokens, output tokens, concurrent")
    }

    const fn window(&mut self) -> Result<Window, &'static str> {
        self.skip_blanks();
        let mut count = 1;
        if self.at < self.bytes.len() && matches!(self.bytes[self.at], b'0'..=b'9' | b'.') {
            let (whole, decimals) = attempt!(self.digits());
            if decimals > 0 {
                return Err("a number of windows is whole, as in `10/15 minutes`");
            }
            count = whole;
        }
        let (from, to) = self.word();
        let mut index = 0;
        while index < Span::ALL.len() {
            let span = Span::ALL[index];
            if self.is_span(from, to, span) {
                return match Window::checked(count, span) {
                    Some(window) => Ok(window),
                    None => Err("a window is 1 s to 366 days, and calendar months cannot be multiplied"),
                };
            }
            index += 1;
        }
        Err("unknown window; allowed: second, minute, hour, day, week, month, or s m h d w")
    }

    /// `s`, but not `S`; `minute`, `Minutes`.
    const fn is_span(&self, from: usize, to: usize, span: Span) -> bool {
        let name = span.as_str().as_bytes();
        if to - from == 1 {
            return !matches!(span, Span::Month) && self.bytes[from] == name[0];
        }
        let plural = to - from == name.len() + 1 && self.bytes[to - 1].eq_ignore_ascii_case(&b's');
        self.is(from, if plural { to - 1 } else { to }, name)
    }

    const fn eat(&mut self, wanted: u8) -> bool {
        self.skip_blanks();
        let found = self.at < self.bytes.len() && self.bytes[self.at] == wanted;
        self.at += found as usize;
        found
    }

    const fn eat_word(&mut self, wanted: &[u8]) -> bool {
        let before = self.at;
        let (from, to) = self.word();
        let found = self.is(from, to, wanted);
        if !found {
            self.at = before;
        }
        found
    }

    /// Where the next word begins and ends; empty when there is none.
    const fn word(&mut self) -> (usize, usize) {
        self.skip_blanks();
        let from = self.at;
        while self.at < self.bytes.len() {
            match self.bytes[self.at] {
                b'a'..=b'z' | b'A'..=b'Z' => {}
                b'_' if self.at > from => {}
                _ => break,
            }
            self.at += 1;
        }
        (from, self.at)
    }

    const fn is(&self, from: usize, to: usize, wanted: &[u8]) -> bool {
        if to - from != wanted.len() {
            return false;
        }
        let mut index = 0;
        while index < wanted.len() {
            if !self.bytes[from + index].eq_ignore_ascii_case(&wanted[index]) {
                return false;
            }
            index += 1;
        }
        true
    }

    const fn skip_blanks(&mut self) {
        while self.at < self.bytes.len() && self.bytes[self.at].is_ascii_whitespace() {
            self.at += 1;
        }
    }
}

const fn bounded(quota: Quota) -> Result<Quota, &'static str> {
    if quota.amount == 0 {
        return Err("nothing would ever be allowed");
    }
    match quota.burst {
        Some(0) => Err("a burst of 0 allows nothing; leave it out, or write 1 or more"),
        _ => Ok(quota),
    }
}
