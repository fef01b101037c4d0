//! A server of port-forwards within the client's own connection: it echoes every connection's bytes, without a task, and
//! without memory of its own once it has grown.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What the connection holds; a client that does not read what comes back is not read from either.
const ROOM: usize = 256 << 10;

/// The connection.
#[derive(Debug, Default)]
pub(crate) struct Echo {
    /// The beginning of a frame: its head, and the first four bytes of a control frame.
    head: Vec<u8>,
    /// Bytes of the current frame that are echoed, or passed over.
    echoed: usize,
    skipped: usize,
    /// What goes back.
    back: VecDeque<u8>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Echo {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = self.echoed + self.skipped;
            let wanted = match self.head.first() {
                _ if left > 0 => left,
                Some(0x80) => 12 - self.head.len(),
                _ => 8 - self.head.len().min(8),
            };
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if self.echoed > 0 {
                self.back.extend(now);
                self.echoed -= now.len();
            } else if self.skipped > 0 {
                self.skipped -= now.len();
            } else {
                self.head.extend_from_slice(now);
                self.begin();
            }
        }
    }

    /// Acts upon the head of a frame once it is there.
    fn begin(&mut self) {
        let length =
            |head: &[u8]| usize::from(head[5]) << 16 | usize::from(head[6]) << 8 | usize::from(head[7]);
        match self.head[..] {
            [0x80, _, _, kind, .., a, b, c, d] if self.head.len() == 12 => {
                let answer = match kind {
                    1 => Some(2), // a stream gets a reply
                    6 => Some(6),
                    _ => None,
                };
                if let Some(answer) = answer {
                    self.back.extend([0x80, 3, 0, answer, 0, 0, 0, 4, a, b, c, d]);
                }
                self.skipped = length(&self.head) - 4;
                self.head.clear();
            }
            [0..0x80, ..] if self.head.len() == 8 => {
                self.echoed = length(&self.head);
                self.back.extend(&self.head);
                self.head.clear();
            }
            _ => {}
        }
    }
}

impl AsyncRead for Echo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.back.is_empty() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (front, _) = self.back.as_slices();
        let count = front.len().min(buf.remaining());
        buf.put_slice(&front[..count]);
        self.back.drain(..count);
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Echo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.back.len() >= ROOM {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = buf.len().min(ROOM);
        self.take(&buf[..count]);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
