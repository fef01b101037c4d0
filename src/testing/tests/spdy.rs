//! SPDY sessions: what moby/spdystream does with frames, streams and sessions that are in trouble.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::client::{self, Seen, Session, data, fin, go_away, ping, window_update};
use super::scene::{ECHO, NOBODY, SPDY, Scene};
use crate::testing::ForwardFault;

/// Long enough for an answer that is not to come.
const SILENCE: Duration = Duration::from_millis(200);

/// A class of streams that is stuck: 1, that of stream 11, by early data for a refused port.
async fn session_with_a_stuck_worker(scene: &Scene) -> Session {
    let mut session = scene.spdy().await;
    session.pair(11, NOBODY, b"early").await;
    session
        .until(|seen| seen.contains(&Seen::Fin(11)) && seen.contains(&Seen::Fin(1)))
        .await;
    session
}

/// A SYN_STREAM whose id has been used: the read loop itself answers it.
fn old_id(session: &mut Session) -> BytesMut {
    session.frames.open(1, false, &[])
}

#[tokio::test]
async fn bytes_travel_both_ways_and_both_streams_end() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
    session.send(fin(11)).await;
    let ends = session.until(|seen| seen.len() == 2).await;
    assert!(
        ends.contains(&Seen::Fin(11)) && ends.contains(&Seen::Fin(1)),
        "{ends:?}"
    );
}

#[tokio::test]
async fn the_session_freezes_behind_one_frame_in_hand_and_fifty_in_the_queue() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    for _ in 0..50 {
        session.send(data(11, b"queued")).await;
    }
    let probe = old_id(&mut session);
    session.send(&probe).await;
    assert_eq!(session.next().await, Some(Seen::Reset(1, 1)));
    session.send(data(11, b"one too many")).await;
    let forwards = scene.cluster.forwards();
    super::within(forwards.until(|counts| counts.data_frames == 52)).await;
    session.send([probe, ping(1)].concat()).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    let counts = forwards.counts();
    assert_eq!((counts.syn_streams, counts.pings), (3, 0));
}

#[tokio::test]
async fn an_application_that_reads_on_lets_a_frozen_session_go_on() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    scene.break_with(Some(ForwardFault::NotReading));
    // The socket, the copier, the worker's hand, the queue, and the one that blocks the read loop.
    let frames = crate::testing::STALLED_SOCKET / 32768 + 1 + 1 + 50 + 1;
    for _ in 0..frames {
        session.send(data(11, &[b'x'; 32768])).await;
    }
    session.send(ping(1)).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    scene.break_with(None);
    let mut echoed = 0;
    while echoed < frames * 32768 {
        match session.next().await {
            Some(Seen::Data(11, payload)) => echoed += payload.len(),
            Some(Seen::Pong(1)) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_stuck_worker_leaves_the_other_four_alive() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    for stream in [27, 43, 59, 75] {
        session.pair(stream, ECHO, b"alive").await;
        assert_eq!(session.next().await, Some(Seen::Data(stream, "alive".into())));
    }
    let queued = session.open_pair(91, ECHO);
    session.send(queued).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
}

#[tokio::test]
async fn the_kth_ping_is_answered_by_worker_k_modulo_five() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    assert_eq!(session.workers_alive(1, 1).await, [0, 2, 3, 4]);
}

#[tokio::test]
async fn ignored_frames_take_their_turn_among_the_pings() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    session.send(window_update(11)).await;
    // The first PING goes to worker 1.
    session.send(ping(1)).await;
    session.send(ping(3)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(3)));
}

#[tokio::test]
async fn pongs_of_one_worker_keep_their_order_and_those_of_several_do_not() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    for number in 0..500 {
        session.send(ping(2 * number + 1)).await;
    }
    let seen = session.until(|seen| seen.len() == 500).await;
    let numbers: Vec<u32> = seen
        .iter()
        .map(|frame| match frame {
            Seen::Pong(id) => id / 2,
            other => panic!("unexpected {other:?}"),
        })
        .collect();
    assert!(!numbers.is_sorted());
    for worker in 0..5 {
        assert!(numbers.iter().filter(|&number| number % 5 == worker).is_sorted());
    }
}

#[tokio::test]
async fn pings_of_even_ids_are_answers_and_stay_unanswered() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.send([ping(2), ping(3)].concat()).await;
    assert_eq!(session.next().await, Some(Seen::Pong(3)));
}

#[tokio::test]
async fn an_old_id_is_refused_beside_a_stuck_worker_and_takes_no_slot() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    let probe = old_id(&mut session);
    for _ in 0..100 {
        session.send(&probe).await;
        assert_eq!(session.next().await, Some(Seen::Reset(1, 1)));
    }
}

#[tokio::test]
async fn ids_may_skip_but_not_fall() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(1000, ECHO, b"").await;
    let opening = session.open_pair(998, ECHO);
    session.send(opening).await;
    let refused = session.until(|seen| seen.len() == 2).await;
    assert!(
        refused.contains(&Seen::Reset(988, 1)) && refused.contains(&Seen::Reset(998, 1)),
        "{refused:?}"
    );
}

#[tokio::test]
async fn bad_headers_are_answered_with_cancel() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    let bad: [&[(&str, &str)]; 4] = [
        &[],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "other"), ("port", "80")],
    ];
    for (headers, stream) in bad.into_iter().zip([1, 3, 5, 7]) {
        let opening = session.frames.open(stream, false, headers);
        session.send(opening).await;
        assert_eq!(session.next().await, Some(Seen::Reset(stream, 5)));
    }
}

#[tokio::test]
async fn upper_case_names_end_the_session() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    let opening = session
        .frames
        .open(1, false, &[("StreamType", "data"), ("port", "80")]);
    session.send(opening).await;
    assert_eq!(session.next().await, None);
}

#[tokio::test]
async fn streams_without_a_request_id_are_paired_by_their_ids() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    let mut opening = BytesMut::new();
    for (stream, kind) in [(7, "error"), (9, "data")] {
        let headers = [("streamtype", kind), ("port", "5432")];
        opening.extend_from_slice(&session.frames.open(stream, false, &headers));
    }
    opening.extend_from_slice(&data(9, b"hello"));
    session.send(opening).await;
    session
        .until(|seen| seen.contains(&Seen::Data(9, "hello".into())))
        .await;
}

#[tokio::test]
async fn data_for_unknown_streams_is_dropped() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.send(data(21, b"nobody")).await;
    // The same worker goes on.
    session.pair(11, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn bytes_sent_before_the_101_are_lost() {
    let scene = Scene::new().await;
    let (mut stream, head) = scene.raw("POST", &SPDY).await;
    let early = [head.as_bytes(), &ping(1)].concat();
    stream.write_all(&early).await.unwrap();
    let mut answer = BytesMut::new();
    while !answer.ends_with(b"\r\n\r\n") {
        super::within(stream.read_buf(&mut answer)).await.unwrap();
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "), "{answer:?}");
    answer.clear();
    stream.write_all(&ping(3)).await.unwrap();
    while answer.len() < 12 {
        super::within(stream.read_buf(&mut answer)).await.unwrap();
    }
    assert_eq!(client::parse(&mut answer), Some(Seen::Pong(3)));
}

#[tokio::test]
async fn half_a_pair_gets_a_text_after_thirty_seconds_and_nothing_else() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    let headers = [("streamtype", "error"), ("port", "80"), ("requestid", "9")];
    let opening = session.frames.open(1, true, &headers);
    session.send(opening).await;
    assert_eq!(session.next().await, Some(Seen::Reply(1)));
    advance(Duration::from_secs(30)).await;
    let Some(Seen::Data(1, text)) = session.next().await else {
        panic!("no text")
    };
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.ends_with("request=9) timed out waiting for streams"),
        "{text}"
    );
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
}

#[tokio::test]
async fn an_idle_session_resets_its_streams_and_goes_away() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    let hour = Duration::from_secs(60 * 60);
    advance(3 * hour).await;
    // Any frame starts the time anew.
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
    advance(3 * hour).await;
    session.send(ping(3)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(3)));
    advance(4 * hour).await;
    assert_eq!(session.next().await, Some(Seen::Reset(1, 5)));
    assert_eq!(session.next().await, Some(Seen::Reset(11, 5)));
    assert_eq!(session.next().await, Some(Seen::GoAway(11)));
    assert_eq!(session.next().await, None);
}

#[tokio::test]
async fn go_away_ends_the_session_after_what_came_before_it() {
    let scene = Scene::new().await;
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    scene
        .application(80, move |mut stream| {
            let sender = sender.clone();
            async move {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                sender.send(bytes).unwrap();
            }
        })
        .await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    session
        .send([data(11, b"last words"), go_away(), data(11, b"unheard")].concat())
        .await;
    assert_eq!(session.next().await, None);
    let received = super::within(received.recv()).await.unwrap();
    assert_eq!(received, b"last words");
}

#[tokio::test]
async fn go_away_behind_a_stuck_worker_is_never_followed_by_the_end() {
    let scene = Scene::new().await;
    let mut session = session_with_a_stuck_worker(&scene).await;
    session.send(go_away()).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    assert_eq!(scene.cluster.forwards().counts().go_aways, 1);
}

#[tokio::test]
async fn after_its_own_go_away_the_server_ignores_new_streams_and_leaves_with_the_last_one() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    assert_eq!(scene.cluster.forwards().send_go_away("shop", scene.pod()), 1);
    assert_eq!(session.next().await, Some(Seen::GoAway(11)));
    let ignored = session.open_pair(31, ECHO);
    session.send(ignored).await;
    session.send(data(11, b"goes on")).await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "goes on".into())));
    session.send(fin(11)).await;
    session.until(|seen| seen.len() == 2).await;
    assert_eq!(session.next().await, None);
}

#[tokio::test]
async fn a_client_that_leaves_has_delivered_what_it_sent() {
    let scene = Scene::new().await;
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    scene
        .application(80, move |mut stream| {
            let sender = sender.clone();
            async move {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                sender.send(bytes).unwrap();
                stream.shutdown().await.unwrap();
            }
        })
        .await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"last words").await;
    drop(session);
    let received = super::within(received.recv()).await.unwrap();
    assert_eq!(received, b"last words");
    let forwards = scene.cluster.forwards();
    super::within(forwards.until(|counts| counts.sessions_open + counts.connections_open == 0)).await;
}

/// Moves the clock at once; the machine's sockets go on in real time.
async fn advance(duration: Duration) {
    tokio::time::pause();
    tokio::time::advance(duration).await;
    tokio::time::resume();
}
