//! A request as whoever answers it gets it, in whichever version of HTTP it came.

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Uri, header};

use crate::fields::Fields;

/// A request.
#[derive(Debug)]
pub struct Request<B> {
    /// Its head. Boxed: it moves with the request.
    pub head: Box<Head>,
    /// Its body.
    pub body: B,
}

/// The head of a request.
#[derive(Debug)]
pub struct Head {
    /// Its method.
    pub method: Method,
    /// What it is about.
    pub target: Target,
    /// Its header fields.
    pub fields: Fields,
}

/// What a request is about, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Path and query.
    text: Bytes,
    /// Where the path ends.
    path: usize,
    /// Where it was sent to, if that was said here; as a rule the field `Host` says it.
    authority: Option<Authority>,
}

impl Target {
    /// From the target of a request line (RFC 9112, 3.2), which may be absolute, or an authority and without a path. `None`:
    /// it is no URI.
    pub fn parse(target: Bytes) -> Option<Self> {
        if target.first() == Some(&b'/') {
            return Some(Self::of(target, None));
        }
        Some(Self::from(&Uri::from_maybe_shared(target).ok()?))
    }

    fn of(text: Bytes, authority: Option<Authority>) -> Self {
        let path = memchr::memchr(b'?', &text).unwrap_or(text.len());
        Self { text, path, authority }
    }

    /// The path.
    pub fn path(&self) -> &str {
        str::from_utf8(&self.text[..self.path]).unwrap_or_default()
    }

    /// What stands behind the `?`.
    pub fn query(&self) -> Option<&str> {
        str::from_utf8(self.text.get(self.path + 1..)?).ok()
    }
}

impl From<&Uri> for Target {
    fn from(uri: &Uri) -> Self {
        let text = match uri.query() {
            Some(query) => format!("{}?{query}", uri.path()),
            None => uri.path().to_owned(),
        };
        Self::of(text.into(), uri.authority().cloned())
    }
}

impl<B> Request<B> {
    /// The same with another body.
    pub fn map<T>(self, change: impl FnOnce(B) -> T) -> Request<T> {
        Request { head: self.head, body: change(self.body) }
    }
}

impl<B> From<http::Request<B>> for Request<B> {
    fn from(request: http::Request<B>) -> Self {
        let (head, body) = request.into_parts();
        let (target, fields) = (Target::from(&head.uri), Fields::from(&head.headers));
        Self { head: Box::new(Head { method: head.method, target, fields }), body }
    }
}

impl<B> From<Request<B>> for http::Request<B> {
    fn from(Request { head, body }: Request<B>) -> Self {
        let mut request = Self::new(body);
        *request.method_mut() = head.method;
        let Target { text, authority, .. } = head.target;
        // Without a path it is about nothing.
        *request.uri_mut() = Uri::from_maybe_shared(text).unwrap_or(Uri::from_static("*"));
        let mut fields = HeaderMap::from(&head.fields);
        // It counts, whatever the field says (RFC 9112, 3.2.2; RFC 9113, 8.3.1).
        if let Some(host) = authority.and_then(|host| HeaderValue::from_str(host.as_str()).ok()) {
            fields.insert(header::HOST, host);
        }
        *request.headers_mut() = fields;
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(target: Target, fields: Fields) -> http::Request<()> {
        Request { head: Box::new(Head { method: Method::GET, target, fields }), body: () }.into()
    }

    #[test]
    fn targets_in_all_their_forms() {
        for (written, path, query, host) in [
            ("/", "/", None, None),
            ("/a/b?c=d?e", "/a/b", Some("c=d?e"), None),
            ("/a?", "/a", Some(""), None),
            ("//a", "//a", None, None),
            ("http://b", "/", None, Some("b")),
            ("http://b:8/c?d", "/c", Some("d"), Some("b:8")),
            ("http://b?d", "/", Some("d"), Some("b")),
            ("*", "*", None, None),
            ("b:80", "", None, Some("b:80")),
        ] {
            let target = Target::parse(Bytes::from(written)).unwrap();
            assert_eq!((target.path(), target.query()), (path, query), "{written}");
            let there = asked(target, Fields::default());
            let path = if path.is_empty() { "*" } else { path };
            assert_eq!((there.uri().path(), there.uri().query()), (path, query), "{written}");
            let said = there.headers().get("host").map(|host| host.to_str().unwrap());
            assert_eq!(said, host, "{written}");
        }
        for written in ["", "http://", "http:///a"] {
            assert_eq!(Target::parse(Bytes::from(written)), None, "{written}");
        }
    }

    #[test]
    fn a_request_is_the_same_on_both_sides() {
        let came = http::Request::get("http://b/c?d").header("x", "1").header("x", "2").body(()).unwrap();
        let there = http::Request::from(Request::from(came));
        assert_eq!((there.method(), there.uri()), (&Method::GET, &Uri::from_static("/c?d")));
        assert!(there.headers().get_all("x").iter().eq(["1", "2"]));
        assert_eq!(there.headers()["host"], "b");
        let target = Target::parse(Bytes::from("http://b/")).unwrap();
        let own = asked(target, Fields::from_iter([("Host", "a")]));
        assert!(own.headers().get_all("host").iter().eq(["b"]), "what the target says counts");
    }
}
