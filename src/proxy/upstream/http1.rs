//! The HTTP/1.1 connections to one port of one pod.
//!
//! A request that finds no idle connection waits for the first of two: a connection that another request gives back, or
//! one that is being opened for it. Openings belong to the pool, not to the request that caused them, so that a client that
//! leaves wastes none, and only a few run at a time, so that a burst of first requests is no burst of handshakes. When the pod
//! has as many connections as it may have, the requests wait in order for one to come back or to end.

mod driver;
mod keeper;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::proxy::error::Error;
use crate::proxy::replay::RequestBody;
use crate::proxy::upstream::cause::{Cause, Noted};
use crate::proxy::upstream::http1::driver::Driver;
use crate::proxy::upstream::{Fresh, Peer, Shared, lock};
use crate::registry::Load;
use crate::transport::{Company, ConnectError};

/// How many connections are opened at the same time to one port of one pod.
const MAX_OPENING: usize = 16;

/// How many connections are kept without use for the idle time. What a burst needed beyond them is not held for minutes, since
/// each costs the container runtime file descriptors and threads, but for as long as the burst may still need it: many
/// clients leave as many connections idle between two of their requests.
const KEPT_IDLE: usize = 64;
pub(super) const SURPLUS: Duration = Duration::from_secs(10);

/// For how long nothing better is hoped for than a connection that others are in the way of, after a new one was no better, or did
/// not come about: as long as a transfer counts as one.
pub(super) const FUTILE: Duration = Duration::from_secs(2);

/// A connection, as its user sees it. Dropping it closes it.
pub(super) struct Connection {
    sender: SendRequest<RequestBody>,
    driver: Driver,
    pub(super) cause: Cause,
    company: Company,
    /// Its place among those that the pod may have.
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Sends a request and waits for the response's headers. Dropping the future gives up the connection.
    pub(super) async fn exchange(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        let Self {
            sender,
            driver,
            cause,
            ..
        } = self;
        cause.begin_request();
        let mut answer = pin!(sender.try_send_request(request));
        poll_fn(|cx| driver.poll_for(cx, |cx| answer.as_mut().poll(cx))).await
    }

    /// Polls the body of the response for its next frame.
    pub(super) fn poll_frame(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.driver.poll_for(cx, |cx| Pin::new(&mut *body).poll_frame(cx))
    }

    /// Lets it go on while nobody polls the response.
    pub(super) fn detach(&mut self) {
        self.driver.detach();
    }

    /// Waits until it can carry another request. Returns whether it can.
    pub(super) async fn ready(&mut self) -> bool {
        let Self { sender, driver, .. } = self;
        poll_fn(|cx| driver.poll_for(cx, |cx| sender.poll_ready(cx)))
            .await
            .is_ok()
    }

    /// Whether it can carry another request now.
    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Whether it will carry no other request.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Moves what can be moved between two requests. Returns whether it can still carry another one.
    fn is_alive(&mut self, cx: &mut Context<'_>) -> bool {
        self.driver.poll(cx);
        self.is_ready()
    }
}

/// The connections to one port of one pod.
pub(super) struct Pool {
    peer: Peer,
    /// Places for further connections.
    places: Arc<Semaphore>,
    state: Mutex<State>,
    /// How many connections there are.
    open: Arc<Load>,
}

type Waiting = oneshot::Sender<Result<(Connection, bool), Error>>;

#[derive(Default)]
struct State {
    /// Connections without a request, the most recently used last, and since when.
    idle: VecDeque<(Connection, Instant)>,
    /// Requests without a connection, in order of arrival. They are told whether theirs was in use before.
    waiting: VecDeque<Waiting>,
    /// How many connections are being opened.
    opening: usize,
    /// Until when a new connection is not expected to be better than one that others are in the way of.
    futile_until: Option<Instant>,
    /// Wakes who looks after the idle connections, while nothing happens to them.
    keeper: Option<Waker>,
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.wake();
        }
    }
}

impl Pool {
    /// Makes an empty pool for so many connections at most. Whoever looks after them is a task of `drain`.
    pub(super) fn start(peer: Peer, places: usize, drain: &Drain) -> Arc<Self> {
        let pool = Arc::new(Self {
            peer,
            places: Arc::new(Semaphore::new(places)),
            state: Mutex::default(),
            open: Arc::default(),
        });
        keeper::start(&pool, drain);
        pool
    }

    /// Gets a connection for one request, and whether it was in use before. Cancel-safe.
    pub(super) async fn checkout(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        fresh: Fresh,
    ) -> Result<(Connection, bool), Error> {
        let mut waiting = {
            let mut state = lock(&self.state);
            if fresh == Fresh::Yes {
                state.idle.clear();
            }
            let better = self.may_do_better(&state);
            if let Some(connection) = state.take_idle(better) {
                return Ok((connection, true));
            }
            let (hand_over, waiting) = oneshot::channel();
            state.waiting.push_back(hand_over);
            if state.opening < MAX_OPENING && state.opening < state.waiting.len() {
                state.opening += 1;
                let opening = Opening {
                    pool: self.clone(),
                    shared: shared.clone(),
                    counted: true,
                };
                shared.drain.spawn(opening.run());
            }
            waiting
        };
        loop {
            match tokio::time::timeout(shared.patience, &mut waiting).await {
                Ok(given) => return given.unwrap_or_else(|_| Err(shutting_down(&self.peer))),
                Err(_) if self.places.available_permits() == 0 => return Err(self.full(shared)),
                // A connection is being opened for it, which takes the time that it takes.
                Err(_) => {}
            }
        }
    }

    /// Takes a connection back that can carry another request.
    pub(super) fn put(&self, connection: Connection) {
        let mut state = lock(&self.state);
        let served = (1..=state.opening).contains(&state.waiting.len());
        if served && self.may_do_better(&state) && connection.company.is_in_the_way() {
            // Those who wait get a better one.
            state.keep(connection);
        } else {
            state.hand_over(connection, true);
        }
    }

    /// Tells whether a new connection may be better than one that others are in the way of.
    fn may_do_better(&self, state: &State) -> bool {
        let futile = state.futile_until.is_some_and(|until| until > Instant::now());
        !futile && self.places.available_permits() > 0
    }

    /// Waits until the pod may have another connection.
    async fn place(&self, shared: &Shared) -> OwnedSemaphorePermit {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            return place;
        }
        // Whoever counted on the last place may have come too late for it.
        lock(&self.state).hand_over_all();
        if shared.full.due().is_some() {
            warn!(
                endpoint = %self.peer.target,
                limit = shared.limits.connections_per_pod,
                "every connection to a pod is in use, further requests wait; --max-connections-per-pod allows more"
            );
        }
        let place = self.places.clone().acquire_owned().await;
        place.expect("the semaphore is never closed")
    }

    /// Tells a request that it has waited for long enough: whoever has the connections may never let go.
    fn full(&self, shared: &Shared) -> Error {
        unavailable(
            &self.peer,
            format!(
                "its {} connections have all been in use for {:?}; --max-connections-per-pod allows more",
                shared.limits.connections_per_pod, shared.patience
            ),
        )
    }

    async fn connect(&self, shared: &Arc<Shared>, place: OwnedSemaphorePermit) -> Result<Connection, Error> {
        let stream = shared.open(&self.peer).await?;
        let (cause, company) = (Cause::default(), stream.company());
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .max_headers(shared.limits.response_header_fields)
            .max_buf_size(shared.limits.response_header_bytes as usize)
            .handshake(TokioIo::new(Noted::new(stream, cause.clone())))
            .await
            .map_err(|error| unavailable(&self.peer, error.to_string()))?;
        let target = self.peer.target.clone();
        let open = self.open.begin();
        let moving = async move {
            let _open = open;
            if let Err(error) = connection.with_upgrades().await {
                debug!(endpoint = %target, %error, "connection to the pod ended");
            }
        };
        Ok(Connection {
            sender,
            driver: Driver::new(moving, &shared.drain),
            cause,
            company,
            _place: place,
        })
    }

    /// Returns how many connections there are.
    pub(super) fn open(&self) -> usize {
        self.open.get()
    }

    /// Closes connections that have been idle for this time, or that no burst needs any more. Returns whether anything is left.
    pub(super) fn expire(self: &Arc<Self>, now: Instant, idle_timeout: Duration) -> bool {
        let mut state = lock(&self.state);
        state
            .idle
            .retain(|(connection, since)| now.duration_since(*since) < idle_timeout && connection.is_ready());
        state.close_surplus(now);
        // A request that holds the pool may be about to give a connection back.
        !state.idle.is_empty()
            || !state.waiting.is_empty()
            || state.opening > 0
            || Arc::strong_count(self) > 1
    }
}

impl State {
    /// Ends an opening if there are more of them than requests that wait. It is no longer counted then, so that a request
    /// that comes next starts one of its own.
    fn ends(&mut self, counted: &mut bool) -> bool {
        self.waiting.retain(|waiting| !waiting.is_closed());
        if self.waiting.len() >= self.opening {
            return false;
        }
        self.opening -= 1;
        *counted = false;
        true
    }

    /// Takes the idle connection that was used last, without those that others are in the way of if there may be a better one.
    fn take_idle(&mut self, better: bool) -> Option<Connection> {
        loop {
            let fits =
                |(connection, _): &(Connection, Instant)| !better || !connection.company.is_in_the_way();
            let index = self.idle.iter().rposition(fits)?;
            let (mut connection, _) = self.idle.remove(index)?;
            if connection.is_alive(&mut Context::from_waker(Waker::noop())) {
                return Some(connection);
            }
        }
    }

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
        if !used {
            // A refusal is to be known before a request counts on it: the stream opens when it is first polled.
            connection.is_alive(&mut Context::from_waker(Waker::noop()));
        }
        self.keep(connection);
    }

    /// Gives idle connections to those who wait, whatever is beside them: they are better than none.
    fn hand_over_all(&mut self) {
        while !self.waiting.is_empty()
            && let Some(connection) = self.take_idle(false)
        {
            self.hand_over(connection, true);
        }
    }

    fn keep(&mut self, connection: Connection) {
        self.idle.push_back((connection, Instant::now()));
        if let Some(keeper) = self.keeper.take() {
            keeper.wake();
        }
    }

    /// Closes the connections that have been idle for longest, as far as nothing needed them lately.
    fn close_surplus(&mut self, now: Instant) {
        let surplus = self.idle.len().saturating_sub(KEPT_IDLE);
        let unneeded = self
            .idle
            .iter()
            .take(surplus)
            .take_while(|(_, since)| now.duration_since(*since) >= SURPLUS)
            .count();
        self.idle.drain(..unneeded);
    }
}

/// One of the openings that run; counted until it is dropped, however it ends.
struct Opening {
    pool: Arc<Pool>,
    shared: Arc<Shared>,
    /// Whether it still is.
    counted: bool,
}

impl Opening {
    /// Opens connections until as many openings run as requests wait.
    async fn run(mut self) {
        loop {
            let place = self.pool.place(&self.shared).await;
            if lock(&self.pool.state).ends(&mut self.counted) {
                return; // what was waited for has come back meanwhile
            }
            let opened = self.pool.connect(&self.shared, place).await;
            let mut state = lock(&self.pool.state);
            if opened
                .as_ref()
                .map_or(true, |connection| connection.company.is_in_the_way())
            {
                state.futile_until = Some(Instant::now() + FUTILE);
                state.hand_over_all();
            }
            match opened {
                Ok(connection) => state.hand_over(connection, false),
                // The last opening speaks for everybody who waits; the others have companions that may still succeed.
                Err(error) if state.opening == 1 => {
                    for waiting in state.waiting.drain(..) {
                        let _ = waiting.send(Err(error.clone()));
                    }
                }
                Err(error) => {
                    if let Some(waiting) = state.waiting.pop_front() {
                        let _ = waiting.send(Err(error));
                    }
                }
            }
            if state.ends(&mut self.counted) {
                return;
            }
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        // Cut off by shutdown or a panic.
        let mut state = lock(&self.pool.state);
        state.opening -= 1;
        if state.opening == 0 {
            state.waiting.clear(); // nobody is left to serve them
        }
    }
}

pub(super) fn shutting_down(peer: &Peer) -> Error {
    unavailable(peer, "kube-tunnel is shutting down".into())
}

pub(super) fn unavailable(peer: &Peer, reason: String) -> Error {
    Error::Connect(peer.target.clone(), ConnectError::Unavailable(reason))
}

#[cfg(test)]
mod tests;
