//! What can be known of the peer's workers, from what was sent to them and what came back.
//!
//! The peer (`moby/spdystream:connection.go`) has no flow control. One loop reads frames and puts each into the queue of one
//! of five workers: that of the stream's id modulo five, PINGs in turn. A worker hands a frame's payload over and waits until
//! the copier on the pod's side has taken it. So an application that does not read stops one worker, and when a queue is full
//! the loop itself stops, and the session with it. That is avoided here by counting: a PONG, a reply to a new stream and a
//! reset of a stream without headers each prove that their worker has handed over everything before it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How many workers the peer has.
pub(in crate::k8s::portforward) const WORKERS: usize = 5;

/// How many frames a worker's queue holds, beside the one in its hands (`spdystream: QUEUE_SIZE`).
const QUEUE: u64 = 50;

/// Slots of a queue that PINGs leave free: resets and ends must always get in.
const RESERVE: u64 = 8;

/// Frames that may be on their way to one worker. Fewer where the way is short, since they are what a neighbour's frame
/// queues behind; measured on a real cluster with frames of 64 KiB, 24 keep the rate and halve the delay.
const LIMIT: u64 = 40;
const LIMIT_NEAR: u64 = 24;
const NEAR: Duration = Duration::from_millis(2);

/// Payload that may be on its way to one worker, in bytes: what the peer keeps for an application that stops reading. It grows
/// with what the worker has handed over, to a quarter of that: more under way means fewer switches on every hop.
const LIMIT_BYTES: u64 = 5 << 20;
const LIMIT_BYTES_GROWN: u64 = 20 << 20;

/// Frames under way to a worker that is busy: more than the openings and first bytes of some connections.
const BUSY: u64 = LIMIT_NEAR / 2;

/// How long a worker's PONG may be missing while others have come, before the worker counts as stuck.
const PATIENCE: Duration = Duration::from_millis(500);

/// The workers of one session.
#[derive(Debug, Default)]
pub(super) struct Workers {
    workers: [Worker; WORKERS],
    /// How many PINGs were sent; the next one goes to this, modulo five.
    pings: u32,
    /// PINGs without an answer, in the order in which they were sent.
    unanswered: VecDeque<Ping>,
    /// When the latest frame was sent that was answered by a worker, or by the loop before them.
    answered: Option<Instant>,
    /// The shortest way there and back seen.
    round_trip: Option<Duration>,
}

#[derive(Debug, Default)]
struct Worker {
    /// How many frames were sent to it.
    sent: u64,
    /// How many of them it has certainly handed over.
    handed: u64,
    /// How many were sent since its last PING.
    since_ping: u64,
    /// Payload that was sent to it, that it has certainly handed over, and that was sent up to its last PING, in bytes.
    bytes_sent: u64,
    bytes_handed: u64,
    bytes_asked: u64,
    /// The frames with payload that it has not certainly handed over: their places, and all payload up to their ends.
    payloads: VecDeque<(u64, u64)>,
    /// A frame that nobody may have been left to take: what has been sent by then must be proven to have passed.
    suspect: Option<u64>,
}

impl Worker {
    fn outstanding(&self) -> u64 {
        self.sent - self.handed
    }

    fn outstanding_bytes(&self) -> u64 {
        self.bytes_sent - self.bytes_handed
    }

    fn limit_bytes(&self) -> u64 {
        (self.bytes_handed / 4).clamp(LIMIT_BYTES, LIMIT_BYTES_GROWN)
    }
}

#[derive(Debug)]
struct Ping {
    id: u32,
    class: usize,
    /// Its place among the frames of its worker.
    position: u64,
    sent_at: Instant,
}

impl Workers {
    /// Counts a frame and returns its place in its worker's order.
    pub(super) fn sent(&mut self, class: usize) -> u64 {
        let worker = &mut self.workers[class % WORKERS];
        worker.sent += 1;
        worker.since_ping += 1;
        worker.sent
    }

    /// Counts a frame with so much payload, and returns its place.
    pub(super) fn sent_payload(&mut self, class: usize, bytes: usize) -> u64 {
        let position = self.sent(class);
        let worker = &mut self.workers[class % WORKERS];
        worker.bytes_sent += bytes as u64;
        worker.payloads.push_back((position, worker.bytes_sent));
        position
    }

    /// Counts more payload in the last such frame, which has not left.
    pub(super) fn grown(&mut self, class: usize, bytes: usize) {
        let worker = &mut self.workers[class % WORKERS];
        worker.bytes_sent += bytes as u64;
        if let Some((_, end)) = worker.payloads.back_mut() {
            *end = worker.bytes_sent;
        }
    }

    /// Notes that the worker has handed over everything up to a frame.
    pub(super) fn handed(&mut self, class: usize, position: u64) {
        let worker = &mut self.workers[class % WORKERS];
        worker.handed = worker.handed.max(position.min(worker.sent));
        while let Some((_, end)) = worker.payloads.pop_front_if(|(place, _)| *place <= worker.handed) {
            worker.bytes_handed = end;
        }
        if worker.suspect.is_some_and(|doubted| worker.handed > doubted) {
            worker.suspect = None;
        }
    }

    /// Tells how many frames may be under way to one worker. `shared`: whether several connections use the session.
    fn limit(&self, shared: bool) -> u64 {
        if shared && self.is_near() {
            LIMIT_NEAR
        } else {
            LIMIT
        }
    }

    /// Tells whether another frame of payload may be sent to a worker.
    pub(super) fn credit(&self, class: usize, shared: bool) -> bool {
        let worker = &self.workers[class % WORKERS];
        worker.outstanding() < self.limit(shared) && worker.outstanding_bytes() < worker.limit_bytes()
    }

    /// Tells whether a frame that ends something may be sent to a worker.
    pub(super) fn room(&self, class: usize) -> bool {
        self.workers[class % WORKERS].outstanding() < QUEUE - 2
    }

    /// Tells whether a frame that was sent is known to have been handed over.
    pub(super) fn is_handed(&self, class: usize, position: u64) -> bool {
        self.workers[class % WORKERS].handed >= position
    }

    /// Tells whether it is time to ask how far the workers are.
    pub(super) fn is_round_due(&self, shared: bool) -> bool {
        let limit = self.limit(shared);
        let due = |worker: &Worker| {
            worker
                .suspect
                .is_some_and(|doubted| worker.sent - worker.since_ping <= doubted)
                || worker.outstanding() >= limit / 2 && worker.since_ping >= limit / 4
                || worker.outstanding_bytes() >= worker.limit_bytes() / 2
                    && worker.bytes_sent - worker.bytes_asked >= worker.limit_bytes() / 4
        };
        self.workers.iter().any(due)
    }

    /// Tells whether stuck workers leave room for asking all of them.
    pub(super) fn may_ask(&self) -> bool {
        self.workers
            .iter()
            .all(|worker| worker.outstanding() < QUEUE - RESERVE)
    }

    /// Asks every worker how far it is: calls `send` with the ids of five PINGs. Does nothing and returns false when a stuck
    /// worker's queue has no room left for more.
    pub(super) fn round(&mut self, now: Instant, mut send: impl FnMut(u32)) -> bool {
        if !self.may_ask() {
            return false;
        }
        for _ in 0..WORKERS {
            let class = self.pings as usize % WORKERS;
            let id = self.pings.wrapping_mul(2).wrapping_add(1);
            self.pings = self.pings.wrapping_add(1);
            let position = self.sent(class);
            let worker = &mut self.workers[class];
            worker.since_ping = 0;
            worker.bytes_asked = worker.bytes_sent;
            self.unanswered.push_back(Ping {
                id,
                class,
                position,
                sent_at: now,
            });
            send(id);
        }
        true
    }

    /// Takes the answer to a PING.
    pub(super) fn pong(&mut self, id: u32, now: Instant) {
        let Some(index) = self.unanswered.iter().position(|ping| ping.id == id) else {
            return;
        };
        let Some(ping) = self.unanswered.remove(index) else {
            return;
        };
        self.handed(ping.class, ping.position);
        self.answered = self.answered.max(Some(ping.sent_at));
        let time = now.duration_since(ping.sent_at);
        self.round_trip = Some(self.round_trip.map_or(time, |known| known.min(time)));
    }

    /// Notes that the loop which feeds the workers has had what was sent by then. Without it nobody could tell, when all
    /// workers have been lost at the same time.
    pub(super) fn arrived(&mut self, sent_at: Instant) {
        self.answered = self.answered.max(Some(sent_at));
    }

    /// Returns the shortest way there and back, or zero while none is known.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip.unwrap_or_default()
    }

    /// Tells whether the way is known to be short.
    pub(super) fn is_near(&self) -> bool {
        self.round_trip.is_some_and(|time| time < NEAR)
    }

    /// Tells whether something that was sent after a time has been answered.
    pub(super) fn has_answered_after(&self, time: Instant) -> bool {
        self.answered > Some(time)
    }

    /// Tells whether answers are missing.
    pub(super) fn is_waiting(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// Tells whether a worker has stood still while others have not.
    pub(super) fn is_stuck(&self, class: usize, now: Instant) -> bool {
        let Some(oldest) = self.unanswered.iter().find(|ping| ping.class == class % WORKERS) else {
            return false;
        };
        let patience = PATIENCE.max(4 * self.round_trip());
        now.duration_since(oldest.sent_at) >= patience && self.answered >= Some(oldest.sent_at)
    }

    /// Doubts a worker: it may hold, for the session's life, a frame that nobody was left to take.
    pub(super) fn suspect(&mut self, class: usize) {
        let worker = &mut self.workers[class % WORKERS];
        worker.suspect = Some(worker.sent);
    }

    /// Tells whether a worker is doubted.
    pub(super) fn is_suspect(&self, class: usize) -> bool {
        self.workers[class % WORKERS].suspect.is_some()
    }

    /// Chooses the worker for a new connection: one that can take its two opening frames, with the fewest connections among
    /// those that no upload keeps busy, or stands still in.
    pub(super) fn choose(&self, connections: &[usize; WORKERS], now: Instant) -> Option<usize> {
        let usable = |&class: &usize| {
            self.workers[class].outstanding() + 2 <= LIMIT
                && !self.is_suspect(class)
                && !self.is_stuck(class, now)
        };
        let cost = |&class: &usize| {
            let outstanding = self.workers[class].outstanding();
            (outstanding >= BUSY, connections[class], outstanding)
        };
        (0..WORKERS).filter(usable).min_by_key(cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(workers: &mut Workers, now: Instant) -> Vec<u32> {
        let mut ids = Vec::new();
        assert!(workers.round(now, |id| ids.push(id)), "no room for a round");
        ids
    }

    #[test]
    fn a_pong_frees_what_its_worker_had_before_it() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        for _ in 0..LIMIT {
            assert!(workers.credit(2, false));
            workers.sent(2);
        }
        assert!(!workers.credit(2, false));
        assert!(workers.credit(3, false), "another worker is free");
        let ids = round(&mut workers, now);
        assert_eq!(ids, [1, 3, 5, 7, 9]);
        workers.pong(ids[3], now);
        assert!(
            !workers.credit(2, false),
            "the pong of another worker says nothing"
        );
        workers.pong(ids[2], now);
        assert!(workers.credit(2, false));
        assert_eq!(workers.workers[2].outstanding(), 0);
    }

    #[test]
    fn large_frames_are_counted_by_their_bytes_and_asked_after_in_time() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        let mut sent = 0;
        while workers.credit(0, false) {
            workers.sent_payload(0, 1 << 19);
            workers.grown(0, 1 << 19);
            sent += 1 << 20;
            assert!(
                sent < LIMIT_BYTES || workers.is_round_due(false),
                "nobody would ask"
            );
        }
        assert_eq!(sent, LIMIT_BYTES);
        assert!(workers.credit(1, false), "another worker is free");
        let ids = round(&mut workers, now);
        assert!(!workers.is_round_due(false), "it was asked");
        workers.pong(ids[0], now);
        assert_eq!(workers.workers[0].outstanding_bytes(), 0);

        // Whatever proves that a frame has been handed over frees what came up to it, and no more.
        let first = workers.sent_payload(0, LIMIT_BYTES as usize);
        workers.sent_payload(0, 1);
        workers.handed(0, first - 1);
        assert!(!workers.credit(0, false));
        workers.handed(0, first);
        assert_eq!(workers.workers[0].outstanding_bytes(), 1);

        // An application that has read much gets more at once.
        let last = workers.sent_payload(0, 4 * LIMIT_BYTES_GROWN as usize);
        workers.handed(0, last);
        workers.sent_payload(0, LIMIT_BYTES_GROWN as usize - 1);
        assert!(workers.credit(0, false));
        workers.grown(0, 1);
        assert!(!workers.credit(0, false));
    }

    #[test]
    fn rounds_stop_before_they_fill_the_queue_of_a_stuck_worker() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        for _ in 0..LIMIT {
            workers.sent(0);
        }
        let mut rounds = 0;
        loop {
            let mut ids = Vec::new();
            if !workers.round(now, |id| ids.push(id)) {
                break;
            }
            rounds += 1;
            // Worker 0 never answers.
            ids.iter().skip(1).for_each(|&id| workers.pong(id, now));
        }
        assert!(rounds > 0);
        assert!(workers.workers[0].outstanding() <= QUEUE - RESERVE);
        assert!(workers.room(0), "an end still gets in");
        assert!(workers.is_stuck(0, now + PATIENCE));
        assert!(!workers.is_stuck(0, now));
        assert!(!workers.is_stuck(1, now + PATIENCE));
    }

    #[test]
    fn a_worker_is_not_stuck_when_nobody_answers() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        round(&mut workers, now);
        assert!(
            !workers.is_stuck(0, now + 10 * PATIENCE),
            "the way may just be long"
        );
    }

    #[test]
    fn a_doubted_worker_is_asked_and_avoided_until_it_answers() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        workers.sent(0);
        workers.suspect(0);
        assert!(workers.is_round_due(true));
        assert_eq!(workers.choose(&[0, 1, 1, 1, 1], now), Some(1));
        let ids = round(&mut workers, now);
        assert!(!workers.is_round_due(true), "it has been asked");
        workers.pong(ids[0], now);
        assert!(!workers.is_suspect(0));
        assert_eq!(workers.choose(&[0, 1, 1, 1, 1], now), Some(0));
    }

    #[test]
    fn new_connections_go_to_the_worker_with_the_fewest() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        assert_eq!(workers.choose(&[1, 1, 0, 1, 1], now), Some(2));
        for _ in 0..LIMIT {
            workers.sent(2);
        }
        assert_eq!(workers.choose(&[1, 1, 0, 1, 1], now), Some(0), "2 has no credit");
    }
}
