//! The rules of the file with those of operators over them; and that no request can meet more limits than a store decides
//! about together.
//!
//! A write or a reload that would make it so is refused. What cannot be refused is a file that was changed while nothing
//! ran: then the newest rules of operators are put aside until there is room.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::compile::{KEY_RULE, known};
use super::records::{KeyRecord, LimitOverride};
use super::time::Time;
use super::value::{Control, Record};
use crate::config::{self, Auth, Config, Overlap, Overlaps, Rule, User, Who};

/// The rules that hold, and those of operators that do not.
pub struct Merged {
    /// In the order of the file; what operators added comes last.
    pub rules: Vec<Rule>,
    /// Rules of operators that are not in force.
    pub aside: Vec<Aside>,
    /// What one request can meet too much of, with limits of keys; such requests are refused.
    pub overlap: Option<Overlap>,
}

/// A rule of an operator that is not in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// Its name.
    pub name: String,
    /// Why.
    pub why: String,
    /// It would be one too many; else it means nothing under this configuration.
    pub overlaps: bool,
}

/// The rules of the file with those over them that hold now.
pub fn merged(config: &Config, control: &Control) -> Merged {
    let (mut overs, mut aside) = overs(config, control);
    let rules = loop {
        let rules = layered(config, overs.iter().map(|over| &over.rule));
        if overs.is_empty() {
            break rules;
        }
        let mut overlaps = Overlaps::among(rules.clone());
        // Limits of keys are left out: one key that has too many is no reason to change what holds for everybody.
        let look = |who: Who<'_>| overlaps.look(Who { own: 0, ..who });
        let Some(overlap) = worst(config, control, look) else { break rules };
        let met = overs.iter().enumerate().filter(|(_, over)| overlap.rules.contains(&over.rule.name));
        let Some((newest, _)) = met.max_by_key(|(_, over)| over.record.version) else { break rules };
        let over = overs.remove(newest);
        let name = over.rule.name.clone();
        aside.push(Aside { name, why: overlap.sentence(), overlaps: true });
    };
    let mut overlaps = Overlaps::among(rules.clone());
    let overlap = worst(config, control, |who| overlaps.look(who));
    Merged { rules, aside, overlap }
}

/// Refuses a change after which one request could meet more limits, and too many, than before it: at once, or when
/// rules end that are set for a time only. Both are a configuration, and what operators say over it.
///
/// # Errors
/// What such a request would meet.
pub fn fits(before: (&Config, &Control), after: (&Config, &Control)) -> Result<(), Overlap> {
    let Some(overlap) = Room::under(after.0, after.1).worst() else { return Ok(()) };
    let was = Room::under(before.0, before.1).worst();
    refuse(Some(overlap), || was)
}

/// What requests of people can meet, now and when rules end that are set for a time only.
pub struct Room<'a> {
    control: &'a Control,
    people: People<'a>,
    ahead: Vec<Overlaps>,
}

impl<'a> Room<'a> {
    /// Under the rules of a configuration with those of operators over them.
    pub fn under(config: &'a Config, control: &'a Control) -> Self {
        let (overs, _) = overs(config, control);
        let over_file = |over: &&Over<'_>| config.rules.iter().any(|rule| rule.name == over.rule.name);
        let ends = overs.iter().filter(over_file).filter_map(|over| over.record.value.expires);
        let ends: BTreeSet<Option<Time>> = ends.map(Some).chain([None]).collect();
        let ahead = ends.into_iter().map(|end| {
            let holds = |over: &&Over<'_>| {
                end.is_none_or(|end| over.record.value.expires.is_none_or(|theirs| theirs > end))
            };
            Overlaps::among(layered(config, overs.iter().filter(holds).map(|over| &over.rule)))
        });
        Self { control, people: People::of(config, control), ahead: ahead.collect() }
    }

    /// Refuses what a key of the control data would become, if its requests could meet more than before, and too much.
    ///
    /// # Errors
    /// What they would meet.
    pub fn for_key(
        &mut self,
        id: &str,
        before: Option<&KeyRecord>,
        after: &KeyRecord,
    ) -> Result<(), Overlap> {
        let overlap = self.of_key(id, after);
        refuse(overlap, || self.of_key(id, before?))
    }

    /// The same of all keys of a user, after a change of this one; `before`: what it was.
    ///
    /// # Errors
    /// What they would meet.
    pub fn for_user(&mut self, name: &str, before: &mut Room<'_>) -> Result<(), Overlap> {
        let control = self.control;
        let theirs = || control.keys.iter().filter(|(_, key)| key.value.user.as_deref() == Some(name));
        for (id, key) in theirs() {
            let overlap = self.of_key(id, &key.value);
            refuse(overlap, || before.of_key(id, &key.value))?;
        }
        Ok(())
    }

    fn of_key(&mut self, id: &str, key: &KeyRecord) -> Option<Overlap> {
        let who = self.people.who(id, key);
        self.ahead.iter_mut().filter_map(|overlaps| overlaps.look(who)).max_by_key(Overlap::weight)
    }

    fn worst(&mut self) -> Option<Overlap> {
        let (people, ahead) = (&mut self.people, &mut self.ahead);
        worst_of(people, self.control, |who| {
            ahead.iter_mut().filter_map(|overlaps| overlaps.look(who)).max_by_key(Overlap::weight)
        })
    }
}

/// What is no worse than it was is let be: rules must stay changeable where a file has too many already.
fn refuse(overlap: Option<Overlap>, was: impl FnOnce() -> Option<Overlap>) -> Result<(), Overlap> {
    match overlap {
        Some(overlap) if was().is_none_or(|was| overlap.weight() > was.weight()) => Err(overlap),
        _ => Ok(()),
    }
}

/// A rule of an operator that means something.
struct Over<'a> {
    rule: Rule,
    record: &'a Record<LimitOverride>,
}

/// The rules of operators whose time is not over, and those that mean nothing.
fn overs<'a>(config: &Config, control: &'a Control) -> (Vec<Over<'a>>, Vec<Aside>) {
    let (mut overs, mut aside) = (Vec::new(), Vec::new());
    if control.limits.is_empty() {
        return (overs, aside);
    }
    let known = known(config, control);
    for (name, record) in control.limits.iter().filter(|(_, record)| record.value.holds()) {
        match config::over_rule(config, &known, name, &record.value.spec) {
            Ok(rule) => overs.push(Over { rule, record }),
            Err(problems) => {
                let why: Vec<String> = problems.iter().map(ToString::to_string).collect();
                aside.push(Aside { name: name.clone(), why: why.join("\n"), overlaps: false });
            }
        }
    }
    (overs, aside)
}

/// The rules of the file, with these in place of those of the same name, or after them.
fn layered<'a>(config: &Config, overs: impl Iterator<Item = &'a Rule>) -> Vec<Rule> {
    let mut rules = config.rules.clone();
    let mut places: HashMap<String, usize> = HashMap::new();
    for over in overs {
        if places.is_empty() {
            places = rules.iter().enumerate().map(|(place, rule)| (rule.name.clone(), place)).collect();
        }
        match places.get(&over.name) {
            Some(&place) => rules[place] = over.clone(),
            None => rules.push(over.clone()),
        }
    }
    rules
}

/// The worst that is found for anybody who may send requests.
fn worst(
    config: &Config,
    control: &Control,
    look: impl FnMut(Who<'_>) -> Option<Overlap>,
) -> Option<Overlap> {
    worst_of(&mut People::of(config, control), control, look)
}

fn worst_of(
    people: &mut People<'_>,
    control: &Control,
    mut look: impl FnMut(Who<'_>) -> Option<Overlap>,
) -> Option<Overlap> {
    let config = people.config;
    let of_file = config.keys.iter().filter_map(|key| look(Who::of(key))).max_by_key(Overlap::weight);
    let kept = control.keys.iter();
    let kept = kept.filter_map(|(id, key)| look(people.who(id, &key.value))).max_by_key(Overlap::weight);
    let anonymous = (config.auth == Auth::Optional).then(|| look(Who::default())).flatten();
    of_file.into_iter().chain(kept).chain(anonymous).max_by_key(Overlap::weight)
}

/// What is needed to tell who has a key of the control data.
struct People<'a> {
    config: &'a Config,
    control: &'a Control,
    /// Of the file, by name.
    users: HashMap<&'a str, &'a User>,
    /// Many keys have the same limits: they are counted once.
    own: HashMap<Vec<String>, usize>,
}

impl<'a> People<'a> {
    fn of(config: &'a Config, control: &'a Control) -> Self {
        let users = config.users.iter().map(|user| (user.name.as_str(), &**user)).collect();
        Self { config, control, users, own: HashMap::new() }
    }

    fn who<'k>(&mut self, id: &'k str, key: &'k KeyRecord) -> Who<'k>
    where
        'a: 'k,
    {
        let user = key.user.as_deref();
        let (team, tier) = match user.map(|name| (self.users.get(name), self.control.users.get(name))) {
            Some((Some(user), _)) => (user.team.as_deref(), user.tier.as_deref()),
            Some((None, Some(user))) => (user.value.team.as_deref(), user.value.tier.as_deref()),
            _ => (None, None),
        };
        Who {
            authenticated: true,
            key: Some(id),
            user,
            team: key.team.as_deref().or(team),
            tier: key.tier.as_deref().or(tier),
            own: self.own(&key.limits),
        }
    }

    fn own(&mut self, quotas: &[String]) -> usize {
        if quotas.is_empty() {
            return 0;
        }
        if let Some(known) = self.own.get(quotas) {
            return *known;
        }
        let limits = config::key_limits(KEY_RULE, self.config.settings.defaults, quotas);
        let count = limits.map_or(0, |limits| limits.len());
        self.own.insert(quotas.to_vec(), count);
        count
    }
}

impl Control {
    /// The same with one record more, or in place of another; as it would be after a change.
    pub fn with_record<T: super::Stored>(&self, id: &str, value: Option<T>) -> Self {
        let mut next = self.clone();
        let table = Arc::make_mut(T::table_mut(&mut next));
        match value {
            Some(value) => {
                table.insert(id.to_owned(), Arc::new(Record { version: self.version + 1, value }));
            }
            None => drop(table.remove(id)),
        }
        next
    }
}
