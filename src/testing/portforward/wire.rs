//! The connection under a session, which may turn into a black hole.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use crate::testing::cluster::Cluster;
use crate::testing::faults::Carrier;

/// A connection that passes bytes on until it is to swallow them; then for good.
#[derive(Debug)]
pub(super) struct Wire<I> {
    /// The client's connection.
    io: I,
    /// Knows what is to be swallowed.
    cluster: Arc<Cluster>,
    /// What the connection carries.
    carrier: Carrier,
    /// Silences this very session.
    silence: CancellationToken,
    /// Every byte disappears.
    swallows: bool,
}

impl<I> Wire<I> {
    /// Puts the faults of `carrier` in front of a connection.
    pub(super) fn new(io: I, cluster: Arc<Cluster>, carrier: Carrier, silence: CancellationToken) -> Self {
        Self {
            io,
            cluster,
            carrier,
            silence,
            swallows: false,
        }
    }

    fn swallows(&mut self) -> bool {
        self.swallows |= self.silence.is_cancelled() || self.cluster.faults.swallows(self.carrier);
        self.swallows
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Wire<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        loop {
            // Asked after each read: bytes that waited for this one have come while the hole opened.
            ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
            if buffer.filled().len() == before || !self.swallows() {
                return Poll::Ready(Ok(()));
            }
            buffer.set_filled(before);
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Wire<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.swallows() {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
