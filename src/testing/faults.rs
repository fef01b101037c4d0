//! What goes wrong in the double: switches that tests and the demo turn while it runs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;

/// How long containerd waits for the second direction of a forwarded connection after the first has ended
/// (`containerd:internal/cri/server/sandbox_portforward_linux.go`).
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// The faults of a cluster; a new one has none.
#[derive(Debug)]
pub struct Faults {
    /// Everything a lock protects.
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Wait before each API request is answered.
    api_latency: Duration,
    /// New connections are dropped before TLS.
    api_down: bool,
    /// Wait before an upgrade to port-forwarding is answered.
    upgrade_delay: Duration,
    /// Wait for the second direction of a forwarded connection.
    close_grace: Duration,
    /// Subprotocol and SPDY upgrades that are refused.
    refused_carriers: Vec<Carrier>,
    /// Faults of single pods, by namespace and name.
    pods: BTreeMap<(String, String), ForwardFault>,
}

/// What is wrong with port-forwards to one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardFault {
    /// The pod's port refuses connections; the runtime reports it on the error stream.
    Refused,
    /// The pod's port accepts, then resets the connection when it gets the first bytes.
    Reset,
    /// The pod's port accepts and then neither reads nor writes.
    Stalled,
    /// The upgrade is answered 404, as if the pod were gone.
    PodGone,
    /// The runtime reports this text on the error stream, after the usual prefix.
    Runtime(String),
    /// The upgrade is answered with this status.
    Upgrade(StatusCode),
}

/// A way port-forward bytes are carried through the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// `Upgrade: SPDY/3.1`
    Spdy,
    /// `Upgrade: websocket` with `v4.channel.k8s.io`
    Channel,
}

impl Faults {
    /// No faults.
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                api_latency: Duration::ZERO,
                api_down: false,
                upgrade_delay: Duration::ZERO,
                close_grace: CLOSE_GRACE,
                refused_carriers: Vec::new(),
                pods: BTreeMap::new(),
            }),
        }
    }

    /// Delays the answer to every API request, upgrades included.
    pub fn set_api_latency(&self, latency: Duration) {
        self.lock().api_latency = latency;
    }

    /// Drops new connections before TLS; connections that exist are cut by
    /// [`FakeCluster::restart`](super::FakeCluster::restart).
    pub fn set_api_down(&self, down: bool) {
        self.lock().api_down = down;
    }

    /// Delays the answer to upgrades only.
    pub fn set_upgrade_delay(&self, delay: Duration) {
        self.lock().upgrade_delay = delay;
    }

    /// Changes how long the runtime waits for the second direction of a forwarded connection once the first has
    /// ended: 1 s, as containerd does.
    pub fn set_close_grace(&self, grace: Duration) {
        self.lock().close_grace = grace;
    }

    /// Answers upgrades to a carrier with 403, as a proxy in front of the API server may.
    pub fn refuse_carrier(&self, carrier: Carrier, refuse: bool) {
        let mut inner = self.lock();
        inner.refused_carriers.retain(|&known| known != carrier);
        if refuse {
            inner.refused_carriers.push(carrier);
        }
    }

    /// Sets or clears the fault of port-forwards to one pod.
    pub fn set_forward(&self, namespace: &str, pod: &str, fault: Option<ForwardFault>) {
        let key = (namespace.to_owned(), pod.to_owned());
        let mut inner = self.lock();
        match fault {
            Some(fault) => inner.pods.insert(key, fault),
            None => inner.pods.remove(&key),
        };
    }

    /// Clears everything.
    pub fn clear(&self) {
        *self.lock() = Self::new()
            .inner
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
    }

    pub(super) fn api_latency(&self) -> Duration {
        self.lock().api_latency
    }

    pub(super) fn api_down(&self) -> bool {
        self.lock().api_down
    }

    pub(super) fn upgrade_delay(&self) -> Duration {
        self.lock().upgrade_delay
    }

    pub(super) fn close_grace(&self) -> Duration {
        self.lock().close_grace
    }

    pub(super) fn refuses(&self, carrier: Carrier) -> bool {
        self.lock().refused_carriers.contains(&carrier)
    }

    pub(super) fn forward(&self, namespace: &str, pod: &str) -> Option<ForwardFault> {
        self.lock()
            .pods
            .get(&(namespace.to_owned(), pod.to_owned()))
            .cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
