//! A request's body that can be sent again: what was sent of it is kept, up to a limit, until the response has begun.
//!
//! The bytes kept are references to the buffers that were read anyway. A body that outgrows the limit can be sent only once.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::Notify;

use crate::traffic::ByteCount;

/// What is kept of one body (contract G5).
const LIMIT: usize = 64 << 10;

/// How long the connection that failed may take to let go of the body; it only has to be polled once more.
const RETURN: Duration = Duration::from_secs(1);

/// A request's body between its attempts.
#[derive(Debug)]
pub(crate) struct Replay {
    shared: Arc<Shared>,
    count: ByteCount,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told when the client's body comes back.
    returned: Notify,
}

#[derive(Debug)]
struct State {
    /// The client's body, while no attempt has it.
    source: Option<Incoming>,
    /// What was read of it so far.
    kept: Vec<Bytes>,
    /// The trailers, once they were read.
    trailers: Option<HeaderMap>,
    /// How many bytes that is.
    size: usize,
    /// Whether something was read that is not kept.
    lost: bool,
    /// Whether the client's body has ended.
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replay {
    /// Takes the client's body; the bytes of its first reading are added to `count`.
    pub(crate) fn new(source: Incoming, count: ByteCount) -> Self {
        let state = State {
            ended: source.is_end_stream(),
            source: Some(source),
            kept: Vec::new(),
            trailers: None,
            size: 0,
            lost: false,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                returned: Notify::new(),
            }),
            count,
        }
    }

    /// Makes the body of the next attempt. To be called only when [`recover`](Self::recover) said so, or for the first time.
    pub(crate) fn body(&self) -> RequestBody {
        let source = self.shared.lock().source.take();
        RequestBody {
            shared: Some(self.shared.clone()),
            source,
            next: 0,
            trailers_sent: false,
            count: self.count.clone(),
        }
    }

    /// Waits until the failed attempt has let go of the body. Returns whether all of it can be sent again.
    pub(crate) async fn recover(&self) -> bool {
        let waiting = async {
            loop {
                let returned = self.shared.returned.notified();
                {
                    let state = self.shared.lock();
                    if state.lost {
                        return false;
                    }
                    if state.source.is_some() {
                        return true;
                    }
                }
                returned.await;
            }
        };
        tokio::time::timeout(RETURN, waiting).await.unwrap_or(false)
    }

    /// Keeps nothing from now on: the response has begun, and there will be no other attempt.
    pub(crate) fn give_up(&self) {
        let mut state = self.shared.lock();
        state.lost = true;
        state.kept = Vec::new();
    }
}

/// The body of a request on its way to a pod.
#[derive(Debug)]
pub(crate) struct RequestBody {
    /// Nothing when the request has no body.
    shared: Option<Arc<Shared>>,
    source: Option<Incoming>,
    /// The next of the kept pieces.
    next: usize,
    trailers_sent: bool,
    count: ByteCount,
}

impl RequestBody {
    /// Makes the body of a request that has none.
    pub(crate) fn empty() -> Self {
        Self {
            shared: None,
            source: None,
            next: 0,
            trailers_sent: false,
            count: ByteCount::default(),
        }
    }

    /// Returns a kept piece that this attempt has not sent yet.
    fn replayed(&mut self) -> Option<Frame<Bytes>> {
        let state = self.shared.as_ref()?.lock();
        if let Some(piece) = state.kept.get(self.next) {
            self.next += 1;
            return Some(Frame::data(piece.clone()));
        }
        let trailers = state.trailers.clone().filter(|_| !self.trailers_sent)?;
        self.trailers_sent = true;
        Some(Frame::trailers(trailers))
    }

    /// Notes a piece that was read for the first time.
    fn note(&mut self, frame: Option<&Frame<Bytes>>) {
        let Some(shared) = &self.shared else { return };
        let mut state = shared.lock();
        match frame {
            None => state.ended = true,
            Some(frame) => {
                if let Some(data) = frame.data_ref() {
                    self.count.add(data.len());
                    state.size += data.len();
                    if state.size > LIMIT {
                        state.lost = true;
                        state.kept = Vec::new();
                    }
                    if !state.lost {
                        state.kept.push(data.clone());
                        self.next += 1;
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    state.trailers = Some(trailers.clone());
                    self.trailers_sent = true;
                }
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(frame) = self.replayed() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(source) = self.source.as_mut() else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(source).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.note(Some(frame)),
            None => self.note(None),
            Some(Err(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let Some(shared) = &self.shared else { return true };
        let state = shared.lock();
        let replayed =
            state.lost || (self.next >= state.kept.len() && (self.trailers_sent || state.trailers.is_none()));
        replayed && (state.ended || self.source.as_ref().is_none_or(Body::is_end_stream))
    }

    fn size_hint(&self) -> SizeHint {
        let left = self.shared.as_ref().map_or(0, |shared| {
            let state = shared.lock();
            state
                .kept
                .iter()
                .skip(self.next)
                .map(|piece| piece.len() as u64)
                .sum()
        });
        let Some(source) = &self.source else {
            return SizeHint::with_exact(left);
        };
        let rest = source.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(left + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(left + upper);
        }
        hint
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let (Some(shared), Some(source)) = (&self.shared, self.source.take()) {
            shared.lock().source = Some(source);
            shared.returned.notify_waiters();
        }
    }
}
