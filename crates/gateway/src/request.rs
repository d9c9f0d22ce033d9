//! A request as whoever answers it gets it, in whichever version of HTTP it came.

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};

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

/// Path and query of a request, as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    text: Bytes,
    /// Where the path ends.
    path: usize,
}

impl Target {
    /// From the target of a request line (RFC 9112, 3.2): an absolute one is about its path, and one that is an authority
    /// has none. `None`: it is no URI.
    pub fn parse(target: Bytes) -> Option<Self> {
        if target.first() == Some(&b'/') {
            return Some(Self::of(target));
        }
        Some(Self::from(&Uri::from_maybe_shared(target).ok()?))
    }

    fn of(text: Bytes) -> Self {
        let path = memchr::memchr(b'?', &text).unwrap_or(text.len());
        Self { text, path }
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
        let text = uri.path_and_query().map_or("", |all| all.as_str());
        Self::of(Bytes::copy_from_slice(text.as_bytes()))
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
        // A path that begins with a slash is a URI to everybody; anything else is about nothing here.
        *request.uri_mut() = Uri::from_maybe_shared(head.target.text).unwrap_or_default();
        *request.headers_mut() = HeaderMap::from(&head.fields);
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_in_all_their_forms() {
        for (written, path, query) in [
            ("/", "/", None),
            ("/a/b?c=d?e", "/a/b", Some("c=d?e")),
            ("/a?", "/a", Some("")),
            ("//a", "//a", None),
            ("http://b", "/", None),
            ("http://b/c?d", "/c", Some("d")),
            ("*", "*", None),
            ("b:80", "", None),
        ] {
            let target = Target::parse(Bytes::from(written)).unwrap();
            assert_eq!((target.path(), target.query()), (path, query), "{written}");
            let head = Head { method: Method::GET, target, fields: Fields::default() };
            let request = Request { head: Box::new(head), body: () };
            let there = http::Request::from(request);
            if path.starts_with('/') && !path.starts_with("//") {
                assert_eq!((there.uri().path(), there.uri().query()), (path, query), "{written}");
            }
        }
        for written in ["", "http://", "http:///a"] {
            assert_eq!(Target::parse(Bytes::from(written)), None, "{written}");
        }
    }
}
