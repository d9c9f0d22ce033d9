//! The header fields of a message, in their order, as they were written. Bytes and places, never a map: a message has few
//! fields and each is looked for once or twice.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};

/// Room for the places of as many fields as most callers send.
const FIELDS: usize = 16;

/// Header fields. Names keep their case and are compared without regard to it.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    text: Bytes,
    places: Vec<Place>,
}

/// Where in a text a field stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    name: Range<u16>,
    value: Range<u16>,
}

impl Place {
    /// Of a name and a value in a head, which is at most 32 KiB on every side. What lay beyond 64 KiB would be empty.
    pub fn new(name: Range<usize>, value: Range<usize>) -> Self {
        let narrow = |at| u16::try_from(at).unwrap_or(u16::MAX);
        let narrow = |range: Range<usize>| narrow(range.start)..narrow(range.end);
        Self { name: narrow(name), value: narrow(value) }
    }
}

/// Adds a place to a list that gets room for most callers' fields with the first.
pub fn add(places: &mut Vec<Place>, place: Place) {
    if places.is_empty() {
        places.reserve(FIELDS);
    }
    places.push(place);
}

impl Fields {
    /// Those that stand in these places of a text; white space around a value is not part of it (RFC 9110, 5.5).
    pub fn new(text: Bytes, places: Vec<Place>) -> Self {
        Self { text, places }
    }

    fn part(&self, range: &Range<u16>) -> &[u8] {
        self.text.get(usize::from(range.start)..usize::from(range.end)).unwrap_or_default()
    }

    fn value(&self, place: &Place) -> &[u8] {
        self.part(&place.value).trim_ascii()
    }

    /// The value of the first field of this name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.get_all(name).next()
    }

    /// The values of all fields of this name.
    pub fn get_all(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let named = move |place: &&Place| self.part(&place.name).eq_ignore_ascii_case(name.as_bytes());
        self.places.iter().filter(named).map(|place| self.value(place))
    }

    /// The value of the first field of this name, to be kept.
    pub fn owned(&self, name: &str) -> Option<Bytes> {
        self.get(name).map(|value| self.text.slice_ref(value))
    }

    /// Names, as they are written, and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.places.iter().map(|place| (self.part(&place.name), self.value(place)))
    }
}

impl<N: AsRef<[u8]>, V: AsRef<[u8]>> FromIterator<(N, V)> for Fields {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(all: I) -> Self {
        let (mut text, mut places) = (BytesMut::new(), Vec::new());
        let mut write = |part: &[u8]| {
            let start = text.len();
            text.extend_from_slice(part);
            start..text.len()
        };
        for (name, value) in all {
            add(&mut places, Place::new(write(name.as_ref()), write(value.as_ref())));
        }
        Self { text: text.freeze(), places }
    }
}

impl From<&HeaderMap> for Fields {
    fn from(map: &HeaderMap) -> Self {
        map.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect()
    }
}

impl From<&Fields> for HeaderMap {
    /// Without what no map can hold, which no parser lets pass.
    fn from(fields: &Fields) -> Self {
        let mut map = HeaderMap::with_capacity(fields.places.len());
        for (name, value) in fields.iter() {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                map.append(name, value);
            }
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_any_case_and_keep_their_order() {
        let text = Bytes::from_static(b"Ab: \t1 2 \r\naB:3\r\nC:\r\n");
        let places = vec![Place::new(0..2, 3..9), Place::new(11..13, 14..15), Place::new(17..18, 19..19)];
        let fields = Fields::new(text, places);
        assert_eq!(fields.get("ab"), Some(&b"1 2"[..]));
        assert_eq!(fields.owned("ab"), Some(Bytes::from_static(b"1 2")));
        assert!(fields.get_all("AB").eq([&b"1 2"[..], b"3"]));
        assert_eq!(fields.get("c"), Some(&b""[..]));
        assert_eq!(fields.get("a"), None);
        let all: Vec<(&[u8], &[u8])> = fields.iter().collect();
        assert_eq!(all, [(&b"Ab"[..], &b"1 2"[..]), (b"aB", b"3"), (b"C", b"")]);
        let map = HeaderMap::from(&fields);
        assert_eq!(map.get_all("ab").iter().collect::<Vec<_>>(), ["1 2", "3"]);
        let again = Fields::from(&map);
        assert!(again.get_all("ab").eq(fields.get_all("ab")) && again.get("c") == Some(b""));
    }

    #[test]
    fn a_place_outside_of_the_text_is_empty() {
        let fields = Fields::new(Bytes::from_static(b"a: b"), vec![Place::new(0..1, 3..99)]);
        assert_eq!(fields.get("a"), Some(&b""[..]));
        let text = Bytes::from([&b"a:"[..], &vec![b'x'; 70_000], b"b:y"].concat());
        let places = vec![Place::new(0..1, 2..70_002), Place::new(70_002..70_003, 70_004..70_005)];
        let fields = Fields::new(text, places);
        assert_eq!(fields.get("a").map(<[u8]>::len), Some(65_533), "what can be said of it");
        assert_eq!((fields.get("b"), fields.get("")), (None, Some(&b""[..])));
    }
}
