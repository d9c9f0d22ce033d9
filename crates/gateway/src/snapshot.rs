//! What the configuration means to a request: compiled, immutable, swapped whole.
//!
//! A request loads one snapshot and uses it from first byte to last, so a reload never shows it half of each.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::admission::Plans;
use crate::config::{Config, Count, Key, Rule, TokenWeights};
use crate::control::{self, Bans, Control, Keys, Merged};
use crate::estimate::Tokenizers;
use crate::identity::Caller;
use crate::metrics::{Metrics, Name};
use crate::upstream::{Deployment, Trust};

/// The model that stands for every name (configuration from the environment).
pub const EVERY_MODEL: &str = "*";

/// One configuration with what operators said since, compiled.
pub struct Snapshot {
    /// What the file says.
    pub config: Arc<Config>,
    /// The same for people: see [`Loaded::effective`](crate::config::Loaded::effective).
    pub effective: Arc<serde_json::Value>,
    /// The first 16 hex digits of the SHA-256 of the configuration as people see it: without its secrets.
    pub config_hash: String,
    /// What operators said.
    pub control: Arc<Control>,
    /// Rules of the file and of operators, and those that mean nothing.
    pub merged: Merged,
    /// Who is let in no more.
    pub bans: Bans,
    keys: Keys,
    /// Names and aliases to models.
    models: HashMap<String, Arc<Model>, foldhash::fast::RandomState>,
    /// What counts prompts of models that want it exact.
    pub tokenizers: Tokenizers,
    /// What callers meet.
    pub plans: Plans,
    /// Requests counted and priced, resolved name first.
    listed: Vec<(String, Arc<Model>)>,
}

/// What a snapshot is made from.
#[derive(Clone)]
pub struct Source {
    /// What the file says.
    pub config: Arc<Config>,
    /// The same for people.
    pub effective: Arc<serde_json::Value>,
    /// What operators said.
    pub control: Arc<Control>,
}

/// One model, ready to be routed.
pub struct Model {
    /// The name it is counted under.
    pub name: Name,
    /// Its providers, in order.
    pub deployments: Vec<Arc<Deployment>>,
    /// Names of the models to try next.
    fallback: Vec<String>,
    /// How prompts are counted before they are sent.
    pub count: Count,
    /// How much special tokens count.
    pub token_weights: TokenWeights,
}

impl Snapshot {
    /// Compiles a configuration. Deployments that `previous` had with the same settings are taken over with their
    /// connections and health.
    pub fn new(source: Source, previous: Option<&Snapshot>, metrics: &Metrics) -> Self {
        let Source { config, effective, control } = source;
        let keys = control::keys(&config, &control);
        let merged = control::merged(&config, &control);
        let mut models = HashMap::default();
        let mut listed = Vec::new();
        let mut trust = Trust::default();
        for model in &config.models {
            let before = previous.and_then(|previous| {
                previous.models.get(&model.name).filter(|before| *before.name == *model.name)
            });
            let name = Name::from(model.name.as_str());
            let deployments = model.providers.iter().map(|provider| {
                let kept =
                    before.and_then(|model| model.deployments.iter().find(|d| d.provider == *provider));
                kept.cloned().unwrap_or_else(|| {
                    Arc::new(Deployment::new(name.clone(), provider.clone(), &mut trust, metrics))
                })
            });
            let deployments = deployments.collect();
            let compiled = Arc::new(Model {
                name: name.clone(),
                deployments,
                fallback: model.fallback.clone(),
                count: model.count,
                token_weights: model.token_weights,
            });
            for known in std::iter::once(&model.name).chain(&model.aliases) {
                models.insert(known.clone(), compiled.clone());
                listed.push((known.clone(), compiled.clone()));
            }
        }
        let plans = Plans::of(&merged.rules, previous.map(|previous| &previous.plans));
        let exact = config.models.iter().filter(|model| model.count == Count::Exact);
        let exact = exact.flat_map(|model| {
            model.providers.iter().map(|provider| provider.model_name.as_deref().unwrap_or(&model.name))
        });
        let tokenizers = Tokenizers::load(exact, previous.map(|previous| &previous.tokenizers));
        let bans = Bans::of(&control);
        let config_hash = match previous.filter(|previous| Arc::ptr_eq(&previous.effective, &effective)) {
            Some(previous) => previous.config_hash.clone(),
            None => config_hash(&effective),
        };
        let now = Self {
            config,
            effective,
            config_hash,
            control,
            merged,
            bans,
            keys,
            models,
            tokenizers,
            plans,
            listed,
        };
        if let Some(previous) = previous {
            previous.forget_deployments_not_in(&now, metrics);
        }
        now
    }

    /// The key with this hash.
    pub fn key(&self, hash: &[u8; 32]) -> Option<&Arc<Key>> {
        self.keys.by_hash.get(hash)
    }

    /// The key with this id, of the file or of operators.
    pub fn key_of(&self, id: &str) -> Option<&Arc<Key>> {
        match self.control.keys.get(id).filter(|_| !self.displaced().contains_key(id)) {
            Some(record) => self.key(&record.value.hash),
            None => self.config.keys.iter().find(|key| key.id == id).and_then(|key| self.key(&key.hash)),
        }
    }

    /// Ids of keys of operators in whose place the file has one, and what holds then.
    pub fn displaced(&self) -> &BTreeMap<String, &'static str> {
        &self.keys.displaced
    }

    /// The model of this name or alias.
    pub fn model(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name).or_else(|| self.models.get(EVERY_MODEL))
    }

    /// Where it came from.
    pub fn source(&self) -> Source {
        let Self { config, effective, control, .. } = self;
        Source { config: config.clone(), effective: effective.clone(), control: control.clone() }
    }

    /// The rules that hold.
    pub fn rules(&self) -> &[Rule] {
        &self.merged.rules
    }

    /// Models by name and alias, in the order of the file.
    pub fn models(&self) -> impl Iterator<Item = (&str, &Arc<Model>)> {
        self.listed.iter().map(|(name, model)| (name.as_str(), model))
    }

    /// Whether operators want a deployment to get no new requests.
    pub fn is_drained(&self, deployment: &Deployment) -> bool {
        let drains = &self.control.drains;
        !drains.is_empty() && drains.contains_key(&drain_id(&deployment.model, &deployment.provider.name))
    }

    /// Every deployment that may answer for `model`, in order: its own, then those of its fallback models that the
    /// caller may use. Those that are drained are among them.
    pub fn deployments<'a, 'c>(
        &'a self,
        model: &'a Model,
        caller: &'c Caller,
    ) -> impl Iterator<Item = &'a Arc<Deployment>> + use<'a, 'c> {
        let allowed = model.fallback.iter().filter(move |name| caller.may_use(name));
        let next = allowed.filter_map(|name| self.models.get(name)).flat_map(|model| &model.deployments);
        model.deployments.iter().chain(next)
    }

    /// Names and aliases that `caller` may use, in the order of the file.
    pub fn models_of<'a>(&'a self, caller: &'a Caller) -> impl Iterator<Item = &'a str> {
        let usable = |(name, model): &'a (String, Arc<Model>)| {
            (name != EVERY_MODEL && caller.may_use(&model.name)).then_some(name.as_str())
        };
        self.listed.iter().filter_map(usable)
    }

    /// Closes connections to providers that are not used any more.
    pub fn reap(&self) {
        self.listed.iter().flat_map(|(_, model)| &model.deployments).for_each(|deployment| deployment.reap());
    }

    fn forget_deployments_not_in(&self, next: &Snapshot, metrics: &Metrics) {
        let kept = |old: &Arc<Deployment>| {
            let model = next.models.get(old.model.as_ref());
            model.is_some_and(|model| model.deployments.iter().any(|new| new.label() == old.label()))
        };
        let mine = self.listed.iter().flat_map(|(_, model)| &model.deployments);
        for gone in mine.filter(|old| !kept(old)) {
            metrics.upstream_healthy.remove(gone.label());
        }
    }
}

fn config_hash(effective: &serde_json::Value) -> String {
    let digest: [u8; 32] = Sha256::digest(effective["config"].to_string()).into();
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a drain of a model's provider is kept under.
pub fn drain_id(model: &str, provider: &str) -> String {
    format!("{model}/{provider}")
}
