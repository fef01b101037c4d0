//! What goes on in the port-forwards of the double: counts, and the sessions that tests end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::lock;
use super::faults::Carrier;

/// The port-forward sessions of a cluster.
#[derive(Debug, Default)]
pub struct Forwards {
    /// Counts so far.
    counts: watch::Sender<ForwardCounts>,
    /// Open sessions by number.
    sessions: Mutex<BTreeMap<u64, Entry>>,
}

/// Counts since the cluster started; those named `open` go down again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardCounts {
    /// Upgrades answered with 101, by carrier.
    upgrades: [u64; 3],
    /// Sessions whose connection is open.
    pub sessions_open: u64,
    /// SPDY streams opened by SYN_STREAM; one forwarded connection takes two.
    pub streams_opened: u64,
    /// Connections made to applications.
    pub connections_opened: u64,
    /// Connections to applications that are open.
    pub connections_open: u64,
    /// SYN_STREAM frames received, those of old ids included.
    pub syn_streams: u64,
    /// DATA frames received.
    pub data_frames: u64,
    /// Frames received with FLAG_FIN.
    pub fins: u64,
    /// RST_STREAM frames received.
    pub resets: u64,
    /// PING frames received, of SPDY or of the WebSocket of channels.
    pub pings: u64,
    /// GOAWAY frames received.
    pub go_aways: u64,
    /// SETTINGS, WINDOW_UPDATE, HEADERS and SYN_REPLY frames received.
    pub other_frames: u64,
    /// Bytes of payload handed to the copiers at the pods.
    pub bytes_to_pods: u64,
    /// Bytes of payload read from applications.
    pub bytes_from_pods: u64,
}

impl ForwardCounts {
    /// Upgrades to `carrier` answered with 101.
    #[must_use]
    pub fn upgrades(&self, carrier: Carrier) -> u64 {
        self.upgrades[carrier as usize]
    }
}

/// An open session.
#[derive(Debug)]
struct Entry {
    /// Namespace and name of its pod.
    pod: (String, String),
    /// How it is carried.
    carrier: Carrier,
    /// What can be done to it.
    controls: Controls,
}

/// The strings a session is pulled by.
#[derive(Clone, Debug)]
pub(super) struct Controls {
    /// Cuts the session's connection and all it forwards.
    pub(super) kill: CancellationToken,
    /// Makes the session's connection swallow every byte from now on.
    pub(super) silence: CancellationToken,
    /// Ends what the session forwards, but not its connection.
    pub(super) forwards: CancellationToken,
    /// Makes a SPDY session send GOAWAY.
    pub(super) go_away: CancellationToken,
}

/// A session in the registry; leaves it when dropped.
#[derive(Debug)]
pub(super) struct Registration {
    /// The registry.
    forwards: Arc<Forwards>,
    /// Number of the session.
    number: u64,
    /// What can be done to it.
    pub(super) controls: Controls,
}

/// A counted connection to an application.
#[derive(Debug)]
pub(super) struct CountedConnection<'a>(&'a Forwards);

impl Forwards {
    /// The counts as of now.
    #[must_use]
    pub fn counts(&self) -> ForwardCounts {
        *self.counts.borrow()
    }

    /// Waits until the counts fulfil `condition` and returns them. Cancel-safe.
    pub async fn until(&self, condition: impl FnMut(&ForwardCounts) -> bool) -> ForwardCounts {
        let mut counts = self.counts.subscribe();
        let fulfilled = counts.wait_for(condition).await.map(|counts| *counts);
        fulfilled.expect("the sender lives in self")
    }

    /// Cuts the sessions of a pod and what they forward, without a word to the client; returns how many there were.
    pub fn kill_sessions(&self, namespace: &str, pod: &str) -> usize {
        self.of_pod(namespace, pod, |controls| controls.kill.cancel())
    }

    /// Makes the connections of a pod's sessions swallow all bytes from now on, as a middlebox does that has forgotten
    /// them; what they forward stays open. Returns how many there were.
    pub fn silence_sessions(&self, namespace: &str, pod: &str) -> usize {
        self.of_pod(namespace, pod, |controls| controls.silence.cancel())
    }

    /// Makes the SPDY sessions of a pod send GOAWAY: they ignore new streams from then on and close once their last
    /// stream has ended. Returns how many there were.
    pub fn send_go_away(&self, namespace: &str, pod: &str) -> usize {
        self.of_pod(namespace, pod, |controls| controls.go_away.cancel())
    }

    /// Restarts the container runtime: what is forwarded ends, sessions over SPDY and channels are cut, tunnelled ones
    /// go silent with their connection open. New sessions work at once. Returns how many sessions there were.
    pub fn restart_runtime(&self) -> usize {
        self.each(|entry| {
            entry.controls.forwards.cancel();
            match entry.carrier {
                Carrier::Tunnel => entry.controls.silence.cancel(),
                Carrier::Spdy | Carrier::Channel => entry.controls.kill.cancel(),
            }
        })
    }

    /// Enters a session; `connection` ends with the client's connection.
    pub(super) fn register(
        self: &Arc<Self>,
        carrier: Carrier,
        namespace: &str,
        pod: &str,
        connection: &CancellationToken,
    ) -> Registration {
        let kill = connection.child_token();
        let controls = Controls {
            forwards: kill.child_token(),
            kill,
            silence: CancellationToken::new(),
            go_away: CancellationToken::new(),
        };
        let entry = Entry {
            pod: (namespace.to_owned(), pod.to_owned()),
            carrier,
            controls: controls.clone(),
        };
        let mut sessions = lock(&self.sessions);
        let number = sessions.last_key_value().map_or(0, |(last, _)| last + 1);
        sessions.insert(number, entry);
        drop(sessions);
        self.count(|counts| {
            counts.upgrades[carrier as usize] += 1;
            counts.sessions_open += 1;
        });
        Registration {
            forwards: self.clone(),
            number,
            controls,
        }
    }

    /// Changes the counts.
    pub(super) fn count(&self, change: impl FnOnce(&mut ForwardCounts)) {
        self.counts.send_modify(change);
    }

    /// Counts a connection to an application while the result lives.
    pub(super) fn connected(&self) -> CountedConnection<'_> {
        self.count(|counts| {
            counts.connections_opened += 1;
            counts.connections_open += 1;
        });
        CountedConnection(self)
    }

    fn of_pod(&self, namespace: &str, pod: &str, act: impl Fn(&Controls)) -> usize {
        let mut found = 0;
        self.each(|entry| {
            if (entry.pod.0.as_str(), entry.pod.1.as_str()) == (namespace, pod) {
                act(&entry.controls);
                found += 1;
            }
        });
        found
    }

    fn each(&self, act: impl FnMut(&Entry)) -> usize {
        let sessions = lock(&self.sessions);
        sessions.values().for_each(act);
        sessions.len()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.forwards.sessions).remove(&self.number);
        self.forwards.count(|counts| counts.sessions_open -= 1);
    }
}

impl Drop for CountedConnection<'_> {
    fn drop(&mut self) {
        self.0.count(|counts| counts.connections_open -= 1);
    }
}
