//! `bans`: who is let in no more, why, and until when.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};

use super::client::{Admin, Connection};
use super::table::{cell, fields, plain, table};
use super::{Outcome, Stopped, exit};
use crate::control::BanSubject;

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Let somebody in no more. A second ban of a subject takes the place of the first.
    Add(Add),
    /// List the bans that hold.
    List {
        /// Only the one of this subject.
        #[arg(long, value_parser = subject)]
        subject: Option<String>,
    },
    /// Let somebody in again.
    Remove {
        /// The subject, or the id of the ban.
        #[arg(value_name = "SUBJECT|ID", value_parser = NonEmptyStringValueParser::new())]
        which: String,
        /// Say whether it could be done, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Args)]
struct Add {
    /// `ip:192.0.2.1`, `network:192.0.2.0/24`, `api_key:ID`, `user:NAME` or `session:HASH`.
    #[arg(value_parser = subject)]
    subject: String,
    /// Why. Whoever is banned is told.
    #[arg(long)]
    reason: String,
    /// Until then: `2027-01-01`. Default: for ever.
    #[arg(long, value_name = "DATE", conflicts_with = "expires_in")]
    until: Option<String>,
    /// For so long: `1h`.
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
    /// Say what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    match &options.verb {
        Verb::Add(ban) => {
            let made = admin.write(&Method::POST, &["bans"], &[], Some(&ban.body()), ban.dry_run)?;
            admin.print(&made, fields)
        }
        Verb::List { subject } => {
            let filter: Vec<(&str, &str)> =
                subject.iter().map(|subject| ("subject", subject.as_str())).collect();
            admin.print_list(admin.list(&["bans"], &filter)?, rows)
        }
        Verb::Remove { which, dry_run } => {
            let id = if which.contains(':') { id_of(&admin, which)? } else { which.clone() };
            admin.write(&Method::DELETE, &["bans", &id], &[], None, *dry_run)?;
            let done = json!({ "removed": id, "dry_run": dry_run });
            admin.print(&done, |_| match dry_run {
                true => format!("would remove {which}"),
                false => format!("removed {which}"),
            })
        }
    }
}

impl Add {
    /// What was said, as the admin API takes it.
    fn body(&self) -> Value {
        let mut body = Map::new();
        body.insert("subject".to_owned(), json!(self.subject));
        body.insert("reason".to_owned(), json!(self.reason));
        for (name, text) in [("until", &self.until), ("expires_in", &self.expires_in)] {
            body.extend(text.as_ref().map(|text| (name.to_owned(), json!(text))));
        }
        Value::Object(body)
    }
}

/// A subject as bans write it: an IPv6 address is its network.
fn subject(text: &str) -> Result<String, String> {
    BanSubject::parse(text).map(|subject| subject.to_string())
}

/// The id of the ban of a subject.
fn id_of(admin: &Admin, text: &str) -> Result<String, Stopped> {
    let subject =
        subject(text).map_err(|why| Stopped::new(exit::USAGE, format!("{}: {why}", plain(text))))?;
    let found = admin.list(&["bans"], &[("subject", &subject)])?;
    let id = found.first().and_then(|ban| ban["id"].as_str()).map(str::to_owned);
    id.ok_or_else(|| Stopped::new(exit::NO, format!("there is no ban of `{}`", plain(&subject))))
}

fn rows(bans: &[Value]) -> String {
    let row = |ban: &Value| {
        let until = if ban["until"].is_null() { "for ever".to_owned() } else { cell(&ban["until"]) };
        vec![cell(&ban["id"]), cell(&ban["subject"]), until, cell(&ban["reason"])]
    };
    table(&["ID", "SUBJECT", "UNTIL", "REASON"], bans.iter().map(row))
}
