//! Names a person may mistype: the error that lists what is allowed and guesses what was meant.

use std::fmt;

/// A name that is not in its list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownName {
    what: &'static str,
    found: String,
    allowed: Vec<&'static str>,
}

impl UnknownName {
    pub(crate) fn new(
        what: &'static str,
        found: &str,
        allowed: impl IntoIterator<Item = &'static str>,
    ) -> UnknownName {
        UnknownName { what, found: excerpt(found), allowed: allowed.into_iter().collect() }
    }

    /// Every name that would have been accepted.
    pub fn allowed(&self) -> &[&'static str] {
        &self.allowed
    }

    /// The allowed name nearest to what was written, when one is near.
    pub fn suggestion(&self) -> Option<&'static str> {
        nearest(&self.found, &self.allowed)
    }
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown {} `{}`", self.what, self.found)?;
        if let Some(name) = self.suggestion() {
            write!(f, ": did you mean `{name}`?")?;
        }
        write!(f, " (allowed: {})", self.allowed.join(", "))
    }
}

impl std::error::Error for UnknownName {}

/// The first 40 characters of outside text, fit for a message of one line.
pub(crate) fn excerpt(text: &str) -> String {
    let cut: String = text.chars().take(40).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(40).is_some() { cut + "…" } else { cut }
}

/// The candidate at most two edits (one, for short words) from `word`, ignoring case.
pub(crate) fn nearest(word: &str, candidates: &[&'static str]) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    let most = if word.chars().count() <= 3 { 1 } else { 2 };
    let (distance, name) =
        candidates.iter().map(|name| (edits(&word, name), *name)).min_by_key(|(distance, _)| *distance)?;
    (distance <= most).then_some(name)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
