//! Why a request cannot be understood.

use std::fmt;

use super::{DEPTH_MAX, MODEL_BYTES_MAX};

/// A body that is refused. Its text is what the client is told; the status is always 400.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallError {
    /// Not JSON; where and why.
    NotJson(String),
    /// JSON, but not an object.
    NotAnObject,
    /// Nested deeper than [`DEPTH_MAX`].
    TooDeep,
    /// Not a form that can be read; why.
    NotAForm(&'static str),
    /// This parameter occurs twice.
    Duplicate(&'static str),
    /// This parameter is written in letters of another case.
    OtherCase(&'static str),
    /// No `model`.
    MissingModel,
    /// `model` is empty.
    EmptyModel,
    /// `model` has this many bytes.
    LongModel(usize),
    /// A parameter has a value of the wrong type.
    WrongType {
        /// Which.
        param: &'static str,
        /// What it should be, with its article.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
}

impl CallError {
    /// The parameter at fault, for `error.param`.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            CallError::NotJson(_) | CallError::NotAnObject | CallError::TooDeep | CallError::NotAForm(_) => {
                None
            }
            CallError::Duplicate(param)
            | CallError::OtherCase(param)
            | CallError::WrongType { param, .. } => Some(param),
            CallError::MissingModel | CallError::EmptyModel | CallError::LongModel(_) => Some("model"),
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::NotJson(why) => write!(f, "We could not parse the JSON body of your request: {why}."),
            CallError::NotAnObject => {
                write!(f, "We could not parse the JSON body of your request: it must be a JSON object.")
            }
            CallError::TooDeep => write!(
                f,
                "We could not parse the JSON body of your request: it is nested too deep; at most {DEPTH_MAX} arrays and \
                 objects may contain each other."
            ),
            CallError::NotAForm(why) => write!(f, "We could not parse the form of your request: {why}."),
            CallError::Duplicate(param) => {
                write!(f, "Duplicate parameter: '{param}' may be given only once.")
            }
            CallError::OtherCase(name) => {
                write!(f, "The parameter `{name}` is written in letters of another case. Write `{name}`.")
            }
            CallError::MissingModel => write!(f, "Missing required parameter: 'model'."),
            CallError::EmptyModel => {
                write!(f, "Invalid value for 'model': expected the name of a model, but got an empty string.")
            }
            CallError::LongModel(length) => write!(
                f,
                "Invalid value for 'model': expected at most {MODEL_BYTES_MAX} bytes, but got {length} bytes."
            ),
            CallError::WrongType { param, expected, found } => {
                write!(f, "Invalid type for '{param}': expected {expected}, but got {found} instead.")
            }
        }
    }
}

impl std::error::Error for CallError {}
