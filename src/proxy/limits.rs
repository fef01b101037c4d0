//! How much the proxy takes on at the same time, and how much of a single thing.

use std::time::Duration;

/// Files beside connections: the listening sockets, the state, the API server.
const OTHER_FILES: u64 = 64;

/// More connections than this are no default: at the memory of `docs/limits.md` that is a gigabyte or two.
const MOST: u64 = 65_536;

/// Settings of the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Clients' connections in all; nothing derives it from the limit of open files.
    pub connections: Option<usize>,
    /// Connections of one client address; nothing lets this machine's have them all, and others a quarter.
    pub connections_per_client: Option<usize>,
    /// HTTP/1.1 connections to one port of one pod.
    pub connections_per_pod: usize,
    /// Bytes of a request's header fields, all together.
    pub header_bytes: u32,
    /// Header fields of a request.
    pub header_fields: usize,
    /// Bytes of a pod's response's header fields, all together; 8 KiB at least.
    pub response_header_bytes: u32,
    /// Header fields of a pod's response.
    pub response_header_fields: usize,
    /// Bytes kept of a request's body, so that it can be sent again.
    pub replay_bytes: usize,
    /// How long a client may go on sending when its answer is there.
    pub linger: Duration,
    /// Requests at the same time on one HTTP/2 connection.
    pub streams: u32,
}

impl Limits {
    /// Returns how many connections clients may have in all, where `files` may be open. By default they get three quarters,
    /// and connections to pods, which every request needs but not every client, have the rest.
    pub(super) fn connections(&self, files: u64) -> usize {
        self.connections.unwrap_or_else(|| {
            let derived = files.saturating_sub(OTHER_FILES) / 4 * 3;
            usize::try_from(derived.clamp(16, MOST)).expect("a small number")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_leaves_files_for_pods_and_is_bounded() {
        let limits = |connections| Limits {
            connections,
            connections_per_client: None,
            connections_per_pod: 1,
            header_bytes: 1,
            header_fields: 1,
            response_header_bytes: 1,
            response_header_fields: 1,
            replay_bytes: 1,
            linger: Duration::ZERO,
            streams: 1,
        };
        for (files, connections) in [(20_064, 15_000), (1 << 20, 65_536), (10, 16)] {
            assert_eq!(limits(None).connections(files), connections);
        }
        assert_eq!(limits(Some(7)).connections(20_000), 7);
    }
}
