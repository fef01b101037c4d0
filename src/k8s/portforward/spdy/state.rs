//! A session without its connection: which bytes to write next, and what the bytes that were read mean. Time comes in from
//! outside, wakers go out, so that nothing here waits.

mod clock;
mod hold;
mod input;
mod output;
#[cfg(test)]
mod tests;
mod transfer;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::k8s::portforward::ports::{Ports, Size};
use crate::k8s::portforward::spdy::chunks::{Chunk, Spare};
use crate::k8s::portforward::spdy::entry::{Entry, Half, Ours, Outcome};
use crate::k8s::portforward::spdy::frame::{Decoder, Encoder};
use crate::k8s::portforward::spdy::workers::{WORKERS, Workers};
pub use hold::SlowReaders;
use hold::{Held, Pause};

/// A connection that moves this much within [`BULK_SPAN`] is bulk, and keeps newcomers off its session for as long.
const BULK: u64 = 1 << 20;
const BULK_SPAN: Duration = Duration::from_secs(2);

/// So is one that moves this much one way without a word the other way, be it a client's or an application's: it may be
/// about to stall. As long as so much waits for readers, newcomers are kept off too.
const RUN: usize = 256 << 10;

/// One that moves this much in such a way is a transfer, as long as it goes on: what it asks for is all that can be had.
const TRANSFER: usize = 4 << 20;

/// A connection that moves this much in such a way makes more of the kind expected on its port.
const LARGE: usize = 64 << 10;

/// What HTTP/2 and TLS say before they close a connection is no use of it: at most so much for all that close, after a silence.
const GOODBYES: usize = 4 << 10;
const SILENCE: Duration = Duration::from_secs(1);

/// A session is open to newcomers while it has so many workers that take connections, and takes none for good once so many
/// have stood still with nobody left to wait for.
const USABLE: usize = 3;
const LOST: usize = 2;

/// Streams are spread over fresh sessions now and then: the peer keeps a little of each, and so may a load balancer.
pub(in crate::k8s::portforward) const MAX_OPENED: u64 = 10_000;
pub(in crate::k8s::portforward) const MAX_AGE: Duration = Duration::from_hours(1);

/// What a session does at the moment, for placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::k8s::portforward) struct Load {
    /// Connections in use.
    pub(in crate::k8s::portforward) live: usize,
    /// Whether it takes new connections at the moment.
    pub(in crate::k8s::portforward) open: bool,
    /// Whether it takes none only because much moves there; others of that kind may join.
    pub(in crate::k8s::portforward) bulk: bool,
    /// Whether it will never take any again.
    pub(in crate::k8s::portforward) worn: bool,
    /// The port of those of them that are to have it for themselves; of the last one, where necessity has mixed them.
    pub(in crate::k8s::portforward) apart: Option<u16>,
    /// Since when it has had connections without a break.
    pub(in crate::k8s::portforward) busy_since: Option<Instant>,
    /// When payload last moved or a connection was opened, or the session began.
    pub(in crate::k8s::portforward) active_at: Instant,
}

/// What a turn of the session's task has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// There is more to write, or to read.
    More,
    /// Nothing to do now.
    Wait,
    /// Nobody needs the session any more.
    Done,
    /// The session has ended.
    Ended,
}

/// Tasks to be woken; mostly one or two.
pub(super) type Wakers = SmallVec<[Waker; 4]>;

/// Why a session has ended.
pub(super) type Reason = Arc<str>;

/// The state of one session.
#[derive(Debug)]
pub(super) struct State {
    /// The connection's task.
    driver: Option<Waker>,
    /// Wakers to call once the lock is released.
    woken: Wakers,
    /// What the pod's ports were seen to do.
    ports: Arc<Ports>,
    slow_readers: SlowReaders,
    decoder: Decoder,
    encoder: Encoder,
    workers: Workers,
    connections: Slab<Entry>,
    /// Which connection a data stream belongs to.
    by_id: HashMap<u32, usize>,
    /// Connections that wait for a place, in order.
    opening: VecDeque<usize>,
    /// Connections that want to end or reset their stream.
    ending: VecDeque<usize>,
    /// Connections that wait for room to write.
    blocked: VecDeque<usize>,
    /// Connections that wait for a time.
    timed: Vec<usize>,
    /// The place of that list while the other is gone through.
    untimed: Vec<usize>,
    /// Connections in use, by worker; those without a place in the last field.
    live: [usize; WORKERS],
    unplaced: usize,
    /// Those of them that are to have the session for themselves, and the port of the last one.
    apart: usize,
    apart_port: u16,
    /// Bytes that have come and wait for readers.
    backlog: usize,
    /// Ids up to here are used.
    last_id: u32,
    /// How many connections were opened.
    opened: u64,
    /// Streams that were opened only to hear of a worker: by worker, the id, its place, and when.
    barriers: [Option<(u32, u64, Instant)>; WORKERS],
    /// Frames for the next batch.
    out: Vec<u8>,
    /// The last payload in it: its stream, and from where to where its frame goes.
    last_data: Option<(u32, usize, usize)>,
    /// The batch being filled.
    batch: u64,
    /// Pieces for what comes.
    spare: Spare,
    /// Why reading waits, if it does.
    pause: Option<Pause>,
    held: Held,
    /// Whether the session's task has passed over reading for that: then nothing of the connection wakes it.
    passed_over: bool,
    began: Instant,
    /// Whether payload is held back for a moment.
    guards: bool,
    /// When to look at what waits for a time.
    tick_at: Option<Instant>,
    /// When the next tick was due.
    due: Instant,
    /// When reading went on after a pause.
    resumed_at: Instant,
    /// When anything last came.
    heard_at: Instant,
    /// When something was last sent that asks for an answer, if nothing has come since.
    asked_at: Option<Instant>,
    /// When a sign of life was asked for, if nothing has come since.
    probed_at: Option<Instant>,
    /// When the probes were sent that the peer's read loop has not answered.
    probes: VecDeque<Instant>,
    /// When payload last moved.
    active_at: Instant,
    /// What that was before, if nothing but so many bytes for pods has moved since a silence: no more than goodbyes, perhaps.
    farewell: Option<(Instant, usize)>,
    /// Since when there have been connections.
    busy_since: Option<Instant>,
    /// Until when a bulk transfer keeps newcomers off.
    bulk_until: Option<Instant>,
    /// Until when one counts as such.
    transfer_until: Option<Instant>,
    /// Whether its transfers wait for those of other sessions. They are transfers for as long as they do.
    stands_back: bool,
    /// The last connection that was at work and is no transfer, and until when the session goes on for its sake.
    other: Option<(usize, Instant)>,
    /// Whether the peer has answered anything.
    proven: bool,
    /// No newcomers; ends with the last connection.
    retired: bool,
    /// Why no connection can be opened any more.
    refuses: Option<Reason>,
    ended: Option<Reason>,
}

impl State {
    pub(super) fn new(ports: Arc<Ports>, slow_readers: SlowReaders, now: Instant) -> Self {
        Self {
            slow_readers,
            driver: None,
            woken: Wakers::new(),
            ports,
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            workers: Workers::default(),
            connections: Slab::new(),
            by_id: HashMap::new(),
            opening: VecDeque::new(),
            ending: VecDeque::new(),
            blocked: VecDeque::new(),
            timed: Vec::new(),
            untimed: Vec::new(),
            live: [0; WORKERS],
            unplaced: 0,
            apart: 0,
            apart_port: 0,
            backlog: 0,
            last_id: output::PROBE,
            opened: 0,
            barriers: [None; WORKERS],
            out: Vec::new(),
            last_data: None,
            batch: 1,
            spare: Spare::default(),
            pause: None,
            held: Held::default(),
            passed_over: false,
            began: now,
            guards: false,
            tick_at: None,
            due: now,
            resumed_at: now,
            heard_at: now,
            asked_at: None,
            probed_at: None,
            probes: VecDeque::new(),
            active_at: now,
            farewell: None,
            busy_since: None,
            bulk_until: None,
            transfer_until: None,
            stands_back: false,
            other: None,
            proven: false,
            retired: false,
            refuses: None,
            ended: None,
        }
    }

    /// Takes the wakers to be called when the lock is released.
    pub(super) fn woken(&mut self) -> Wakers {
        mem::take(&mut self.woken)
    }

    fn wake_driver(&mut self) {
        // Taken, so that many writers wake it once; it leaves a new one when it next finds nothing to do.
        self.woken.extend(self.driver.take());
    }

    /// Begins a turn of the session's task: it need not be woken while it runs.
    pub(super) fn begin_turn(&mut self) {
        self.driver = None;
    }

    /// Ends a turn. `idle`: everything that was taken has been written.
    pub(super) fn end_turn(&mut self, idle: bool, now: Instant, cx: &Context<'_>) -> Turn {
        if self.ended.is_some() {
            return Turn::Ended;
        }
        if idle && self.has_output(now) {
            return Turn::More;
        }
        if self.passed_over && !self.is_paused() {
            // The reader has caught up during the turn, when there was nobody to wake.
            return Turn::More;
        }
        if self.is_done() {
            return Turn::Done;
        }
        self.driver = Some(cx.waker().clone());
        Turn::Wait
    }

    /// Tells what the session does.
    pub(super) fn load(&self, now: Instant) -> Load {
        let (mut stuck, mut lost, mut usable) = (0, 0, 0);
        for class in 0..WORKERS {
            if !self.workers.is_stuck(class, now) {
                usable += usize::from(!self.workers.is_suspect(class));
            } else if self.live[class] > 0 {
                stuck += 1;
            } else {
                lost += 1;
            }
        }
        let spoilt = lost >= LOST || lost > 0 && !self.workers.may_ask();
        let old = self.opened >= MAX_OPENED || now.duration_since(self.began) >= MAX_AGE;
        let worn = self.ended.is_some() || self.retired || old || spoilt;
        let sound = !worn && stuck == 0 && usable >= USABLE;
        let bulk = self.stands_back || self.bulk_until.is_some_and(|until| until > now);
        Load {
            live: self.live(),
            open: sound && !bulk && !self.is_paused() && self.backlog < RUN,
            // A reader that is slow for a moment is part of it; one that stalls makes it end.
            bulk: sound && bulk,
            worn,
            apart: (self.apart > 0).then_some(self.apart_port),
            busy_since: self.busy_since,
            active_at: self.active_at,
        }
    }

    /// Returns the id of a connection's data stream, once it has been opened.
    #[cfg(feature = "internals")]
    pub(super) fn stream(&self, key: usize) -> Option<u32> {
        Some(self.connections.get(key)?.place?.id)
    }

    /// Counts the connections in use.
    pub(super) fn live(&self) -> usize {
        self.unplaced + self.live.iter().sum::<usize>()
    }

    /// Tells whether the way is known to be short.
    pub(super) fn is_near(&self) -> bool {
        self.workers.is_near()
    }

    /// Tells whether the peer has proven to understand SPDY.
    pub(super) fn is_proven(&self) -> bool {
        self.proven
    }

    /// Returns why the session has ended, if it has.
    pub(super) fn ended(&self) -> Option<&Reason> {
        self.ended.as_ref()
    }

    /// Takes no newcomers any more, and ends with the last connection.
    pub(super) fn retire(&mut self) {
        self.retired = true;
        self.wake_driver();
    }

    /// Tells whether the session is retired and has nothing left to do.
    pub(super) fn is_done(&self) -> bool {
        self.retired && self.live() == 0
    }

    /// Ends the session and every connection.
    pub(super) fn end(&mut self, reason: &str) {
        if self.ended.is_some() {
            return;
        }
        let reason: Reason = reason.into();
        let broke: Arc<str> = format!("the port-forward broke: {reason}").into();
        self.connections.retain(|_, entry| entry.detached.is_none());
        // What others have come to is known, though perhaps not read yet.
        let open = self
            .connections
            .iter_mut()
            .filter(|(_, entry)| !entry.is_settled());
        for (_, entry) in open {
            // Payload that has not left cannot have had an effect.
            let unsent = entry.first_batch.is_none_or(|first| first == self.batch);
            let kind = if unsent && !entry.heard {
                io::ErrorKind::NotConnected
            } else {
                io::ErrorKind::ConnectionAborted
            };
            entry.failure.get_or_insert((kind, broke.clone()));
            self.woken.extend(entry.reader.take());
            self.woken.extend(entry.writer.take());
        }
        self.refuses = Some(broke);
        self.ended = Some(reason);
        self.wake_driver();
    }

    /// Opens no connection any more, and fails those that wait for it.
    fn refuse(&mut self, why: &str) {
        let why: Reason = why.into();
        for (_, entry) in &mut self.connections {
            if entry.place.is_none() {
                let failure = (io::ErrorKind::NotConnected, why.clone());
                entry.failure.get_or_insert(failure);
                self.woken.extend(entry.reader.take());
                self.woken.extend(entry.writer.take());
            }
        }
        self.refuses.get_or_insert(why);
    }

    /// Adds a connection to a port; nothing is sent yet. It may come just after the session has ended, since whoever places
    /// it here has looked before that.
    pub(super) fn connect(&mut self, port: u16, apart: bool, now: Instant) -> usize {
        self.opened += 1;
        if apart {
            self.apart += 1;
            self.apart_port = port;
        }
        self.busy_since.get_or_insert(now);
        (self.active_at, self.farewell) = (now, None);
        self.unplaced += 1;
        let failure = self.refuses.clone().map(|why| (io::ErrorKind::NotConnected, why));
        self.connections.insert(Entry {
            port,
            apart,
            failure,
            ..Entry::default()
        })
    }

    /// Asks for a connection to be opened, if it is not.
    pub(super) fn begin(&mut self, key: usize, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        if entry.place.is_none() && entry.begun_at.is_none() {
            entry.begun_at = Some(now);
            self.other = Some((key, now + BULK_SPAN));
            self.opening.push_back(key);
            self.time(key);
            self.wake_driver();
        }
    }

    /// Gives back a piece that was read, and takes the next one.
    pub(super) fn poll_chunk(
        &mut self,
        key: usize,
        read: Option<Chunk>,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<Chunk>>> {
        if let Some(chunk) = read {
            self.spare.put(chunk);
        }
        let entry = self.connections.get_mut(key).expect("its stream holds it");
        let chunk = entry.received.pop();
        if let Some(chunk) = chunk {
            entry.read_at = Some(now);
            self.backlog -= chunk.rest().len();
            self.caught_up(now);
            return Poll::Ready(Ok(Some(chunk)));
        }
        let entry = self.connections.get_mut(key).expect("its stream holds it");
        match entry.outcome() {
            Outcome::Open => {
                keep(&mut entry.reader, cx);
                self.begin(key, now);
                Poll::Pending
            }
            Outcome::End => Poll::Ready(Ok(None)),
            failed @ Outcome::Failed(..) => Poll::Ready(Err(failed.error())),
        }
    }

    /// Notes that reading goes on: the silence was our own wish.
    fn resumed(&mut self, now: Instant) {
        self.resumed_at = now;
        self.heard_at = now;
    }

    /// Ends our half of a connection.
    pub(super) fn shutdown(&mut self, key: usize, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        if entry.ours != Ours::Open {
            return;
        }
        if entry.place.is_none() {
            // It follows the opening.
            entry.ours = Ours::FinWanted;
        } else if entry.awaiting {
            entry.ours = Ours::Held(now);
            self.time(key);
        } else {
            self.want(key, Ours::FinWanted);
        }
    }

    /// Lets go of a connection that nobody uses any more. Unless both sides had ended it, the pod learns of it about a second
    /// later, as the runtime has it.
    pub(super) fn detach(&mut self, key: usize, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        entry.detached = Some(now);
        self.backlog -= entry.received.len();
        entry.received.clear(&mut self.spare);
        self.apart -= usize::from(entry.apart);
        if entry.heard && !entry.large {
            self.ports.note_size(entry.port, Size::Small);
        }
        let (awaiting, ours, place) = (entry.awaiting, entry.ours, entry.place);
        let streaming = entry.data == Half::Open && is_bulk(entry, now);
        match place {
            Some(place) => self.live[place.class] -= 1,
            None => self.unplaced -= 1,
        }
        self.caught_up(now);
        let alone = self.live() == 0;
        if alone {
            self.busy_since = None;
        }
        if let Some((before, _)) = self.farewell.take()
            && now.duration_since(self.active_at) < SILENCE
        {
            self.active_at = before;
        }
        let stuck = place.is_some_and(|place| self.workers.is_stuck(place.class, now));
        if alone && (streaming || stuck) {
            // A reset would not get past a stuck worker, nor stop a pod that sends before a second has passed.
            self.end("its last connection was abandoned");
            return;
        }
        if matches!(ours, Ours::Open | Ours::Held(_)) {
            let how = if awaiting {
                Ours::ResetWanted
            } else {
                Ours::FinWanted
            };
            self.want(key, how);
        }
        self.time(key);
        self.forget(key);
        if self.is_done() {
            self.wake_driver();
        }
    }

    fn want(&mut self, key: usize, ours: Ours) {
        if let Some(entry) = self.connections.get_mut(key)
            && entry.place.is_some()
        {
            entry.ours = ours;
            self.ending.push_back(key);
            self.wake_driver();
        }
    }

    /// Removes a connection if nothing is left of it.
    fn forget(&mut self, key: usize) {
        let Some(entry) = self.connections.get(key) else {
            return;
        };
        if entry.is_over() || entry.detached.is_some() && self.ended.is_some() {
            let entry = self.connections.remove(key);
            if let Some(place) = entry.place {
                self.by_id.remove(&place.id);
            }
        }
    }

    /// Puts a connection on the list of those that wait for a time.
    fn time(&mut self, key: usize) {
        if let Some(entry) = self.connections.get_mut(key)
            && !entry.timed
        {
            entry.timed = true;
            self.timed.push(key);
            self.wake_driver();
        }
    }
}

/// Tells whether a connection moves much at the moment.
fn is_bulk(entry: &Entry, now: Instant) -> bool {
    let (bytes, since) = entry.moved;
    bytes >= BULK && since.is_some_and(|since| now.duration_since(since) < BULK_SPAN)
}

/// Keeps the waker of a task that has to wait.
fn keep(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}
