//! What time brings about in a session: signs of life, patience that ends, connections that wait for a moment.

use std::io;
use std::mem;
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::liveness::{
    ACTIVE, ACTIVE_ANSWER, ANSWER, JUMP, LINGER, LIVELY, QUIET, SILENT, SWALLOWED,
};
use crate::k8s::portforward::spdy::entry::Ours;
use crate::k8s::portforward::spdy::state::State;

/// How long payload waits behind an application that does not read.
const HELD_UP: Duration = Duration::from_secs(5);

/// How long payload may wait before its worker is asked whether it was handed over.
const UNHANDED: Duration = Duration::from_secs(1);

/// How long a runtime may take to take a new stream, before the session counts as broken for newcomers.
const REPLY: Duration = Duration::from_secs(3);

/// How long payload is held back from a port that may refuse: where it does, payload that arrives later than the refusal
/// stops a worker of the peer for good. A refusal takes a few milliseconds.
const GUARD: Duration = Duration::from_millis(20);

/// How often connections that wait for a time are looked at; sooner while payload is held back from a port.
const TICK: Duration = Duration::from_millis(100);

impl State {
    /// Returns when [`State::tick`] is to be called next.
    pub(in crate::k8s::portforward::spdy) fn deadline(&mut self, now: Instant) -> Instant {
        let soon = !self.timed.is_empty() || self.workers.is_waiting() || self.is_paused();
        self.due = match (self.probed_at, self.asked_at) {
            // Not later because something else has happened meanwhile.
            _ if soon => *self
                .tick_at
                .get_or_insert(now + if self.guards { GUARD } else { TICK }),
            (Some(probed), asked) => probed + if asked.is_some() { ACTIVE_ANSWER } else { ANSWER },
            (None, Some(asked)) => asked + ACTIVE,
            (None, None) if self.is_lively(now) => self.heard_at + ACTIVE,
            (None, None) => self.heard_at + QUIET,
        };
        self.due
    }

    /// Does what time alone brings about.
    pub(in crate::k8s::portforward::spdy) fn tick(&mut self, now: Instant) {
        self.tick_at = None;
        self.guards = false;
        if now.duration_since(self.due) >= JUMP && self.ended.is_none() {
            // Nobody could answer in that time; and after it, nobody may be there to.
            self.resumed(now);
            self.asked_at = self.asked_at.map(|_| now);
            self.probe(now);
        }
        // A key that was used again may stand there twice.
        let mut timed = mem::replace(&mut self.timed, mem::take(&mut self.untimed));
        timed.sort_unstable();
        timed.dedup();
        for key in timed.drain(..) {
            self.tick_connection(key, now);
        }
        self.untimed = timed;
        self.tick_pause(now);
        // Workers that have become stuck or free change what may be written.
        self.release();
        self.check_alive(now);
    }

    /// Notes that the server has taken bytes after it had taken none for a moment. That is no answer, but none can be expected
    /// to what still waits behind them.
    pub(in crate::k8s::portforward::spdy) fn taken(&mut self, now: Instant) {
        self.asked_at = self.asked_at.map(|_| now);
        self.probed_at = self.probed_at.map(|_| now);
    }

    /// Looks at one connection that waits for a time, and keeps it on the list if it still does.
    fn tick_connection(&mut self, key: usize, now: Instant) {
        let paused = self.is_paused();
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        entry.timed = false;
        // What was not read cannot be missed.
        let mut waits = entry.ended_at.is_some() && (paused || entry.settle(self.resumed_at, self.heard_at));
        if waits {
            self.asked_at.get_or_insert(now);
        }
        if entry.is_settled() {
            self.woken.extend(entry.reader.take());
            self.woken.extend(entry.writer.take());
        }
        if entry.hold && entry.replied_at.is_some() {
            entry.hold = entry.replied_at.is_some_and(|at| now.duration_since(at) < GUARD);
            waits |= entry.hold;
            self.guards |= entry.hold;
            if !entry.hold {
                self.woken.extend(entry.writer.take());
            }
        }
        if let Some(place) = entry.place
            && entry.replied_at.is_none()
            && !entry.heard
            && entry.ended_at.is_none()
            && entry.failure.is_none()
        {
            waits = true;
            let waited = now.duration_since(place.at.max(self.resumed_at));
            // It may still be on its way to the server; what was sent later and has been answered tells that it is not.
            let arrived = self.workers.has_answered_after(place.at) || !self.workers.may_ask();
            let unsure = waited >= UNHANDED && !arrived;
            if unsure && !self.workers.is_suspect(place.class) {
                self.workers.suspect(place.class);
            }
            if !paused && arrived && waited >= REPLY + 4 * self.workers.round_trip() {
                self.fail(
                    key,
                    io::ErrorKind::TimedOut,
                    "the container runtime did not take the connection",
                );
                self.want(key, Ours::ResetWanted);
                self.retired = true;
            }
            if unsure {
                self.ask_loop(now);
            }
        }
        waits |= !paused && self.is_held_up(key, now);
        let Some(entry) = self.connections.get(key) else {
            return;
        };
        if let Some(since) = entry.begun_at
            && entry.place.is_none()
            && entry.failure.is_none()
        {
            waits = true;
            if !paused && now.duration_since(since.max(self.resumed_at)) >= REPLY {
                self.fail(
                    key,
                    io::ErrorKind::NotConnected,
                    "no worker of the container runtime takes the connection",
                );
                self.retired = true;
            }
        }
        waits |= self.is_holding(key, now);
        if let Some(entry) = self.connections.get(key)
            && let Some(since) = entry.detached
        {
            // A runtime that does not act upon the end by itself is told again, and then left alone.
            let gone = now.duration_since(since);
            waits = true;
            match entry.ours {
                Ours::FinSent if gone >= QUIET => self.want(key, Ours::ResetWanted),
                Ours::ResetSent if gone >= 2 * QUIET => {
                    if let Some(place) = entry.place {
                        self.by_id.remove(&place.id);
                    }
                    self.connections.remove(key);
                    return;
                }
                _ => {}
            }
        }
        if waits {
            self.time(key);
        }
        self.forget(key);
    }

    /// Sees to an end of ours that is held back. The application has its time to answer from when it could have read everything,
    /// as long as that takes. Returns whether it is still held back.
    fn is_holding(&mut self, key: usize, now: Instant) -> bool {
        let Some(entry) = self.connections.get_mut(key) else {
            return false;
        };
        let Ours::Held(since) = &mut entry.ours else {
            return false;
        };
        let waited = now.duration_since(*since);
        if let Some(place) = entry.place
            && !self.workers.is_handed(place.class, entry.last_payload)
        {
            if self.workers.is_suspect(place.class) {
                *since = now;
            } else if waited >= UNHANDED {
                self.workers.suspect(place.class);
            }
        } else if waited >= LINGER {
            self.want(key, Ours::FinWanted);
        }
        true
    }

    /// Sees to payload that may wait behind that of a connection whose application does not read. Its own connection is given
    /// up in the end, since their worker may stand still for as long as the other application likes. Returns whether it is
    /// still to be seen to.
    fn is_held_up(&mut self, key: usize, now: Instant) -> bool {
        let Some(entry) = self.connections.get_mut(key) else {
            return false;
        };
        let (Some(place), Some(since)) = (entry.place, entry.unhanded) else {
            return false;
        };
        let over = entry.detached.is_some() || entry.ended_at.is_some() || entry.failure.is_some();
        let handed = !entry.blocked && self.workers.is_handed(place.class, entry.last_payload);
        // With more than that, it may be its own application that does not read.
        if over || handed || entry.unheard() > SWALLOWED {
            entry.unhanded = None;
            return false;
        }
        let waited = now.duration_since(since.max(self.resumed_at));
        if waited < HELD_UP || !self.workers.is_stuck(place.class, now) {
            if waited >= UNHANDED {
                if !self.workers.is_suspect(place.class) {
                    self.workers.suspect(place.class);
                }
                self.ask_loop(now);
            }
            return true;
        }
        // What an application has answered may be one of several things that it was told.
        let kind = if entry.last_payload == 0 {
            io::ErrorKind::NotConnected
        } else {
            io::ErrorKind::ConnectionAborted
        };
        self.fail(
            key,
            kind,
            "it was held up by a connection whose application does not read",
        );
        self.want(key, Ours::ResetWanted);
        false
    }

    pub(super) fn fail(&mut self, key: usize, kind: io::ErrorKind, text: &str) {
        if let Some(entry) = self.connections.get_mut(key) {
            entry.failure.get_or_insert((kind, text.into()));
            self.backlog -= entry.received.len();
            entry.received.clear(&mut self.spare);
            self.woken.extend(entry.reader.take());
            self.woken.extend(entry.writer.take());
        }
    }

    /// Whether a connection was busy a moment ago.
    fn is_lively(&self, now: Instant) -> bool {
        self.live() > 0 && now.duration_since(self.active_at) < LIVELY
    }

    /// Asks for a sign of life after a silence, and ends the session when none comes. Any byte is one.
    fn check_alive(&mut self, now: Instant) {
        if self.is_paused() || self.ended.is_some() {
            return;
        }
        let answer = if self.asked_at.is_some() {
            ACTIVE_ANSWER
        } else {
            ANSWER
        };
        match self.probed_at {
            Some(at) if now.duration_since(at) >= answer => self.end(SILENT),
            Some(_) => {}
            None => {
                let silent = now.duration_since(self.heard_at);
                if silent >= ACTIVE && self.is_lively(now) {
                    // A transfer that stops in its middle, or an answer that does not come.
                    self.asked_at.get_or_insert(self.heard_at);
                }
                let active = self.asked_at.is_some_and(|at| now.duration_since(at) >= ACTIVE);
                if silent >= QUIET || active {
                    self.probe(now);
                }
            }
        }
    }
}
