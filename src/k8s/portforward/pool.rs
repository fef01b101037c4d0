//! The sessions to one pod: opened when needed, one kept ready, replaced when worn out or broken, closed when unused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use crate::drain::Drain;
use crate::k8s::portforward::placement::{Newcomer, place};
use crate::k8s::portforward::ports::Ports;
use crate::k8s::portforward::spdy::{Phase, PodStream, SILENT, Session};
use crate::k8s::portforward::{Dialed, Dialer};
use crate::registry::PodRef;
use crate::transport::ConnectError;

/// How long no session is made ready after one could not be opened, at first and at most. Connections that need one try
/// anyway.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Sessions beyond the first are closed when unused for this long.
const SURPLUS: Duration = Duration::from_mins(1);

/// A way to a port, as the pool could make it.
#[derive(Debug)]
pub(super) enum Way {
    /// A stream on a session.
    Stream(PodStream),
    /// A port-forward of its own is to be opened, since better forms were refused, for this reason if it is known.
    Single(Option<ConnectError>),
}

/// Why connections get port-forwards of their own, if it was this pod that it was found out with.
#[derive(Debug)]
struct Single(Option<ConnectError>);

/// The sessions to one pod.
#[derive(Debug)]
pub(super) struct Pool {
    pod: PodRef,
    dialer: Arc<Dialer>,
    ports: Arc<Ports>,
    drain: Drain,
    state: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    sessions: Vec<Session>,
    /// How many are being opened.
    dialing: usize,
    /// Connections that wait for one.
    waiting: Vec<oneshot::Sender<Result<(), ConnectError>>>,
    /// How often in a row none could be opened, and until when none is made ready.
    failures: u32,
    paused_until: Instant,
    used_at: Instant,
    /// How long a session takes to open at best, if any was.
    dialed_in: Option<Duration>,
    /// Whether the cluster turned out to carry one connection at a time, and why.
    single: Option<Single>,
}

impl Pool {
    pub(super) fn new(pod: PodRef, dialer: Arc<Dialer>, drain: Drain) -> Self {
        let now = Instant::now();
        Self {
            pod,
            dialer,
            ports: Arc::default(),
            drain,
            state: Mutex::new(Inner {
                sessions: Vec::new(),
                dialing: 0,
                waiting: Vec::new(),
                failures: 0,
                paused_until: now,
                used_at: now,
                dialed_in: None,
                single: None,
            }),
        }
    }

    /// Finds a way to a port. Cancel-safe: a session that is being opened is there for the next.
    pub(super) async fn connect(self: &Arc<Self>, port: u16) -> Result<Way, ConnectError> {
        loop {
            let waiting = {
                let mut inner = self.lock();
                if let Some(Single(refused)) = &inner.single {
                    return Ok(Way::Single(refused.clone()));
                }
                let now = Instant::now();
                inner.used_at = now;
                let loads = inner.prune();
                let newcomer = Newcomer {
                    small: self.ports.is_small(port),
                    dialing: inner.dialing,
                    waiting: inner.waiting.len(),
                    dialed_in: inner.dialed_in,
                };
                let placed = place(&loads, newcomer, now);
                if placed.session.is_none() || inner.paused_until <= now {
                    (0..placed.dial).for_each(|_| self.dial(&mut inner));
                }
                if let Some(session) = placed.session.and_then(|index| inner.sessions.get(index)) {
                    return Ok(Way::Stream(session.connect(port, !newcomer.small)));
                }
                let (ready, waiting) = oneshot::channel();
                inner.waiting.push(ready);
                waiting
            };
            match waiting.await {
                Ok(opened) => opened?,
                Err(_) => return Err(ConnectError::Unavailable("kube-tunnel is shutting down".into())),
            }
        }
    }

    /// Finds out again how connections get to the pod.
    pub(super) fn reconsider(&self) {
        self.lock().single = None;
    }

    fn dial(self: &Arc<Self>, inner: &mut Inner) {
        inner.dialing += 1;
        let dialing = Dialing {
            pool: self.clone(),
            done: false,
        };
        self.drain.spawn(dialing.run());
    }

    /// Closes what is unused. Returns whether the pool is still of use.
    pub(super) fn expire(&self, idle_timeout: Duration, now: Instant) -> bool {
        let mut inner = self.lock();
        let loads = inner.prune();
        let mut kept = false;
        let idle_for = |at: Instant| now.duration_since(at);
        let sessions = inner.sessions.drain(..).zip(loads).filter(|(session, load)| {
            let patience = if kept {
                SURPLUS.min(idle_timeout)
            } else {
                idle_timeout
            };
            let unused = load.live == 0 && idle_for(load.active_at) >= patience;
            if unused {
                debug!(pod = %self.pod, "unused port-forward closed");
                session.retire();
            }
            kept |= !unused;
            !unused
        });
        let sessions: Vec<Session> = sessions.map(|(session, _)| session).collect();
        inner.sessions = sessions;
        !inner.sessions.is_empty() || inner.dialing > 0 || idle_for(inner.used_at) < idle_timeout
    }

    /// Closes every session as soon as it is unused.
    pub(super) fn close(&self) {
        self.lock()
            .sessions
            .drain(..)
            .for_each(|session| session.retire());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Lets go of sessions that have ended or take no newcomers for good, and returns what the others do.
    fn prune(&mut self) -> Vec<crate::k8s::portforward::spdy::Load> {
        let mut loads = Vec::with_capacity(self.sessions.len());
        self.sessions.retain(|session| {
            let load = session.load();
            if load.worn {
                session.retire();
            } else {
                loads.push(load);
            }
            !load.worn
        });
        loads
    }
}

/// The opening of one session; counted until it is done, or dropped.
struct Dialing {
    pool: Arc<Pool>,
    done: bool,
}

impl Dialing {
    async fn run(mut self) {
        let pool = &self.pool;
        let begun_at = Instant::now();
        let dialed = pool.dialer.dial(&pool.pod, &pool.ports).await;
        let mut inner = pool.lock();
        let result = match dialed {
            Ok(Dialed::Session(session)) => {
                inner.failures = 0;
                let taken = begun_at.elapsed();
                inner.dialed_in = Some(inner.dialed_in.map_or(taken, |least| least.min(taken)));
                pool.watch(&session);
                inner.sessions.push(session);
                Ok(())
            }
            Ok(Dialed::Single(refused)) => {
                inner.single = Some(Single(refused));
                Ok(())
            }
            Err(error) => {
                // Jitter, so that the pools of many pods do not come back all at once.
                let pause = (FIRST_PAUSE * 2_u32.saturating_pow(inner.failures)).min(LONGEST_PAUSE);
                inner.failures = (inner.failures + 1).min(10);
                inner.paused_until = Instant::now() + pause.mul_f64(0.5 + fastrand::f64());
                debug!(pod = %pool.pod, %error, "no port-forward");
                Err(error)
            }
        };
        // While others are being opened, the failure of one says nothing to those who wait.
        if result.is_ok() || inner.dialing == 1 {
            for waiting in inner.waiting.drain(..) {
                let _ = waiting.send(result.clone());
            }
        }
        // Under the same lock: whoever comes next must not wait for what has already been told.
        inner.dialing -= 1;
        drop(inner);
        self.done = true;
    }
}

impl Drop for Dialing {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut inner = self.pool.lock();
        inner.dialing -= 1;
        if inner.dialing == 0 {
            // Cut off by shutdown or a panic.
            inner.waiting.clear();
        }
    }
}

impl Pool {
    /// Notes in the log when a session ends.
    fn watch(&self, session: &Session) {
        let (mut phase, pod, dialer) = (session.phase(), self.pod.clone(), self.dialer.clone());
        debug!(pod = %self.pod, "port-forward opened");
        self.drain.spawn(async move {
            let ended = phase.wait_for(|phase| matches!(phase, Phase::Ended(_))).await;
            if let Ok(ended) = ended
                && let Phase::Ended(reason) = &*ended
            {
                debug!(%pod, %reason, "port-forward ended");
                if **reason == *SILENT {
                    dialer.carriers.doubt();
                }
            }
        });
    }
}
