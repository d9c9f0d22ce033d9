//! How many limits one request can meet, over everybody who may send one: the store decides about so many at a time.

use std::collections::{HashMap, HashSet};
use std::fmt;

use ipnet::IpNet;
use tollgate_limiter::CHARGES_MAX;

use super::problem::quoted;
use super::{Key, Match, Rule, endpoint_matches};

/// Limits one request may meet.
pub const MET_MAX: usize = CHARGES_MAX;

/// Rules looked at to find the request that meets the most limits, over all callers, routes and networks.
const RULES_LOOKED_AT_MAX: usize = 20_000_000;
/// Rules named in a message.
const NAMED_MAX: usize = 20;

/// Canonical routes that cost something.
pub(super) const ROUTES: [&str; 14] = [
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

/// Somebody who may send requests, as far as rules can tell. The default: somebody without a key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Who<'a> {
    /// Has a key.
    pub authenticated: bool,
    /// Its id.
    pub key: Option<&'a str>,
    /// Name of its user.
    pub user: Option<&'a str>,
    /// Its team.
    pub team: Option<&'a str>,
    /// Its tier.
    pub tier: Option<&'a str>,
    /// How many limits the key has of its own.
    pub own: usize,
}

impl<'a> Who<'a> {
    /// Who has a key of the file.
    pub fn of(key: &'a Key) -> Self {
        let user = key.user.as_deref();
        Self {
            authenticated: true,
            key: Some(&key.id),
            user: user.map(|user| user.name.as_str()),
            team: user.and_then(|user| user.team.as_deref()),
            tier: user.and_then(|user| user.tier.as_deref()),
            own: key.own.limits.len(),
        }
    }

    /// Whether a rule can be for requests of this one.
    pub(super) fn is_meant(&self, matches: &Match) -> bool {
        let has = |allowed: &[String], value: Option<&str>| {
            allowed.is_empty() || value.is_some_and(|value| allowed.iter().any(|allowed| allowed == value))
        };
        matches.authenticated.is_none_or(|wanted| wanted == self.authenticated)
            && has(&matches.api_key, self.key)
            && has(&matches.user, self.user)
            && has(&matches.team, self.team)
            && has(&matches.tier, self.tier)
    }
}

/// More limits than one request may meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Whose request: ``user `alice` ``.
    pub who: String,
    /// How many limits; `None`: there are too many combinations to tell.
    pub limits: Option<usize>,
    /// Names of the rules that are met, in their order.
    pub rules: Vec<String>,
    /// Limits of the key itself among them.
    pub own: usize,
}

impl Overlap {
    /// How bad it is: what cannot be told is the worst.
    pub fn weight(&self) -> usize {
        self.limits.unwrap_or(usize::MAX)
    }

    /// What may be done about it.
    pub fn help(&self) -> String {
        match self.limits {
            Some(_) => format!("at most {MET_MAX}: match fewer, or merge rules"),
            None => "name fewer users, keys and networks under `match`".to_owned(),
        }
    }

    /// All of it, as a sentence: who meets how many, of which rules, and what may be done.
    pub fn sentence(&self) -> String {
        let of = if self.limits.is_some() { format!(", of {}", self.rules()) } else { String::new() };
        format!("{self}{of}; {}", self.help())
    }

    /// `a, b, and 2 of the key itself`.
    fn rules(&self) -> String {
        let mut named = self.rules.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        if self.rules.len() > NAMED_MAX {
            named += ", …";
        }
        if self.own > 0 {
            named += &format!(", and {} of the key itself", self.own);
        }
        named
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limits {
            Some(limits) => write!(f, "one request of {} can meet {limits} limits", self.who),
            None => write!(
                f,
                "too many combinations to tell whether one request can meet more than {MET_MAX} limits"
            ),
        }
    }
}

/// Looks for the request that meets the most limits. People whom no rule tells apart are looked at once.
pub struct Overlaps {
    rules: Vec<Rule>,
    /// Limits of all rules: nobody meets more.
    total: usize,
    named: Named,
    by_class: HashMap<Class, usize>,
    by_rules: HashMap<Vec<usize>, usize>,
    /// What the classes meet.
    found: Vec<Found>,
    budget: usize,
}

/// Names that some rule asks for, numbered; all others are alike.
#[derive(Default)]
struct Named {
    keys: HashMap<String, usize>,
    users: HashMap<String, usize>,
    teams: HashMap<String, usize>,
    tiers: HashMap<String, usize>,
}

/// People whom no rule tells apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Class {
    authenticated: bool,
    key: Option<usize>,
    user: Option<usize>,
    team: Option<usize>,
    tier: Option<usize>,
}

struct Found {
    /// Rules that can be for them.
    rules: Vec<usize>,
    /// Limits of all of those.
    total: usize,
    /// The most that one request meets, and of which rules; worked out when it is needed.
    most: Option<(usize, Vec<usize>)>,
}

impl Overlaps {
    /// Among these rules; nobody was looked at so far.
    pub fn among(rules: Vec<Rule>) -> Self {
        fn number(names: &mut HashMap<String, usize>, more: &[String]) {
            for name in more {
                let next = names.len();
                names.entry(name.clone()).or_insert(next);
            }
        }
        let mut named = Named::default();
        for Match { api_key, user, team, tier, .. } in rules.iter().map(|rule| &rule.matches) {
            number(&mut named.keys, api_key);
            number(&mut named.users, user);
            number(&mut named.teams, team);
            number(&mut named.tiers, tier);
        }
        let total = count(rules.iter());
        let (by_class, by_rules, found) = Default::default();
        Self { rules, total, named, by_class, by_rules, found, budget: RULES_LOOKED_AT_MAX }
    }

    /// What one request of somebody can meet, if it is too much.
    pub fn look(&mut self, who: Who<'_>) -> Option<Overlap> {
        if self.total + who.own <= MET_MAX {
            return None;
        }
        let place = self.class_of(who);
        let found = &mut self.found[place];
        if found.total + who.own <= MET_MAX {
            return None;
        }
        if found.most.is_none() {
            let rules: Vec<_> = found.rules.iter().map(|&index| (index, &self.rules[index])).collect();
            found.most = Some(most(&rules, &mut self.budget));
        }
        if self.budget == 0 {
            return Some(Overlap { who: String::new(), limits: None, rules: Vec::new(), own: 0 });
        }
        let (limits, rules) = found.most.as_ref()?;
        let limits = limits + who.own;
        if limits <= MET_MAX {
            return None;
        }
        let whom = match (who.user, who.authenticated) {
            (Some(name), _) => format!("user {}", quoted(name)),
            (None, true) => "a caller with a key".to_owned(),
            (None, false) => "a caller without a key".to_owned(),
        };
        let rules = rules.iter().map(|&index| self.rules[index].name.clone()).collect();
        Some(Overlap { who: whom, limits: Some(limits), rules, own: who.own })
    }

    /// Where the class of somebody stands in `found`.
    fn class_of(&mut self, who: Who<'_>) -> usize {
        let among = |names: &HashMap<String, usize>, name: Option<&str>| names.get(name?).copied();
        let class = Class {
            authenticated: who.authenticated,
            key: among(&self.named.keys, who.key),
            user: among(&self.named.users, who.user),
            team: among(&self.named.teams, who.team),
            tier: among(&self.named.tiers, who.tier),
        };
        if let Some(place) = self.by_class.get(&class) {
            return *place;
        }
        self.budget = self.budget.saturating_sub(self.rules.len());
        let rules: Vec<usize> =
            (0..self.rules.len()).filter(|&index| who.is_meant(&self.rules[index].matches)).collect();
        let place = match self.by_rules.get(&rules) {
            Some(place) => *place,
            None => {
                let total = count(rules.iter().map(|&index| &self.rules[index]));
                self.by_rules.insert(rules.clone(), self.found.len());
                self.found.push(Found { rules, total, most: None });
                self.found.len() - 1
            }
        };
        self.by_class.insert(class, place);
        place
    }
}

fn count<'a>(rules: impl Iterator<Item = &'a Rule>) -> usize {
    rules.map(|rule| rule.limits.len()).sum()
}

/// The most limits that one request can meet, over routes, addresses and models, and their rules. Ends early when the
/// budget does.
fn most(rules: &[(usize, &Rule)], budget: &mut usize) -> (usize, Vec<usize>) {
    let routes = ROUTES.iter().copied().map(Some).chain([None]);
    // Networks nest or are apart, so the addresses that begin them see every overlap.
    let networks: HashSet<IpNet> =
        rules.iter().flat_map(|(_, rule)| rule.matches.ip.iter().copied()).collect();
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
    let mut most = (0, Vec::new());
    for route in routes {
        for address in &addresses {
            *budget = budget.saturating_sub(rules.len());
            if *budget == 0 {
                return most;
            }
            let met: Vec<(usize, &Rule)> =
                rules.iter().copied().filter(|(_, rule)| here(rule, route, address)).collect();
            let (limits, model) = most_by_model(&met);
            if limits > most.0 {
                let met = met.iter().filter(|(_, rule)| {
                    let models = &rule.matches.model;
                    models.is_empty() || model.is_some_and(|model| models.iter().any(|name| name == model))
                });
                most = (limits, met.map(|(index, _)| *index).collect());
            }
        }
    }
    most
}

/// The most limits that a request for one model meets, and which model, if it matters.
fn most_by_model<'a>(rules: &[(usize, &'a Rule)]) -> (usize, Option<&'a str>) {
    let mut of_any = 0;
    let mut by_model: HashMap<&str, usize> = HashMap::new();
    for (_, rule) in rules {
        if rule.matches.model.is_empty() {
            of_any += rule.limits.len();
        }
        let models: HashSet<&str> = rule.matches.model.iter().map(String::as_str).collect();
        for model in models {
            *by_model.entry(model).or_default() += rule.limits.len();
        }
    }
    match by_model.into_iter().max_by_key(|(_, limits)| *limits) {
        Some((model, limits)) => (of_any + limits, Some(model)),
        None => (of_any, None),
    }
}
