//! A session's decisions and its frames without connection, task or clock, for the fuzz targets and benches.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::spdy::chunks::Chunk;
use crate::k8s::portforward::spdy::frame::{self, Decoder, Encoder};
use crate::k8s::portforward::spdy::state::{SlowReaders, State, Turn};

/// The state of one session, driven by hand in a time of its own.
pub struct Machine {
    state: State,
    now: Instant,
    /// The piece that each connection's reader has in its hands.
    reading: HashMap<usize, Chunk>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A session that has just begun.
    #[must_use]
    pub fn new() -> Self {
        let now = Instant::now();
        let mut state = State::new(Arc::default(), SlowReaders::default(), now);
        state.greet(now);
        Self {
            state,
            now,
            reading: HashMap::new(),
        }
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut State, Instant) -> T) -> T {
        let result = act(&mut self.state, self.now);
        self.state.woken().into_iter().for_each(Waker::wake);
        result
    }

    /// Adds a connection and returns its key, which is valid until [`Machine::close`].
    pub fn connect(&mut self, port: u16) -> usize {
        self.with(|state, now| state.connect(port, false, now))
    }

    /// Returns the id of a connection's data stream, once it has been opened; that of its error stream is ten less.
    #[must_use]
    pub fn stream(&self, key: usize) -> Option<u32> {
        self.state.stream(key)
    }

    /// Writes to a connection.
    ///
    /// # Errors
    /// When it takes no more.
    pub fn write(&mut self, key: usize, bytes: &[u8], cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.with(|state, now| state.poll_write(key, &[IoSlice::new(bytes)], now, cx))
    }

    /// Reads the next piece of a connection; none is its end.
    ///
    /// # Errors
    /// When it broke.
    pub fn read(&mut self, key: usize, cx: &mut Context<'_>) -> Poll<io::Result<Option<&[u8]>>> {
        let read = self.reading.remove(&key);
        let polled = self.with(|state, now| state.poll_chunk(key, read, now, cx));
        polled.map_ok(|chunk| chunk.map(|chunk| self.reading.entry(key).or_insert(chunk).rest()))
    }

    /// Ends our half of a connection.
    pub fn shutdown(&mut self, key: usize) {
        self.with(|state, now| state.shutdown(key, now));
    }

    /// Lets go of a connection.
    pub fn close(&mut self, key: usize) {
        self.reading.remove(&key);
        self.with(|state, now| state.detach(key, now));
    }

    /// Takes bytes from the peer. What makes no sense ends the session.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.with(|state, now| {
            if let Err(error) = state.receive(bytes, now) {
                state.end(&error.to_string());
            }
        });
    }

    /// Tells whether bytes are taken from the peer at the moment.
    pub fn is_reading(&mut self) -> bool {
        self.state.is_reading()
    }

    /// Runs the session's task until it would wait: all that it writes is appended to `out`. Returns whether it goes on
    /// after that.
    pub fn turn(&mut self, out: &mut Vec<u8>, cx: &mut Context<'_>) -> bool {
        self.state.begin_turn();
        let mut batch = Vec::new();
        loop {
            while self.with(|state, now| state.take_batch(&mut batch, now)) {
                out.append(&mut batch);
            }
            self.state.is_reading();
            match self.with(|state, now| state.end_turn(true, now, cx)) {
                Turn::More => {}
                Turn::Wait => return true,
                Turn::Done | Turn::Ended => return false,
            }
        }
    }

    /// Lets time pass up to the session's next appointment, but no further than `limit`. Returns how much.
    pub fn pass(&mut self, limit: Duration) -> Duration {
        let due = self.state.deadline(self.now);
        let passed = due.saturating_duration_since(self.now).min(limit);
        self.now += passed;
        if due <= self.now {
            self.with(State::tick);
        }
        passed
    }

    /// Lets time pass in which the machine slept: nothing happens meanwhile, and all that is due afterwards.
    pub fn sleep(&mut self, time: Duration) {
        self.state.deadline(self.now);
        self.now += time;
        self.with(State::tick);
    }

    /// Tells why the session has ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<&str> {
        self.state.ended().map(|reason| &**reason)
    }
}

/// Writes a client's frames and finds those of a server.
#[derive(Debug, Default)]
pub struct Codec {
    encoder: Encoder,
    decoder: Decoder,
}

impl Codec {
    /// Writes the two opening frames of a connection; `data` is the id of its data stream.
    pub fn open(&mut self, out: &mut Vec<u8>, data: u32, port: u16) {
        self.encoder.pair(out, data - 10, data, port);
    }

    /// Writes the opening frame of a stream without headers.
    pub fn open_bare(&mut self, out: &mut Vec<u8>, stream: u32) {
        self.encoder.bare(out, stream);
    }

    /// Writes a DATA frame.
    pub fn data(&mut self, out: &mut Vec<u8>, stream: u32, payload: &[u8]) {
        frame::data(out, stream, &[IoSlice::new(payload)], payload.len());
    }

    /// Writes the end of our half of a stream.
    pub fn end(&mut self, out: &mut Vec<u8>, stream: u32) {
        frame::fin(out, stream);
    }

    /// Writes a reset that cancels a stream.
    pub fn reset(&mut self, out: &mut Vec<u8>, stream: u32) {
        frame::reset(out, stream, frame::CANCEL);
    }

    /// Writes a PING.
    pub fn ping(&mut self, out: &mut Vec<u8>, id: u32) {
        frame::ping(out, id);
    }

    /// Finds all frames of the input. Returns how many events they are, and how much payload.
    ///
    /// # Panics
    /// If the input makes no sense.
    pub fn decode(&mut self, mut input: &[u8]) -> (usize, usize) {
        let (mut events, mut bytes) = (0, 0);
        while let Some(event) = self.decoder.next(&mut input).expect("valid frames") {
            events += 1;
            if let frame::Event::Data { payload, .. } = event {
                bytes += payload.len();
            }
        }
        (events, bytes)
    }
}
