//! What is written to the peer, and when.

use std::io::{self, IoSlice};
use std::mem;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tracing::trace;

use crate::k8s::portforward::ports::Behaviour;
use crate::k8s::portforward::spdy::entry::{Half, Ours, Outcome, Place};
use crate::k8s::portforward::spdy::frame;
use crate::k8s::portforward::spdy::state::{BULK_SPAN, State, TRANSFER, keep};
use crate::k8s::portforward::spdy::workers::WORKERS;

/// The id of a stream that is never opened: opening it later than a higher one is refused by the peer's read loop itself,
/// which makes a sign of life that needs no worker.
pub(super) const PROBE: u32 = 1;

/// What lies between the ids of a connection's two streams: they are odd, and belong to one worker.
pub(super) const PAIR: u32 = 2 * WORKERS as u32;

/// The largest stream id.
const MAX_ID: u32 = (1 << 31) - 1;

/// Payload of one frame, and of one connection in one batch: what a neighbour's frame may have to wait for. The queue of the
/// peer counts frames, and handles each as a whole on every hop, so a connection that is alone sends larger ones.
const FRAME: usize = 64 << 10;
const FRAME_ALONE: usize = 512 << 10;

/// Where a batch is full.
const MAX_BATCH: usize = 1 << 20;

/// How often a worker is asked by a stream that the peer refuses: it writes a line into its log each time.
const BARRIER_PERIOD: Duration = Duration::from_millis(100);

impl State {
    /// Asks the peer for a first sign of life.
    pub(in crate::k8s::portforward::spdy) fn greet(&mut self, now: Instant) {
        self.round(now);
        self.probed_at = Some(now);
        self.asked_at = Some(now);
    }

    /// Sends as much as there is room for. Payload that the pod's port has had no chance to refuse goes out with the opening
    /// unless it could do harm.
    pub(in crate::k8s::portforward::spdy) fn poll_write(
        &mut self,
        key: usize,
        parts: &[IoSlice<'_>],
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let entry = self.connections.get(key).expect("its stream holds it");
        if entry.failure.is_some() || entry.data != Half::Open || entry.error != Half::Open {
            return match entry.outcome() {
                // The end is there, and what it means will be in a moment.
                Outcome::Open => self.wait(key, false, cx),
                outcome => Poll::Ready(Err(outcome.error())),
            };
        }
        if entry.ours != Ours::Open {
            return Poll::Ready(Err(Outcome::End.error()));
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        if entry.place.is_none() {
            self.begin(key, now);
            self.place_waiting(now);
        }
        let entry = self.connections.get(key).expect("its stream holds it");
        if entry.unheard() < TRANSFER {
            self.other = Some((key, now + BULK_SPAN));
        }
        self.append(key, now, cx, |out, room, _| {
            let sent = length.min(room);
            frame::payload(out, parts, sent);
            Poll::Ready(Ok(sent))
        })
    }

    /// Lets `append` add to what a transfer sends, where it goes out from, at most so many bytes; where it adds none, nothing has
    /// happened. `None` leaves all others to [`poll_write`](Self::poll_write), which opens connections.
    pub(in crate::k8s::portforward::spdy) fn poll_append(
        &mut self,
        key: usize,
        now: Instant,
        cx: &mut Context<'_>,
        append: impl FnOnce(&mut Vec<u8>, usize, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Option<Poll<io::Result<usize>>> {
        let entry = self.connections.get(key).expect("its stream holds it");
        let writable = entry.place.is_some()
            && entry.failure.is_none()
            && (entry.data, entry.error, entry.ours) == (Half::Open, Half::Open, Ours::Open);
        (writable && entry.unheard() >= TRANSFER).then(|| self.append(key, now, cx, append))
    }

    /// The same for any connection that may be written to.
    fn append(
        &mut self,
        key: usize,
        now: Instant,
        cx: &mut Context<'_>,
        append: impl FnOnce(&mut Vec<u8>, usize, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let shared = self.is_shared();
        let entry = self.connections.get_mut(key).expect("its stream holds it");
        let place = match entry.place {
            Some(place) if !entry.hold => place,
            _ => return self.wait(key, false, cx),
        };
        let most = if shared { FRAME } else { FRAME_ALONE };
        if entry.batch.0 != self.batch {
            entry.batch = (self.batch, 0);
        }
        let room = most.saturating_sub(entry.batch.1);
        // A frame that has not left can still grow, and counts as one.
        let end = self.out.len();
        let begun = self.last_data.filter(|last| (last.0, last.2) == (place.id, end));
        let credit = begun.is_some() || self.workers.credit(place.class, shared);
        if room == 0 || end >= MAX_BATCH || !credit {
            if shared {
                entry.unhanded.get_or_insert(now);
                self.time(key);
            }
            return self.wait(key, true, cx);
        }
        let start = match begun {
            Some((_, start, _)) => start,
            None => frame::begin_data(&mut self.out, place.id),
        };
        let sent = match append(&mut self.out, room, cx) {
            Poll::Ready(Ok(sent @ 1..)) => sent,
            nothing => {
                self.out.truncate(end);
                return nothing;
            }
        };
        trace!(stream = place.id, bytes = sent, "DATA to be sent");
        frame::finish(&mut self.out, start);
        if begun.is_some() {
            self.workers.grown(place.class, sent);
        } else {
            entry.last_payload = self.workers.sent_payload(place.class, sent);
        }
        self.last_data = Some((place.id, start, self.out.len()));
        entry.batch.1 += sent;
        entry.first_batch.get_or_insert(self.batch);
        entry.carried(true, sent);
        if shared {
            entry.unhanded.get_or_insert(now);
            self.time(key);
        }
        self.asked_at.get_or_insert(now);
        self.moved(key, sent, now);
        self.wake_driver();
        Poll::Ready(Ok(sent))
    }

    /// Lets a writer wait: on the list of those that need room, or for something of its own.
    fn wait(&mut self, key: usize, room: bool, cx: &Context<'_>) -> Poll<io::Result<usize>> {
        if let Some(entry) = self.connections.get_mut(key) {
            keep(&mut entry.writer, cx);
            if room && !mem::replace(&mut entry.blocked, true) {
                self.blocked.push_back(key);
                self.wake_driver();
            }
        }
        Poll::Pending
    }

    /// Tells whether several connections use the session.
    fn is_shared(&self) -> bool {
        self.live() > 1
    }

    /// Takes everything that is to be written now. Returns whether there is anything.
    pub(in crate::k8s::portforward::spdy) fn take_batch(
        &mut self,
        batch: &mut Vec<u8>,
        now: Instant,
    ) -> bool {
        self.pump(now);
        if self.out.is_empty() {
            return false;
        }
        mem::swap(&mut self.out, batch);
        self.last_data = None;
        self.batch += 1;
        self.release();
        true
    }

    /// Tells whether anything is to be written.
    pub(in crate::k8s::portforward::spdy) fn has_output(&mut self, now: Instant) -> bool {
        self.pump(now);
        !self.out.is_empty()
    }

    /// Writes the frames that nobody waits for inside a call.
    fn pump(&mut self, now: Instant) {
        if self.ended.is_some() {
            return;
        }
        self.place_waiting(now);
        for _ in 0..self.ending.len() {
            if let Some(key) = self.ending.pop_front()
                && !self.finish(key)
            {
                self.ending.push_back(key);
            }
        }
        let shared = self.is_shared();
        if self.workers.is_round_due(shared) && !self.round(now) {
            self.ask_by_barriers(now);
        }
    }

    /// Opens the connections that wait for it, in their order, as far as workers can take them.
    fn place_waiting(&mut self, now: Instant) {
        while let Some(&key) = self.opening.front() {
            let waits = self
                .connections
                .get(key)
                .is_some_and(|entry| entry.place.is_none() && entry.failure.is_none());
            if waits && !self.place(key, now) {
                break;
            }
            self.opening.pop_front();
            if let Some(entry) = self.connections.get_mut(key) {
                self.woken.extend(entry.writer.take());
            }
        }
    }

    /// Opens a connection if a worker can take it.
    fn place(&mut self, key: usize, now: Instant) -> bool {
        let Some(class) = self.workers.choose(&self.live, now) else {
            return false;
        };
        let error = self.next_id(class);
        let id = error + PAIR;
        if id > MAX_ID {
            self.retired = true;
            return false;
        }
        let Some(entry) = self.connections.get_mut(key) else {
            return true;
        };
        self.last_id = id;
        self.encoder.pair(&mut self.out, error, id, entry.port);
        self.workers.sent(class);
        let position = self.workers.sent(class);
        entry.place = Some(Place {
            id,
            class,
            position,
            at: now,
        });
        entry.hold = match self.ports.get(entry.port, now) {
            Some(Behaviour::Accepts) => false,
            Some(Behaviour::Refuses) => true,
            // Should the port refuse, the harm stays with this connection.
            None => self.live[class] > 0,
        };
        if entry.ours == Ours::FinWanted {
            self.ending.push_back(key);
        }
        self.by_id.insert(id, key);
        self.unplaced -= 1;
        self.live[class] += 1;
        self.asked_at.get_or_insert(now);
        self.time(key);
        true
    }

    /// Returns the next odd id of a worker.
    fn next_id(&self, class: usize) -> u32 {
        let mut id = self.last_id + 2;
        while id as usize % WORKERS != class {
            id += 2;
        }
        id
    }

    /// Ends or resets our half of a connection, if its worker has room.
    fn finish(&mut self, key: usize) -> bool {
        let Some(entry) = self.connections.get_mut(key) else {
            return true;
        };
        let Some(place) = entry.place else {
            return true;
        };
        if !matches!(entry.ours, Ours::FinWanted | Ours::ResetWanted) {
            return true;
        }
        if !self.workers.room(place.class) {
            return false;
        }
        if entry.ours == Ours::FinWanted {
            frame::fin(&mut self.out, place.id);
            entry.ours = Ours::FinSent;
        } else {
            frame::reset(&mut self.out, place.id, frame::CANCEL);
            entry.ours = Ours::ResetSent;
        }
        self.workers.sent(place.class);
        self.forget(key);
        true
    }

    fn round(&mut self, now: Instant) -> bool {
        let out = &mut self.out;
        self.workers.round(now, |id| frame::ping(out, id))
    }

    /// Asks workers how far they are when a stuck one leaves no room for PINGs.
    fn ask_by_barriers(&mut self, now: Instant) {
        if !self.opening.is_empty() {
            return; // ids must rise
        }
        let shared = self.is_shared();
        for class in 0..WORKERS {
            let lately =
                self.barriers[class].is_some_and(|(_, _, at)| now.duration_since(at) < BARRIER_PERIOD);
            if lately
                || self.workers.credit(class, shared)
                || self.workers.is_stuck(class, now)
                || !self.workers.room(class)
            {
                continue;
            }
            let id = self.next_id(class);
            if id > MAX_ID {
                continue;
            }
            self.last_id = id;
            self.encoder.bare(&mut self.out, id);
            let position = self.workers.sent(class);
            self.barriers[class] = Some((id, position, now));
        }
    }

    /// Asks for a sign of life.
    pub(super) fn probe(&mut self, now: Instant) {
        if self.last_id > PROBE {
            self.send_probe(now);
        } else {
            self.round(now);
        }
        self.probed_at = Some(now);
        self.wake_driver();
    }

    /// Asks the peer's read loop, which needs no worker to answer, whether what was sent has arrived, unless it was asked. That
    /// changes nothing about how long the session may be silent.
    pub(super) fn ask_loop(&mut self, now: Instant) {
        if self.probes.is_empty() && self.last_id > PROBE {
            self.send_probe(now);
            self.wake_driver();
        }
    }

    fn send_probe(&mut self, now: Instant) {
        self.encoder.bare(&mut self.out, PROBE);
        self.probes.push_back(now);
    }

    /// Wakes the writers that have room.
    pub(super) fn release(&mut self) {
        let shared = self.is_shared();
        for _ in 0..self.blocked.len() {
            let Some(key) = self.blocked.pop_front() else {
                break;
            };
            let Some(entry) = self.connections.get_mut(key) else {
                continue;
            };
            let most = if shared { FRAME } else { FRAME_ALONE };
            let full = entry.batch.0 == self.batch && entry.batch.1 >= most;
            let credit = entry
                .place
                .is_none_or(|place| self.workers.credit(place.class, shared));
            if credit && !full && self.out.len() < MAX_BATCH {
                entry.blocked = false;
                self.woken.extend(entry.writer.take());
            } else if entry.blocked {
                self.blocked.push_back(key);
            }
        }
    }
}
