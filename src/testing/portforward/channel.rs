//! Port-forwards as `v4.channel.k8s.io` WebSocket messages: a channel byte, then payload.
//!
//! For the i-th port, channel 2i carries data and 2i+1 the error text; the first message on each is the port, little
//! endian (`cri-streaming:pkg/streaming/portforward/websocket.go`).

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{self, Message};

use super::pod::{Client, Gone, Pod};

/// Ports that there are channels for: two each, numbered by a byte.
pub(super) const MAX_PORTS: usize = 128;

/// How long the client may take to answer our Close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one WebSocket until every forward has ended or the client is gone.
pub(super) async fn serve(io: impl AsyncRead + AsyncWrite + Unpin, pod: &Pod, ports: &[u16]) {
    let (sink, stream) = WebSocketStream::from_raw_socket(io, Role::Server, None)
        .await
        .split();
    let (out, outgoing) = mpsc::channel(4);
    // One message in flight per port: a port that does not read stops them all, as Go's io.Pipe does.
    let (inputs, receivers): (Vec<_>, Vec<_>) = ports.iter().map(|_| mpsc::channel(1)).unzip();
    let forwards = async move {
        join_all(
            receivers
                .into_iter()
                .zip(ports)
                .enumerate()
                .map(|(index, (input, &port))| {
                    let channel = u8::try_from(2 * index).unwrap_or(u8::MAX);
                    forward(pod, port, channel, input, out.clone())
                }),
        )
        .await;
    };
    let reader = read(stream, inputs, pod);
    let forwarding = async { tokio::join!(forwards, write(sink, outgoing)) };
    tokio::pin!(forwarding, reader);
    tokio::select! {
        // We closed: the client gets a moment to answer before TCP ends.
        _ = &mut forwarding => drop(timeout(CLOSE_TIMEOUT, reader).await),
        // The client is gone, which is EOF for the pod: what it has sent may still arrive there.
        () = &mut reader => drop(timeout(pod.close_grace(), forwarding).await),
    }
}

async fn forward(
    pod: &Pod,
    port: u16,
    channel: u8,
    input: mpsc::Receiver<Bytes>,
    out: mpsc::Sender<Message>,
) {
    let client = Channel {
        number: channel,
        input: Mutex::new(input),
        out,
    };
    let out = &client.out;
    for greeted in [channel, channel + 1] {
        if out.send(message(greeted, &port.to_le_bytes())).await.is_err() {
            return;
        }
    }
    let outcome = pod.forward(port, &client).await;
    if let Some(text) = outcome.end.text() {
        // A closed channel means that the client is gone and needs no text.
        let _ = out.send(message(channel + 1, text.as_bytes())).await;
    }
}

/// A data channel as the pod sees it.
struct Channel {
    /// Its number.
    number: u8,
    /// What the client sends on it.
    input: Mutex<mpsc::Receiver<Bytes>>,
    /// Messages to the client.
    out: mpsc::Sender<Message>,
}

impl Client for Channel {
    async fn read(&self) -> Option<Bytes> {
        self.input.lock().await.recv().await
    }

    async fn write(&self, bytes: Bytes) -> Result<(), Gone> {
        let message = message(self.number, &bytes);
        self.out.send(message).await.map_err(|_| Gone)
    }
}

async fn read(
    mut stream: impl Stream<Item = tungstenite::Result<Message>> + Unpin,
    inputs: Vec<mpsc::Sender<Bytes>>,
    pod: &Pod,
) {
    while let Some(Ok(received)) = stream.next().await {
        let mut payload = match received {
            Message::Binary(payload) => payload,
            // The library answers with what is read next.
            Message::Ping(_) => {
                pod.received_ping();
                continue;
            }
            _ => continue,
        };
        if payload.is_empty() {
            continue;
        }
        let channel = usize::from(payload.split_to(1)[0]);
        // Clients have nothing to say on error channels.
        if channel.is_multiple_of(2)
            && let Some(input) = inputs.get(channel / 2)
            && !payload.is_empty()
        {
            // The forward of this channel may have ended; others may not.
            let _ = input.send(payload).await;
        }
    }
}

async fn write(
    mut sink: impl Sink<Message, Error = tungstenite::Error> + Unpin,
    mut outgoing: mpsc::Receiver<Message>,
) -> tungstenite::Result<()> {
    while let Some(message) = outgoing.recv().await {
        sink.feed(message).await?;
        if outgoing.is_empty() {
            sink.flush().await?;
        }
    }
    sink.send(Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    })))
    .await
}

fn message(channel: u8, payload: &[u8]) -> Message {
    let mut bytes = BytesMut::with_capacity(payload.len() + 1);
    bytes.put_u8(channel);
    bytes.put_slice(payload);
    Message::Binary(bytes.freeze())
}
