use super::*;
use crate::fields::Fields;
use proptest::prelude::*;

const HEAD_BYTES: usize = 400;
const FIELDS: usize = 8;

/// What a stream came to, however it was cut: the verdict, the heads handed on, and the position.
fn judge<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> (Option<Violation>, Position) {
    let mut scanner = Scanner::new(HEAD_BYTES, FIELDS);
    for part in parts {
        if let Err(refusal) = scanner.feed(part) {
            return (Some(refusal.violation), scanner.position());
        }
    }
    (None, scanner.position())
}

fn chunked(body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
}

fn violations() -> Vec<(String, Violation)> {
    let line = |line: &str| format!("POST /v1 HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n");
    let request = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
    let fields = "X: y\r\n".repeat(FIELDS + 1);
    let long = "y".repeat(HEAD_BYTES);
    let extension = format!("1;{}\r\na\r\n", "e".repeat(EXTENSION_BYTES_MAX + 1));
    let trailer = format!("0\r\nX: {}\r\n\r\n", "t".repeat(TRAILER_BYTES_MAX));
    let trailers = format!("0\r\n{}\r\n", "T: t\r\n".repeat(TRAILER_FIELDS_MAX + 1));
    vec![
        ("GET / HTTP/1.1\nHost: a\r\n\r\n".into(), Violation::BareLineFeed),
        ("GET / HTTP/1.1\r\nHost: a\n\r\n".into(), Violation::BareLineFeed),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n".into(), Violation::BareLineFeed),
        ("GET / HTTP/1.1\r\nHost\n: a\r\n\r\n".into(), Violation::BareLineFeed),
        (line("Content-Length: 5\nX: y"), Violation::BareLineFeed),
        (line("Transfer-Encoding: chunked\nX: y"), Violation::BareLineFeed),
        ("\nGET / HTTP/1.1\r\n".into(), Violation::BareLineFeed),
        (line("X: a\rb"), Violation::StrayCarriageReturn),
        (line("X: a\r\r"), Violation::StrayCarriageReturn),
        ("\rGET / HTTP/1.1\r\n".into(), Violation::StrayCarriageReturn),
        ("GET / HTTP/1.1\r\nHost: a\r\n\rX".into(), Violation::StrayCarriageReturn),
        (format!("{}GET / HTTP/1.1\r\n", "\r\n".repeat(5)), Violation::EmptyLines),
        (request("GET /"), Violation::RequestLine),
        (request("GET  / HTTP/1.1"), Violation::RequestLine),
        (request("GET /  HTTP/1.1"), Violation::RequestLine),
        (request("GET / HTTP/1.1 "), Violation::RequestLine),
        (request("GET / HTTP/2.0"), Violation::RequestLine),
        (request("GET / HTTP/1.2"), Violation::RequestLine),
        (request("GET / http/1.1"), Violation::RequestLine),
        (request("GET /\t HTTP/1.1"), Violation::RequestLine),
        (request("GET /ü HTTP/1.1"), Violation::RequestLine),
        (request("GET /#f HTTP/1.1"), Violation::RequestLine),
        (request("G(T / HTTP/1.1"), Violation::RequestLine),
        (request(" GET / HTTP/1.1"), Violation::RequestLine),
        (request("PRI * HTTP/2.0"), Violation::RequestLine),
        ("\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), Violation::RequestLine),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\rX".into(), Violation::RequestLine),
        ("\x16\x03\x01\x02".into(), Violation::RequestLine),
        (line(": x"), Violation::FieldName),
        (line("X"), Violation::FieldName),
        (line("X\u{e9}: y"), Violation::FieldName),
        (line("X Y: z"), Violation::SpaceBeforeColon),
        (line("Content-Length : 5"), Violation::SpaceBeforeColon),
        (line("Transfer-Encoding\t: chunked"), Violation::SpaceBeforeColon),
        (line("X: y\r\n z: folded"), Violation::FoldedField),
        ("GET / HTTP/1.1\r\n Host: a\r\n\r\n".into(), Violation::FoldedField),
        (line("X: a\0b"), Violation::FieldValue),
        (line("X: 123456789\x7f0"), Violation::FieldValue),
        (line(&format!("X: {long}")), Violation::HeadTooLarge(HEAD_BYTES)),
        (request(&format!("GET /{long} HTTP/1.1")), Violation::HeadTooLarge(HEAD_BYTES)),
        (format!("GET / HTTP/1.1\r\n{fields}\r\n"), Violation::TooManyFields(FIELDS)),
        ("GET / HTTP/1.1\r\n\r\n".into(), Violation::NoHost),
        (line("hOST: a"), Violation::SeveralHosts),
        (line("Content-Length: 5\r\nTransfer-Encoding: chunked"), Violation::LengthAndCoding),
        (line("Transfer-Encoding: chunked\r\nContent-Length: 5"), Violation::LengthAndCoding),
        (line("Content-Length: 5\r\ncontent-length: 5"), Violation::SeveralLengths),
        (line("Content-Length: 5, 5"), Violation::Length),
        (line("Content-Length: +5"), Violation::Length),
        (line("Content-Length: -5"), Violation::Length),
        (line("Content-Length: 0x5"), Violation::Length),
        (line("Content-Length: 5 5"), Violation::Length),
        (line("Content-Length:"), Violation::Length),
        (line("Content-Length: 9223372036854775808"), Violation::Length),
        (line("Content-Length: 99999999999999999999999"), Violation::Length),
        (line("Transfer-Encoding: gzip, chunked"), Violation::Coding),
        (line("Transfer-Encoding: chunked, chunked"), Violation::Coding),
        (line("Transfer-Encoding: chunkedx"), Violation::Coding),
        (line("Transfer-Encoding: chunke"), Violation::Coding),
        (line("Transfer-Encoding: chunked x"), Violation::Coding),
        (line("Transfer-Encoding: ch unked"), Violation::Coding),
        (line("Transfer-Encoding:"), Violation::Coding),
        (line("Transfer-Encoding: \x0bchunked"), Violation::Coding),
        (line("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), Violation::Coding),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(), Violation::Coding),
        (chunked("\r\n"), Violation::Chunk),
        (chunked("x\r\n"), Violation::Chunk),
        (chunked("-1\r\n"), Violation::Chunk),
        (chunked("0x1\r\n"), Violation::Chunk),
        (chunked(" 1\r\na\r\n"), Violation::Chunk),
        (chunked("1 \r\na\r\n"), Violation::Chunk),
        (chunked("1\na\r\n"), Violation::Chunk),
        (chunked("1\rxa\r\n"), Violation::Chunk),
        (chunked("11111111111111111\r\n"), Violation::Chunk),
        (chunked("1;a\nb\r\n"), Violation::Chunk),
        (chunked("1\r\nab\r\n"), Violation::Chunk),
        (chunked("1\r\na\r0\r\n\r\n"), Violation::Chunk),
        (chunked("1\r\na\n0\r\n\r\n"), Violation::Chunk),
        (chunked(&extension), Violation::Chunk),
        (chunked(&trailer), Violation::Trailers),
        (chunked(&trailers), Violation::Trailers),
        (chunked("0\r\nContent-Length: 5\r\n\r\n"), Violation::Trailers),
        (chunked("0\r\nX: y\n\r\n"), Violation::BareLineFeed),
    ]
}

#[test]
fn every_violation_is_found_however_the_stream_is_cut_in_two() {
    for (stream, expected) in violations() {
        let stream = stream.as_bytes();
        assert_eq!(judge([stream]).0, Some(expected), "{}", stream.escape_ascii());
        assert_eq!(judge(stream.chunks(1)).0, Some(expected), "{}", stream.escape_ascii());
        for at in 0..stream.len() {
            let (a, b) = stream.split_at(at);
            let shown = || format!("{} | {}", a.escape_ascii(), b.escape_ascii());
            assert_eq!(judge([a, b]).0, Some(expected), "{}", shown());
        }
    }
}

#[test]
fn a_violation_behind_good_requests_cuts_exactly_there() {
    let good =
        "GET /a HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n\nb\r";
    for (bad, expected) in violations() {
        let stream = format!("{good}{bad}");
        let mut scanner = Scanner::new(HEAD_BYTES, FIELDS);
        let refusal = scanner.feed(stream.as_bytes()).expect_err(&stream);
        let cut = match bad.strip_prefix("\r\n") {
            None => good.len(),
            Some(rest) => stream.len() - rest.trim_start_matches("\r\n").len(),
        };
        // Empty lines are handed on, up to the one too many.
        let cut = if expected == Violation::EmptyLines { good.len() + 8 } else { cut };
        assert_eq!(refusal, Refusal { violation: expected, cut: Cut::Before(cut) }, "{stream}");
        assert_eq!(scanner.heads(), 2, "{stream}");
        let left: Vec<_> =
            std::iter::from_fn(|| scanner.take()).map(|head| (head.method, head.bytes)).collect();
        assert_eq!(left, [(3, 28), (4, 47)], "{stream}");
    }
}

#[test]
fn a_violation_in_a_body_whose_head_was_handed_on_is_within() {
    let mut scanner = Scanner::new(HEAD_BYTES, FIELDS);
    scanner.feed(chunked("1\r\na").as_bytes()).expect("a good beginning");
    let refusal = scanner.feed(b"b").expect_err("too long a chunk");
    assert_eq!(refusal, Refusal { violation: Violation::Chunk, cut: Cut::Within });
    assert_eq!(scanner.heads(), 1);
    assert!(scanner.take().is_some_and(|head| head.chunked) && scanner.take().is_none());
}

#[test]
fn limits_allow_what_they_say() {
    let name = format!("{}: y\r\n", "n".repeat(NAME_MAX));
    let head = format!("GET / HTTP/1.1\r\nHost: a\r\n{name}{}", "X: y\r\n".repeat(FIELDS - 3));
    let fill = "z".repeat(HEAD_BYTES - head.len() - "Z: \r\n\r\n".len());
    let fits = format!("\r\n\r\n\r\n\r\n{head}Z: {fill}\r\n\r\n");
    assert_eq!(judge([fits.as_bytes()]), (None, Position::Between));
    let exceeds = format!("{head}Z: {fill}z\r\n\r\n");
    assert_eq!(judge([exceeds.as_bytes()]).0, Some(Violation::HeadTooLarge(HEAD_BYTES)));
}

#[test]
fn the_http2_preface_turns_scanning_off() {
    let stream = [HTTP2_PREFACE, b"\0\0\0\x04\0\0\0\0\0\n\n\r"].concat();
    for at in 0..stream.len() {
        let (a, b) = stream.split_at(at);
        assert_eq!(judge([a, b]), (None, Position::Http2), "cut at {at}");
    }
}

#[test]
fn text_runs_end_where_a_plain_loop_says() {
    for length in 0..40 {
        for at in 0..length {
            for byte in 0..=u8::MAX {
                let mut bytes = vec![b'\t'; length];
                bytes[at..].fill(0xff);
                bytes[at] = byte;
                let plain = bytes.iter().position(|&b| (b < b' ' && b != b'\t') || b == 0x7f);
                assert_eq!(text_run(&bytes), plain.unwrap_or(length), "{byte:#x} at {at} of {length}");
            }
        }
    }
}

prop_compose! {
    fn field()(name in "[A-Za-z][A-Za-z0-9!#$%&'*+.^_`|~-]{0,20}", value in "[\t -~\u{80}-\u{ff}]{0,40}") -> String {
        format!("X-{name}:{value}\r\n")
    }
}

/// A valid request.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let line = (
        "(\r\n){0,2}(GET|POST|x-own) /[a-z0-9/%?&=._~{}-]{0,20} HTTP/1\\.[01]\r\n",
        "(Host|hOST): ?[a-z.:0-9]{0,10}\r\n",
    );
    let fields = proptest::collection::vec(field(), 0..5);
    let chunk = ("[0-9a-zA-Z\r\n]{1,20}", "( ?;[a-z]{1,3}(=\"[ a-z]*\")?)?");
    let body = prop_oneof![
        Just((String::new(), String::new())),
        ("[ \t]?", ".{0,40}", "[ \t]{0,2}").prop_map(|(before, body, after)| (
            format!("Content-Length:{before}{}{after}\r\n", body.len()),
            body
        )),
        (proptest::collection::vec(chunk, 0..4), "(0|000)", "(Tr: ailer\r\n){0,2}", "(c|C)hunked ?")
            .prop_map(|(chunks, last, trailers, coding)| {
                let chunks = chunks.iter().map(|(c, ext)| format!("{:X}{ext}\r\n{c}\r\n", c.len()));
                let chunks = chunks.collect::<String>();
                (format!("transfer-encoding: {coding}\r\n"), format!("{chunks}{last}\r\n{trailers}\r\n"))
            }),
    ];
    (line, fields, body).prop_map(|((line, host), fields, (framing, body))| {
        let line = if framing.starts_with('t') { line.replace("/1.0\r", "/1.1\r") } else { line };
        format!("{line}{}{host}{framing}\r\n{body}", fields.concat()).into_bytes()
    })
}

fn cut_at<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    cuts.extend([0, stream.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
}

/// Method, target, HTTP/1.1, fields, and what comes behind the head.
type Head = (Vec<u8>, Vec<u8>, bool, Vec<(Vec<u8>, Vec<u8>)>, Vec<u8>);

fn as_scanned(request: &[u8], head: Scanned) -> Head {
    let text = bytes::Bytes::copy_from_slice(&request[head.before..]);
    let (method, target) = (text[..head.method].to_vec(), text[head.target].to_vec());
    let fields = Fields::new(text.clone(), head.fields);
    let fields = fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    (method, target, head.http_1_1, fields, text[head.bytes..].to_vec())
}

/// What a field says, by the first of its name.
fn said<'a>(head: &'a Head, name: &str) -> Option<&'a [u8]> {
    let named = |(other, _): &&(Vec<u8>, Vec<u8>)| other.eq_ignore_ascii_case(name.as_bytes());
    head.3.iter().find(named).map(|(_, value)| &value[..])
}

fn as_parsed(request: &[u8]) -> Head {
    let mut space = [httparse::EMPTY_HEADER; FIELDS];
    let mut head = httparse::Request::new(&mut space);
    let bytes = head.parse(request).expect("a head").unwrap();
    let fields = head.headers.iter().map(|field| (field.name.into(), field.value.to_vec())).collect();
    let [method, path] = [head.method, head.path].map(|part| part.expect("a part").into());
    (method, path, head.version == Some(1), fields, request[bytes..].to_vec())
}

proptest! {
    #[test]
    fn valid_requests_are_never_refused_and_read_as_others_read_them(
        requests in proptest::collection::vec(request(), 1..6),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let stream = requests.concat();
        let mut scanner = Scanner::new(1000, FIELDS);
        for part in cut_at(&stream, &cuts) {
            prop_assert_eq!(scanner.feed(part), Ok(()), "{}", stream.escape_ascii());
        }
        prop_assert_eq!(scanner.heads(), requests.len() as u64);
        prop_assert_eq!(scanner.position(), Position::Between);
        for request in &requests {
            let (head, parsed) = (scanner.take().expect("each has a head"), as_parsed(request));
            let length = said(&parsed, "content-length").map(|length| str::from_utf8(length).unwrap().parse());
            prop_assert_eq!(head.length, length.map(|length| length.expect("a number")));
            prop_assert_eq!(head.chunked, said(&parsed, "transfer-encoding").is_some());
            prop_assert_eq!(as_scanned(request, head), parsed, "{}", request.escape_ascii());
        }
        prop_assert_eq!(scanner.take(), None);
    }

    #[test]
    fn any_stream_gets_one_verdict_however_it_is_cut(
        requests in proptest::collection::vec(request(), 1..4),
        changes in proptest::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b' ')], 0..3),
            0..4
        ),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut stream = requests.concat();
        for (at, byte, how) in changes {
            let at = at.index(stream.len());
            match how {
                0 => stream[at] = byte,
                1 => stream.insert(at, byte),
                _ => drop(stream.remove(at)),
            }
        }
        prop_assert_eq!(judge(cut_at(&stream, &cuts)), judge(stream.chunks(1)), "{}", stream.escape_ascii());
    }
}
