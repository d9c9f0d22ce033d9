//! Events of a stream in the shape that nearly all have, and the usage of whole answers, read in one look at each byte.
//!
//! Knows the members of [`Answer`](super::Answer) alone. Whatever is written in another way (a member twice, what
//! [`crate::json`] leaves) is left to serde_json, so this never says anything else than that would, only sooner. A property
//! test holds the two equal.

use std::ops::Range;

use super::{Delta, Usage, text_in, usage};
use crate::json::{Reader, SKIPPED_DEPTH_MAX};

/// What an event holds, and where its text is written if it is one string without escapes; `None`: it is not of the shape
/// that is known here.
pub(super) fn delta(json: &[u8]) -> Option<(Delta, Option<Range<usize>>)> {
    let mut reader = Reader::new(json);
    let mut answer = Answer::default();
    reader.object(|reader, name| answer.member(reader, name))?;
    reader.end()?;
    let delta = answer.delta();
    // Of several places for text one counts; what stands in another is not counted.
    let Texts { count, plain } = answer.texts;
    let only =
        plain.filter(|text| count == 1 && !text.is_empty() && text.len() as u64 == delta.content_bytes);
    Some((delta, only))
}

/// What stands under a name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// [`usual_usage`].
    Usual(Usage),
    /// Something else, as it is written.
    Written(&'a str),
}

/// The `usage` of a whole answer; `None`: it is not known here, which does not mean that there is none.
///
/// It is near the end, as a rule. What stands from there on is the rest of an object only where the member belongs to the
/// answer itself: of a nested one too many braces are left over.
pub(super) fn usage_at_end(answer: &[u8]) -> Option<Found<'_>> {
    const NAME: &[u8] = br#""usage""#;
    // By its rarest letter.
    let letters = memchr::memrchr_iter(b'g', answer);
    let name = letters.filter_map(|g| g.checked_sub(4)).find(|at| answer[*at..].starts_with(NAME))?;
    // The end of a longer name.
    if name > 0 && answer[name - 1] == b'\\' {
        return None;
    }
    let mut reader = Reader::within(answer, name + NAME.len());
    reader.expect(b':')?;
    reader.blank();
    let start = reader.at();
    let usage = match usual(&mut reader) {
        Some(usage) => Found::Usual(usage),
        None => {
            reader.back_to(start);
            Found::Written(reader.written()?)
        }
    };
    while !reader.accept(b'}') {
        reader.expect(b',')?;
        reader.expect(b'"')?;
        reader.string()?;
        reader.expect(b':')?;
        reader.skip(SKIPPED_DEPTH_MAX)?;
    }
    reader.end().map(|()| usage)
}

/// [`usage`] of the usual kind: whole numbers below a thousand million, under the names of chat and completions, and what
/// says nothing more. `None`: it is of another kind.
pub(super) fn usual_usage(written: &str) -> Option<Usage> {
    let mut reader = Reader::new(written.as_bytes());
    usual(&mut reader).filter(|_| reader.at() == written.len())
}

/// See [`usual_usage`].
fn usual(reader: &mut Reader<'_>) -> Option<Usage> {
    let (mut seen, mut counts) = (Seen::<3>::default(), [None; 3]);
    reader.object(|reader, name| {
        let member = match name {
            b"prompt_tokens" => 0,
            b"completion_tokens" => 1,
            b"total_tokens" => 2,
            _ => return None,
        };
        seen.once(member)?;
        reader.blank();
        counts[member] = Some(reader.count()?);
        Some(())
    })?;
    let [Some(prompt), Some(completion), Some(total)] = counts else { return None };
    Some(Usage { prompt, completion, total: u64::max(total, prompt + completion), ..Usage::default() })
}

/// The members that were read. Those that were there twice would not be read alike by everybody.
#[derive(Default)]
struct Answer {
    seen: Seen<6>,
    /// How many, and the bytes of text in them.
    choices: Option<(u64, u64)>,
    usage: Option<super::Usage>,
    reports_usage: bool,
    error: bool,
    delta: Option<u64>,
    text: Option<u64>,
    texts: Texts,
}

impl Answer {
    fn member(&mut self, reader: &mut Reader<'_>, name: &[u8]) -> Option<()> {
        match name {
            b"choices" => {
                self.seen.once(0)?;
                self.choices = reader.unless_null(|reader| self.texts.choices(reader))?;
            }
            b"usage" => {
                self.seen.once(1)?;
                let written = reader.unless_null(Reader::written)?;
                self.usage = written.and_then(usage);
                self.reports_usage = written.is_some_and(|written| written.starts_with('{'));
            }
            b"error" => {
                self.seen.once(2)?;
                self.error |= reader.unless_null(Reader::written)?.is_some();
            }
            b"object" => {
                self.seen.once(3)?;
                self.error |= reader.unless_null(Reader::written)? == Some(r#""error""#);
            }
            b"delta" => {
                self.seen.once(4)?;
                self.delta = reader.unless_null(|reader| self.texts.text(reader))?;
            }
            b"text" => {
                self.seen.once(5)?;
                self.text = reader.unless_null(|reader| self.texts.text(reader))?;
            }
            _ => reader.skip(SKIPPED_DEPTH_MAX)?,
        }
        Some(())
    }

    fn delta(&self) -> Delta {
        let items = self.choices.map(|(items, _)| items);
        let of_choices = self.choices.map(|(_, bytes)| bytes);
        Delta {
            content_bytes: of_choices.or(self.delta).or(self.text).unwrap_or(0),
            has_choices: items.is_some_and(|items| items > 0),
            usage: self.usage,
            usage_only: items == Some(0) && self.reports_usage,
            error: self.error,
            done: false,
        }
    }
}

/// Which of a few members were there.
#[derive(Default)]
struct Seen<const MEMBERS: usize>(u8);

impl<const MEMBERS: usize> Seen<MEMBERS> {
    /// `None`: it was there before.
    fn once(&mut self, member: usize) -> Option<()> {
        let bit = 1 << member;
        let first = self.0 & bit == 0;
        self.0 |= bit;
        first.then_some(())
    }
}

/// Values read that hold text: how many, and where the last is written that is plain.
#[derive(Default)]
struct Texts {
    count: u64,
    plain: Option<Range<usize>>,
}

impl Texts {
    /// How many choices, and the bytes of text in them.
    fn choices(&mut self, reader: &mut Reader<'_>) -> Option<(u64, u64)> {
        let (mut items, mut bytes) = (0, 0);
        reader.array(|reader| {
            items += 1;
            let mut seen = Seen::<3>::default();
            reader.object(|reader, name| {
                let (member, message) = match name {
                    b"delta" => (0, true),
                    b"message" => (1, true),
                    b"text" => (2, false),
                    _ => return reader.skip(SKIPPED_DEPTH_MAX),
                };
                seen.once(member)?;
                let read = if message { Self::message } else { Self::text };
                bytes += reader.unless_null(|reader| read(self, reader))?.unwrap_or(0);
                Some(())
            })
        })?;
        Some((items, bytes))
    }

    fn message(&mut self, reader: &mut Reader<'_>) -> Option<u64> {
        const TEXTS: [&[u8]; 6] =
            [b"content", b"reasoning_content", b"reasoning", b"refusal", b"tool_calls", b"function_call"];
        let mut seen = Seen::<6>::default();
        let mut bytes = [0; TEXTS.len()];
        reader.object(|reader, name| {
            let Some(member) = TEXTS.iter().position(|text| *text == name) else {
                return reader.skip(SKIPPED_DEPTH_MAX);
            };
            seen.once(member)?;
            bytes[member] = reader.unless_null(|reader| self.text(reader))?.unwrap_or(0);
            Some(())
        })?;
        let [content, reasoning_content, reasoning, refusal, tool_calls, function_call] = bytes;
        // Some servers send the same reasoning under both names.
        Some(content + reasoning_content.max(reasoning) + refusal + tool_calls + function_call)
    }

    /// Bytes of text in a value.
    fn text(&mut self, reader: &mut Reader<'_>) -> Option<u64> {
        reader.blank();
        let start = reader.at();
        if reader.accept(b'"') {
            let string = reader.string()?;
            let bytes = string.inner.len() as u64;
            if string.plain {
                if bytes > 0 {
                    self.count += 1;
                    self.plain = Some(start + 1..reader.at() - 1);
                }
                return Some(bytes);
            }
        } else {
            reader.skip(SKIPPED_DEPTH_MAX)?;
        }
        self.count += 1;
        reader.since(start).map(text_in)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parsed;
    use super::*;

    /// Events as servers send them, with what was seen to differ.
    const EVENTS: [&str; 11] = [
        r#"{"id":"chatcmpl-AbC","object":"chat.completion.chunk","created":1717171717,"model":"gpt-4o","system_fingerprint":"fp_07","choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x8Jq"}"#,
        r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null}}]}"#,
        r#" { "choices" : [ { "text" : "é\n\u00e9" , "n" : -1.5e+3 } , { } ] } "#,
        r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"id":"c","function":{"arguments":"{\"a\":1}"}}]}}]}"#,
        r#"{"choices":[{"delta":{"reasoning":"ab","reasoning_content":"abc","x":[[[0,true,false]]]}}]}"#,
        r#"{"error":{"message":"no"},"object":"error","choices":null}"#,
        r#"{"type":"transcript.text.delta","delta":"abc","text":"\\"}"#,
        r#"{"choices":[{"message":{"content":[{"type":"text","text":"hm"}]},"delta":null}]}"#,
        r#"{"choices":[{"delta":{}}],"delta":"abc"}"#,
        r#"{"delta":"","text":"abc"}"#,
    ];

    fn same(data: &[u8]) {
        if let Some((delta, text)) = delta(data) {
            assert_eq!(Some(delta), parsed(data), "{}", String::from_utf8_lossy(data));
            let Some(text) = text else { return };
            // In its place, any other text is all that changes.
            let other = [&data[..text.start], b"another", &data[text.end..]].concat();
            let wanted = parsed(&other).map(|other| other.content_bytes);
            assert_eq!(wanted, Some(7), "{}", String::from_utf8_lossy(data));
            assert_eq!(delta.content_bytes, text.len() as u64);
        }
    }

    #[test]
    fn the_usual_shapes_are_known() {
        for event in EVENTS {
            assert!(delta(event.as_bytes()).is_some(), "{event}");
            same(event.as_bytes());
            (0..event.len()).for_each(|cut| same(&event.as_bytes()[..cut]));
        }
    }

    #[test]
    fn what_others_could_read_differently_is_left_to_them() {
        for event in [
            r#"{"choices":[],"choices":[]}"#,
            r#"{"ch\u006fices":[]}"#,
            r#"[[]]"#,
            r#"{"choices":[[]]}"#,
            r#"{"choices":{}}"#,
            r#"{"a":01}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":nul}"#,
            r#"{"a":1} x"#,
            "{\"a\":\"\u{1}\"}",
            "",
        ] {
            assert_eq!(delta(event.as_bytes()), None, "{event}");
        }
        let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100), "]".repeat(100));
        assert_eq!(delta(deep.as_bytes()), None);
        assert_eq!(delta(b"{\"choices\":[{\"text\":\"\xff\"}]}"), None);
        same(b"{\"id\":\"\xff\",\"choices\":[{\"text\":\"a\"}]}");
    }

    #[test]
    fn usage_is_read_as_serde_json_reads_it() {
        for usage in [
            r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}"#,
            r#"{ "total_tokens" : 0 , "prompt_tokens" : 123456789 , "completion_tokens":1}"#,
        ] {
            let usual = usual_usage(usage);
            assert_eq!(usual, super::super::counted(usage), "{usage}");
            let answer = format!(r#"{{"usage": {usage} , "x":1}}"#);
            assert_eq!(usage_at_end(answer.as_bytes()), usual.map(Found::Usual), "{usage}");
            assert!(usual.is_some(), "{usage}");
        }
        for usage in [
            r#"{"prompt_tokens":5,"completion_tokens":7}"#,
            r#"{"prompt_tokens":5.0,"completion_tokens":7,"total_tokens":12}"#,
            r#"{"prompt_tokens":05,"completion_tokens":7,"total_tokens":12}"#,
            r#"{"prompt_tokens":1234567890,"completion_tokens":7,"total_tokens":12}"#,
            r#"{"prompt_tokens":5,"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}"#,
            r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"cost":1}"#,
            r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12} "#,
            "null",
        ] {
            assert_eq!(usual_usage(usage), None, "{usage}");
        }
        for (answer, found) in [
            (r#"{"id":"\"usage\"","usage":{"a":1}}"#, Some(r#"{"a":1}"#)),
            (r#"{"usage": null , "x":[{}], "y":"}" } "#, Some("null")),
            (r#"{"choices":[{"usage":{"a":1}}]}"#, None),
            (r#"{"usage":{"a":1},"text":"\"usage\"}"}"#, Some(r#"{"a":1}"#)),
            (r#"{"usage":{"a":1},"z":{"usage":1}}"#, None),
            (r#"{"usage":{"a":1}"#, None),
            (r#"{"usage":{"a":1},"a\"usage":{"b":1}}"#, None),
            ("{}", None),
        ] {
            assert_eq!(usage_at_end(answer.as_bytes()), found.map(Found::Written), "{answer}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_read_otherwise(
            event in 0..EVENTS.len(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
            other in 0..EVENTS.len(), from in any::<prop::sample::Index>(), count in 0..12_usize,
        ) {
            let mut changed = EVENTS[event].as_bytes().to_vec();
            let at = at.index(changed.len());
            changed[at] = byte;
            same(&changed);
            let other = EVENTS[other].as_bytes();
            let from = from.index(other.len());
            let piece = &other[from..(from + count).min(other.len())];
            let mut spliced = EVENTS[event].as_bytes().to_vec();
            spliced.splice(at..at, piece.iter().copied());
            same(&spliced);
        }
    }
}
