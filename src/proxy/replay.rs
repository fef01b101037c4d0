//! A request's body that can be sent again: what was sent of it is kept, up to a limit, until the response has begun.
//!
//! The bytes kept are references to the buffers that were read anyway. A body that outgrows the limit can be sent only once.
//!
//! A body whose client expects to be told to send it (`Expect: 100-continue`, RFC 9110 section 10.1.1) is not read before the
//! pod has asked for it, and not at all if the pod answers first.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::proxy::body::{BoxError, ClientBody};
use crate::traffic::ByteCount;

/// How long the connection that failed may take to let go of the body; it only has to be polled once more.
const RETURN: Duration = Duration::from_secs(1);

/// How long a pod that does not say whether it wants the body is waited for: as long as curl waits for its server.
const EXPECTATION: Duration = Duration::from_secs(1);

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
    /// How many bytes are kept (contract G5).
    limit: usize,
    /// Whether the client waits to be told to send its body.
    expected: bool,
    /// Cancelled when the response has ended of a request whose body was not asked for.
    over: CancellationToken,
}

#[derive(Debug)]
struct State {
    /// The client's body, while no attempt has it.
    source: Option<ClientBody>,
    /// The number of the attempt that may take it.
    attempt: u32,
    /// What was read of it so far.
    kept: Vec<Bytes>,
    /// The trailers, once they were read.
    trailers: Option<HeaderMap>,
    /// How many bytes that is.
    size: usize,
    /// Whether something was read that is not kept.
    lost: bool,
    /// Whether the client's body has ended, and whether that was before it was complete.
    ended: bool,
    broken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the client's body, unless it is taken or a later attempt has begun.
    fn take(&self, attempt: u32) -> Option<ClientBody> {
        let mut state = self.lock();
        if state.attempt == attempt {
            state.source.take()
        } else {
            None
        }
    }
}

impl Replay {
    /// Takes the client's body, of which up to `limit` bytes are kept; those of its first reading are added to `count`.
    /// `expected`: the client waits to be told to send it.
    pub(crate) fn new(source: ClientBody, limit: usize, expected: bool, count: ByteCount) -> Self {
        let state = State {
            ended: source.is_end_stream(),
            source: Some(source),
            attempt: 0,
            kept: Vec::new(),
            trailers: None,
            size: 0,
            lost: false,
            broken: false,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                returned: Notify::new(),
                limit,
                expected,
                over: CancellationToken::new(),
            }),
            count,
        }
    }

    /// Makes the body of the next attempt. To be called only when [`recover`](Self::recover) said so, or for the first time.
    /// Where the client waits to be told to send it, the token is to be cancelled when the pod asks for it.
    pub(crate) fn body(&self) -> (RequestBody, Option<CancellationToken>) {
        let mut state = self.shared.lock();
        state.attempt += 1;
        let asked = self.shared.expected.then(CancellationToken::new);
        let body = RequestBody {
            shared: Some(self.shared.clone()),
            attempt: state.attempt,
            expectation: asked
                .clone()
                .map(|asked| Box::pin(wait(self.shared.clone(), state.attempt, asked)) as Expectation),
            source: None,
            next: 0,
            trailers_sent: false,
            count: self.count.clone(),
        };
        (body, asked)
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

    /// Whether an attempt still has the body: not all of it has been sent.
    pub(crate) fn is_under_way(&self) -> bool {
        self.shared.lock().source.is_none()
    }

    /// Whether the client broke off before its body was complete. What was read of it must not be taken for all of it.
    pub(crate) fn is_broken(&self) -> bool {
        self.shared.lock().broken
    }

    /// Keeps nothing from now on: the response has begun, and there will be no other attempt. Returns what must live until the
    /// response has ended if the body was not asked for; it will not be, and the connection cannot carry anything else.
    pub(crate) fn give_up(&self) -> Option<DropGuard> {
        let mut state = self.shared.lock();
        state.lost = true;
        state.kept = Vec::new();
        let unread = |source: &ClientBody| !source.is_end_stream();
        let unasked = self.shared.expected && !state.ended && state.source.as_ref().is_some_and(unread);
        unasked.then(|| {
            state.source = None;
            self.shared.over.clone().drop_guard()
        })
    }
}

/// The wait of an attempt whose client expects to be told to send the body. Fails when it is not to be sent.
type Expectation = Pin<Box<dyn Future<Output = Result<ClientBody, BoxError>> + Send>>;

async fn wait(shared: Arc<Shared>, attempt: u32, asked: CancellationToken) -> Result<ClientBody, BoxError> {
    let allowed = async {
        let _ = tokio::time::timeout(EXPECTATION, asked.cancelled()).await;
        match shared.take(attempt) {
            Some(source) => source,
            // The response has begun, and what is left of it shall pass.
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        source = allowed => Ok(source),
        () = shared.over.cancelled() => Err("the pod answered without asking for the body".into()),
    }
}

/// The body of a request on its way to a pod.
pub(crate) struct RequestBody {
    /// Nothing when the request has no body.
    shared: Option<Arc<Shared>>,
    attempt: u32,
    /// What must come before the first byte.
    expectation: Option<Expectation>,
    /// The client's body, once this attempt reads it.
    source: Option<ClientBody>,
    /// The next of the kept pieces.
    next: usize,
    trailers_sent: bool,
    count: ByteCount,
}

impl std::fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestBody")
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

impl RequestBody {
    /// Makes the body of a request that has none.
    pub(crate) fn empty() -> Self {
        Self {
            shared: None,
            attempt: 0,
            expectation: None,
            source: None,
            next: 0,
            trailers_sent: false,
            count: ByteCount::default(),
        }
    }

    /// Takes the client's body at the first reading of it.
    fn source(&mut self) -> Option<&mut ClientBody> {
        if self.source.is_none() {
            self.source = self.shared.as_ref().and_then(|shared| shared.take(self.attempt));
        }
        self.source.as_mut()
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
    fn note(&mut self, frame: Option<&Result<Frame<Bytes>, BoxError>>) {
        let Some(shared) = &self.shared else { return };
        let mut state = shared.lock();
        match frame {
            None => state.ended = true,
            // Read once more, the body would just end (`hyper::body::Incoming`).
            Some(Err(_)) => (state.broken, state.lost) = (true, true),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.count.add(data.len());
                    state.size += data.len();
                    if state.size > shared.limit {
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
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(expectation) = &mut self.expectation {
            let source = ready!(expectation.as_mut().poll(cx));
            self.expectation = None;
            match source {
                Ok(source) => self.source = Some(source),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        if let Some(frame) = self.replayed() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(source) = self.source() else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(source).poll_frame(cx));
        self.note(frame.as_ref());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let Some(shared) = &self.shared else { return true };
        let state = shared.lock();
        let replayed =
            state.lost || (self.next >= state.kept.len() && (self.trailers_sent || state.trailers.is_none()));
        let source = self.source.as_ref().or(state.source.as_ref());
        replayed && (state.ended || source.is_none_or(Body::is_end_stream))
    }

    fn size_hint(&self) -> SizeHint {
        let Some(shared) = &self.shared else {
            return SizeHint::with_exact(0);
        };
        let state = shared.lock();
        let kept = state.kept.iter().skip(self.next);
        let left: u64 = kept.map(|piece| piece.len() as u64).sum();
        let Some(source) = self.source.as_ref().or(state.source.as_ref()) else {
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
