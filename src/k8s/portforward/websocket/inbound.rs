//! What comes from the peer: takes the frames off and tells how the stream ended.

use std::borrow::Cow;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use super::channels::Channels;
use super::frame::{self, GOING_AWAY, Header, NORMAL, Opcode, PROTOCOL_ERROR};
use super::outbound::Outbound;
use crate::k8s::error;
use crate::k8s::portforward::cause;

/// Bytes read at once for headers and small frames. Larger ones also begin here and pay for it with a copy, so no more than
/// what makes reads of small frames rare.
const BUFFER: usize = 8 << 10;

/// The state of the incoming half.
pub(super) struct Inbound {
    /// What was read and not decoded yet is in `start..end`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// What is still to come of the current data frame's payload, in bytes.
    left: u64,
    /// Whether the last data frame was not its message's final one.
    open: bool,
    /// Which part of a message is data, if not all of it.
    channels: Option<Channels>,
    /// How many PONGs have come, and how often anything has.
    answered: u64,
    reads: u64,
    ended: Option<End>,
}

/// How the stream ended.
#[derive(Debug)]
pub(super) enum End {
    /// In good order.
    Clean,
    /// With an error of this kind and text.
    Broken(io::ErrorKind, Cow<'static, str>),
}

impl End {
    /// What a read answers from now on.
    pub(super) fn result(&self) -> io::Result<()> {
        match self {
            Self::Clean => Ok(()),
            Self::Broken(kind, text) => Err(io::Error::new(*kind, text.clone())),
        }
    }
}

impl Inbound {
    pub(super) fn new(channels: Option<Channels>) -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            left: 0,
            open: false,
            channels,
            answered: 0,
            reads: 0,
            ended: None,
        }
    }

    /// How the stream ended, once it has and all data before has been decoded.
    pub(super) fn end(&self) -> Option<&End> {
        self.ended.as_ref()
    }

    /// Counts the PONGs that have come.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Counts how often anything has come.
    pub(super) fn reads(&self) -> u64 {
        self.reads
    }

    /// Moves the data in the buffer to `out`, until one of them is used up or the stream ends. Control frames in between
    /// are answered through `replies`.
    pub(super) fn decode(&mut self, out: &mut ReadBuf<'_>, replies: &mut Outbound) {
        while self.ended.is_none() && out.remaining() > 0 {
            let moved = if self.left > 0 {
                self.payload(out)
            } else {
                frame::header(self.buffered()).and_then(|header| self.begin(header, replies))
            };
            match moved {
                Ok(true) => {}
                Ok(false) => return,
                Err(text) => {
                    replies.close(Some(PROTOCOL_ERROR));
                    self.ended = Some(End::Broken(io::ErrorKind::InvalidData, text.into()));
                }
            }
            if self.left == 0
                && !self.open
                && let Some(text) = self.channels.as_mut().and_then(Channels::failure)
            {
                replies.close(Some(NORMAL));
                self.ended = Some(End::Broken(cause::kind(&text), error::one_line(&text).into()));
            }
        }
    }

    /// Moves payload out of the buffer. Tells whether there was any.
    fn payload(&mut self, out: &mut ReadBuf<'_>) -> Result<bool, &'static str> {
        let buffered = &self.buffer[self.start..self.end];
        let (payload, _) = buffered.split_at(clamp(self.left, buffered.len()));
        let taken = match &mut self.channels {
            Some(channels) if !channels.is_data() => channels.take(payload)?,
            _ => {
                let (data, _) = payload.split_at(payload.len().min(out.remaining()));
                out.put_slice(data);
                data.len()
            }
        };
        self.start += taken;
        self.left -= taken as u64;
        Ok(taken > 0)
    }

    /// How much of the payload is better read without the buffer, when `room` is what the caller has for it: all that is
    /// more than the buffer would take.
    pub(super) fn direct(&self, room: usize) -> Option<u64> {
        let is_data = self.channels.as_ref().is_none_or(Channels::is_data);
        (is_data && self.start == self.end && clamp(self.left, room) >= BUFFER).then_some(self.left)
    }

    /// Counts payload that was read without the buffer, in bytes.
    pub(super) fn passed(&mut self, read: usize) {
        self.left -= read as u64;
        self.reads += 1;
    }

    /// Reads into the buffer. It has room: what [`Inbound::decode`] leaves is less than the largest header with the
    /// largest control frame.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let mut room = ReadBuf::new(&mut self.buffer[self.end..]);
        ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let read = room.filled().len();
        self.end += read;
        self.reads += 1;
        Poll::Ready(Ok(read))
    }

    /// Notes that the connection has ended. After a Close of ours that is in order, except within a frame.
    pub(super) fn eof(&mut self, closed: bool) {
        let whole = self.left == 0 && self.start == self.end;
        self.ended = Some(if closed && whole {
            End::Clean
        } else {
            let text = "the connection ended without a WebSocket Close";
            End::Broken(io::ErrorKind::UnexpectedEof, text.into())
        });
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Takes a header, and a control frame with its payload, off the buffer. Tells whether it was there.
    fn begin(&mut self, header: Option<Header>, replies: &mut Outbound) -> Result<bool, &'static str> {
        let Some(header) = header else {
            return Ok(false);
        };
        if matches!(header.opcode, Opcode::Continuation | Opcode::Binary) {
            if self.open != (header.opcode == Opcode::Continuation) {
                return Err("the WebSocket peer sent a fragment out of order");
            }
            if header.opcode == Opcode::Binary
                && let Some(channels) = &mut self.channels
            {
                channels.begin();
            }
            self.open = !header.is_final;
            self.left = header.length;
            self.start += header.size;
            return Ok(true);
        }
        let whole = header.size + clamp(header.length, frame::LONGEST_CONTROL);
        let Some(payload) = self.buffered().get(header.size..whole) else {
            return Ok(false);
        };
        match header.opcode {
            Opcode::Ping => replies.pong(payload),
            Opcode::Close => {
                let close = frame::close(payload)?;
                replies.close(close.as_ref().map(|(code, _)| *code));
                self.ended = Some(ended(close));
            }
            Opcode::Pong => self.answered += 1,
            Opcode::Continuation | Opcode::Binary => {}
        }
        self.start += whole;
        Ok(true)
    }
}

fn ended(close: Option<(u16, String)>) -> End {
    match close {
        None | Some((NORMAL | GOING_AWAY, _)) => End::Clean,
        Some((code, reason)) => {
            let text = error::one_line(&format!("the WebSocket was closed with code {code}: {reason}"));
            End::Broken(io::ErrorKind::ConnectionAborted, text.into())
        }
    }
}

/// The smaller of a length on the wire and one in memory.
fn clamp(length: u64, limit: usize) -> usize {
    usize::try_from(length).map_or(limit, |length| length.min(limit))
}
