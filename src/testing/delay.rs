//! A TCP connection whose bytes take as long as [`Faults::set_latency`](super::Faults::set_latency) says.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, PollSender};

use super::cluster::Cluster;

/// Bytes read at once.
const READ_SIZE: usize = 16 * 1024;

/// Reads that may be under way to the server: what a long line holds.
const ARRIVING: usize = 256;

/// Writes that may be under way to the client.
const LEAVING: usize = 1024;

/// The connection. Without latency it passes everything straight on.
#[derive(Debug)]
pub(super) struct Delayed {
    /// Knows the latency, and the tasks.
    cluster: Arc<Cluster>,
    /// Ends what is under way.
    token: CancellationToken,
    /// From the client.
    read: OwnedReadHalf,
    /// Bytes under way to the server and when they arrive; without bytes the client's FIN.
    arriving: VecDeque<(Instant, Bytes)>,
    /// The client has sent FIN.
    ended: bool,
    /// Fires when the first of `arriving` has arrived.
    timer: Pin<Box<Sleep>>,
    /// To the client.
    write: Leaving,
}

/// The way to the client.
#[derive(Debug)]
enum Leaving {
    /// There has been no latency yet.
    Direct(OwnedWriteHalf),
    /// A task holds the bytes back.
    Late(PollSender<(Instant, Bytes)>),
    /// Shut down, or broken.
    Closed,
}

impl Delayed {
    /// Wraps a connection; `token` ends with it.
    pub(super) fn new(cluster: Arc<Cluster>, tcp: TcpStream, token: CancellationToken) -> Self {
        let (read, write) = tcp.into_split();
        Self {
            cluster,
            token,
            read,
            arriving: VecDeque::new(),
            ended: false,
            timer: Box::pin(sleep_until(Instant::now())),
            write: Leaving::Direct(write),
        }
    }

    /// Takes in what the client has sent, so that its journey starts now.
    fn take_in(&mut self, cx: &mut Context<'_>, latency: Duration) -> io::Result<()> {
        let mut buffer = [0; READ_SIZE];
        while !self.ended && self.arriving.len() < ARRIVING {
            let mut space = ReadBuf::new(&mut buffer);
            match Pin::new(&mut self.read).poll_read(cx, &mut space) {
                Poll::Pending => break,
                Poll::Ready(result) => result?,
            }
            let bytes = Bytes::copy_from_slice(space.filled());
            self.ended = bytes.is_empty();
            self.arriving.push_back((Instant::now() + latency, bytes));
        }
        Ok(())
    }

    /// Starts the task that holds bytes for the client back.
    fn hold_back(&self, write: OwnedWriteHalf) -> Leaving {
        let (sender, receiver) = mpsc::channel(LEAVING);
        let token = self.token.clone();
        self.cluster.tasks.spawn(async move {
            tokio::select! {
                _ = deliver(write, receiver) => {}
                () = token.cancelled() => {}
            }
        });
        Leaving::Late(PollSender::new(sender))
    }
}

impl AsyncRead for Delayed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (latency, _) = self.cluster.faults.latency();
        if latency.is_zero() && self.arriving.is_empty() {
            return Pin::new(&mut self.read).poll_read(cx, buffer);
        }
        self.take_in(cx, latency)?;
        loop {
            let Some((due, _)) = self.arriving.front() else {
                return Poll::Pending;
            };
            let due = *due;
            if Instant::now() < due {
                self.timer.as_mut().reset(due);
                ready!(self.timer.as_mut().poll(cx));
                continue;
            }
            if let Some((_, bytes)) = self.arriving.front_mut() {
                let length = bytes.len().min(buffer.remaining());
                buffer.put_slice(&bytes.split_to(length));
                // The client's FIN stays: every later read sees it too.
                if length > 0 && !bytes.has_remaining() {
                    self.arriving.pop_front();
                }
            }
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncWrite for Delayed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (_, latency) = self.cluster.faults.latency();
        if !latency.is_zero() {
            self.write = match std::mem::replace(&mut self.write, Leaving::Closed) {
                Leaving::Direct(write) => self.hold_back(write),
                late => late,
            };
        }
        match &mut self.write {
            Leaving::Direct(write) => Pin::new(write).poll_write(cx, bytes),
            Leaving::Late(sender) => {
                ready!(sender.poll_reserve(cx)).map_err(|_| io::ErrorKind::BrokenPipe)?;
                let late = (Instant::now() + latency, Bytes::copy_from_slice(bytes));
                sender.send_item(late).map_err(|_| io::ErrorKind::BrokenPipe)?;
                Poll::Ready(Ok(bytes.len()))
            }
            Leaving::Closed => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.write {
            Leaving::Direct(write) => Pin::new(write).poll_flush(cx),
            Leaving::Late(_) | Leaving::Closed => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Leaving::Direct(write) = &mut self.write {
            return Pin::new(write).poll_shutdown(cx);
        }
        // The task ends when it has delivered everything, and its end is the FIN.
        self.write = Leaving::Closed;
        Poll::Ready(Ok(()))
    }
}

async fn deliver(mut write: OwnedWriteHalf, mut leaving: mpsc::Receiver<(Instant, Bytes)>) -> io::Result<()> {
    while let Some((due, bytes)) = leaving.recv().await {
        sleep_until(due).await;
        write.write_all(&bytes).await?;
    }
    write.shutdown().await
}
