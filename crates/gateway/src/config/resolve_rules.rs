//! `tiers` and `limits`: both become rules.

use std::collections::HashMap;
use std::sync::Arc;

use tollgate_limiter::{Algorithm, Limit, Quota, Scope, Unit, WhenDown};

use super::keys::LIMIT;
use super::kind::join;
use super::problem::{Origin, Problems, quoted};
use super::resolve::{Index, Item, Names, items, read, texts};
use super::scalar;
use super::tree::{Entry, Node, Value};
use super::{Defaults, Match, Rule};

/// Limits of one rule.
const LIMITS_MAX: usize = 16;

/// The names in `tiers`.
pub(super) fn tier_names(root: &Node) -> Index {
    let mut index = Index::default();
    for tier in tiers(root) {
        index.add(&tier.key, &tier.key);
    }
    index
}

/// All rules, tiers first.
pub(super) fn rules(root: &Node, names: &Names<'_>, problems: &mut Problems) -> Vec<Rule> {
    let mut reader =
        Reader { defaults: defaults(root), shared: has_redis(root), seen: HashMap::new(), problems };
    let mut rules: Vec<Rule> = tiers(root).map(|entry| reader.tier(entry)).collect();
    let limits = root.get("limits").map_or(&[][..], |entry| entry.value.items());
    for (index, node) in limits.iter().enumerate() {
        rules.extend(reader.rule(node, &format!("limits[{index}]"), names));
    }
    rules
}

fn has_redis(root: &Node) -> bool {
    let redis = root.get("dependencies").and_then(|entry| entry.value.get("redis"));
    redis.is_some_and(|entry| matches!(entry.value.value, Value::Map(_)))
}

/// What limits do that do not say.
pub(super) fn defaults(root: &Node) -> Defaults {
    let strategy = root
        .get("settings")
        .and_then(|entry| read(&entry.value, "rate_limiting_strategy", scalar::strategy))
        .unwrap_or(Algorithm::FixedWindow);
    let redis = root.get("dependencies").and_then(|entry| entry.value.get("redis"));
    let when_down = redis.and_then(|entry| when_down(&entry.value)).unwrap_or_default();
    // Known by its beginning, whatever else is wrong with it.
    let url = redis.and_then(|entry| Some(entry.value.get("url")?.value.as_text()?.to_owned()));
    let money_is_replicated =
        url.is_some_and(|url| ["+sentinel://", "+cluster://"].iter().any(|kind| url.contains(kind)));
    Defaults { strategy, when_down, money_is_replicated }
}

/// A rule that stands over those of the file: `node` is checked and complete, but for what `under`, the rule of that
/// name in the file, says already.
pub(super) fn over(
    node: &Node,
    name: &str,
    under: Option<&Rule>,
    defaults: Defaults,
    names: &Names<'_>,
    problems: &mut Problems,
) -> Rule {
    let like = |limit: &Arc<Limit>| Defaults {
        strategy: limit.algorithm(),
        when_down: limit.while_down(),
        ..defaults
    };
    let defaults = under.and_then(|rule| rule.limits.first()).map_or(defaults, like);
    let mut reader = Reader { defaults, shared: true, seen: HashMap::new(), problems };
    let mut rule = under.cloned().unwrap_or_else(|| Rule {
        name: name.to_owned(),
        matches: Match::default(),
        per: Scope::GLOBAL,
        limits: Vec::new(),
        deny: false,
    });
    if let Some(entry) = node.get("match") {
        rule.matches = reader.matches(&entry.value, "match", names);
    }
    if node.get("per").is_some() {
        rule.per = reader.scope(node, "");
    }
    rule.deny = read(node, "deny", scalar::boolean).unwrap_or_default();
    rule.limits = match rule.deny {
        true => Vec::new(),
        false => reader.limits(&rule, reader.way(node), &texts(node, "limit", "")),
    };
    rule
}

/// The limits that a key has of its own, per key; `at` is what they are called in messages.
pub(super) fn of_key(
    node: &Node,
    at: &str,
    rule: &str,
    defaults: Defaults,
    problems: &mut Problems,
) -> Vec<Arc<Limit>> {
    let mut reader = Reader { defaults, shared: true, seen: HashMap::new(), problems };
    let rule = Rule {
        name: rule.to_owned(),
        matches: Match::default(),
        per: Scope::of([tollgate_limiter::Dimension::ApiKey]),
        limits: Vec::new(),
        deny: false,
    };
    let way = reader.usual();
    reader.limits(&rule, way, &items(node, at))
}

fn tiers(root: &Node) -> impl Iterator<Item = &Entry> {
    let entries = root.get("tiers").map_or(&[][..], |entry| entry.value.entries());
    entries.iter().filter(|entry| !entry.key.starts_with("x-"))
}

struct Reader<'a> {
    defaults: Defaults,
    /// Counters are in Redis.
    shared: bool,
    /// Where each name was first given.
    seen: HashMap<String, Origin>,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn tier(&mut self, entry: &Entry) -> Rule {
        let path = join("tiers", &entry.key);
        self.note_name(&entry.key, entry.at, &path);
        let matches = Match { tier: vec![entry.key.clone()], ..Match::default() };
        let mut rule =
            Rule { name: entry.key.clone(), matches, per: Scope::GLOBAL, limits: Vec::new(), deny: false };
        match &entry.value.value {
            Value::Map(_) => {
                self.durability(&entry.value, &path);
                rule.per = self.scope(&entry.value, &path);
                rule.limits =
                    self.limits(&rule, self.way(&entry.value), &texts(&entry.value, "limit", &path));
            }
            _ => {
                rule.per = Scope::of([tollgate_limiter::Dimension::User, tollgate_limiter::Dimension::Model]);
                rule.limits = self.limits(&rule, self.usual(), &items(&entry.value, &path));
            }
        }
        rule
    }

    fn rule(&mut self, node: &Node, path: &str, names: &Names<'_>) -> Option<Rule> {
        let name = read(node, "name", |text| scalar::rule_name(text).map(|()| text.to_owned()));
        if let (Some(name), Some(entry)) = (&name, node.get("name")) {
            self.note_name(name, entry.value.at, &join(path, "name"));
        }
        let matches = node.get("match").map(|entry| self.matches(&entry.value, &join(path, "match"), names));
        let mut rule = Rule {
            // A stand-in, so that the limits of a rule with a faulty name are looked at too.
            name: name.clone().unwrap_or_else(|| "unnamed".to_owned()),
            matches: matches.unwrap_or_default(),
            per: self.scope(node, path),
            limits: Vec::new(),
            deny: false,
        };
        self.durability(node, path);
        rule.deny = self.denies(node, path)?;
        if !rule.deny {
            rule.limits = self.limits(&rule, self.way(node), &texts(node, "limit", path));
        }
        name.map(|_| rule)
    }

    /// Whether a rule refuses what it matches; what is missing if not, and what must not stand beside it if so. `None`:
    /// it says neither.
    fn denies(&mut self, node: &Node, path: &str) -> Option<bool> {
        let deny = read(node, "deny", scalar::boolean)?;
        if !deny {
            for key in ["per", "limit"].into_iter().filter(|key| node.get(key).is_none()) {
                let hint = LIMIT.key(key).map_or_else(String::new, super::kind::Key::hint);
                let instead = if key == "limit" { "; or write `deny: true`" } else { "" };
                self.problems.error(node.at, path, format!("{} is missing", quoted(key)), hint + instead);
            }
            return Some(false);
        }
        for key in ["limit", "per", "strategy", "mode", "shadow", "when_down", "durability"] {
            if let Some(entry) = node.get(key).filter(|entry| entry.at != Origin::Default) {
                let message = format!("{} says nothing beside `deny: true`", quoted(key));
                self.problems.error(entry.at, &join(path, key), message, "keep one of them");
            }
        }
        Some(true)
    }

    fn note_name(&mut self, name: &str, at: Origin, path: &str) {
        match self.seen.get(name) {
            Some(first) => {
                let message = format!("a second rule or tier is called {}", quoted(name));
                let help = format!("the first is at {}", self.problems.place(*first));
                self.problems.error(at, path, message, help);
            }
            None => drop(self.seen.insert(name.to_owned(), at)),
        }
    }

    fn matches(&mut self, node: &Node, path: &str, names: &Names<'_>) -> Match {
        let texts = |key| texts(node, key, path);
        let plain = |key, check: fn(&str) -> Result<(), scalar::Fault>| -> Vec<String> {
            texts(key)
                .iter()
                .filter(|item| check(item.text).is_ok())
                .map(|item| item.text.to_owned())
                .collect()
        };
        let team = texts("team");
        for item in team.iter().filter(|item| names.teams.meaning(item.text).is_none()) {
            let help = super::problem::suggest(item.text, names.teams.names());
            self.problems.warning(item.at, &item.path, format!("nobody is in team {}", item.quoted()), help);
        }
        let mut known = |key, what, index: &Index| -> Vec<String> {
            texts(key).iter().filter_map(|item| index.look_up(what, item, self.problems)).collect()
        };
        Match {
            authenticated: read(node, "authenticated", scalar::boolean),
            model: known("model", "model", names.models),
            user: known("user", "user", names.users),
            tier: known("tier", "tier", names.tiers),
            team: team.iter().map(|item| item.text.to_owned()).collect(),
            endpoint: plain("endpoint", scalar::endpoint),
            api_key: plain("api_key", scalar::key_id),
            ip: texts("ip").iter().filter_map(|item| scalar::network(item.text).ok()).collect(),
        }
    }

    fn scope(&mut self, node: &Node, path: &str) -> Scope {
        let items = texts(node, "per", path);
        for item in items.iter().filter(|item| item.text == "global" && items.len() > 1) {
            self.problems.error(item.at, &item.path, "`global` stands alone", "it means: per nothing");
        }
        Scope::of(items.iter().filter_map(|item| scalar::dimension(item.text).ok().flatten()))
    }

    /// A grant can wait for a replica only of a Redis.
    fn durability(&mut self, node: &Node, path: &str) {
        let replicated = read(node, "durability", |text| Ok(text == "replicated"));
        if let (Some(true), false, Some(entry)) = (replicated, self.shared, node.get("durability")) {
            let help = "leave it out, or name a Redis with a replica in dependencies.redis";
            self.problems.error(
                entry.value.at,
                &join(path, "durability"),
                "counters are in this process",
                help,
            );
        }
    }

    /// How limits count that say nothing of it.
    fn usual(&self) -> Way {
        let Defaults { strategy: algorithm, when_down, money_is_replicated } = self.defaults;
        Way { algorithm, shadow: false, when_down, replicated: None, money_is_replicated }
    }

    fn way(&self, node: &Node) -> Way {
        let algorithm = read(node, "strategy", scalar::strategy).unwrap_or(self.defaults.strategy);
        Way {
            algorithm,
            shadow: read(node, "shadow", scalar::boolean).unwrap_or_default(),
            when_down: when_down(node).unwrap_or(self.defaults.when_down),
            replicated: read(node, "durability", |text| Ok(text == "replicated")),
            money_is_replicated: self.defaults.money_is_replicated,
        }
    }

    fn limits(&mut self, rule: &Rule, way: Way, items: &[Item<'_>]) -> Vec<Arc<Limit>> {
        let mut limits: Vec<Arc<Limit>> = Vec::new();
        for item in items {
            let quotas = match Quota::parse_all(item.text) {
                Ok(quotas) => quotas,
                Err(error) => {
                    let message = match item.expanded {
                        true => "the value is no limit".to_owned(),
                        false => format!("{} is no limit: {}", quoted(item.text), error.problem()),
                    };
                    self.problems.error(item.at, &item.path, message, error.advice());
                    continue;
                }
            };
            if quotas.is_empty() && items.len() > 1 {
                self.problems.error(
                    item.at,
                    &item.path,
                    "`unlimited` stands alone",
                    "remove it, or the other limits",
                );
            }
            for quota in quotas {
                match limit(rule, quota, way, &limits) {
                    Ok(limit) => limits.push(Arc::new(limit)),
                    Err((message, help)) => self.problems.error(item.at, &item.path, message, help),
                }
            }
            if limits.len() > LIMITS_MAX {
                let message = format!("more than {LIMITS_MAX} limits in one rule");
                self.problems.error(item.at, &item.path, message, "");
                break;
            }
        }
        limits
    }
}

/// How the limits of a rule count.
#[derive(Clone, Copy)]
struct Way {
    algorithm: Algorithm,
    shadow: bool,
    when_down: WhenDown,
    /// Whether grants wait for a replica; what it says, and what money does when it says nothing.
    replicated: Option<bool>,
    money_is_replicated: bool,
}

fn when_down(node: &Node) -> Option<WhenDown> {
    match node.get("when_down")?.value.as_text()? {
        "share" => Some(WhenDown::Share),
        "open" => Some(WhenDown::Open),
        "closed" => Some(WhenDown::Closed),
        _ => None,
    }
}

/// One limit, or message and help.
fn limit(rule: &Rule, quota: Quota, way: Way, others: &[Arc<Limit>]) -> Result<Limit, (String, String)> {
    let limit = Limit::new(&rule.name, quota, way.algorithm, rule.per)
        .map(|limit| if way.shadow { limit.shadow() } else { limit })
        .map(|limit| limit.when_down(way.when_down))
        .map(|limit| {
            let money = limit.unit() == Unit::Cost && way.money_is_replicated;
            if way.replicated.unwrap_or(money) { limit.replicated() } else { limit }
        })
        .map_err(|error| (error.problem().to_owned(), String::new()))?;
    // A minute and 60 seconds are one window.
    let same = |other: &&Arc<Limit>| {
        other.unit() == limit.unit() && other.window().length() == limit.window().length()
    };
    match others.iter().find(same) {
        Some(other) => {
            let what = if quota.window().is_some() { "window" } else { "unit" };
            let message = format!("`{quota}` and `{}` have the same {what}", other.quota());
            Err((message, "keep one of them".to_owned()))
        }
        None => Ok(limit),
    }
}
