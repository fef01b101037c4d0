//! Interim responses (1xx) on an HTTP/1.1 connection whose HTTP library has no means to send them.
//!
//! They are written into the stream where the library's own messages touch: after it has flushed all that it had and before
//! it writes the next byte, which is the first of the final response.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut, BytesMut};
use http::{HeaderMap, StatusCode};
use tokio::io::AsyncWrite;
use tracing::debug;

use crate::proxy::http::headers::strip_hop_by_hop;

/// What may wait for a client that does not read: a few heads with hints.
const MAX_WAITING: usize = 64 << 10;

/// The interim responses that are on their way out.
#[derive(Debug, Default)]
pub(super) struct Interim(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What is still to be written of them.
    waiting: BytesMut,
    /// Whether the library has written nothing since it last flushed all it had.
    between: bool,
    /// The task that writes.
    writer: Option<Waker>,
}

impl Interim {
    /// Adds one. It is left out where it cannot be placed: when earlier bytes of the library have yet to leave.
    pub(super) fn push(&self, status: StatusCode, headers: &HeaderMap) {
        let mut state = self.lock();
        if !state.between || state.waiting.len() > MAX_WAITING {
            return debug!(%status, "interim response left out: the client does not read");
        }
        let mut headers = headers.clone();
        strip_hop_by_hop(&mut headers);
        let waiting = &mut state.waiting;
        waiting.put_slice(b"HTTP/1.1 ");
        waiting.put_slice(status.as_str().as_bytes());
        waiting.put_slice(b" ");
        waiting.put_slice(status.canonical_reason().unwrap_or_default().as_bytes());
        waiting.put_slice(b"\r\n");
        for (name, value) in &headers {
            waiting.put_slice(name.as_str().as_bytes());
            waiting.put_slice(b": ");
            waiting.put_slice(value.as_bytes());
            waiting.put_slice(b"\r\n");
        }
        waiting.put_slice(b"\r\n");
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }

    /// Notes that the library writes bytes of its own.
    pub(super) fn began(&self) {
        self.lock().between = false;
    }

    /// Notes that the library has nothing left to write, and who is to be woken for more.
    pub(super) fn flushed(&self, writer: &Waker) {
        let mut state = self.lock();
        state.between = true;
        if !state.writer.as_ref().is_some_and(|known| known.will_wake(writer)) {
            state.writer = Some(writer.clone());
        }
    }

    /// Writes what is waiting, all of it before anything else.
    pub(super) fn poll_write_to<S: AsyncWrite + Unpin>(
        &self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        let mut state = self.lock();
        while state.waiting.has_remaining() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &state.waiting))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            state.waiting.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
