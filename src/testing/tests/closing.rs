//! How the streams of a forwarded connection end, runtime by runtime, and what DATA does to a worker when it comes too late.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::DEADLINE;
use super::client::{Seen, Session, data, fin, reset};
use super::scene::{ECHO, GRACE, NOBODY, Scene};
use crate::testing::ContainerRuntime::{self, Containerd16, Containerd17, Containerd21, CriO, Kwok, Old};
use crate::testing::ForwardFault;

/// What the server says until both streams of the pair 1 and 11 have ended, in its order.
async fn ends(session: &mut Session) -> Vec<&'static str> {
    let ended = |seen: &[Seen], stream| {
        seen.iter()
            .any(|frame| matches!(frame, Seen::Fin(id) | Seen::Reset(id, _) if *id == stream))
    };
    let seen = session.until(|seen| ended(seen, 1) && ended(seen, 11)).await;
    let name = |frame: &Seen| match frame {
        Seen::Fin(1) => "error FIN",
        Seen::Fin(11) => "data FIN",
        Seen::Reset(1, 5) => "error RST",
        Seen::Reset(11, 5) => "data RST",
        Seen::Data(1, _) => "text",
        other => panic!("unexpected {other:?}"),
    };
    seen.iter().map(name).collect()
}

/// A pair that is opened and meets its end at once.
async fn ends_with(runtime: ContainerRuntime, fault: Option<ForwardFault>) -> Vec<&'static str> {
    let scene = Scene::new().await;
    scene.cluster.set_runtime(runtime);
    scene.break_with(fault);
    let mut session = scene.spdy().await;
    session.pair(11, NOBODY, b"early").await;
    ends(&mut session).await
}

/// Waits for the text on the error stream `id`.
async fn told(session: &mut Session, id: u32) -> String {
    let is_told = |seen: &[Seen]| matches!(seen.last(), Some(Seen::Data(stream, _)) if *stream == id);
    match session.until(is_told).await.pop() {
        Some(Seen::Data(_, text)) => String::from_utf8_lossy(&text).into_owned(),
        _ => unreachable!(),
    }
}

#[tokio::test]
async fn a_refused_port_is_told_in_the_way_of_the_runtime() {
    for (runtime, expected) in [
        (Containerd16, &["data FIN", "text", "error FIN"]),
        (Containerd17, &["data FIN", "text", "error FIN"]),
        (Containerd21, &["data FIN", "text", "error RST"]),
        (Old, &["text", "error FIN", "data FIN"]),
        (CriO, &["text", "data RST", "error RST"]),
        (Kwok, &["data FIN", "text", "error RST"]),
    ] {
        assert_eq!(ends_with(runtime, None).await, expected, "{runtime:?}");
    }
}

#[tokio::test]
async fn a_reset_by_the_application_is_told_in_the_way_of_the_runtime() {
    for (runtime, expected) in [
        (Containerd16, &["data FIN", "text", "error FIN"][..]),
        (Containerd17, &["data FIN", "error RST"]),
        (Containerd21, &["text", "error RST", "data FIN"]),
        (Old, &["text", "error FIN", "data FIN"]),
        (CriO, &["text", "data RST", "error RST"]),
        (Kwok, &["data FIN", "text", "error RST"]),
    ] {
        let seen = ends_with(runtime, Some(ForwardFault::Reset)).await;
        assert_eq!(seen, expected, "{runtime:?}");
    }
}

#[tokio::test]
async fn a_real_reset_is_told_like_the_switched_one() {
    let scene = Scene::new().await;
    scene
        .application(80, |mut stream| async move {
            stream.read_u8().await.unwrap();
            // Unread bytes and no linger: the kernel sends RST.
            drop(stream);
        })
        .await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"many bytes of which one is read").await;
    let seen = session.until(|seen| seen.contains(&Seen::Fin(1))).await;
    let [Seen::Fin(11), Seen::Data(1, text), Seen::Fin(1)] = &seen[..] else {
        panic!("unexpected {seen:?}")
    };
    assert!(text.ends_with(b"read: connection reset by peer"), "{text:?}");
}

#[tokio::test]
async fn the_words_of_a_refusal_are_those_of_the_runtime() {
    for (runtime, words) in [
        (
            Containerd16,
            "failed to connect to localhost:81 inside namespace \"",
        ),
        (CriO, "port forward into network namespace \""),
        (Kwok, "failed to dial 127.0.0.1:81: "),
    ] {
        let scene = Scene::new().await;
        scene.cluster.set_runtime(runtime);
        let mut session = scene.spdy().await;
        session.pair(11, NOBODY, b"").await;
        let text = told(&mut session, 1).await;
        assert!(
            text.starts_with("error forwarding port 81 to pod ") && text.contains(words),
            "{text}"
        );
    }
}

async fn say_goodbye(mut stream: TcpStream) {
    stream.write_all(b"bye").await.unwrap();
}

#[tokio::test]
async fn an_application_that_closes_first_is_told_late_by_two_fins() {
    for runtime in [Containerd16, Containerd17, Containerd21, Old, CriO] {
        let scene = Scene::new().await;
        scene.cluster.set_runtime(runtime);
        scene.application(80, say_goodbye).await;
        let mut session = scene.spdy().await;
        let opened = Instant::now();
        session.pair(11, 80, b"").await;
        assert_eq!(session.next().await, Some(Seen::Data(11, "bye".into())));
        let mut seen = ends(&mut session).await;
        assert!(opened.elapsed() >= GRACE, "{:?}", opened.elapsed());
        seen.sort_unstable();
        assert_eq!(seen, ["data FIN", "error FIN"], "{runtime:?}");
    }
}

#[tokio::test]
async fn kwok_says_nothing_of_an_application_that_closes_first() {
    let scene = Scene::new().await;
    scene.cluster.set_runtime(Kwok);
    scene.application(80, say_goodbye).await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "bye".into())));
    let answer = tokio::time::timeout(2 * GRACE, session.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    session.send(fin(11)).await;
    assert_eq!(ends(&mut session).await.len(), 2);
}

/// Writes a byte now and then until the connection is gone.
async fn tick(mut stream: TcpStream) {
    while stream.write_all(b"x").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn data_goes_on_for_a_moment_after_the_client_s_fin() {
    let scene = Scene::new().await;
    scene.application(80, tick).await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    let said = Instant::now();
    session.send(fin(11)).await;
    let seen = session
        .until(|seen| seen.contains(&Seen::Fin(11)) && seen.contains(&Seen::Fin(1)))
        .await;
    assert!(said.elapsed() >= GRACE, "{:?}", said.elapsed());
    assert!(seen.contains(&Seen::Data(11, "x".into())));
}

#[tokio::test]
async fn data_goes_on_for_a_moment_after_the_client_s_reset_and_only_the_error_stream_ends() {
    let scene = Scene::new().await;
    scene.application(80, tick).await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    let said = Instant::now();
    session.send(reset(11)).await;
    let seen = session.until(|seen| seen.contains(&Seen::Fin(1))).await;
    assert!(said.elapsed() >= GRACE, "{:?}", said.elapsed());
    assert!(seen.len() > 3, "{seen:?}");
    // Nothing ends the data stream afterwards.
    session.send(super::client::ping(1)).await;
    assert_eq!(session.next().await, Some(Seen::Pong(1)));
}

#[tokio::test]
async fn early_data_for_a_refused_port_holds_its_worker_where_the_stream_is_not_reset() {
    for (runtime, stuck) in [
        (Containerd16, true),
        (Containerd17, true),
        (Containerd21, false),
        (Old, true),
        (CriO, false),
        (Kwok, false),
    ] {
        let scene = Scene::new().await;
        scene.cluster.set_runtime(runtime);
        let mut session = scene.spdy().await;
        session.pair(11, NOBODY, b"early").await;
        ends(&mut session).await;
        // What would end the stream waits behind the data.
        session.send([reset(11), fin(11)].concat()).await;
        let expected: &[u32] = if stuck { &[0, 2, 3, 4] } else { &[0, 1, 2, 3, 4] };
        let alive = session.workers_alive(1, usize::from(stuck)).await;
        assert_eq!(alive, expected, "{runtime:?}");
    }
}

#[tokio::test]
async fn a_refused_port_without_early_data_holds_nothing() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    session.pair(11, NOBODY, b"").await;
    ends(&mut session).await;
    session.send(fin(11)).await;
    assert_eq!(session.workers_alive(1, 0).await, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn of_the_data_after_both_fins_the_copier_takes_the_first_and_the_second_holds_the_worker() {
    for runtime in [Containerd16, Containerd17, Containerd21] {
        let scene = Scene::new().await;
        scene.cluster.set_runtime(runtime);
        scene.application(80, say_goodbye).await;
        let mut session = scene.spdy().await;
        session.pair(11, 80, b"").await;
        assert_eq!(session.next().await, Some(Seen::Data(11, "bye".into())));
        ends(&mut session).await;
        session.send(data(11, b"late")).await;
        assert_eq!(session.workers_alive(1, 0).await, [0, 1, 2, 3, 4], "{runtime:?}");
        session.send(data(11, b"too late")).await;
        assert_eq!(session.workers_alive(21, 1).await, [0, 2, 3, 4], "{runtime:?}");
    }
}

#[tokio::test]
async fn data_before_the_fins_of_a_closed_application_holds_nothing() {
    let scene = Scene::new().await;
    // The FINs do not come before the pongs, however busy the machine is.
    scene.cluster.faults().set_close_grace(DEADLINE);
    scene.application(80, say_goodbye).await;
    let mut session = scene.spdy().await;
    session.pair(11, 80, b"").await;
    assert_eq!(session.next().await, Some(Seen::Data(11, "bye".into())));
    session.send(data(11, b"in time")).await;
    assert_eq!(session.workers_alive(1, 0).await, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn payload_on_an_error_stream_holds_its_worker() {
    let scene = Scene::new().await;
    let mut session = scene.spdy().await;
    let mut opening = session
        .frames
        .open(1, false, &[("streamtype", "error"), ("port", "80")]);
    opening.extend_from_slice(&data(1, b"nobody reads this"));
    session.send(opening).await;
    assert_eq!(session.next().await, Some(Seen::Reply(1)));
    assert_eq!(session.workers_alive(1, 1).await, [0, 2, 3, 4]);
}

#[tokio::test]
async fn a_sandbox_that_is_gone_is_told_by_its_text() {
    let scene = Scene::new().await;
    let gone = "network namespace for sandbox \"abc\" is closed";
    scene.break_with(Some(ForwardFault::Runtime(gone.to_owned())));
    let mut session = scene.spdy().await;
    session.pair(11, ECHO, b"").await;
    assert_eq!(session.next().await, Some(Seen::Fin(11)));
    let Some(Seen::Data(1, text)) = session.next().await else {
        panic!("no text")
    };
    assert!(text.ends_with(gone.as_bytes()));
}

#[tokio::test]
async fn a_deleted_pod_ends_its_connections_late_and_is_told_to_newcomers_of_its_session() {
    for (runtime, words) in [
        (Containerd16, "network namespace for sandbox \""),
        (CriO, " is not running"),
    ] {
        let scene = Scene::new().await;
        scene.cluster.set_runtime(runtime);
        let mut session = scene.spdy().await;
        session.pair(11, ECHO, b"hello").await;
        assert_eq!(session.next().await, Some(Seen::Data(11, "hello".into())));
        let deleted = Instant::now();
        assert!(scene.cluster.delete_pod("shop", scene.pod()));
        let mut seen = ends(&mut session).await;
        assert!(deleted.elapsed() >= GRACE, "{:?}", deleted.elapsed());
        seen.sort_unstable();
        assert_eq!(seen, ["data FIN", "error FIN"], "{runtime:?}");

        session.pair(31, ECHO, b"").await;
        let text = told(&mut session, 21).await;
        assert!(text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn a_session_does_not_lead_to_the_pod_that_has_taken_the_name_of_its_own() {
    let scene = Scene::new().await;
    let mut old = scene.spdy().await;
    let mut pod = scene.cluster.get("Pod", "shop", scene.pod()).unwrap();
    pod["metadata"]["uid"] = "another".into();
    scene.cluster.apply(pod).unwrap();
    old.pair(11, ECHO, b"").await;
    assert_eq!(old.next().await, Some(Seen::Fin(11)));
    let mut new = scene.spdy().await;
    new.pair(11, ECHO, b"hello").await;
    assert_eq!(new.next().await, Some(Seen::Data(11, "hello".into())));
}
