//! Exact paths → routes. A path that differs in any byte is another path, never another counter.

use http::Method;

use crate::call::Endpoint;
use crate::error::Error;

/// What a path and method mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// A call to a model.
    Call(Endpoint),
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/{id}`, the id with `%2F` decoded.
    Model(String),
    /// `GET /v1/limits`.
    Limits,
}

/// Older clients' path for chat completions; counted as the same.
const CHAT_ALIAS: &str = "/api/v1/chat";

/// Every route's name, and that of what is none of them, which is the last.
pub const NAMES: [&str; Endpoint::ALL.len() + 4] = {
    let mut names = [OTHER; Endpoint::ALL.len() + 4];
    let mut at = 0;
    while at < Endpoint::ALL.len() {
        names[at] = Endpoint::ALL[at].route();
        at += 1;
    }
    names[at] = "/v1/models";
    names[at + 1] = "/v1/models/{id}";
    names[at + 2] = "/v1/limits";
    names
};

/// The label of whatever is not ours: unknown paths, unknown models.
pub const OTHER: &str = "other";

/// Bytes of method and path quoted back in an error.
const QUOTED_BYTES_MAX: usize = 200;

impl Route {
    /// The canonical route: label of metrics, `endpoint` of limits.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Call(endpoint) => endpoint.route(),
            Self::Models => "/v1/models",
            Self::Model(_) => "/v1/models/{id}",
            Self::Limits => "/v1/limits",
        }
    }
}

/// Finds the route.
///
/// # Errors
/// 404 for a path that is not one of ours, 405 for another method than its own.
pub fn route(method: &Method, path: &str) -> Result<Route, Error> {
    let call = Endpoint::ALL.iter().find(|endpoint| endpoint.route() == path).copied();
    let call = call.or((path == CHAT_ALIAS).then_some(Endpoint::ChatCompletions));
    let (found, allow) = match call {
        Some(endpoint) => (Some(Route::Call(endpoint)), "POST"),
        None if path == "/v1/models" => (Some(Route::Models), "GET"),
        None if path == "/v1/limits" => (Some(Route::Limits), "GET"),
        None => (path.strip_prefix("/v1/models/").and_then(model_id).map(Route::Model), "GET"),
    };
    let shown = || quoted(&format!("{method} {path}"));
    match found {
        Some(route) if method.as_str() == allow => Ok(route),
        Some(_) => Err(Error::MethodNotSupported(shown(), allow)),
        None => Err(Error::UnknownUrl(shown())),
    }
}

fn quoted(text: &str) -> String {
    text[..text.floor_char_boundary(QUOTED_BYTES_MAX)].to_owned()
}

/// The id in a path: a slash in it is written `%2F`; nothing else may be escaped.
fn model_id(segment: &str) -> Option<String> {
    let id = segment.replace("%2F", "/").replace("%2f", "/");
    (!segment.is_empty() && !segment.contains('/') && !id.contains('%')).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_paths() {
        let chat = Route::Call(Endpoint::ChatCompletions);
        assert_eq!(route(&Method::POST, "/v1/chat/completions").unwrap(), chat);
        assert_eq!(route(&Method::POST, "/api/v1/chat").unwrap(), chat);
        assert_eq!(route(&Method::GET, "/v1/models").unwrap(), Route::Models);
        assert_eq!(route(&Method::GET, "/v1/limits").unwrap(), Route::Limits);
        assert_eq!(route(&Method::GET, "/v1/models/a%2Fb").unwrap(), Route::Model("a/b".into()));
        for path in [
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/v1/chat/completions/",
            "/v1/chat/completions.",
            "/V1/chat/completions",
            "/v1/chat/comp%6cetions",
            "/v1/./chat/completions",
            "/v1/models/",
            "/v1/models/a/b",
            "/v1/models/%61",
            "/v1/models/a%252Fb",
            "/",
            "",
            "*",
        ] {
            let refused = route(&Method::POST, path);
            assert!(matches!(refused, Err(Error::UnknownUrl(_))), "{path}: {refused:?}");
        }
        for (method, path) in [(Method::GET, "/v1/chat/completions"), (Method::POST, "/v1/models")] {
            assert!(matches!(route(&method, path), Err(Error::MethodNotSupported(..))));
        }
    }
}
