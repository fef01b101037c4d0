//! Puts the many failures of an API call into the few kinds that a user can act on.

use std::error::Error as _;
use std::io;

use crate::registry::{LookupError, LookupErrorKind};
use crate::transport::io_cause;

/// What an API call's failure means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// 401: the credentials are missing, wrong or expired.
    Unauthorized,
    /// 403: RBAC refuses.
    Forbidden,
    /// 404: there is no such object (or, for an upgrade, no such pod on the node).
    NotFound,
    /// Anything else: the server or the way to it is in trouble.
    Unavailable,
}

/// Tells the kind of a failed call.
pub(super) fn kind(error: &kube::Error) -> Kind {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => Kind::Unauthorized,
            403 => Kind::Forbidden,
            404 => Kind::NotFound,
            _ => Kind::Unavailable,
        },
        kube::Error::Auth(_) => Kind::Unauthorized,
        _ => Kind::Unavailable,
    }
}

/// Words a failed call for the user, in one line.
pub(super) fn message(error: &kube::Error) -> String {
    let text = match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("the API server answered {} {}", status.code, status.reason),
        _ => match io_cause(error) {
            Some(cause) => io_message(cause),
            None => innermost(error),
        },
    };
    one_line(&text)
}

/// Turns a failed call about a Service into the registry's error.
pub(super) fn lookup_error(error: &kube::Error) -> LookupError {
    let kind = match kind(error) {
        Kind::Unauthorized => LookupErrorKind::Unauthorized,
        Kind::Forbidden => LookupErrorKind::Forbidden,
        Kind::NotFound => LookupErrorKind::NotFound,
        Kind::Unavailable => LookupErrorKind::Unavailable,
    };
    LookupError {
        kind,
        message: message(error),
    }
}

/// A TLS failure hides as an `InvalidData` whose text is the only useful part; others say more by their kind.
fn io_message(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset => "connection reset".into(),
        io::ErrorKind::TimedOut => "connection timed out".into(),
        _ => error.to_string(),
    }
}

fn innermost(error: &kube::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    // The top text repeats its sources; the innermost alone is short, but may be empty of context.
    if error.source().is_none() {
        error.to_string()
    } else {
        last.to_string()
    }
}

/// Joins the lines of a message: a log line and an error on the terminal are one line each.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
