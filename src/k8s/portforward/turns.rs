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
    HasTurn,
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
    /// Whether it takes no part because it is slow, and its pace: in its turns, or while it is slow.
    is_slow: bool,
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
            is_slow: false,
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
        if self.is_slow {
            self.pace.note(bytes, Duration::MAX, now);
            if self.pace.is_less(self.little, SPAN) != Some(false) {
                self.turns.with(|inner| inner.count(bytes, now));
                return;
            }
            self.is_slow = false;
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
        self.is_slow = verdict == Verdict::IsSlow;
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
mod tests {
    use std::future::poll_fn;

    use futures_util::FutureExt as _;
    use tokio_util::task::TaskTracker;

    use super::*;

    const PIECE: usize = 64 << 10;

    /// So many transfers, of which each wants to go on at any moment.
    fn busy(at_once: usize, count: usize) -> Vec<Transfer> {
        busy_at(true, at_once, count)
    }

    /// The same where the way is short, or may be long.
    fn busy_at(near: bool, at_once: usize, count: usize) -> Vec<Transfer> {
        let turns = Arc::new(Turns::new(at_once));
        let mut transfers: Vec<Transfer> = (0..count).map(|_| Transfer::new(turns.clone())).collect();
        if near {
            transfers[0].note_near();
        }
        // The first is fast, which makes the others wait once they have moved anything.
        transfers[0].moved(BUSY as usize, Instant::now());
        for transfer in &mut transfers {
            transfer.moved(PIECE, Instant::now());
        }
        transfers
    }

    /// Moves pieces until it has to wait. Returns how much that was.
    fn run(transfer: &mut Transfer, most: u64) -> u64 {
        let mut moved = 0;
        while !transfer.waits() && moved < most {
            transfer.moved(PIECE, Instant::now());
            moved += PIECE as u64;
        }
        moved
    }

    fn has_turn(transfer: &mut Transfer) -> bool {
        poll_fn(|cx| transfer.poll_turn(cx)).now_or_never().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn they_go_on_one_after_the_other_and_all_get_the_same() {
        for count in [2, 3] {
            let mut transfers = busy(1, count);
            // It was there before the others.
            assert_eq!(run(&mut transfers[0], 2 * TURN), TURN - PIECE as u64);
            for index in (1..count).chain(0..count) {
                let having: Vec<bool> = transfers.iter_mut().map(has_turn).collect();
                let wanted: Vec<bool> = (0..count).map(|other| other == index).collect();
                assert_eq!(having, wanted);
                assert_eq!(run(&mut transfers[index], 2 * TURN), TURN);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_as_may_go_on_at_a_time_never_wait() {
        for (at_once, count) in [(1, 1), (2, 1), (2, 2)] {
            let mut transfers = busy(at_once, count);
            for transfer in &mut transfers {
                assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_slow_for_other_reasons_never_waits() {
        let turns = Arc::new(Turns::default());
        let mut transfers: Vec<Transfer> = (0..4).map(|_| Transfer::new(turns.clone())).collect();
        transfers[0].note_near();
        let piece = (BUSY / 8) as usize;
        for _ in 0..100 {
            for transfer in &mut transfers {
                transfer.moved(piece, Instant::now());
                assert!(!transfer.waits());
            }
            tokio::time::advance(SPAN).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_slow_beside_a_fast_one_neither_waits_nor_is_waited_for() {
        let mut transfers = busy(1, 2);
        run(&mut transfers[0], 2 * TURN);
        assert!(has_turn(&mut transfers[1]));
        let (begun, pause) = (Instant::now(), GAP / 2);
        while !has_turn(&mut transfers[0]) {
            transfers[1].moved(PIECE, Instant::now());
            tokio::time::advance(pause).await;
        }
        assert!((JUDGED..JUDGED + 2 * pause).contains(&begun.elapsed()));
        for _ in 0..3 * SPAN.as_millis() / pause.as_millis() {
            transfers[1].moved(PIECE, Instant::now());
            assert!(!transfers[1].waits());
            assert_eq!(run(&mut transfers[0], 2 * PIECE as u64), 2 * PIECE as u64);
            transfers[0].moved(BUSY as usize / 50, Instant::now());
            assert!(!transfers[0].waits(), "as if it were alone");
            tokio::time::advance(pause).await;
        }
        // It may have been slow for a while only.
        tokio::time::advance(SPAN).await;
        transfers[0].moved(BUSY as usize, Instant::now());
        transfers[1].moved(2 * LITTLE as usize, Instant::now());
        assert!(transfers[1].waits());
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_something_now_and_then_soon_keeps_nobody_waiting() {
        let mut transfers = busy(1, 2);
        let mut waited = Vec::new();
        for event in 0..100 {
            if event > 0 {
                transfers[1].moved(PIECE, Instant::now());
            }
            transfers[0].moved(TURN as usize, Instant::now());
            if transfers[0].waits() {
                waited.push(event);
                assert!(has_turn(&mut transfers[1]), "which has nothing more");
                tokio::time::advance(GAP).await;
                assert!(has_turn(&mut transfers[0]));
            }
            tokio::time::advance(3 * GAP).await;
        }
        assert_eq!(waited, [0, 1, 2, 3], "then it had had its turn for long enough");
        assert!(!transfers[1].waits());
    }

    #[tokio::test(start_paused = true)]
    async fn where_several_go_on_at_a_time_each_may_be_so_much_slower() {
        let pause = GAP / 2;
        let rate = |at_once: u64| (LITTLE / at_once) as f64 * pause.div_duration_f64(SPAN);
        for at_once in [1, 4] {
            let mut transfers = busy(at_once as usize, at_once as usize + 1);
            let (begun, waits) = (Instant::now(), at_once as usize);
            while begun.elapsed() < 2 * JUDGED {
                for transfer in &mut transfers[..waits] {
                    transfer.moved((1.1 * rate(at_once)) as usize, Instant::now());
                }
                tokio::time::advance(pause).await;
            }
            assert!(!has_turn(&mut transfers[waits]), "{at_once}: none is slow");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_the_way_is_long_nobody_waits() {
        for transfer in &mut busy_at(false, 1, 4) {
            assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
        }
        // It was short for one that has gone.
        let mut transfers = busy(1, 5);
        drop(transfers.remove(0));
        for transfer in &mut transfers {
            assert!(has_turn(transfer));
            assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn turns_end_with_the_rush_that_made_them_necessary() {
        let mut transfers = busy(1, 3);
        tokio::time::advance(2 * SPAN).await;
        transfers[0].moved(PIECE, Instant::now());
        for transfer in &mut transfers {
            assert!(has_turn(transfer));
            assert_eq!(run(transfer, BUSY / 4), BUSY / 4);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_have_nothing_to_move_lose_their_turns_and_the_next_are_told() {
        let mut transfers = busy(1, 4);
        let tracker = TaskTracker::new();
        let waiting: Vec<_> = transfers
            .split_off(1)
            .into_iter()
            .map(|mut transfer| {
                tracker.spawn(async move {
                    let begun = Instant::now();
                    poll_fn(|cx| transfer.poll_turn(cx)).await;
                    // Nothing comes for it either; it stays.
                    (begun.elapsed(), transfer)
                })
            })
            .collect();
        for (gaps, waiting) in (1..).zip(waiting) {
            let (elapsed, transfer) = waiting.await.unwrap();
            let least = gaps * GAP;
            assert!((least..least + GAP / 2).contains(&elapsed), "{gaps}: {elapsed:?}");
            transfers.push(transfer);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_goes_away_hands_its_turn_on() {
        let mut transfers = busy(1, 2);
        let next = transfers.swap_remove(1);
        let mut waiting = TaskTracker::new().spawn(async move {
            let mut next = next;
            poll_fn(|cx| next.poll_turn(cx)).await;
        });
        tokio::task::yield_now().await;
        assert!((&mut waiting).now_or_never().is_none());
        let begun = Instant::now();
        drop(transfers.swap_remove(0));
        waiting.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
