//! The HTTP/1.1 connections to one port of one pod.
//!
//! A request that finds no idle connection waits for the first of two: a connection that another request gives back, or
//! one that is being opened for it. Openings belong to the pool, not to the request that caused them, so that a client that
//! leaves wastes none, and only a few run at a time, so that a burst of first requests is no burst of handshakes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use crate::drain::Drain;
use crate::proxy::body::RequestBody;
use crate::proxy::upstream::cause::{Cause, Noted};
use crate::proxy::upstream::{Shared, lock};
use crate::transport::{ConnectError, Target};

/// How many connections are opened at the same time to one port of one pod.
const MAX_OPENING: usize = 16;

/// A connection, as its user sees it.
pub(super) struct Connection {
    pub(super) sender: SendRequest<RequestBody>,
    pub(super) cause: Cause,
}

/// The connections to one port of one pod.
pub(super) struct Pool {
    target: Target,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections without a request, the most recently used last.
    idle: Vec<(Connection, Instant)>,
    /// Requests without a connection, in order of arrival. The flag says whether the connection was in use before.
    waiting: VecDeque<oneshot::Sender<Result<(Connection, bool), ConnectError>>>,
    /// How many connections are being opened.
    opening: usize,
}

impl Pool {
    pub(super) fn new(target: Target) -> Self {
        Self {
            target,
            state: Mutex::default(),
        }
    }

    /// Gets a connection for one request, and whether it was in use before. Cancel-safe.
    pub(super) async fn checkout(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
    ) -> Result<(Connection, bool), ConnectError> {
        let waiting = {
            let mut state = lock(&self.state);
            while let Some((connection, _)) = state.idle.pop() {
                if connection.sender.is_ready() {
                    return Ok((connection, true));
                }
            }
            let (hand_over, waiting) = oneshot::channel();
            state.waiting.push_back(hand_over);
            if state.opening < MAX_OPENING && state.opening < state.waiting.len() {
                state.opening += 1;
                let (pool, shared) = (self.clone(), shared.clone());
                shared
                    .drain
                    .clone()
                    .spawn(async move { pool.open(&shared).await });
            }
            waiting
        };
        // The opener is dropped unfinished only when shutdown is forced.
        waiting
            .await
            .unwrap_or_else(|_| Err(ConnectError::Unavailable("kube-tunnel is shutting down".into())))
    }

    /// Opens connections until as many openings run as requests wait.
    async fn open(self: Arc<Self>, shared: &Arc<Shared>) {
        loop {
            let opened = self.connect(shared).await;
            let mut state = lock(&self.state);
            match opened {
                Ok(connection) => state.hand_over(connection, false),
                Err(error) => {
                    // Every waiter would fail the same way; each decides for itself whether to try again.
                    for waiting in state.waiting.drain(..) {
                        let _ = waiting.send(Err(error.clone()));
                    }
                }
            }
            state.waiting.retain(|waiting| !waiting.is_closed());
            if state.waiting.len() < state.opening {
                state.opening -= 1;
                return;
            }
        }
    }

    async fn connect(&self, shared: &Arc<Shared>) -> Result<Connection, ConnectError> {
        let stream = shared.connect.connect(&self.target).await?;
        let cause = Cause::default();
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .handshake(TokioIo::new(Noted::new(stream, cause.clone())))
            .await
            .map_err(|error| ConnectError::Unavailable(error.to_string()))?;
        let target = self.target.clone();
        shared.drain.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%target, %error, "connection to the pod ended");
            }
        });
        Ok(Connection { sender, cause })
    }

    /// Closes connections that have been idle since `limit` or longer. Returns whether anything is left.
    pub(super) fn expire(self: &Arc<Self>, limit: Instant) -> bool {
        let mut state = lock(&self.state);
        state
            .idle
            .retain(|(connection, since)| *since > limit && connection.sender.is_ready());
        // A request that holds the pool may be about to give a connection back.
        !state.idle.is_empty()
            || !state.waiting.is_empty()
            || state.opening > 0
            || Arc::strong_count(self) > 1
    }
}

impl State {
    /// Gives a connection to the first request that still waits, or keeps it.
    fn hand_over(&mut self, connection: Connection, used: bool) {
        let mut connection = connection;
        while let Some(waiting) = self.waiting.pop_front() {
            match waiting.send(Ok((connection, used))) {
                Ok(()) => return,
                Err(Ok((back, _))) => connection = back,
                Err(Err(_)) => unreachable!("what comes back is what was sent"),
            }
        }
        self.idle.push((connection, Instant::now()));
    }
}

/// A connection that carries a response; it goes back to its pool when the response is complete. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Lease(Option<Box<Held>>);

struct Held {
    pool: Arc<Pool>,
    connection: Connection,
    drain: Drain,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held")
            .field("target", &self.pool.target)
            .finish_non_exhaustive()
    }
}

impl Lease {
    pub(super) fn new(pool: Arc<Pool>, connection: Connection, drain: Drain) -> Self {
        Self(Some(Box::new(Held {
            pool,
            connection,
            drain,
        })))
    }

    /// Makes the lease of a connection that is shared and need not be given back.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Gives the connection back, to be called when the response's body has been read to its end.
    pub(crate) fn give_back(self) {
        let Some(held) = self.0 else { return };
        let Held {
            pool,
            mut connection,
            drain,
        } = *held;
        if connection.sender.is_ready() {
            lock(&pool.state).hand_over(connection, true);
        } else if !connection.sender.is_closed() {
            // The connection's task has yet to see the end of the message, or is still sending the request's body.
            drain.spawn(async move {
                if connection.sender.ready().await.is_ok() {
                    lock(&pool.state).hand_over(connection, true);
                }
            });
        }
    }
}
