//! Ends: which are believed, and what becomes of connections when their session ends.

use super::*;
use crate::k8s::portforward::liveness::LINGER;

#[test]
fn a_connection_that_comes_as_the_session_ends_fails_and_may_be_tried_again() {
    let mut scene = Scene::new();
    scene.state.end("gone");
    let key = scene.open(80);
    assert_eq!(kind(scene.read(key)), io::ErrorKind::NotConnected);
    assert_eq!(kind(scene.write(key, 1)), io::ErrorKind::NotConnected);
    scene.state.detach(key, scene.now);
    assert!(scene.state.connections.is_empty());
}

#[test]
fn a_connection_that_is_not_opened_before_the_server_says_goodbye_may_be_tried_again() {
    let mut scene = Scene::new();
    let (opened, late) = (scene.open(80), scene.open(80));
    scene.read(opened);
    scene.written();
    let mut goodbye = Vec::new();
    frame::go_away(&mut goodbye);
    scene.receive(&goodbye);
    assert_eq!(kind(scene.write(late, 1)), io::ErrorKind::NotConnected);
    assert_eq!(scene.written(), [], "the server would not answer it");
    assert!(scene.read(opened).is_none());
    let later = scene.open(80);
    assert_eq!(kind(scene.read(later)), io::ErrorKind::NotConnected);
}

#[test]
fn what_the_pod_had_ended_in_order_stays_so_when_the_session_ends() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.data(key, 5);
    scene.end(key, "");
    scene.state.end("gone");
    assert_eq!(scene.read(key).unwrap().unwrap(), 5);
    assert_eq!(scene.read(key).unwrap().unwrap(), 0, "an orderly end");
}

#[test]
fn a_refusal_stays_one_when_the_session_ends() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.end(key, REFUSED);
    scene.state.end("gone");
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionRefused);
}

/// A connection whose data the pod has ended, with no word yet of how.
fn half_ended() -> (Scene, usize) {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.reply(key);
    let mut half = Vec::new();
    frame::fin(&mut half, scene.id(key));
    scene.receive(&half);
    (scene, key)
}

#[test]
fn half_an_end_is_not_believed_while_the_server_is_silent() {
    let (mut scene, key) = half_ended();
    let begun = scene.now;
    while scene.state.ended().is_none() {
        assert!(scene.read(key).is_none(), "after {:?}", scene.now - begun);
        scene.pass(Duration::from_millis(20));
        scene.written();
        assert!(
            scene.now - begun < Duration::from_secs(10),
            "the silence is not noticed"
        );
    }
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
}

#[test]
fn half_an_end_is_believed_when_the_server_answers_and_the_rest_does_not_come() {
    let (mut scene, key) = half_ended();
    let begun = scene.now;
    while scene.read(key).is_none() {
        scene.pass(Duration::from_millis(20));
        for frame in scene.answer_pings_but(None) {
            if frame == Wrote::Open(output::PROBE) {
                let mut refused = Vec::new();
                frame::reset(&mut refused, output::PROBE, 1);
                scene.receive(&refused);
            }
        }
        assert!(scene.now - begun < Duration::from_secs(4));
    }
    assert_eq!(scene.read(key).unwrap().unwrap(), 0);
}

#[test]
fn an_end_without_an_end_of_the_data_is_none() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.data(key, 5);
    let mut half = Vec::new();
    frame::fin(&mut half, scene.id(key) - output::PAIR);
    scene.receive(&half);
    assert_eq!(scene.read(key).unwrap().unwrap(), 5);
    for _ in 0..200 {
        scene.pass(Duration::from_millis(20));
        scene.answer_pings();
        scene.receive(&[]);
    }
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
}

#[test]
fn an_end_before_the_opening_is_not_forgotten() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.state.shutdown(key, scene.now);
    assert_eq!(kind(scene.write(key, 1)), io::ErrorKind::BrokenPipe);
    assert!(scene.read(key).is_none());
    let written = scene.written();
    assert!(written.contains(&Wrote::Fin(scene.id(key))), "{written:?}");
}

#[test]
fn an_end_is_held_back_for_so_long_from_when_the_application_could_have_read_everything() {
    for delay in [Duration::ZERO, Duration::from_secs(45)] {
        let mut scene = Scene::new();
        let begun = scene.now;
        let key = scene.open(80);
        scene.write(key, 1 << 20);
        scene.written();
        scene.reply(key);
        scene.state.shutdown(key, scene.now);
        let (mut asked, mut has_ended) = (Vec::new(), false);
        while !has_ended {
            scene.pass(Duration::from_millis(20));
            assert!(scene.now - begun < delay + 2 * LINGER, "never");
            for frame in scene.written() {
                match frame {
                    Wrote::Ping(id) => asked.push(id),
                    Wrote::Open(probe) => {
                        let mut refused = Vec::new();
                        frame::reset(&mut refused, probe, 1);
                        scene.receive(&refused);
                    }
                    frame => has_ended |= frame == Wrote::Fin(scene.id(key)),
                }
            }
            // Its worker is as slow as the application.
            let (worker, has_read) = (scene.id(key) % 5, scene.now - begun >= delay);
            for id in asked.extract_if(.., |id| has_read || *id / 2 % 5 != worker) {
                let mut pong = Vec::new();
                frame::ping(&mut pong, id);
                scene.receive(&pong);
            }
        }
        let least = delay + LINGER;
        let most = least + Duration::from_secs(2);
        let elapsed = scene.now - begun;
        assert!((least..most).contains(&elapsed), "{elapsed:?}");
    }
}

#[test]
fn a_connection_that_finds_no_place_fails_and_may_be_tried_again() {
    let mut scene = Scene::new();
    let late = scene.open(80);
    (0..5).for_each(|class| scene.state.workers.suspect(class));
    assert!(scene.write(late, 1).is_none());
    for _ in 0..200 {
        scene.written();
        scene.pass(Duration::from_millis(20));
    }
    assert_eq!(kind(scene.write(late, 1)), io::ErrorKind::NotConnected);
    assert!(!scene.is_open());
    scene.answer_pings();
    assert!(
        !scene
            .written()
            .iter()
            .any(|frame| matches!(frame, Wrote::Open(id) if *id != output::PROBE)),
        "it is opened all the same"
    );
}

#[test]
fn what_follows_an_end_is_not_read() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 1);
    scene.reply(key);
    scene.end(key, "");
    assert_eq!(scene.read(key).unwrap().unwrap(), 0);
    scene.data(key, 10);
    scene.end(key, REFUSED);
    assert_eq!(scene.read(key).unwrap().unwrap(), 0);
}

#[test]
fn what_comes_after_an_end_was_believed_is_not_read() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 1);
    scene.reply(key);
    let mut end = Vec::new();
    frame::fin(&mut end, scene.id(key) - output::PAIR);
    scene.receive(&end);
    // A sign of life, without an end of the data.
    scene.pass(Duration::from_secs(3));
    scene.answer_pings();
    let mut reset = Vec::new();
    frame::reset(&mut reset, output::PROBE, 1);
    scene.receive(&reset);
    scene.pass(Duration::from_secs(1));
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
    scene.data(key, 10);
    assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
}
