//! SPDY spoken by hand on one upgraded connection.

use std::collections::BTreeSet;

use kube_tunnel::k8s::bare::{Codec, upgrade};
use kube_tunnel::registry::PodRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, timeout_at};

use crate::cluster::Namespace;
use crate::command::within;
use crate::forward::{cluster, pod};

/// How many workers a session has.
pub(super) const WORKERS: usize = 5;

const UPGRADE: Duration = Duration::from_secs(20);

/// One frame of the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    Data {
        stream: u32,
        payload: Vec<u8>,
        fin: bool,
    },
    /// The stream that has been taken.
    Reply(u32),
    /// The stream and why.
    Reset(u32, u32),
    Pong(u32),
    Other,
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// One session.
pub(super) struct Raw {
    writer: WriteHalf<Box<dyn Io>>,
    codec: Codec,
    last_id: u32,
    pings: u32,
    coming: mpsc::UnboundedReceiver<Frame>,
    seen: Vec<Frame>,
    _reader: JoinSet<()>,
}

impl Raw {
    /// Opens a session to a pod of `web`.
    pub(super) async fn connect(namespace: &Namespace) -> Self {
        Self::connect_to(&pod(namespace).await).await
    }

    /// Opens a session to a pod.
    pub(super) async fn connect_to(pod: &PodRef) -> Self {
        let cluster = cluster().await;
        let io = upgrade(&cluster, pod, UPGRADE).await.unwrap();
        let (mut reader, writer) = tokio::io::split(Box::new(io) as Box<dyn Io>);
        let (sender, coming) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok(frame) = read(&mut reader).await
                && sender.send(frame).is_ok()
            {}
        });
        Self {
            writer,
            codec: Codec::default(),
            last_id: 1,
            pings: 0,
            coming,
            seen: Vec::new(),
            _reader: tasks,
        }
    }

    /// Opens a connection whose streams belong to a worker, and sends bytes with the opening. Returns the data stream.
    pub(super) async fn open(&mut self, class: usize, port: u16, bytes: &[u8]) -> u32 {
        let id = self.unused(class);
        let mut out = Vec::new();
        self.codec.open(&mut out, id, port);
        if !bytes.is_empty() {
            self.codec.data(&mut out, id, bytes);
        }
        self.write(&out).await;
        id
    }

    /// Takes an id of a worker for a stream, with one ten below it for another of the same worker.
    pub(super) fn unused(&mut self, class: usize) -> u32 {
        let mut id = self.last_id + 12;
        while id as usize % WORKERS != class {
            id += 2;
        }
        self.last_id = id;
        id
    }

    /// Opens a stream without headers.
    pub(super) async fn open_bare(&mut self, id: u32) {
        let mut out = Vec::new();
        self.codec.open_bare(&mut out, id);
        self.write(&out).await;
    }

    /// Sends one frame of payload.
    pub(super) async fn data(&mut self, stream: u32, payload: &[u8]) {
        let mut out = Vec::new();
        self.codec.data(&mut out, stream, payload);
        self.write(&out).await;
    }

    /// Ends our half of a stream.
    pub(super) async fn end(&mut self, stream: u32) {
        let mut out = Vec::new();
        self.codec.end(&mut out, stream);
        self.write(&out).await;
    }

    /// Cancels a stream.
    pub(super) async fn reset(&mut self, stream: u32) {
        let mut out = Vec::new();
        self.codec.reset(&mut out, stream);
        self.write(&out).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        within(UPGRADE, "the connection to take a frame", async {
            self.writer.write_all(bytes).await.unwrap();
            self.writer.flush().await.unwrap();
        })
        .await;
    }

    /// Sends each worker a PING, and returns those that have answered in time.
    pub(super) async fn pings(&mut self, limit: Duration) -> BTreeSet<usize> {
        let (first, mut out) = (self.pings, Vec::new());
        self.pings += WORKERS as u32;
        let ids: Vec<u32> = (first..self.pings).map(|number| 2 * number + 1).collect();
        ids.iter().for_each(|&id| self.codec.ping(&mut out, id));
        self.write(&out).await;
        let answered = |raw: &Self, id| raw.has(|frame| *frame == Frame::Pong(id));
        self.wait(limit, |raw| ids.iter().all(|&id| answered(raw, id)))
            .await;
        let classes = (0..WORKERS).filter(|&class| answered(self, ids[class]));
        classes.collect()
    }

    /// Takes what comes until a condition holds. Returns whether it does in time.
    pub(super) async fn wait(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let end = Instant::now() + limit;
        while !condition(self) {
            match timeout_at(end, self.coming.recv()).await {
                Ok(Some(frame)) => self.seen.push(frame),
                Ok(None) => panic!("the session has ended: {:?}", self.seen.last()),
                Err(_) => return false,
            }
        }
        true
    }

    pub(super) fn has(&self, wanted: impl Fn(&Frame) -> bool) -> bool {
        self.seen.iter().any(wanted)
    }

    fn payloads(&self, of: u32) -> impl Iterator<Item = &[u8]> {
        self.seen.iter().filter_map(move |frame| match frame {
            Frame::Data { stream, payload, .. } if *stream == of => Some(&payload[..]),
            _ => None,
        })
    }

    /// Returns the place of the first frame of a kind among those that have come.
    pub(super) fn place(&self, wanted: impl Fn(&Frame) -> bool) -> Option<usize> {
        self.seen.iter().position(wanted)
    }

    /// Counts what has come on a stream.
    pub(super) fn bytes(&self, stream: u32) -> usize {
        self.payloads(stream).map(<[u8]>::len).sum()
    }

    /// Returns what has come on a stream, as text.
    pub(super) fn text(&self, stream: u32) -> String {
        let bytes: Vec<&[u8]> = self.payloads(stream).collect();
        String::from_utf8_lossy(&bytes.concat()).into_owned()
    }

    /// Tells whether the runtime has ended both streams of a connection.
    pub(super) fn has_ended(&self, data: u32) -> bool {
        [data, data - 10].iter().all(|id| {
            self.has(|frame| match frame {
                Frame::Data { stream, fin, .. } => stream == id && *fin,
                Frame::Reset(stream, _) => stream == id,
                Frame::Reply(_) | Frame::Pong(_) | Frame::Other => false,
            })
        })
    }
}

async fn read(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Frame> {
    let (first, second) = (io.read_u32().await?, io.read_u32().await?);
    let mut payload = vec![0; second as usize & 0xff_ffff];
    io.read_exact(&mut payload).await?;
    let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
    Ok(match first {
        0x8003_0002 => Frame::Reply(word(0)),
        0x8003_0003 => Frame::Reset(word(0), word(4)),
        0x8003_0006 => Frame::Pong(word(0)),
        stream if stream >> 31 == 0 => Frame::Data {
            stream,
            payload,
            fin: second >> 24 & 1 == 1,
        },
        _ => Frame::Other,
    })
}
