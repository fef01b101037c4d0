//! Port-forwards through the API server: many connections over few upgraded ones.
//!
//! A connection to a pod's port costs no round trip of its own once there is a session to the pod ([`pool`], [`placement`]),
//! and none disturbs another ([`spdy`]). How sessions get through the API server is found out once ([`carrier`]).

#[cfg(feature = "internals")]
pub mod bare;
mod carrier;
mod cause;
mod channel;
mod placement;
mod pool;
mod ports;
mod spdy;
mod tunnel;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kube::Client;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::k8s::Cluster;
use crate::registry::PodRef;
use crate::transport::{BoxStream, Connect, ConnectError, Connecting, Target};

pub use carrier::Carriers;
use carrier::{Carrier, Memory, Refusal};
use pool::{Pool, Way};
use ports::Ports;
use spdy::{Phase, Session};

/// How many sessions are opened at the same time: each costs the API server, the kubelet and the runtime a connection, and
/// after an API server's restart all are opened again.
const DIALS: usize = 8;

/// How long the first answer of a session may take. A proxy on the way may pass the upgrade and swallow what follows.
const PROOF: Duration = Duration::from_secs(3);

/// Opens connections to pods.
pub struct PortForward {
    dialer: Arc<Dialer>,
    pools: Arc<Mutex<HashMap<PodRef, Arc<Pool>>>>,
    drain: Drain,
}

impl fmt::Debug for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortForward")
            .field("carriers", &self.dialer.carriers)
            .finish_non_exhaustive()
    }
}

impl PortForward {
    /// Makes the transport; nothing is opened yet. `timeout` bounds one upgrade, sessions unused for `idle_timeout` are
    /// closed. Its tasks run under `drain`.
    #[must_use]
    pub fn new(
        cluster: &Cluster,
        carriers: Carriers,
        timeout: Duration,
        idle_timeout: Duration,
        drain: &Drain,
    ) -> Self {
        let this = Self {
            dialer: Arc::new(Dialer {
                client: cluster.client.clone(),
                carriers: Memory::new(carriers),
                timeout,
                permits: Semaphore::new(DIALS),
                drain: drain.clone(),
            }),
            pools: Arc::default(),
            drain: drain.clone(),
        };
        let (pools, waiting) = (this.pools.clone(), drain.clone());
        drain.spawn(async move {
            tokio::select! {
                () = waiting.started() => {}
                () = sweep(&pools, idle_timeout) => {}
            }
            let pools = pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.values().for_each(|pool| pool.close());
        });
        this
    }

    async fn open(&self, target: &Target) -> Result<BoxStream, ConnectError> {
        let pool = {
            let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || {
                Arc::new(Pool::new(
                    target.pod.clone(),
                    self.dialer.clone(),
                    self.drain.clone(),
                ))
            };
            pools.entry(target.pod.clone()).or_insert_with(new).clone()
        };
        match pool.connect(target.port).await? {
            Way::Stream(stream) => Ok(Box::new(stream)),
            Way::Single(refused) => {
                let opened = self.open_single(target, refused).await;
                if !self.dialer.carriers.works(Carrier::Channel) {
                    pool.reconsider();
                }
                opened
            }
        }
    }

    /// Opens a connection of its own. `refused`: why no better form is used, if that was found out for this pod.
    async fn open_single(
        &self,
        target: &Target,
        refused: Option<ConnectError>,
    ) -> Result<BoxStream, ConnectError> {
        let carriers = &self.dialer.carriers;
        let opened = channel::open(self.dialer.client.clone(), target, self.dialer.timeout).await;
        match opened {
            Ok(stream) => {
                carriers.note(Carrier::Channel);
                Ok(stream)
            }
            Err(error @ ConnectError::Forbidden(_)) => {
                // The right to one of the better forms may come later, and is the one to be told of.
                carriers.forget();
                Err(carriers.wanted().explain(refused.unwrap_or(error)))
            }
            Err(error) => Err(error),
        }
    }
}

impl Connect for PortForward {
    fn connect<'a>(&'a self, target: &'a Target) -> Connecting<'a> {
        Box::pin(self.open(target))
    }
}

/// Closes what is unused, at least each minute (contract G2).
async fn sweep(pools: &Mutex<HashMap<PodRef, Arc<Pool>>>, idle_timeout: Duration) {
    let period = (idle_timeout / 10).clamp(Duration::from_millis(10), Duration::from_mins(1));
    let mut ticks = tokio::time::interval(period);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let mut pools = pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|_, pool| pool.expire(idle_timeout, now));
    }
}

/// Opens sessions.
struct Dialer {
    client: Client,
    carriers: Memory,
    timeout: Duration,
    permits: Semaphore,
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
enum Dialed {
    /// A session.
    Session(Session),
    /// What is left is one port-forward for each connection, and why, if that was just found out. It has not been proven to
    /// work.
    Single(Option<ConnectError>),
}

impl Dialer {
    /// Opens a session in the form that works, or finds out which does.
    async fn dial(&self, pod: &PodRef, ports: &Arc<Ports>) -> Result<Dialed, ConnectError> {
        let _permit = self.permits.acquire().await;
        let mut first = None;
        for carrier in self.carriers.order() {
            if carrier == Carrier::Channel {
                return Ok(Dialed::Single(first));
            }
            match self.dial_as(carrier, pod, ports).await {
                Ok(session) => {
                    if !self.carriers.works(carrier) {
                        debug!(?carrier, "port-forwards work");
                        self.carriers.note(carrier);
                    }
                    return Ok(Dialed::Session(session));
                }
                Err(Refusal { error, form: false }) => return Err(first.unwrap_or(error)),
                Err(Refusal { error, form: true }) => {
                    debug!(?carrier, %error, "this form of port-forward does not work here");
                    first.get_or_insert(error);
                }
            }
        }
        let none = || ConnectError::Unavailable("no form of port-forward is allowed".into());
        Err(self.carriers.wanted().explain(first.unwrap_or_else(none)))
    }

    async fn dial_as(&self, carrier: Carrier, pod: &PodRef, ports: &Arc<Ports>) -> Result<Session, Refusal> {
        let io = carrier::upgrade(&self.client, carrier, pod, self.timeout).await?;
        let session = match carrier {
            Carrier::Tunnel => Session::start(tunnel::Tunnel::new(io), ports.clone(), &self.drain),
            _ => Session::start(io, ports.clone(), &self.drain),
        };
        if !self.carriers.works(carrier) {
            prove(&session).await?;
        }
        Ok(session)
    }
}

/// Waits for a session's first answer.
async fn prove(session: &Session) -> Result<(), Refusal> {
    let mut phase = session.phase();
    let answered = phase.wait_for(|phase| *phase != Phase::Unproven);
    let why = match tokio::time::timeout(PROOF, answered).await {
        Ok(Ok(phase)) => match &*phase {
            Phase::Ended(reason) => reason.to_string(),
            Phase::Unproven | Phase::Proven => return Ok(()),
        },
        Ok(Err(_)) => "it ended".into(),
        Err(_) => format!("nothing came within {PROOF:?}"),
    };
    session.retire();
    warn!(
        why,
        "a port-forward was opened but carries nothing; is a proxy on the way?"
    );
    Err(Refusal {
        error: ConnectError::Unavailable(format!("the port-forward carries nothing: {why}")),
        form: true,
    })
}
