//! What a configuration may say, what it may not, and in which words it is told so.

mod accepted;
mod mutations;
mod redis;
mod refused;
mod warned;

use super::{Environment, Loaded, Problem, Severity, load};

/// No variable is set.
fn nothing(_: &str) -> Option<String> {
    None
}

fn variables<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
}

fn load_file(text: &str, env: Environment<'_>) -> Result<Loaded, Vec<Problem>> {
    load(Some(("t.yml", text)), env)
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

/// A file that is right: simulated models `a` and `b`, and whatever is added.
fn file(more: &str) -> String {
    let model = |name: &str| format!("  - {{ name: {name}, providers: [{{ type: simulated }}] }}\n");
    format!("models:\n{}{}auth: optional\n{more}", model("a"), model("b"))
}

/// Lines that come before what is added by [`file`].
const LINES_BEFORE: u32 = 4;

/// What is said of a file with this added, without variables. Lines are counted from the start of the addition.
fn said(more: &str) -> Vec<String> {
    let problems = match load_file(&file(more), &nothing) {
        Ok(loaded) => loaded.warnings,
        Err(problems) => problems,
    };
    let moved = problems.into_iter().map(|p| Problem { line: p.line.saturating_sub(LINES_BEFORE), ..p });
    moved.map(|problem| problem.to_string()).collect()
}
