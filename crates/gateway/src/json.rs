//! JSON read where it stands: in one look at each byte, building nothing.
//!
//! Only what all readers understand alike is read. What is written in another way (a name with escapes, deep nesting), or is
//! no JSON, is `None` everywhere here, and left to serde_json. Property tests of those who read with it hold the two equal.

/// Nesting in a value that is passed over; what is deeper is left to serde_json.
pub const SKIPPED_DEPTH_MAX: u32 = 16;

/// The members of an object that is all of `json`: names, of plain letters, and values as they are written. `None`: it is
/// written in an unusual way, or is none, which serde_json will tell; the members before were given.
pub fn members<'a>(json: &'a str, mut member: impl FnMut(&'a str, &'a str)) -> Option<()> {
    let mut reader = Reader::new(json.as_bytes());
    reader.object(|reader, name| {
        reader.blank();
        let start = reader.at;
        reader.skip(SKIPPED_DEPTH_MAX)?;
        // Cut between characters that are whole: nothing is to be looked at again.
        member(std::str::from_utf8(name).ok()?, json.get(start..reader.at)?);
        Some(())
    })?;
    reader.end()
}

/// Whether these bytes between quotes are a string that says what is written.
pub fn is_plain(text: &[u8]) -> bool {
    let (length, ascii) = run(text);
    length == text.len() && (ascii || std::str::from_utf8(text).is_ok())
}

/// Where in a text the next value is read.
pub struct Reader<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// At the beginning of a text.
    pub fn new(json: &'a [u8]) -> Self {
        Self { json, at: 0 }
    }

    /// In the middle of one.
    pub fn within(json: &'a [u8], at: usize) -> Self {
        Self { json, at }
    }

    /// How far it has come.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Goes back to where it was.
    pub fn back_to(&mut self, at: usize) {
        self.at = at;
    }

    /// Nothing but white space is left.
    pub fn end(&mut self) -> Option<()> {
        self.blank();
        (self.at == self.json.len()).then_some(())
    }

    /// An object; `member` reads the value of each name.
    pub fn object(&mut self, mut member: impl FnMut(&mut Self, &'a [u8]) -> Option<()>) -> Option<()> {
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

    /// An array; `item` reads each item.
    pub fn array(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
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

    /// A whole number of at most nine digits.
    pub fn count(&mut self) -> Option<u64> {
        let start = self.at;
        self.digits().filter(|()| self.at - start <= 9)?;
        let digits = &self.json[start..self.at];
        // With a zero before others it would be no number.
        let whole = digits == b"0" || digits[0] != b'0';
        whole.then(|| digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
    }

    /// A value as it is written.
    pub fn written(&mut self) -> Option<&'a str> {
        self.blank();
        let start = self.at;
        self.skip(SKIPPED_DEPTH_MAX)?;
        self.since(start)
    }

    /// What was read since it was there.
    pub fn since(&self, start: usize) -> Option<&'a str> {
        std::str::from_utf8(self.json.get(start..self.at)?).ok()
    }

    /// `Some(None)`: null.
    pub fn unless_null<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        self.blank();
        if self.json.get(self.at) == Some(&b'n') { self.skip(0).map(|()| None) } else { read(self).map(Some) }
    }

    /// Goes past a value nested no deeper than `depth`.
    pub fn skip(&mut self, depth: u32) -> Option<()> {
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
        self.json[self.at..].starts_with(word).then(|| self.at += word.len())
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
    pub fn string(&mut self) -> Option<Spelled<'a>> {
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

    /// Past white space.
    pub fn blank(&mut self) {
        while self.next_is(b" \n\r\t") {}
    }

    /// Takes the next byte that is not blank, if it is this one.
    pub fn accept(&mut self, byte: u8) -> bool {
        self.blank();
        self.next_is(&[byte])
    }

    /// [`Reader::accept`] that must.
    pub fn expect(&mut self, byte: u8) -> Option<()> {
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
pub struct Spelled<'a> {
    /// What stands there.
    pub inner: &'a [u8],
    /// ASCII without escapes: it says what is written.
    pub plain: bool,
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

    use super::*;

    const USUAL: [&str; 3] = [
        r#"{"id":"AbC","created":1717171717,"a":[{"index":0,"b":{"c":" w"},"d":null}],"usage":null}"#,
        r#" { "choices" : [ { "text" : "é\n\u00e9" , "n" : -1.5e+3 } , { } ] , "a":[true,false] } "#,
        r#"{"a":"{\"a\":1}","b":[],"c":{},"d":0.5E-7}"#,
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
        for json in USUAL {
            assert!(same_members(json), "{json}");
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
            which in 0..USUAL.len(), at in any::<prop::sample::Index>(), byte in any::<u8>(), insert in any::<bool>(),
        ) {
            let mut changed = USUAL[which].as_bytes().to_vec();
            let at = at.index(changed.len());
            if insert { changed.insert(at, byte) } else { changed[at] = byte }
            if let Ok(changed) = std::str::from_utf8(&changed) {
                same_members(changed);
            }
        }
    }
}
