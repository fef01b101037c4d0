//! Port-forwards over SPDY/3.1, the form kubectl speaks.
//!
//! A forwarded connection is a pair of streams with one `requestid`: `data` carries bytes both ways, `error` carries
//! the text of a failure (`cri-streaming:pkg/streaming/portforward/httpstream.go`).

mod frame;
mod headers;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::pod::Pod;
use crate::testing::cluster::lock;
use frame::Frame;
use headers::{Decoder, Encoder};

/// Time within which the second stream of a pair must arrive (`DefaultStreamCreationTimeout`).
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);

/// DATA frames queued per stream before the whole session stops reading: the queue length of spdystream's workers.
const STREAM_QUEUE: usize = 50;

/// Frames that may wait for the socket.
const WRITE_QUEUE: usize = 64;

/// Serves one session until the client leaves or breaks the protocol.
pub(super) async fn serve(
    io: impl AsyncRead + AsyncWrite,
    pod: Arc<Pod>,
    tasks: TaskTracker,
    ended: CancellationToken,
) {
    let (read, write) = tokio::io::split(io);
    let (out, outgoing) = mpsc::channel(WRITE_QUEUE);
    let shared = Arc::new(Shared {
        pod,
        out,
        streams: Mutex::default(),
        pairs: Mutex::default(),
    });
    let session = Session {
        shared,
        tasks,
        ended: ended.clone(),
        decoder: Decoder::new(),
        encoder: Encoder::default(),
        next_stream: 1,
    };
    tokio::select! {
        () = session.read_loop(read) => {}
        () = write_loop(write, outgoing) => {}
    }
    // Every forward of the session ends with it.
    ended.cancel();
}

/// The reading side of a session.
struct Session {
    /// What forwards use as well.
    shared: Arc<Shared>,
    /// Runs the forwards.
    tasks: TaskTracker,
    /// Ends the forwards.
    ended: CancellationToken,
    /// The client's header compression.
    decoder: Decoder,
    /// Our header compression.
    encoder: Encoder,
    /// Lowest id the next stream may have.
    next_stream: u32,
}

/// The part of a session its forwards share.
struct Shared {
    /// Where the bytes go.
    pod: Arc<Pod>,
    /// Encoded frames for the socket.
    out: mpsc::Sender<Bytes>,
    /// Open streams.
    streams: Mutex<HashMap<u32, Stream>>,
    /// Half pairs by request id: the stream that came first.
    pairs: Mutex<HashMap<String, Half>>,
}

/// An open stream.
struct Stream {
    /// Takes the client's bytes; gone after its FIN.
    input: Option<mpsc::Sender<Bytes>>,
    /// Cancelled when the client resets the stream.
    reset: CancellationToken,
}

/// The first stream of a pair.
enum Half {
    /// `streamtype: error`
    Error(u32),
    /// `streamtype: data`, and what the client sends on it.
    Data(u32, mpsc::Receiver<Bytes>),
}

impl Session {
    async fn read_loop(mut self, read: impl AsyncRead) {
        tokio::pin!(read);
        let mut buffer = BytesMut::new();
        loop {
            loop {
                match frame::parse(&mut buffer) {
                    Ok(Some(frame)) => {
                        if self.handle(frame).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "SPDY session broken");
                        return;
                    }
                }
            }
            buffer.reserve(16 * 1024);
            if !matches!(read.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        }
    }

    /// Handles one frame; an error ends the session.
    async fn handle(&mut self, frame: Frame) -> Result<(), ()> {
        match frame {
            Frame::SynStream { stream, fin, headers } => {
                let headers = self.decode(&headers)?;
                self.open(stream, fin, &headers).await;
            }
            Frame::Headers { headers } => drop(self.decode(&headers)?),
            Frame::Data { stream, fin, payload } => {
                let input = self.shared.input(stream, fin);
                // Data for unknown or finished streams is dropped, as spdystream does.
                if let Some(input) = input
                    && !payload.is_empty()
                {
                    let _ = input.send(payload).await;
                }
            }
            Frame::RstStream { stream } => self.shared.reset(stream),
            // Even ids would be answers to pings of ours.
            Frame::Ping { id } if id % 2 == 1 => self.shared.send(frame::ping(id)).await,
            Frame::Ping { .. } | Frame::Ignored => {}
            // spdystream leaves its read loop at once and ends every stream.
            Frame::GoAway => return Err(()),
        }
        Ok(())
    }

    fn decode(&mut self, block: &[u8]) -> Result<HashMap<String, String>, ()> {
        self.decoder
            .decode(block)
            .map_err(|error| tracing::debug!(%error, "SPDY session broken"))
    }

    async fn open(&mut self, stream: u32, fin: bool, headers: &HashMap<String, String>) {
        if stream < self.next_stream {
            self.shared
                .send(frame::rst_stream(stream, frame::PROTOCOL_ERROR))
                .await;
            return;
        }
        self.next_stream = stream.saturating_add(2);
        let Some(purpose) = Purpose::of(headers) else {
            self.shared.send(frame::rst_stream(stream, frame::CANCEL)).await;
            return;
        };
        let (input, receiver) = mpsc::channel(STREAM_QUEUE);
        let entry = Stream {
            input: Some(input).filter(|_| !fin),
            reset: self.ended.child_token(),
        };
        lock(&self.shared.streams).insert(stream, entry);
        let reply = self.encoder.empty();
        self.shared.send(frame::syn_reply(stream, &reply)).await;
        let half = if purpose.data {
            Half::Data(stream, receiver)
        } else {
            Half::Error(stream)
        };
        self.pair(half, purpose);
    }

    /// Starts the forward when both streams are there.
    fn pair(&self, half: Half, Purpose { port, request, .. }: Purpose) {
        let first = lock(&self.shared.pairs).remove(&request);
        match (first, half) {
            (Some(Half::Error(error)), Half::Data(data, input))
            | (Some(Half::Data(data, input)), Half::Error(error)) => {
                self.spawn(forward(self.shared.clone(), port, data, error, input));
            }
            (_, half) => {
                lock(&self.shared.pairs).insert(request.clone(), half);
                self.spawn(pair_timeout(self.shared.clone(), request));
            }
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = ended.cancelled() => {}
            }
        });
    }
}

/// What a new stream is for.
struct Purpose {
    /// A data stream, else an error stream.
    data: bool,
    /// Container port.
    port: u16,
    /// Names the pair.
    request: String,
}

impl Purpose {
    fn of(headers: &HashMap<String, String>) -> Option<Self> {
        let data = match headers.get("streamtype")?.as_str() {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        let port = headers.get("port")?.parse().ok().filter(|&port| port != 0)?;
        Some(Self {
            data,
            port,
            request: headers.get("requestid")?.clone(),
        })
    }
}

impl Shared {
    /// Queues a frame; a session whose socket is gone is about to end anyway.
    async fn send(&self, frame: Bytes) {
        let _ = self.out.send(frame).await;
    }

    /// The queue of a stream; with `fin` it is handed out for the last time.
    fn input(&self, stream: u32, fin: bool) -> Option<mpsc::Sender<Bytes>> {
        let mut streams = lock(&self.streams);
        let stream = streams.get_mut(&stream)?;
        if fin {
            stream.input.take()
        } else {
            stream.input.clone()
        }
    }

    fn reset(&self, stream: u32) {
        if let Some(stream) = lock(&self.streams).remove(&stream) {
            stream.reset.cancel();
        }
    }

    fn forget(&self, stream: u32) {
        lock(&self.streams).remove(&stream);
    }
}

/// Runs one forwarded connection and reports its end as containerd 2.1 and later do.
async fn forward(shared: Arc<Shared>, port: u16, data: u32, error: u32, input: mpsc::Receiver<Bytes>) {
    let Some(reset) = lock(&shared.streams)
        .get(&data)
        .map(|stream| stream.reset.clone())
    else {
        return;
    };
    let moved = shared
        .pod
        .forward(port, input, &shared.out, |bytes| frame::data(data, false, &bytes));
    let result = tokio::select! {
        result = moved => result,
        () = reset.cancelled() => Ok(()),
    };
    if !reset.is_cancelled() {
        shared.send(frame::data(data, true, &[])).await;
    }
    match result {
        Ok(()) => shared.send(frame::data(error, true, &[])).await,
        Err(text) => {
            shared.send(frame::data(error, false, text.as_bytes())).await;
            shared.send(frame::rst_stream(error, frame::CANCEL)).await;
        }
    }
    shared.forget(data);
    shared.forget(error);
}

/// Gives half a pair up when its other half does not come.
async fn pair_timeout(shared: Arc<Shared>, request: String) {
    tokio::time::sleep(PAIR_TIMEOUT).await;
    let Some(half) = lock(&shared.pairs).remove(&request) else {
        return;
    };
    match half {
        Half::Error(stream) => {
            let text = format!("(request={request}) timed out waiting for streams");
            shared.send(frame::data(stream, false, text.as_bytes())).await;
            shared.send(frame::rst_stream(stream, frame::CANCEL)).await;
            shared.forget(stream);
        }
        Half::Data(stream, _) => {
            shared.send(frame::rst_stream(stream, frame::CANCEL)).await;
            shared.forget(stream);
        }
    }
}

/// Writes queued frames, as many at once as there are.
async fn write_loop(write: impl AsyncWrite, mut outgoing: mpsc::Receiver<Bytes>) {
    tokio::pin!(write);
    let mut frames = Vec::with_capacity(WRITE_QUEUE);
    let mut joined = BytesMut::new();
    while outgoing.recv_many(&mut frames, WRITE_QUEUE).await > 0 {
        for frame in frames.drain(..) {
            joined.extend_from_slice(&frame);
        }
        if write.write_all_buf(&mut joined).await.is_err() || write.flush().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
