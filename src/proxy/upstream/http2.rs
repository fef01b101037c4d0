//! The HTTP/2 connections to one port of one pod: one, shared by all requests, and another only when the pod's limit of
//! streams is reached on each.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use crate::proxy::error::Error;
use crate::proxy::replay::RequestBody;
use crate::proxy::upstream::cause::{Cause, Noted};
use crate::proxy::upstream::http1::{shutting_down, unavailable};
use crate::proxy::upstream::{Fresh, Peer, Shared, lock};
use crate::registry::Load;

/// Large enough for a bulk stream at the delays of a remote cluster: 2 MiB in flight are 20 MB/s at 100 ms.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// One connection.
#[derive(Clone)]
struct Connection {
    sender: SendRequest<RequestBody>,
    cause: Cause,
    /// How many streams we have on it.
    streams: Arc<AtomicUsize>,
    /// How many the pod allows, as its task last learned.
    limit: Arc<AtomicUsize>,
}

/// The right to one stream of a connection.
pub(super) struct Stream {
    pub(super) sender: SendRequest<RequestBody>,
    pub(super) cause: Cause,
    pub(super) slot: Slot,
}

/// Counts one stream until it is dropped.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    /// Takes a stream if the pod's limit leaves one. Called under the pool's lock.
    fn stream(&self) -> Option<Stream> {
        if self.sender.is_closed()
            || self.streams.load(Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed)
        {
            return None;
        }
        self.streams.fetch_add(1, Ordering::Relaxed);
        Some(Stream {
            sender: self.sender.clone(),
            cause: self.cause.clone(),
            slot: Slot(self.streams.clone()),
        })
    }
}

/// The connections to one port of one pod.
pub(super) struct Pool {
    peer: Peer,
    state: Mutex<State>,
    /// How many connections there are.
    open: Arc<Load>,
}

struct State {
    connections: Vec<Connection>,
    /// Requests that wait for the connection being opened.
    waiting: Vec<oneshot::Sender<Result<Stream, Error>>>,
    /// Whether one is being opened.
    opening: bool,
    /// When a connection was last asked for.
    used: Instant,
}

impl Pool {
    pub(super) fn new(peer: Peer) -> Self {
        let state = State {
            connections: Vec::new(),
            waiting: Vec::new(),
            opening: false,
            used: Instant::now(),
        };
        Self {
            peer,
            state: Mutex::new(state),
            open: Arc::default(),
        }
    }

    /// Gets a stream, and whether its connection was there already. Cancel-safe.
    pub(super) async fn checkout(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        fresh: Fresh,
    ) -> Result<(Stream, bool), Error> {
        let waiting = {
            let mut state = lock(&self.state);
            state.used = Instant::now();
            if fresh == Fresh::Yes {
                state.connections.clear(); // streams that are open on them go on
            }
            state
                .connections
                .retain(|connection| !connection.sender.is_closed());
            if let Some(stream) = state.connections.iter().find_map(Connection::stream) {
                return Ok((stream, true));
            }
            let (hand_over, waiting) = oneshot::channel();
            state.waiting.push(hand_over);
            if !state.opening {
                state.opening = true;
                let opening = Opening {
                    pool: self.clone(),
                    shared: shared.clone(),
                };
                shared.drain.spawn(opening.run());
            }
            waiting
        };
        let stream = waiting.await.unwrap_or_else(|_| Err(shutting_down(&self.peer)))?;
        Ok((stream, false))
    }

    async fn connect(&self, shared: &Arc<Shared>) -> Result<Connection, Error> {
        let stream = shared.open(&self.peer).await?;
        let cause = Cause::default();
        let (sender, mut connection) = http2::Builder::new(shared.drain.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(shared.limits.response_header_bytes)
            .handshake(TokioIo::new(Noted::new(stream, cause.clone())))
            .await
            .map_err(|error| unavailable(&self.peer, error.to_string()))?;
        let limit = Arc::new(AtomicUsize::new(connection.current_max_send_streams()));
        let (target, known) = (self.peer.target.clone(), limit.clone());
        let open = self.open.begin();
        shared.drain.spawn(async move {
            let _open = open;
            let running = poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                known.store(connection.current_max_send_streams(), Ordering::Relaxed);
                ended
            });
            if let Err(error) = running.await {
                debug!(endpoint = %target, %error, "connection to the pod ended");
            }
        });
        Ok(Connection {
            sender,
            cause,
            streams: Arc::default(),
            limit,
        })
    }

    /// Returns how many connections there are.
    pub(super) fn open(&self) -> usize {
        self.open.get()
    }

    /// Closes the connections if nobody asked for one for this time. Returns whether anything is left.
    pub(super) fn expire(self: &Arc<Self>, now: Instant, idle_timeout: Duration) -> bool {
        let mut state = lock(&self.state);
        if now.duration_since(state.used) >= idle_timeout && !state.opening {
            // hyper keeps a connection up until the streams that are open on it have ended.
            state.connections.clear();
        }
        state
            .connections
            .retain(|connection| !connection.sender.is_closed());
        !state.connections.is_empty() || state.opening || Arc::strong_count(self) > 1
    }
}

/// The opening of a connection; however it ends, the pool knows that it has.
struct Opening {
    pool: Arc<Pool>,
    shared: Arc<Shared>,
}

impl Opening {
    /// Opens connections until every request that waits has a stream.
    async fn run(self) {
        loop {
            let opened = self.pool.connect(&self.shared).await;
            let mut state = lock(&self.pool.state);
            let waiting = std::mem::take(&mut state.waiting);
            match opened {
                Err(error) => {
                    for waiting in waiting {
                        let _ = waiting.send(Err(error.clone()));
                    }
                }
                Ok(connection) => {
                    for waiting in waiting {
                        match connection.stream() {
                            // Gone with a client that left, the stream is free again.
                            Some(stream) => drop(waiting.send(Ok(stream))),
                            None => state.waiting.push(waiting),
                        }
                    }
                    state.connections.push(connection);
                }
            }
            if state.waiting.is_empty() {
                state.opening = false; // under the lock, so that the next request starts an opening of its own
                return;
            }
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        if !state.waiting.is_empty() && state.opening {
            // Cut off by shutdown or a panic.
            state.opening = false;
            state.waiting.clear();
        }
    }
}
