//! The notation of limits:
//!
//! ```text
//! limit  = ["$"] AMOUNT ["k"|"M"|"G"] [UNIT] ("/" | "per") [N] WINDOW ["burst" N]  |  N "concurrent"  |  "unlimited"
//! UNIT   = requests (default) | tokens | input tokens | output tokens
//! WINDOW = second minute hour day week month, plurals, s m h d w
//! several: "10/minute;100/hour"
//! ```

use super::{MICROS, QUOTAS_MAX, Quota, QuotaError, Span, Unit, Window};
use crate::names::nearest;

/// The longest text that is looked at.
const TEXT_BYTES_MAX: usize = 512;
/// The most digits an amount may have.
const DIGITS_MAX: usize = 18;
const UNITS: &[&str] = &["requests", "tokens", "input", "output", "concurrent", "per"];
const WINDOWS: &[&str] = &["second", "minute", "hour", "day", "week", "month"];

pub(super) fn parse_all(text: &str) -> Result<Vec<Quota>, QuotaError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(QuotaError::new(text, "too long", "512 bytes is the most"));
    }
    if text.trim().eq_ignore_ascii_case("unlimited") {
        return Ok(Vec::new());
    }
    let mut quotas: Vec<Quota> = Vec::new();
    for part in text.split(';') {
        let quota = parse(part)?;
        if quotas.iter().any(|other| (other.unit, other.window) == (quota.unit, quota.window)) {
            let problem = "a second limit of the same unit and window";
            return Err(QuotaError::new(part.trim(), problem, "keep the smaller one"));
        }
        quotas.push(quota);
    }
    if quotas.len() > QUOTAS_MAX {
        return Err(QuotaError::new(text, "too many limits", "16 is the most"));
    }
    Ok(quotas)
}

pub(super) fn parse(text: &str) -> Result<Quota, QuotaError> {
    let text = text.trim();
    if text.len() > TEXT_BYTES_MAX {
        return Err(QuotaError::new(text, "too long", "512 bytes is the most"));
    }
    if text.is_empty() {
        return Err(QuotaError::new(text, "empty", "write a limit such as `60/minute`, or `unlimited`"));
    }
    if text.eq_ignore_ascii_case("unlimited") {
        let advice = "write `unlimited` alone, in place of every limit";
        return Err(QuotaError::new(text, "`unlimited` is the absence of a limit", advice));
    }
    let mut parser = Parser { text, rest: text };
    let quota = parser.quota()?;
    match parser.next()? {
        Token::End => Ok(quota),
        token => {
            Err(parser
                .error(&format!("unexpected {}", token.shown()), "a limit ends after its window and burst"))
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Token<'t> {
    Dollar,
    Slash,
    Number(&'t str),
    Word(&'t str),
    End,
}

impl Token<'_> {
    fn shown(&self) -> String {
        match self {
            Token::Dollar => "`$`".into(),
            Token::Slash => "`/`".into(),
            Token::Number(text) | Token::Word(text) => format!("`{text}`"),
            Token::End => "end".into(),
        }
    }
}

struct Parser<'t> {
    text: &'t str,
    rest: &'t str,
}

impl<'t> Parser<'t> {
    fn quota(&mut self) -> Result<Quota, QuotaError> {
        let money = self.eat(Token::Dollar)?;
        let amount = self.amount(money)?;
        let unit = if money { self.no_unit()? } else { self.unit()? };
        if unit == Unit::Concurrency {
            return Quota::concurrent(amount).map_err(|error| self.placed(error));
        }
        if !self.eat(Token::Slash)? && !self.eat_word("per")? {
            let found = self.next()?.shown();
            return Err(
                self.error(&format!("a window is missing before {found}"), "say per what, as in `60/minute`")
            );
        }
        let window = self.window()?;
        let mut quota = Quota::new(amount, unit, window).map_err(|error| self.placed(error))?;
        if self.eat_word("burst")? {
            if self.eat(Token::Dollar)? && !money {
                return Err(self.error("a burst of money on a limit that counts none", "leave the `$` out"));
            }
            let burst = self.amount(money)?;
            quota = quota.with_burst(burst).map_err(|error| self.placed(error))?;
        }
        Ok(quota)
    }

    /// A number with its size letter, in units or micro-units.
    fn amount(&mut self, money: bool) -> Result<u64, QuotaError> {
        let Token::Number(digits) = self.next()? else {
            return Err(self.error("a number is missing", "write a limit such as `60/minute` or `$50/month`"));
        };
        let size = self.size()?;
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let plain = |part: &str| part.chars().filter(|c| *c != '_').collect::<String>();
        let (whole, fraction) = (plain(whole), plain(fraction));
        if whole.is_empty() || fraction.contains('.') || (fraction.is_empty() && digits.contains('.')) {
            return Err(
                self.error(&format!("`{digits}` is not a number"), "write digits, as in `1_000` or `1.5`")
            );
        }
        if whole.len() + fraction.len() > DIGITS_MAX {
            return Err(self.error("too many digits", "18 is the most"));
        }
        let scale = 10_u128.pow(fraction.len() as u32);
        let value: u128 = format!("{whole}{fraction}").parse().map_err(|_| {
            self.error(&format!("`{digits}` is not a number"), "write digits, as in `1_000` or `1.5`")
        })?;
        let value = value * size * if money { u128::from(MICROS) } else { 1 };
        if !value.is_multiple_of(scale) {
            let advice = if money { "money has at most six decimals" } else { "write a whole number" };
            return Err(self.error(&format!("`{digits}` is not a whole number of units"), advice));
        }
        u64::try_from(value / scale)
            .map_err(|_| self.error("too large to be counted exactly", "write a smaller number"))
    }

    /// `k`, `M`, `G` or nothing.
    fn size(&mut self) -> Result<u128, QuotaError> {
        let before = self.rest;
        let Token::Word(word) = self.next()? else {
            self.rest = before;
            return Ok(1);
        };
        let wrong = |meant: &str, letter: &str| {
            Err(self.error(&format!("`{word}` is not a size"), &format!("for a {meant} write {letter}")))
        };
        match word {
            "k" => Ok(1_000),
            "M" => Ok(1_000_000),
            "G" => Ok(1_000_000_000),
            "K" => wrong("thousand", "k"),
            "m" | "mio" | "mn" | "million" => wrong("million", "M"),
            "g" | "B" | "b" | "bn" | "billion" => wrong("billion", "G"),
            _ => {
                self.rest = before;
                Ok(1)
            }
        }
    }

    fn unit(&mut self) -> Result<Unit, QuotaError> {
        let before = self.rest;
        let Token::Word(word) = self.next()? else {
            self.rest = before;
            return Ok(Unit::Requests);
        };
        match word.to_ascii_lowercase().as_str() {
            "per" => {
                self.rest = before;
                Ok(Unit::Requests)
            }
            "request" | "requests" => Ok(Unit::Requests),
            "token" | "tokens" => Ok(Unit::Tokens),
            "input_tokens" => Ok(Unit::InputTokens),
            "output_tokens" => Ok(Unit::OutputTokens),
            "concurrent" => Ok(Unit::Concurrency),
            "input" if self.eat_word("tokens")? || self.eat_word("token")? => Ok(Unit::InputTokens),
            "output" if self.eat_word("tokens")? || self.eat_word("token")? => Ok(Unit::OutputTokens),
            "input" | "output" => {
                Err(self.error(&format!("`{word}` of what is missing"), &format!("write `{word} tokens`")))
            }
            "usd" | "dollar" | "dollars" => Err(self.error("money is written with `$`", "as in `$50/month`")),
            _ => {
                let meant =
                    nearest(word, UNITS).map_or(String::new(), |unit| format!("did you mean `{unit}`? "));
                let advice =
                    format!("{meant}Allowed: requests, tokens, input tokens, output tokens, concurrent");
                Err(self.error(&format!("unknown unit `{word}`"), &advice))
            }
        }
    }

    /// After `$` no unit may follow.
    fn no_unit(&mut self) -> Result<Unit, QuotaError> {
        let before = self.rest;
        match self.next()? {
            Token::Word(word) if !word.eq_ignore_ascii_case("per") => {
                let problem = format!("`{word}` after an amount of money");
                Err(self.error(&problem, "a `$` limit counts money only, as in `$50/month`"))
            }
            _ => {
                self.rest = before;
                Ok(Unit::Cost)
            }
        }
    }

    fn window(&mut self) -> Result<Window, QuotaError> {
        let before = self.rest;
        let count = match self.next()? {
            Token::Number(digits) => {
                let plain: String = digits.chars().filter(|c| *c != '_').collect();
                let count = (plain.len() <= DIGITS_MAX).then(|| plain.parse().ok()).flatten();
                count.ok_or_else(|| {
                    self.error(&format!("`{digits}` windows"), "write a whole number, as in `10/15 minutes`")
                })?
            }
            _ => {
                self.rest = before;
                1
            }
        };
        let Token::Word(word) = self.next()? else {
            let advice = "write second, minute, hour, day, week or month";
            return Err(self.error("a window is missing after `/`", advice));
        };
        let span = self.span(word)?;
        Window::new(count, span).map_err(|error| self.placed(error))
    }

    fn span(&self, word: &str) -> Result<Span, QuotaError> {
        match word {
            "s" => return Ok(Span::Second),
            "m" => return Ok(Span::Minute),
            "h" => return Ok(Span::Hour),
            "d" => return Ok(Span::Day),
            "w" => return Ok(Span::Week),
            _ => {}
        }
        let lower = word.to_ascii_lowercase();
        let singular = lower.strip_suffix('s').unwrap_or(&lower);
        if let Some(span) = Span::ALL.into_iter().find(|span| span.as_str() == singular) {
            return Ok(span);
        }
        let meant = match singular {
            "sec" => Some("second"),
            "m" | "min" => Some("minute"),
            "hr" | "h" => Some("hour"),
            "mo" | "mon" | "mth" => Some("month"),
            "year" | "yr" | "y" => Some("366 days"),
            _ => nearest(singular, WINDOWS),
        };
        let meant = meant.map_or(String::new(), |name| format!("did you mean `{name}`? "));
        let advice = format!("{meant}Allowed: second, minute, hour, day, week, month, or s m h d w");
        Err(self.error(&format!("unknown window `{word}`"), &advice))
    }

    fn eat(&mut self, wanted: Token<'static>) -> Result<bool, QuotaError> {
        let before = self.rest;
        let found = self.next()? == wanted;
        if !found {
            self.rest = before;
        }
        Ok(found)
    }

    fn eat_word(&mut self, wanted: &str) -> Result<bool, QuotaError> {
        let before = self.rest;
        let found = matches!(self.next()?, Token::Word(word) if word.eq_ignore_ascii_case(wanted));
        if !found {
            self.rest = before;
        }
        Ok(found)
    }

    fn next(&mut self) -> Result<Token<'t>, QuotaError> {
        let rest = self.rest.trim_start();
        let Some(first) = rest.chars().next() else {
            self.rest = rest;
            return Ok(Token::End);
        };
        let (length, token): (usize, fn(&'t str) -> Token<'t>) = match first {
            '$' => (1, |_| Token::Dollar),
            '/' => (1, |_| Token::Slash),
            '0'..='9' | '.' => {
                let end = |c: char| !(c.is_ascii_digit() || c == '_' || c == '.');
                (rest.find(end).unwrap_or(rest.len()), Token::Number)
            }
            c if c.is_alphabetic() => {
                let end = |c: char| !(c.is_alphabetic() || c == '_');
                (rest.find(end).unwrap_or(rest.len()), Token::Word)
            }
            ',' => return Err(self.error("unexpected `,`", "write 1_000 for a thousand, `;` between limits")),
            '-' => return Err(self.error("unexpected `-`", "a limit is a positive number")),
            other => {
                return Err(
                    self.error(&format!("unexpected `{}`", other.escape_debug()), "as in `60/minute`")
                );
            }
        };
        let (found, rest) = rest.split_at(length);
        self.rest = rest;
        Ok(token(found))
    }

    fn error(&self, problem: &str, advice: &str) -> QuotaError {
        QuotaError::new(self.text, problem, advice)
    }

    /// The same error, about the text as it was written.
    fn placed(&self, error: QuotaError) -> QuotaError {
        self.error(&error.problem, &error.advice)
    }
}

#[cfg(test)]
mod tests;
