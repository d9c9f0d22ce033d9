//! `usage`: what was used, by whom, of which model, and when.

use clap::Args;
use serde_json::Value;

use super::Outcome;
use super::client::Connection;
use super::table::{cell, table};

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    /// What each line is about.
    #[arg(long, value_parser = ["user", "api_key", "team", "model"], default_value = "user")]
    by: String,
    /// From then on: `2027-01-01`, RFC 3339 or Unix seconds. Default: a day before the end.
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Until then. Default: now.
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// A line for each hour or day, or for the whole time. Hours and days are UTC.
    #[arg(long, value_parser = ["hour", "day", "none"], default_value = "none")]
    step: String,
    /// Only this user's.
    #[arg(long)]
    user: Option<String>,
    /// Only that of the key with this id.
    #[arg(long, value_name = "ID")]
    api_key: Option<String>,
    /// Only this team's.
    #[arg(long)]
    team: Option<String>,
    /// Only that of this model.
    #[arg(long)]
    model: Option<String>,
    /// As CSV (RFC 4180), with a line of names.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    let by = options.by.as_str();
    let mut query = vec![("by", by), ("step", options.step.as_str())];
    for (name, value) in [
        ("from", &options.from),
        ("to", &options.to),
        ("user", &options.user),
        ("api_key", &options.api_key),
        ("team", &options.team),
        ("model", &options.model),
    ] {
        query.extend(value.as_deref().map(|value| (name, value)));
    }
    if options.csv {
        query.push(("format", "csv"));
        // With the line end that printing adds it is as it came.
        return super::print(admin.text(&["usage"], &query)?.trim_end_matches('\n'));
    }
    admin.print_list(admin.list(&["usage"], &query)?, |lines| rows(by, lines))
}

fn rows(by: &str, lines: &[Value]) -> String {
    let row = |line: &Value| {
        let tokens = |kind: &str| cell(&line["tokens"][kind]);
        let [start, end, name, requests, refused] =
            ["start", "end", by, "requests", "refused"].map(|field| cell(&line[field]));
        let [input, cached, output, total] = ["input", "cached_input", "output", "total"].map(tokens);
        vec![start, end, name, requests, refused, input, cached, output, total, money(&line["cost"])]
    };
    let name = by.to_ascii_uppercase();
    let names = ["START", "END", &name, "REQUESTS", "REFUSED", "INPUT", "CACHED", "OUTPUT", "TOKENS", "COST"];
    table(&names, lines.iter().map(row))
}

/// With as many digits as all others have.
fn money(cost: &Value) -> String {
    format!("{:.6}", cost.as_f64().unwrap_or_default())
}
