//! `tail`: a line for each request as it ends.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::client::{Connection, Heard, Listener, Told};
use super::paint::{Colour, Colours};
use super::table::{cell, plain};
use super::{Outcome, Stopped, exit};

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    colours: Colours,
    /// Only those answered so: `429`, `5xx`.
    #[arg(long)]
    status: Option<String>,
    /// Only those of this user.
    #[arg(long)]
    user: Option<String>,
    /// Only those for this model.
    #[arg(long)]
    model: Option<String>,
    /// Only those that a rule refused.
    #[arg(long)]
    refused: bool,
}

/// Names of the columns, and how wide each is at least: nobody knows what will come.
const COLUMNS: [(&str, usize); 8] = [
    ("TIME", 12),
    ("STATUS", 6),
    ("USER", 10),
    ("MODEL", 12),
    ("PROVIDER", 10),
    ("TOKENS", 9),
    ("LATENCY", 8),
    ("FIRST", 8),
];

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    let mut query = vec![("figures", "false"), ("requests", "true")];
    let named = [("status", &options.status), ("user", &options.user), ("model", &options.model)];
    query.extend(named.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))));
    query.extend(options.refused.then_some(("refused", "true")));
    let colours = options.colours.wanted(std::io::stdout().is_terminal());
    let line = |request: &Value| match admin.is_json() {
        true => request.to_string(),
        false => shown(request, colours),
    };
    admin.block_on(async {
        let mut listener = Listener::open(&admin, query).await?;
        if !admin.is_json() && !say(&header())? {
            return Ok(ExitCode::SUCCESS);
        }
        loop {
            let goes_on = match listener.next().await? {
                Heard::Told(Told::Request(request)) => say(&line(&request))?,
                Heard::Told(Told::Lost(count)) => {
                    note(&format!("{count} requests ended too fast to be told of"))
                }
                Heard::Told(Told::Figures(_)) => true,
                Heard::Gone(why, wait) => note(&format!("{why}; trying again in {wait:?}")),
                Heard::Back => {
                    note("listening again: requests that ended meanwhile are in `GET /admin/requests`")
                }
            };
            if !goes_on {
                return Ok(ExitCode::SUCCESS);
            }
        }
    })
}

/// Prints a line; `false`: nobody reads any more.
fn say(line: &str) -> Result<bool, Stopped> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Stopped::new(exit::NO, error)),
    }
}

fn note(text: &str) -> bool {
    eprintln!("tail: {text}");
    true
}

fn header() -> String {
    let names = COLUMNS.map(|(name, width)| format!("{name:<width$}"));
    format!("{}  ENDPOINT", names.join("  "))
}

/// What the columns say, then the endpoint, then why it was not answered as it should be.
fn shown(request: &Value, colours: bool) -> String {
    let status = request["status"].as_u64().unwrap_or(0);
    let cells = [
        clock(&request["time"]),
        status.to_string(),
        cell(&request["user"]),
        cell(&request["model"]),
        cell(&request["provider"]),
        tokens(request),
        millis(&request["latency_ms"]),
        millis(&request["first_token_ms"]),
    ];
    let colour = match status {
        ..=399 => Colour::Green,
        400..=499 => Colour::Yellow,
        _ => Colour::Red,
    };
    let columns = COLUMNS.iter().zip(cells).enumerate().map(|(index, ((_, width), cell))| {
        let padded = format!("{cell:<width$}");
        if colours && index == 1 { colour.paint(&padded) } else { padded }
    });
    let mut line = columns.collect::<Vec<_>>().join("  ");
    line.push_str("  ");
    line.push_str(&cell(&request["endpoint"]));
    let why = match (&request["rule"], &request["code"]) {
        (Value::Null, Value::Null) => request["outcome"].as_str().filter(|outcome| *outcome != "done"),
        (Value::Null, code) => code.as_str(),
        (rule, _) => rule.as_str(),
    };
    if let Some(why) = why {
        let why = plain(why);
        line.push_str("  ");
        line.push_str(&if colours { colour.paint(&why) } else { why });
    }
    line
}

/// The time of day, UTC, of a moment as the admin API writes it.
fn clock(time: &Value) -> String {
    let time = cell(time);
    let clock = time.split_once('T').and_then(|(_, clock)| clock.strip_suffix('Z')).map(str::to_owned);
    clock.unwrap_or(time)
}

/// Of the prompt and of the answer; `~`: counted here, because the provider did not say.
fn tokens(request: &Value) -> String {
    match (request["prompt_tokens"].as_u64(), request["completion_tokens"].as_u64()) {
        (Some(prompt), Some(completion)) => {
            let about = if request["estimated"] == true { "~" } else { "" };
            format!("{about}{prompt}+{completion}")
        }
        _ => "-".to_owned(),
    }
}

/// With three digits or all before the point.
pub(super) fn millis(value: &Value) -> String {
    match value.as_f64() {
        None => "-".to_owned(),
        Some(millis @ ..10.0) => format!("{millis:.2} ms"),
        Some(millis @ ..100.0) => format!("{millis:.1} ms"),
        Some(millis @ ..10_000.0) => format!("{millis:.0} ms"),
        Some(millis) => format!("{:.1} s", millis / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_stand_below_each_other_and_obey_nobody() {
        let mut request = json!({
            "time": "2027-01-15T10:30:00.069Z", "status": 200, "user": "alice", "model": "chat",
            "provider": "openai", "prompt_tokens": 12, "completion_tokens": 345, "estimated": true,
            "latency_ms": 1234.5, "first_token_ms": 98.76, "method": "POST",
            "endpoint": "/v1/chat/completions", "rule": null, "code": null, "outcome": "done",
        });
        let answered = "10:30:00.069  200     alice       chat          openai      ~12+345    1234 ms   98.8 ms   /v1/chat/completions";
        assert_eq!(shown(&request, false), answered);
        let column = |line: &str, word: &str| line.find(word).expect("it is there");
        assert_eq!(column(&header(), "LATENCY"), column(answered, "1234 ms"));

        request["status"] = json!(429);
        request["rule"] = json!("r\u{1b}[31m");
        let refused = shown(&request, true);
        assert!(refused.contains("\u{1b}[33m429   \u{1b}[0m"), "{refused:?}");
        assert!(refused.ends_with("\u{1b}[33mr\u{fffd}[31m\u{1b}[0m"), "{refused:?}");
    }

    #[test]
    fn durations_are_short() {
        for (value, shown) in [
            (json!(null), "-"),
            (json!(0.25), "0.25 ms"),
            (json!(12.34), "12.3 ms"),
            (json!(4_321.0), "4321 ms"),
            (json!(65_432.1), "65.4 s"),
        ] {
            assert_eq!(millis(&value), shown);
        }
    }
}
