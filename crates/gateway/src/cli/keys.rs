//! `keys`: keys that callers send. A secret is printed when it is made, and never again.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};

use super::client::{Admin, Connection};
use super::table::{cell, fields, plain, table};
use super::{Outcome, Stopped, exit};

/// The largest file of keys: the largest body the admin API takes.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a key. Its secret is printed this once.
    Create(Create),
    /// List keys.
    List(List),
    /// Show one key, without its secret.
    Show {
        /// Its id: the eight characters after `tg_`.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
    /// Refuse a key from now on. Its record stays.
    Revoke {
        /// Its id.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
        /// Say what would change, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Give a key a new secret, printed this once. The old one is refused from now on, or after --overlap.
    Rotate(Rotate),
    /// Take in keys of which only the SHA-256 is known: all of them or none.
    Import {
        /// JSON: `[{"hash":"sha256:…","user":"alice"}]`, up to 1000. `-`: standard input.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Say what would change, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Args)]
struct Create {
    /// What people call it.
    #[arg(long)]
    name: Option<String>,
    /// Whose it is.
    #[arg(long)]
    user: Option<String>,
    /// In place of the user's.
    #[arg(long)]
    team: Option<String>,
    /// In place of the user's.
    #[arg(long)]
    tier: Option<String>,
    /// A model it may use; again for more. Default: all.
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    /// A limit of its own, such as `60/minute`; again for more.
    #[arg(long = "limit", value_name = "LIMIT")]
    limits: Vec<String>,
    /// Something to remember; again for more.
    #[arg(long = "metadata", value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Refused from then on: `2027-01-01`.
    #[arg(long, value_name = "DATE", conflicts_with = "expires_in")]
    expires: Option<String>,
    /// Refused after so long: `30d`.
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
    #[command(flatten)]
    secret: Secret,
}

#[derive(Args)]
struct List {
    /// Only those of this user.
    #[arg(long)]
    user: Option<String>,
    /// Only those of this team.
    #[arg(long)]
    team: Option<String>,
}

#[derive(Args)]
struct Rotate {
    /// Its id.
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
    /// How much longer the old secret is accepted: `1h`.
    #[arg(long, value_name = "DURATION")]
    overlap: Option<String>,
    #[command(flatten)]
    secret: Secret,
}

/// What is done with a secret that was made.
#[derive(Args)]
struct Secret {
    /// Print the secret and nothing else.
    #[arg(short, long, conflicts_with = "dry_run")]
    quiet: bool,
    /// Say what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(options: &Options) -> Outcome {
    let json = options.connection.json;
    if let Verb::Create(Create { secret, .. }) | Verb::Rotate(Rotate { secret, .. }) = &options.verb
        && secret.quiet
        && json
    {
        return Err(Stopped::new(exit::USAGE, "--quiet and --json exclude each other"));
    }
    let admin = options.connection.open()?;
    match &options.verb {
        Verb::Create(wanted) => {
            let made =
                admin.write(&Method::POST, &["keys"], &[], Some(&wanted.body()), wanted.secret.dry_run)?;
            made_known(&admin, made, &wanted.secret, true)
        }
        Verb::List(List { user, team }) => {
            let filter = [("user", user), ("team", team)];
            let filter: Vec<(&str, &str)> =
                filter.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))).collect();
            admin.print_list(admin.list(&["keys"], &filter)?, rows)
        }
        Verb::Show { id } => admin.print(&admin.get(&["keys", id])?, fields),
        Verb::Revoke { id, dry_run } => {
            let revoked = admin.write(&Method::POST, &["keys", id, "revoke"], &[], None, *dry_run)?;
            admin.print(&revoked, fields)
        }
        Verb::Rotate(Rotate { id, overlap, secret }) => {
            let body = overlap.as_ref().map_or(json!({}), |overlap| json!({ "overlap": overlap }));
            let path = ["keys", id, "rotate"];
            let made = admin.write(&Method::POST, &path, &[], Some(&body), secret.dry_run)?;
            made_known(&admin, made, secret, false)
        }
        Verb::Import { file, dry_run } => {
            let body = read(file)?;
            let taken = admin.write(&Method::POST, &["keys", "import"], &[], Some(&body), *dry_run)?;
            admin.print(&taken, |taken| {
                let keys = taken["data"].as_array().map_or(&[][..], Vec::as_slice);
                format!("{}\n\n{} keys", rows(keys), keys.len())
            })
        }
    }
}

impl Create {
    /// What was said, as the admin API takes it.
    fn body(&self) -> Value {
        let mut body = Map::new();
        let texts = [
            ("name", &self.name),
            ("user", &self.user),
            ("team", &self.team),
            ("tier", &self.tier),
            ("expires", &self.expires),
            ("expires_in", &self.expires_in),
        ];
        for (name, text) in texts {
            body.extend(text.as_ref().map(|text| (name.to_owned(), json!(text))));
        }
        for (name, texts) in [("models", &self.models), ("limits", &self.limits)] {
            body.extend((!texts.is_empty()).then(|| (name.to_owned(), json!(texts))));
        }
        if !self.metadata.is_empty() {
            let metadata = self.metadata.iter().map(|(name, value)| (name.clone(), json!(value)));
            body.insert("metadata".to_owned(), Value::Object(metadata.collect()));
        }
        Value::Object(body)
    }
}

/// Prints a key with its secret. A dry run made none: the secret of its answer will never be accepted.
fn made_known(admin: &Admin, mut made: Value, options: &Secret, is_new: bool) -> Outcome {
    if options.dry_run {
        if let Some(made) = made.as_object_mut() {
            made.shift_remove("key");
            if is_new {
                // Another run draws another one.
                made.shift_remove("id");
            }
        }
        return admin.print(&made, fields);
    }
    let secret = made["key"].as_str().map(plain);
    let secret = secret.ok_or_else(|| Stopped::new(exit::UNAVAILABLE, "the answer has no `key`"))?;
    if options.quiet {
        return super::print(&secret);
    }
    admin.print(&made, |made| format!("{}\n\nThe key is shown this once: keep it now.", fields(made)))
}

fn rows(keys: &[Value]) -> String {
    let columns = ["id", "name", "user", "team", "tier", "status", "limits", "expires"];
    let names = columns.map(str::to_uppercase);
    table(
        &names.each_ref().map(String::as_str),
        keys.iter().map(|key| columns.iter().map(|column| cell(&key[*column])).collect()),
    )
}

/// The body of an import: as the admin API takes it, or the list alone.
fn read(file: &Path) -> Result<Value, Stopped> {
    let wrong = |why: &dyn std::fmt::Display| Stopped::new(exit::USAGE, format!("{}: {why}", file.display()));
    let source: Box<dyn Read> = match file.as_os_str() == "-" {
        true => Box::new(std::io::stdin()),
        false => Box::new(std::fs::File::open(file).map_err(|error| wrong(&error))?),
    };
    let mut text = Vec::new();
    source.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| wrong(&error))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(&format!("is larger than {FILE_BYTES_MAX} bytes; import it in parts")));
    }
    match serde_json::from_slice(&text).map_err(|error| wrong(&error))? {
        keys @ Value::Array(_) => Ok(json!({ "keys": keys })),
        body @ Value::Object(_) => Ok(body),
        _ => Err(wrong(&"is no list of keys")),
    }
}

/// `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}
