//! Who is woken, and when.

use super::*;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

/// Counts how often a task would have run.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_writer_that_was_held_back_goes_on_when_the_pod_speaks_first() {
    let mut scene = Scene::new();
    scene.ports.note(80, Behaviour::Refuses, scene.now);
    let key = scene.open(80);
    let woken = Arc::new(Count::default());
    let waker = Waker::from(woken.clone());
    let parts = [io::IoSlice::new(b"hello")];
    let mut cx = Context::from_waker(&waker);
    assert!(
        scene
            .state
            .poll_write(key, &parts, scene.now, &mut cx)
            .is_pending()
    );
    scene.written();
    scene.state.woken().into_iter().for_each(Waker::wake);
    assert!(
        scene
            .state
            .poll_write(key, &parts, scene.now, &mut cx)
            .is_pending()
    );
    let before = woken.0.load(Ordering::SeqCst);
    scene.reply(key);
    scene.data(key, 1);
    scene.pass(Duration::from_millis(25));
    scene.state.woken().into_iter().for_each(Waker::wake);
    assert!(woken.0.load(Ordering::SeqCst) > before, "nobody tells the writer");
}

#[test]
fn a_reader_that_catches_up_during_a_turn_has_the_session_read_again() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.data(key, SlowReaders::default().alone());
    scene.state.begin_turn();
    assert!(!scene.state.is_reading());
    while scene.read(key).is_some() {}
    let cx = Context::from_waker(Waker::noop());
    assert_eq!(
        scene.state.end_turn(true, scene.now, &cx),
        Turn::More,
        "the connection is not read, and nothing would wake its task"
    );
    assert!(scene.state.is_reading());
    assert_eq!(scene.state.end_turn(true, scene.now, &cx), Turn::Wait);
}

#[test]
fn keys_that_are_used_again_do_not_pile_up_among_those_that_wait_for_a_time() {
    let mut scene = Scene::new();
    for _ in 0..100 {
        let key = scene.open(80);
        scene.read(key);
        scene.written();
        scene.end(key, "");
        scene.state.detach(key, scene.now);
        scene.answer_pings();
        assert!(scene.state.connections.is_empty());
    }
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.pass(Duration::from_millis(20));
    assert_eq!(scene.state.timed, [key]);
}
