//! What becomes of a whole session: signs of life, its end, and what its connections are told.

use super::*;

#[test]
fn an_abandoned_download_that_is_alone_ends_the_session() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    (0..40).for_each(|_| {
        scene.data(key, 32 << 10);
        scene.read(key);
    });
    scene.state.detach(key, scene.now);
    assert!(scene.state.ended().is_some());
}

#[test]
fn a_quiet_session_is_asked_for_a_sign_of_life_without_taking_a_workers_time() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.reply(key);
    scene.pass(Duration::from_secs(5));
    assert_eq!(scene.written(), [Wrote::Open(output::PROBE)]);
    let mut refused = Vec::new();
    frame::reset(&mut refused, output::PROBE, 1);
    scene.receive(&refused);
    scene.pass(Duration::from_secs(4));
    assert!(scene.state.ended().is_none());
}

#[test]
fn a_dead_session_is_noticed_within_fifteen_seconds_and_six_when_in_use() {
    type Act = fn(&mut Scene, usize);
    let cases: [(&str, Act, u64); 5] = [
        ("at rest", |_, _| {}, 15),
        ("a request", |scene, key| drop(scene.write(key, 10)), 6),
        (
            "a request that has arrived",
            |scene, key| {
                scene.write(key, 10);
                scene.written();
                scene.reply(key);
            },
            6,
        ),
        (
            "a download",
            |scene, key| {
                scene.data(key, 10);
                scene.read(key);
            },
            6,
        ),
        (
            "a connection that opens",
            |scene, _| {
                let opened = scene.open(80);
                scene.read(opened);
            },
            6,
        ),
    ];
    for (what, act, within) in cases {
        let mut scene = Scene::new();
        let key = scene.open(80);
        scene.read(key);
        scene.written();
        scene.reply(key);
        // Long after it was opened.
        scene.now += Duration::from_secs(60);
        scene.state.resumed(scene.now);
        act(&mut scene, key);
        scene.written();
        let begun = scene.now;
        while scene.state.ended().is_none() {
            let next = scene.state.deadline(scene.now);
            scene.now = next.max(scene.now + Duration::from_millis(1));
            scene.state.tick(scene.now);
            scene.written();
        }
        let taken = scene.now - begun;
        assert!(
            taken <= Duration::from_secs(within) + Duration::from_millis(50),
            "{what}: {taken:?}"
        );
        assert!(
            taken > Duration::from_secs(within / 2),
            "{what}: {taken:?} is hasty"
        );
    }
}

#[test]
fn what_had_not_left_when_the_session_broke_may_be_tried_again() {
    let mut scene = Scene::new();
    let (sent, unsent) = (scene.open(80), scene.open(80));
    scene.write(sent, 10);
    scene.written();
    scene.write(unsent, 10);
    scene.state.end("gone");
    assert_eq!(kind(scene.read(sent)), io::ErrorKind::ConnectionAborted);
    assert_eq!(kind(scene.read(unsent)), io::ErrorKind::NotConnected);
}

#[test]
fn a_retired_session_lasts_as_long_as_its_connections() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.state.retire();
    assert!(!scene.state.is_done());
    scene.state.detach(key, scene.now);
    assert!(scene.state.is_done());
}

/// Asserts that a session takes newcomers no more, and goes on for a connection that it has.
fn assert_worn(scene: &mut Scene, kept: usize) {
    let load = scene.state.load(scene.now);
    assert!(load.worn && !load.open, "{load:?}");
    assert_eq!(load.live, 1);
    scene.data(kept, 10);
    assert_eq!(scene.read(kept).unwrap().unwrap(), 10);
    assert_eq!(scene.write(kept, 10).unwrap().unwrap(), 10);
    assert_eq!(scene.written(), [Wrote::Data(scene.id(kept), 10)]);
}

#[test]
fn a_session_takes_so_many_connections_and_no_more() {
    let mut scene = Scene::new();
    let kept = scene.open(80);
    scene.read(kept);
    scene.written();
    scene.reply(kept);
    for opened in 1..MAX_OPENED {
        assert!(scene.is_open(), "after {opened}");
        let key = scene.open(80);
        scene.state.detach(key, scene.now);
    }
    assert_worn(&mut scene, kept);
}

#[test]
fn a_session_takes_connections_for_so_long_and_no_longer() {
    let mut scene = Scene::new();
    let kept = scene.open(80);
    scene.read(kept);
    scene.written();
    scene.reply(kept);
    let moment = Duration::from_millis(1);
    scene.now += MAX_AGE - moment;
    assert!(scene.is_open());
    scene.now += moment;
    assert_worn(&mut scene, kept);
}

#[test]
fn a_sandbox_that_has_ended_takes_its_session_along() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.end(key, "network namespace for sandbox \"1f\" is closed");
    assert!(scene.state.load(scene.now).worn);
}

#[test]
fn a_machine_that_slept_asks_before_it_gives_a_session_up() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    scene.reply(key);
    scene.state.deadline(scene.now);
    scene.now += Duration::from_secs(3600);
    scene.state.tick(scene.now);
    assert!(scene.state.ended().is_none());
    assert_eq!(scene.written(), [Wrote::Open(output::PROBE)]);
    scene.pass(Duration::from_secs(11));
    assert!(scene.state.ended().is_some(), "nobody has answered");
}
