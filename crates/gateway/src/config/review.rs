//! What can be said only of the whole: how many limits one request can meet, and what works but perhaps not as meant.

mod idle;
mod price;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use tollgate_limiter::Dimension;

use super::kind::join;
use super::problem::{Origin, Problems, quoted};
use super::resolve::texts;
use super::scalar;
use super::tree::Node;
use super::{Auth, Key, Match, Model, Rule, User, endpoint_matches};

/// Limits one request may meet.
const MET_MAX: usize = 16;

/// Rules looked at to find the request that meets the most limits, over all callers, routes and networks.
const RULES_LOOKED_AT_MAX: usize = 20_000_000;

/// Canonical routes that cost something.
const ROUTES: [&str; 14] = [
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/responses",
    "/v1/videos",
];

/// What is looked at together: the tree, for places, and what it means.
pub(super) struct Whole<'a> {
    pub(super) root: &'a Node,
    pub(super) rules: &'a [Rule],
    pub(super) models: &'a [Model],
    pub(super) users: &'a [Arc<User>],
    pub(super) keys: &'a [Key],
    pub(super) auth: Auth,
}

/// Adds what is to be said of the whole.
pub(super) fn review(whole: &Whole<'_>, problems: &mut Problems) {
    count_met(whole, problems);
    idle::idle_limits(whole, problems);
    free_sessions(whole, problems);
    unknown_routes(whole.root, problems);
    if problems.any_errors() {
        // What seems to be missing may be what was refused.
        return;
    }
    unused_tiers(whole, problems);
    price::unpriced_providers(whole, problems);
    denied_to_all(whole, problems);
    if whole.auth == Auth::Required && whole.keys.is_empty() {
        let at = whole.root.get("auth").map_or(Origin::START, |entry| entry.value.at);
        let message = "a key is required and there is none: every request is refused";
        problems.warning(
            at,
            "auth",
            message,
            "add `users` with keys, set API_KEYS, or write `auth: optional`",
        );
    }
}

/// One caller, as far as rules can tell.
#[derive(Default)]
struct Caller<'a> {
    authenticated: bool,
    key: Option<&'a str>,
    user: Option<&'a str>,
    team: Option<&'a str>,
    tier: Option<&'a str>,
    /// The models it may use; `None`: all.
    models: Option<&'a [String]>,
}

fn count_met(whole: &Whole<'_>, problems: &mut Problems) {
    let at = whole.root.get("limits").or(whole.root.get("tiers")).map_or(Origin::START, |entry| entry.at);
    let mut seen = HashSet::new();
    let mut budget = RULES_LOOKED_AT_MAX;
    for caller in callers(whole) {
        budget = budget.saturating_sub(whole.rules.len());
        let met: Vec<usize> =
            (0..whole.rules.len()).filter(|i| is_for(&whole.rules[*i].matches, &caller)).collect();
        let rules: Vec<&Rule> = met.iter().map(|i| &whole.rules[*i]).collect();
        if rules.iter().map(|rule| rule.limits.len()).sum::<usize>() <= MET_MAX || !seen.insert(met) {
            continue;
        }
        let worst = worst(&rules, &mut budget);
        if budget == 0 {
            let message = format!(
                "too many combinations to tell whether one request can meet more than {MET_MAX} limits"
            );
            return problems.error(
                at,
                "limits",
                message,
                "name fewer users, keys and networks under `match`",
            );
        }
        if worst > MET_MAX {
            let who = match (caller.user, caller.authenticated) {
                (Some(name), _) => format!("user {}", quoted(name)),
                (None, true) => "a caller with a key".to_owned(),
                (None, false) => "a caller without a key".to_owned(),
            };
            let message = format!("one request of {who} can meet {worst} limits");
            return problems.error(
                at,
                "limits",
                message,
                format!("at most {MET_MAX}: match fewer, or merge rules"),
            );
        }
    }
}

fn callers<'a>(whole: &Whole<'a>) -> impl Iterator<Item = Caller<'a>> {
    let keys = whole.keys.iter().map(|key| {
        let user = key.user.as_deref();
        Caller {
            authenticated: true,
            key: Some(&key.id),
            user: user.map(|user| user.name.as_str()),
            team: user.and_then(|user| user.team.as_deref()),
            tier: user.and_then(|user| user.tier.as_deref()),
            models: user.and_then(|user| user.models.as_deref()),
        }
    });
    let anonymous = (whole.auth == Auth::Optional).then(Caller::default);
    keys.chain(anonymous)
}

fn is_for(matches: &Match, caller: &Caller<'_>) -> bool {
    let has = |allowed: &[String], value: Option<&str>| {
        allowed.is_empty() || value.is_some_and(|value| allowed.iter().any(|allowed| allowed == value))
    };
    matches.authenticated.is_none_or(|wanted| wanted == caller.authenticated)
        && has(&matches.api_key, caller.key)
        && has(&matches.user, caller.user)
        && has(&matches.team, caller.team)
        && has(&matches.tier, caller.tier)
}

/// The most limits that one request can meet, over routes, addresses and models. Ends early when the budget does.
fn worst(rules: &[&Rule], budget: &mut usize) -> usize {
    let routes = ROUTES.iter().copied().map(Some).chain([None]);
    // Networks nest or are apart, so the addresses that begin them see every overlap.
    let networks: HashSet<IpNet> = rules.iter().flat_map(|rule| rule.matches.ip.iter().copied()).collect();
    let addresses: Vec<Option<IpNet>> = networks.into_iter().map(Some).chain([None]).collect();
    let here = |rule: &Rule, route: Option<&str>, address: &Option<IpNet>| {
        let on_route = rule.matches.endpoint.is_empty()
            || route
                .is_some_and(|route| rule.matches.endpoint.iter().any(|glob| endpoint_matches(glob, route)));
        let from = rule.matches.ip.is_empty()
            || address.is_some_and(|address| {
                rule.matches.ip.iter().any(|network| network.contains(&address.addr()))
            });
        on_route && from
    };
    let mut worst = 0;
    for route in routes {
        for address in &addresses {
            *budget = budget.saturating_sub(rules.len());
            if *budget == 0 {
                return worst;
            }
            let met: Vec<&Rule> = rules.iter().copied().filter(|rule| here(rule, route, address)).collect();
            worst = worst.max(worst_model(&met));
        }
    }
    worst
}

fn worst_model(rules: &[&Rule]) -> usize {
    let mut of_any = 0;
    let mut by_model: HashMap<&str, usize> = HashMap::new();
    for rule in rules {
        if rule.matches.model.is_empty() {
            of_any += rule.limits.len();
        }
        let models: HashSet<&str> = rule.matches.model.iter().map(String::as_str).collect();
        for model in models {
            *by_model.entry(model).or_default() += rule.limits.len();
        }
    }
    of_any + by_model.values().max().copied().unwrap_or(0)
}

fn place_of_limits(root: &Node, rule: &Rule) -> (Origin, String) {
    if let Some(tier) = root.get("tiers").and_then(|tiers| tiers.value.get(&rule.name)) {
        return (tier.value.at, join("tiers", &rule.name));
    }
    let rules = root.get("limits").map_or(&[][..], |entry| entry.value.items());
    let is_it =
        |node: &Node| node.get("name").and_then(|entry| entry.value.as_text()) == Some(rule.name.as_str());
    let index = rules.iter().position(is_it).unwrap_or_default();
    let at =
        rules.get(index).and_then(|node| node.get("limit")).map_or(Origin::START, |entry| entry.value.at);
    (at, format!("limits[{index}].limit"))
}

/// A limit per session that a caller escapes by changing its User-Agent.
fn free_sessions(whole: &Whole<'_>, problems: &mut Problems) {
    if whole.auth == Auth::Required {
        return;
    }
    let is_anonymous = |rule: &&Rule| is_for(&rule.matches, &Caller::default()) && !rule.limits.is_empty();
    let rules: Vec<&Rule> = whole.rules.iter().filter(is_anonymous).collect();
    for rule in rules.iter().filter(|rule| rule.per.contains(Dimension::Session)) {
        let guards = |other: &&&Rule| {
            let covers = |wide: &[String], narrow: &[String]| wide.is_empty() || wide == narrow;
            let (wide, narrow) = (&other.matches, &rule.matches);
            other.per.contains(Dimension::Ip)
                && !other.per.contains(Dimension::Session)
                && covers(&wide.endpoint, &narrow.endpoint)
                && covers(&wide.model, &narrow.model)
                && (wide.ip.is_empty() || wide.ip == narrow.ip)
        };
        if rules.iter().find(guards).is_none() {
            let (at, path) = place_of_limits(whole.root, rule);
            let message = format!("rule {} is per session, and no rule is per ip", quoted(&rule.name));
            let help = "add one for the same requests, because a User-Agent is free to change";
            problems.warning(at, &path, message, help);
        }
    }
}

/// A rule that refuses every request is perhaps one whose conditions were forgotten.
fn denied_to_all(whole: &Whole<'_>, problems: &mut Problems) {
    let rules = whole.root.get("limits").map_or(&[][..], |entry| entry.value.items());
    for (index, node) in rules.iter().enumerate() {
        let has_conditions = node.get("match").is_some_and(|entry| !entry.value.entries().is_empty());
        let Some(deny) = node.get("deny").filter(|_| !has_conditions) else { continue };
        if deny.value.as_text() == Some("true") {
            let path = format!("limits[{index}].deny");
            problems.warning(deny.at, &path, "this refuses every request", "say under `match` which ones");
        }
    }
}

fn unused_tiers(whole: &Whole<'_>, problems: &mut Problems) {
    for tier in whole.root.get("tiers").map_or(&[][..], |entry| entry.value.entries()) {
        let is_used = whole.users.iter().any(|user| user.tier.as_deref() == Some(tier.key.as_str()));
        if !is_used && !tier.key.starts_with("x-") {
            let path = join("tiers", &tier.key);
            problems.warning(tier.at, &path, "no user is in this tier", "");
        }
    }
}

fn unknown_routes(root: &Node, problems: &mut Problems) {
    let rules = root.get("limits").map_or(&[][..], |entry| entry.value.items());
    for (index, rule) in rules.iter().enumerate() {
        let Some(entry) = rule.get("match") else { continue };
        for item in texts(&entry.value, "endpoint", &format!("limits[{index}].match")) {
            let is_path = scalar::endpoint(item.text).is_ok();
            if is_path && !ROUTES.iter().any(|route| endpoint_matches(item.text, route)) {
                let message = format!("no route is like {}", item.quoted());
                let help = super::problem::suggest(item.text, ROUTES.into_iter());
                problems.warning(item.at, &item.path, message, help);
            }
        }
    }
}
