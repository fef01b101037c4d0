//! A byte stream inside a WebSocket (RFC 6455), client side: `GET .../portforward` has two.
//!
//! A tunnel (KEP-4006) is the connection of a SPDY port-forward. Its bytes are cut into binary messages anywhere, so message
//! edges mean nothing: whatever a data frame carries is handed on as it arrives. Channels ([`channels`]) are one connection to
//! one port, and each message begins with the number of its channel. What the bytes say, and whether the peer is alive, is the
//! matter of whoever reads them.

mod channels;
mod frame;
pub(super) mod handshake;
mod inbound;
mod outbound;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker, ready};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use channels::Channels;
use inbound::Inbound;
use outbound::Outbound;

/// A byte stream over an upgraded connection `S`.
///
/// Reading ends with 0 bytes after a Close of code 1000 or 1001 or without a code, and otherwise with an error that every
/// later read repeats:
/// - `InvalidData`: the peer broke RFC 6455, or sent text;
/// - `ConnectionAborted`: a Close of another code, which the error names together with the reason;
/// - `UnexpectedEof`: the connection ended without a Close. A whole number of SPDY frames may have been read until then, so
///   this is told apart from the orderly end although a session takes both for its own. After a Close of ours it is the
///   orderly end;
/// - what `cause::kind` makes of the text that came on the error channel, if there is one.
///
/// PINGs are answered, and a Close is replied to, by whatever is polled next, so that a user who only reads is enough. If
/// the connection takes no bytes then, only the last PING is answered (§5.5.3). The reply to a Close is sent as far as the
/// connection takes it at once; shutting down sends the rest.
///
/// Each write becomes one frame, so small writes are the caller's to gather. A write is accepted when all earlier frames have
/// gone to `S`; after a Close from either side it fails with `BrokenPipe`. Shutting down sends a Close of code 1000 and shuts
/// `S` down; reading goes on.
///
/// All of it is cancel-safe: a frame half written stays here, and whoever polls next goes on with it. The two halves may be
/// polled by two tasks.
pub(super) struct WebSocket<S> {
    stream: S,
    inbound: Inbound,
    outbound: Outbound,
    waiting: Arc<Waiting>,
    /// Wakes all of `waiting`.
    waker: Waker,
}

/// Who waits until the connection takes bytes. It remembers the last waker only, but the reader, with a Pong to send, may be
/// another task than the writer, and either may have given up since: so both are woken.
#[derive(Default)]
struct Waiting {
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.reader.wake();
        self.writer.wake();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Takes the connection of a tunnel right after the 101 whose headers [`handshake::Handshake::check`] has found good.
    pub(super) fn tunnel(stream: S) -> Self {
        Self::new(stream, None, &[])
    }

    /// Takes that of channels: bytes are those of the first port's data channel.
    pub(super) fn channels(stream: S) -> Self {
        Self::new(stream, Some(Channels::default()), &[channels::DATA])
    }

    fn new(stream: S, channels: Option<Channels>, prefix: &'static [u8]) -> Self {
        let waiting = Arc::new(Waiting::default());
        Self {
            stream,
            inbound: Inbound::new(channels),
            outbound: Outbound::new(prefix),
            waker: Waker::from(Arc::clone(&waiting)),
            waiting,
        }
    }

    /// Has a PING sent with whatever is polled next. Returns its number; see [`WebSocket::answered`].
    pub(super) fn ping(&mut self) -> u64 {
        self.outbound.ping();
        self.outbound.next_ping()
    }

    /// Counts the PINGs that were answered, in their order.
    pub(super) fn answered(&self) -> u64 {
        self.inbound.answered()
    }

    /// Has a Close sent with whatever is polled next. What is on its way to the peer, and what the peer still says, passes: it is
    /// the server's part to end the connection (§7.1.1).
    pub(super) fn close(&mut self, cx: &Context<'_>) {
        self.outbound.close(Some(frame::NORMAL));
        self.reply(cx);
    }

    /// Counts how often anything has come.
    pub(super) fn reads(&self) -> u64 {
        self.inbound.reads()
    }

    /// Returns the error that has ended the stream, if one has.
    pub(super) fn failure(&self) -> Option<io::Error> {
        self.inbound.end()?.result().err()
    }

    fn poll_data(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            self.inbound.decode(buf, &mut self.outbound);
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if let Some(end) = self.inbound.end() {
                return Poll::Ready(end.result());
            }
            let read = match self.inbound.direct(buf.remaining()) {
                Some(limit) => {
                    let mut payload = (&mut self.stream).take(limit);
                    ready!(Pin::new(&mut payload).poll_read(cx, buf))?;
                    let read = buf.filled().len() - before;
                    self.inbound.passed(read);
                    read
                }
                None => ready!(self.inbound.poll_fill(&mut self.stream, cx))?,
            };
            if read == 0 {
                self.inbound.eof(self.outbound.is_closed());
            }
        }
    }

    /// Sends what the peer is owed, as far as the connection takes it. An error is left to the next read or write, which
    /// meets it too.
    pub(super) fn reply(&mut self, cx: &Context<'_>) {
        if self.outbound.owes() {
            self.waiting.reader.register(cx.waker());
            let mut both = Context::from_waker(&self.waker);
            let _ = self.outbound.poll_flush(&mut self.stream, &mut both);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = this.poll_data(cx, buf);
        this.reply(cx);
        result
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.waiting.writer.register(cx.waker());
        let mut both = Context::from_waker(&this.waker);
        ready!(this.outbound.poll_write_out(&mut this.stream, &mut both))?;
        let taken = this.outbound.push(buf)?;
        // Whatever is left of the frame goes with the next call.
        if let Poll::Ready(Err(error)) = this.outbound.poll_write_out(&mut this.stream, &mut both) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.waiting.writer.register(cx.waker());
        let mut both = Context::from_waker(&this.waker);
        this.outbound.poll_flush(&mut this.stream, &mut both)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.waiting.writer.register(cx.waker());
        let mut both = Context::from_waker(&this.waker);
        this.outbound.close(Some(frame::NORMAL));
        ready!(this.outbound.poll_flush(&mut this.stream, &mut both))?;
        Pin::new(&mut this.stream).poll_shutdown(&mut both)
    }
}
