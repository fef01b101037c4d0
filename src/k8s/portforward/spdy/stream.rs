//! A connection to a pod's port, as its user sees it.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BufMut as _;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::io::poll_read_buf;

use crate::k8s::portforward::spdy::Shared;
use crate::k8s::portforward::spdy::chunks::Chunk;
use crate::transport::{Company, Stream};

/// How much of a client's is received at once where it goes straight into a frame.
const RECEIVE: usize = 256 << 10;

/// A byte stream to a pod's port. It is opened when it is first used.
///
/// Errors are of kind `ConnectionRefused` or `NotConnected` when no byte that was written can have reached the application.
/// Flushing does nothing: what was written leaves as soon as the connection takes it. Shutting down ends our half at once if
/// the pod spoke last; while an answer is awaited the end is held back, since container runtimes cut the answer off a second
/// after it.
pub(in crate::k8s::portforward) struct PodStream {
    shared: Arc<Shared>,
    key: usize,
    /// What is being read.
    chunk: Option<Chunk>,
}

impl fmt::Debug for PodStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodStream")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl PodStream {
    pub(super) fn new(shared: Arc<Shared>, key: usize) -> Self {
        Self {
            shared,
            key,
            chunk: None,
        }
    }
}

impl Stream for PodStream {
    fn company(&self) -> Company {
        let (shared, key) = (self.shared.clone(), self.key);
        Company::new(move || shared.lock().is_in_the_way_of(key, Instant::now()))
    }

    fn poll_send_from(
        &mut self,
        source: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Option<Poll<io::Result<usize>>> {
        let (key, now) = (self.key, Instant::now());
        self.shared.with(|state| {
            state.poll_append(key, now, cx, |out, room, cx| {
                out.reserve(room.min(RECEIVE));
                poll_read_buf(Pin::new(source), cx, &mut out.limit(room))
            })
        })
    }
}

impl AsyncBufRead for PodStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.chunk.as_ref().is_none_or(|chunk| chunk.rest().is_empty()) {
            let (key, read) = (this.key, this.chunk.take());
            let now = Instant::now();
            this.chunk = ready!(this.shared.with(|state| state.poll_chunk(key, read, now, cx)))?;
        }
        Poll::Ready(Ok(this.chunk.as_ref().map_or(&[], Chunk::rest)))
    }

    fn consume(mut self: Pin<&mut Self>, count: usize) {
        if let Some(chunk) = &mut self.chunk {
            chunk.advance(count);
        }
    }
}

impl AsyncRead for PodStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = ready!(self.as_mut().poll_fill_buf(cx))?;
        let count = rest.len().min(buf.remaining());
        let (taken, _) = rest.split_at(count);
        buf.put_slice(taken);
        self.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PodStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let (key, now) = (self.key, Instant::now());
        self.shared.with(|state| state.poll_write(key, bufs, now, cx))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (key, now) = (self.key, Instant::now());
        self.shared.with(|state| state.shutdown(key, now));
        Poll::Ready(Ok(()))
    }
}

impl Drop for PodStream {
    fn drop(&mut self) {
        let (key, now) = (self.key, Instant::now());
        self.shared.with(|state| state.detach(key, now));
    }
}
