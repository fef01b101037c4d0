//! The HTTP/2 connections to one port of one pod: one, shared by all requests, and another when the pod's limit of streams is
//! reached on each, or others are in the way of each.

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
use crate::proxy::upstream::http1::{FUTILE, shutting_down, unavailable};
use crate::proxy::upstream::{Fresh, Peer, Shared, lock};
use crate::registry::Load;
use crate::transport::Company;

/// Large enough for a bulk stream at the delays of a remote cluster: 2 MiB in flight are 20 MB/s at 100 ms.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// How many connections there may be because others are in the way of each.
const EVASIONS: usize = 4;

/// How long a better connection is waited for while there is one that others are in the way of.
const PATIENCE: Duration = Duration::from_millis(500);

/// One connection.
#[derive(Clone)]
struct Connection {
    sender: SendRequest<RequestBody>,
    cause: Cause,
    company: Company,
    /// How many streams we have on it.
    streams: Arc<AtomicUsize>,
    /// How many the pod allows, as its task last learned.
    limit: Arc<AtomicUsize>,
    /// When it was last seen to have one.
    used: Instant,
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
    fn stream(&mut self, now: Instant) -> Option<Stream> {
        if self.sender.is_closed()
            || self.streams.load(Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed)
        {
            return None;
        }
        self.used = now;
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

/// A request that waits is told whether its connection was there already.
type Waiting = oneshot::Sender<Result<(Stream, bool), Error>>;

struct State {
    connections: Vec<Connection>,
    /// Requests that wait for the connection being opened.
    waiting: Vec<Waiting>,
    /// Whether one is being opened.
    opening: bool,
    /// Until when a new connection is not expected to be better than one that others are in the way of.
    futile_until: Option<Instant>,
}

impl State {
    /// Takes a stream of a connection, without those that others are in the way of if there may be a better one.
    fn stream(&mut self, now: Instant) -> Option<Stream> {
        let futile = self.futile_until.is_some_and(|until| until > now);
        let may_do_better = !futile && self.connections.len() < EVASIONS;
        let clear = |connection: &&mut Connection| !connection.company.is_in_the_way();
        let stream = self
            .connections
            .iter_mut()
            .filter(clear)
            .find_map(|connection| connection.stream(now));
        match stream {
            None if !may_do_better => self.any_stream(now),
            stream => stream,
        }
    }

    fn any_stream(&mut self, now: Instant) -> Option<Stream> {
        let mut connections = self.connections.iter_mut();
        connections.find_map(|connection| connection.stream(now))
    }
}

impl Pool {
    pub(super) fn new(peer: Peer) -> Self {
        let state = State {
            connections: Vec::new(),
            waiting: Vec::new(),
            opening: false,
            futile_until: None,
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
        let mut waiting = {
            let mut state = lock(&self.state);
            if fresh == Fresh::Yes {
                state.connections.clear(); // streams that are open on them go on
            }
            state
                .connections
                .retain(|connection| !connection.sender.is_closed());
            if let Some(stream) = state.stream(Instant::now()) {
                return Ok((stream, true));
            }
            let (hand_over, waiting) = oneshot::channel();
            state.waiting.push(hand_over);
            if !state.opening {
                state.opening = true;
                let opening = Opening {
                    pool: self.clone(),
                    shared: shared.clone(),
                    done: false,
                };
                shared.drain.spawn(opening.run());
            }
            waiting
        };
        loop {
            match tokio::time::timeout(PATIENCE, &mut waiting).await {
                Ok(given) => return given.unwrap_or_else(|_| Err(shutting_down(&self.peer))),
                Err(_) => {
                    if let Some(stream) = lock(&self.state).any_stream(Instant::now()) {
                        return Ok((stream, true));
                    }
                }
            }
        }
    }

    async fn connect(&self, shared: &Arc<Shared>) -> Result<Connection, Error> {
        let stream = shared.open(&self.peer).await?;
        let (cause, company) = (Cause::default(), stream.company());
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
            company,
            streams: Arc::default(),
            limit,
            used: Instant::now(),
        })
    }

    /// Returns how many connections there are.
    pub(super) fn open(&self) -> usize {
        self.open.get()
    }

    /// Closes connections that have had no stream for this time. Returns whether anything is left.
    pub(super) fn expire(self: &Arc<Self>, now: Instant, idle_timeout: Duration) -> bool {
        let mut state = lock(&self.state);
        state.connections.retain_mut(|connection| {
            if connection.streams.load(Ordering::Relaxed) > 0 {
                connection.used = now;
            }
            now.duration_since(connection.used) < idle_timeout && !connection.sender.is_closed()
        });
        !state.connections.is_empty() || state.opening || Arc::strong_count(self) > 1
    }
}

/// The opening of a connection; however it ends, the pool knows that it has.
struct Opening {
    pool: Arc<Pool>,
    shared: Arc<Shared>,
    /// Whether the pool knows already; another may run by then.
    done: bool,
}

impl Opening {
    /// Opens connections until every request that waits has a stream.
    async fn run(mut self) {
        loop {
            let opened = self.pool.connect(&self.shared).await;
            let mut state = lock(&self.pool.state);
            let (waiting, now) = (std::mem::take(&mut state.waiting), Instant::now());
            let better = opened.as_ref().is_ok_and(|new| !new.company.is_in_the_way());
            if !better {
                state.futile_until = Some(now + FUTILE);
            }
            match opened {
                Err(error) => {
                    for waiting in waiting {
                        // What others are in the way of is better than nothing.
                        let stream = state.any_stream(now).ok_or_else(|| error.clone());
                        let _ = waiting.send(stream.map(|stream| (stream, true)));
                    }
                }
                Ok(mut connection) => {
                    for waiting in waiting {
                        match connection.stream(now) {
                            // Gone with a client that left, the stream is free again.
                            Some(stream) => drop(waiting.send(Ok((stream, false)))),
                            None => state.waiting.push(waiting),
                        }
                    }
                    state.connections.push(connection);
                }
            }
            if state.waiting.is_empty() {
                self.done = true;
                state.opening = false; // under the lock, so that the next request starts an opening of its own
                return;
            }
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.done {
            // Cut off by shutdown or a panic.
            let mut state = lock(&self.pool.state);
            state.opening = false;
            state.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::upstream::Wire;
    use crate::proxy::upstream::nobody::{self, Way};

    struct Scene {
        way: Arc<Way>,
        pool: Arc<Pool>,
        shared: Arc<Shared>,
    }

    impl Scene {
        /// A pool with one connection.
        async fn new() -> Self {
            let way = Arc::new(Way::default());
            let scene = Self {
                pool: Arc::new(Pool::new(nobody::peer(Wire::H2c))),
                shared: nobody::shared(way.clone(), 1),
                way,
            };
            scene.checkout().await;
            scene
        }

        async fn checkout(&self) -> Stream {
            let checkout = self.pool.checkout(&self.shared, Fresh::No).await;
            checkout.unwrap_or_else(|error| panic!("{error}")).0
        }

        /// How many connections have been opened when others are in the way of the first few.
        async fn opened(&self, in_the_way: usize, requests: usize) -> usize {
            self.way.bulk.store(in_the_way, Ordering::Relaxed);
            for _ in 0..requests {
                self.checkout().await;
            }
            self.way.opened.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_leave_a_connection_that_others_are_in_the_way_of() {
        let scene = Scene::new().await;
        assert_eq!(scene.opened(0, 10).await, 1);
        for in_the_way in 1..EVASIONS {
            assert_eq!(scene.opened(in_the_way, 10).await, in_the_way + 1);
        }
        assert_eq!(scene.opened(EVASIONS, 10).await, EVASIONS, "not without end");
    }

    #[tokio::test(start_paused = true)]
    async fn where_a_new_connection_was_no_better_the_old_one_does_for_a_while() {
        let scene = Scene::new().await;
        assert_eq!(scene.opened(usize::MAX, 10).await, 2);
        tokio::time::advance(FUTILE).await;
        assert_eq!(scene.opened(usize::MAX, 10).await, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_end_when_they_have_had_no_stream_for_the_idle_time() {
        const IDLE: Duration = Duration::from_secs(600);
        let scene = Scene::new().await;
        scene.opened(1, 1).await;
        let stream = scene.checkout().await;
        let (first, connections) = (Instant::now(), || lock(&scene.pool.state).connections.len());
        assert!(scene.pool.expire(first + IDLE - Duration::from_secs(1), IDLE));
        assert_eq!(connections(), 2);
        assert!(scene.pool.expire(first + 2 * IDLE, IDLE), "one has a stream");
        assert_eq!(connections(), 1);
        drop(stream);
        assert!(scene.pool.expire(first + 3 * IDLE - Duration::from_secs(1), IDLE));
        assert!(!scene.pool.expire(first + 3 * IDLE, IDLE));
    }
}
