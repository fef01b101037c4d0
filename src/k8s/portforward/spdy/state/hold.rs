//! Readers that do not keep up. What they leave is kept within bounds; beyond those the session is not read, which TCP passes
//! on to the pod, and which holds up everybody on the session. So in the end the slow ones give way, judged by how long the
//! others have been held up and not by whether a reader moves at all.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::spdy::entry::{Entry, Ours};
use crate::k8s::portforward::spdy::state::{LARGE, State};

/// Who takes nothing for so long, of what is there, is more than a moment late.
const STALL: Duration = Duration::from_millis(100);

/// What is borne of readers that do not keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowReaders {
    /// What may wait for all readers of a session before it is read no further: TCP then slows the pod down.
    pub bytes: usize,
    /// How long they may hold up neighbours that wait for an answer.
    pub timeout: Duration,
}

impl Default for SlowReaders {
    fn default() -> Self {
        Self {
            bytes: 16 << 20,
            timeout: Duration::from_secs(5),
        }
    }
}

impl SlowReaders {
    /// Returns what may wait for one reader that is alone on its session.
    pub(super) fn alone(self) -> usize {
        self.bytes / 16
    }

    /// Returns what may wait for one that has neighbours: more, for the moment in which these finish, since all stop together.
    fn shared(self) -> usize {
        self.bytes / 4
    }

    /// Returns how long neighbours are held up if none is known to wait for anything: the pod may still want to tell them
    /// something.
    fn longest(self) -> Duration {
        self.timeout * 6
    }
}

/// Why the session is not read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pause {
    /// The connection whose reader most is left for.
    pub(super) slowest: usize,
    /// Up to when it has been counted how long it holds others up.
    counted: Instant,
}

/// For how long reading has stood still since a neighbour was last heard.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// In all.
    total: Duration,
    /// While a neighbour waited for an answer.
    awaited: Duration,
}

impl State {
    /// Tells whether reading waits for readers.
    pub(super) fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    /// Keeps what has come for a connection's reader.
    pub(super) fn keep(&mut self, key: usize, payload: &[u8], now: Instant) {
        let most = self.most();
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        if entry.received.len() == 0 {
            entry.read_at = Some(now);
        }
        entry.received.push(payload, &mut self.spare);
        self.woken.extend(entry.reader.take());
        self.backlog += payload.len();
        let kept = entry.received.len();
        if kept < LARGE {
            self.held = Held::default();
        }
        if self.pause.is_none() && (kept >= most || self.backlog >= self.slow_readers.bytes) {
            let slowest = self.slowest().unwrap_or(key);
            self.pause = Some(Pause {
                slowest,
                counted: now,
            });
        }
    }

    /// Notes that a reader has taken something, and goes on reading if enough was taken.
    pub(super) fn caught_up(&mut self, now: Instant) {
        let Some(pause) = self.pause else {
            return;
        };
        let left = self
            .connections
            .get(pause.slowest)
            .map_or(0, |entry| entry.received.len());
        if left < self.most() / 2 && self.backlog < self.slow_readers.bytes / 2 {
            self.resume(now);
        }
    }

    /// Goes on reading: the silence was our own wish.
    pub(super) fn resume(&mut self, now: Instant) {
        self.count(now);
        self.pause = None;
        self.resumed(now);
        self.wake_driver();
    }

    /// Gives readers up once they have held up others for too long: all that have stopped, else the slowest.
    pub(super) fn tick_pause(&mut self, now: Instant) {
        self.count(now);
        let SlowReaders { timeout, .. } = self.slow_readers;
        if self.pause.is_none() || self.held.total < timeout {
            return;
        }
        let patient = self.held.awaited < timeout && self.held.total < self.slow_readers.longest();
        let mut given_up = self.stopped(now);
        if given_up.is_empty() && !patient {
            given_up.extend(self.slowest());
        }
        for &key in &given_up {
            self.fail(
                key,
                io::ErrorKind::ConnectionAborted,
                "it was not read fast enough, and held up others",
            );
            self.want(key, Ours::ResetWanted);
        }
        if !given_up.is_empty() {
            self.resume(now);
            self.held = Held::default();
        }
    }

    fn count(&mut self, now: Instant) {
        let Some(pause) = &mut self.pause else {
            return;
        };
        let time = now.duration_since(pause.counted);
        pause.counted = now;
        // By now: the one that it was at first may have caught up.
        let slowest = self.slowest();
        // Whoever has left much is not held up: it has yet to read that. Nor is one that has heard the end.
        let may_wait = |(key, entry): (usize, &Entry)| {
            Some(key) != slowest && is_used(entry) && entry.received.len() < LARGE && !entry.heard_end()
        };
        if !self.connections.iter().any(may_wait) {
            self.held = Held::default();
            return;
        }
        let waits = |(key, entry): (usize, &Entry)| {
            let opening = entry.begun_at.is_some() && entry.replied_at.is_none();
            Some(key) != slowest && is_used(entry) && !entry.heard_end() && (entry.awaiting || opening)
        };
        self.held.total += time;
        if self.connections.iter().any(waits) {
            self.held.awaited += time;
        }
    }

    /// Returns what may wait for one reader.
    fn most(&self) -> usize {
        if self.live() > 1 {
            self.slow_readers.shared()
        } else {
            self.slow_readers.alone()
        }
    }

    /// Finds the connection for whose reader most is left.
    fn slowest(&self) -> Option<usize> {
        let left = |entry: &Entry| entry.received.len();
        let used = self.connections.iter().filter(|(_, entry)| is_used(entry));
        used.max_by_key(|(_, entry)| left(entry)).map(|(key, _)| key)
    }

    /// Finds the connections whose readers leave much and have taken nothing for long.
    fn stopped(&self, now: Instant) -> Vec<usize> {
        let stopped = |entry: &Entry| has_stopped(entry, self.slow_readers.timeout, now);
        let keys = self.connections.iter().filter(|(_, entry)| stopped(entry));
        keys.map(|(key, _)| key).collect()
    }

    /// Tells whether the reader of another connection than this one keeps the session from being read, or is about to.
    pub(super) fn has_staller_beside(&self, key: usize, now: Instant) -> bool {
        let stalls = |(other, entry)| other != key && has_stopped(entry, STALL, now);
        self.is_paused() && self.slowest() != Some(key) || self.connections.iter().any(stalls)
    }
}

/// Tells whether a connection's reader leaves much and has taken nothing for `time`.
fn has_stopped(entry: &Entry, time: Duration, now: Instant) -> bool {
    let idle = |at| now.duration_since(at) >= time;
    is_used(entry) && entry.received.len() >= LARGE && entry.read_at.is_some_and(idle)
}

/// Tells whether a connection has a user that may still get something.
fn is_used(entry: &Entry) -> bool {
    entry.detached.is_none() && entry.failure.is_none()
}
