//! `models`: names, providers, and fallbacks that lead somewhere.

use std::collections::HashMap;

use super::keys::{OPENAI, PRICE_SECTION, SIMULATED, TOKEN_WEIGHTS};
use super::kind::Section;
use super::problem::{Origin, Problems, quoted};
use super::resolve::{Index, Item, decimal, duration, integer, read, texts};
use super::scalar;
use super::tree::Node;
use super::{Count, Deadlines, Model, Price, Provider, ProviderKind, Secret, TokenWeights};

/// The name that stands for every model. Only the environment can give it.
const EVERY_MODEL: &str = "*";

/// Models named in the message about a circle.
const CIRCLE_SHOWN_MAX: usize = 8;

/// All models that are whole, and the names of all that have one.
pub(super) fn models(root: &Node, problems: &mut Problems) -> (Vec<Model>, Index) {
    let nodes = root.get("models").map_or(&[][..], |entry| entry.value.items());
    let mut index = Index::default();
    for (i, node) in nodes.iter().enumerate() {
        add_names(node, &format!("models[{i}]"), &mut index, problems);
    }
    if nodes.is_empty() {
        index.leave_open();
    }
    let resolved = |(i, node)| model(node, &format!("models[{i}]"), &index, problems);
    let models = nodes.iter().enumerate().filter_map(resolved).collect();
    check_circles(nodes, &index, problems);
    (models, index)
}

fn add_names(node: &Node, path: &str, index: &mut Index, problems: &mut Problems) {
    let names = texts(node, "name", path);
    let Some(own) = names.first().filter(|item| scalar::name(item.text).is_ok()).cloned() else {
        index.leave_open();
        return;
    };
    for item in std::iter::once(own.clone()).chain(texts(node, "aliases", path)) {
        if item.text == EVERY_MODEL {
            match item.at {
                Origin::Variable(_) => index.leave_open(),
                _ => problems.error(
                    item.at,
                    &item.path,
                    "`*` is not a name",
                    "TOLLGATE_UPSTREAM serves every model",
                ),
            }
        }
        if !index.add(item.text, own.text) {
            let message = format!("a second model is called {}", quoted(item.text));
            problems.error(item.at, &item.path, message, "names and aliases are unique");
        }
    }
}

fn model(node: &Node, path: &str, index: &Index, problems: &mut Problems) -> Option<Model> {
    let name = read(node, "name", |text| scalar::name(text).map(|()| text.to_owned()));
    let fallback = fallback(node, path, index, problems);
    let mut providers: Vec<Provider> = Vec::new();
    for node in node.get("providers").map_or(&[][..], |entry| entry.value.items()) {
        if let Some(mut provider) = provider(node) {
            provider.name = unique(provider.name, &providers);
            providers.push(provider);
        }
    }
    Some(Model {
        name: name?,
        aliases: texts(node, "aliases", path).iter().map(|item| item.text.to_owned()).collect(),
        fallback,
        providers,
        count: read(node, "count", count)?,
        token_weights: token_weights(&node.get("token_weights")?.value)?,
    })
}

fn count(text: &str) -> Result<Count, scalar::Fault> {
    match text {
        "estimate" => Ok(Count::Estimate),
        "exact" => Ok(Count::Exact),
        _ => scalar::fault("is not known", ""),
    }
}

/// Both have three decimals, so they are thousandths.
fn token_weights(node: &Node) -> Option<TokenWeights> {
    let weight = |key| decimal(node, TOKEN_WEIGHTS.key(key)?).and_then(|weight| u16::try_from(weight).ok());
    Some(TokenWeights { cached_input: weight("cached_input")?, reasoning: weight("reasoning")? })
}

/// Money per million tokens with six decimals is 10⁻¹² a token.
fn price(node: &Node) -> Option<Price> {
    let node = &node.get("price")?.value;
    let money = |key| decimal(node, PRICE_SECTION.key(key)?);
    let input = money("input")?;
    Some(Price { input, cached_input: money("cached_input").unwrap_or(input), output: money("output")? })
}

fn fallback(node: &Node, path: &str, index: &Index, problems: &mut Problems) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for item in texts(node, "fallback", path) {
        let Some(name) = index.look_up("model", &item, problems) else {
            continue;
        };
        if out.contains(&name) {
            problems.error(item.at, &item.path, format!("{} is listed twice", quoted(&name)), "");
        }
        out.push(name);
    }
    out
}

/// A second provider on the same host is `…-2`.
fn unique(name: String, others: &[Provider]) -> String {
    let is_free = |name: &str| others.iter().all(|other| other.name != name);
    if is_free(&name) {
        return name;
    }
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    numbered.into_iter().find(|name| is_free(name)).unwrap_or(name)
}

fn provider(node: &Node) -> Option<Provider> {
    let (name, kind, section) = match read(node, "type", |text| Ok(text == "simulated"))? {
        true => ("simulated".to_owned(), simulated(node)?, &SIMULATED),
        false => {
            let base = read(node, "url", scalar::base_url)?;
            (base.authority()?.to_string(), openai(node, base)?, &OPENAI)
        }
    };
    Some(Provider {
        name,
        kind,
        model_name: read(node, "model_name", |text| scalar::name(text).map(|()| text.to_owned())),
        deadlines: deadlines(node, section)?,
        price: price(node),
    })
}

fn openai(node: &Node, base: http::Uri) -> Option<ProviderKind> {
    Some(ProviderKind::Openai {
        base,
        key: read(node, "key", |text| scalar::secret(text).map(|()| Secret::new(text))),
        stream_usage: read(node, "stream_usage", scalar::boolean)?,
    })
}

fn simulated(node: &Node) -> Option<ProviderKind> {
    let number = |key| integer(node, SIMULATED.key(key)?).and_then(|number| u32::try_from(number).ok());
    Some(ProviderKind::Simulated {
        latency: duration(node, SIMULATED.key("latency")?)?,
        tokens_per_second: number("tokens_per_second")?,
        completion_tokens: number("completion_tokens")?,
        fail_rate: read(node, "fail_rate", scalar::fraction)?,
    })
}

fn deadlines(node: &Node, section: &Section) -> Option<Deadlines> {
    Some(Deadlines {
        connect: duration(node, section.key("connect_timeout")?)?,
        first_token: duration(node, section.key("first_token_timeout")?)?,
        idle: duration(node, section.key("idle_timeout")?)?,
        total: duration(node, section.key("timeout")?)?,
    })
}

/// How far the search for circles has come with a model.
#[derive(Clone, Copy, PartialEq)]
enum Visit {
    Open,
    Done,
}

/// A fallback that leads back to where it started. Each circle is reported once, where it closes.
fn check_circles(nodes: &[Node], index: &Index, problems: &mut Problems) {
    let mut edges: HashMap<&str, Vec<Item<'_>>> = HashMap::new();
    let mut order = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        let path = format!("models[{i}]");
        if let Some(name) = node.get("name").and_then(|entry| entry.value.as_text()) {
            edges.entry(name).or_insert_with(|| texts(node, "fallback", &path));
            order.push(name);
        }
    }
    let mut visits: HashMap<&str, Visit> = HashMap::new();
    for start in order {
        // Depth first, on a stack of its own: a chain may be as long as the file has models.
        let mut trail: Vec<(&str, usize)> = Vec::new();
        if !visits.contains_key(start) {
            visits.insert(start, Visit::Open);
            trail.push((start, 0));
        }
        while let Some((name, next)) = trail.last_mut() {
            let Some(item) = edges.get(name).and_then(|items| items.get(*next)) else {
                visits.insert(name, Visit::Done);
                trail.pop();
                continue;
            };
            *next += 1;
            let Some((target, _)) = index.meaning(item.text).and_then(|name| edges.get_key_value(name))
            else {
                continue;
            };
            match visits.get(target) {
                Some(Visit::Done) => {}
                Some(Visit::Open) => report_circle(item, target, &trail, problems),
                None => {
                    visits.insert(target, Visit::Open);
                    trail.push((target, 0));
                }
            }
        }
    }
}

fn report_circle(item: &Item<'_>, target: &str, trail: &[(&str, usize)], problems: &mut Problems) {
    let mut names: Vec<String> = trail
        .iter()
        .skip_while(|(name, _)| *name != target)
        .map(|(name, _)| super::problem::shown(name))
        .collect();
    if names.len() > CIRCLE_SHOWN_MAX {
        names.truncate(CIRCLE_SHOWN_MAX);
        names.push("…".to_owned());
    }
    names.push(super::problem::shown(target));
    let message = format!("the fallback goes in a circle: {}", names.join(" → "));
    problems.error(item.at, &item.path, message, "");
}
