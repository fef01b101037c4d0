//! What a pod's ports were lately seen to do. It decides whether bytes may travel with the opening of a connection, and
//! whether connections may share a session.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long it counts whether a port took a connection. A container that restarts refuses for about a second, and is seen
/// doing so.
const VALID: Duration = Duration::from_secs(30);

/// How many connections must have been seen before more of their kind are expected.
const ENOUGH: u32 = 4;

/// Of so many connections one may have been large where the next is expected to be small.
const RARE: u32 = 8;

/// What a port does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// The application has answered on one.
    Accepts,
    /// Nobody listens.
    Refuses,
}

/// What a connection has turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// It ended without ever having moved much in one go.
    Small,
    /// It moved much in one go: a client or an application that takes it slowly holds up what shares its session.
    Large,
}

/// The ports of one pod. Shared by its sessions.
#[derive(Debug, Default)]
pub(super) struct Ports(Mutex<HashMap<u16, Port>>);

#[derive(Debug, Default)]
struct Port {
    behaviour: Option<(Behaviour, Instant)>,
    /// The last sixteen connections, the latest in the lowest bit: whether they were large.
    large: u16,
    /// How many of them there have been.
    seen: u32,
}

impl Ports {
    /// Remembers what a port did.
    pub(super) fn note(&self, port: u16, behaviour: Behaviour, now: Instant) {
        self.lock().entry(port).or_default().behaviour = Some((behaviour, now));
    }

    /// Returns what a port lately did.
    pub(super) fn get(&self, port: u16, now: Instant) -> Option<Behaviour> {
        let (behaviour, at) = self.lock().get(&port)?.behaviour?;
        (now.duration_since(at) < VALID).then_some(behaviour)
    }

    /// Remembers what a connection to a port was.
    pub(super) fn note_size(&self, port: u16, size: Size) {
        let mut ports = self.lock();
        let port = ports.entry(port).or_default();
        port.large = port.large << 1 | u16::from(size == Size::Large);
        port.seen = (port.seen + 1).min(u16::BITS);
    }

    /// Tells whether the next connection to a port is expected to be small, so that it may share a session with others that
    /// are. It does not matter how long ago that was seen: an application rarely changes its ways, and one that does is
    /// noticed by its first large connections.
    pub(super) fn is_small(&self, port: u16) -> bool {
        self.lock()
            .get(&port)
            .is_some_and(|port| port.seen >= ENOUGH && port.large.count_ones() * RARE <= port.seen)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u16, Port>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sizes: &[Size]) -> bool {
        let ports = Ports::default();
        sizes.iter().for_each(|&size| ports.note_size(80, size));
        assert!(!ports.is_small(81), "another port is another application");
        ports.is_small(80)
    }

    #[test]
    fn small_connections_are_expected_once_enough_were_seen_and_few_were_large() {
        use Size::{Large, Small};
        assert!(!seen(&[]));
        assert!(!seen(&[Small; 3]));
        assert!(seen(&[Small; 4]));
        assert!(!seen(&[Small, Small, Small, Large]));
        assert!(seen(&[&[Large][..], &[Small; 7]].concat()));
        assert!(!seen(&[&[Large, Large][..], &[Small; 7]].concat()));
    }

    #[test]
    fn what_was_large_long_ago_is_forgotten() {
        let sizes = [&[Size::Large; 16][..], &[Size::Small; 16]].concat();
        assert!(seen(&sizes));
        assert!(!seen(&sizes[..29]));
    }
}
