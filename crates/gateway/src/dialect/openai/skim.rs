//! Events of a stream in the shape that nearly all have, read in one look at each byte.
//!
//! A reader of JSON that builds nothing and knows the members of [`Answer`](super::Answer) alone. Whatever is written in
//! another way (a name with escapes, a member twice, deep nesting, what is no JSON) it leaves to serde_json, so it never
//! says anything else than that would, only sooner. A property test holds the two equal.

use std::ops::Range;

use super::{Delta, Usage, text_in, usage};

/// Nesting in a member that does not matter here; what is deeper is left to serde_json.
const DEPTH_MAX: u32 = 16;

/// What an event holds, and where its text is written if it is one string without escapes; `None`: it is not of the shape
/// that is known here.
pub(super) fn delta(json: &[u8]) -> Option<(Delta, Option<Range<usize>>)> {
    let mut reader = Reader { json, at: 0, texts: 0, plain: None };
    let mut answer = Answer::default();
    reader.object(|reader, name| answer.member(reader, name))?;
    reader.blank();
    let delta = answer.delta();
    // Of several places for text one counts; what stands in another is not counted.
    let only = reader
        .plain
        .filter(|text| reader.texts == 1 && !text.is_empty() && text.len() as u64 == delta.content_bytes);
    (reader.at == json.len()).then_some((delta, only))
}

/// The members of an object that is all of `json`: names and values as they are written. `None`: it is not known here.
pub(super) fn members<'a>(json: &'a str, mut member: impl FnMut(&'a str, &'a str)) -> Option<()> {
    let mut reader = Reader { json: json.as_bytes(), at: 0, texts: 0, plain: None };
    reader.object(|reader, name| {
        reader.blank();
        let start = reader.at;
        reader.skip(DEPTH_MAX)?;
        member(std::str::from_utf8(name).ok()?, json.get(start..reader.at)?);
        Some(())
    })?;
    reader.blank();
    (reader.at == json.len()).then_some(())
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
    let mut reader = Reader { json: answer, at: name + NAME.len(), texts: 0, plain: None };
    reader.expect(b':')?;
    reader.blank();
    let start = reader.at;
    let usage = match reader.usual_usage() {
        Some(usage) => Found::Usual(usage),
        None => {
            reader.at = start;
            Found::Written(reader.written()?)
        }
    };
    while !reader.accept(b'}') {
        reader.expect(b',')?;
        reader.expect(b'"')?;
        reader.string()?;
        reader.expect(b':')?;
        reader.skip(DEPTH_MAX)?;
    }
    reader.blank();
    (reader.at == answer.len()).then_some(usage)
}

/// [`usage`] of the usual kind: whole numbers below a thousand million, under the names of chat and completions, and what
/// says nothing more. `None`: it is of another kind.
pub(super) fn usual_usage(written: &str) -> Option<Usage> {
    let mut reader = Reader { json: written.as_bytes(), at: 0, texts: 0, plain: None };
    reader.usual_usage().filter(|_| reader.at == written.len())
}

/// Whether these bytes between quotes are a string that says what is written.
pub(super) fn is_plain(text: &[u8]) -> bool {
    let (length, ascii) = run(text);
    length == text.len() && (ascii || std::str::from_utf8(text).is_ok())
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
}

impl Answer {
    fn member(&mut self, reader: &mut Reader<'_>, name: &[u8]) -> Option<()> {
        match name {
            b"choices" => {
                self.seen.once(0)?;
                self.choices = reader.unless_null(Reader::choices)?;
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
                self.delta = reader.unless_null(Reader::text)?;
            }
            b"text" => {
                self.seen.once(5)?;
                self.text = reader.unless_null(Reader::text)?;
            }
            _ => reader.skip(DEPTH_MAX)?,
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

/// Where in a text the next value is read.
struct Reader<'a> {
    json: &'a [u8],
    at: usize,
    /// Values read that hold text, and where the last is written that is plain.
    texts: u64,
    plain: Option<Range<usize>>,
}

impl<'a> Reader<'a> {
    /// An object; `member` reads the value of each name.
    fn object(&mut self, mut member: impl FnMut(&mut Self, &'a [u8]) -> Option<()>) -> Option<()> {
        self.expect(b'{')?;
        if self.accept(b'}') {
            return Some(());
        }
        loop {
            self.expect(b'"')?;
            let name = self.string()?;
            if !name.plain {
                return None;
            }
            self.expect(b':')?;
            member(self, name.inner)?;
            if self.accept(b'}') {
                return Some(());
            }
            self.expect(b',')?;
        }
    }

    fn array(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.expect(b'[')?;
        if self.accept(b']') {
            return Some(());
        }
        loop {
            item(self)?;
            if self.accept(b']') {
                return Some(());
            }
            self.expect(b',')?;
        }
    }

    /// How many choices, and the bytes of text in them.
    fn choices(&mut self) -> Option<(u64, u64)> {
        let (mut items, mut bytes) = (0, 0);
        self.array(|reader| {
            items += 1;
            let mut seen = Seen::<3>::default();
            reader.object(|reader, name| {
                let (member, message) = match name {
                    b"delta" => (0, true),
                    b"message" => (1, true),
                    b"text" => (2, false),
                    _ => return reader.skip(DEPTH_MAX),
                };
                seen.once(member)?;
                let read = if message { Self::message } else { Self::text };
                bytes += reader.unless_null(read)?.unwrap_or(0);
                Some(())
            })
        })?;
        Some((items, bytes))
    }

    fn message(&mut self) -> Option<u64> {
        const TEXTS: [&[u8]; 6] =
            [b"content", b"reasoning_content", b"reasoning", b"refusal", b"tool_calls", b"function_call"];
        let mut seen = Seen::<6>::default();
        let mut bytes = [0; TEXTS.len()];
        self.object(|reader, name| {
            let Some(member) = TEXTS.iter().position(|text| *text == name) else {
                return reader.skip(DEPTH_MAX);
            };
            seen.once(member)?;
            bytes[member] = reader.unless_null(Self::text)?.unwrap_or(0);
            Some(())
        })?;
        let [content, reasoning_content, reasoning, refusal, tool_calls, function_call] = bytes;
        // Some servers send the same reasoning under both names.
        Some(content + reasoning_content.max(reasoning) + refusal + tool_calls + function_call)
    }

    /// Bytes of text in a value.
    fn text(&mut self) -> Option<u64> {
        self.blank();
        let start = self.at;
        if self.accept(b'"') {
            let string = self.string()?;
            let bytes = string.inner.len() as u64;
            if string.plain {
                if bytes > 0 {
                    self.texts += 1;
                    self.plain = Some(start + 1..self.at - 1);
                }
                return Some(bytes);
            }
        } else {
            self.skip(DEPTH_MAX)?;
        }
        self.texts += 1;
        Some(text_in(std::str::from_utf8(&self.json[start..self.at]).ok()?))
    }

    /// See [`usual_usage`].
    fn usual_usage(&mut self) -> Option<Usage> {
        let (mut seen, mut counts) = (Seen::<3>::default(), [None; 3]);
        self.object(|reader, name| {
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

    /// A whole number of at most nine digits.
    fn count(&mut self) -> Option<u64> {
        let start = self.at;
        self.digits().filter(|()| self.at - start <= 9)?;
        let digits = &self.json[start..self.at];
        // With a zero before others it would be no number.
        let whole = digits == b"0" || digits[0] != b'0';
        whole.then(|| digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
    }

    /// A value as it is written.
    fn written(&mut self) -> Option<&'a str> {
        self.blank();
        let start = self.at;
        self.skip(DEPTH_MAX)?;
        std::str::from_utf8(&self.json[start..self.at]).ok()
    }

    /// `Some(None)`: null.
    fn unless_null<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        self.blank();
        if self.json.get(self.at) == Some(&b'n') { self.skip(0).map(|()| None) } else { read(self).map(Some) }
    }

    /// Goes past a value nested no deeper than `depth`.
    fn skip(&mut self, depth: u32) -> Option<()> {
        self.blank();
        match *self.json.get(self.at)? {
            b'"' => {
                self.at += 1;
                self.string().map(|_| ())
            }
            b'{' => {
                let depth = depth.checked_sub(1)?;
                self.object(|reader, _| reader.skip(depth))
            }
            b'[' => {
                let depth = depth.checked_sub(1)?;
                self.array(|reader| reader.skip(depth))
            }
            b'-' | b'0'..=b'9' => self.number(),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => None,
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        let found = self.json[self.at..].starts_with(word);
        self.at += word.len();
        found.then_some(())
    }

    /// RFC 8259, section 6.
    fn number(&mut self) -> Option<()> {
        self.next_is(b"-");
        if !self.next_is(b"0") {
            self.digits()?;
        }
        if self.next_is(b".") {
            self.digits()?;
        }
        if self.next_is(b"eE") {
            self.next_is(b"+-");
            self.digits()?;
        }
        Some(())
    }

    /// At least one.
    fn digits(&mut self) -> Option<()> {
        let count = self.json[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        (count > 0).then_some(())
    }

    /// The rest of a string whose opening quote was read.
    #[inline]
    fn string(&mut self) -> Option<Spelled<'a>> {
        let start = self.at;
        let mut plain = true;
        loop {
            let (bytes, ascii) = run(&self.json[self.at..]);
            self.at += bytes;
            plain &= ascii;
            match *self.json.get(self.at)? {
                b'"' => break,
                b'\\' => {
                    plain = false;
                    self.escape()?;
                }
                _ => return None,
            }
        }
        let inner = &self.json[start..self.at];
        self.at += 1;
        Some(Spelled { inner, plain })
    }

    fn escape(&mut self) -> Option<()> {
        self.at += match *self.json.get(self.at + 1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => 2,
            b'u' => {
                let digits = self.json.get(self.at + 2..self.at + 6)?;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(6)?
            }
            _ => return None,
        };
        Some(())
    }

    fn blank(&mut self) {
        while self.next_is(b" \n\r\t") {}
    }

    /// Takes the next byte that is not blank, if it is this one.
    fn accept(&mut self, byte: u8) -> bool {
        self.blank();
        self.next_is(&[byte])
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.accept(byte).then_some(())
    }

    /// Takes the next byte, if it is one of these.
    #[inline]
    fn next_is(&mut self, bytes: &[u8]) -> bool {
        let is = self.json.get(self.at).is_some_and(|byte| bytes.contains(byte));
        self.at += usize::from(is);
        is
    }
}

/// A string as it is written between its quotes.
struct Spelled<'a> {
    inner: &'a [u8],
    /// ASCII without escapes: it says what is written.
    plain: bool,
}

/// Past so many bytes a string is a long one.
const LONG: usize = 32;

/// How many bytes come before a quote, a backslash or a control character, and whether all of them are ASCII.
#[inline]
fn run(bytes: &[u8]) -> (usize, bool) {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = EACH << 7;
    let (mut at, mut ascii) = (0, true);
    // Eight at a time: the high bit of each byte that is sought, and perhaps of some behind the first such.
    while let Some(eight) = bytes[at..].first_chunk() {
        if at == LONG {
            // As many at a time as the processor can, in three looks.
            let rest = &bytes[at..];
            let rest = &rest[..memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len())];
            if !rest.iter().fold(false, |found, byte| found | (*byte < 0x20)) {
                return (at + rest.len(), ascii && rest.is_ascii());
            }
        }
        let word = u64::from_le_bytes(*eight);
        let below = |word: u64, least: u8| word.wrapping_sub(EACH * u64::from(least)) & !word & HIGH;
        let is = |byte: u8| below(word ^ (EACH * u64::from(byte)), 1);
        let sought = is(b'"') | is(b'\\') | below(word, 0x20);
        if sought != 0 {
            let before = sought.trailing_zeros() / 8;
            let passed = word & ((1_u64 << (8 * before)) - 1);
            return (at + before as usize, ascii && passed & HIGH == 0);
        }
        ascii &= word & HIGH == 0;
        at += 8;
    }
    while let Some(byte) = bytes.get(at).filter(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20)) {
        ascii &= byte.is_ascii();
        at += 1;
    }
    (at, ascii)
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

    /// Names and values.
    struct Pairs(Vec<(String, String)>);

    impl<'de> serde::Deserialize<'de> for Pairs {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Pairs;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                    let mut pairs = Vec::new();
                    while let Some((name, value)) =
                        map.next_entry::<String, &serde_json::value::RawValue>()?
                    {
                        pairs.push((name, value.get().to_owned()));
                    }
                    Ok(Pairs(pairs))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }

    fn same_members(json: &str) -> bool {
        let mut read = Vec::new();
        let known = members(json, |name, value| read.push((name.to_owned(), value.to_owned()))).is_some();
        if known {
            assert_eq!(serde_json::from_str::<Pairs>(json).expect(json).0, read, "{json}");
        }
        known
    }

    #[test]
    fn members_are_those_that_serde_json_finds() {
        for event in EVENTS {
            assert!(same_members(event), "{event}");
        }
        for length in [30, 31, 32, 33, 39, 40, 41, 100] {
            for end in ["", "é", "\\n", "\\u00e9", "\t", "\\x", "\u{1}"] {
                for behind in ["", "a", "abcdefgh", "abcdefghijklmnop"] {
                    same_members(&format!("{{\"a\":\"{}{end}{behind}\",\"b\":1}}", "x".repeat(length)));
                    let text = ["x".repeat(length).as_str(), end, behind].concat();
                    let same = text.bytes().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20));
                    let bytes = same.unwrap_or(text.len());
                    assert_eq!(run(text.as_bytes()), (bytes, text[..bytes].is_ascii()), "{text:?}");
                }
            }
        }
        assert!(same_members(&format!(
            r#"{{"model":"m","messages":[{{"content":"{}"}}]}}"#,
            "é ".repeat(99)
        )));
        for unknown in [r#"{"\u0061":1}"#, "[]", "", "{", r#"{"a":1}}"#, r#"{"a":tru}"#, "{\"a\":\"\n\"}"] {
            assert!(!same_members(unknown), "{unknown}");
        }
    }

    fn same(data: &[u8]) {
        if let Ok(json) = std::str::from_utf8(data) {
            same_members(json);
        }
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

    #[test]
    fn a_run_ends_at_what_ends_it() {
        for length in 0..20 {
            for (end, text) in [(&b"\""[..], "a"), (b"\\", "b"), (b"\n", "c"), (b"\x1f", "~"), (b"", " ")] {
                let bytes = [text.repeat(length).as_bytes(), end, b"\"\\\xff"].concat();
                let all = if end.is_empty() { length } else { bytes.len() - 3 - end.len() };
                assert_eq!(run(&bytes), (all, true), "{bytes:?}");
            }
            let bytes = [&vec![0xc3; length][..], b"\""].concat();
            assert_eq!(run(&bytes), (length, length == 0));
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
