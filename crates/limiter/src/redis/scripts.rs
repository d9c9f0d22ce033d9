//! The two scripts, assembled: header, clock, shared part, own part.

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
}

impl Name {
    pub(super) const ALL: [Name; 3] = [Name::Charge, Name::Settle, Name::SettleAllowOom];
}

/// Texts and their digests.
pub(super) struct Scripts([Prepared; 3]);

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
            };
            let mut text = format!("{header}{clock}{}{own}", include_str!("state.lua"));
            for (from, to) in rehearsal.iter().flat_map(|rehearsal| &rehearsal.edits) {
                text = text.replace(from, to);
            }
            let digest = Script::new(&text).get_hash().to_string();
            Prepared { text, digest }
        }))
    }

    pub(super) fn get(&self, name: Name) -> &Prepared {
        &self.0[name as usize]
    }
}
