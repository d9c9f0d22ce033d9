//! `limits`: the rules that hold, and rules of operators over those of the file.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};

use super::Outcome;
use super::client::Connection;
use super::keys::pair;
use super::table::{align, cell, plain, table};

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the rules that hold, of the file and of operators.
    List,
    /// Show one rule, and what each of its limits guarantees.
    Show {
        /// Its name.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Set a rule over those of the file. Counters go on.
    Set(Set),
    /// Take away a rule of operators: what the file says holds again.
    Delete {
        /// Its name.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// Say whether it could be done, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Set the counters of one caller back to nothing.
    Clear {
        /// `ip:192.0.2.1`, `user:alice`, `user:alice:model:chat`, `api_key:ID`, `endpoint:PATH:IP`.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        subject: String,
        /// Say whether it could be done, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Args)]
struct Set {
    /// Its name: one of the file's to change that rule, any other for one more.
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    name: String,
    /// How much: `60/minute`, `10k tokens/day`, `20 concurrent`, `unlimited`; again for more.
    #[arg(long = "limit", value_name = "LIMIT", required_unless_present = "deny")]
    limits: Vec<String>,
    /// Refuse what it matches, in place of a limit.
    #[arg(long, conflicts_with_all = ["limits", "shadow", "strategy"])]
    deny: bool,
    /// What has a counter of its own: `user`, `ip`, `user,model`, `global`. Default: as in the file's rule.
    #[arg(long, value_name = "SCOPE", value_delimiter = ',')]
    per: Vec<String>,
    /// What it is about: `model=chat`, `endpoint=/v1/images/*`, `authenticated=false`; again for more, of one name too.
    #[arg(long = "match", value_name = "NAME=VALUE", value_parser = pair)]
    matches: Vec<(String, String)>,
    /// `fixed_window`, `sliding_window`, `moving_window` or `token_bucket`.
    #[arg(long)]
    strategy: Option<String>,
    /// Count and report, never refuse.
    #[arg(long)]
    shadow: bool,
    /// Over from then on: `2027-01-01`.
    #[arg(long, value_name = "DATE", conflicts_with = "expires_in")]
    expires: Option<String>,
    /// Over after so long: `1h`.
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
    /// Say what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    match &options.verb {
        Verb::List => admin.print_list(admin.list(&["limits"], &[])?, rows),
        Verb::Show { name } => admin.print(&admin.get(&["limits", name])?, shown),
        Verb::Set(rule) => {
            let path = ["limits", rule.name.as_str()];
            let set = admin.write(&Method::PUT, &path, &[], Some(&rule.body()), rule.dry_run)?;
            admin.print(&set, shown)
        }
        Verb::Delete { name, dry_run } => {
            admin.write(&Method::DELETE, &["limits", name], &[], None, *dry_run)?;
            admin.print(&json!({ "deleted": name, "dry_run": dry_run }), |_| match dry_run {
                true => format!("would delete {name}"),
                false => format!("deleted {name}"),
            })
        }
        Verb::Clear { subject, dry_run } => {
            let query = [("key", subject.as_str())];
            let cleared = admin.write(&Method::POST, &["rate-limit", "clear"], &query, None, *dry_run)?;
            admin.print(&cleared, |cleared| match cleared["existed"] == true {
                _ if *dry_run => format!("would clear {subject}"),
                true => format!("cleared {subject}"),
                false => format!("{subject} had no counters"),
            })
        }
    }
}

impl Set {
    /// An entry of `limits` without its name, as the admin API takes it.
    fn body(&self) -> Value {
        let mut body = Map::new();
        let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
        for (name, texts) in [("limit", &self.limits), ("per", &self.per)] {
            if !texts.is_empty() {
                put(name, json!(texts));
            }
        }
        for (name, text) in
            [("strategy", &self.strategy), ("expires", &self.expires), ("expires_in", &self.expires_in)]
        {
            if let Some(text) = text {
                put(name, json!(text));
            }
        }
        for (name, wanted) in [("deny", self.deny), ("shadow", self.shadow)] {
            if wanted {
                put(name, json!(true));
            }
        }
        if !self.matches.is_empty() {
            put("match", matched(&self.matches));
        }
        Value::Object(body)
    }
}

/// Several values of one name are a list.
fn matched(pairs: &[(String, String)]) -> Value {
    let mut matched: Map<String, Value> = Map::new();
    for (name, value) in pairs {
        let value = match (name.as_str(), value.as_str()) {
            ("authenticated", "true") => json!(true),
            ("authenticated", "false") => json!(false),
            (_, text) => json!(text),
        };
        match matched.get_mut(name) {
            None => drop(matched.insert(name.clone(), value)),
            Some(Value::Array(values)) => values.push(value),
            Some(one) => *one = json!([one.take(), value]),
        }
    }
    Value::Object(matched)
}

fn rows(rules: &[Value]) -> String {
    let row = |rule: &Value| {
        let shadow = if rule["shadow"] == true { " (shadow)" } else { "" };
        let quotas: Vec<String> = limits(rule).iter().map(|limit| cell(&limit["quota"])).collect();
        let limits = match quotas.is_empty() {
            true if rule["deny"] == true => "deny".to_owned(),
            true => "unlimited".to_owned(),
            false => format!("{}{shadow}", quotas.join("; ")),
        };
        vec![
            cell(&rule["name"]),
            limits,
            cell(&rule["per"]),
            cell(&rule["match"]),
            cell(&rule["source"]),
            cell(&rule["expires"]),
            self::limits(rule)
                .iter()
                .filter_map(|limit| limit["live"]["refused"].as_u64())
                .sum::<u64>()
                .to_string(),
            fullest(rule),
        ]
    };
    let names = ["NAME", "LIMIT", "PER", "MATCH", "SOURCE", "EXPIRES", "REFUSED", "FULLEST"];
    table(&names, rules.iter().map(row))
}

/// Who has used most of one of a rule's limits: `user:alice 7/600 requests`.
fn fullest(rule: &Value) -> String {
    let of = limits(rule).iter().map(|limit| &limit["live"]["fullest"]).filter(|fullest| fullest.is_object());
    let share = |fullest: &&Value| match (fullest["used"].as_f64(), fullest["limit"].as_f64()) {
        (Some(used), Some(limit)) => used / limit.max(1.0),
        _ => 0.0,
    };
    let fullest = of.max_by(|one, other| share(one).total_cmp(&share(other)));
    fullest.map_or_else(|| "-".to_owned(), used)
}

/// `user:alice 7/600 requests`
fn used(fullest: &Value) -> String {
    let [used, limit, unit] = ["used", "limit", "unit"].map(|name| cell(&fullest[name]));
    format!("{} {used}/{limit} {unit}", subject(&fullest["key"]))
}

/// What is limited, without what every such name begins with.
pub(super) fn subject(key: &Value) -> String {
    let key = cell(key);
    key.strip_prefix("rate_limit:").map(str::to_owned).unwrap_or(key)
}

/// A line for each field; each limit with what it guarantees, and what it said lately.
fn shown(rule: &Value) -> String {
    let is_simple = |name: &str| !matches!(name, "limits" | "live");
    let simple = rule.as_object().into_iter().flatten().filter(|(name, _)| is_simple(name));
    let mut lines: Vec<Vec<String>> = simple.map(|(name, value)| vec![plain(name), cell(value)]).collect();
    for limit in limits(rule) {
        let [quota, strategy, guarantee] = ["quota", "strategy", "guarantee"].map(|name| cell(&limit[name]));
        lines.push(vec!["limit".to_owned(), format!("{quota} ({strategy}): {guarantee}")]);
        if let live @ Value::Object(_) = &limit["live"] {
            lines.push(vec!["".to_owned(), said(live)]);
        }
    }
    if let live @ Value::Object(_) = &rule["live"] {
        let [instance, since, of] = ["counted_by", "since", "fullest_of"].map(|name| cell(&live[name]));
        lines.push(vec![
            "counted".to_owned(),
            format!("by {instance} since {since}; the fullest of the {of}"),
        ]);
    }
    align(lines)
}

/// `allowed 7, refused 0; fullest user:alice 7/600 requests`
fn said(live: &Value) -> String {
    let counts = [("allowed", true), ("refused", true), ("shadow", false), ("failed", false)];
    let counts = counts.into_iter().filter(|(name, always)| *always || live[name].as_u64().unwrap_or(0) > 0);
    let counts: Vec<String> = counts.map(|(name, _)| format!("{name} {}", cell(&live[name]))).collect();
    match &live["fullest"] {
        fullest @ Value::Object(_) => format!("{}; fullest {}", counts.join(", "), used(fullest)),
        _ => counts.join(", "),
    }
}

fn limits(rule: &Value) -> &[Value] {
    rule["limits"].as_array().map_or(&[], Vec::as_slice)
}
