//! Remembers why a connection to a pod broke. hyper tells the request that was under way, but a request that comes just
//! after the break only learns that the connection is closed.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The first error of a connection's stream, once there is one. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Cause(Arc<OnceLock<(io::ErrorKind, String)>>);

impl Cause {
    /// Returns the error as another one of the same kind and text.
    pub(super) fn get(&self) -> Option<io::Error> {
        self.0
            .get()
            .map(|(kind, text)| io::Error::new(*kind, text.clone()))
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| drop(self.0.set((error.kind(), error.to_string()))))
    }
}

/// A stream that notes its first error before anybody else sees it.
pub(super) struct Noted<S> {
    stream: S,
    cause: Cause,
}

impl<S> Noted<S> {
    pub(super) fn new(stream: S, cause: Cause) -> Self {
        Self { stream, cause }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        Poll::Ready(self.cause.note(result))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(self.cause.note(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(self.cause.note(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        Poll::Ready(self.cause.note(result))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
        Poll::Ready(self.cause.note(result))
    }
}
