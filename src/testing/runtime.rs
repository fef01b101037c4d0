//! Which container runtime the double's nodes run, as far as a port-forward shows it.

use std::time::Duration;

/// A container runtime: what ends SPDY sessions, dials the pod's ports and words the errors.
///
/// They differ in how the two streams of a forwarded connection end. FIN is an empty DATA frame with the FIN flag,
/// RST a RST_STREAM with status CANCEL:
///
/// | | application closed | port refused | application reset | sandbox unusable |
/// |---|---|---|---|---|
/// | `Containerd16`, `Containerd17` | FIN and FIN | data FIN, text, error FIN | below | data FIN, text, error FIN |
/// | `Containerd21` | FIN and FIN | data FIN, text, error RST | text, error RST, data FIN | data FIN, text, error RST |
/// | `Old` | FIN and FIN | text, error FIN, data FIN | the same | the same |
/// | `CriO` | FIN and FIN | text, data RST, error RST | the same | the same |
/// | `Kwok` | FIN and FIN | data FIN, text, error RST | the same | the same |
///
/// After a reset, 1.6 sends data FIN, text, error FIN; 1.7 data FIN and error RST without a text. The two FINs of a clean
/// close come in either order. Runtimes that reset the data stream after an error free the worker that holds its
/// undelivered DATA; `Containerd16`, `Containerd17` (but for a reset) and `Old` do not, so early data for a refused
/// port holds one of the session's workers for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContainerRuntime {
    /// containerd 1.6 as of 1.6.20: errors as text, no resets. The default, being what the project's own test cluster
    /// runs, and the harshest to clients.
    #[default]
    Containerd16,
    /// containerd 1.7: resets without a text where the application reset the connection.
    Containerd17,
    /// containerd 2.1 and later, and others with the streaming library of Kubernetes 1.32 and later.
    Containerd21,
    /// Runtimes with the streaming library of Kubernetes 1.31 and before.
    Old,
    /// cri-o: resets both streams after every error.
    CriO,
    /// kwok, the kubelet without containers: it waits for the end of both directions without a limit, so a connection the
    /// application closes stays open until the client closes too; sessions may idle for 1 h instead of 4 h.
    Kwok,
}

impl ContainerRuntime {
    /// How long a session may go without a frame in either direction.
    pub(super) fn idle_timeout(self) -> Duration {
        let hours = if self == Self::Kwok { 1 } else { 4 };
        Duration::from_secs(hours * 60 * 60)
    }

    /// Whether a forwarded connection ends only when both directions have, however long that takes.
    pub(super) fn waits_for_both_directions(self) -> bool {
        self == Self::Kwok
    }
}
