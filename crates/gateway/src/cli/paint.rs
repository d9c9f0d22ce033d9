//! Colours, on a terminal and where nobody minds.

use clap::Args;

/// Whether there are colours.
#[derive(Args)]
pub(super) struct Colours {
    /// No colours. They are on a terminal only, and not where the variable is set (https://no-color.org).
    #[arg(long, env = "NO_COLOR", hide_env_values = true, num_args = 0..=1, require_equals = true,
          default_missing_value = "1", value_name = "ANYTHING")]
    no_color: Option<String>,
}

impl Colours {
    /// Whether to paint what goes there.
    pub(super) fn wanted(&self, on_terminal: bool) -> bool {
        // Set to nothing is not set.
        on_terminal && self.no_color.as_deref().is_none_or(str::is_empty)
    }
}

/// One of the eight that every terminal has (ECMA-48, SGR).
#[derive(Clone, Copy)]
pub(super) enum Colour {
    Red,
    Green,
    Yellow,
    /// None: letters and ground change places.
    Inverse,
    /// None: thicker letters.
    Bold,
}

impl Colour {
    /// A text so.
    pub(super) fn paint(self, text: &str) -> String {
        let code = match self {
            Self::Red => 31,
            Self::Green => 32,
            Self::Yellow => 33,
            Self::Inverse => 7,
            Self::Bold => 1,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}
