//! What operators say while the gateway runs means the same as in the file: the same notation, checks and words.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde_json::Value as Json;
use tollgate_limiter::Limit;

use super::keys::LIMIT;
use super::problem::{Origin, Problems, quoted};
use super::resolve::{Index, Names};
use super::tree::{Entry, Node, Scalar, Value};
use super::{Config, Problem, Rule, Severity, User, check, resolve_rules, scalar};

/// Deepest value that is looked at.
const DEPTH_MAX: usize = 8;
/// A year: what is to be for longer is for ever.
const DURATION_MS_MAX: u64 = 366 * 86_400_000;

/// Why a text was refused, as a sentence: what is wrong, what is allowed.
pub type Fault = String;

/// Everything that a rule may refer to: the configuration's names, and those of users that operators added.
pub struct Known {
    models: Index,
    tiers: Index,
    users: Index,
    teams: Index,
}

/// The names of a configuration, and of more users.
pub fn table_of_names<'a>(config: &'a Config, users: impl Iterator<Item = &'a User>) -> Known {
    let mut known = Known {
        models: Index::default(),
        tiers: Index::default(),
        users: Index::default(),
        teams: Index::default(),
    };
    for model in &config.models {
        if model.name == "*" {
            known.models.leave_open();
        }
        known.models.add(&model.name, &model.name);
        for alias in &model.aliases {
            known.models.add(alias, &model.name);
        }
    }
    // A tier's rule is the one that is for the tier of its own name.
    for rule in config.rules.iter().filter(|rule| rule.matches.tier.contains(&rule.name)) {
        known.tiers.add(&rule.name, &rule.name);
    }
    for user in config.users.iter().map(|user| &**user).chain(users) {
        known.users.add(&user.name, &user.name);
        if let Some(team) = &user.team {
            known.teams.add(team, team);
        }
    }
    known
}

impl Known {
    /// The resolved name of a model.
    ///
    /// # Errors
    /// When there is no such model, with those there are.
    pub fn model(&self, name: &str) -> Result<String, Fault> {
        look_up(&self.models, "model", name)
    }

    /// A tier, where there is one of that name.
    ///
    /// # Errors
    /// When there is none, with those there are.
    pub fn tier(&self, name: &str) -> Result<String, Fault> {
        look_up(&self.tiers, "tier", name)
    }

    /// A user, where there is one of that name.
    ///
    /// # Errors
    /// When there is none, with the first of those there are.
    pub fn user(&self, name: &str) -> Result<String, Fault> {
        look_up(&self.users, "user", name)
    }
}

/// A rule over those of the file, written as an entry of `limits` without its name. What it leaves out of `match`, `per`
/// and `strategy` is as in the file's rule of that name.
///
/// # Errors
/// Everything that is wrong with it; `path` of each is the field.
pub fn over_rule(config: &Config, known: &Known, name: &str, spec: &Json) -> Result<Rule, Vec<Problem>> {
    let mut problems = Problems::new(None);
    let under = config.rules.iter().find(|rule| rule.name == name);
    if let Err(fault) = rule_name(name) {
        problems.error(Origin::START, "name", format!("{} {}", quoted(name), fault.what), fault.help);
    }
    let mut node = node(spec, 0);
    if let Value::Map(entries) = &mut node.value {
        // The table wants a name; this one is that of the path.
        let value = Node::text(Origin::START, "over");
        entries.insert(0, Entry { key: "name".to_owned(), at: Origin::START, value });
    }
    check::section(&LIMIT, &node, &mut problems);
    let says_no = node.get("deny").is_some_and(|deny| deny.value.as_text() == Some("true"));
    let needed = ["limit"].into_iter().chain(under.is_none().then_some("per")).filter(|_| !says_no);
    for key in needed.filter(|key| node.get(key).is_none()) {
        let help = LIMIT.key(key).map_or_else(String::new, super::kind::Key::hint);
        problems.error(Origin::START, key, format!("{} is missing", quoted(key)), help);
    }
    let names =
        Names { models: &known.models, tiers: &known.tiers, users: &known.users, teams: &known.teams };
    let rule = resolve_rules::over(&node, name, under, config.settings.defaults, &names, &mut problems);
    if problems.any_errors() { Err(errors(problems)) } else { Ok(rule) }
}

/// The limits of one key, in the notation of the file; `rule` is the name they are counted and reported under.
///
/// # Errors
/// Everything that is wrong with them; `path` of each begins with `limits`.
pub fn key_limits(
    rule: &str,
    defaults: super::Defaults,
    quotas: &[String],
) -> Result<Vec<Arc<Limit>>, Vec<Problem>> {
    let mut problems = Problems::new(None);
    let quotas = Json::from(quotas.to_vec());
    let limits = resolve_rules::of_key(&node(&quotas, 0), "limits", rule, defaults, &mut problems);
    if problems.any_errors() { Err(errors(problems)) } else { Ok(limits) }
}

/// A name people gave to something.
///
/// # Errors
/// When it is empty, too long, or has control characters.
pub fn name(text: &str) -> Result<String, Fault> {
    scalar::name(text).map(|()| text.to_owned()).map_err(|fault| sentence(text, fault))
}

/// `2027-01-01` (its beginning, UTC) or RFC 3339.
///
/// # Errors
/// When it is neither.
pub fn date(text: &str) -> Result<SystemTime, Fault> {
    scalar::date(text).map_err(|fault| sentence(text, fault))
}

/// `30m`, `1h`, `7d`: a second to a year.
///
/// # Errors
/// When it is no duration, or out of range.
pub fn duration(text: &str) -> Result<Duration, Fault> {
    scalar::duration(text, 1_000, DURATION_MS_MAX).map_err(|fault| sentence(text, fault))
}

/// A network, or one address.
///
/// # Errors
/// When it is neither.
pub fn network(text: &str) -> Result<IpNet, Fault> {
    scalar::network(text).map_err(|fault| sentence(text, fault))
}

/// `sha256:` and 64 hex digits. The message does not repeat the text.
///
/// # Errors
/// When it is anything else.
pub fn sha256(text: &str) -> Result<[u8; 32], Fault> {
    scalar::sha256(text).map_err(|fault| format!("the value {}; {}", fault.what, fault.help))
}

/// `endpoint:/v1/…`, which the fixed `PUT /admin/rate-limit/config` sets, or what the file allows.
fn rule_name(name: &str) -> Result<(), scalar::Fault> {
    match name.strip_prefix("endpoint:") {
        // The admin API has those two after names.
        Some(path) if ["/history", "/rollback"].iter().any(|ending| path.ends_with(ending)) => {
            scalar::fault("is no endpoint that is limited", "")
        }
        Some(path) if name.len() <= 128 && !path.contains('"') => scalar::endpoint(path),
        Some(_) => scalar::fault("is too long or has quotes", "at most 128 bytes"),
        None => scalar::rule_name(name),
    }
}

fn look_up(index: &Index, what: &str, name: &str) -> Result<String, Fault> {
    index.meaning(name).map(str::to_owned).ok_or_else(|| {
        let help = super::problem::suggest(name, index.names());
        format!("there is no {what} {}; {help}", quoted(name))
    })
}

fn sentence(text: &str, fault: scalar::Fault) -> Fault {
    let help = if fault.help.is_empty() { String::new() } else { format!("; {}", fault.help) };
    format!("{} {}{help}", quoted(text), fault.what)
}

fn errors(problems: Problems) -> Vec<Problem> {
    problems.into_list().into_iter().filter(|problem| problem.severity == Severity::Error).collect()
}

/// A value from a request's body as a tree of the file: numbers and booleans as they are written.
fn node(json: &Json, depth: usize) -> Node {
    let text = |text: String| Value::Scalar(Scalar { text, plain: true, expanded: false });
    let value = match json {
        _ if depth > DEPTH_MAX => Value::Null,
        Json::Null => Value::Null,
        Json::Bool(value) => text(value.to_string()),
        Json::Number(value) => text(value.to_string()),
        Json::String(value) => text(value.clone()),
        Json::Array(items) => Value::List(items.iter().map(|item| node(item, depth + 1)).collect()),
        Json::Object(entries) => {
            let entry = |(key, value): (&String, &Json)| Entry {
                key: key.clone(),
                at: Origin::START,
                value: node(value, depth + 1),
            };
            Value::Map(entries.iter().map(entry).collect())
        }
    };
    Node { at: Origin::START, value }
}
