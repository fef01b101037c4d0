//! The HTTP/2 connection to one port of one pod, shared by all its requests and opened once for all that wait.

use std::sync::{Arc, Mutex};

use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use crate::proxy::body::RequestBody;
use crate::proxy::upstream::cause::{Cause, Noted};
use crate::proxy::upstream::{Shared, lock};
use crate::transport::{ConnectError, Target};

/// Large enough for a bulk stream at the delays of a remote cluster: 2 MiB in flight are 20 MB/s at 100 ms.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// A connection, as its users see it.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) sender: SendRequest<RequestBody>,
    pub(super) cause: Cause,
}

type Waiting = oneshot::Sender<Result<Connection, ConnectError>>;

/// The connection to one port of one pod.
pub(super) struct Pool {
    target: Target,
    state: Mutex<State>,
}

struct State {
    current: Option<Connection>,
    /// Requests that wait for the connection being opened; one is being opened exactly while there are some.
    waiting: Vec<Waiting>,
    /// When the connection was last asked for.
    used: Instant,
}

impl Pool {
    pub(super) fn new(target: Target) -> Self {
        let state = State {
            current: None,
            waiting: Vec::new(),
            used: Instant::now(),
        };
        Self {
            target,
            state: Mutex::new(state),
        }
    }

    /// Gets the connection, and whether it was there already. Cancel-safe.
    pub(super) async fn checkout(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
    ) -> Result<(Connection, bool), ConnectError> {
        let waiting = {
            let mut state = lock(&self.state);
            state.used = Instant::now();
            match &state.current {
                Some(connection) if !connection.sender.is_closed() => return Ok((connection.clone(), true)),
                _ => state.current = None,
            }
            let (hand_over, waiting) = oneshot::channel();
            state.waiting.push(hand_over);
            if state.waiting.len() == 1 {
                let (pool, shared) = (self.clone(), shared.clone());
                shared
                    .drain
                    .clone()
                    .spawn(async move { pool.open(&shared).await });
            }
            waiting
        };
        let opened = waiting
            .await
            .unwrap_or_else(|_| Err(ConnectError::Unavailable("kube-tunnel is shutting down".into())));
        Ok((opened?, false))
    }

    async fn open(&self, shared: &Arc<Shared>) {
        let opened = self.connect(shared).await;
        let mut state = lock(&self.state);
        for waiting in state.waiting.drain(..) {
            let _ = waiting.send(opened.clone());
        }
        state.current = opened.ok();
    }

    async fn connect(&self, shared: &Arc<Shared>) -> Result<Connection, ConnectError> {
        let stream = shared.connect.connect(&self.target).await?;
        let cause = Cause::default();
        let (sender, connection) = http2::Builder::new(shared.drain.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(Noted::new(stream, cause.clone())))
            .await
            .map_err(|error| ConnectError::Unavailable(error.to_string()))?;
        let target = self.target.clone();
        shared.drain.spawn(async move {
            if let Err(error) = connection.await {
                debug!(%target, %error, "connection to the pod ended");
            }
        });
        Ok(Connection { sender, cause })
    }

    /// Closes the connection if nobody asked for it since `limit` and no stream is open. Returns whether anything is left.
    pub(super) fn expire(self: &Arc<Self>, limit: Instant) -> bool {
        let mut state = lock(&self.state);
        if state.used <= limit && state.waiting.is_empty() {
            // hyper keeps the connection up until the streams that are open on it have ended.
            state.current = None;
        }
        let alive = state
            .current
            .as_ref()
            .is_some_and(|connection| !connection.sender.is_closed());
        alive || !state.waiting.is_empty() || Arc::strong_count(self) > 1
    }
}
