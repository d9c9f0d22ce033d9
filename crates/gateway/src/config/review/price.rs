//! Limits in money on what has no price.

use std::collections::{BTreeSet, HashMap};

use tollgate_limiter::{Limit, Unit};

use super::super::problem::{Problems, quoted};
use super::super::{Model, Rule};
use super::{Whole, callers};

/// Callers looked at for all rules together; past that, every model counts as one they may use.
const LOOKS_MAX: usize = 20_000_000;

/// Warns of each provider that such a limit can meet and that has no price: its requests cost nothing there.
pub(super) fn unpriced_providers(whole: &Whole<'_>, problems: &mut Problems) {
    let by_name: HashMap<&str, &Model> = whole.models.iter().map(|m| (m.name.as_str(), m)).collect();
    let mut first: HashMap<&str, (&Rule, &Limit)> = HashMap::new();
    let mut budget = LOOKS_MAX;
    for rule in whole.rules {
        let Some(limit) = rule.limits.iter().find(|limit| limit.unit() == Unit::Cost) else {
            continue;
        };
        for model in met(rule, whole, &by_name, &mut budget) {
            first.entry(model).or_insert((rule, limit));
        }
    }
    let nodes = whole.root.get("models").map_or(&[][..], |entry| entry.value.items());
    for (i, (model, node)) in whole.models.iter().zip(nodes).enumerate() {
        let Some((rule, limit)) = first.get(model.name.as_str()) else { continue };
        let providers = node.get("providers").map_or(&[][..], |entry| entry.value.items());
        let unpriced = |(_, (provider, _)): &(usize, (&super::super::Provider, _))| provider.price.is_none();
        for (j, (provider, node)) in model.providers.iter().zip(providers).enumerate().filter(unpriced) {
            let message = format!(
                "`{}` of rule {} counts nothing for provider {} of model {}: it has no price",
                limit.quota(),
                quoted(&rule.name),
                quoted(&provider.name),
                quoted(&model.name),
            );
            let path = format!("models[{i}].providers[{j}]");
            problems.warning(node.at, &path, message, "give it one: price: { input: 0.15, output: 0.60 }");
        }
    }
}

/// The models that requests a rule is for can end up at, fallbacks included.
fn met<'a>(
    rule: &'a Rule,
    whole: &Whole<'a>,
    by_name: &HashMap<&'a str, &'a Model>,
    budget: &mut usize,
) -> BTreeSet<&'a str> {
    // What callers may use; `None`: everything.
    let mut allowed: Option<BTreeSet<&str>> = Some(BTreeSet::new());
    for (_, models) in callers(whole).filter(|(who, _)| who.is_meant(&rule.matches)) {
        *budget = budget.saturating_sub(1);
        match (models, &mut allowed) {
            (Some(models), Some(allowed)) if *budget > 0 => allowed.extend(models.iter().map(String::as_str)),
            _ => {
                allowed = None;
                break;
            }
        }
    }
    let may = |name: &str| allowed.as_ref().is_none_or(|allowed| allowed.contains(name));
    let asked = |model: &&Model| rule.matches.model.is_empty() || rule.matches.model.contains(&model.name);
    let mut found = BTreeSet::new();
    let mut open: Vec<&Model> = whole.models.iter().filter(asked).collect();
    while let Some(model) = open.pop() {
        if may(&model.name) && found.insert(model.name.as_str()) {
            open.extend(model.fallback.iter().filter_map(|name| by_name.get(name.as_str())));
        }
    }
    found
}
