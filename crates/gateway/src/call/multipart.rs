//! A `multipart/form-data` body (RFC 2046 section 5.1, RFC 7578), read strictly.
//!
//! A provider reads the same bytes with its own parser. So everything parsers disagree about is refused: the boundary
//! anywhere but in a delimiter line, line ends other than CRLF, folded or repeated headers, escapes in names.

use std::ops::Range;

use bytes::Bytes;
use memchr::memmem;

use super::{Call, CallError, Endpoint, Field, Form, Prompt, UsageReport, answers, checked_model, number};

/// Longest boundary, bytes (RFC 2046).
const BOUNDARY_BYTES_MAX: usize = 70;
/// Most parts of a form.
const PARTS_MAX: usize = 1024;
/// Longest header block of a part, bytes.
const HEADERS_BYTES_MAX: usize = 8192;

pub(super) fn parse(endpoint: Endpoint, content_type: &str, body: Bytes) -> Result<Call, CallError> {
    let mut form = Fields::default();
    for part in parts(&body, &boundary(content_type)?)? {
        form.add(endpoint, &body, part)?;
    }
    Ok(Call {
        endpoint,
        model: form.model.ok_or(CallError::MissingModel)?,
        streamed: form.stream.unwrap_or(false),
        usage: UsageReport::NoOption,
        prompt: form.prompt,
        prompts: 1,
        output_max: None,
        answers: answers(form.n.flatten(), None),
        form: Form::Multipart,
        body,
    })
}

/// The fields of a form that matter here.
#[derive(Default)]
struct Fields {
    model: Option<Field>,
    stream: Option<bool>,
    n: Option<Option<u64>>,
    has_prompt: bool,
    prompt: Prompt,
}

impl Fields {
    fn add(&mut self, endpoint: Endpoint, body: &[u8], part: Part<'_>) -> Result<(), CallError> {
        let twice = |param, before: bool| {
            if before { Err(CallError::Duplicate(param)) } else { Ok(()) }
        };
        match part.name {
            "model" => {
                twice("model", self.model.is_some())?;
                let value = checked_model(part.text("model", "a string", body)?)?;
                self.model = Some(Field { value, span: part.value });
            }
            "stream" => {
                twice("stream", self.stream.is_some())?;
                self.stream = Some(match part.text("stream", "a boolean", body)? {
                    "true" | "True" | "1" => true,
                    "false" | "False" | "0" | "" => false,
                    _ => return Err(wrong_type("stream", "true or false", "something else")),
                });
            }
            "n" => {
                twice("n", self.n.is_some())?;
                let value = number(part.text("n", "an integer", body)?);
                self.n = Some(value.map_err(|()| wrong_type("n", "an integer", "something else"))?);
            }
            "prompt" => {
                twice("prompt", self.has_prompt)?;
                self.has_prompt = true;
                self.prompt.text_bytes += part.value.len() as u64;
            }
            _ if part.file => match endpoint {
                Endpoint::ImagesEdits => self.prompt.images += 1,
                Endpoint::AudioTranscriptions | Endpoint::AudioTranslations => self.prompt.audio += 1,
                _ => self.prompt.files += 1,
            },
            _ => {}
        }
        Ok(())
    }
}

/// One part of a form.
struct Part<'a> {
    name: &'a str,
    /// It has a file name.
    file: bool,
    /// It has a content transfer encoding, so its bytes are not its value.
    encoded: bool,
    value: Range<usize>,
}

impl Part<'_> {
    /// Its value, when it is plain text.
    fn text<'b>(
        &self,
        param: &'static str,
        expected: &'static str,
        body: &'b [u8],
    ) -> Result<&'b str, CallError> {
        if self.file {
            return Err(wrong_type(param, expected, "a file"));
        }
        if self.encoded {
            return Err(wrong_type(param, expected, "an encoded part"));
        }
        std::str::from_utf8(&body[self.value.clone()])
            .map_err(|_| wrong_type(param, expected, "bytes that are not UTF-8"))
    }
}

/// The boundary that a `Content-Type` header names.
fn boundary(content_type: &str) -> Result<String, CallError> {
    let (kind, rest) = content_type.split_once(';').unwrap_or((content_type, ""));
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return Err(CallError::NotAForm("the content type is not multipart/form-data"));
    }
    let mut found = None;
    for parameter in Parameters(rest) {
        let (name, value) = parameter?;
        if name.eq_ignore_ascii_case("boundary") && found.replace(value).is_some() {
            return Err(CallError::NotAForm("the content type names two boundaries"));
        }
    }
    let boundary = found.ok_or(CallError::NotAForm("the content type names no boundary"))?;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&byte);
    if !(1..=BOUNDARY_BYTES_MAX).contains(&boundary.len())
        || !boundary.bytes().all(allowed)
        || boundary.ends_with(' ')
    {
        return Err(CallError::NotAForm(
            "the boundary is not 1 to 70 of the characters that RFC 2046 allows",
        ));
    }
    Ok(boundary.to_owned())
}

/// All parts, in order.
fn parts<'a>(body: &'a [u8], boundary: &str) -> Result<Vec<Part<'a>>, CallError> {
    let delimiter = format!("--{boundary}");
    let mut parts = Vec::new();
    let mut began: Option<usize> = None; // where the headers of the part at hand begin
    let mut closed = false;
    for at in memmem::find_iter(body, &delimiter) {
        if closed || !(at == 0 || body[..at].ends_with(b"\r\n")) {
            return Err(CallError::NotAForm("the boundary occurs outside of a delimiter line"));
        }
        if let Some(began) = began {
            if parts.len() == PARTS_MAX {
                return Err(CallError::NotAForm("it has more than 1024 parts"));
            }
            parts.push(part(body, began..at)?);
        }
        let behind = at + delimiter.len();
        closed = body[behind..].starts_with(b"--");
        if !closed {
            let padding = body[behind..].iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
            let line_end = behind + padding;
            if !body[line_end..].starts_with(b"\r\n") {
                return Err(CallError::NotAForm("a delimiter line does not end in CRLF"));
            }
            began = Some(line_end + 2);
        }
    }
    if !closed {
        return Err(CallError::NotAForm("its closing delimiter is missing"));
    }
    Ok(parts)
}

/// The part whose headers begin at `span.start` and whose delimiter begins at `span.end`.
fn part(body: &[u8], span: Range<usize>) -> Result<Part<'_>, CallError> {
    let bytes = &body[span.clone()];
    let window = &bytes[..bytes.len().min(HEADERS_BYTES_MAX)];
    let headers = memmem::find(window, b"\r\n\r\n")
        .ok_or(CallError::NotAForm("the headers of a part do not end within 8192 bytes"))?;
    // The CRLF before the delimiter is not of the value, and must not be of the headers either.
    let value = span.start + headers + 4..span.end - 2;
    if value.start > value.end {
        return Err(CallError::NotAForm("a part has headers but no body"));
    }
    let headers = std::str::from_utf8(&window[..headers])
        .map_err(|_| CallError::NotAForm("the headers of a part are not UTF-8"))?;
    let (mut disposition, mut encoded) = (None, false);
    for line in headers.split("\r\n") {
        let (name, content) =
            line.split_once(':').ok_or(CallError::NotAForm("a header of a part has no colon"))?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CallError::NotAForm("a header of a part is folded or has no proper name"));
        }
        if content.contains(['\r', '\n', '\0']) {
            return Err(CallError::NotAForm("a header of a part holds a control character"));
        }
        if name.eq_ignore_ascii_case("content-disposition") && disposition.replace(content).is_some() {
            return Err(CallError::NotAForm("a part has two Content-Disposition headers"));
        }
        encoded |= name.eq_ignore_ascii_case("content-transfer-encoding") && !is_plain(content);
    }
    let disposition = disposition.ok_or(CallError::NotAForm("a part has no Content-Disposition header"))?;
    let (name, file) = name_of(disposition)?;
    Ok(Part { name, file, encoded, value })
}

/// Whether a content transfer encoding leaves the bytes as they are.
fn is_plain(encoding: &str) -> bool {
    ["7bit", "8bit", "binary"].iter().any(|plain| encoding.trim().eq_ignore_ascii_case(plain))
}

/// The name in a `Content-Disposition` header, and whether there is a file name too.
fn name_of(disposition: &str) -> Result<(&str, bool), CallError> {
    let (kind, rest) = disposition.split_once(';').unwrap_or((disposition, ""));
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return Err(CallError::NotAForm("the Content-Disposition of a part is not form-data"));
    }
    let (mut name, mut file) = (None, false);
    for parameter in Parameters(rest) {
        let (key, value) = parameter?;
        if key.eq_ignore_ascii_case("name*") {
            return Err(CallError::NotAForm(
                "the name of a part is written as name*, which forms may not use",
            ));
        }
        if key.eq_ignore_ascii_case("name") && name.replace(value).is_some() {
            return Err(CallError::NotAForm("a part has two names"));
        }
        file |= key.eq_ignore_ascii_case("filename") || key.eq_ignore_ascii_case("filename*");
    }
    let name = name.ok_or(CallError::NotAForm("a part has no name"))?;
    if name.contains('\\') {
        return Err(CallError::NotAForm("the name of a part holds a backslash"));
    }
    Ok((name, file))
}

/// `; name=token; name="quoted"` after a header's first value.
struct Parameters<'a>(&'a str);

impl<'a> Iterator for Parameters<'a> {
    type Item = Result<(&'a str, &'a str), CallError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.0.trim_start_matches([' ', '\t', ';']);
        self.0 = "";
        if rest.is_empty() {
            return None;
        }
        let Some((name, value)) = rest.split_once('=') else {
            return Some(Err(CallError::NotAForm("a header parameter has no value")));
        };
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_*".contains(&byte))
        {
            return Some(Err(CallError::NotAForm("a header parameter has no proper name")));
        }
        let (value, rest) = match value.strip_prefix('"') {
            // A backslash before a quote is an escape to some and the end of a Windows path to others.
            Some(quoted) => match quoted.split_once('"') {
                Some((value, rest)) if !value.ends_with('\\') => (value, rest),
                _ => {
                    return Some(Err(CallError::NotAForm("a quoted header parameter has no clear end")));
                }
            },
            None => {
                let (value, rest) = value.split_at(value.find(';').unwrap_or(value.len()));
                let value = value.trim_end_matches([' ', '\t']);
                if !value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\') {
                    return Some(Err(CallError::NotAForm("a header parameter needs quotes")));
                }
                (value, rest)
            }
        };
        let rest = rest.trim_start_matches([' ', '\t']);
        if !(rest.is_empty() || rest.starts_with(';')) {
            return Some(Err(CallError::NotAForm("a header parameter is followed by something else")));
        }
        self.0 = rest;
        Some(Ok((name, value)))
    }
}

fn wrong_type(param: &'static str, expected: &'static str, found: &'static str) -> CallError {
    CallError::WrongType { param, expected, found }
}
