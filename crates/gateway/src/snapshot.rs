//! What the configuration means to a request: compiled, immutable, swapped whole.
//!
//! A request loads one snapshot and uses it from first byte to last, so a reload never shows it half of each.

use std::collections::HashMap;
use std::sync::Arc;

use crate::admission::Plans;
use crate::config::{Config, Count, Key, TokenWeights};
use crate::estimate::Tokenizers;
use crate::identity::Caller;
use crate::metrics::{Metrics, Name};
use crate::upstream::{Deployment, Trust};

/// The model that stands for every name (configuration from the environment).
pub const EVERY_MODEL: &str = "*";

/// One configuration, compiled.
pub struct Snapshot {
    /// Where it came from.
    pub config: Config,
    keys: HashMap<[u8; 32], Arc<Key>>,
    /// Names and aliases to models.
    models: HashMap<String, Arc<Model>>,
    /// What counts prompts of models that want it exact.
    pub tokenizers: Tokenizers,
    /// What callers meet.
    pub plans: Plans,
    /// Requests counted and priced, resolved name first.
    listed: Vec<(String, Arc<Model>)>,
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
    pub fn new(config: Config, previous: Option<&Snapshot>, metrics: &Metrics) -> Self {
        let keys = config.keys.iter().map(|key| (key.hash, Arc::new(key.clone()))).collect();
        let mut models = HashMap::new();
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
        let plans = Plans::of(&config);
        let exact = config.models.iter().filter(|model| model.count == Count::Exact);
        let exact = exact.flat_map(|model| {
            model.providers.iter().map(|provider| provider.model_name.as_deref().unwrap_or(&model.name))
        });
        let tokenizers = Tokenizers::load(exact, previous.map(|previous| &previous.tokenizers));
        let now = Self { config, keys, models, tokenizers, plans, listed };
        if let Some(previous) = previous {
            previous.forget_deployments_not_in(&now, metrics);
        }
        now
    }

    /// The key with this hash.
    pub fn key(&self, hash: &[u8; 32]) -> Option<&Arc<Key>> {
        self.keys.get(hash)
    }

    /// The model of this name or alias.
    pub fn model(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name).or_else(|| self.models.get(EVERY_MODEL))
    }

    /// Every deployment that may answer for `model`, in order: its own, then those of its fallback models that the
    /// caller may use.
    pub fn deployments<'a>(
        &'a self,
        model: &'a Model,
        caller: &'a Caller,
    ) -> impl Iterator<Item = &'a Arc<Deployment>> {
        let allowed = model.fallback.iter().filter(|name| caller.may_use(name));
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
