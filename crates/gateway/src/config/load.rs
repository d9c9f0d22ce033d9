//! From text and environment to a [`Config`], or to everything that is wrong with them.

use super::problem::Problems;
use super::tree::{Node, Value};
use super::{Config, Problem, check, effective, environment, parse, resolve, substitute};

/// The environment, by name of a variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A configuration that is right.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    /// What works, but perhaps not as meant; in the order of the file.
    pub warnings: Vec<Problem>,
    /// `{"config": …, "origins": {"server.listen": "tollgate.yml:3:11", …}}`: the file with all defaults, secrets as
    /// `***`, and where each value comes from (place in the file, name of a variable, or `default`).
    pub effective: serde_json::Value,
}

/// Reads a file, given as its name (for messages) and its text, and completes it from the environment; without a file
/// everything comes from the environment.
///
/// # Errors
/// Everything that is wrong, errors first, then warnings; at least one error.
pub fn load(file: Option<(&str, &str)>, env: Environment<'_>) -> Result<Loaded, Vec<Problem>> {
    let mut problems = Problems::new(file.map(|(name, _)| name));
    let Some((mut root, api_keys)) = read(file, env, &mut problems) else {
        return Err(problems.into_list());
    };
    check::check(&root, &mut problems);
    effective::fill_defaults(&mut root);
    match resolve::resolve(&root, &api_keys, &mut problems) {
        Some(config) => {
            let effective = effective::effective(&root, &problems);
            Ok(Loaded { config, warnings: problems.into_list(), effective })
        }
        None => Err(problems.into_list()),
    }
}

/// The tree with what the environment adds, and the keys of `API_KEYS`.
fn read(
    file: Option<(&str, &str)>,
    env: Environment<'_>,
    problems: &mut Problems,
) -> Option<(Node, Vec<Node>)> {
    let Some((_, text)) = file else {
        return environment::build(env, problems);
    };
    let mut root = parse::parse(text, problems)?;
    if matches!(root.value, Value::Null) {
        root.value = Value::Map(Vec::new());
    }
    let named = substitute::substitute(&mut root, env, problems);
    let api_keys = environment::complete(&mut root, env, &named, problems);
    Some((root, api_keys))
}
