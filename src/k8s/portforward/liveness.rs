//! How long a server may be silent before a port-forward counts as dead, and what silence proves nothing.

use std::time::Duration;

/// A sign of life is asked for after this silence, sooner while something is under way.
pub(super) const QUIET: Duration = Duration::from_secs(5);
pub(super) const ACTIVE: Duration = Duration::from_millis(1750);

/// How long after payload has moved, either way, something counts as under way.
pub(super) const LIVELY: Duration = Duration::from_secs(6);

/// How long the answer may take: together at most 15 s, and less than 6 s while something is under way.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
pub(super) const ACTIVE_ANSWER: Duration = Duration::from_secs(4);

/// A timer that comes later than this was held up by more than a busy machine: the machine slept.
pub(super) const JUMP: Duration = Duration::from_secs(2);

/// Payload that the socket of every application takes, whether or not the application reads. Beyond it the application may be
/// what keeps the server from answering.
pub(super) const SWALLOWED: usize = 64 << 10;

/// How long an end of ours that would cut off an answer is held back while the pod is silent.
pub(super) const LINGER: Duration = Duration::from_secs(30);

/// Why what no sign of life has come from ends.
pub(super) const SILENT: &str = "the server does not answer any more";
