//! Port-forwards over SPDY/3.1, the form kubectl speaks, with the limits of the library every runtime uses.
//!
//! `moby/spdystream:connection.go` has one read loop and [`WORKERS`] workers, each with a queue of 50 frames and the
//! streams whose id modulo the number of workers is its own. A worker handles frame by frame; with a payload it waits until
//! the copier at the pod takes it. So an application that does not read stops its worker, and once that worker's queue is
//! full, the read loop and with it the session. There is no other flow control: windows are neither granted nor heeded.

mod frame;
mod headers;
mod pair;
mod queue;
mod session;
mod stream;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::pod::Pod;
use crate::testing::forwards::Controls;
use frame::Frame;
use headers::Decoder;
use session::{Arrival, Job, Session};

/// Workers of a session.
const WORKERS: usize = 5;

/// Frames that may wait for the socket.
const WRITE_QUEUE: usize = 64;

/// Bytes read from the socket at once.
const READ_SIZE: usize = 16 * 1024;

/// The lowest priority, which spdystream gives to frames of no known stream.
const LAST_PRIORITY: u8 = 7;

/// Serves one session until its connection ends.
///
/// What it forwards lives on for a moment, as at a real runtime: bytes received before the end still go to the pod.
pub(super) async fn serve(io: impl AsyncRead + AsyncWrite, pod: Arc<Pod>, controls: Controls) {
    let (read, write) = tokio::io::split(io);
    tokio::pin!(read, write);
    let (out, outgoing) = mpsc::channel(WRITE_QUEUE);
    let session = Arc::new(Session::new(pod, out, controls.clone()));
    let worked = start_workers(&session);
    let mut writer = Writer {
        write,
        outgoing,
        joined: BytesMut::new(),
    };
    let closed = async {
        tokio::select! {
            () = controls.go_away.cancelled() => {}
            () = session.idle() => session.reset_all().await,
        }
        session.go_away().await;
    };
    let end = tokio::select! {
        end = read_loop(read, &session) => end,
        () = writer.run() => ReadEnd::Closed,
        () = closed => {
            writer.outgoing.close();
            writer.run().await;
            ReadEnd::Closed
        }
    };
    // From here on nothing can be written.
    writer.outgoing.close();
    session.drain();
    if let ReadEnd::GoAway = end {
        // The connection ends once the queues are empty, so behind a stuck worker never.
        worked.cancelled().await;
    }
}

/// Runs the workers until the session has no more frames for them; then its streams end, and the token says so.
fn start_workers(session: &Arc<Session>) -> CancellationToken {
    let done = CancellationToken::new();
    let (working, worked) = (session.clone(), done.clone());
    session.spawn(async move {
        join_all((0..WORKERS).map(|worker| working.work(worker))).await;
        working.end_streams();
        worked.cancel();
    });
    done
}

/// Why a read loop has ended.
enum ReadEnd {
    /// The connection is closed, or its bytes make no sense.
    Closed,
    /// GOAWAY: the loop ends at once and reads nothing more.
    GoAway,
}

async fn read_loop(mut read: impl AsyncRead + Unpin, session: &Arc<Session>) -> ReadEnd {
    let mut buffer = BytesMut::new();
    let mut decoder = Decoder::new();
    // Shared by PING and the frames that are parsed and ignored.
    let mut round_robin = (0..WORKERS).cycle();
    loop {
        let frame = match frame::parse(&mut buffer) {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                buffer.reserve(READ_SIZE);
                match read.read_buf(&mut buffer).await {
                    Ok(1..) => continue,
                    _ => return ReadEnd::Closed,
                }
            }
            Err(error) => {
                tracing::debug!(%error, "SPDY session broken");
                return ReadEnd::Closed;
            }
        };
        session.received(&frame);
        let (worker, priority, job) = match frame {
            Frame::GoAway => return ReadEnd::GoAway,
            Frame::Ping { id } => (round_robin.next(), 0, Job::Ping { id }),
            Frame::Ignored => (round_robin.next(), LAST_PRIORITY, Job::Nothing),
            Frame::SynStream {
                stream: id,
                fin,
                priority,
                headers,
            } => {
                let headers = match decoder.decode(&headers) {
                    Ok(headers) => headers,
                    Err(error) => {
                        tracing::debug!(%error, "SPDY session broken");
                        return ReadEnd::Closed;
                    }
                };
                match session.arrive(id, fin, priority) {
                    Arrival::New(stream) => (worker_of(id), priority, Job::Open { stream, headers }),
                    Arrival::Refused => {
                        // Outside the loop and the workers: it must neither wait for them nor hold them up.
                        let refusing = session.clone();
                        session.spawn(async move { refusing.refuse(id).await });
                        continue;
                    }
                    Arrival::Ignored => continue,
                }
            }
            Frame::SynReply { stream, headers } | Frame::Headers { stream, headers }
                if decoder.decode(&headers).is_err() =>
            {
                tracing::debug!(stream, "SPDY session broken by its headers");
                return ReadEnd::Closed;
            }
            Frame::SynReply { stream, .. } => (worker_of(stream), session.priority(stream), Job::Nothing),
            Frame::Headers { stream, .. } => (
                worker_of(stream),
                session.priority(stream),
                Job::Headers { stream },
            ),
            Frame::Data { stream, fin, payload } => (
                worker_of(stream),
                session.priority(stream),
                Job::Data { stream, fin, payload },
            ),
            Frame::RstStream { stream, .. } => {
                (worker_of(stream), session.priority(stream), Job::Reset { stream })
            }
        };
        session.push(worker.unwrap_or_default(), priority, job).await;
    }
}

fn worker_of(stream: u32) -> Option<usize> {
    usize::try_from(stream).ok().map(|stream| stream % WORKERS)
}

/// Writes queued frames, as many at once as there are.
struct Writer<W> {
    /// The socket.
    write: W,
    /// Frames to write.
    outgoing: mpsc::Receiver<Bytes>,
    /// Frames joined for one write; here, so that a run can go on where another was dropped.
    joined: BytesMut,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Runs until the socket fails or the queue is closed and empty. Cancel-safe.
    async fn run(&mut self) {
        loop {
            if self.write.write_all_buf(&mut self.joined).await.is_err() {
                return;
            }
            if self.outgoing.is_empty() && self.write.flush().await.is_err() {
                return;
            }
            let Some(frame) = self.outgoing.recv().await else {
                return;
            };
            self.joined.extend_from_slice(&frame);
            while self.joined.len() < READ_SIZE
                && let Ok(frame) = self.outgoing.try_recv()
            {
                self.joined.extend_from_slice(&frame);
            }
        }
    }
}
