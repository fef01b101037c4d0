//! Ends: which are believed, and what becomes of connections when their session ends.

use super::*;

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
