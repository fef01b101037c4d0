//! What goes wrong in the double: switches that tests and the demo turn while it runs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;
use tokio::sync::watch;

/// How long containerd waits for the second direction of a forwarded connection after the first has ended
/// (`containerd:internal/cri/server/sandbox_portforward_linux.go`).
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Bytes the sockets between the runtime and an application take although the application reads none; real ones grow to
/// about 4 MiB.
pub const STALLED_SOCKET: usize = 256 * 1024;

/// The faults of a cluster; a new one has none.
#[derive(Debug)]
pub struct Faults {
    /// Everything a lock protects.
    inner: Mutex<Inner>,
    /// Tells those who wait for the end of a fault to look again.
    changes: watch::Sender<()>,
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
    /// After how much silence a port-forward ends, if not as the runtime has it.
    idle_timeout: Option<Duration>,
    /// Carriers whose upgrades are refused, and how.
    refused_carriers: Vec<(Carrier, StatusCode)>,
    /// Upgrades are answered 429, with so many seconds to wait.
    busy: Option<u64>,
    /// Carriers whose connections swallow all bytes.
    black_holes: Vec<Carrier>,
    /// Wait before each SYN_REPLY.
    reply_delay: Duration,
    /// PINGs stay unanswered.
    drop_pongs: bool,
    /// SYN_STREAMs are ignored.
    swallow_streams: bool,
    /// Time bytes take to the server and back.
    latency: (Duration, Duration),
    /// Faults of single pods, by namespace and name, and of their ports.
    pods: BTreeMap<(String, String, Option<u16>), ForwardFault>,
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
    /// The application does not read: its socket takes [`STALLED_SOCKET`] bytes more, then the copier in front of it
    /// blocks. Takes hold of open connections too, and lets go of them when it is cleared.
    NotReading,
    /// The application's bytes stay in its socket. Takes hold of open connections too, and lets go of them when it is
    /// cleared.
    NotWriting,
    /// The upgrade is answered 404, as if the pod were gone.
    PodGone,
    /// The runtime reports this text on the error stream, after the usual prefix.
    Runtime(String),
    /// The API server answers the upgrade with this status.
    Upgrade(StatusCode),
    /// The node's kubelet answers the upgrade with this status and text, which is no `Status` object; the API server hands
    /// it on.
    Kubelet(StatusCode, String),
    /// The upgrade is not answered at all, as if the pod's node were dead.
    Unanswered,
}

/// A way port-forward bytes are carried through the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// `Upgrade: SPDY/3.1`
    Spdy,
    /// `Upgrade: websocket` with `SPDY/3.1+portforward.k8s.io`: SPDY tunnelled in binary messages (KEP-4006).
    Tunnel,
    /// `Upgrade: websocket` with `v4.channel.k8s.io`
    Channel,
}

impl Inner {
    fn new() -> Self {
        Self {
            api_latency: Duration::ZERO,
            api_down: false,
            upgrade_delay: Duration::ZERO,
            close_grace: CLOSE_GRACE,
            idle_timeout: None,
            refused_carriers: Vec::new(),
            busy: None,
            black_holes: Vec::new(),
            reply_delay: Duration::ZERO,
            drop_pongs: false,
            swallow_streams: false,
            latency: (Duration::ZERO, Duration::ZERO),
            pods: BTreeMap::new(),
        }
    }
}

impl Faults {
    /// No faults.
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner::new()),
            changes: watch::Sender::new(()),
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

    /// Changes after how much silence the runtime ends a port-forward, which otherwise depends on its kind.
    pub fn set_idle_timeout(&self, timeout: Duration) {
        self.lock().idle_timeout = Some(timeout);
    }

    /// Changes how long the runtime waits for the second direction of a forwarded connection once the first has
    /// ended: 1 s, as containerd does.
    pub fn set_close_grace(&self, grace: Duration) {
        self.lock().close_grace = grace;
    }

    /// Answers upgrades to a carrier with 403, as a proxy in front of the API server may.
    pub fn refuse_carrier(&self, carrier: Carrier, refuse: bool) {
        self.answer_carrier(carrier, refuse.then_some(StatusCode::FORBIDDEN));
    }

    /// Answers upgrades to a carrier with this status, as proxies do in their many ways; `None` lets them through.
    pub fn answer_carrier(&self, carrier: Carrier, status: Option<StatusCode>) {
        let refused = &mut self.lock().refused_carriers;
        refused.retain(|&(known, _)| known != carrier);
        refused.extend(status.map(|status| (carrier, status)));
    }

    /// Answers every upgrade with 429 and a Retry-After of so many seconds, as a server with too much to do does.
    pub fn set_busy(&self, retry_after: Option<u64>) {
        self.lock().busy = retry_after;
    }

    /// Swallows the bytes of a carrier's sessions both ways with their connections open, as a proxy may that does not
    /// understand the upgrade it has let through: of new sessions from their 101 on, of open ones from now on. A session
    /// once swallowed stays so.
    pub fn set_black_hole(&self, carrier: Carrier, swallow: bool) {
        switch(&mut self.lock().black_holes, carrier, swallow);
    }

    /// Delays every SYN_REPLY. The worker that owes the reply waits with it, and with it what is queued behind.
    pub fn set_reply_delay(&self, delay: Duration) {
        self.lock().reply_delay = delay;
    }

    /// Leaves the PINGs of SPDY sessions unanswered.
    pub fn set_drop_pongs(&self, drop: bool) {
        self.lock().drop_pongs = drop;
    }

    /// Ignores SYN_STREAMs, as a server does that has sent GOAWAY.
    pub fn set_swallow_streams(&self, swallow: bool) {
        self.lock().swallow_streams = swallow;
    }

    /// Makes every byte take this much longer, on all connections to the API server. Bytes are delayed, never reordered,
    /// and the rate stays as it is; the TCP handshake takes no longer.
    pub fn set_latency(&self, to_server: Duration, to_client: Duration) {
        self.lock().latency = (to_server, to_client);
    }

    /// Sets or clears the fault of port-forwards to one pod.
    pub fn set_forward(&self, namespace: &str, pod: &str, fault: Option<ForwardFault>) {
        self.set_fault((namespace.to_owned(), pod.to_owned(), None), fault);
    }

    /// Sets or clears the fault of port-forwards to one container port; it goes before the pod's. Those of upgrades have no
    /// effect here.
    pub fn set_port_forward(&self, namespace: &str, pod: &str, port: u16, fault: Option<ForwardFault>) {
        self.set_fault((namespace.to_owned(), pod.to_owned(), Some(port)), fault);
    }

    fn set_fault(&self, target: (String, String, Option<u16>), fault: Option<ForwardFault>) {
        let mut inner = self.lock();
        match fault {
            Some(fault) => inner.pods.insert(target, fault),
            None => inner.pods.remove(&target),
        };
        drop(inner);
        self.changes.send_replace(());
    }

    /// Clears everything.
    pub fn clear(&self) {
        *self.lock() = Inner::new();
        self.changes.send_replace(());
    }

    /// Sees every change to the faults of pods.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
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

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        self.lock().idle_timeout
    }

    pub(super) fn close_grace(&self) -> Duration {
        self.lock().close_grace
    }

    pub(super) fn refuses(&self, carrier: Carrier) -> Option<StatusCode> {
        let inner = self.lock();
        let refused = inner.refused_carriers.iter().find(|(known, _)| *known == carrier);
        refused.map(|&(_, status)| status)
    }

    pub(super) fn busy(&self) -> Option<u64> {
        self.lock().busy
    }

    pub(super) fn swallows(&self, carrier: Carrier) -> bool {
        self.lock().black_holes.contains(&carrier)
    }

    pub(super) fn reply_delay(&self) -> Duration {
        self.lock().reply_delay
    }

    pub(super) fn drops_pongs(&self) -> bool {
        self.lock().drop_pongs
    }

    pub(super) fn swallows_streams(&self) -> bool {
        self.lock().swallow_streams
    }

    /// To the server, to the client.
    pub(super) fn latency(&self) -> (Duration, Duration) {
        self.lock().latency
    }

    /// The fault of a pod.
    pub(super) fn forward(&self, namespace: &str, pod: &str) -> Option<ForwardFault> {
        let key = (namespace.to_owned(), pod.to_owned(), None);
        self.lock().pods.get(&key).cloned()
    }

    /// The fault of a container port, else of its pod.
    pub(super) fn port_forward(&self, namespace: &str, pod: &str, port: u16) -> Option<ForwardFault> {
        let key = (namespace.to_owned(), pod.to_owned(), Some(port));
        let fault = self.lock().pods.get(&key).cloned();
        fault.or_else(|| self.forward(namespace, pod))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn switch(carriers: &mut Vec<Carrier>, carrier: Carrier, on: bool) {
    carriers.retain(|&known| known != carrier);
    if on {
        carriers.push(carrier);
    }
}
