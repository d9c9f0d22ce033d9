use super::*;

/// As bodies have them.
const EXTENSION_BYTES_MAX: usize = 16 << 10;
const TRAILER_BYTES_MAX: usize = 16 << 10;

/// Status, body, whether the connection may be used again; else what came of the body, and what was wrong.
type Read = Result<(u16, Vec<u8>, bool), (Vec<u8>, &'static str)>;

/// What an answer is read as that comes in these pieces and then ends.
fn read(pieces: &[&[u8]]) -> Read {
    let mut received = BytesMut::new();
    let mut pieces = pieces.iter();
    let mut reader = HeadReader::default();
    let begun = loop {
        match reader.read(&mut received).map_err(|Malformed(why)| (Vec::new(), why))? {
            Some(begun) => break begun,
            None => match pieces.next() {
                Some(piece) => received.extend_from_slice(piece),
                None => return Err((Vec::new(), "no head")),
            },
        }
    };
    let Begun { head, mut body, reusable } = begun;
    let mut all = Vec::new();
    loop {
        match body.take(&mut received) {
            Err(Malformed(why)) => return Err((all, why)),
            Ok(data) if !data.is_empty() => all.extend_from_slice(&data),
            Ok(_) if body.is_ended() => {
                pieces.for_each(|piece| received.extend_from_slice(piece));
                return Ok((head.status.as_u16(), all, reusable && received.is_empty()));
            }
            Ok(_) => match pieces.next() {
                Some(piece) => received.extend_from_slice(piece),
                None if body == Body::UntilClosed => return Ok((head.status.as_u16(), all, false)),
                None => return Err((all, "cut")),
            },
        }
    }
}

/// The same, whole, byte by byte and cut in two anywhere.
fn read_any_way(answer: &[u8]) -> Read {
    let whole = read(&[answer]);
    let bytes: Vec<&[u8]> = answer.chunks(1).collect();
    assert_eq!(read(&bytes), whole, "byte by byte: {}", answer.escape_ascii());
    for cut in 0..answer.len() {
        let (first, second) = answer.split_at(cut);
        assert_eq!(read(&[first, second]), whole, "cut at {cut}: {}", answer.escape_ascii());
    }
    whole
}

fn ok(status: u16, body: &str, reusable: bool) -> Read {
    Ok((status, body.into(), reusable))
}

#[test]
fn bodies_end_where_the_standard_says() {
    for (answer, wanted) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", ok(200, "abc", true)),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\ncontent-length:3, 3\r\n\r\nabc", ok(200, "abc", true)),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcd", ok(200, "abc", false)),
        ("HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", ok(200, "", true)),
        ("HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 1\r\n\r\na", ok(200, "a", false)),
        ("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", ok(200, "a", false)),
        ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\na", ok(200, "a", true)),
        ("HTTP/1.1 200 OK\r\n\r\nabc", ok(200, "abc", false)),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\ncontent-length: 1\r\n\r\nabc",
            ok(200, "abc", false),
        ),
        ("HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\n", ok(204, "", true)),
        ("HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", ok(304, "", true)),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 404 No\r\ncontent-length: 1\r\n\r\na",
            ok(404, "a", true),
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3\r\nabc\r\n0a\r\n0123456789\r\n0\r\n\r\n",
            ok(200, "abc0123456789", true),
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            ok(200, "", true),
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n1;a=\"b\"\r\na\r\n0 \r\nx: y\r\nz: 1\r\n\r\n",
            ok(200, "a", false),
        ),
        ("HTTP/1.1 200 OK\ncontent-length: 1\n\na", ok(200, "a", true)),
    ] {
        assert_eq!(read_any_way(answer.as_bytes()), wanted, "{answer:?}");
        if let Ok((_, body, _)) = wanted
            && !answer.ends_with("abc")
        {
            // Cut short it is never taken for whole.
            for cut in 0..answer.len() {
                let cut = read(&[&answer.as_bytes()[..cut]]);
                assert!(!matches!(cut, Ok((_, cut, _)) if cut.len() < body.len()), "{answer:?}");
            }
        }
    }
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    for (head, body) in [
        ("content-length: 1\r\ncontent-length: 2\r\n", "ab"),
        ("content-length: 1, 2\r\n", "ab"),
        ("content-length: +1\r\n", "a"),
        ("content-length: -1\r\n", "a"),
        ("content-length: 0x1\r\n", "a"),
        ("content-length: 1,\r\n", "a"),
        ("content-length:\r\n", "a"),
        ("content-length: 18446744073709551616\r\n", "a"),
        ("content-length : 1\r\n", "a"),
        ("a: b\r\n c: d\r\n", "a"),
        ("a\r\n", "a"),
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\n{head}\r\n{body}");
        assert!(read_any_way(answer.as_bytes()).is_err(), "{answer:?}");
    }
    for answer in [
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/2 200 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ] {
        assert!(read_any_way(answer.as_bytes()).is_err(), "{answer:?}");
    }
}

#[test]
fn chunks_that_are_none_break_the_answer_behind_what_came_before() {
    for (chunks, came) in [
        ("\r\n", ""),
        ("x\r\n", ""),
        ("-1\r\na", ""),
        (" 1\r\na\r\n", ""),
        ("1\na\n", ""),
        ("1;a\nb\r\n", ""),
        ("10000000000000000\r\n", ""),
        ("1\r\nab", "a"),
        ("1\r\na\n0\r\n\r\n", "a"),
        ("1\r\na\r\r", "a"),
        ("2\r\nab\r\nz", "ab"),
        ("1\r\na\r\n0\r\nx\n\r\n", "a"),
        ("1\r\na\r\n0\r\nx\r\r", "a"),
        ("1\r\na\r\n0\r\n\ra", "a"),
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
        let wanted = Err((came.into(), "chunks that are none"));
        assert_eq!(read_any_way(answer.as_bytes()), wanted, "{chunks:?}");
    }
}

#[test]
fn what_never_ends_is_bounded() {
    let long = |part: &str, times: usize| part.repeat(times).into_bytes();
    let refused = |pieces: &[&[u8]]| match read(pieces) {
        Err((_, why)) => why != "cut" && why != "no head",
        Ok(_) => false,
    };
    assert!(refused(&[b"HTTP/1.1 200 OK\r\n", &long("a: b\r\n", 101), b"\r\n"]));
    assert!(refused(&[b"HTTP/1.1 200 OK\r\na: ", &long("b", HEAD_BYTES_MAX)]));
    assert!(refused(&[b"HTTP/1.1 200 OK\r\na: ", &long("b", HEAD_BYTES_MAX), b"\r\n\r\n"]));
    assert!(refused(&[&long("HTTP/1.1 100 Continue\r\n\r\n", INTERIM_MAX.into())]));
    let chunked: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    assert!(refused(&[chunked, b"1;", &long("x", EXTENSION_BYTES_MAX)]));
    assert!(refused(&[chunked, &long("1;x\r\na\r\n", EXTENSION_BYTES_MAX)]));
    assert!(refused(&[chunked, b"0\r\n", &long("x: y\r\n", TRAILER_BYTES_MAX / 4 + 1)]));
    let fields = "a: b\r\n".repeat(100);
    assert!(read(&[format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes()]).is_ok());
}

#[test]
fn fields_are_found_in_any_case_and_kept_as_written() {
    let mut received = BytesMut::from(
        "HTTP/1.1 200 OK\r\nContent-TYPE:  a/b \r\nX: 1\r\nx:\r\ncontent-length: 0\r\n\r\nrest",
    );
    let begun = HeadReader::default().read(&mut received).unwrap().unwrap();
    assert_eq!(&received[..], b"rest");
    let fields = begun.head.fields;
    assert_eq!(fields.get("content-type"), Some(&b"a/b"[..]));
    assert_eq!(fields.get("x"), Some(&b"1"[..]), "the first");
    assert_eq!(fields.get("y"), None);
    let all: Vec<(&[u8], &[u8])> = fields.iter().collect();
    assert_eq!(all[0], (&b"Content-TYPE"[..], &b"a/b"[..]));
    assert_eq!(all[2], (&b"x"[..], &b""[..]));
}
