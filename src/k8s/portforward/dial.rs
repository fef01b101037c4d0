//! Opens sessions to pods, in whichever form gets through.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::io::BufReader;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::k8s::portforward::carrier::{self, Carrier, Refusal, Upgrade, Verdict};
use crate::k8s::portforward::channel::{Answers, Channel};
use crate::k8s::portforward::gate::Gate;
use crate::k8s::portforward::memory::Memory;
use crate::k8s::portforward::ports::Ports;
use crate::k8s::portforward::spdy::{Phase, Session, SlowReaders};
use crate::k8s::portforward::turns::Turns;
use crate::k8s::portforward::websocket::WebSocket;
use crate::registry::PodRef;
use crate::transport::{BoxStream, ConnectError, Target};

/// How much of a connection through channels is read at once: what a TLS record holds.
const PIECE: usize = 16 << 10;

/// How long the first answer of a session may take. A proxy on the way may pass the upgrade and swallow what follows.
const PROOF: Duration = Duration::from_secs(3);

/// Opens sessions, and connections where there can be no sessions.
pub(super) struct Dialer {
    client: Client,
    /// Which forms work.
    pub(super) carriers: Memory,
    answers: Answers,
    gate: Gate,
    timeout: Duration,
    slow_readers: SlowReaders,
    turns: Arc<Turns>,
    drain: Drain,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("carriers", &self.carriers)
            .finish_non_exhaustive()
    }
}

/// What a dial has brought.
#[derive(Debug)]
pub(super) enum Dialed {
    /// A session.
    Session(Session),
    /// What is left is one port-forward for each connection. It has not been proven to work.
    Single(Single),
}

/// How it has come to one port-forward for each connection.
#[derive(Debug, Clone)]
pub(super) struct Single {
    /// Why better forms were refused, if that was just found out.
    why: Option<ConnectError>,
    /// Whether that may have been a moment's trouble.
    doubtful: bool,
}

impl Dialer {
    /// Makes one; `timeout` bounds one upgrade. Transfers of all pods take `turns`. Sessions run under `drain`.
    pub(super) fn new(
        client: Client,
        carriers: Memory,
        timeout: Duration,
        slow_readers: SlowReaders,
        turns: Turns,
        drain: Drain,
    ) -> Self {
        Self {
            client,
            carriers,
            answers: Answers::default(),
            gate: Gate::new(),
            timeout,
            slow_readers,
            turns: Arc::new(turns),
            drain,
        }
    }

    /// Opens a session in the form that works, or finds out which does. Cancel-safe: nothing is left open.
    pub(super) async fn dial(&self, pod: &PodRef, ports: &Arc<Ports>) -> Result<Dialed, ConnectError> {
        self.dial_in(&self.carriers.order(), pod, ports).await
    }

    /// Opens a session in the first of these forms that works.
    pub(super) async fn dial_in(
        &self,
        forms: &[Carrier],
        pod: &PodRef,
        ports: &Arc<Ports>,
    ) -> Result<Dialed, ConnectError> {
        let since = self.carriers.changes();
        let (mut first, mut doubtful) = (None, false);
        for (index, &carrier) in forms.iter().enumerate() {
            if carrier == Carrier::Channel {
                return Ok(Dialed::Single(Single { why: first, doubtful }));
            }
            let another = forms.get(index + 1).is_some_and(|&next| next != Carrier::Channel);
            // Before, since others may find out meanwhile.
            let sure = self.carriers.works(carrier);
            let Refusal { error, verdict } = match self.dial_as(carrier, pod, ports).await {
                Ok(session) => {
                    debug!(?carrier, %pod, "a port-forward works");
                    self.carriers.note(carrier, doubtful, since, Instant::now());
                    return Ok(Dialed::Session(session));
                }
                Err(refusal) => refusal,
            };
            match verdict {
                Verdict::Form => {}
                // One form that is not known to work may be what is refused; channels would rather meet the same trouble.
                Verdict::Doubtful if !sure && !doubtful && another => doubtful = true,
                Verdict::Doubtful if sure => {
                    self.carriers.troubled();
                    return Err(error);
                }
                // Not the refusal of another form, which may sound final: this is what stands in the way now.
                _ => return Err(error),
            }
            debug!(?carrier, %error, ?verdict, "this form of port-forward does not work here");
            first.get_or_insert(error);
        }
        let none = || ConnectError::Unavailable("no form of port-forward is allowed".into());
        Err(self.carriers.wanted().explain(first.unwrap_or_else(none)))
    }

    async fn dial_as(&self, carrier: Carrier, pod: &PodRef, ports: &Arc<Ports>) -> Result<Session, Refusal> {
        let is_tunnel = carrier == Carrier::Tunnel;
        let upgrade = if is_tunnel { Upgrade::Tunnel } else { Upgrade::Spdy };
        let upgrading = carrier::upgrade(&self.client, upgrade, pod, self.timeout);
        let io = self.gate.pass(upgrading).await?;
        let (ports, slow_readers, turns) = (ports.clone(), self.slow_readers, self.turns.clone());
        let session = if is_tunnel {
            Session::start(WebSocket::tunnel(io), ports, slow_readers, turns, &self.drain)
        } else {
            Session::start(io, ports, slow_readers, turns, &self.drain)
        };
        if self.carriers.works(carrier) {
            return Ok(session);
        }
        prove(session).await
    }

    /// Opens a connection of its own.
    pub(super) async fn open_single(
        &self,
        target: &Target,
        single: Single,
    ) -> Result<BoxStream, ConnectError> {
        let since = self.carriers.changes();
        let upgrade = Upgrade::Channels(target.port);
        let opening = carrier::upgrade(&self.client, upgrade, &target.pod, self.timeout);
        match self.gate.pass(opening).await {
            Ok(io) => {
                self.carriers
                    .note(Carrier::Channel, single.doubtful, since, Instant::now());
                let channel = Channel::new(io, self.answers.clone());
                Ok(Box::new(BufReader::with_capacity(PIECE, channel)))
            }
            Err(Refusal {
                error: error @ ConnectError::Forbidden(_),
                ..
            }) => {
                // The right to one of the better forms may come later, and is the one to be told of. What else better forms met
                // counts if it may have passed.
                self.carriers.forget(Carrier::Channel);
                let why = single
                    .why
                    .filter(|why| single.doubtful || matches!(why, ConnectError::Forbidden(_)));
                Err(self.carriers.wanted().explain(why.unwrap_or(error)))
            }
            Err(Refusal { error, .. }) => Err(error),
        }
    }
}

/// A session that nobody uses yet; it ends if nobody comes to.
struct Unproven(Option<Session>);

impl Drop for Unproven {
    fn drop(&mut self) {
        if let Some(session) = &self.0 {
            session.retire();
        }
    }
}

/// Waits for a session's first answer.
async fn prove(session: Session) -> Result<Session, Refusal> {
    let mut unproven = Unproven(Some(session.clone()));
    let mut phase = session.phase();
    let answered = phase.wait_for(|phase| *phase != Phase::Unproven);
    let (why, verdict) = match tokio::time::timeout(PROOF, answered).await {
        // Somebody who does not understand what comes may hang up; so does a server that is being restarted.
        Ok(Ok(phase)) => match &*phase {
            Phase::Ended(reason) => (reason.to_string(), Verdict::Doubtful),
            Phase::Unproven | Phase::Proven => {
                unproven.0 = None;
                drop(phase);
                return Ok(session);
            }
        },
        Ok(Err(_)) => ("it ended".into(), Verdict::Doubtful),
        Err(_) => (format!("nothing came within {PROOF:?}"), Verdict::Form),
    };
    warn!(
        why,
        "a port-forward was opened but carries nothing; is a proxy on the way?"
    );
    Err(Refusal {
        error: ConnectError::Unavailable(format!("the port-forward carries nothing: {why}")),
        verdict,
    })
}
