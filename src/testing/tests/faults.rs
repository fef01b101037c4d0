//! The switches for port-forwards, and who may open them.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::client::{Seen, data, ping};
use super::scene::{ECHO, SPDY, Scene, TUNNEL};
use super::{user, within};
use crate::testing::{Carrier, ForwardFault, Rule, STALLED_SOCKET};

/// Long enough for an answer that is not to come.
const SILENCE: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_delayed_reply_holds_its_worker() {
    let scene = Scene::new().await;
    let delay = Duration::from_millis(100);
    scene.cluster.faults().set_reply_delay(delay);
    let mut session = scene.spdy().await;
    let asked = Instant::now();
    session.pair(11, ECHO, b"hello").await;
    assert!(asked.elapsed() >= 2 * delay, "{:?}", asked.elapsed());
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn dropped_pongs_leave_the_rest_alive() {
    let scene = Scene::new().await;
    scene.cluster.faults().set_drop_pongs(true);
    let mut session = scene.spdy().await;
    session.send(ping(1)).await;
    session.pair(11, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
    assert_eq!(scene.cluster.forwards().counts().pings, 1);
    scene.cluster.faults().set_drop_pongs(false);
    session.send(ping(3)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(3)));
}

#[tokio::test]
async fn swallowed_streams_get_no_answer_and_their_headers_still_count() {
    let scene = Scene::new().await;
    scene.cluster.faults().set_swallow_streams(true);
    let mut session = scene.spdy().await;
    let swallowed = session.open_pair(11, ECHO);
    session.send(swallowed).await;
    session.send(data(11, b"nobody")).await;
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
    scene.cluster.faults().set_swallow_streams(false);
    session.pair(31, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(31, "hello".into())));
}

#[tokio::test]
async fn a_black_hole_swallows_what_follows_the_101() {
    let scene = Scene::new().await;
    scene.cluster.faults().set_black_hole(Carrier::Spdy, true);
    let mut session = scene.spdy().await;
    session.send(ping(1)).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    let counts = scene.cluster.forwards().counts();
    assert_eq!((counts.pings, counts.sessions_open), (0, 1));
}

#[tokio::test]
async fn a_black_hole_takes_open_sessions_too_and_keeps_them() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
    scene.cluster.faults().set_black_hole(Carrier::Spdy, true);
    session.send(ping(3)).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    scene.cluster.faults().set_black_hole(Carrier::Spdy, false);
    session.send(ping(5)).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    let mut session = scene.spdy().await;
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
}

#[tokio::test]
async fn an_application_that_does_not_write_does_so_when_it_is_let_go() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    scene.break_with(Some(ForwardFault::NotWriting));
    session.send(data(11, b"hello")).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    scene.break_with(None);
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn an_application_that_does_not_read_gets_what_its_socket_holds_when_it_is_let_go() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    scene.break_with(Some(ForwardFault::NotReading));
    session.pair(11, ECHO, b"hello").await;
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    scene.break_with(None);
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn a_port_can_stall_while_others_go_on() {
    let scene = Scene::new().await;
    let stalled = Some(ForwardFault::NotReading);
    scene
        .cluster
        .faults()
        .set_port_forward("shop", scene.pod(), 80, stalled);
    scene
        .application(80, |stream| async move {
            let _open = stream;
            std::future::pending().await
        })
        .await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    // The socket, the copier, the worker's hand, one in the queue.
    for _ in 0..STALLED_SOCKET / 32768 + 3 {
        session.send(data(11, &[b'x'; 32768])).await;
    }
    assert_eq!(session.workers_alive(1, 1).await, [0, 2, 3, 4]);
    session.pair(27, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(27, "hello".into())));
}

#[tokio::test]
async fn the_sessions_of_a_pod_can_be_silenced() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
    let forwards = scene.cluster.forwards();
    assert_eq!(forwards.silence_sessions("shop", scene.pod()), 1);
    session.send([data(11, b"lost"), ping(1)].concat()).await;
    let answer = timeout(SILENCE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    let counts = forwards.counts();
    assert_eq!((counts.sessions_open, counts.connections_open), (1, 1));
}

#[tokio::test]
async fn the_sessions_of_a_pod_can_be_killed() {
    let scene = Scene::new().await;
    let mut sessions = [scene.spdy().await, scene.spdy().await];
    let forwards = scene.cluster.forwards();
    sessions[0].pair(11, ECHO, b"hello").await;
    assert_eq!(forwards.kill_sessions("shop", "another"), 0);
    assert_eq!(forwards.kill_sessions("shop", scene.pod()), 2);
    for session in &mut sessions {
        session.next().await;
        assert_eq!(session.next().await, None);
    }
    within(forwards.until(|counts| counts.sessions_open + counts.connections_open == 0)).await;
}

#[tokio::test]
async fn a_restart_of_the_runtime_cuts_direct_sessions() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    assert_eq!(scene.cluster.forwards().restart_runtime(), 1);
    assert_eq!(session.next().await, None);
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"hello").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn latency_delays_each_direction_and_keeps_the_order() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    let (up, down) = (Duration::from_millis(80), Duration::from_millis(120));
    scene.cluster.faults().set_latency(up, down);
    let sent = Instant::now();
    let text: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
    let chunks = text.chunks(1000);
    let one_by_one = (up + down) * u32::try_from(chunks.len()).unwrap();
    for chunk in chunks {
        session.send(data(11, chunk)).await;
    }
    let mut echoed = Vec::new();
    while echoed.len() < text.len() {
        match session.next().await {
            Some(Seen::Data(11, payload)) => echoed.extend_from_slice(&payload),
            other => panic!("unexpected {other:?}"),
        }
    }
    let took = sent.elapsed();
    assert!(took >= up + down && took < one_by_one / 2, "{took:?}");
    assert!(echoed == text);
    scene.cluster.faults().set_latency(Duration::ZERO, Duration::ZERO);
    session.send(ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
}

#[tokio::test]
async fn carriers_are_refused_one_by_one() {
    let scene = Scene::new().await;
    scene.cluster.faults().refuse_carrier(Carrier::Tunnel, true);
    let refused = scene.upgrade(&scene.client, "GET", &TUNNEL).await.unwrap_err();
    assert_eq!(refused.status(), 403);
    scene.spdy().await;
    scene.cluster.faults().refuse_carrier(Carrier::Tunnel, false);
    scene.cluster.faults().refuse_carrier(Carrier::Spdy, true);
    let refused = scene.upgrade(&scene.client, "POST", &SPDY).await.unwrap_err();
    assert_eq!(refused.status(), 403);
    scene.tunnel().await;
    let counts = scene.cluster.forwards().counts();
    let upgrades = [Carrier::Spdy, Carrier::Tunnel, Carrier::Channel].map(|carrier| counts.upgrades(carrier));
    assert_eq!(upgrades, [1, 1, 0]);
}

#[tokio::test]
async fn counts_tell_what_a_session_did() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"hello").await;
    session.send(ping(1)).await;
    session.until(|seen| seen.len() == 2).await;
    let counts = scene.cluster.forwards().counts();
    assert_eq!((counts.sessions_open, counts.streams_opened), (1, 2));
    assert_eq!((counts.connections_opened, counts.connections_open), (1, 1));
    assert_eq!((counts.syn_streams, counts.fins), (2, 1));
    assert_eq!((counts.data_frames, counts.pings, counts.resets), (1, 1, 0));
    assert_eq!((counts.bytes_to_pods, counts.bytes_from_pods), (5, 5));
}

#[tokio::test]
async fn an_upgrade_by_post_needs_create_and_one_by_get_needs_get() {
    let scene = Scene::new().await;
    let creator = user(&scene.cluster, "creator").await;
    let getter = user(&scene.cluster, "getter").await;
    let rule = |verb| [Rule::new(&[verb], &["pods/portforward"])];
    scene.cluster.allow_only("creator", &rule("create"));
    scene.cluster.allow_only("getter", &rule("get"));
    for (client, method, headers, allowed) in [
        (&creator, "POST", &SPDY[..], true),
        (&creator, "GET", &SPDY[..], false),
        (&creator, "GET", &TUNNEL[..], false),
        (&getter, "POST", &SPDY[..], false),
        (&getter, "GET", &SPDY[..], true),
        (&getter, "GET", &TUNNEL[..], true),
    ] {
        let answer = scene.upgrade(client, method, headers).await;
        assert_eq!(answer.is_ok(), allowed, "{method} {headers:?}");
    }
}

#[tokio::test]
async fn newer_servers_demand_create_for_websockets_too() {
    let scene = Scene::new().await;
    scene.cluster.require_create_for_websockets(true);
    let getter = user(&scene.cluster, "getter").await;
    scene
        .cluster
        .allow_only("getter", &[Rule::new(&["get"], &["pods/portforward"])]);
    let refused = scene.upgrade(&getter, "GET", &TUNNEL).await.unwrap_err();
    assert_eq!(refused.status(), 403);
    scene.upgrade(&getter, "GET", &SPDY).await.unwrap();
    let both = Rule::new(&["get", "create"], &["pods/portforward"]);
    scene.cluster.allow_only("getter", &[both]);
    scene.upgrade(&getter, "GET", &TUNNEL).await.unwrap();
}
