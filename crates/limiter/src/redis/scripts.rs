//! The scripts, assembled: header, clock, shared parts, own part.

use std::collections::HashMap;

use ::redis::Script;

/// The one line that reads the clock.
const CLOCK: &str =
    "local time = redis.call('TIME') local now = time[1] * 1000 + math.floor(time[2] / 1000)\n";
/// What replaces it where tests move the clock.
const CLOCK_GIVEN: &str = "local now = tonumber(ARGV[3])\n";
/// Lets a settlement through when the server is out of memory. Servers before 7.0 cannot read it.
const ALLOW_OOM: &str = "#!lua flags=allow-oom\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Charge,
    Settle,
    /// The settlement for servers that know flags.
    SettleAllowOom,
    Heal,
}

impl Name {
    pub(super) const ALL: [Name; 4] = [Name::Charge, Name::Settle, Name::SettleAllowOom, Name::Heal];
}

/// Texts and their digests.
pub(super) struct Scripts([Prepared; Name::ALL.len()]);

/// One script.
pub(super) struct Prepared {
    pub(super) text: String,
    pub(super) digest: String,
}

impl Scripts {
    pub(super) fn new(rehearsal: Option<&super::Rehearsal>) -> Scripts {
        Scripts(Name::ALL.map(|name| {
            let clock = if rehearsal.is_some() { CLOCK_GIVEN } else { CLOCK };
            let (header, own) = match name {
                Name::Charge => ("", include_str!("charge.lua")),
                Name::Settle => ("", include_str!("settle.lua")),
                Name::SettleAllowOom => (ALLOW_OOM, include_str!("settle.lua")),
                Name::Heal => ("", include_str!("heal.lua")),
            };
            let (leases, state) = (include_str!("leases.lua"), include_str!("state.lua"));
            let mut text = format!("{header}{clock}{leases}{state}{own}");
            for (from, to) in rehearsal.iter().flat_map(|rehearsal| &rehearsal.edits) {
                text = text.replace(from, to);
            }
            let text = with_numbers(&text);
            let digest = Script::new(&text).get_hash().to_string();
            Prepared { text, digest }
        }))
    }

    pub(super) fn get(&self, name: Name) -> &Prepared {
        &self.0[name as usize]
    }
}

/// Puts numbers in the place of the names in capitals that `local` lines of the script give them.
fn with_numbers(text: &str) -> String {
    let mut constants: HashMap<&str, &str> = HashMap::new();
    let mut rest = Vec::new();
    for line in text.lines() {
        match constants_of(line) {
            Some(found) => constants.extend(found),
            None => rest.push(line),
        }
    }
    let part_of_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut numbered = String::with_capacity(text.len());
    for line in rest {
        for piece in line.split_inclusive(|c| !part_of_word(c)) {
            let word = piece.trim_end_matches(|c| !part_of_word(c));
            numbered.push_str(constants.get(word).unwrap_or(&word));
            numbered.push_str(&piece[word.len()..]);
        }
        numbered.push('\n');
    }
    numbered
}

/// `local FIRST, SECOND = 1, 2`
fn constants_of(line: &str) -> Option<Vec<(&str, &str)>> {
    let (names, numbers) = line.strip_prefix("local ")?.split_once(" = ")?;
    let pairs: Vec<(&str, &str)> = names.split(", ").zip(numbers.split(", ")).collect();
    let named = |name: &str| name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let counted = |number: &str| number.chars().all(|c| c.is_ascii_digit());
    pairs.iter().all(|(name, number)| named(name) && counted(number)).then_some(pairs)
}

#[cfg(test)]
mod tests {
    use super::{Name, Scripts, with_numbers};

    #[test]
    fn names_become_numbers() {
        let text = "local A, B_C = 1, 20\nlocal a = A + s[B_C] - ABC -- A\nlocal t = f('A.x')\n";
        assert_eq!(with_numbers(text), "local a = 1 + s[20] - ABC -- 1\nlocal t = f('1.x')\n");
    }

    #[test]
    fn no_name_is_left_in_the_scripts() {
        for name in Name::ALL {
            let scripts = Scripts::new(None);
            let text = &scripts.get(name).text;
            for constant in ["CAPACITY", "EXPIRY", "AT", "COUNT_MAX", "OLD_TICK", "MOVING"] {
                let word = |part: &str| part.trim() == constant;
                let code = text.lines().filter(|line| !line.trim_start().starts_with("--"));
                assert!(
                    !code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_')).any(word),
                    "{constant}"
                );
            }
            assert!(text.contains("'HMGET'") && text.contains("redis.call('TIME')"));
        }
    }
}
