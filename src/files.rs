//! How many files the process may have open: every socket is one.

/// No program needs more, and a larger limit makes what is started from here slow where it closes all it might have.
const LARGEST: u64 = 1 << 20;

/// What an unlimited hard limit stands for: macOS takes no more than its `OPEN_MAX`.
const UNLIMITED: u64 = 10_240;

/// Raises the soft limit to the hard one, as the Go runtime does too, and returns what is in force. A refusal leaves it as it
/// was.
#[cfg(unix)]
pub fn raise() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(UNLIMITED).min(LARGEST);
    if current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum,
        };
        // Cannot fail for a process that asks for no more than it may have; if it does, less is what there is.
        let _ = setrlimit(Resource::Nofile, raised);
    }
    limit()
}

/// Returns the limit in force.
#[cfg(unix)]
#[must_use]
pub fn limit() -> u64 {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.unwrap_or(LARGEST)
}

/// Returns the limit in force; sockets are not counted as files here.
#[cfg(not(unix))]
pub fn raise() -> u64 {
    limit()
}

/// Returns the limit in force; sockets are not counted as files here.
#[cfg(not(unix))]
#[must_use]
pub fn limit() -> u64 {
    LARGEST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_and_never_lowered() {
        let before = limit();
        let raised = raise();
        assert!(raised >= before && raised == limit(), "{before}, then {raised}");
    }
}
