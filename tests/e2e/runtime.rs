//! What the sessions of port-forwards lean on in the container runtime (docs/adr/0007): each seen at the runtime itself, frame
//! by frame, so that one that behaves otherwise is noticed.

mod raw;

use std::collections::BTreeSet;

use tokio::time::{Duration, Instant};

use crate::cluster::Namespace;
use crate::forward;
use crate::note::note;
use crate::scene::Scene;
use raw::{Frame, Raw, WORKERS};

/// Longer than an answer takes, and than what is not to be answered is waited for.
const LIMIT: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(1);

const ECHO: u16 = 9000;
const GREET: u16 = 9001;
const HOLD: u16 = 9002;
const RESET: u16 = 9003;
const FLOOD: u16 = 9004;
const HTTP1: u16 = 8081;
const CLOSED: u16 = 4444;

/// A request after which the application closes the connection.
const LAST_REQUEST: &[u8] = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

/// What a worker's queue holds beside the frame in its hands.
const QUEUE: usize = 50;

/// A session with one echoing connection for each worker.
struct Workers {
    raw: Raw,
    echoes: [u32; WORKERS],
    _scene: Scene,
}

impl Workers {
    async fn start() -> Self {
        let scene = Scene::together().await;
        let mut raw = Raw::connect(scene.shop).await;
        let mut echoes = [0; WORKERS];
        for (class, echo) in echoes.iter_mut().enumerate() {
            *echo = raw.open(class, ECHO, b"").await;
        }
        Self {
            raw,
            echoes,
            _scene: scene,
        }
    }

    /// Returns the workers whose connection echoes.
    async fn alive(&mut self) -> BTreeSet<usize> {
        let mut wanted = Vec::new();
        for &stream in &self.echoes {
            wanted.push((stream, self.raw.bytes(stream) + 1));
            self.raw.data(stream, b"x").await;
        }
        let all = |raw: &Raw| wanted.iter().all(|&(stream, count)| raw.bytes(stream) >= count);
        self.raw.wait(SILENCE, all).await;
        let echoed = wanted
            .iter()
            .map(|&(stream, count)| self.raw.bytes(stream) >= count);
        echoed
            .enumerate()
            .filter_map(|(class, echoed)| echoed.then_some(class))
            .collect()
    }

    /// Sends to an application that does not read until its worker stands still. That worker has one frame in its hands then,
    /// and a PING in its queue. Returns the stream.
    async fn stall(&mut self, class: usize) -> u32 {
        let hold = self.raw.open(class, HOLD, b"").await;
        for sent in 1..1000 {
            self.raw.data(hold, &[0; 64 << 10]).await;
            let handed = self.raw.pings(SILENCE).await;
            if handed.len() < WORKERS {
                assert_eq!(handed, others(class), "PINGs go to the workers in turn");
                note(&format!(
                    "an application that does not read has taken {} KiB",
                    (sent - 1) * 64
                ));
                return hold;
            }
        }
        panic!("an application that reads nothing takes everything");
    }
}

/// All workers but one.
fn others(class: usize) -> BTreeSet<usize> {
    (0..WORKERS).filter(|&other| other != class).collect()
}

#[tokio::test]
async fn one_upgrade_carries_hundreds_of_connections_that_need_no_round_trip() {
    const COUNT: usize = 300;
    let scene = Scene::together().await;
    let mut raw = Raw::connect(scene.shop).await;
    let began = Instant::now();
    let mut streams = Vec::new();
    for number in 0..COUNT {
        streams.push(raw.open(number % WORKERS, ECHO, b"hello").await);
    }
    let all = |raw: &Raw| streams.iter().all(|&stream| raw.bytes(stream) == 5);
    assert!(
        raw.wait(LIMIT, all).await,
        "not all have echoed what was sent with their opening"
    );
    note(&format!(
        "{COUNT} connections over one upgrade: {} ms",
        began.elapsed().as_millis()
    ));
}

#[tokio::test]
async fn a_streams_worker_is_its_id_modulo_five_and_only_that_one_waits_for_an_application() {
    for class in [0, 3] {
        let mut workers = Workers::start().await;
        assert_eq!(workers.alive().await.len(), WORKERS);
        workers.stall(class).await;
        assert_eq!(workers.alive().await, others(class));
    }
}

#[tokio::test]
async fn a_queue_of_fifty_frames_is_what_a_session_bears() {
    let mut workers = Workers::start().await;
    let hold = workers.stall(0).await;
    // One PING is there already, and asking for signs of life adds a frame each time.
    for _ in 1..QUEUE - 1 {
        workers.raw.data(hold, b"x").await;
    }
    assert_eq!(
        workers.alive().await,
        others(0),
        "with a full queue the others go on"
    );
    workers.raw.data(hold, b"x").await;
    assert!(
        workers.alive().await.is_empty(),
        "one frame more stops the whole session"
    );
}

#[tokio::test]
async fn an_id_that_is_too_low_is_refused_without_a_worker() {
    let mut workers = Workers::start().await;
    workers.stall(1).await;
    workers.raw.open_bare(1).await;
    let refused = |raw: &Raw| raw.has(|frame| *frame == Frame::Reset(1, 1));
    assert!(workers.raw.wait(LIMIT, refused).await, "no sign of life");
    assert_eq!(workers.alive().await, others(1), "it costs no connection");
}

#[tokio::test]
async fn a_stream_without_headers_is_refused_by_its_worker() {
    let mut workers = Workers::start().await;
    let free = workers.raw.unused(2);
    workers.raw.open_bare(free).await;
    let refused = |id| move |raw: &Raw| raw.has(|frame| matches!(frame, Frame::Reset(of, _) if *of == id));
    assert!(
        workers.raw.wait(LIMIT, refused(free)).await,
        "a worker that has nothing else to do does not answer"
    );
    workers.stall(1).await;
    let stuck = workers.raw.unused(1);
    workers.raw.open_bare(stuck).await;
    assert!(
        !workers.raw.wait(SILENCE, refused(stuck)).await,
        "an answer that overtakes what its worker has in its hands proves nothing of it"
    );
    assert_eq!(workers.alive().await, others(1));
}

#[tokio::test]
async fn a_connection_is_taken_before_anything_else_is_said_of_it() {
    let scene = Scene::together().await;
    let mut raw = Raw::connect(scene.shop).await;
    for (port, bytes) in [(GREET, &b""[..]), (CLOSED, b""), (ECHO, b"hello")] {
        let stream = raw.open(2, port, bytes).await;
        let spoken = |raw: &Raw| raw.bytes(stream) + raw.bytes(stream - 10) > 0;
        assert!(raw.wait(LIMIT, spoken).await, "port {port} says nothing");
        for id in [stream - 10, stream] {
            let taken = raw.place(|frame| *frame == Frame::Reply(id));
            let first = raw.place(|frame| matches!(frame, Frame::Data { stream, .. } if *stream == id));
            assert!(
                taken.is_some() && first.is_none_or(|first| Some(first) > taken),
                "port {port}, stream {id}"
            );
        }
    }
}

#[tokio::test]
async fn bytes_that_nobody_is_left_to_take_stop_their_worker_alone() {
    let mut workers = Workers::start().await;
    let stream = workers.raw.open(2, HTTP1, LAST_REQUEST).await;
    assert!(
        workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
        "no end"
    );
    assert_eq!(workers.alive().await.len(), WORKERS);
    // The first may find the copier that only learns by it that the application has gone.
    let mut handed = BTreeSet::new();
    for count in 1..=3 {
        workers.raw.data(stream, b"too late").await;
        handed = workers.raw.pings(SILENCE).await;
        if handed.len() < WORKERS {
            note(&format!("frame {count} after the end has stopped its worker"));
            break;
        }
    }
    assert_eq!(
        handed,
        others(2),
        "the poisoned worker is the one whose PONG is missing"
    );
    assert_eq!(workers.alive().await, others(2));
}

#[tokio::test]
async fn a_port_that_refuses_says_so_on_the_error_stream_and_harms_nobody() {
    let mut workers = Workers::start().await;
    let stream = workers.raw.open(2, CLOSED, b"").await;
    assert!(
        workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
        "no end"
    );
    let text = workers.raw.text(stream - 10);
    for words in ["failed to connect to localhost:4444", "connection refused"] {
        assert!(text.contains(words), "{text:?}");
    }
    assert_eq!(workers.raw.bytes(stream), 0);
    assert_eq!(workers.alive().await.len(), WORKERS);
}

#[tokio::test]
async fn bytes_for_a_port_that_refuses_stop_their_worker_at_most() {
    let mut workers = Workers::start().await;
    let stream = workers.raw.open(2, CLOSED, b"early").await;
    assert!(
        workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
        "no end"
    );
    let text = workers.raw.text(stream - 10);
    assert!(text.contains("connection refused"), "{text:?}");
    let alive = workers.alive().await;
    note(&format!(
        "bytes for a port that refuses stop their worker: {}",
        !alive.contains(&2)
    ));
    assert!(alive.is_superset(&others(2)), "{alive:?}");
}

#[tokio::test]
async fn a_pod_that_has_ended_says_so_to_newcomers_of_its_session() {
    let _scene = Scene::together().await;
    let own = Namespace::web("ended").await;
    let pod = forward::pod(&own).await;
    let mut raw = Raw::connect_to(&pod).await;
    let echo = raw.open(0, ECHO, b"hello").await;
    assert!(raw.wait(LIMIT, |raw| raw.bytes(echo) == 5).await, "no echo");
    own.kubectl(&["delete", "pod", &pod.name, "--grace-period=1", "--wait"])
        .await
        .succeeded();
    assert!(raw.wait(LIMIT, |raw| raw.has_ended(echo)).await, "no end");
    assert_eq!(
        raw.pings(LIMIT).await.len(),
        WORKERS,
        "the session outlives the pod"
    );
    let late = raw.open(1, ECHO, b"").await;
    assert!(raw.wait(LIMIT, |raw| raw.has_ended(late)).await, "no refusal");
    let text = raw.text(late - 10);
    note(&format!("an ended pod: {text}"));
    assert!(
        text.contains("sandbox"),
        "nothing that tells it from a port that refuses: {text:?}"
    );
}

#[tokio::test]
async fn an_application_that_resets_harms_no_other_connection() {
    let mut workers = Workers::start().await;
    let stream = workers.raw.open(2, RESET, b"x").await;
    assert!(
        workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
        "no end"
    );
    let text = workers.raw.text(stream - 10);
    let reset = workers
        .raw
        .has(|frame| matches!(frame, Frame::Reset(id, _) if *id == stream - 10));
    assert!(
        text.contains("reset by peer") || reset,
        "it looks like an orderly end"
    );
    assert_eq!(workers.alive().await.len(), WORKERS);
}

#[tokio::test]
async fn an_applications_end_comes_a_second_late_unless_ours_has_come_before() {
    let mut workers = Workers::start().await;
    let (held, late) = (0.8..2.0, 0.5);
    for hurried in [false, true] {
        let stream = workers.raw.open(2, HTTP1, LAST_REQUEST).await;
        assert!(
            workers.raw.wait(LIMIT, |raw| raw.bytes(stream) > 0).await,
            "no answer"
        );
        if hurried {
            workers.raw.end(stream).await;
        }
        let answered = Instant::now();
        assert!(
            workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
            "no end"
        );
        let seconds = answered.elapsed().as_secs_f64();
        note(&format!(
            "an application's end, ours sent: {hurried}: {seconds:.3} s"
        ));
        let expected = if hurried {
            seconds < late
        } else {
            held.contains(&seconds)
        };
        assert!(expected, "ours sent: {hurried}; {seconds} s");
    }
}

#[tokio::test]
async fn an_answer_that_is_awaited_is_cut_off_a_second_after_our_end() {
    let mut workers = Workers::start().await;
    let request = |ms| format!("GET /slow?ms={ms} HTTP/1.1\r\nhost: a\r\n\r\n");
    for (ms, answered) in [(100, true), (4000, false)] {
        let stream = workers.raw.open(2, HTTP1, request(ms).as_bytes()).await;
        workers.raw.end(stream).await;
        assert!(
            workers.raw.wait(LIMIT, |raw| raw.has_ended(stream)).await,
            "no end"
        );
        assert_eq!(workers.raw.bytes(stream) > 0, answered, "after {ms} ms");
    }
    assert_eq!(workers.alive().await.len(), WORKERS);
}

#[tokio::test]
async fn what_an_application_writes_goes_on_for_a_second_after_our_reset() {
    let mut workers = Workers::start().await;
    let stream = workers.raw.open(2, FLOOD, b"").await;
    assert!(
        workers.raw.wait(LIMIT, |raw| raw.bytes(stream) > 0).await,
        "no flood"
    );
    workers.raw.reset(stream).await;
    let (began, before) = (Instant::now(), workers.raw.bytes(stream));
    let ended = |raw: &Raw| {
        raw.has(|frame| matches!(frame, Frame::Data { stream: of, fin: true, .. } if *of == stream - 10))
    };
    assert!(workers.raw.wait(LIMIT, ended).await, "no end");
    note(&format!(
        "after a reset {} KiB came in {:.3} s",
        (workers.raw.bytes(stream) - before) >> 10,
        began.elapsed().as_secs_f64()
    ));
    assert!(
        workers.raw.bytes(stream) > before,
        "a reset stops the runtime at once"
    );
    assert_eq!(workers.alive().await.len(), WORKERS);
}
