//! The members of a request by name.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

use super::text::Part;

/// The members of a request that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member {
    Model,
    Stream,
    StreamOptions,
    N,
    BestOf,
    MaxTokens,
    MaxCompletionTokens,
    Messages,
    Prompt,
    Suffix,
    Input,
    Instructions,
    Query,
    Documents,
    Texts,
    Tools,
    Functions,
    ResponseFormat,
    Other,
}

impl Member {
    pub(super) const ALL: [Member; Member::Other as usize] = [
        Member::Model,
        Member::Stream,
        Member::StreamOptions,
        Member::N,
        Member::BestOf,
        Member::MaxTokens,
        Member::MaxCompletionTokens,
        Member::Messages,
        Member::Prompt,
        Member::Suffix,
        Member::Input,
        Member::Instructions,
        Member::Query,
        Member::Documents,
        Member::Texts,
        Member::Tools,
        Member::Functions,
        Member::ResponseFormat,
    ];

    pub(super) fn name(self) -> &'static str {
        MEMBERS[self as usize]
    }

    /// What the parts of its value are, where it is a prompt or one of a prompt's parts.
    pub(super) fn part_of(self) -> Option<fn(&str) -> Part> {
        match self {
            Member::Messages | Member::Input => Some(part_of_message),
            Member::Prompt
            | Member::Suffix
            | Member::Instructions
            | Member::Query
            | Member::Documents
            | Member::Texts
            | Member::Tools
            | Member::Functions
            | Member::ResponseFormat => Some(|_| Part::Text),
            _ => None,
        }
    }

    /// A schema is text as it is written: its names reach the model as its strings do.
    pub(super) fn is_schema(self) -> bool {
        matches!(self, Member::Tools | Member::Functions | Member::ResponseFormat)
    }
}

/// A member's name: as we read it, or in other letters.
///
/// Some servers (those in Go, with `encoding/json`) match names without regard to case and let the last one win. To
/// them `Model` behind `model` is the model; it must not pass as something that does not matter.
pub(super) enum Name {
    Exact(Member),
    OtherCase(Member),
}

impl Name {
    pub(super) fn of(name: &str) -> Name {
        let known = Member::ALL.iter().find(|member| member.name().eq_ignore_ascii_case(name));
        match known {
            Some(member) if member.name() == name => Name::Exact(*member),
            Some(member) => Name::OtherCase(*member),
            None => Name::Exact(Member::Other),
        }
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
        struct NameVisitor;
        impl Visitor<'_> for NameVisitor {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a member's name")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(Name::of(name))
            }
        }
        deserializer.deserialize_identifier(NameVisitor)
    }
}

pub(super) const MEMBERS: [&str; Member::Other as usize] = [
    "model",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "messages",
    "prompt",
    "suffix",
    "input",
    "instructions",
    "query",
    "documents",
    "texts",
    "tools",
    "functions",
    "response_format",
];

/// The members of messages and of their content parts, by name.
fn part_of_message(name: &str) -> Part {
    match name {
        "role" | "type" | "id" | "tool_call_id" => Part::Label,
        "image_url" | "input_image" | "video_url" | "input_video" => Part::Image,
        "input_audio" | "audio_url" | "audio" => Part::Audio,
        "file" | "input_file" | "file_url" => Part::File,
        _ => Part::Text,
    }
}
