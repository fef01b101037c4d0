//! What a session's read loop, workers and forwards share, after `moby/spdystream:connection.go`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::WORKERS;
use super::frame::{self, Frame};
use super::headers::Encoder;
use super::pair::{Pairs, Purpose};
use super::queue::Queue;
use super::stream::Stream;
use crate::testing::cluster::{lock, pause};
use crate::testing::faults::Faults;
use crate::testing::forwards::Controls;
use crate::testing::portforward::pod::{Gone, Pod};

/// One SPDY session.
#[derive(Debug)]
pub(super) struct Session {
    /// Where the bytes go.
    pub(super) pod: Arc<Pod>,
    /// What can be done to the session from outside.
    controls: Controls,
    /// Frames for the socket.
    out: mpsc::Sender<Bytes>,
    /// Our header compression; held until the block is queued, as blocks must be sent in the order they are made.
    encoder: tokio::sync::Mutex<Encoder>,
    /// A queue per worker.
    queues: [Queue<Job>; WORKERS],
    /// Streams and their ids.
    streams: Mutex<Streams>,
    /// Wakes the one who waits for the last stream to end.
    emptied: Notify,
    /// Streams waiting for their other half.
    pub(super) pairs: Pairs,
    /// When the last frame came or went.
    active: Mutex<Instant>,
}

#[derive(Debug, Default)]
struct Streams {
    /// Streams of which one half is open.
    open: BTreeMap<u32, Arc<Stream>>,
    /// Lowest id the next stream may have.
    next: u32,
    /// GOAWAY is sent.
    gone_away: bool,
}

/// A frame for a worker.
#[derive(Debug)]
pub(super) enum Job {
    /// SYN_STREAM
    Open {
        /// The stream.
        stream: Arc<Stream>,
        /// Its headers.
        headers: HashMap<String, String>,
    },
    /// DATA
    Data {
        /// Stream id.
        stream: u32,
        /// FLAG_FIN
        fin: bool,
        /// Bytes.
        payload: Bytes,
    },
    /// RST_STREAM
    Reset {
        /// Stream id.
        stream: u32,
    },
    /// HEADERS
    Headers {
        /// Stream id.
        stream: u32,
    },
    /// PING
    Ping {
        /// Ping id.
        id: u32,
    },
    /// A frame that is parsed and ignored.
    Nothing,
}

/// What a SYN_STREAM leads to.
pub(super) enum Arrival {
    /// A stream.
    New(Arc<Stream>),
    /// A reset: ids only go up.
    Refused,
    /// Nothing.
    Ignored,
}

impl Session {
    /// A session without streams.
    pub(super) fn new(pod: Arc<Pod>, out: mpsc::Sender<Bytes>, controls: Controls) -> Self {
        Self {
            pod,
            controls,
            out,
            encoder: tokio::sync::Mutex::default(),
            queues: std::array::from_fn(|_| Queue::new()),
            streams: Mutex::default(),
            emptied: Notify::new(),
            pairs: Pairs::default(),
            active: Mutex::new(Instant::now()),
        }
    }

    /// Counts a frame from the client.
    pub(super) fn received(&self, frame: &Frame) {
        self.touch();
        self.pod.cluster.forwards.count(|counts| match frame {
            Frame::SynStream { fin, .. } => {
                counts.syn_streams += 1;
                counts.fins += u64::from(*fin);
            }
            Frame::Data { fin, .. } => {
                counts.data_frames += 1;
                counts.fins += u64::from(*fin);
            }
            Frame::RstStream { .. } => counts.resets += 1,
            Frame::Ping { .. } => counts.pings += 1,
            Frame::GoAway => counts.go_aways += 1,
            Frame::SynReply { .. } | Frame::Headers { .. } | Frame::Ignored => counts.other_frames += 1,
        });
    }

    /// Makes room for a new stream, if its id may be one.
    pub(super) fn arrive(&self, id: u32, fin: bool, priority: u8) -> Arrival {
        let mut streams = lock(&self.streams);
        if streams.gone_away || self.faults().swallows_streams() {
            return Arrival::Ignored;
        }
        if id < streams.next {
            return Arrival::Refused;
        }
        streams.next = id.saturating_add(2);
        let stream = Arc::new(Stream::new(id, priority));
        if fin {
            stream.remote_closed.cancel();
        }
        streams.open.insert(id, stream.clone());
        drop(streams);
        self.pod
            .cluster
            .forwards
            .count(|counts| counts.streams_opened += 1);
        Arrival::New(stream)
    }

    /// Answers a stream whose id has been used.
    pub(super) async fn refuse(&self, id: u32) {
        let _ = self.send(frame::rst_stream(id, frame::PROTOCOL_ERROR)).await;
    }

    /// Queues a frame for a worker; waits while its queue is full.
    pub(super) async fn push(&self, worker: usize, priority: u8, job: Job) {
        self.queues[worker].push(job, priority).await;
    }

    /// The priority of a stream's frames.
    pub(super) fn priority(&self, id: u32) -> u8 {
        self.find(id)
            .map_or(super::LAST_PRIORITY, |stream| stream.priority)
    }

    /// Handles the frames of one queue until it is drained.
    pub(super) async fn work(self: &Arc<Self>, worker: usize) {
        while let Some(job) = self.queues[worker].pop().await {
            self.handle(job).await;
        }
    }

    async fn handle(self: &Arc<Self>, job: Job) {
        match job {
            Job::Open { stream, headers } => self.open(stream, &headers).await,
            Job::Data { stream, fin, payload } => {
                // Data for unknown streams is dropped.
                let Some(stream) = self.find(stream).filter(|stream| stream.replied.is_cancelled()) else {
                    return;
                };
                if !payload.is_empty() {
                    stream.offer(payload).await;
                }
                if fin {
                    stream.remote_closed.cancel();
                    if stream.is_finished() {
                        self.remove(stream.id);
                    }
                }
            }
            Job::Reset { stream } => {
                if let Some(stream) = self.find(stream) {
                    self.remove(stream.id);
                    stream.remote_closed.cancel();
                    stream.finish();
                }
            }
            Job::Headers { stream } => {
                // Nobody reads the headers of a stream that is open already.
                if let Some(stream) = self.find(stream).filter(|stream| stream.replied.is_cancelled()) {
                    stream.remote_closed.cancelled().await;
                }
            }
            // Even ids would be answers to pings of ours.
            Job::Ping { id } if id % 2 == 1 && !self.faults().drops_pongs() => {
                // Go's scheduler decides which worker writes first.
                if fastrand::bool() {
                    tokio::task::yield_now().await;
                }
                let _ = self.send(frame::ping(id)).await;
            }
            Job::Ping { .. } | Job::Nothing => {}
        }
    }

    async fn open(self: &Arc<Self>, stream: Arc<Stream>, headers: &HashMap<String, String>) {
        let Some(purpose) = Purpose::of(headers, stream.id) else {
            self.reset(&stream).await;
            return;
        };
        self.pair(stream.clone(), purpose).await;
        pause(self.faults().reply_delay()).await;
        let mut encoder = self.encoder.lock().await;
        let _ = self.send(frame::syn_reply(stream.id, &encoder.empty())).await;
        stream.replied.cancel();
    }

    /// Sends a frame.
    pub(super) async fn send(&self, frame: Bytes) -> Result<(), Gone> {
        self.touch();
        self.out.send(frame).await.map_err(|_| Gone)
    }

    /// Sends bytes on a stream, once it has its reply.
    pub(super) async fn write(&self, stream: &Stream, payload: &[u8]) -> Result<(), Gone> {
        stream.replied.cancelled().await;
        self.send(frame::data(stream.id, false, payload)).await
    }

    /// Ends our half of a stream with FIN.
    pub(super) async fn close(&self, stream: &Stream) {
        if stream.remote_closed.is_cancelled() {
            self.remove(stream.id);
        }
        stream.replied.cancelled().await;
        if stream.finish() {
            let _ = self.send(frame::data(stream.id, true, &[])).await;
        }
    }

    /// Ends a stream with RST_STREAM, unless our half has ended already, and frees the worker that may hold its data.
    pub(super) async fn reset(&self, stream: &Stream) {
        self.remove(stream.id);
        stream.remote_closed.cancel();
        if stream.finish() {
            let _ = self.send(frame::rst_stream(stream.id, frame::CANCEL)).await;
        }
    }

    /// Resets every stream.
    pub(super) async fn reset_all(&self) {
        let streams = std::mem::take(&mut lock(&self.streams).open);
        for stream in streams.values() {
            self.reset(stream).await;
        }
    }

    /// Sends GOAWAY and waits until the last stream has ended.
    pub(super) async fn go_away(&self) {
        let last = {
            let mut streams = lock(&self.streams);
            streams.gone_away = true;
            streams.next.saturating_sub(2)
        };
        let _ = self.send(frame::go_away(last)).await;
        while !lock(&self.streams).open.is_empty() {
            self.emptied.notified().await;
        }
    }

    /// Waits until no frame has come or gone for the runtime's idle timeout.
    pub(super) async fn idle(&self) {
        let cluster = &self.pod.cluster;
        let timeout = cluster.faults.idle_timeout();
        let timeout = timeout.unwrap_or_else(|| cluster.runtime().idle_timeout());
        loop {
            let end = *lock(&self.active) + timeout;
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    }

    /// Lets the workers end after what is queued.
    pub(super) fn drain(&self) {
        for queue in &self.queues {
            queue.drain();
        }
    }

    /// Ends the client's half of every stream.
    pub(super) fn end_streams(&self) {
        for stream in std::mem::take(&mut lock(&self.streams).open).values() {
            stream.remote_closed.cancel();
        }
    }

    /// Runs a task that ends with what the session forwards.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.controls.forwards.clone();
        self.pod.cluster.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = ended.cancelled() => {}
            }
        });
    }

    fn faults(&self) -> &Faults {
        &self.pod.cluster.faults
    }

    fn touch(&self) {
        *lock(&self.active) = Instant::now();
    }

    fn find(&self, id: u32) -> Option<Arc<Stream>> {
        lock(&self.streams).open.get(&id).cloned()
    }

    fn remove(&self, id: u32) {
        let mut streams = lock(&self.streams);
        streams.open.remove(&id);
        if streams.open.is_empty() {
            self.emptied.notify_one();
        }
    }
}
