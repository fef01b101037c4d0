//! Port-forwards through the API server's WebSocket channel protocol (`v4.channel.k8s.io`): one upgraded connection for
//! each stream. Works on every server version, and costs the round trips of an upgrade each time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::k8s::portforward::liveness::{
    ACTIVE, ACTIVE_ANSWER, ANSWER, JUMP, LINGER, LIVELY, QUIET, SILENT, SWALLOWED,
};
use crate::k8s::portforward::websocket::WebSocket;

/// How long a pod that spoke last may be silent before an end of ours is sent. Container runtimes do the same after an end
/// that they are told of.
const CUT: Duration = Duration::from_secs(1);

/// How long an end of ours is held back while the application may have more to read than its socket takes: longer than anyone is
/// likely to wait for, and not for ever, since a client that has left looks the same.
const UNREAD: Duration = Duration::from_mins(10);

/// When it is found out whether PINGs are answered, unless the pod speaks before: while the server can hardly be busy, and after
/// a refusal, which bytes that the runtime has not read when it closes would take away.
const FIRST: Duration = Duration::from_millis(250);

/// How long the answer may take where none has ever come; client-go's WebSockets wait as long.
const UNPROVEN: Duration = Duration::from_mins(1);

/// Whether PINGs are answered in a cluster: one connection finds it out for those that come after it. A PONG must be sent
/// (RFC 6455 §5.5.2), yet whoever is on the way may drop it. So what has never been answered is waited for longer.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers(Arc<AtomicBool>);

/// The connection to one port of a pod, over an upgraded connection `S`.
///
/// The protocol has no half-close: a Close ends both directions. Shutting down therefore only begins the end: the Close is sent
/// once the pod has been silent for a second, for thirty while an answer is awaited, or for ten minutes while the application may
/// have more to read than its socket takes. Dropping it closes at once.
///
/// Errors have the kind that the container runtime's words mean, `ConnectionRefused` when no byte can have reached the
/// application; `ConnectionAborted` where the port-forward broke or went silent. Silence is found out while somebody reads:
/// within 15 s, and 6 s while something is under way. A PING waits behind payload that the application does not read, so with
/// more of that than its socket is sure to take, nothing is found out; where no PING was ever answered, it takes a minute.
///
/// What was written leaves as soon as the connection takes it, while somebody reads, writes or flushes. All of it is cancel-safe.
pub(super) struct Channel<S> {
    websocket: WebSocket<S>,
    answers: Answers,
    life: Life,
    sleep: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Channel<S> {
    /// Takes a connection right after the upgrade.
    pub(super) fn new(stream: S, answers: Answers) -> Self {
        let now = Instant::now();
        Self {
            websocket: WebSocket::channels(stream),
            answers,
            life: Life::new(now),
            sleep: Box::pin(tokio::time::sleep_until(now + QUIET)),
        }
    }

    /// Does what time brings about, with nothing to read. Resolves with the end of reading.
    fn poll_time(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let now = Instant::now();
            let (reads, answered) = (self.websocket.reads(), self.websocket.answered());
            match self.life.look(reads, answered, self.answers(), now) {
                Act::Wait(until) => {
                    if self.sleep.deadline() != until {
                        self.sleep.as_mut().reset(until);
                    }
                    ready!(self.sleep.as_mut().poll(cx));
                }
                Act::Ask => self.ask(cx),
                Act::Close => self.websocket.close(cx),
                Act::End => return Poll::Ready(Ok(())),
                Act::GiveUp => return Poll::Ready(Err(broken(SILENT))),
            }
        }
    }

    /// Asks for a sign of life.
    fn ask(&mut self, cx: &Context<'_>) {
        let number = self.websocket.ping();
        self.life.asked(number);
        self.websocket.reply(cx);
    }

    /// Tells whether silence after a PING means anything.
    fn answers(&self) -> bool {
        if self.websocket.answered() > 0 {
            self.answers.0.store(true, Ordering::Relaxed);
        }
        self.answers.0.load(Ordering::Relaxed)
    }

    /// Tells why the stream ended with `error`, or why nothing can be written.
    fn cause(&self, error: &io::Error) -> io::Error {
        match self.websocket.failure() {
            Some(failure) if failure.kind() != io::ErrorKind::UnexpectedEof => failure,
            _ => broken(&error.to_string()),
        }
    }

    /// Has the reader look in time at what has just changed.
    fn hurry(&mut self) {
        let due = self.life.due();
        if due < self.sleep.deadline() {
            self.sleep.as_mut().reset(due);
        }
    }
}

fn broken(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        format!("the port-forward broke: {why}"),
    )
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Channel<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.websocket).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {
                if buf.filled().len() > before && this.life.received(Instant::now()) {
                    this.ask(cx);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(this.cause(&error))),
            Poll::Pending => this.poll_time(cx),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Channel<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.life.is_ending() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let written = ready!(Pin::new(&mut this.websocket).poll_write(cx, buf));
        let written = written.map_err(|error| match error.kind() {
            // The pod has ended it.
            io::ErrorKind::BrokenPipe if this.websocket.failure().is_none() => error,
            _ => this.cause(&error),
        })?;
        this.life.sent(written, Instant::now());
        this.hurry();
        // An error is left to the next call, which meets it too; so is what the connection does not take now.
        drop(Pin::new(&mut this.websocket).poll_flush(cx));
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = ready!(Pin::new(&mut this.websocket).poll_flush(cx));
        Poll::Ready(flushed.map_err(|error| this.cause(&error)))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Whoever drops it next would take away what has not left. Whether it does is the reader's to learn.
        let _ = ready!(Pin::new(&mut this.websocket).poll_flush(cx));
        this.life.end(Instant::now());
        this.hurry();
        Poll::Ready(Ok(()))
    }
}

/// What time calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// Nothing until then.
    Wait(Instant),
    /// A sign of life is to be asked for.
    Ask,
    /// Our end is to be sent.
    Close,
    /// It is over, although the server has not said so.
    End,
    /// Nobody is there any more.
    GiveUp,
}

/// What is known of a connection's life.
#[derive(Debug)]
struct Life {
    /// How often anything had come when it was last looked, and when something last had.
    reads: u64,
    heard_at: Instant,
    /// When a sign of life was asked for, if nothing has come since.
    asked_at: Option<Instant>,
    /// When it is to be asked for first.
    first_at: Option<Instant>,
    /// Whether signs of life are given here.
    answers: bool,
    /// When payload last moved, and when the pod last spoke.
    moved_at: Instant,
    spoke_at: Instant,
    /// When the first payload was sent after which nothing has come.
    sent_at: Option<Instant>,
    /// Payload sent in all, in bytes, how much of it when the pod last spoke, and how much of it the application is taken to have
    /// read: a pod that speaks has read what it was sent, unless that was so much that it may not have come so far.
    sent: u64,
    heard: u64,
    read: u64,
    /// When that was last found to be more than before.
    read_at: Instant,
    /// How much was sent before a PING that was answered, and before one that is yet to be, with its number.
    proven: u64,
    asked: Option<(u64, u64)>,
    /// Since when our end waits, and when it was sent.
    ended_at: Option<Instant>,
    closed_at: Option<Instant>,
    /// When it was to be looked at next.
    due: Instant,
}

impl Life {
    fn new(now: Instant) -> Self {
        Self {
            reads: 0,
            heard_at: now,
            asked_at: Some(now),
            first_at: Some(now + FIRST),
            answers: false,
            moved_at: now,
            spoke_at: now,
            sent_at: None,
            sent: 0,
            heard: 0,
            read: 0,
            read_at: now,
            proven: 0,
            asked: None,
            ended_at: None,
            closed_at: None,
            due: now + QUIET,
        }
    }

    /// Notes payload from the pod. Returns whether a first sign of life is to be asked for.
    fn received(&mut self, now: Instant) -> bool {
        (self.moved_at, self.spoke_at) = (now, now);
        self.heard = self.sent;
        if self.sent - self.proven <= SWALLOWED as u64 {
            self.read = self.sent;
        }
        self.first_at.take().is_some()
    }

    /// Notes payload to the pod.
    fn sent(&mut self, bytes: usize, now: Instant) {
        self.moved_at = now;
        self.sent_at.get_or_insert(now);
        self.sent += bytes as u64;
    }

    /// Notes the number of a PING, which is answered behind all payload before it.
    fn asked(&mut self, number: u64) {
        self.asked.get_or_insert((number, self.sent));
    }

    /// Notes that the user sends nothing more.
    fn end(&mut self, now: Instant) {
        self.ended_at.get_or_insert(now);
    }

    fn is_ending(&self) -> bool {
        self.ended_at.is_some()
    }

    /// Returns when to look next.
    fn due(&self) -> Instant {
        let silence = self.silence_due();
        self.or_closing(self.first_at.map_or(silence, |first| first.min(silence)))
    }

    fn or_closing(&self, when: Instant) -> Instant {
        self.closing_due().map_or(when, |closing| closing.min(when))
    }

    fn closing_due(&self) -> Option<Instant> {
        let patience = if self.may_be_unread() {
            UNREAD
        } else if self.sent > self.heard {
            LINGER
        } else {
            CUT
        };
        let close = |ended: Instant| ended.max(self.spoke_at).max(self.read_at) + patience;
        let closed = self
            .closed_at
            .map(|closed| closed.max(self.spoke_at) + ACTIVE_ANSWER);
        closed.or(self.ended_at.map(close))
    }

    fn silence_due(&self) -> Instant {
        // Something was under way when it was last heard of, or is now.
        let lively = self.sent_at.is_some() || self.heard_at.duration_since(self.moved_at) < LIVELY;
        match (self.asked_at, self.sent_at) {
            (None, Some(sent)) => sent.max(self.heard_at) + ACTIVE,
            (None, None) if lively => self.heard_at + ACTIVE,
            (None, None) => self.heard_at + QUIET,
            (Some(asked), Some(sent)) => (asked + ANSWER).min(asked.max(sent) + ACTIVE_ANSWER),
            (Some(asked), None) if lively => asked + ACTIVE_ANSWER,
            (Some(asked), None) => asked + ANSWER,
        }
    }

    /// Tells whether more is under way than every application's socket takes.
    fn may_be_unread(&self) -> bool {
        self.sent - self.read > SWALLOWED as u64
    }

    /// Tells whether silence means that nobody is there: the server speaks first, and answers what it reads.
    fn is_sure(&self, now: Instant) -> bool {
        let asked_for = self.asked_at.map(|asked| now.duration_since(asked));
        let answers = self.answers || asked_for >= Some(UNPROVEN);
        self.reads == 0 || answers && !self.may_be_unread()
    }

    /// Tells what is to be done now. `reads`: how often anything has come; `answered`: how many PINGs were answered; `answers`:
    /// whether signs of life are given here.
    fn look(&mut self, reads: u64, answered: u64, answers: bool, now: Instant) -> Act {
        if let Some((_, sent)) = self.asked.take_if(|(number, _)| *number <= answered) {
            self.proven = sent;
            if sent > self.read {
                (self.read, self.read_at) = (sent, now);
            }
        }
        let slept = now.saturating_duration_since(self.due) >= JUMP;
        if reads != self.reads {
            (self.reads, self.heard_at) = (reads, now);
            (self.asked_at, self.sent_at) = (None, None);
        } else if slept {
            // Nobody could answer in that time.
            self.heard_at = now;
            self.asked_at = None;
            self.sent_at = self.sent_at.map(|_| now);
        }
        self.answers = answers;
        let act = self.act(now);
        self.due = match act {
            Act::Wait(until) => until,
            _ => now,
        };
        act
    }

    fn act(&mut self, now: Instant) -> Act {
        if self.closing_due().is_some_and(|due| due <= now) {
            if self.closed_at.is_some() {
                // Who is there answers a Close, unless payload that is not read is in front of it.
                return if self.may_be_unread() {
                    Act::End
                } else {
                    Act::GiveUp
                };
            }
            self.closed_at = Some(now);
            return Act::Close;
        }
        if self.first_at.take_if(|first| *first <= now).is_some() {
            self.asked_at.get_or_insert(now);
            return Act::Ask;
        }
        if self.silence_due() > now {
            return Act::Wait(self.due());
        }
        if self.asked_at.is_none() {
            self.asked_at = Some(now);
            return Act::Ask;
        }
        if self.is_sure(now) {
            return Act::GiveUp;
        }
        Act::Wait(self.or_closing(now + QUIET))
    }
}

#[cfg(test)]
mod tests;
