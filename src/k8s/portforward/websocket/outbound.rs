//! What goes to the peer: whole frames, written out in whatever pieces the connection takes.

use std::io;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use super::frame::{self, LONGEST_CONTROL, Opcode};

/// Bytes in one frame at most: as much as a large SPDY frame, so that one is not cut, and the buffer stays in the CPU's cache.
pub(super) const LONGEST_DATA: usize = 64 << 10;

/// The state of the outgoing half.
pub(super) struct Outbound {
    /// What each message begins with.
    prefix: &'static [u8],
    /// Whole frames, of which `written` bytes are with the connection already. Kept when empty, so that it grows only once.
    frames: Vec<u8>,
    written: usize,
    /// The payload of the last PING without an answer.
    pong: Option<Control>,
    close: Close,
    /// Whether a PING is to be sent, and how many have been.
    ping: bool,
    pings: u64,
    /// Whether anything is in `frames`, or with the connection and not flushed.
    unflushed: bool,
    /// Makes the masking keys. They shall keep scripts in a browser from choosing the bytes on the wire (§10.3), which
    /// nobody does here, so a fast generator will do.
    random: fastrand::Rng,
}

/// A control frame's payload.
struct Control {
    bytes: [u8; LONGEST_CONTROL],
    length: usize,
}

/// Our Close frame.
enum Close {
    /// Not called for.
    No,
    /// To be sent, with this code.
    Due(Option<u16>),
    /// In `frames` or gone.
    Sent,
}

impl Outbound {
    pub(super) fn new(prefix: &'static [u8]) -> Self {
        Self {
            prefix,
            frames: Vec::new(),
            written: 0,
            pong: None,
            close: Close::No,
            ping: false,
            pings: 0,
            unflushed: false,
            random: fastrand::Rng::new(),
        }
    }

    /// Makes one frame of as much of `data` as fits, and tells how much that is, in bytes. Fails after a Close.
    pub(super) fn push(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.is_closed() {
            return Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "the WebSocket is closed",
            ));
        }
        let (data, _) = data.split_at(data.len().min(LONGEST_DATA));
        if !data.is_empty() {
            self.encode(Opcode::Binary, self.prefix, data);
        }
        Ok(data.len())
    }

    /// Answers a PING, unless our Close is out; an older one without an answer is passed over (§5.5.3).
    pub(super) fn pong(&mut self, payload: &[u8]) {
        if matches!(self.close, Close::Sent) {
            return;
        }
        let mut bytes = [0; LONGEST_CONTROL];
        let length = payload.len().min(LONGEST_CONTROL);
        bytes[..length].copy_from_slice(&payload[..length]);
        self.pong = Some(Control { bytes, length });
    }

    /// Sends a PING, unless our Close is out.
    pub(super) fn ping(&mut self) {
        self.ping = !matches!(self.close, Close::Sent);
    }

    /// Returns the number of the next PING, or of the one that is to be sent; they count from 1.
    pub(super) fn next_ping(&self) -> u64 {
        self.pings + 1
    }

    /// Sends a Close frame, unless there has been one: it is the last frame (§5.5.1).
    pub(super) fn close(&mut self, code: Option<u16>) {
        if !self.is_closed() {
            self.close = Close::Due(code);
        }
    }

    /// Whether a Close frame was called for.
    pub(super) fn is_closed(&self) -> bool {
        !matches!(self.close, Close::No)
    }

    /// Whether frames are to be written or flushed.
    pub(super) fn owes(&self) -> bool {
        self.unflushed || self.ping || self.pong.is_some() || matches!(self.close, Close::Due(_))
    }

    /// Writes all frames to the connection, control frames at the next edge between frames.
    pub(super) fn poll_write_out<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            while let Some(rest) = self.frames.get(self.written..)
                && !rest.is_empty()
            {
                let written = ready!(Pin::new(&mut *stream).poll_write(cx, rest))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.written += written;
            }
            self.frames.clear();
            self.written = 0;
            self.push_control();
            if self.frames.is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Writes all frames and flushes the connection.
    pub(super) fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_write_out(stream, cx))?;
        ready!(Pin::new(stream).poll_flush(cx))?;
        self.unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn push_control(&mut self) {
        if let Some(Control { bytes, length }) = self.pong.take() {
            self.encode(Opcode::Pong, &[], &bytes[..length]);
        }
        if mem::take(&mut self.ping) {
            self.encode(Opcode::Ping, &[], &[]);
            self.pings += 1;
        }
        if let Close::Due(code) = self.close {
            let code = code.map(u16::to_be_bytes);
            let code = code.as_ref().map_or(&[][..], |code| code);
            self.encode(Opcode::Close, &[], code);
            self.close = Close::Sent;
        }
    }

    fn encode(&mut self, opcode: Opcode, prefix: &[u8], payload: &[u8]) {
        let key = self.random.u32(..).to_ne_bytes();
        frame::encode(opcode, prefix, payload, key, &mut self.frames);
        self.unflushed = true;
    }
}
