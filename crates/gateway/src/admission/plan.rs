//! What requests of one caller to one endpoint for one model meet.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use tollgate_limiter::{Charge, Denial, Dimension, Limit, Retry, Scope, Standing, Subject, Unit};

use super::Demand;
use super::counts::{Count, Counts};
use super::strangers::Strangers;
use crate::config::{Match, Rule};
use crate::headers::Words;
use crate::identity::Caller;
use crate::metrics::{Histogram, LimitSeries, Metrics, Name};

/// Plans kept of one configuration; past it all are forgotten.
const PLANS_MAX: usize = 8_192;

/// The limits that requests of one kind meet, by rule in the order of the configuration.
pub struct Plan {
    route: &'static str,
    model: Name,
    met: Vec<Met>,
    strangers: Arc<Strangers>,
    denied: Option<Name>,
    /// From such a request's head to the last byte handed over.
    pub duration: Histogram,
    /// How many times what they used was estimated.
    pub estimate_errors: Histogram,
    words: Arc<Words>,
    holds_calls: bool,
    counts_tokens: bool,
}

/// One limit that is met.
struct Met {
    limit: Arc<Limit>,
    /// `None`: it differs from request to request (by address or session).
    subject: Option<Subject>,
    series: LimitSeries,
    /// The same for people.
    count: Arc<Count>,
}

impl Plan {
    fn new(
        rules: &[Rule],
        strangers: &Arc<Strangers>,
        counts: &Counts,
        metrics: &Metrics,
        caller: &Caller,
        route: &'static str,
        model: &Name,
    ) -> Self {
        let rules = || rules.iter().filter(|rule| rule.matches.holds(caller, route, model));
        let met = rules().flat_map(|rule| {
            let fixed = !rule.per.contains(Dimension::Ip) && !rule.per.contains(Dimension::Session);
            // A caller without a key is nothing but its address.
            let fixed = fixed && (caller.key.is_some() || !names_caller(rule.per));
            let subject = fixed.then(|| subject(rule.per, caller, route, model, String::new));
            rule.limits.iter().map(move |limit| Met {
                limit: limit.clone(),
                subject: subject.clone(),
                series: metrics.limit(limit),
                count: counts.of(limit.id()),
            })
        });
        let own = caller.key.iter().flat_map(|key| {
            let subject = subject(Scope::of([Dimension::ApiKey]), caller, route, model, String::new);
            key.own.limits.iter().map(move |limit| Met {
                limit: limit.clone(),
                subject: Some(subject.clone()),
                series: metrics.limit(limit),
                count: counts.of(limit.id()),
            })
        });
        let met: Vec<Met> = met.chain(own).collect();
        let any = |is: fn(Unit) -> bool| met.iter().any(|met| is(met.limit.unit()));
        Self {
            route,
            model: model.clone(),
            strangers: strangers.clone(),
            duration: metrics.durations(route, model),
            estimate_errors: metrics.estimate_errors(model),
            denied: rules().find(|rule| rule.deny).map(|rule| Name::from(rule.name.as_str())),
            words: Arc::new(Words::of(met.iter().map(|met| &*met.limit))),
            holds_calls: any(|unit| unit == Unit::Concurrency),
            counts_tokens: any(super::counts_tokens),
            met,
        }
    }

    /// The rule that refuses every such request.
    pub fn denied(&self) -> Option<&Name> {
        self.denied.as_ref()
    }

    /// What headers say of its limits.
    pub fn words(&self) -> &Arc<Words> {
        &self.words
    }

    /// Whether calls in flight are limited.
    pub fn holds_calls(&self) -> bool {
        self.holds_calls
    }

    /// Whether tokens of any kind are limited.
    pub fn counts_tokens(&self) -> bool {
        self.counts_tokens
    }

    /// What each limit counts.
    pub fn units(&self) -> impl Iterator<Item = Unit> {
        self.met.iter().map(|met| met.limit.unit())
    }

    /// One charge for each limit.
    pub fn charges(&self, caller: &Caller, demand: &Demand) -> impl Iterator<Item = Charge> {
        let (route, model) = (self.route, &*self.model);
        let mut last: Option<(Scope, Subject)> = None;
        let charge = move |met: &Met| {
            let subject = met.subject.clone().unwrap_or_else(|| {
                // The limits of a rule share their subject.
                let scope = met.limit.scope();
                let known = last.take().filter(|(of, _)| *of == scope);
                let fill = || subject(scope, caller, route, model, || self.session(caller));
                let subject = known.map_or_else(fill, |(_, subject)| subject);
                last = Some((scope, subject.clone()));
                subject
            });
            demand.charge(&met.limit, subject)
        };
        self.met.iter().map(charge)
    }

    /// The caller's session; that of its whole address, where too many strangers have one already.
    fn session(&self, caller: &Caller) -> String {
        let session = caller.session();
        if caller.key.is_some() || self.strangers.admit(&session) {
            session
        } else {
            format!("ip={}", caller.ip())
        }
    }

    /// Counts what the limits said to a request that was let through.
    pub fn count_granted(&self, standings: &[Standing]) {
        for (met, standing) in self.met.iter().zip(standings) {
            let shadow = standing.limit.is_shadow() && standing.retry != Retry::Now;
            if shadow { &met.series.shadow } else { &met.series.allowed }.inc();
            if shadow { met.count.shadow() } else { met.count.allow() }
        }
    }

    /// Counts what the limits said to a request that was refused.
    pub fn count_denied(&self, denial: &Denial) {
        for (met, standing) in self.met.iter().zip(denial.standings()) {
            let (counter, count): (_, fn(&Count)) = match (standing.retry, standing.limit.is_shadow()) {
                (Retry::Now, _) => (&met.series.allowed, Count::allow),
                (_, true) => (&met.series.shadow, Count::shadow),
                (_, false) => (&met.series.blocked, Count::refuse),
            };
            counter.inc();
            count(&met.count);
        }
        if let Some(met) = self.met.get(denial.binding_index()) {
            met.series.refusals.inc();
        }
    }

    /// Counts a decision that was not made.
    pub fn count_failed(&self) {
        for met in &self.met {
            met.series.error.inc();
            met.count.fail();
        }
    }
}

/// The plans of one configuration, worked out when they are first needed.
pub struct Plans {
    /// Some rule is for some addresses only: what is met differs from request to request.
    by_address: bool,
    strangers: Arc<Strangers>,
    counts: Arc<Counts>,
    known: RwLock<HashMap<Asker, Arc<Plan>, foldhash::fast::RandomState>>,
}

/// Who asks for what: addresses of a key and a model that live as long as the snapshot these plans belong to, so that
/// nothing is hashed but three words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Asker {
    key: usize,
    route: usize,
    model: usize,
}

impl Plans {
    /// None so far; strangers that `previous` told apart still are, and what was counted goes on.
    pub fn of(rules: &[Rule], previous: Option<&Plans>) -> Self {
        let by_address = rules.iter().any(|rule| !rule.matches.ip.is_empty());
        let strangers = previous.map_or_else(Arc::default, |previous| previous.strangers.clone());
        let counts = previous.map_or_else(Arc::default, |previous| previous.counts.clone());
        counts.keep(rules);
        Self { by_address, strangers, counts, known: RwLock::default() }
    }

    /// What limits said to requests of this process.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// The same as [`Plans::plan`], for who asks about many and will not ask again soon.
    pub fn glance(
        &self,
        rules: &[Rule],
        metrics: &Metrics,
        caller: &Caller,
        route: &'static str,
        model: &Name,
    ) -> Plan {
        Plan::new(rules, &self.strangers, &self.counts, metrics, caller, route, model)
    }

    /// What `caller` meets at `route` (canonical) with `model` (resolved, of this configuration).
    pub fn plan(
        &self,
        rules: &[Rule],
        metrics: &Metrics,
        caller: &Caller,
        route: &'static str,
        model: &Name,
    ) -> Arc<Plan> {
        let make =
            || Arc::new(Plan::new(rules, &self.strangers, &self.counts, metrics, caller, route, model));
        if self.by_address {
            return make();
        }
        let key = caller.key.as_ref().map_or(0, |key| Arc::as_ptr(key).addr());
        let asker = Asker { key, route: route.as_ptr().addr(), model: model.as_ptr().addr() };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&asker).cloned();
        known.unwrap_or_else(|| {
            let plan = make();
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= PLANS_MAX {
                // Those who come back are known again soon.
                known.clear();
            }
            known.insert(asker, plan.clone());
            plan
        })
    }
}

/// Whether a scope asks who the caller is.
fn names_caller(scope: Scope) -> bool {
    [Dimension::ApiKey, Dimension::User, Dimension::Team, Dimension::Tier]
        .into_iter()
        .any(|dimension| scope.contains(dimension))
}

/// A scope filled in. What a caller does not have (a user, a team) is replaced by its key, else by its address: a limit per
/// user must not be one counter for all who are nobody.
fn subject(per: Scope, caller: &Caller, route: &str, model: &str, session: impl Fn() -> String) -> Subject {
    let or_identity = |value: Option<&str>| match value {
        Some(value) => Cow::Owned(value.to_owned()),
        None => Cow::Owned(caller.fallback_identity()),
    };
    let subject = per.subject(|dimension| match dimension {
        Dimension::Ip => Cow::Owned(caller.ip().to_string()),
        Dimension::Session => Cow::Owned(session()),
        Dimension::ApiKey => or_identity(caller.key.as_ref().map(|key| key.id.as_str())),
        Dimension::User => or_identity(caller.user()),
        // Marked, because a user may be called what a team is called.
        Dimension::Team => match (caller.team(), caller.user()) {
            (None, Some(user)) => Cow::Owned(format!("user={user}")),
            (team, _) => or_identity(team),
        },
        Dimension::Tier => or_identity(caller.tier()),
        Dimension::Model => Cow::Owned(model.to_owned()),
        Dimension::Endpoint => Cow::Owned(route.to_owned()),
    });
    let Some(key) = &caller.key else {
        return subject.unauthenticated();
    };
    // What belongs to one tenant is kept together; to which, the subject says, or whose it is. Not the team that a key
    // may have of its own: the counters of a user are the same by whichever key it comes.
    let user = key.user.as_ref();
    let home = user.map_or(&*key.id, |user| user.team.as_deref().unwrap_or(&user.name));
    if per.contains(Dimension::Team) {
        return subject.of_tenant(caller.team().unwrap_or(home));
    }
    if per.contains(Dimension::ApiKey) || per.contains(Dimension::User) {
        return subject.of_tenant(home);
    }
    subject
}

impl Match {
    /// Whether a request of `caller` to `route` (canonical) for `model` (resolved) is meant.
    pub fn holds(&self, caller: &Caller, route: &str, model: &str) -> bool {
        self.failing(caller, route, model).is_none()
    }

    /// The first condition that does not hold, by its name in the file; `None`: all do.
    pub fn failing(&self, caller: &Caller, route: &str, model: &str) -> Option<&'static str> {
        fn any(wanted: &[String], value: Option<&str>) -> bool {
            wanted.is_empty() || value.is_some_and(|value| wanted.iter().any(|name| name == value))
        }
        let endpoint = |glob: &String| crate::config::endpoint_matches(glob, route);
        if self.authenticated.is_some_and(|wanted| wanted != caller.key.is_some()) {
            Some("authenticated")
        } else if !self.endpoint.is_empty() && !self.endpoint.iter().any(endpoint) {
            Some("endpoint")
        } else if !any(&self.model, Some(model)) {
            Some("model")
        } else if !any(&self.user, caller.user()) {
            Some("user")
        } else if !any(&self.team, caller.team()) {
            Some("team")
        } else if !any(&self.tier, caller.tier()) {
            Some("tier")
        } else if !any(&self.api_key, caller.key.as_ref().map(|key| key.id.as_str())) {
            Some("api_key")
        } else if !self.ip.is_empty() && !self.ip.iter().any(|net| net.contains(&caller.address)) {
            Some("ip")
        } else {
            None
        }
    }
}
