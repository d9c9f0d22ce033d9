//! What is wrong with a configuration, and where: [`Problem`], and the list they are gathered in.

use std::fmt;

/// Problems kept of one run. More would help nobody, and a hostile file cannot make them without bound.
const PROBLEMS_MAX: usize = 1_000;
/// Stands in place of the file's name.
const ENVIRONMENT: &str = "environment";
/// Characters of a foreign text that a message repeats.
const SHOWN_CHARS_MAX: usize = 60;
/// Names compared when looking for the one that was meant.
const CANDIDATES_MAX: usize = 1_000;
/// Names listed in a message.
const LISTED_MAX: usize = 12;

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Written in the file, at this line and column (both from 1, columns in characters).
    File {
        /// Line.
        line: u32,
        /// Column.
        col: u32,
    },
    /// An environment variable.
    Variable(&'static str),
    /// Nobody said it.
    Default,
}

impl Origin {
    /// The start of the file: for what is missing.
    pub(super) const START: Self = Self::File { line: 1, col: 1 };
}

/// How bad a [`Problem`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// It works, but perhaps not as meant.
    Warning,
}

/// One thing wrong, with its place. Printed as `tollgate.yml:12:5: users[0].tire: unknown key; did you mean …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Refused, or only worth a look.
    pub severity: Severity,
    /// Name of the file as it was given, or `environment`.
    pub file: String,
    /// From 1; 0 when it is not in a file.
    pub line: u32,
    /// From 1, in characters; 0 when it is not in a file.
    pub col: u32,
    /// `users[0].tier`, or the name of the environment variable. Empty for the file as a whole.
    pub path: String,
    /// What is wrong. Never contains a secret.
    pub message: String,
    /// What is allowed, what was perhaps meant. May be empty.
    pub help: String,
}

impl Problem {
    /// A fault of a file as a whole; `path`: what it is about.
    pub fn of_whole(file: &str, path: &str, message: String, help: String) -> Self {
        let (file, path, line, col) = (file.to_owned(), path.to_owned(), 1, 1);
        Self { severity: Severity::Error, file, line, col, path, message, help }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.col)?;
        }
        f.write_str(": ")?;
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if !self.help.is_empty() {
            write!(f, "; {}", self.help)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// The problems of one run, gathered by every phase.
#[derive(Debug)]
pub(super) struct Problems {
    file: Option<String>,
    list: Vec<Problem>,
    errors: usize,
}

impl Problems {
    /// None yet, of the file with this name, or of the environment alone.
    pub(super) fn new(file: Option<&str>) -> Self {
        Self { file: file.map(str::to_owned), list: Vec::new(), errors: 0 }
    }

    /// Notes a fault.
    pub(super) fn error(
        &mut self,
        at: Origin,
        path: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.errors += 1;
        self.push(Severity::Error, at, path, message.into(), help.into());
    }

    /// Notes something that works, but perhaps not as meant.
    pub(super) fn warning(
        &mut self,
        at: Origin,
        path: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.push(Severity::Warning, at, path, message.into(), help.into());
    }

    /// Whether the configuration is refused.
    pub(super) fn any_errors(&self) -> bool {
        self.errors > 0
    }

    /// Whether the list is full: nothing further needs looking for.
    pub(super) fn is_full(&self) -> bool {
        self.list.len() >= PROBLEMS_MAX
    }

    /// `tollgate.yml:3:5`, or the name of the variable.
    pub(super) fn place(&self, at: Origin) -> String {
        match at {
            Origin::File { line, col } => {
                format!("{}:{line}:{col}", self.file.as_deref().unwrap_or(ENVIRONMENT))
            }
            Origin::Variable(name) => name.to_owned(),
            Origin::Default => "default".to_owned(),
        }
    }

    /// All of them: errors first, each kind in the order of the file, no two alike.
    pub(super) fn into_list(mut self) -> Vec<Problem> {
        self.list.sort_by_key(|p| (p.severity, p.line, p.col));
        self.list.dedup();
        self.list
    }

    fn push(&mut self, severity: Severity, at: Origin, path: &str, message: String, help: String) {
        // Warnings may not crowd out the errors: a full list of warnings still takes the first error.
        let first_error = severity == Severity::Error && self.errors == 1;
        if self.is_full() && !first_error {
            return;
        }
        let (file, line, col, path) = match (at, &self.file) {
            (Origin::Variable(name), _) => (ENVIRONMENT, 0, 0, name),
            (Origin::File { line, col }, Some(file)) => (file.as_str(), line, col, path),
            (Origin::Default, Some(file)) => (file.as_str(), 1, 1, path),
            (_, None) => (ENVIRONMENT, 0, 0, path),
        };
        let (file, path) = (file.to_owned(), path.to_owned());
        self.list.push(Problem { severity, file, line, col, path, message, help });
    }
}

/// Foreign text in backticks, shortened, control characters escaped.
pub(super) fn quoted(text: &str) -> String {
    format!("`{}`", shown(text))
}

/// Foreign text, shortened, control characters escaped.
pub(crate) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(escape).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        out.push('…');
    }
    out
}

/// ``did you mean `tier`? allowed: name, team, tier``.
pub(crate) fn suggest<'a>(wrong: &str, allowed: impl Iterator<Item = &'a str> + Clone) -> String {
    let mut help = String::new();
    if let Some(near) = nearest(wrong, allowed.clone()) {
        help = format!("did you mean {}? ", quoted(near));
    }
    let mut names: Vec<String> = allowed.clone().take(LISTED_MAX).map(shown).collect();
    if names.is_empty() {
        return "there is none".to_owned();
    }
    if allowed.clone().nth(LISTED_MAX).is_some() {
        names.push("…".to_owned());
    }
    help + "allowed: " + &names.join(", ")
}

/// The candidate with the fewest slips of the finger, when they are few enough for it to be what was meant.
fn nearest<'a>(wrong: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = wrong.chars().count();
    if length > SHOWN_CHARS_MAX {
        return None;
    }
    let wrong = wrong.to_lowercase();
    candidates
        .take(CANDIDATES_MAX)
        .filter(|name| name.len() <= 4 * SHOWN_CHARS_MAX)
        .map(|name| (strsim::osa_distance(&wrong, &name.to_lowercase()), name))
        .filter(|(distance, name)| {
            let slips = (length.max(name.chars().count()) / 3).min(4);
            *distance <= slips || (length >= 3 && name.to_lowercase().starts_with(&wrong))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// One character, as it may go to a terminal.
fn escape(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = escaped.is_none().then_some(c);
    escaped.into_iter().flatten().chain(plain)
}
