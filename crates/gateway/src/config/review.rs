//! What can be said only of the whole: how many limits one request can meet, and what works but perhaps not as meant.

mod idle;
mod price;

use std::sync::Arc;

use tollgate_limiter::Dimension;

use super::kind::join;
use super::overlap::{Overlap, Overlaps, ROUTES, Who};
use super::problem::{Origin, Problems, quoted};
use super::resolve::texts;
use super::scalar;
use super::tree::Node;
use super::{Auth, Key, Model, Rule, User, endpoint_matches};

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

fn count_met(whole: &Whole<'_>, problems: &mut Problems) {
    let at = whole.root.get("limits").or(whole.root.get("tiers")).map_or(Origin::START, |entry| entry.at);
    let mut overlaps = Overlaps::among(whole.rules.to_vec());
    let worst = callers(whole).filter_map(|(who, _)| overlaps.look(who)).max_by_key(Overlap::weight);
    if let Some(overlap) = worst {
        problems.error(at, "limits", overlap.to_string(), overlap.help());
    }
}

/// Who may send requests, and the models each may use; `None`: all.
fn callers<'a>(whole: &Whole<'a>) -> impl Iterator<Item = (Who<'a>, Option<&'a [String]>)> {
    let models = |key: &'a Key| key.user.as_deref().and_then(|user| user.models.as_deref());
    let keys = whole.keys.iter().map(move |key| (Who::of(key), models(key)));
    let anonymous = (whole.auth == Auth::Optional).then(|| (Who::default(), None));
    keys.chain(anonymous)
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
    let is_anonymous = |rule: &&Rule| Who::default().is_meant(&rule.matches) && !rule.limits.is_empty();
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
