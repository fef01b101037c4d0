//! A session of port-forwards: whatever its peer sends, however it is cut, and whatever its users do meanwhile, what it
//! writes keeps the protocol and the bounds of the peer's queues, what it reads reaches the right reader unchanged and
//! within bounds, nobody sleeps over what has come, and an end is an end.

mod received;
mod sent;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use kube_tunnel::k8s::bare::Machine;

use received::{Received, Seen};
use sent::Sent;

/// Connections in one run; several for each worker.
const MOST_CONNECTIONS: usize = 16;

/// What one connection may have unread before the session is read no further.
const MOST_UNREAD: usize = 4 << 20;

/// What a peer sends in one run.
const MOST_SENT: usize = 12 << 20;

/// What the session reads at once.
const READ: usize = 64 << 10;

/// When a session without any sign of life must have ended.
const SILENCE: Duration = Duration::from_millis(15_100);

/// Sizes of writes and of the peer's frames.
const SIZES: [usize; 8] = [0, 1, 5, 100, 4 << 10, 16 << 10, 64 << 10, 300_000];

/// What the peer's payload is taken from.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..300_000).map(|at| (at / 7) as u8).collect());

/// Times that pass.
const TIMES: [u64; 8] = [1, 5, 25, 150, 600, 1200, 3000, 8000];

/// The input is a script of what peer and users do.
pub fn check(data: &[u8]) {
    let mut scene = Scene::new();
    let mut script = Script(data.iter());
    while let Some(step) = script.next() {
        scene.step(step, &mut script);
        if scene.over {
            break;
        }
        scene.check_bounds();
    }
    scene.finish();
}

/// The bytes of the input; what is missing at its end is zero.
struct Script<'a>(std::slice::Iter<'a, u8>);

impl Script<'_> {
    fn next(&mut self) -> Option<u8> {
        self.0.next().copied()
    }

    fn number(&mut self) -> usize {
        self.next().unwrap_or(0).into()
    }
}

/// A waker that remembers.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Flag {
    fn is_woken(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One connection as its user sees it.
struct User {
    /// Nothing once it is closed.
    key: Option<usize>,
    stream: Option<u32>,
    /// What has come and was not read.
    unread: VecDeque<u8>,
    /// Whether the pod's data has ended, and whether either of its streams has.
    data_ended: bool,
    ended: bool,
    shut: bool,
    /// How much was accepted.
    written: usize,
    /// What reading has come to: the end, or an error of this kind.
    came_to: Option<Option<io::ErrorKind>>,
    reader: Option<Arc<Flag>>,
    /// With the size of the write that waits.
    writer: Option<(Arc<Flag>, usize)>,
}

struct Scene {
    machine: Machine,
    users: Vec<User>,
    sent: Sent,
    received: Received,
    /// What the peer has sent and the session has not read.
    way: VecDeque<u8>,
    way_total: usize,
    cut: usize,
    driver: Arc<Flag>,
    /// Whether the session's task has had a reason to run that is not another's wake-up.
    due: bool,
    /// Whether the session has no task any more.
    over: bool,
}

impl Scene {
    fn new() -> Self {
        let mut scene = Self {
            machine: Machine::new(),
            users: Vec::new(),
            sent: Sent::default(),
            received: Received::default(),
            way: VecDeque::new(),
            way_total: 0,
            cut: READ,
            driver: Arc::default(),
            due: true,
            over: false,
        };
        scene.turn();
        scene
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        match step % 18 {
            0 => {
                let length = script.number();
                let bytes: Vec<u8> = std::iter::from_fn(|| script.next()).take(length).collect();
                self.peer(&bytes);
            }
            1 => self.connect(80 + script.number() as u16 % 3),
            2 | 3 => {
                let user = script.number();
                self.write(user, SIZES[script.number() % SIZES.len()]);
            }
            4 => {
                let (user, times) = (script.number(), script.number());
                (0..=times).any(|_| !self.read(user));
            }
            5 => {
                let user = script.number();
                if let Some((user, key)) = self.user(user) {
                    // Whoever ends it writes no more.
                    (user.shut, user.writer) = (true, None);
                    self.machine.shutdown(key);
                }
            }
            6 => {
                let user = script.number();
                self.close(user);
            }
            7 => self.pass(Duration::from_millis(TIMES[script.number() % TIMES.len()])),
            8 => {
                self.machine
                    .sleep(Duration::from_millis(TIMES[script.number() % TIMES.len()]));
                self.due = true;
            }
            9 | 10 => {
                let (stream, size) = (self.stream(script.number()), script.number());
                self.peer_data(stream, SIZES[size % SIZES.len()], size & 0x80 != 0);
            }
            11 => {
                let stream = self.stream(script.number());
                self.peer_control(2, &stream.to_be_bytes());
            }
            12 => {
                let stream = self.stream(script.number()) - 10;
                self.peer_data(stream, script.number() % 64, true);
            }
            13 => {
                let (stream, error) = (self.stream(script.number()), script.number() as u32 % 2);
                let status = [0, 0, 0, 5];
                self.peer_control(3, &[&(stream - 10 * error).to_be_bytes()[..], &status].concat());
            }
            14 | 15 => {
                // One worker answers no PING, perhaps.
                let stuck = script.number();
                for id in self.sent.unanswered() {
                    if id as usize / 2 % 5 != stuck {
                        self.peer_control(6, &id.to_be_bytes());
                    }
                }
            }
            16 => self.cut = [1, 3, 9, 100, 5000, READ][script.number() % 6],
            _ if script.number().is_multiple_of(8) => self.peer_control(7, &[0; 8]),
            _ => {}
        }
        self.turn();
        self.deliver();
    }

    fn connect(&mut self, port: u16) {
        if self.users.len() < MOST_CONNECTIONS {
            let key = self.machine.connect(port);
            // A neighbour makes PINGs due earlier, which may wait until it is used.
            self.due = true;
            self.users.push(User {
                key: Some(key),
                stream: None,
                unread: VecDeque::new(),
                data_ended: false,
                ended: false,
                shut: false,
                written: 0,
                came_to: None,
                reader: None,
                writer: None,
            });
        }
    }

    /// Picks a user whose connection is open.
    fn user(&mut self, number: usize) -> Option<(&mut User, usize)> {
        let count = self.users.len().max(1);
        let user = self.users.get_mut(number % count)?;
        let key = user.key?;
        Some((user, key))
    }

    /// Picks a stream that was opened, or one that was not.
    fn stream(&self, number: usize) -> u32 {
        let streams = self.users.iter().filter_map(|user| user.stream);
        streams.cycle().nth(number).unwrap_or(11 + number as u32 * 2)
    }

    fn write(&mut self, number: usize, size: usize) {
        let Some((_, key)) = self.user(number) else {
            return;
        };
        let number = number % self.users.len();
        let flag = Arc::<Flag>::default();
        let waker = Waker::from(flag.clone());
        let payload = vec![number as u8; size];
        let polled = self
            .machine
            .write(key, &payload, &mut Context::from_waker(&waker));
        let user = &mut self.users[number];
        user.writer = None;
        match polled {
            Poll::Ready(Ok(taken)) => {
                assert!(taken <= size && (taken > 0 || size == 0), "{taken} of {size}");
                let over = user.shut || user.ended || self.machine.ended().is_some();
                assert!(taken == 0 || !over, "payload was taken after an end");
                user.written += taken;
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending => user.writer = Some((flag, size)),
        }
    }

    /// Returns whether there was something to read.
    fn read(&mut self, number: usize) -> bool {
        let Some((_, key)) = self.user(number) else {
            return false;
        };
        let number = number % self.users.len();
        let flag = Arc::<Flag>::default();
        let waker = Waker::from(flag.clone());
        let polled = self.machine.read(key, &mut Context::from_waker(&waker));
        let user = &mut self.users[number];
        user.reader = None;
        match polled {
            Poll::Ready(Ok(Some(bytes))) => {
                assert!(!bytes.is_empty(), "an empty piece looks like an end");
                assert!(user.came_to.is_none(), "bytes after an end");
                let length = bytes.len();
                assert!(length <= user.unread.len(), "bytes that were not sent");
                assert!(
                    user.unread.drain(..length).eq(bytes.iter().copied()),
                    "other bytes"
                );
                return true;
            }
            Poll::Ready(Ok(None)) => {
                assert!(user.unread.is_empty(), "{} bytes were lost", user.unread.len());
                assert!(!matches!(user.came_to, Some(Some(_))), "an end after an error");
                user.came_to = Some(None);
            }
            Poll::Ready(Err(error)) => {
                if let Some(Some(kind)) = user.came_to {
                    assert_eq!(kind, error.kind(), "another error");
                }
                user.came_to = Some(Some(error.kind()));
                user.unread.clear();
            }
            Poll::Pending => {
                assert!(user.came_to.is_none(), "waits after an end");
                assert!(user.unread.is_empty(), "waits for what has come");
                assert!(self.machine.ended().is_none(), "waits for what has ended");
                user.reader = Some(flag);
            }
        }
        false
    }

    fn close(&mut self, number: usize) {
        if let Some((user, key)) = self.user(number) {
            user.key = None;
            user.unread.clear();
            (user.reader, user.writer) = (None, None);
            self.machine.close(key);
        }
    }

    fn peer(&mut self, bytes: &[u8]) {
        if self.way_total + bytes.len() <= MOST_SENT {
            self.way_total += bytes.len();
            self.way.extend(bytes);
        }
    }

    fn peer_data(&mut self, stream: u32, size: usize, fin: bool) {
        let head = (u32::from(fin) << 24) | size as u32;
        let head = [stream.to_be_bytes(), head.to_be_bytes()].concat();
        self.peer(&[&head, &PATTERN[..size]].concat());
    }

    fn peer_control(&mut self, kind: u8, payload: &[u8]) {
        self.peer(&[&[0x80, 3, 0, kind, 0, 0, 0, payload.len() as u8], payload].concat());
    }

    /// Lets the session read what is on the way, as far as it does.
    fn deliver(&mut self) {
        while !self.way.is_empty() && !self.over && self.machine.is_reading() {
            // Long payload is not cut as finely as heads are, which would take seconds and show nothing more.
            let length = self.cut.max(self.way.len() / 500).min(self.way.len());
            let piece: Vec<u8> = self.way.drain(..length).collect();
            let seen = self.received.take(&piece);
            for event in &seen {
                self.sent.answered(event);
                self.arrive(event);
            }
            self.machine.receive(&piece);
            assert_eq!(
                self.received.is_broken(),
                self.machine
                    .ended()
                    .is_some_and(|reason| reason.contains("control frame")),
                "after {seen:?}"
            );
            self.due = true;
            self.turn();
            self.check_bounds();
        }
    }

    /// Notes what an event means to its user.
    fn arrive(&mut self, event: &Seen) {
        let (Seen::Data(id, ..) | Seen::Reset(id)) = event else {
            return;
        };
        for user in &mut self.users {
            let Some(stream) = user.stream else { continue };
            let data = stream == *id;
            if !data && stream - 10 != *id {
                continue;
            }
            if let Seen::Data(_, payload, _) = event
                && data
                && !user.data_ended
                && user.key.is_some()
                && user.came_to.is_none()
            {
                user.unread.extend(payload);
            }
            if matches!(event, Seen::Reset(_) | Seen::Data(_, _, true)) {
                user.ended = true;
                user.data_ended |= data;
            }
        }
    }

    /// Runs the session's task.
    fn turn(&mut self) {
        if self.over {
            return;
        }
        let asked = self.due || self.driver.is_woken();
        let flag = Arc::<Flag>::default();
        let waker = Waker::from(flag.clone());
        let mut out = Vec::new();
        let goes_on = self.machine.turn(&mut out, &mut Context::from_waker(&waker));
        assert!(
            asked || out.is_empty() && goes_on,
            "nobody woke the session's task"
        );
        (self.driver, self.due, self.over) = (flag, false, !goes_on);
        for user in &mut self.users {
            if user.stream.is_none()
                && let Some(key) = user.key
            {
                user.stream = self.machine.stream(key);
            }
        }
        self.sent.take(&out);
        if self.machine.ended().is_none() {
            for (number, user) in self.users.iter().enumerate() {
                if let Some(stream) = user.stream
                    && user.written > 0
                {
                    assert_eq!(self.sent.payload(stream), (user.written, number as u8));
                }
            }
        }
    }

    /// Lets time pass.
    fn pass(&mut self, mut time: Duration) {
        while !time.is_zero() && !self.over {
            time -= self.machine.pass(time);
            self.due = true;
            self.turn();
        }
    }

    fn check_bounds(&mut self) {
        for number in 0..self.users.len() {
            if self.users[number].unread.len() >= MOST_UNREAD && self.machine.is_reading() {
                // Unless it has failed, and holds nothing.
                let unread = self.users[number].unread.len();
                self.read(number);
                assert!(
                    self.users[number].unread.is_empty(),
                    "{unread} bytes are unread, and more is taken"
                );
            }
        }
    }

    fn finish(mut self) {
        if !self.over {
            self.pass(Duration::from_millis(100));
            self.nobody_sleeps();
        }
        if !self.over {
            // Everything is read, so that nothing holds the session up.
            for _ in 0..=MOST_CONNECTIONS {
                for number in 0..self.users.len() {
                    while self.read(number) {}
                }
                self.turn();
                self.deliver();
            }
            let (mut silent, mut at_once) = (Duration::ZERO, 0);
            while !self.over && self.machine.ended().is_none() {
                let passed = self.machine.pass(SILENCE);
                at_once = if passed.is_zero() { at_once + 1 } else { 0 };
                assert!(
                    at_once < 2,
                    "the session asks to be called at once, again and again"
                );
                silent += passed;
                assert!(silent <= SILENCE, "a silent session goes on");
                self.due = true;
                self.turn();
            }
        }
        if self.machine.ended().is_some() {
            self.connect(80);
            for number in 0..self.users.len() {
                while self.read(number) {}
                if self.users[number].key.is_some() {
                    assert!(
                        self.users[number].came_to.is_some(),
                        "ended, but not for {number}"
                    );
                    self.write(number, 1);
                    assert!(
                        self.users[number].writer.is_none(),
                        "a write waits for what has ended"
                    );
                }
            }
        }
    }

    /// Who was not woken must have nothing to be woken for.
    fn nobody_sleeps(&mut self) {
        for number in 0..self.users.len() {
            if self.users[number]
                .reader
                .as_ref()
                .is_some_and(|flag| !flag.is_woken())
            {
                self.read(number);
                assert!(self.users[number].reader.is_some(), "a reader was not woken");
            }
            if let Some((flag, size)) = self.users[number].writer.take()
                && !flag.is_woken()
            {
                self.write(number, size);
                assert!(self.users[number].writer.is_some(), "a writer was not woken");
            }
        }
    }
}
