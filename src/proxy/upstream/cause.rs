//! Remembers why a connection to a pod broke, and which version of HTTP came over it. hyper tells the request that was under
//! way why it broke, but a request that comes just after the break only learns that the connection is closed.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is known of a connection. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Cause(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The first error of its stream, once there is one.
    error: OnceLock<(io::ErrorKind, String)>,
    /// Whether the first bytes that came are those of an answer in HTTP/1.x.
    http1: OnceLock<bool>,
    /// Whether anything was written since the last request began.
    written: AtomicBool,
}

/// What every answer in HTTP/1.x begins with, and no frame of HTTP/2: as its length it would be too long (RFC 9112 section 4,
/// RFC 9113 section 4.2).
const HTTP1: &[u8; 5] = b"HTTP/";

impl Cause {
    /// Returns the error as another one of the same kind and text.
    pub(super) fn get(&self) -> Option<io::Error> {
        self.0
            .error
            .get()
            .map(|(kind, text)| io::Error::new(*kind, text.clone()))
    }

    /// Whether the pod answers in HTTP/1.x; unknown before the first bytes have come.
    pub(super) fn is_http1(&self) -> Option<bool> {
        self.0.http1.get().copied()
    }

    /// Notes that a request begins, and no other is under way.
    pub(super) fn begin_request(&self) {
        self.0.written.store(false, Ordering::Relaxed);
    }

    /// Whether anything was written since a request last began.
    pub(super) fn has_written(&self) -> bool {
        self.0.written.load(Ordering::Relaxed)
    }

    fn note_written(&self, result: io::Result<usize>) -> io::Result<usize> {
        if matches!(result, Ok(1..)) {
            self.0.written.store(true, Ordering::Relaxed);
        }
        self.note(result)
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| drop(self.0.error.set((error.kind(), error.to_string()))))
    }
}

/// A stream that notes its first bytes and its first error before anybody else sees them.
pub(super) struct Noted<S> {
    stream: S,
    cause: Cause,
    /// How many of the bytes by which the version is told have come.
    told: usize,
}

impl<S> Noted<S> {
    pub(super) fn new(stream: S, cause: Cause) -> Self {
        Self {
            stream,
            cause,
            told: 0,
        }
    }

    /// Notes the version of HTTP by the first bytes.
    fn look(&mut self, bytes: &[u8]) {
        let expected = HTTP1.iter().skip(self.told);
        let same = bytes
            .iter()
            .zip(expected)
            .take_while(|(byte, wanted)| byte == wanted)
            .count();
        self.told += same;
        if self.told == HTTP1.len() || same < bytes.len() {
            let _ = self.cause.0.http1.set(self.told == HTTP1.len());
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if self.cause.is_http1().is_none() {
            self.look(buf.filled().get(before..).unwrap_or_default());
        }
        Poll::Ready(self.cause.note(result))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(self.cause.note_written(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(self.cause.note_written(result))
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_was_written_for_earlier_requests_does_not_count() {
        let (_pod, ours) = tokio::io::duplex(64);
        let cause = Cause::default();
        let mut noted = Noted::new(ours, cause.clone());
        for _ in 0..2 {
            cause.begin_request();
            assert!(!cause.has_written());
            noted.write_all(b"GET").await.unwrap();
            assert!(cause.has_written());
        }
    }

    #[tokio::test]
    async fn the_version_of_an_answer_is_told_by_its_first_bytes_however_they_come() {
        for (pieces, http1) in [
            (&["HTTP/1.1 200"][..], Some(true)),
            (&["HT", "TP", "/1.0"][..], Some(true)),
            (&["HTTP"][..], None),
            (&["HT", "ML"][..], Some(false)),
            (&["\0\0\0\x04\0"][..], Some(false)),
            (&[][..], None),
        ] {
            let (mut pod, ours) = tokio::io::duplex(64);
            let cause = Cause::default();
            let mut noted = Noted::new(ours, cause.clone());
            for piece in pieces {
                pod.write_all(piece.as_bytes()).await.unwrap();
                assert_eq!(noted.read(&mut [0; 64]).await.unwrap(), piece.len());
            }
            assert_eq!(cause.is_http1(), http1, "{pieces:?}");
        }
    }
}
