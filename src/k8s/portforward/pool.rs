//! The sessions to one pod: opened when needed, one kept ready, replaced when worn out or broken, closed when unused.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use crate::drain::Drain;
use crate::k8s::portforward::dial::{Dialed, Dialer, Single};
use crate::k8s::portforward::liveness::SILENT;
use crate::k8s::portforward::placement::{Newcomer, place};
use crate::k8s::portforward::ports::Ports;
use crate::k8s::portforward::spdy::{Load, Phase, PodStream, Session};
use crate::registry::PodRef;
use crate::transport::ConnectError;

/// How long no session is made ready after one could not be opened, at first and at most. Connections that need one try
/// anyway.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Sessions beyond the first are closed when unused for this long.
const SURPLUS: Duration = Duration::from_mins(1);

/// How long a connection waits for a session that is being opened when it could share another: by then the opening is in
/// trouble, and a neighbour is better than an error.
const PATIENCE: Duration = Duration::from_secs(1);

/// A way to a port, as the pool could make it.
#[derive(Debug)]
pub(super) enum Way {
    /// A stream on a session.
    Stream(PodStream),
    /// A port-forward of its own is to be opened, since better forms were refused.
    Single(Single),
    /// The pool was given up meanwhile; another one is to be asked.
    Closed,
}

/// What a connection is to do.
enum Step {
    /// It has its way.
    Go(Way),
    /// It waits for a session.
    Wait(oneshot::Receiver<Result<(), ConnectError>>),
}

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
    /// Whether it ever was; else it was made ready only.
    used: bool,
    /// How long a session takes to open at best, if any was.
    dialed_in: Option<Duration>,
    /// Whether the cluster turned out to carry one connection at a time, and what the count of changes was then.
    single: Option<(Single, u64)>,
    /// Whether it was given up: nobody would close what is opened from now on.
    closed: bool,
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
                used: false,
                dialed_in: None,
                single: None,
                closed: false,
            }),
        }
    }

    /// Finds a way to a port. Cancel-safe: a session that is being opened is there for the next.
    pub(super) async fn connect(self: &Arc<Self>, port: u16) -> Result<Way, ConnectError> {
        self.look_for_better();
        loop {
            let small = self.ports.is_small(port);
            let (step, dials) = self.lock().step(port, small, &self.dialer, Instant::now());
            (0..dials).for_each(|_| self.dial());
            let mut opened = match step {
                Step::Go(way) => return Ok(way),
                Step::Wait(opened) => opened,
            };
            let opened = match tokio::time::timeout(PATIENCE, &mut opened).await {
                Ok(opened) => opened,
                Err(_) => match self.share(port, false) {
                    Some(stream) => return Ok(Way::Stream(stream)),
                    None => opened.await,
                },
            };
            match opened {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.share(port, true).map(Way::Stream).ok_or(error),
                Err(_) => return Err(ConnectError::Unavailable("kube-tunnel is shutting down".into())),
            }
        }
    }

    /// Has a session opened if there is none, so that the first connection need not wait for it. Where that fails the
    /// connection finds out why for itself.
    pub(super) fn prepare(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.prune();
        let has_way = !inner.sessions.is_empty() || inner.dialing > 0 || inner.single.is_some();
        if has_way || inner.closed || inner.paused_until > Instant::now() {
            return;
        }
        inner.dialing += 1;
        drop(inner);
        self.dial();
    }

    /// Finds out again how connections get to the pod.
    pub(super) fn reconsider(&self) {
        self.lock().single = None;
    }

    /// Closes what is unused. Returns whether the pool is still of use; if not, it is given up.
    pub(super) fn expire(&self, idle_timeout: Duration, now: Instant) -> bool {
        let mut inner = self.lock();
        let loads = inner.prune();
        // One that is only ready is surplus as well.
        let mut kept = !inner.used;
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
        let used = !inner.sessions.is_empty() || inner.dialing > 0 || idle_for(inner.used_at) < idle_timeout;
        inner.closed |= !used;
        used
    }

    /// Gives the pool up: every session ends as soon as it is unused, those too that are being opened.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.sessions.drain(..).for_each(|session| session.retire());
    }

    /// Opens a session, which [`Inner::step`] has counted. Not under the lock: a runtime that is ending drops the task here
    /// and now, which takes the lock to be counted out.
    fn dial(self: &Arc<Self>) {
        let dialing = Dialing {
            pool: self.clone(),
            done: false,
        };
        self.drain.spawn(dialing.run());
    }

    /// Tries better forms of port-forward in the background, if it is time for that.
    fn look_for_better(self: &Arc<Self>) {
        let forms = self.dialer.carriers.better(Instant::now());
        if forms.is_empty() {
            return;
        }
        let (pool, begun) = (self.clone(), Instant::now());
        self.drain.spawn(async move {
            let found = tokio::select! {
                biased;
                () = pool.drain.started() => return,
                found = pool.dialer.dial_in(forms, &pool.pod, &pool.ports) => found,
            };
            if let Ok(Dialed::Session(session)) = found {
                pool.add(&session, begun.elapsed());
            }
        });
    }

    /// Opens a stream on a session that takes connections, however many others it has, and better on one of its kind; on `any`
    /// that works if none does.
    fn share(&self, port: u16, any: bool) -> Option<PodStream> {
        let mut inner = self.lock();
        let loads = inner.prune();
        let rank = |load: &Load| match load.apart {
            Some(other) if other != port => 2 + u8::from(!load.open),
            _ if load.open => 0,
            Some(_) if load.bulk => 1,
            _ => 3,
        };
        let sessions = inner.sessions.iter().zip(loads);
        let fit = sessions.filter(|(_, load)| (rank(load) < 3 || any) && !inner.closed);
        let (session, _) = fit.min_by_key(|(_, load)| (rank(load), load.live))?;
        Some(session.connect(port, !self.ports.is_small(port)))
    }

    /// Takes a session that was opened, and in which time.
    fn add(&self, session: &Session, taken: Duration) {
        let mut inner = self.lock();
        if inner.closed {
            session.retire();
        } else {
            (inner.failures, inner.paused_until) = (0, Instant::now());
            inner.single = None;
            inner.dialed_in = Some(inner.dialed_in.map_or(taken, |least| least.min(taken)));
            inner.sessions.push(session.clone());
        }
        drop(inner);
        self.watch(session);
    }

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

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Places a connection; `small`: what it is expected to be. Returns besides how many sessions are to be opened, which are
    /// counted already.
    fn step(&mut self, port: u16, small: bool, dialer: &Dialer, now: Instant) -> (Step, usize) {
        if self.closed {
            return (Step::Go(Way::Closed), 0);
        }
        (self.used_at, self.used) = (now, true);
        if let Some((single, changes)) = &self.single {
            if *changes == dialer.carriers.changes() {
                return (Step::Go(Way::Single(single.clone())), 0);
            }
            self.single = None;
        }
        let loads = self.prune();
        let newcomer = Newcomer {
            port,
            small,
            dialing: self.dialing,
            waiting: self.waiting.len(),
            dialed_in: self.dialed_in,
        };
        let placed = place(&loads, newcomer, now);
        let may_dial = placed.session.is_none() || self.paused_until <= now;
        let dials = if may_dial { placed.dial } else { 0 };
        self.dialing += dials;
        if let Some(session) = placed.session.and_then(|index| self.sessions.get(index)) {
            return (Step::Go(Way::Stream(session.connect(port, !small))), dials);
        }
        let (ready, opened) = oneshot::channel();
        self.waiting.push(ready);
        (Step::Wait(opened), dials)
    }

    /// Lets go of sessions that have ended or take no newcomers for good, and returns what the others do.
    fn prune(&mut self) -> Vec<Load> {
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
        if loads.is_empty() {
            // The way may be another one when it is used again.
            self.dialed_in = None;
        }
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
        let (pool, begun) = (self.pool.clone(), Instant::now());
        let dialed = tokio::select! {
            biased;
            // Whoever needs a connection has left before the port-forwards end.
            () = pool.drain.started() => return,
            dialed = pool.dialer.dial(&pool.pod, &pool.ports) => dialed,
        };
        let changes = pool.dialer.carriers.changes();
        let result = match dialed {
            Ok(Dialed::Session(session)) => {
                pool.add(&session, begun.elapsed());
                Ok(())
            }
            Ok(Dialed::Single(single)) => {
                pool.lock().single = Some((single, changes));
                Ok(())
            }
            Err(error) => {
                debug!(pod = %pool.pod, %error, "no port-forward");
                Err(error)
            }
        };
        self.finish(&result);
    }

    /// Tells those who wait, and counts itself out under the same lock: whoever comes next must not wait for what has
    /// already been told.
    fn finish(&mut self, result: &Result<(), ConnectError>) {
        let mut inner = self.pool.lock();
        // While others are being opened, the failure of one says nothing.
        let last = inner.dialing == 1;
        if result.is_err() && last {
            // Jitter, so that the pools of many pods do not come back all at once.
            let pause = (FIRST_PAUSE * 2_u32.saturating_pow(inner.failures)).min(LONGEST_PAUSE);
            inner.failures = (inner.failures + 1).min(10);
            inner.paused_until = Instant::now() + pause.mul_f64(0.5 + fastrand::f64());
        }
        if result.is_ok() || last {
            for waiting in inner.waiting.drain(..) {
                let _ = waiting.send(result.clone());
            }
        }
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
