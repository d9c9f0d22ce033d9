//! What variables hold, kept out of what is said of a file whose author may not know it.
//!
//! Messages repeat names, and a name may be what a variable holds: whole, shortened, or a part of it. So a message is looked
//! through for any stretch of such a value that the file itself does not have. Where there is one, all that the message
//! quotes is masked, not that stretch alone: what is left visible around it would tell, guess by guess, how it goes on.

use std::cell::RefCell;
use std::collections::HashSet;

use super::Problem;

/// What stands for what is not told.
const MASK: &str = "***";
/// A shorter value is no secret, and is part of too many words.
const SECRET_BYTES_MIN: usize = 4;
/// A stretch of a value so long is not in a message by chance.
const STRETCH_BYTES: usize = 8;

/// The environment, with a memory of what was asked for.
pub struct Withheld<'a> {
    environment: super::Environment<'a>,
    told: RefCell<HashSet<String>>,
}

impl<'a> Withheld<'a> {
    /// Nothing was asked for so far.
    pub fn new(environment: super::Environment<'a>) -> Self {
        Self { environment, told: RefCell::default() }
    }

    /// A variable.
    pub fn get(&self, name: &str) -> Option<String> {
        let value = (self.environment)(name)?;
        self.told.borrow_mut().insert(value.to_ascii_lowercase());
        Some(value)
    }

    /// Masks in problems of a file with this text what variables hold and the text does not say.
    pub fn mask(self, text: &str, problems: &mut [Problem]) {
        let values = self.told.into_inner();
        let secret: HashSet<&[u8]> = values.iter().flat_map(|value| stretches(value.as_bytes())).collect();
        let said: Vec<String> = problems
            .iter()
            .flat_map(|problem| [&problem.message, &problem.help])
            .map(|said| said.to_ascii_lowercase())
            .collect();
        let mut found: HashSet<&[u8]> = HashSet::new();
        for said in &said {
            found.extend(windows(said.as_bytes()).filter(|stretch| secret.contains(stretch)));
        }
        let text = text.to_ascii_lowercase();
        for known in windows(text.as_bytes()) {
            if found.is_empty() {
                return;
            }
            found.remove(known);
        }
        for problem in problems {
            for said in [&mut problem.message, &mut problem.help] {
                if tells(said, &found) {
                    *said = without_quotes(said);
                }
                if tells(said, &found) {
                    MASK.clone_into(said);
                }
            }
        }
    }
}

/// What a value is known by: every stretch of it, or all of a short one.
fn stretches(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let length = value.len().min(STRETCH_BYTES);
    let secret = length >= SECRET_BYTES_MIN;
    secret.then(|| value.windows(length)).into_iter().flatten()
}

/// Everything in a text that could be such a stretch.
fn windows(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    (SECRET_BYTES_MIN..=STRETCH_BYTES).flat_map(|length| text.windows(length))
}

fn tells(said: &str, secret: &HashSet<&[u8]>) -> bool {
    let said = said.to_ascii_lowercase();
    windows(said.as_bytes()).any(|stretch| secret.contains(stretch))
}

/// With a mask in place of all that stands between backticks.
fn without_quotes(said: &str) -> String {
    let parts = said.split('`').enumerate();
    let masked: Vec<&str> = parts.map(|(index, part)| if index % 2 == 1 { MASK } else { part }).collect();
    masked.join("`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Message and help of a problem of a file with this text, where `A_SECRET` is `hunter2-of-the-north`.
    fn masked(text: &str, message: &str, help: &str) -> (String, String) {
        let environment = |name: &str| (name == "A_SECRET").then(|| "hunter2-of-the-north".to_owned());
        let withheld = Withheld::new(&environment);
        assert!(withheld.get("A_SECRET").is_some() && withheld.get("ANOTHER").is_none());
        let mut problems = [Problem::of_whole("body", "users", message.to_owned(), help.to_owned())];
        withheld.mask(text, &mut problems);
        let [Problem { message, help, .. }] = problems;
        (message, help)
    }

    #[test]
    fn a_value_is_told_neither_whole_nor_in_part() {
        for (message, is) in [
            ("a second user is called `hunter2-of-the-north`", "a second user is called `***`"),
            ("`HUNTER2-OF…` is not known", "`***` is not known"),
            ("`xx-the-north` and `team`", "`***` and `***`"),
            ("allowed: red, hunter2-of-the-north", "***"),
            ("there is no team `hunter`", "there is no team `hunter`"),
        ] {
            assert_eq!(masked("a: ${A_SECRET}", message, message), (is.to_owned(), is.to_owned()));
        }
    }

    #[test]
    fn a_guess_learns_nothing_of_what_follows_it() {
        // What is right of a guess, what is wrong, and how much of it, look the same.
        let message = "a second user is called `hunter2-of-the-north`";
        for guess in ["hunter2-", "hunter2-of", "hunter2-ox", "nothing"] {
            assert_eq!(masked(guess, message, "").0, "a second user is called `***`");
            let own = format!("there is no tier `{guess}`");
            assert_eq!(masked(guess, &own, "").0, own);
        }
    }
}
