//! The lingering close of RFC 9112 section 9.6. Bytes that arrive at a closed socket, or lie unread in one, reset the
//! connection, and the reset destroys what the client has not read yet of the answer. So what it still sends is read and
//! thrown away, within bounds.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// How long a client may pause in its sending: it has the answer by then.
const SILENCE: Duration = Duration::from_secs(1);

/// How much of a client's sending is thrown away at most.
const MOST: usize = 64 << 20;

/// Bytes read at once.
const PIECE: usize = 8 << 10;

/// A close that waits for the client's.
#[derive(Debug)]
pub(super) struct Linger {
    until: Instant,
    silence: Pin<Box<Sleep>>,
    left: usize,
}

impl Linger {
    /// Begins one; the client may go on sending for `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            until: Instant::now() + longest,
            silence: Box::pin(sleep(SILENCE.min(longest))),
            left: MOST,
        }
    }

    /// Reads until the client has ended, in whatever way, or a bound is reached.
    pub(super) fn poll<S: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, stream: &mut S) -> Poll<()> {
        loop {
            let mut piece = [0; PIECE];
            let mut piece = ReadBuf::new(&mut piece);
            match Pin::new(&mut *stream).poll_read(cx, &mut piece) {
                Poll::Ready(Ok(())) if !piece.filled().is_empty() => {
                    let now = Instant::now();
                    self.left = self.left.saturating_sub(piece.filled().len());
                    if self.left == 0 || now >= self.until {
                        return Poll::Ready(());
                    }
                    self.silence.as_mut().reset(self.until.min(now + SILENCE));
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => {
                    ready!(self.silence.as_mut().poll(cx));
                    return Poll::Ready(());
                }
            }
        }
    }
}
