mod bounds;
mod ends;
mod wakes;

mod life;

use super::*;
use std::task::Waker;

use crate::k8s::portforward::ports::Behaviour;
use crate::k8s::portforward::spdy::frame;

/// A frame that the state has written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wrote {
    Open(u32),
    Data(u32, usize),
    Fin(u32),
    Reset(u32),
    Ping(u32),
}

/// A session whose peer is the test.
struct Scene {
    state: State,
    ports: Arc<Ports>,
    now: Instant,
}

impl Scene {
    /// A session that has had its first answer.
    fn new() -> Self {
        Self::with(SlowReaders::default())
    }

    /// The same with other patience for slow readers.
    fn with(slow_readers: SlowReaders) -> Self {
        let (ports, now) = (Arc::new(Ports::default()), Instant::now());
        let mut state = State::new(ports.clone(), slow_readers, now);
        state.greet(now);
        let mut scene = Self { state, ports, now };
        scene.answer_pings();
        scene
    }

    /// Everything written since the last call.
    fn written(&mut self) -> Vec<Wrote> {
        let (mut batch, mut found) = (Vec::new(), Vec::new());
        while self.state.take_batch(&mut batch, self.now) {
            let mut rest = &batch[..];
            while !rest.is_empty() {
                let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
                let (first, length) = (word(0), (word(4) & 0x00ff_ffff) as usize);
                found.push(match (first >> 31, first & 0xffff) {
                    (0, _) if word(4) >> 24 == 1 => Wrote::Fin(first),
                    (0, _) => Wrote::Data(first, length),
                    (_, 1) => Wrote::Open(word(8)),
                    (_, 3) => Wrote::Reset(word(8)),
                    (_, 6) => Wrote::Ping(word(8)),
                    other => panic!("unexpected frame {other:?}"),
                });
                rest = &rest[8 + length..];
            }
            batch.clear();
        }
        found
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.state.receive(bytes, self.now).unwrap();
    }

    /// Answers every PING written since the last call, except those of one worker.
    fn answer_pings_but(&mut self, stuck: Option<u32>) -> Vec<Wrote> {
        let written = self.written();
        for frame in &written {
            if let Wrote::Ping(id) = frame
                && Some(id / 2 % 5) != stuck
            {
                let mut pong = Vec::new();
                frame::ping(&mut pong, *id);
                self.receive(&pong);
            }
        }
        written
    }

    fn answer_pings(&mut self) {
        self.answer_pings_but(None);
    }

    fn open(&mut self, port: u16) -> usize {
        self.state.connect(port, true, self.now)
    }

    fn write(&mut self, key: usize, bytes: usize) -> Option<io::Result<usize>> {
        let payload = vec![7; bytes];
        let mut cx = Context::from_waker(Waker::noop());
        match self
            .state
            .poll_write(key, &[io::IoSlice::new(&payload)], self.now, &mut cx)
        {
            Poll::Ready(result) => Some(result),
            Poll::Pending => None,
        }
    }

    /// Writes until nothing more is taken, handing batches over in between. Returns how many frames of payload left.
    fn flood(&mut self, key: usize) -> usize {
        let mut frames = 0;
        while let Some(sent) = self.write(key, 1 << 20) {
            sent.unwrap();
            let written = self.written();
            frames += written
                .iter()
                .filter(|frame| matches!(frame, Wrote::Data(..)))
                .count();
        }
        frames
    }

    fn read(&mut self, key: usize) -> Option<io::Result<usize>> {
        let mut cx = Context::from_waker(Waker::noop());
        match self.state.poll_chunk(key, None, self.now, &mut cx) {
            Poll::Ready(Ok(chunk)) => Some(Ok(chunk.map_or(0, |chunk| chunk.rest().len()))),
            Poll::Ready(Err(error)) => Some(Err(error)),
            Poll::Pending => None,
        }
    }

    fn id(&self, key: usize) -> u32 {
        self.state.connections[key].place.unwrap().id
    }

    /// The peer takes a connection's streams.
    fn reply(&mut self, key: usize) {
        let id = self.id(key);
        let mut bytes = vec![0x80, 3, 0, 2, 0, 0, 0, 4];
        bytes.extend_from_slice(&id.to_be_bytes());
        self.receive(&bytes);
    }

    /// The pod sends.
    fn data(&mut self, key: usize, bytes: usize) {
        let mut out = Vec::new();
        let payload = vec![9; bytes];
        frame::data(&mut out, self.id(key), &[io::IoSlice::new(&payload)], bytes);
        self.receive(&out);
    }

    /// The pod ends the connection, for a reason if there is a text.
    fn end(&mut self, key: usize, text: &str) {
        let (id, mut out) = (self.id(key), Vec::new());
        frame::fin(&mut out, id);
        if !text.is_empty() {
            frame::data(
                &mut out,
                id - output::PAIR,
                &[io::IoSlice::new(text.as_bytes())],
                text.len(),
            );
        }
        frame::fin(&mut out, id - output::PAIR);
        self.receive(&out);
    }

    /// Lets time pass, with a tick whenever one is due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let due = self.state.deadline(self.now).max(self.now);
            if due > end || self.state.ended().is_some() {
                break;
            }
            self.now = due;
            self.state.tick(due);
        }
        self.now = end;
        self.state.tick(end);
    }

    fn is_open(&self) -> bool {
        self.state.load(self.now).open
    }
}

/// What the pod sends in one go here.
const FRAME: usize = 64 << 10;

const REFUSED: &str = "failed to connect to localhost:80 inside namespace: connection refused";

fn kind(result: Option<io::Result<usize>>) -> io::ErrorKind {
    result.unwrap().unwrap_err().kind()
}

#[test]
fn a_transfer_adds_to_its_frame_what_has_come_and_nothing_is_written_where_nothing_has() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    let add = |scene: &mut Scene, came: Poll<usize>| {
        let mut cx = Context::from_waker(Waker::noop());
        let append = |out: &mut Vec<u8>, room: usize, _: &mut Context<'_>| {
            came.map(|came| {
                assert!(came <= room);
                out.extend(vec![7; came]);
                Ok(came)
            })
        };
        let added = scene.state.poll_append(key, scene.now, &mut cx, append);
        added.map(|added| added.map(Result::unwrap))
    };
    assert_eq!(add(&mut scene, Poll::Ready(1)), None, "it is not open");
    let mut sent = 0;
    while sent < TRANSFER {
        assert_eq!(add(&mut scene, Poll::Ready(1)), None, "it is no transfer yet");
        sent += scene.write(key, 1 << 20).expect("room").unwrap();
        scene.answer_pings();
    }
    for nothing in [Poll::Pending, Poll::Ready(0)] {
        assert_eq!(add(&mut scene, nothing), Some(nothing));
        assert_eq!(scene.written(), []);
    }
    for came in [10, 20] {
        assert_eq!(add(&mut scene, Poll::Ready(came)), Some(Poll::Ready(came)));
        assert_eq!(add(&mut scene, Poll::Pending), Some(Poll::Pending));
    }
    assert_eq!(scene.written()[0], Wrote::Data(scene.id(key), 30));
}

#[test]
fn a_connection_and_its_first_bytes_leave_in_one_batch() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    assert_eq!(
        scene.written(),
        [],
        "nothing is sent for a connection that nobody uses"
    );
    assert_eq!(scene.write(key, 10).unwrap().unwrap(), 10);
    let id = scene.id(key);
    assert_eq!(
        scene.written(),
        [
            Wrote::Open(id - output::PAIR),
            Wrote::Open(id),
            Wrote::Data(id, 10)
        ]
    );
}

#[test]
fn a_reader_that_waits_for_the_pod_to_speak_opens_the_connection() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    assert!(scene.read(key).is_none());
    assert_eq!(scene.written().len(), 2);
}

#[test]
fn ids_rise_and_spread_over_the_workers() {
    let mut scene = Scene::new();
    let keys: Vec<usize> = (0..5).map(|_| scene.open(80)).collect();
    keys.iter().for_each(|&key| drop(scene.read(key)));
    let opened = scene.written();
    let ids: Vec<u32> = opened
        .iter()
        .map(|frame| match frame {
            Wrote::Open(id) => *id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
    assert!(ids.iter().all(|id| id % 2 == 1));
    let mut workers: Vec<u32> = keys.iter().map(|&key| scene.id(key) % 5).collect();
    workers.sort_unstable();
    assert_eq!(workers, [0, 1, 2, 3, 4]);
}

#[test]
fn an_application_that_does_not_read_stops_its_writer_and_nobody_else() {
    let mut scene = Scene::new();
    let (stalled, lively) = (scene.open(80), scene.open(80));
    for key in [stalled, lively] {
        scene.read(key);
        scene.written();
        scene.reply(key);
        scene.data(key, 1);
    }
    scene.flood(stalled);
    let stuck = scene.id(stalled) % 5;
    for _ in 0..200 {
        assert!(scene.write(lively, 100).is_some(), "the neighbour is held up");
        scene.answer_pings_but(Some(stuck));
        scene.pass(Duration::from_millis(20));
        // Once PINGs would fill the stuck worker's queue, streams that are refused take their place.
        let barrier = scene.state.barriers[(scene.id(lively) % 5) as usize];
        if let Some((id, ..)) = barrier {
            let mut reset = Vec::new();
            frame::reset(&mut reset, id, 5);
            scene.receive(&reset);
        }
    }
    assert!(scene.write(stalled, 1).is_none());
    assert!(
        !scene.is_open(),
        "newcomers are placed on a session with a stuck worker"
    );
}

#[test]
fn what_waits_behind_an_application_that_does_not_read_is_given_up_in_the_end() {
    let mut scene = Scene::new();
    let keys: Vec<usize> = (0..17).map(|_| scene.open(80)).collect();
    for &key in &keys {
        scene.read(key);
        scene.written();
        scene.reply(key);
        scene.data(key, 1);
    }
    // Three of each worker at least, and four of this one's.
    let stalled = keys[10];
    let stuck = scene.id(stalled) % 5;
    let behind: Vec<usize> = keys
        .iter()
        .copied()
        .filter(|&key| key != stalled && scene.id(key) % 5 == stuck)
        .collect();
    scene.write(behind[2], 1);
    scene.answer_pings();
    scene.data(behind[2], 1);
    scene.flood(stalled);
    assert!(scene.write(behind[0], 1).is_none());
    assert!(scene.write(behind[2], 1).is_none());
    let neighbour = keys
        .iter()
        .copied()
        .find(|&key| scene.id(key) % 5 != stuck)
        .unwrap();
    for _ in 0..300 {
        scene.answer_pings_but(Some(stuck));
        scene.pass(Duration::from_millis(20));
        scene.data(neighbour, 1);
        scene.read(neighbour);
    }
    assert!(scene.state.is_in_the_way_of(behind[1], scene.now));
    assert_eq!(kind(scene.write(behind[0], 1)), io::ErrorKind::NotConnected);
    assert_eq!(
        kind(scene.write(behind[2], 1)),
        io::ErrorKind::ConnectionAborted,
        "it was told something before"
    );
    scene.read(behind[1]);
    assert!(
        scene.read(behind[1]).is_none(),
        "one that sends nothing is not held up"
    );
    assert!(
        scene.write(stalled, 1).is_none(),
        "the application has all the time it wants"
    );
}

#[test]
fn a_writer_goes_on_when_the_pod_has_taken_its_bytes() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    let first = scene.flood(key);
    assert!((10..=40).contains(&first), "{first} frames without an answer");
    scene.pass(Duration::from_millis(20));
    assert!(scene.write(key, 1).is_none());
    (1..100).step_by(2).for_each(|id| {
        let mut pong = Vec::new();
        frame::ping(&mut pong, id);
        scene.receive(&pong);
    });
    assert!(scene.write(key, 1).is_some());
}

#[test]
fn a_refused_connection_says_that_nothing_has_reached_the_pod() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.reply(key);
    scene.end(key, REFUSED);
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionRefused);
    assert!(kind(scene.write(key, 1)) == io::ErrorKind::ConnectionRefused);
}

#[test]
fn after_a_refusal_the_worker_is_doubted_until_it_proves_to_work() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.end(key, REFUSED);
    let doubted = (scene.id(key) % 5) as usize;
    assert!(scene.state.workers.is_suspect(doubted));
    assert!(scene.is_open(), "the others can take newcomers");
    scene.answer_pings();
    assert!(!scene.state.workers.is_suspect(doubted));
}

#[test]
fn bytes_for_a_port_that_refuses_wait_until_it_would_have_refused() {
    let mut scene = Scene::new();
    scene.ports.note(80, Behaviour::Refuses, scene.now);
    let key = scene.open(80);
    assert!(scene.write(key, 10).is_none());
    assert_eq!(scene.written().len(), 2, "the connection is opened all the same");
    scene.reply(key);
    assert!(scene.write(key, 10).is_none());
    scene.pass(Duration::from_millis(25));
    assert!(scene.write(key, 10).is_some());
}

#[test]
fn bytes_for_an_unknown_port_do_not_endanger_a_neighbours_worker() {
    let mut scene = Scene::new();
    let keys: Vec<usize> = (0..6).map(|_| scene.open(80)).collect();
    let sent: Vec<bool> = keys.iter().map(|&key| scene.write(key, 10).is_some()).collect();
    assert_eq!(sent, [true, true, true, true, true, false]);
    scene.written();
    scene.data(keys[0], 1); // the port answers
    let known = scene.open(80);
    assert!(scene.write(known, 10).is_some());
}

#[test]
fn no_bytes_follow_the_pods_end() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.end(key, "");
    assert_eq!(scene.read(key).unwrap().unwrap(), 0, "an orderly end");
    assert_eq!(kind(scene.write(key, 1)), io::ErrorKind::BrokenPipe);
    let id = scene.id(key);
    assert!(scene.written().contains(&Wrote::Fin(id)), "our half is ended too");
}

#[test]
fn an_end_is_held_back_while_an_answer_is_awaited() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.reply(key);
    scene.state.shutdown(key, scene.now);
    assert_eq!(scene.written(), []);
    scene.data(key, 5);
    assert_eq!(scene.written(), [], "there may be more of the answer");
    scene.end(key, "");
    assert_eq!(scene.read(key).unwrap().unwrap(), 5);
    let id = scene.id(key);
    assert!(scene.written().contains(&Wrote::Fin(id)));
}

#[test]
fn an_end_goes_out_at_once_when_the_pod_spoke_last() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.data(key, 5);
    scene.written();
    scene.state.shutdown(key, scene.now);
    assert_eq!(scene.written(), [Wrote::Fin(scene.id(key))]);
}

#[test]
fn what_is_abandoned_before_its_answer_is_reset_and_forgotten() {
    let mut scene = Scene::new();
    let (key, other) = (scene.open(80), scene.open(80));
    scene.read(other);
    scene.write(key, 10);
    let id = {
        scene.written();
        scene.id(key)
    };
    scene.state.detach(key, scene.now);
    assert_eq!(scene.written(), [Wrote::Reset(id)]);
    let mut late = Vec::new();
    frame::data(&mut late, id, &[io::IoSlice::new(b"late")], 4);
    frame::fin(&mut late, id - output::PAIR);
    scene.receive(&late);
    assert_eq!(scene.state.connections.len(), 1, "only the other is left");
    assert_eq!(scene.state.by_id.len(), 1);
}

#[test]
fn a_slow_reader_that_is_alone_stops_the_reading_and_loses_nothing() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    let mut sent = 0;
    while scene.state.is_reading() {
        scene.data(key, 32 << 10);
        sent += 32 << 10;
        assert!(sent <= 2 << 20, "no bound");
    }
    scene.pass(Duration::from_secs(60));
    assert!(scene.state.ended().is_none(), "silence was our own wish");
    let mut read = 0;
    while let Some(bytes) = scene.read(key) {
        read += bytes.unwrap();
    }
    assert_eq!(read, sent);
    assert!(scene.state.is_reading());
}

#[test]
fn a_reader_that_takes_nothing_gives_way_to_its_neighbours_in_the_end() {
    let mut scene = Scene::new();
    let (slow, other) = (scene.open(80), scene.open(80));
    for key in [slow, other] {
        scene.read(key);
        scene.written();
        scene.reply(key);
    }
    while scene.state.is_reading() {
        scene.data(slow, 1 << 20);
    }
    assert!(!scene.is_open());
    scene.pass(Duration::from_secs(6));
    assert!(scene.state.is_reading(), "the neighbour is held up for ever");
    assert_eq!(kind(scene.read(slow)), io::ErrorKind::ConnectionAborted);
    assert!(scene.read(other).is_none());
}

#[test]
fn a_bulk_transfer_keeps_newcomers_off_while_it_lasts() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.reply(key);
    scene.data(key, 1 << 20);
    assert!(!scene.is_open());
    while scene.read(key).is_some() {}
    scene.pass(Duration::from_secs(3));
    assert!(scene.is_open());
}

#[test]
fn a_connection_that_the_runtime_does_not_take_fails() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.pass(Duration::from_secs(2));
    assert!(scene.read(key).is_none());
    scene.answer_pings();
    scene.pass(Duration::from_secs(2));
    assert_eq!(kind(scene.read(key)), io::ErrorKind::TimedOut);
    assert!(!scene.is_open());
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_waits_for_its_turn_stays_one() {
    let mut scene = Scene::new();
    let (transfer, idle) = (scene.open(80), scene.open(80));
    scene.write(transfer, 1);
    scene.write(idle, 1);
    scene.written();
    scene.reply(transfer);
    scene.data(idle, 1);
    scene.pass(2 * BULK_SPAN);
    let cx = Context::from_waker(Waker::noop());
    for _ in 0..=TRANSFER / FRAME {
        scene.data(transfer, FRAME);
        while matches!(scene.read(transfer), Some(Ok(1..))) {}
    }
    assert!(scene.state.is_transfer(scene.now));
    assert!(scene.state.stand_back(scene.now, &cx));
    scene.now += 5 * BULK_SPAN;
    let now = scene.now;
    assert!(!scene.is_open());
    assert!(scene.state.is_transfer(now));
    assert!(scene.state.is_in_the_way_of(idle, now));
    assert!(!scene.state.is_in_the_way_of(transfer, now));
    scene.state.take_turn(now);
    assert!(!scene.is_open() && scene.state.is_transfer(now));
    // It finds nothing to move any more.
    scene.now += BULK_SPAN;
    assert!(scene.is_open() && !scene.state.is_transfer(scene.now));

    // A newcomer does not wait with it.
    assert!(scene.state.stand_back(scene.now, &cx));
    let newcomer = scene.open(80);
    scene.read(newcomer);
    assert!(!scene.state.stand_back(scene.now, &cx));
}
