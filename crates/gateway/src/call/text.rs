//! How much text a JSON value holds, without building the value.
//!
//! Works on JSON that serde_json found valid, as [`serde_json::value::RawValue`] gives it. No recursion and no copy,
//! so neither deep nesting nor a large prompt costs more than one look at each byte.

use std::borrow::Cow;

use memchr::memchr2;

use super::Prompt;

/// Deepest nesting of arrays and objects in a body, the outermost object included.
pub const DEPTH_MAX: usize = 128;

/// Longest `role`, `type` or `id` that is taken for one, bytes; a longer one is text under a false name.
const LABEL_BYTES_MAX: usize = 64;

/// What the value of a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Strings are text.
    Text,
    /// One word that names a kind or an item; not text.
    Label,
    /// Whatever it holds is one image,
    Image,
    /// one recording,
    Audio,
    /// one file.
    File,
    /// Nothing in it counts.
    Nothing,
}

/// The nesting exceeds [`DEPTH_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooDeep;

/// Adds to `prompt` what `json`, which itself stands inside `depth` arrays and objects, holds. `part_of` tells from the
/// name of a member what its value is; a name written with escapes is passed as written, so at worst counts as text.
/// Returns how many strings, arrays and objects stand directly in it: the prompts of a list, the messages of a chat.
pub(super) fn add_text(
    prompt: &mut Prompt,
    json: &str,
    depth: usize,
    part_of: fn(&str) -> Part,
) -> Result<u64, TooDeep> {
    read_text(prompt, json, depth, part_of, |_, _| ())
}

/// [`add_text`], which also gives each string that counts as text to `each`: the name of a member that was read last,
/// and the string as it is written, in its quotes.
pub(super) fn read_text<'a>(
    prompt: &mut Prompt,
    json: &'a str,
    outer: usize,
    part_of: fn(&str) -> Part,
    mut each: impl FnMut(&'a str, &'a str),
) -> Result<u64, TooDeep> {
    let bytes = json.as_bytes();
    let (mut at, mut depth, mut items) = (0, outer, 0);
    let mut name = "";
    let mut part = Part::Text; // of the value that comes next
    let mut inside: Option<usize> = None; // the depth outside a value that is counted as one thing
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => {
                let string = read_string(bytes, at);
                let start = at;
                let raw = &json[start..string.end];
                at = string.end + 1;
                if inside.is_some() {
                    continue;
                }
                if is_key(bytes, at) {
                    part = part_of(raw);
                    name = raw;
                } else {
                    items += u64::from(depth == outer + 1);
                    if count_string(prompt, part, raw, string.decoded) {
                        each(name, &json[start - 1..at]);
                    }
                    part = Part::Text;
                }
            }
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(TooDeep);
                }
                items += u64::from(depth == outer + 2);
                if inside.is_none() && count_container(prompt, part) {
                    inside = Some(depth - 1);
                }
                part = Part::Text;
            }
            b']' | b'}' => {
                depth -= 1;
                inside = inside.filter(|outside| *outside != depth);
            }
            b'-' | b'0'..=b'9' => {
                at += bytes[at..].iter().take_while(|byte| is_in_number(**byte)).count();
                if inside.is_none() {
                    prompt.token_ids += u64::from(part == Part::Text);
                    part = Part::Text;
                }
            }
            b't' | b'f' | b'n' => part = Part::Text, // true, false, null: the other letters pass below
            _ => {}
        }
    }
    Ok(items)
}

/// Whether `json` stays within [`DEPTH_MAX`] when it stands inside `depth` arrays and objects.
pub(crate) fn check_depth(json: &str, depth: usize) -> Result<(), TooDeep> {
    if !json.starts_with(['[', '{']) {
        return Ok(());
    }
    add_text(&mut Prompt::default(), json, depth, |_| Part::Nothing).map(|_| ())
}

/// The bytes of text in one JSON value: a string's own, else those of all strings in it that `part_of` calls text.
pub(crate) fn text_bytes(json: &str, part_of: fn(&str) -> Part) -> u64 {
    if let Some(string) = json.strip_prefix('"') {
        return read_string(string.as_bytes(), 0).decoded as u64;
    }
    let mut prompt = Prompt::default();
    match add_text(&mut prompt, json, 0, part_of) {
        Ok(_) => prompt.text_bytes,
        Err(TooDeep) => 0,
    }
}

/// What a string of valid JSON says, given as it is written, in its quotes. One that is no Unicode stays as written.
pub(super) fn decoded(written: &str) -> Cow<'_, str> {
    let raw = written.get(1..written.len().saturating_sub(1)).unwrap_or_default();
    if !raw.contains('\\') {
        return raw.into();
    }
    serde_json::from_str::<String>(written).map_or(raw.into(), Cow::Owned)
}

struct Ended {
    /// Where the closing quote stands.
    end: usize,
    /// Length once decoded, in bytes of UTF-8.
    decoded: usize,
}

/// The string whose opening quote is just before `start`.
fn read_string(bytes: &[u8], start: usize) -> Ended {
    let (mut at, mut decoded) = (start, 0);
    while let Some(length) = memchr2(b'"', b'\\', &bytes[at..]) {
        decoded += length;
        at += length;
        if bytes[at] == b'"' {
            return Ended { end: at, decoded };
        }
        let (written, means) = match bytes.get(at + 1..at + 6) {
            Some([b'u', digits @ ..]) => (6, utf8_bytes(digits)),
            _ => (2, 1),
        };
        decoded += means;
        at += written;
    }
    Ended { end: bytes.len(), decoded }
}

/// UTF-8 length of the UTF-16 unit written as four hex digits; each half of a surrogate pair is half of its four bytes.
fn utf8_bytes(digits: &[u8]) -> usize {
    match digits {
        [b'0', b'0', b'0'..=b'7', _] => 1,
        [b'0', b'0'..=b'7', ..] => 2,
        [b'd' | b'D', b'8'..=b'9' | b'a'..=b'f' | b'A'..=b'F', ..] => 2,
        _ => 3,
    }
}

fn is_key(bytes: &[u8], behind: usize) -> bool {
    bytes[behind..].iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b':')
}

fn is_in_number(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')
}

/// Counts a string; true: as text.
fn count_string(prompt: &mut Prompt, part: Part, raw: &str, decoded: usize) -> bool {
    let media = match part {
        Part::Text => data_url(raw),
        Part::Label if decoded > LABEL_BYTES_MAX => None,
        _ => Some(part),
    };
    match media {
        Some(kind) => count_thing(prompt, kind),
        None => prompt.text_bytes += decoded as u64,
    }
    media.is_none()
}

/// Counts an array or object that is one thing; false: its strings are to be looked at one by one.
fn count_container(prompt: &mut Prompt, part: Part) -> bool {
    count_thing(prompt, part);
    !matches!(part, Part::Text | Part::Label)
}

fn count_thing(prompt: &mut Prompt, part: Part) {
    match part {
        Part::Image => prompt.images += 1,
        Part::Audio => prompt.audio += 1,
        Part::File => prompt.files += 1,
        Part::Text | Part::Label | Part::Nothing => {}
    }
}

/// What a string is that is a base64 `data:` URL (RFC 2397) from end to end; prose that only begins like one is text.
fn data_url(raw: &str) -> Option<Part> {
    let media = raw.strip_prefix("data:")?;
    let (kind, data) = media.split_once(',')?;
    let whole = kind.len() <= 128
        && kind.ends_with(";base64")
        && data.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_\\".contains(&byte));
    whole.then_some(match kind.split(['/', '\\']).next() {
        Some("image") => Part::Image,
        Some("audio") => Part::Audio,
        _ => Part::File,
    })
}
