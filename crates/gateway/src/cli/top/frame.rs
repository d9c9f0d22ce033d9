//! One frame of `top`: figures as lines. Pure.

use serde_json::Value;

use crate::cli::limits::subject;
use crate::cli::paint::Colour;
use crate::cli::table::{align, cell, plain};
use crate::cli::tail::millis;

/// From so much of a limit on it is marked, and from so much on it is marked as used up, per cent.
const NEARLY: f64 = 80.0;
const FULL: f64 = 100.0;
/// Lines of models that are shown however few lines there are.
const MODELS_MIN: usize = 3;

/// One line, and how it stands out.
pub(super) struct Line {
    text: String,
    colour: Option<Colour>,
}

impl Line {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), colour: None }
    }

    fn marked(text: impl Into<String>, colour: Colour) -> Self {
        Self { text: text.into(), colour: Some(colour) }
    }

    /// For who reads text.
    pub(super) fn plain(self) -> String {
        self.text
    }

    /// For who looks at a terminal.
    pub(super) fn painted(self, colours: bool) -> String {
        match self.colour {
            Some(colour) if colours => colour.paint(&self.text),
            _ => self.text,
        }
    }
}

/// What fits of these figures into so many columns and lines; `note`: what else is to be said.
pub(super) fn frame(figures: &Value, width: usize, height: usize, note: &str) -> Vec<Line> {
    let mut lines = vec![Line::marked(title(figures), Colour::Inverse)];
    if figures.is_object() {
        lines.extend(totals(figures).into_iter().map(Line::new));
        let (models, limits) = (models(figures), limits(figures));
        // A blank line before each table, and one with the last.
        let room = height.saturating_sub(lines.len() + 3);
        let of_limits = limits.len().min(room.saturating_sub(models.len().min(MODELS_MIN + 1)));
        let of_models = models.len().min(room.saturating_sub(of_limits));
        for (table, count) in [(models, of_models), (limits, of_limits)] {
            if count > 0 {
                lines.push(Line::new(""));
                lines.extend(table.into_iter().take(count));
            }
        }
    }
    if !note.is_empty() {
        lines.push(Line::new(""));
        lines.push(Line::marked(note, Colour::Yellow));
    }
    lines.truncate(height);
    for line in &mut lines {
        if let Some((end, _)) = line.text.char_indices().nth(width) {
            line.text.truncate(end);
        }
    }
    lines
}

/// `tollgate 0.1.0  gateway-1  serving  since …  now …`
fn title(figures: &Value) -> String {
    if figures.is_null() {
        return "tollgate top".to_owned();
    }
    let [version, instance, state, started, time] =
        ["version", "instance", "state", "started", "time"].map(|name| cell(&figures[name]));
    format!("tollgate {version}  {instance}  {state}  since {started}  now {time}")
}

/// What is counted here, by all, and since the start.
fn totals(figures: &Value) -> Vec<String> {
    let (requests, tokens, fleet) = (&figures["requests"], &figures["tokens"], &figures["fleet"]);
    let here = vec![
        "here".to_owned(),
        format!("{} requests/s", rate(requests, "per_second")),
        format!("{} refused/s", rate(requests, "refused_per_second")),
        format!("{} failed/s", rate(requests, "failed_per_second")),
        format!("{} in flight", cell(&requests["in_flight"])),
        format!("{} tokens/s in", rate(tokens, "input_per_second")),
        format!("{} tokens/s out", rate(tokens, "output_per_second")),
    ];
    let total = vec![
        "total".to_owned(),
        format!("{} requests", cell(&requests["total"])),
        format!("{} refused", cell(&requests["refused"])),
        format!("{} failed", cell(&requests["failed"])),
        String::new(),
        format!("{} tokens in", cell(&tokens["input"])),
        format!("{} tokens out", cell(&tokens["output"])),
    ];
    let mut rows = vec![here];
    if fleet.is_object() {
        let instances = figures["instances"].as_array().map_or(0, Vec::len);
        rows.push(vec![
            "fleet".to_owned(),
            format!("{} requests/s", rate(fleet, "requests_per_second")),
            format!("{} refused/s", rate(fleet, "refused_per_second")),
            String::new(),
            format!("{instances} instances"),
        ]);
    }
    rows.push(total);
    let mut lines: Vec<String> = align(rows).lines().map(str::to_owned).collect();
    let redis = &figures["redis"];
    let redis = match (redis["enabled"] == true, redis["connected"] == true) {
        (false, _) => "none: counted here",
        (true, true) => "connected",
        (true, false) => "away: limits do what when_down says",
    };
    let overhead = &figures["overhead_ms"];
    let [p50, p95] = ["p50", "p95"].map(|name| millis(&overhead[name]));
    lines.push(format!("redis  {redis}    overhead p50 {p50}, p95 {p95}"));
    lines
}

/// To the tenth.
fn rate(of: &Value, name: &str) -> String {
    of[name].as_f64().map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"))
}

/// A table, its names standing out.
fn table(names: &[&str], rows: Vec<(Vec<String>, Option<Colour>)>) -> Vec<Line> {
    if rows.is_empty() {
        return Vec::new();
    }
    let (cells, colours): (Vec<Vec<String>>, Vec<Option<Colour>>) = rows.into_iter().unzip();
    let names = names.iter().map(|&name| name.to_owned()).collect();
    let aligned = align(std::iter::once(names).chain(cells).collect());
    let colours = std::iter::once(Some(Colour::Bold)).chain(colours);
    let line = |(text, colour): (&str, Option<Colour>)| Line { text: text.to_owned(), colour };
    aligned.lines().zip(colours).map(line).collect()
}

fn models(figures: &Value) -> Vec<Line> {
    let row = |model: &Value| {
        let [healthy, providers] = ["healthy", "providers"].map(|name| model[name].as_u64().unwrap_or(0));
        let quantile = |of: &str, name: &str| millis(&model[of][name]);
        let cells = vec![
            cell(&model["name"]),
            format!("{healthy}/{providers}"),
            cell(&model["in_flight"]),
            rate(model, "requests_per_second"),
            quantile("upstream_ms", "p50"),
            quantile("upstream_ms", "p95"),
            quantile("first_token_ms", "p50"),
            quantile("first_token_ms", "p95"),
        ];
        (cells, (healthy < providers).then_some(Colour::Red))
    };
    let names =
        ["MODEL", "HEALTHY", "IN FLIGHT", "REQUESTS/S", "UPSTREAM P50", "P95", "FIRST TOKEN P50", "P95"];
    table(&names, figures["models"].as_array().into_iter().flatten().map(row).collect())
}

fn limits(figures: &Value) -> Vec<Line> {
    let row = |limit: &Value| {
        let [used, of] = ["used", "limit"].map(|name| limit[name].as_u64().unwrap_or(0));
        let share = used as f64 * 100.0 / of.max(1) as f64;
        let colour = match share {
            FULL.. => Some(Colour::Red),
            NEARLY.. => Some(Colour::Yellow),
            _ => None,
        };
        let cells = vec![
            subject(&limit["key"]),
            plain(&cell(&limit["rule"])),
            format!("{used}/{of} {}", cell(&limit["unit"])),
            format!("{share:.0}%"),
            in_a_while(&limit["reset_ms"]),
        ];
        (cells, colour)
    };
    let whose = if figures["limits_of"] == "fleet" { "FULLEST OF THE FLEET" } else { "FULLEST HERE" };
    let names = [whose, "LIMIT", "USED", "FULL", "EMPTY IN"];
    table(&names, figures["limits"].as_array().into_iter().flatten().map(row).collect())
}

/// Milliseconds as hours, minutes, seconds: `26s`, `5m04s`, `3h07m`.
fn in_a_while(millis: &Value) -> String {
    let Some(seconds) = millis.as_u64().map(|millis| millis.div_ceil(1_000)) else { return "-".to_owned() };
    match (seconds / 3_600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours @ ..100, minutes, _) => format!("{hours}h{minutes:02}m"),
        (hours, ..) => format!("{}d", hours / 24),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn figures() -> Value {
        let limit = |user: &str, used: u64, reset: u64| {
            json!({ "key": format!("rate_limit:user:{user}"), "rule": "free-requests-minute", "unit": "requests",
                    "used": used, "limit": 10, "window": "1m", "reset_ms": reset })
        };
        json!({
            "time": "2027-01-15T10:30:05Z", "instance": "gateway-1", "version": "0.1.0",
            "started": "2027-01-15T10:00:00Z", "state": "serving",
            "requests": { "per_second": 12.4, "refused_per_second": 1.0, "failed_per_second": 0.0, "in_flight": 3,
                          "total": 1523, "refused": 12, "failed": 0 },
            "tokens": { "input_per_second": 90.0, "output_per_second": 410.25, "input": 12000, "output": 48000 },
            "overhead_ms": { "p50": 0.25, "p95": 0.48, "count": 60 },
            "models": [
                { "name": "chat", "providers": 2, "healthy": 1, "in_flight": 3, "requests_per_second": 1.02,
                  "upstream_ms": { "p50": 305.2, "p95": 2481.0, "count": 60 }, "first_token_ms": null },
                { "name": "mute", "providers": 1, "healthy": 1, "in_flight": 0, "requests_per_second": 0.0,
                  "upstream_ms": null, "first_token_ms": null },
            ],
            "limits": [limit("bob", 10, 26_001), limit("alice", 8, 304_000), limit("carol", 1, 11_220_000)],
            "limits_of": "fleet",
            "redis": { "enabled": true, "connected": true, "degraded": false },
            "fleet": { "requests": 9000, "refused": 40, "requests_per_second": 30.0, "refused_per_second": null },
            "instances": [{}, {}],
        })
    }

    const WHOLE: &str = "\
tollgate 0.1.0  gateway-1  serving  since 2027-01-15T10:00:00Z  now 2027-01-15T10:30:05Z
here   12.4 requests/s  1.0 refused/s  0.0 failed/s  3 in flight  90.0 tokens/s in  410.2 tokens/s out
fleet  30.0 requests/s  - refused/s                  2 instances
total  1523 requests    12 refused     0 failed                   12000 tokens in   48000 tokens out
redis  connected    overhead p50 0.25 ms, p95 0.48 ms

MODEL  HEALTHY  IN FLIGHT  REQUESTS/S  UPSTREAM P50  P95      FIRST TOKEN P50  P95
chat   1/2      3          1.0         305 ms        2481 ms  -                -
mute   1/1      0          0.0         -             -        -                -

FULLEST OF THE FLEET  LIMIT                 USED            FULL  EMPTY IN
user:bob              free-requests-minute  10/10 requests  100%  27s
user:alice            free-requests-minute  8/10 requests   80%   5m04s
user:carol            free-requests-minute  1/10 requests   10%   3h07m";

    #[test]
    fn a_frame_says_it_all() {
        let lines: Vec<String> =
            frame(&figures(), usize::MAX, usize::MAX, "").into_iter().map(Line::plain).collect();
        assert_eq!(lines.join("\n"), WHOLE);
    }

    #[test]
    fn a_frame_is_never_larger_than_the_screen() {
        for (width, height) in [(80, 24), (20, 8), (1, 1), (200, 4), (0, 0)] {
            let lines = frame(&figures(), width, height, "away; trying again in 500ms");
            assert!(lines.len() <= height, "{height}: {}", lines.len());
            assert!(lines.iter().all(|line| line.text.chars().count() <= width), "{width}");
        }
        assert_eq!(frame(&Value::Null, 80, 24, "waiting").len(), 3);
    }

    #[test]
    fn what_needs_a_look_stands_out() {
        let painted: Vec<String> =
            frame(&figures(), 200, 50, "").into_iter().map(|line| line.painted(true)).collect();
        let line = |word: &str| painted.iter().find(|line| line.contains(word)).expect("a line");
        assert!(line("chat ").starts_with("\u{1b}[31m"), "one of its providers rests");
        assert!(line("user:bob").starts_with("\u{1b}[31m") && line("user:alice").starts_with("\u{1b}[33m"));
        assert!(line("user:carol").starts_with("user:carol") && line("mute").starts_with("mute"));
    }
}
