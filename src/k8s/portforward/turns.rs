//! Transfers take turns. Each would go on at any moment, and each that does has API server, kubelet, container runtime and pod
//! at work for it: with twenty of them, whoever else wants a word waits behind twenty in every one of these, and behind
//! twenty here. Two are as bad: beside one, servers still look for others now and then. One at a time moves nearly as much, since
//! a processor that is busy gets no faster by being asked more often.
//!
//! A transfer moves one piece whenever it likes, and needs its turn only for going on; so one whose server has nothing for it
//! waits for nobody. Nor does one that moves little in its turns, as long as it moves little, and nobody waits for it: a client that
//! takes its time, or an application that says something now and then. No turns are taken while all of them together are
//! slower than what processors would be busy with, nor where the way is long: then links or applications bound them, each by
//! itself, and TCP is slow to begin again after a pause.

use std::collections::VecDeque;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// How much one turn moves, in bytes: much more than what the sockets of one hop hold ready, else each transfer goes on in the
/// background of the others' turns. Measured with twenty of them on a real cluster: after turns of 8 MiB a neighbour waits
/// three times as long as after these, and with 2 MiB there might as well be none.
const TURN: u64 = 16 << 20;

/// How much a round of all turns moves, with few transfers or many, as far as [`TURN_LEAST`] allows: a second's worth.
const ROUND: u64 = 320 << 20;
const TURN_LEAST: u64 = 4 << 20;

/// How long a transfer may find nothing to move within its turn. A server that begins again after a pause, behind others,
/// needs some milliseconds.
const GAP: Duration = Duration::from_millis(30);

/// Turns are taken where all transfers together move so much within [`SPAN`].
const BUSY: u64 = 64 << 20;
const SPAN: Duration = Duration::from_secs(1);

/// A transfer that moves less than this within a [`SPAN`], while nothing of ours keeps it from more, is slow for reasons of its own.
/// Where several go on at a time, each has its part of that to move.
const LITTLE: u64 = BUSY / 2;

/// After this a slow transfer takes part again, whatever it moves: beside many that take no part either, it may be slow because
/// of them.
const SLOW: Duration = Duration::from_secs(30);

/// For how long a transfer has had its turn, the last one or some of them, when its pace is judged. At full speed a turn is over
/// by then.
const JUDGED: Duration = Duration::from_millis(100);

/// What the transfers of a program share.
#[derive(Debug)]
pub(super) struct Turns(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// How many go on at a time where there are more.
    at_once: usize,
    /// How many transfers there have been.
    count: u64,
    /// How many sessions know their way to be short. One is enough: those that are opened in a rush hear late of it.
    near: usize,
    running: Vec<Running>,
    /// The others that want to go on, in order, with whom to tell.
    waiting: VecDeque<(u64, Option<Waker>)>,
    /// Whom to wake once the lock is free.
    woken: Vec<Waker>,
    /// When the span began, how much was moved in it, and whether the last one was busy.
    span: Option<Instant>,
    moved: u64,
    was_busy: bool,
}

/// A transfer whose turn it is.
#[derive(Debug)]
struct Running {
    id: u64,
    /// How much it has moved in it, and when it last did.
    moved: u64,
    moved_at: Instant,
}

/// What comes of having moved something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// No turns are taken.
    IsFree,
    /// It may go on, others or not.
    HasTurn,
    /// It is in the row.
    Waits,
    /// It would have to wait, or others for it, and is slow.
    IsSlow,
}

/// How much a transfer has moved while it could have moved more, and for how long that was so.
#[derive(Debug, Default)]
struct Pace {
    moved: u64,
    time: Duration,
    /// Up to when that was counted; nothing while it is not.
    counted: Option<Instant>,
}

impl Pace {
    /// Counts from now on, if it does not.
    fn go_on(&mut self, now: Instant) {
        self.counted.get_or_insert(now);
    }

    /// Counts something that was moved, and the time up to now, as far as that is no longer than `most`.
    fn note(&mut self, bytes: u64, most: Duration, now: Instant) {
        if let Some(counted) = self.counted.replace(now) {
            self.time += now.duration_since(counted).min(most);
        }
        self.moved += bytes;
    }

    /// Once so much time was counted, tells whether it was less than so many bytes within a [`SPAN`], and begins anew.
    fn is_less(&mut self, little: u64, time: Duration) -> Option<bool> {
        if self.time < time {
            return None;
        }
        let is_little = (self.moved as f64) < little as f64 * self.time.div_duration_f64(SPAN);
        (self.moved, self.time) = (0, Duration::ZERO);
        Some(is_little)
    }
}

impl Default for Turns {
    /// One at a time.
    fn default() -> Self {
        Self::new(1)
    }
}

impl Turns {
    /// Makes turns for so many transfers at a time: as many as there are threads to carry them.
    pub(super) fn new(at_once: usize) -> Self {
        Self(Mutex::new(Inner {
            at_once: at_once.max(1),
            ..Inner::default()
        }))
    }

    /// Does something under the lock, and wakes whom it concerns after it.
    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        // What the lock guards is plain code; a panic inside such code left it consistent.
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut inner);
        let woken = mem::take(&mut inner.woken);
        drop(inner);
        woken.into_iter().for_each(Waker::wake);
        result
    }
}

impl Inner {
    /// Counts what was moved. Returns whether turns are to be taken.
    fn count(&mut self, bytes: u64, now: Instant) -> bool {
        let span = *self.span.get_or_insert(now);
        if now.duration_since(span) >= SPAN {
            // Nothing at all for a while is not busy, whatever was before it.
            self.was_busy = self.moved >= BUSY && now.duration_since(span) < 2 * SPAN;
            (self.span, self.moved) = (Some(now), 0);
        }
        self.moved += bytes;
        self.near > 0 && (self.was_busy || self.moved >= BUSY)
    }

    /// Lets all go on.
    fn clear(&mut self) {
        self.running.clear();
        let wakers = self.waiting.drain(..).filter_map(|(_, waker)| waker);
        self.woken.extend(wakers);
    }

    /// Forgets a transfer.
    fn leave(&mut self, id: u64, now: Instant) {
        self.running.retain(|running| running.id != id);
        self.waiting.retain(|(waiting, _)| *waiting != id);
        self.next(now);
    }

    /// Gives turns to those that wait, as far as there is room.
    fn next(&mut self, now: Instant) {
        while self.has_room()
            && let Some((id, waker)) = self.waiting.pop_front()
        {
            self.begin(id, now);
            self.woken.extend(waker);
        }
        // Whoever is the first now looks after those that run.
        let first = self.waiting.front_mut().and_then(|(_, waker)| waker.take());
        self.woken.extend(first);
    }

    /// Tells whether one more may go on.
    fn has_room(&self) -> bool {
        self.running.len() < self.at_once
    }

    /// Notes that a transfer has moved something, and tells whether it has to wait for its turn. `is_slow`: whether it has moved
    /// little in those that it had.
    fn moved(&mut self, id: u64, bytes: u64, is_slow: bool, now: Instant) -> Verdict {
        if !self.count(bytes, now) {
            self.clear();
            return Verdict::IsFree;
        }
        let (turn, alone) = (self.turn(), self.waiting.is_empty());
        if let Some(index) = self.running.iter().position(|running| running.id == id) {
            let running = &mut self.running[index];
            running.moved += bytes;
            running.moved_at = now;
            if alone || running.moved < turn && !is_slow {
                return Verdict::HasTurn;
            }
            self.running.swap_remove(index);
            if !is_slow {
                self.waiting.push_back((id, None));
            }
            self.next(now);
        } else if alone && self.has_room() {
            self.begin(id, now);
            return Verdict::HasTurn;
        } else if !is_slow {
            self.waiting.push_back((id, None));
        }
        if is_slow { Verdict::IsSlow } else { Verdict::Waits }
    }

    fn begin(&mut self, id: u64, now: Instant) {
        self.running.push(Running {
            id,
            moved: 0,
            moved_at: now,
        });
    }

    fn turn(&self) -> u64 {
        let others = self.waiting.len() as u64;
        (ROUND / (others + 1)).clamp(TURN_LEAST, TURN)
    }
}

/// One transfer's part; dropping it lets the others go on.
#[derive(Debug)]
pub(super) struct Transfer {
    turns: Arc<Turns>,
    id: u64,
    /// Whether its way is known to be short.
    near: bool,
    /// Whether it has moved anything since it last left.
    takes_part: bool,
    waits: bool,
    /// Until when it takes no part because it is slow, and its pace: in its turns, or while it is slow.
    slow_until: Option<Instant>,
    pace: Pace,
    /// What is slow, in bytes within a [`SPAN`].
    little: u64,
    /// When the first in the row looks after those that run.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Transfer {
    /// Takes part, from its first [`Transfer::moved`] on.
    pub(super) fn new(turns: Arc<Turns>) -> Self {
        let (id, at_once) = turns.with(|inner| {
            inner.count += 1;
            (inner.count, inner.at_once)
        });
        Self {
            turns,
            id,
            near: false,
            takes_part: false,
            waits: false,
            slow_until: None,
            pace: Pace::default(),
            little: LITTLE / at_once as u64,
            sleep: None,
        }
    }

    /// Notes that the way is short. It stays so while this lives.
    pub(super) fn note_near(&mut self) {
        if !mem::replace(&mut self.near, true) {
            self.turns.with(|inner| inner.near += 1);
        }
    }

    /// Notes that something was moved, in bytes. After that it may have to wait for its turn.
    pub(super) fn moved(&mut self, bytes: usize, now: Instant) {
        let (id, bytes) = (self.id, bytes as u64);
        if let Some(until) = self.slow_until {
            self.pace.note(bytes, Duration::MAX, now);
            if self.pace.is_less(self.little, SPAN) != Some(false) && now < until {
                self.turns.with(|inner| inner.count(bytes, now));
                return;
            }
            (self.slow_until, self.pace) = (None, Pace::default());
        } else if self.pace.counted.is_some() {
            // Longer than that nobody has had to wait for it.
            self.pace.note(bytes, GAP, now);
        }
        let is_slow = self.pace.is_less(self.little, JUDGED) == Some(true);
        let verdict = self.turns.with(|inner| inner.moved(id, bytes, is_slow, now));
        match verdict {
            Verdict::IsFree => self.pace = Pace::default(),
            Verdict::HasTurn => self.pace.go_on(now),
            Verdict::Waits => self.pace.counted = None,
            Verdict::IsSlow => self.pace.counted = Some(now),
        }
        self.slow_until = (verdict == Verdict::IsSlow).then(|| now + SLOW);
        self.waits = verdict == Verdict::Waits;
        self.takes_part = matches!(verdict, Verdict::HasTurn | Verdict::Waits);
    }

    /// Takes no part until it moves something again: it need not wait, and the others go on.
    pub(super) fn leave(&mut self) {
        if mem::take(&mut self.takes_part) {
            self.turns.with(|inner| inner.leave(self.id, Instant::now()));
        }
        self.pace.counted = None;
        self.waits = false;
    }

    /// Tells whether it has to wait for its turn.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// Waits until it may go on. Cancel-safe.
    pub(super) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(look_at) = self.look(Instant::now(), cx.waker()) {
            let Some(look_at) = look_at else {
                return Poll::Pending;
            };
            let sleep = self
                .sleep
                .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(look_at)));
            if sleep.deadline() != look_at {
                sleep.as_mut().reset(look_at);
            }
            ready!(sleep.as_mut().poll(cx));
        }
        if self.waits {
            self.pace.go_on(Instant::now());
        }
        self.waits = false;
        Poll::Ready(())
    }

    /// Leaves `waker`, if it has to wait. The first in the row also takes the place of a transfer that has had nothing to move,
    /// and is told when to look again.
    fn look(&self, now: Instant, waker: &Waker) -> Option<Option<Instant>> {
        self.turns.with(|inner| {
            let place = inner.waiting.iter().position(|(id, _)| *id == self.id)?;
            let mut look_at = None;
            if place == 0 {
                let goes_on = |running: &Running| now.duration_since(running.moved_at) < GAP;
                inner.running.retain(goes_on);
                if inner.has_room() {
                    inner.next(now);
                    return None;
                }
                look_at = inner.running.iter().map(|running| running.moved_at + GAP).min();
            }
            let (_, waiting) = inner.waiting.get_mut(place)?;
            match waiting {
                Some(waiting) => waiting.clone_from(waker),
                None => *waiting = Some(waker.clone()),
            }
            Some(look_at)
        })
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.turns.with(|inner| {
            inner.near -= usize::from(self.near);
            inner.leave(self.id, Instant::now());
        });
    }
}

#[cfg(test)]
mod tests;
