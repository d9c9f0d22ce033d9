use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn split(chunks: &[&[u8]]) -> Vec<Event> {
    let mut splitter = Splitter::new();
    let mut events = Vec::new();
    for chunk in chunks {
        events.extend(splitter.push(Bytes::copy_from_slice(chunk)));
    }
    events.extend(splitter.finish());
    events
}

fn raws(events: &[Event]) -> Vec<&[u8]> {
    events.iter().map(|event| &event.raw[..]).collect()
}

fn only(stream: &str) -> Event {
    let events = split(&[stream.as_bytes()]);
    assert_eq!(events.len(), 1, "{events:?}");
    events[0].clone()
}

#[test]
fn every_line_end_ends_events() {
    let cases: [(&str, &[&str]); 9] = [
        ("data: a\n\ndata: b\n\n", &["data: a\n\n", "data: b\n\n"]),
        ("data: a\r\n\r\ndata: b\r\n\r\n", &["data: a\r\n\r\n", "data: b\r\n\r\n"]),
        ("data: a\r\rdata: b\r\r", &["data: a\r\r", "data: b\r\r"]),
        ("data: a\r\n\ndata: b\n\r\n", &["data: a\r\n\n", "data: b\n\r\n"]),
        ("data: a\n\rdata: b\n\n", &["data: a\n\r", "data: b\n\n"]),
        ("data: a\r\r\ndata: b\n\n", &["data: a\r\r\n", "data: b\n\n"]),
        ("\n\ndata: a\n\n", &["\n", "\n", "data: a\n\n"]),
        (": ping\n\ndata: a\n\n", &[": ping\n\n", "data: a\n\n"]),
        ("data: a\n\ndata: [DONE]", &["data: a\n\n", "data: [DONE]"]),
    ];
    for (stream, want) in cases {
        let events = split(&[stream.as_bytes()]);
        assert_eq!(raws(&events), want.iter().map(|raw| raw.as_bytes()).collect::<Vec<_>>(), "{stream:?}");
        let bytes: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
        assert_eq!(split(&bytes), events, "{stream:?} byte by byte");
    }
}

#[test]
fn fields_are_read_as_the_standard_says() {
    let data = |stream: &str| only(stream).data().map(|data| String::from_utf8(data.into_owned()).unwrap());
    assert_eq!(data("data: {}\n\n").as_deref(), Some("{}"));
    assert_eq!(data("data:{}\n\n").as_deref(), Some("{}"));
    assert_eq!(data("data:  two\n\n").as_deref(), Some(" two"));
    assert_eq!(data("data: a\r\ndata: b\r\n\r\n").as_deref(), Some("a\nb"));
    assert_eq!(data("data: a\rdata\rdata:\r\r").as_deref(), Some("a\n\n"));
    assert_eq!(data("event: x\ndata: a\nid: 3\n\n").as_deref(), Some("a"));
    assert_eq!(data("database: a\n\n"), None);
    assert_eq!(data(" data: a\n\n"), None);
    assert_eq!(data(": data\n\n"), None);
    assert_eq!(data("\u{feff}data: a\n\n").as_deref(), Some("a"));
    assert_eq!(split(&["data: a\n\n\u{feff}data: b\n\n".as_bytes()])[1].data(), None);

    assert_eq!(only("event: error\ndata: a\n\n").name(), Some("error"));
    assert_eq!(only("event: a\nevent: b\n\n").name(), Some("b"));
    assert_eq!(only("event:\ndata: a\n\n").name(), None);
    assert_eq!(only("data: event: a\n\n").name(), None);

    assert!(only(": ping\n\n").is_comment());
    assert!(only(":\r\n: b\r\n\r\n").is_comment());
    assert!(!only("\n").is_comment());
    assert!(!only(": ping\ndata: a\n\n").is_comment());
}

#[test]
fn events_inside_a_chunk_are_slices_of_it_and_one_data_line_is_borrowed() {
    let chunk = Bytes::from_static(b"data: a\n\ndata: b\n\n");
    let mut splitter = Splitter::new();
    for event in splitter.push(chunk.clone()) {
        assert!(chunk.as_ptr_range().contains(&event.raw.as_ptr()));
        assert!(matches!(event.data(), Some(Cow::Borrowed(_))));
    }
}

#[test]
fn an_event_is_given_as_soon_as_it_is_complete() {
    let mut splitter = Splitter::new();
    assert_eq!(splitter.push(Bytes::from_static(b"data: a\n")).count(), 0);
    assert!(splitter.mid_event());
    assert_eq!(splitter.push(Bytes::from_static(b"\n")).count(), 1);
    assert!(!splitter.mid_event());
    assert_eq!(splitter.push(Bytes::from_static(b"data: a\r\n\r")).count(), 0);
    assert!(!splitter.mid_event(), "complete but for an LF");
    assert_eq!(splitter.push(Bytes::from_static(b"\nda")).count(), 1);
    assert!(splitter.mid_event());
}

#[test]
fn events_not_taken_come_with_the_next_push() {
    let mut splitter = Splitter::new();
    let _ = splitter.push(Bytes::from_static(b"data: a\n\ndata: b"));
    let events: Vec<Event> = splitter.push(Bytes::from_static(b"\n\n")).collect();
    assert_eq!(raws(&events), [&b"data: a\n\n"[..], b"data: b\n\n"]);
}

#[test]
fn an_endless_event_is_passed_on_in_pieces_and_the_next_one_read() {
    for end in ["\n\n", "\r\n\r\n", "\r\r"] {
        let mut stream = b"data: small\n\ndata: ".to_vec();
        stream.resize(stream.len() + 3 * EVENT_BYTES_MAX, b'x');
        stream.extend_from_slice(end.as_bytes());
        stream.extend_from_slice(b"data: after\n\n");
        for size in [1000, 1 << 16, EVENT_BYTES_MAX, EVENT_BYTES_MAX + 1, stream.len()] {
            let mut splitter = Splitter::new();
            let mut joined = Vec::new();
            let mut data = Vec::new();
            for chunk in stream.chunks(size) {
                for event in splitter.push(Bytes::copy_from_slice(chunk)) {
                    assert!(!event.raw.is_empty());
                    joined.extend_from_slice(&event.raw);
                    data.extend(event.data().map(Cow::into_owned));
                    assert!(event.is_oversize() || event.raw.len() < 100);
                }
                assert!(splitter.held.len() <= EVENT_BYTES_MAX);
            }
            assert_eq!(splitter.finish(), None);
            assert!(joined == stream, "chunks of {size}");
            assert_eq!(data, [&b"small"[..], b"after"], "chunks of {size}");
        }
    }
}

/// Pieces that make line ends, fields and multi-byte characters meet in every way.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop::sample::select(vec![
        "\n", "\r", "\r\n", "\n\n", "\r\n\r\n", "data: ", "data", ":", " ", "event: x", "\u{feff}", "€", "x",
        "[DONE]",
    ]);
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat().into_bytes())
}

/// What the standard's own words give: lines first, then events.
fn data_by_the_book(stream: &[u8]) -> Vec<Vec<u8>> {
    let text = String::from_utf8_lossy(stream);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n").replace('\r', "\n");
    let (mut all, mut data) = (Vec::new(), Vec::<&str>::new());
    for line in text.split('\n').chain([""]) {
        if line.is_empty() {
            if !data.is_empty() {
                all.push(std::mem::take(&mut data).join("\n").into_bytes());
            }
        } else {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            if field == "data" {
                data.push(value.strip_prefix(' ').unwrap_or(value));
            }
        }
    }
    all
}

proptest! {
    #[test]
    fn chunking_changes_nothing(stream in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let whole = split(&[&stream]);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
        let pieces = split(&chunks);
        prop_assert_eq!(&pieces, &whole);
        prop_assert_eq!(raws(&pieces).concat(), stream.clone());
        let data: Vec<Vec<u8>> = whole.iter().filter_map(|event| Some(event.data()?.into_owned())).collect();
        prop_assert_eq!(data, data_by_the_book(&stream));
    }

    #[test]
    fn any_bytes_come_out_as_they_went_in(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
        let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        let events = split(&chunks);
        prop_assert_eq!(raws(&events).concat(), chunks.concat());
        for event in &events {
            let _ = (event.data(), event.name(), event.is_comment());
        }
    }
}
