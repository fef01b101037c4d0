//! What a pod's ports were lately seen to do. It decides whether bytes may travel with the opening of a connection.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long what was seen counts. A container that restarts refuses for about a second, and is seen doing so.
const VALID: Duration = Duration::from_secs(30);

/// What a port does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// The application has answered on one.
    Accepts,
    /// Nobody listens.
    Refuses,
}

/// The ports of one pod. Shared by its sessions.
#[derive(Debug, Default)]
pub(super) struct Ports(Mutex<HashMap<u16, (Behaviour, Instant)>>);

impl Ports {
    /// Remembers what a port did.
    pub(super) fn note(&self, port: u16, behaviour: Behaviour, now: Instant) {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ports.insert(port, (behaviour, now));
    }

    /// Returns what a port lately did.
    pub(super) fn get(&self, port: u16, now: Instant) -> Option<Behaviour> {
        let ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (behaviour, at) = ports.get(&port)?;
        (now.duration_since(*at) < VALID).then_some(*behaviour)
    }
}
