//! A client of SPDY/3.1 port-forwards: many connections to a pod's ports over one upgraded connection.
//!
//! The peer is a container runtime with `moby/spdystream`, which has no flow control. A stream that is opened needs no round
//! trip: its two frames and the first payload leave in one write. What keeps the connections of a session from disturbing
//! each other is counting what the peer's workers have in hand ([`workers`]); a slow reader, which nothing can be done about
//! within a session, is the business of whoever places connections on sessions.
//!
//! One task per session reads and writes ([`driver`]); everything it decides is in [`state`], which knows no connection.

#[cfg(feature = "internals")]
pub(super) mod bare;
mod chunks;
mod driver;
mod entry;
mod frame;
mod state;
mod stream;
mod workers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::drain::Drain;
use crate::k8s::portforward::ports::Ports;
use crate::k8s::portforward::turns::{Transfer, Turns};
use driver::Driver;
pub(super) use state::Load;
pub use state::SlowReaders;
use state::State;
#[cfg(test)]
pub(super) use state::{MAX_AGE, MAX_OPENED};
pub(super) use stream::PodStream;
pub(super) use workers::WORKERS;

/// How a session stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// The peer has not proven to understand SPDY.
    Unproven,
    /// It works.
    Proven,
    /// It has ended, and why.
    Ended(Arc<str>),
}

/// One session. Clones are the same one; it ends when it is told to, or when its connection does.
#[derive(Debug, Clone)]
pub(super) struct Session(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    phase: watch::Sender<Phase>,
}

impl Session {
    /// Starts a session on a connection that was just upgraded. It asks for a first sign of life at once. `ports` is what is
    /// known of the pod's ports, shared by the pod's sessions; transfers take `turns` with those of all sessions.
    pub(super) fn start<S>(
        io: S,
        ports: Arc<Ports>,
        slow_readers: SlowReaders,
        turns: Arc<Turns>,
        drain: &Drain,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let now = Instant::now();
        let mut state = State::new(ports, slow_readers, now);
        state.greet(now);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            phase: watch::Sender::new(Phase::Unproven),
        });
        drain.spawn(Driver::new(io, shared.clone(), Transfer::new(turns)));
        Self(shared)
    }

    /// Opens a connection to a port. Nothing is waited for: a failure shows when the stream is read or written. `apart`: it
    /// is to have the session for itself, as far as that is possible.
    pub(super) fn connect(&self, port: u16, apart: bool) -> PodStream {
        let key = self.0.lock().connect(port, apart, Instant::now());
        PodStream::new(self.0.clone(), key)
    }

    /// Tells what the session does.
    pub(super) fn load(&self) -> Load {
        self.0.lock().load(Instant::now())
    }

    /// Takes no new connections any more; the session ends with the last one.
    pub(super) fn retire(&self) {
        self.0.with(|state| state.retire());
    }

    /// Returns how the session stands, now and later.
    pub(super) fn phase(&self) -> watch::Receiver<Phase> {
        self.0.phase.subscribe()
    }
}

impl Shared {
    /// Locks what only plain code guards; a panic inside such code left it consistent.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something under the lock, and wakes whom it concerns after it.
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = act(&mut state);
        let woken = state.woken();
        drop(state);
        woken.into_iter().for_each(std::task::Waker::wake);
        result
    }
}
