//! The task of a session: moves bytes between its connection and its state.

use std::future::Future;
use std::io;
use std::mem;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::k8s::portforward::spdy::state::Turn;
use crate::k8s::portforward::spdy::{Phase, Shared, frame};
use crate::k8s::portforward::turns::Transfer;

/// How much is read at once: several TLS records.
const READ: usize = 64 << 10;

/// How often one poll goes round before others get their turn, a TLS record each time: as much as a reader then takes in one
/// piece. Where twenty transfers run, a neighbour waits for all of them to have had their turn.
const ROUNDS: usize = 4;

/// How much moves before the thread looks for what has come meanwhile. A transfer and whoever feeds it keep each other ready to
/// run, and a thread that always has somebody ready looks after so many tasks only, of which each moves half a megabyte.
const LOOK: usize = 256 << 10;

/// How often others go first before something is written: what they have for the session leaves in the same write, and each
/// write costs API server, kubelet and container runtime a wake-up. A request passes two tasks on its way here.
const COURTESY: u8 = 2;

/// Drives one session until its connection or its use ends.
pub(super) struct Driver<S> {
    io: S,
    shared: Arc<Shared>,
    /// The batch being written, and how much of it has been.
    batch: Vec<u8>,
    written: usize,
    /// Whether what was written may still lie in a buffer of the connection.
    unflushed: bool,
    /// Whether the connection last took nothing.
    stalled: bool,
    /// How often others have gone first.
    waited: u8,
    /// How much has moved since the thread last looked.
    unseen: usize,
    /// Whether it was told that the peer understands SPDY.
    proven: bool,
    /// Its part in the turns that transfers take, and whether it is one.
    transfer: Transfer,
    is_transfer: bool,
    buffer: Box<[u8]>,
    sleep: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    pub(super) fn new(io: S, shared: Arc<Shared>, transfer: Transfer) -> Self {
        Self {
            io,
            shared,
            batch: Vec::new(),
            written: 0,
            unflushed: false,
            stalled: false,
            waited: 0,
            unseen: 0,
            proven: false,
            transfer,
            is_transfer: false,
            buffer: vec![0; READ].into(),
            sleep: Box::pin(tokio::time::sleep_until(Instant::now())),
        }
    }

    /// Writes until there is nothing left or the connection takes no more. Returns how many bytes were written.
    fn write(&mut self, now: Instant, cx: &mut Context<'_>) -> io::Result<usize> {
        let mut progress = 0;
        loop {
            if self.written == self.batch.len() {
                self.written = 0;
                self.batch.clear();
                let batch = &mut self.batch;
                if !self.shared.with(|state| state.take_batch(batch, now)) {
                    break;
                }
            }
            let rest = self.batch.get(self.written..).unwrap_or_default();
            let Poll::Ready(written) = Pin::new(&mut self.io).poll_write(cx, rest)? else {
                self.stalled = true;
                return Ok(progress);
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            if mem::take(&mut self.stalled) {
                self.shared.lock().taken(now);
            }
            self.written += written;
            progress += written;
            self.unflushed = true;
        }
        if self.unflushed && Pin::new(&mut self.io).poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        Ok(progress)
    }

    /// Reads once. Returns how many bytes came.
    fn read(&mut self, now: Instant, cx: &mut Context<'_>) -> io::Result<usize> {
        if !self.shared.lock().is_reading() {
            return Ok(0);
        }
        let mut buffer = ReadBuf::new(&mut self.buffer);
        if Pin::new(&mut self.io).poll_read(cx, &mut buffer)?.is_pending() {
            return Ok(0);
        }
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed it",
            ));
        }
        let count = bytes.len();
        let (received, proven) = self
            .shared
            .with(|state| (state.receive(bytes, now), state.is_proven()));
        if proven && !mem::replace(&mut self.proven, true) {
            let prove = |phase: &mut Phase| {
                let first = *phase == Phase::Unproven;
                if first {
                    *phase = Phase::Proven;
                }
                first
            };
            self.shared.phase.send_if_modified(prove);
        }
        received.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(count)
    }

    /// Moves bytes both ways as long as there are any and others need not go first, within bounds.
    fn exchange(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let now = Instant::now();
            let wrote = match self.write(now, cx) {
                Ok(wrote) => wrote,
                Err(error) => {
                    self.read_rest(now, cx);
                    return Err(error);
                }
            };
            let moved = wrote + self.read(now, cx)?;
            if moved == 0 {
                return Ok(());
            }
            self.unseen += moved;
            if self.is_transfer {
                self.transfer.moved(moved, now);
                if self.transfer.waits() {
                    return Ok(());
                }
            }
        }
        self.let_others_go_first(cx);
        Ok(())
    }

    /// Goes on once all that are ready have had their turn, and those for whom something has come.
    fn let_others_go_first(&mut self, cx: &mut Context<'_>) {
        self.unseen = 0;
        // Its waker is the runtime's to call by now; nothing is left to wait for here.
        let _ = pin!(tokio::task::yield_now()).poll(cx);
    }

    /// Reads what is there already of a connection that takes nothing any more: answers may be among it. Tokio's budget for a
    /// task bounds that.
    fn read_rest(&mut self, now: Instant, cx: &mut Context<'_>) {
        while matches!(self.read(now, cx), Ok(1..)) {}
    }

    /// Says goodbye as far as the connection takes it at once. Nothing of a connection is left that would need more.
    fn close(&mut self, cx: &mut Context<'_>) {
        let mut goodbye = Vec::new();
        frame::go_away(&mut goodbye);
        if self.written == self.batch.len() {
            let _ = Pin::new(&mut self.io).poll_write(cx, &goodbye);
        }
        let _ = Pin::new(&mut self.io).poll_shutdown(cx);
    }
}

impl<S> Driver<S> {
    /// Ends the session; the first reason counts.
    fn end(&self, reason: &str) -> Poll<()> {
        self.shared.with(|state| state.end(reason));
        if let Some(reason) = self.shared.lock().ended().cloned() {
            self.shared.phase.send_replace(Phase::Ended(reason));
        }
        Poll::Ready(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Driver<S> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let now = Instant::now();
        let (many, is_transfer, near) = this.shared.with(|state| {
            state.begin_turn();
            (state.live() > 1, state.is_transfer(now), state.is_near())
        });
        this.is_transfer = is_transfer;
        if near {
            this.transfer.note_near();
        }
        if this.unseen >= LOOK {
            this.let_others_go_first(cx);
            return Poll::Pending;
        }
        if many && this.waited < COURTESY && this.written == this.batch.len() {
            if this.waited == 0
                && let Err(error) = this.read(now, cx)
            {
                return this.end(&error.to_string());
            }
            this.waited += 1;
            // It goes behind all that is ready to run.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.waited = 0;
        loop {
            if this.transfer.waits() {
                if this.transfer.poll_turn(cx).is_ready() {
                    this.shared.with(|state| state.take_turn(now));
                } else if this.shared.with(|state| state.stand_back(now, cx)) {
                    return Poll::Pending;
                } else {
                    this.transfer.leave();
                    this.is_transfer = false;
                }
            }
            if let Err(error) = this.exchange(cx) {
                return this.end(&error.to_string());
            }
            if this.transfer.waits() {
                continue;
            }
            let now = Instant::now();
            let idle = this.written == this.batch.len();
            let (turn, deadline) = this
                .shared
                .with(|state| (state.end_turn(idle, now, cx), state.deadline(now)));
            match turn {
                Turn::More => continue,
                Turn::Done => {
                    this.close(cx);
                    return this.end("it was closed");
                }
                Turn::Ended => return this.end("it was closed"),
                Turn::Wait => {}
            }
            if this.sleep.deadline() != deadline {
                this.sleep.as_mut().reset(deadline);
            }
            if this.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            this.shared.with(|state| {
                state.begin_turn();
                state.tick(now);
            });
        }
    }
}

impl<S> Drop for Driver<S> {
    /// However the task ends, nobody may wait for it.
    fn drop(&mut self) {
        let _ = self.end("kube-tunnel is shutting down");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::runtime::Builder;
    use tokio::sync::mpsc;

    use crate::drain::Drain;
    use crate::k8s::portforward::spdy::{Phase, Session, SlowReaders};
    use crate::k8s::portforward::turns::Turns;

    /// What the connection holds.
    const PIPE: usize = 4 << 10;

    /// What a download's frames carry.
    const FRAME: usize = 32 << 10;

    fn start(io: DuplexStream, drain: &Drain) -> Session {
        let slow_readers = SlowReaders::default();
        Session::start(io, Arc::default(), slow_readers, Arc::default(), drain)
    }

    /// A peer that takes the contents of the connection four times a second, for so long, and answers what asks for an
    /// answer once it has arrived.
    async fn peer(mut io: DuplexStream, time: Duration) {
        let (begun, mut unread, mut bytes) = (tokio::time::Instant::now(), Vec::new(), [0; PIPE]);
        while begun.elapsed() < time {
            let Ok(count @ 1..) = io.read(&mut bytes).await else {
                return;
            };
            unread.extend_from_slice(&bytes[..count]);
            while let [first, _, _, kind, _, length @ ..] = &unread[..]
                && let [high, middle, low, payload @ ..] = length
                && let size = u32::from_be_bytes([0, *high, *middle, *low]) as usize
                && let Some(payload) = payload.get(..size)
            {
                let id: Vec<u8> = payload.iter().take(4).copied().collect();
                let answer = match (first, kind) {
                    (0x80, 1) => Some(2), // a stream gets a reply
                    (0x80, 6) => Some(6),
                    _ => None,
                };
                if let Some(kind) = answer {
                    io.write_all(&[0x80, 3, 0, kind, 0, 0, 0, 4]).await.unwrap();
                    io.write_all(&id).await.unwrap();
                }
                unread.drain(..8 + size);
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        std::future::pending().await
    }

    /// Reads the first signs of life that are asked for, and an opening with its payload. Returns the ids of the two streams.
    async fn streams(io: &mut DuplexStream, payload: &[u8]) -> Vec<Vec<u8>> {
        let (mut opened, mut ids) = (Vec::new(), Vec::new());
        while ids.len() < 2 || !opened.ends_with(payload) {
            io.read_buf(&mut opened).await.unwrap();
            ids = opened
                .windows(12)
                .filter(|frame| frame[..4] == [0x80, 3, 0, 1])
                .map(|frame| frame[8..].to_vec())
                .collect();
        }
        ids
    }

    #[tokio::test]
    async fn what_the_server_said_before_it_closed_is_read_though_it_takes_no_more() {
        let (ours, mut theirs) = duplex(PIPE);
        let drain = Drain::new();
        let session = start(ours, &drain);
        let mut stream = session.connect(80, true);
        stream.write_all(b"request").await.unwrap();
        let ids = streams(&mut theirs, b"request").await;
        let data = [&ids[1][..], &[1, 0, 0, 6], b"answer"].concat();
        let end = [&ids[0][..], &[1, 0, 0, 0]].concat();
        theirs.write_all(&[data, end].concat()).await.unwrap();
        drop(theirs);
        stream.write_all(b"more").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_bytes_slowly_is_not_dead_until_it_takes_none() {
        let (ours, theirs) = duplex(PIPE);
        let drain = Drain::new();
        let slow = Duration::from_secs(30);
        drain.spawn(peer(theirs, slow));
        let session = start(ours, &drain);
        let begun = tokio::time::Instant::now();
        let mut stream = session.connect(80, true);
        stream.write_all(&vec![0; 4 << 20]).await.unwrap_err();
        assert!(begun.elapsed() >= slow, "dead after {:?}", begun.elapsed());
        assert!(begun.elapsed() < slow + Duration::from_secs(7));
        assert!(matches!(*session.phase().borrow(), Phase::Ended(_)));
    }

    /// Downloads so many frames over a session of its own, and tells of each.
    fn download(
        name: usize,
        frames: usize,
        turns: &Arc<Turns>,
        moved: &mpsc::UnboundedSender<usize>,
        drain: &Drain,
    ) {
        let (ours, mut theirs) = duplex(8 * FRAME);
        drain.spawn(async move {
            let ids = streams(&mut theirs, b"all").await;
            theirs
                .write_all(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1])
                .await
                .unwrap();
            let frame = [&ids[1][..], &[0, 0, 0x80, 0], &[0; FRAME]].concat();
            for _ in 0..frames {
                if theirs.write_all(&frame).await.is_err() {
                    return;
                }
            }
            std::future::pending().await
        });
        let session = Session::start(ours, Arc::default(), SlowReaders::default(), turns.clone(), drain);
        let (mut stream, moved) = (session.connect(80, true), moved.clone());
        drain.spawn(async move {
            stream.write_all(b"all").await.unwrap();
            let mut bytes = vec![0; FRAME];
            while stream.read_exact(&mut bytes).await.is_ok() && moved.send(name).is_ok() {}
        });
    }

    #[test]
    fn a_transfer_lets_its_thread_look_for_what_has_come_meanwhile() {
        const ALL: usize = (128 << 20) / FRAME;
        const WORDS: usize = 10;
        // It would not look while there is anything to do.
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(u32::MAX)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (drain, (moved, order)) = (Drain::new(), mpsc::unbounded_channel());
            download(0, ALL, &Arc::default(), &moved, &drain);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            drain.spawn(async move {
                let (mut peer, _) = listener.accept().await.unwrap();
                let (mut reader, mut writer) = peer.split();
                tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            });
            let mut peer = TcpStream::connect(address).await.unwrap();
            for _ in 0..WORDS {
                peer.write_u8(1).await.unwrap();
                peer.read_u8().await.unwrap();
            }
            assert!(
                order.len() < ALL,
                "everything had moved before {WORDS} words were answered"
            );
        });
    }

    #[tokio::test(start_paused = true)]
    async fn transfers_of_several_sessions_take_turns() {
        let (drain, turns) = (Drain::new(), Arc::<Turns>::default());
        let (moved, mut order) = mpsc::unbounded_channel();
        for name in 0..3 {
            download(name, usize::MAX, &turns, &moved, &drain);
        }
        let mut next = async || order.recv().await.unwrap();
        for _ in 0..(128 << 20) / FRAME {
            next().await;
        }
        let (mut last, mut changes) = (next().await, 0);
        for _ in 0..(96 << 20) / FRAME {
            let name = next().await;
            changes += u32::from(name != last);
            last = name;
        }
        // What comes as a turn begins or ends may interleave.
        assert!((2..60).contains(&changes), "{changes} changes");
    }
}
