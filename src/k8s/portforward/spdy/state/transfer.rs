//! What a session with transfers does for others: it takes turns with those of other sessions, unless somebody beside its own would
//! have to wait for that.

use std::mem;
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::spdy::entry::Entry;
use crate::k8s::portforward::spdy::state::{BULK_SPAN, State, TRANSFER};

/// For how long an answer is expected at any moment. No longer, since those that spoke last need not wait for one: HTTP/2 has
/// words that ask for none.
const EXPECTED: Duration = Duration::from_secs(10);

impl State {
    /// Tells whether there are transfers, and nothing beside them that would have to wait for their turns.
    pub(in crate::k8s::portforward::spdy) fn is_transfer(&self, now: Instant) -> bool {
        self.has_transfer(now) && !self.is_mixed(now)
    }

    fn has_transfer(&self, now: Instant) -> bool {
        self.stands_back || self.transfer_until.is_some_and(|until| until > now)
    }

    /// Tells whether a connection may have to wait for others: for a transfer, for a reader that stalls, which may keep the session
    /// from being read, or for an application that keeps its worker.
    pub(in crate::k8s::portforward::spdy) fn is_in_the_way_of(&self, key: usize, now: Instant) -> bool {
        let place = self.connections.get(key).and_then(|entry| entry.place);
        self.has_transfer_beside(key, now)
            || self.has_staller_beside(key, now)
            || place.is_some_and(|place| self.workers.is_stuck(place.class, now))
    }

    /// Tells whether another connection than this one is a transfer. One that has ended still looks like it, but moves nothing.
    fn has_transfer_beside(&self, key: usize, now: Instant) -> bool {
        let goes_on = |entry: &Entry| {
            entry
                .moved
                .1
                .is_some_and(|since| now.duration_since(since) < 2 * BULK_SPAN)
        };
        self.has_transfer(now)
            && self.connections.iter().any(|(other, entry)| {
                other != key && entry.run >= TRANSFER && (self.stands_back || goes_on(entry))
            })
    }

    /// Tells whether a connection that is none of the transfers has had anything to do lately, or waits for an answer.
    fn is_mixed(&self, now: Instant) -> bool {
        let expects = |entry: &Entry| {
            let asked = entry.awaiting && entry.run < TRANSFER && entry.detached.is_none();
            let since = entry.moved.1.filter(|_| asked);
            since.is_some_and(|since| now.duration_since(since) < EXPECTED)
        };
        self.other.is_some_and(|(_, until)| until > now)
            || self.connections.iter().any(|(_, entry)| expects(entry))
    }

    /// Ends a turn of the session's task before it has done anything: it waits for transfers of other sessions. Returns whether
    /// it has to.
    pub(in crate::k8s::portforward::spdy) fn stand_back(&mut self, now: Instant, cx: &Context<'_>) -> bool {
        self.stands_back = self.ended.is_none() && !self.is_mixed(now);
        if self.stands_back {
            self.driver = Some(cx.waker().clone());
        }
        self.stands_back
    }

    /// Goes on after it stood back, as the transfer that it was.
    pub(in crate::k8s::portforward::spdy) fn take_turn(&mut self, now: Instant) {
        if mem::take(&mut self.stands_back) {
            self.transfer_until = Some(now + BULK_SPAN);
            self.bulk_until = Some(now + BULK_SPAN);
        }
    }
}
