//! A JSON body: one pass of serde_json for the members, a look at the text of those that are a prompt.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::member::{MEMBERS, Member, Name};
use super::text::{self, TooDeep};
use super::{
    Call, CallError, Edit, Endpoint, Field, Form, Prompt, Text, UsageReport, answers, checked_model, number,
};
use crate::json;

const ASK_AFTER_MODEL: &str = r#","stream_options":{"include_usage":true}"#;
const ASK_AS_VALUE: &str = r#"{"include_usage":true}"#;
const ASK_AS_ONLY_MEMBER: &str = r#""include_usage":true"#;
const ASK_AS_FIRST_MEMBER: &str = r#""include_usage":true,"#;

pub(super) fn parse(endpoint: Endpoint, body: Bytes) -> Result<Call, CallError> {
    let json = std::str::from_utf8(&body).map_err(|error| {
        CallError::NotJson(format!("it is not UTF-8 from byte {} on", error.valid_up_to()))
    })?;
    if json.starts_with('\u{feff}') {
        return Err(CallError::NotJson("it begins with a byte order mark".to_owned()));
    }
    let mut members = Members::default();
    fill(&mut members, json)?;
    if let Some(twice) = members.duplicate {
        return Err(CallError::Duplicate(twice));
    }
    if members.too_deep {
        return Err(CallError::TooDeep);
    }
    if let Some(name) = members.other_case {
        return Err(CallError::OtherCase(name));
    }
    let model = model(json, &members)?;
    let streamed = boolean("stream", members.get(Member::Stream))?.unwrap_or(false);
    let usage = usage_report(endpoint, json, &members, &model)?;
    let max_tokens = count("max_tokens", members.get(Member::MaxTokens))?;
    let max_completion_tokens = count("max_completion_tokens", members.get(Member::MaxCompletionTokens))?;
    // A bound that the endpoint does not know is ignored by its provider, so it bounds nothing here either.
    let output_max = match endpoint {
        Endpoint::ChatCompletions => max_tokens.max(max_completion_tokens),
        _ => max_tokens,
    };
    let n = count("n", members.get(Member::N))?;
    let best_of = count("best_of", members.get(Member::BestOf))?;
    let prompt = members.prompt;
    let prompts = if endpoint == Endpoint::Completions { members.prompts.max(1) } else { 1 };
    let form = Form::Json;
    Ok(Call {
        endpoint,
        model,
        streamed,
        usage,
        prompt,
        prompts,
        output_max,
        answers: answers(n, best_of),
        form,
        body,
    })
}

/// Gives every text of the prompt to `each` and returns how many messages there are. `body` was parsed before.
pub(super) fn texts(body: &[u8], each: &mut dyn FnMut(Text<'_>)) -> u64 {
    let Ok(json) = std::str::from_utf8(body) else { return 0 };
    let mut members = Members::default();
    if fill(&mut members, json).is_err() {
        return 0;
    }
    let mut messages = 0;
    for member in Member::ALL {
        let (Some(value), Some(part_of)) = (members.get(member), member.part_of()) else { continue };
        if member.is_schema() {
            each(Text { member: member.name(), name: "", text: value.into() });
            continue;
        }
        let give = |name, written: &str| {
            let text = text::decoded(written);
            each(Text { member: member.name(), name, text });
        };
        // Depth was checked when the call was parsed.
        let items = text::read_text(&mut Prompt::default(), value, 1, part_of, give).unwrap_or(0);
        if member == Member::Messages {
            messages = items;
        }
    }
    messages
}

/// Every member's value as written, and what is in all of them together.
#[derive(Default)]
struct Members<'a> {
    values: [Option<&'a str>; Member::Other as usize],
    prompt: Prompt,
    /// Items of `prompt`, when it is a list of texts or of lists of tokens.
    prompts: u64,
    duplicate: Option<&'static str>,
    other_case: Option<&'static str>,
    too_deep: bool,
}

impl<'a> Members<'a> {
    /// The value of a member; one that is null is one that is not there.
    fn get(&self, member: Member) -> Option<&'a str> {
        self.values[member as usize].filter(|value| *value != "null")
    }

    fn add(&mut self, name: Name, value: &'a str) {
        let member = match name {
            Name::Exact(member) => member,
            Name::OtherCase(member) => {
                self.other_case.get_or_insert(member.name());
                Member::Other
            }
        };
        if member != Member::Other {
            let index = member as usize;
            if self.values[index].replace(value).is_some() {
                self.duplicate = self.duplicate.or(Some(MEMBERS[index]));
            }
        }
        self.too_deep |= self.count(member, value).is_err();
    }

    fn count(&mut self, member: Member, value: &str) -> Result<(), TooDeep> {
        let mut prompt = Prompt::default();
        match member.part_of() {
            Some(_) if member.is_schema() => {
                text::check_depth(value, 1)?;
                prompt.text_bytes = value.len() as u64;
            }
            Some(part_of) => {
                let items = text::add_text(&mut prompt, value, 1, part_of)?;
                if member == Member::Prompt {
                    self.prompts = items;
                }
            }
            None => text::check_depth(value, 1)?,
        }
        if !matches!(member, Member::Prompt | Member::Input) {
            prompt.token_ids = 0; // a number elsewhere is not a prompt
        }
        self.prompt.add(prompt);
        Ok(())
    }
}

impl Prompt {
    fn add(&mut self, other: Prompt) {
        self.text_bytes += other.text_bytes;
        self.token_ids += other.token_ids;
        self.images += other.images;
        self.audio += other.audio;
        self.files += other.files;
    }
}

/// Fills in place: there is much of it to move.
struct MembersVisitor<'m, 'de>(&'m mut Members<'de>);

impl<'de> Visitor<'de> for MembersVisitor<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let members = self.0;
        while let Some(name) = map.next_key::<Name>()? {
            members.add(name, map.next_value::<&RawValue>()?.get());
        }
        Ok(())
    }
}

fn fill<'a>(members: &mut Members<'a>, json: &'a str) -> Result<(), CallError> {
    // Nearly all are written in a way that is quickly read.
    if json::members(json, |name, value| members.add(Name::of(name), value)).is_some() {
        return Ok(());
    }
    *members = Members::default();
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let filled = deserializer.deserialize_map(MembersVisitor(members)).and_then(|()| deserializer.end());
    filled.map_err(|error| match error.classify() {
        serde_json::error::Category::Data => CallError::NotAnObject,
        _ => CallError::NotJson(error.to_string()),
    })
}

fn model(json: &str, members: &Members<'_>) -> Result<Field, CallError> {
    let written = members.get(Member::Model).ok_or(CallError::MissingModel)?;
    // Borrowed where it is written without escapes.
    let model: Cow<'_, str> = match written.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(plain) if !plain.contains('\\') => plain.into(),
        _ => serde_json::from_str::<String>(written)
            .map_err(|_| wrong_type("model", "a string", written))?
            .into(),
    };
    let start = offset(json, written);
    Ok(Field { value: checked_model(&model)?, span: start..start + written.len() })
}

fn usage_report(
    endpoint: Endpoint,
    json: &str,
    members: &Members<'_>,
    model: &Field,
) -> Result<UsageReport, CallError> {
    if !endpoint.streams() {
        return Ok(UsageReport::NoOption);
    }
    let unasked = |span, with| Ok(UsageReport::Unasked(Edit { span, with }));
    let Some(options) = members.values[Member::StreamOptions as usize] else {
        return unasked(model.span.end..model.span.end, ASK_AFTER_MODEL);
    };
    let start = offset(json, options);
    if options == "null" {
        return unasked(start..start + options.len(), ASK_AS_VALUE);
    }
    if !options.starts_with('{') {
        return Err(wrong_type("stream_options", "an object", options));
    }
    let found = serde_json::Deserializer::from_str(options).deserialize_map(OptionsVisitor);
    let found = found.map_err(|error| CallError::NotJson(error.to_string()))?;
    match found.include_usage {
        _ if found.twice => Err(CallError::Duplicate("stream_options.include_usage")),
        None if found.empty => unasked(start + 1..start + 1, ASK_AS_ONLY_MEMBER),
        None => unasked(start + 1..start + 1, ASK_AS_FIRST_MEMBER),
        Some("true") => Ok(UsageReport::Asked),
        Some(written @ ("false" | "null")) => {
            let start = offset(json, written);
            unasked(start..start + written.len(), "true")
        }
        Some(written) => Err(wrong_type("stream_options.include_usage", "a boolean", written)),
    }
}

/// What `stream_options` says about usage.
struct Options<'a> {
    include_usage: Option<&'a str>,
    twice: bool,
    empty: bool,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum OptionsMember {
    IncludeUsage,
    #[serde(other)]
    Other,
}

struct OptionsVisitor;

impl<'de> Visitor<'de> for OptionsVisitor {
    type Value = Options<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Options<'de>, A::Error> {
        let mut options = Options { include_usage: None, twice: false, empty: true };
        while let Some(member) = map.next_key()? {
            let value: &RawValue = map.next_value()?;
            options.empty = false;
            if let OptionsMember::IncludeUsage = member {
                options.twice |= options.include_usage.replace(value.get()).is_some();
            }
        }
        Ok(options)
    }
}

fn boolean(param: &'static str, value: Option<&str>) -> Result<Option<bool>, CallError> {
    match value {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(written) => Err(wrong_type(param, "a boolean", written)),
    }
}

fn count(param: &'static str, value: Option<&str>) -> Result<Option<u64>, CallError> {
    let Some(written) = value else { return Ok(None) };
    number(written).map_err(|()| wrong_type(param, "an integer", written))
}

fn wrong_type(param: &'static str, expected: &'static str, written: &str) -> CallError {
    let found = match written.as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') if expected == "a string" => "a string that is not valid Unicode",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    };
    CallError::WrongType { param, expected, found }
}

/// Where `part`, a slice of `json`, begins in it.
fn offset(json: &str, part: &str) -> usize {
    part.as_ptr().addr() - json.as_ptr().addr()
}
