//! Puts the many failures of an API call into the few kinds that a user can act on.

use std::error::Error as _;
use std::io;

use kube::client::AuthError;

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
        _ if auth_cause(error).is_some() => Kind::Unauthorized,
        _ => Kind::Unavailable,
    }
}

/// Words a failed call for the user, in one line.
pub(super) fn message(error: &kube::Error) -> String {
    let text = match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("the API server answered {} {}", status.code, status.reason),
        _ => match (auth_cause(error), io_cause(error)) {
            (Some(cause), _) => auth_message(cause),
            (None, Some(cause)) => io_message(cause),
            (None, None) => innermost(error),
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

/// Finds the failure of getting credentials: kube has its own variant for it while the client is built, and hides it among
/// the failures of the service later on.
pub(super) fn auth_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a AuthError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(auth) = error.downcast_ref() {
            return Some(auth);
        }
        next = error.source();
    }
    None
}

/// Words a failure of getting credentials. What a plugin printed stays out: a token may be among it, and its command line
/// may hold secrets as arguments or variables.
fn auth_message(error: &AuthError) -> String {
    match error {
        AuthError::AuthExecRun { cmd, out } => {
            format!("the credential plugin {} ended with {}", program(cmd), out.status)
        }
        AuthError::AuthExecParse(_) | AuthError::ParseTokenKey(_) => {
            "the credential plugin printed no credentials that can be read".into()
        }
        _ => error.to_string(),
    }
}

/// Finds the program in kube's text of a command: that of `std::process::Command`, variables and quoted words (`A="b" "program"
/// "argument"`), or plain words.
fn program(command: &str) -> &str {
    let mut rest = command.trim_start();
    loop {
        let (mut quoted, mut escaped) = (false, false);
        let end = rest.find(|c: char| {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => quoted = !quoted,
                _ => return c.is_whitespace() && !quoted,
            }
            false
        });
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        if let Some(inner) = word.strip_prefix('"') {
            return inner.strip_suffix('"').unwrap_or(inner);
        }
        if !word.contains("=\"") || after.is_empty() {
            return word;
        }
        rest = after.trim_start();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_failing_plugin_is_told_without_what_it_printed_and_was_given() {
        let mut command = std::process::Command::new("/bin/sh");
        command.args([
            "-c",
            "echo printed-token; echo printed-password >&2; exit 3",
            "argument-secret",
        ]);
        command.env("API_KEY", "variable-secret \"quoted\"");
        let out = Box::new(command.output().unwrap());
        let cmd = format!("{command:?}");
        let failures = [
            kube::Error::Auth(AuthError::AuthExecRun {
                cmd: cmd.clone(),
                out: out.clone(),
            }),
            kube::Error::Service(Box::new(AuthError::AuthExecRun { cmd, out })),
        ];
        for failure in failures {
            let told = message(&failure);
            assert_eq!(
                told, "the credential plugin /bin/sh ended with exit status: 3",
                "from {failure}"
            );
            assert_eq!(kind(&failure), Kind::Unauthorized);
        }
    }

    #[test]
    fn the_program_is_found_in_every_form_of_a_command() {
        for (command, found) in [
            (r#""aws" "eks" "get-token""#, "aws"),
            (
                r#"A="b c" D="\"x\" y" "/opt/my plugin" "-t" "E=\"f\"""#,
                "/opt/my plugin",
            ),
            ("gcloud config config-helper", "gcloud"),
            ("", ""),
        ] {
            assert_eq!(program(command), found, "{command}");
        }
    }
}
