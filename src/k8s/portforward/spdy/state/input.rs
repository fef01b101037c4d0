//! What the bytes from the peer mean.

use std::mem;

use tokio::time::Instant;
use tracing::trace;

use crate::k8s::portforward::cause;
use crate::k8s::portforward::ports::{Behaviour, Size};
use crate::k8s::portforward::spdy::entry::{Half, Ours, Outcome};
use crate::k8s::portforward::spdy::frame::{Event, FrameError};
use crate::k8s::portforward::spdy::state::output::{PAIR, PROBE};
use crate::k8s::portforward::spdy::state::{BULK, BULK_SPAN, GOODBYES, LARGE, RUN, SILENCE, State, TRANSFER};

impl State {
    /// Takes bytes from the peer.
    ///
    /// # Errors
    /// When they make no sense; the session is of no use then.
    pub(in crate::k8s::portforward::spdy) fn receive(
        &mut self,
        mut bytes: &[u8],
        now: Instant,
    ) -> Result<(), FrameError> {
        self.heard_at = now;
        self.asked_at = None;
        self.probed_at = None;
        let mut freed = false;
        while let Some(event) = self.decoder.next(&mut bytes)? {
            trace!(frame = %event, "received");
            self.proven = true;
            // Payload from the pod makes no room for payload to it.
            freed |= !matches!(event, Event::Data { .. });
            self.handle(&event, now);
        }
        if freed {
            self.release();
        }
        Ok(())
    }

    /// Tells the session's task whether to read.
    pub(in crate::k8s::portforward::spdy) fn is_reading(&mut self) -> bool {
        self.passed_over = self.is_paused();
        !self.passed_over
    }

    fn handle(&mut self, event: &Event<'_>, now: Instant) {
        match *event {
            Event::Reply { stream } => self.replied(stream, now),
            Event::Data { stream, payload, fin } => match self.find(stream) {
                Some((key, false)) => self.data(key, payload, fin, now),
                Some((key, true)) => {
                    if let Some(entry) = self.connections.get_mut(key)
                        && entry.error == Half::Open
                    {
                        entry.explain(payload);
                    }
                    if fin {
                        self.stream_ended(key, true, Half::Fin, now);
                    }
                }
                // Of a connection that was given up.
                None => {}
            },
            Event::Reset { stream, .. } => match self.find(stream) {
                Some((key, error_stream)) => self.stream_ended(key, error_stream, Half::Reset, now),
                None if stream == PROBE => {
                    if let Some(sent_at) = self.probes.pop_front() {
                        self.workers.arrived(sent_at);
                    }
                }
                None => self.barrier_answered(stream),
            },
            Event::Ping { id } => self.workers.pong(id, now),
            // Opens after this are silently ignored by the peer.
            Event::GoAway => {
                self.retired = true;
                self.refuse("the server takes no more connections on this port-forward");
            }
        }
    }

    /// Finds the connection of a stream, and whether that is its error stream.
    fn find(&self, stream: u32) -> Option<(usize, bool)> {
        if let Some(&key) = self.by_id.get(&stream) {
            return Some((key, false));
        }
        let key = self.by_id.get(&stream.wrapping_add(PAIR))?;
        Some((*key, true))
    }

    fn replied(&mut self, stream: u32, now: Instant) {
        let Some(&key) = self.by_id.get(&stream) else {
            return;
        };
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        entry.replied_at = Some(now);
        let held = entry.hold;
        if let Some(place) = entry.place {
            self.workers.handed(place.class, place.position);
        }
        if held {
            self.time(key);
            (self.guards, self.tick_at) = (true, None);
        }
    }

    fn barrier_answered(&mut self, stream: u32) {
        for class in 0..self.barriers.len() {
            if let Some((id, position, _)) = self.barriers[class]
                && id == stream
            {
                self.workers.handed(class, position);
            }
        }
    }

    fn data(&mut self, key: usize, payload: &[u8], fin: bool, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        if entry.data != Half::Open {
            return; // what follows an end was not to be sent
        }
        // Nor was what follows an end that has been believed without it.
        if !payload.is_empty() && !entry.late {
            if !entry.heard {
                entry.heard = true;
                if mem::take(&mut entry.hold) {
                    self.woken.extend(entry.writer.take());
                }
                self.ports.note(entry.port, Behaviour::Accepts, now);
            }
            entry.carried(false, payload.len());
            entry.unhanded = None;
            if let Ours::Held(since) = &mut entry.ours {
                *since = now;
            }
            if entry.detached.is_none() && entry.failure.is_none() {
                self.keep(key, payload, now);
            }
            self.moved(key, payload.len(), now);
        }
        if fin {
            self.stream_ended(key, false, Half::Fin, now);
        }
    }

    /// Notes that payload has moved.
    pub(super) fn moved(&mut self, key: usize, bytes: usize, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        let silent = now.duration_since(self.active_at) >= SILENCE;
        let before = self.farewell.filter(|_| !silent);
        let before = before.or(silent.then_some((self.active_at, 0)));
        self.farewell = before
            .map(|(at, sent)| (at, sent + bytes))
            .filter(|(_, sent)| entry.awaiting && *sent <= GOODBYES);
        self.active_at = now;
        let (moved, since) = &mut entry.moved;
        if since.is_none_or(|since| now.duration_since(since) >= BULK_SPAN) {
            (*moved, *since) = (0, Some(now));
        }
        *moved += bytes as u64;
        if *moved >= BULK || entry.run >= RUN {
            self.bulk_until = Some(now + BULK_SPAN);
        }
        if entry.run >= TRANSFER {
            self.transfer_until = Some(now + BULK_SPAN);
            self.other = self.other.filter(|(other, _)| *other != key);
        } else {
            self.other = Some((key, now + BULK_SPAN));
        }
        if entry.run >= LARGE && !mem::replace(&mut entry.large, true) {
            self.ports.note_size(entry.port, Size::Large);
        }
    }

    /// Notes the end of one of a connection's two streams.
    fn stream_ended(&mut self, key: usize, error_stream: bool, how: Half, now: Instant) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        entry.end(error_stream, how, now);
        let ours = entry.ours;
        if let Some(place) = entry.place
            && entry.last_payload > 0
            && matches!(ours, Ours::Open | Ours::Held(_))
            && !self.workers.is_handed(place.class, entry.last_payload)
        {
            // Payload may have arrived when nobody was left to take it.
            self.workers.suspect(place.class);
        }
        let settled = entry.is_settled();
        if settled {
            if let Outcome::Failed(..) = entry.outcome() {
                let text = String::from_utf8_lossy(&entry.text);
                if cause::kind(&text) == std::io::ErrorKind::ConnectionRefused {
                    self.ports.note(entry.port, Behaviour::Refuses, now);
                }
                if cause::is_sandbox_gone(&text) {
                    self.retired = true;
                }
            }
            self.woken.extend(entry.reader.take());
            self.woken.extend(entry.writer.take());
        } else {
            self.time(key);
        }
        // Our half must end too, or the peer keeps the stream for the session's life. No payload may follow.
        if matches!(ours, Ours::Open | Ours::Held(_)) {
            self.want(key, Ours::FinWanted);
        }
        self.forget(key);
    }
}
