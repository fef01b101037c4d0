//! What one connection may take from its neighbours: time, memory, workers.

use super::*;

use crate::k8s::portforward::spdy::workers::WORKERS;

/// A session with so many connections that the peer has taken.
fn shared(count: usize) -> (Scene, Vec<usize>) {
    let mut scene = Scene::new();
    let keys: Vec<usize> = (0..count).map(|_| scene.open(80)).collect();
    for &key in &keys {
        scene.read(key);
        scene.written();
        scene.reply(key);
    }
    (scene, keys)
}

impl Scene {
    /// The pod sends as much as the session reads.
    fn fill(&mut self, key: usize) {
        while self.state.is_reading() {
            self.data(key, 64 << 10);
        }
    }
}

#[test]
fn a_reader_that_goes_on_slowly_gives_way_to_a_neighbour_that_waits() {
    let (mut scene, keys) = shared(2);
    let (slow, other) = (keys[0], keys[1]);
    scene.write(other, 10);
    let begun = scene.now;
    let failed = loop {
        scene.fill(slow);
        // Some 80 KiB/s.
        scene.pass(Duration::from_millis(200));
        if let Some(Err(error)) = scene.read(slow) {
            break error;
        }
        assert!(scene.now - begun < Duration::from_secs(10), "held up for ever");
    };
    assert_eq!(failed.kind(), io::ErrorKind::ConnectionAborted);
    assert!(scene.now - begun >= Duration::from_secs(5));
    assert!(scene.state.is_reading());
    assert!(scene.read(other).is_none());
}

#[test]
fn a_reader_that_stalls_is_in_its_neighbours_way_until_it_goes_on() {
    let (mut scene, keys) = shared(2);
    let (stalled, other) = (keys[0], keys[1]);
    scene.data(stalled, 512 << 10);
    assert!(
        !scene.state.is_in_the_way_of(other, scene.now),
        "it is about to be read"
    );
    scene.pass(Duration::from_millis(200));
    assert!(scene.state.is_in_the_way_of(other, scene.now));
    scene.fill(stalled);
    // It has long moved nothing, and looks like no transfer.
    scene.pass(Duration::from_secs(4));
    assert!(!scene.state.is_reading() && !scene.state.is_transfer(scene.now));
    assert!(scene.state.is_in_the_way_of(other, scene.now));
    assert!(!scene.state.is_in_the_way_of(stalled, scene.now));
    while scene.read(stalled).is_some() {}
    scene.pass(Duration::from_secs(2));
    assert!(!scene.state.is_in_the_way_of(other, scene.now));
}

#[test]
fn readers_that_pause_together_hold_up_nobody() {
    let (mut scene, keys) = shared(3);
    while scene.state.is_reading() {
        keys.iter().for_each(|&key| scene.data(key, 64 << 10));
    }
    scene.pass(Duration::from_mins(10));
    assert!(!scene.state.is_reading());
    // One goes on, and finds the others in its way.
    while scene.read(keys[0]).is_some_and(|read| read.is_ok()) {}
    scene.pass(Duration::from_secs(6));
    assert!(scene.state.is_reading());
    for &key in &keys[1..] {
        assert_eq!(last(&mut scene, key), io::ErrorKind::ConnectionAborted);
    }
    assert!(scene.read(keys[0]).is_none());
}

/// Reads what is left of a connection that failed.
fn last(scene: &mut Scene, key: usize) -> io::ErrorKind {
    loop {
        match scene.read(key) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return error.kind(),
            None => panic!("it has not failed"),
        }
    }
}

#[test]
fn a_slow_reader_that_is_alone_is_never_cut_however_little_may_wait() {
    let mut scene = Scene::with(SlowReaders {
        bytes: 1 << 20,
        timeout: Duration::from_secs(5),
    });
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.reply(key);
    for _ in 0..2 {
        let (mut sent, mut got) = (0, 0);
        while scene.state.is_reading() {
            scene.data(key, 16 << 10);
            sent += 16 << 10;
        }
        scene.pass(Duration::from_mins(10));
        while let Some(read) = scene.read(key) {
            got += read.unwrap();
        }
        assert_eq!(got, sent);
    }
}

#[test]
fn how_much_and_how_long_slow_readers_are_borne_is_a_setting() {
    let mut scene = Scene::with(SlowReaders {
        bytes: 64 << 20,
        timeout: Duration::from_secs(2),
    });
    let (slow, other) = (scene.open(80), scene.open(80));
    for key in [slow, other] {
        scene.read(key);
        scene.written();
        scene.reply(key);
    }
    scene.write(other, 10);
    let mut kept = 0;
    while scene.state.is_reading() {
        scene.data(slow, 64 << 10);
        kept += 64 << 10;
    }
    assert_eq!(kept, 16 << 20, "a quarter for one");
    scene.pass(Duration::from_millis(2200));
    assert_eq!(kind(scene.read(slow)), io::ErrorKind::ConnectionAborted);
    assert!(scene.state.is_reading());
}

#[test]
fn a_reader_that_goes_on_slowly_is_let_be_while_its_neighbours_get_their_answers() {
    let (mut scene, keys) = shared(2);
    let (slow, other) = (keys[0], keys[1]);
    for _ in 0..200 {
        scene.write(other, 10);
        scene.written();
        scene.fill(slow);
        while !scene.state.is_reading() {
            scene.pass(Duration::from_millis(10));
            scene.read(slow).unwrap().unwrap();
        }
        scene.data(other, 10);
        scene.read(other).unwrap().unwrap();
    }
}

#[test]
fn a_reader_that_goes_on_slowly_is_let_be_for_longer_when_nobody_is_known_to_wait() {
    let (mut scene, keys) = shared(2);
    let begun = scene.now;
    loop {
        scene.fill(keys[0]);
        scene.pass(Duration::from_millis(200));
        if let Some(Err(_)) = scene.read(keys[0]) {
            break;
        }
        assert!(scene.now - begun < Duration::from_secs(40), "held up for ever");
    }
    assert!(scene.now - begun >= Duration::from_secs(20));
}

#[test]
fn the_time_in_which_a_slow_reader_had_no_neighbours_is_not_held_against_it() {
    let (mut scene, keys) = shared(1);
    let slow = keys[0];
    let go_on = |scene: &mut Scene, time: Duration| {
        let begun = scene.now;
        while scene.now - begun < time {
            scene.fill(slow);
            scene.pass(Duration::from_millis(200));
            scene.read(slow).unwrap().unwrap();
        }
    };
    go_on(&mut scene, Duration::from_mins(2));
    let other = scene.open(80);
    scene.read(other);
    go_on(&mut scene, Duration::from_secs(4));
}

#[test]
fn what_many_stalled_readers_keep_is_bounded_and_all_of_them_give_way_at_once() {
    let (mut scene, mut keys) = shared(101);
    let lively = keys.pop().unwrap();
    let mut round = keys.iter().cycle();
    while scene.state.is_reading() {
        scene.data(*round.next().unwrap(), 64 << 10);
    }
    let kept: usize = keys
        .iter()
        .map(|&key| scene.state.connections[key].received.len())
        .sum();
    assert_eq!(kept, scene.state.backlog);
    assert!((8 << 20..=17 << 20).contains(&kept), "{kept} bytes");
    scene.pass(Duration::from_secs(6));
    assert_eq!(scene.state.backlog, 0);
    for &key in &keys {
        assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
    }
    assert!(scene.state.is_reading());
    assert!(scene.read(lively).is_none());
}

/// Leaves a worker with a frame that nobody takes, and its connections gone.
fn poison(scene: &mut Scene, class: usize) {
    let stuck = u32::try_from(class).unwrap();
    scene.state.workers.suspect(class);
    scene.answer_pings_but(Some(stuck));
    scene.now += Duration::from_secs(1);
}

#[test]
fn newcomers_avoid_a_lost_worker_and_a_session_that_has_lost_two_is_replaced() {
    let (mut scene, _) = shared(0);
    poison(&mut scene, 3);
    assert!(scene.is_open(), "the others are as good as ever");
    for _ in 0..2 * WORKERS {
        let key = scene.open(80);
        scene.read(key);
        scene.written();
        assert_ne!(scene.id(key) % 5, 3);
        scene.data(key, 1);
        scene.state.detach(key, scene.now);
    }
    assert!(!scene.state.load(scene.now).worn);
    scene.state.workers.suspect(1);
    for frame in scene.written() {
        if let Wrote::Ping(id) = frame
            && ![1, 3].contains(&(id / 2 % 5))
        {
            let mut pong = Vec::new();
            frame::ping(&mut pong, id);
            scene.receive(&pong);
        }
    }
    scene.now += Duration::from_secs(1);
    assert!(scene.state.load(scene.now).worn);
}

#[test]
fn a_lost_worker_that_leaves_no_room_for_questions_has_its_session_replaced() {
    let (mut scene, _) = shared(0);
    for _ in 0..60 {
        poison(&mut scene, 3);
        scene.state.workers.suspect(0);
    }
    assert!(scene.state.load(scene.now).worn);
}

#[test]
fn a_newcomer_avoids_the_worker_that_a_stalled_upload_fills() {
    let (mut scene, keys) = shared(WORKERS);
    let stalled = scene.id(keys[0]) % 5;
    scene.flood(keys[0]);
    // The other workers have two connections each, this one has one.
    for _ in 1..WORKERS {
        let key = scene.open(80);
        scene.read(key);
        scene.written();
        assert_ne!(scene.id(key) % 5, stalled);
    }
    let last = scene.open(80);
    scene.read(last);
    scene.written();
    assert_ne!(scene.id(last) % 5, stalled);
}

#[test]
fn an_opening_that_waits_in_a_slow_uplink_is_not_given_up() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.write(key, 10);
    scene.written();
    for _ in 0..100 {
        // The server takes bytes all the time, and answers what came before.
        scene.state.taken(scene.now);
        scene.receive(&[]);
        scene.pass(Duration::from_millis(100));
        scene.written();
    }
    assert!(scene.read(key).is_none());
    assert!(!scene.state.load(scene.now).worn);
}

/// Lets time pass on a session of which only the loop still answers that feeds the workers.
fn answer_from_the_loop(scene: &mut Scene, time: Duration) {
    let end = scene.now + time;
    while scene.now < end {
        scene.pass(Duration::from_millis(100));
        for frame in scene.written() {
            if frame == Wrote::Open(output::PROBE) {
                let mut refused = Vec::new();
                frame::reset(&mut refused, output::PROBE, 1);
                scene.receive(&refused);
            }
        }
    }
}

#[test]
fn an_opening_that_a_lost_worker_has_is_given_up_though_the_others_were_asked_at_the_same_moment() {
    let mut scene = Scene::new();
    scene.answer_pings();
    let key = scene.open(80);
    scene.write(key, 10);
    let lost = scene.id(key) % 5;
    scene.state.workers.suspect(lost as usize);
    scene.answer_pings_but(Some(lost));
    answer_from_the_loop(&mut scene, Duration::from_secs(4));
    assert_eq!(kind(scene.read(key)), io::ErrorKind::TimedOut);
}

#[test]
fn what_all_workers_have_lost_at_the_same_time_is_given_up() {
    let (mut scene, keys) = shared(WORKERS);
    scene.answer_pings();
    for &key in &keys {
        scene.write(key, 10);
    }
    let opened = scene.open(80);
    scene.write(opened, 10);
    scene.written();
    answer_from_the_loop(&mut scene, Duration::from_secs(8));
    for &key in &keys {
        assert_eq!(kind(scene.read(key)), io::ErrorKind::ConnectionAborted);
    }
    assert_eq!(kind(scene.read(opened)), io::ErrorKind::TimedOut);
    assert!(scene.state.load(scene.now).worn);
}

#[tokio::test(start_paused = true)]
async fn a_transfer_does_not_stand_back_while_a_neighbour_waits_for_an_answer() {
    let mut scene = Scene::new();
    let (transfer, neighbour) = (scene.open(80), scene.open(80));
    for key in [transfer, neighbour] {
        scene.write(key, 1);
        scene.written();
        scene.reply(key);
    }
    for _ in 0..=TRANSFER / (64 << 10) {
        scene.data(transfer, 64 << 10);
        while matches!(scene.read(transfer), Some(Ok(1..))) {}
    }
    let cx = Context::from_waker(Waker::noop());
    scene.now += 2 * BULK_SPAN;
    assert!(!scene.state.stand_back(scene.now, &cx));
    scene.data(neighbour, 1);
    scene.now += 2 * BULK_SPAN;
    assert!(scene.state.stand_back(scene.now, &cx), "it has had its answer");
}

#[test]
fn a_session_is_unused_from_the_last_payload_on() {
    let mut scene = Scene::new();
    let key = scene.open(80);
    scene.read(key);
    scene.written();
    scene.now += Duration::from_secs(60);
    scene.data(key, 1);
    let used_at = scene.now;
    // Whoever kept the connection for another request has waited for as long already.
    scene.now += Duration::from_secs(60);
    scene.state.detach(key, scene.now);
    assert_eq!(scene.state.load(scene.now).active_at, used_at);
}

#[test]
fn a_goodbye_is_no_use_of_a_session() {
    let cases = [(17, false, false), (17, true, true), (64 << 10, false, true)];
    for ((sent, answered, is_use), pause) in cases
        .into_iter()
        .flat_map(|case| [(case, Duration::ZERO), (case, 5 * SILENCE)])
    {
        let (mut scene, keys) = shared(2);
        scene.pass(Duration::from_millis(20));
        let used_at = scene.state.load(scene.now).active_at;
        scene.now += Duration::from_secs(600);
        let mut last_at = scene.now;
        for &key in &keys {
            last_at = scene.now;
            scene.write(key, sent).unwrap().unwrap();
            if answered {
                scene.data(key, 1);
            }
            scene.state.shutdown(key, scene.now);
            scene.state.detach(key, scene.now);
            scene.now += pause;
        }
        let active_at = scene.state.load(scene.now).active_at;
        assert_eq!(
            active_at,
            if is_use { last_at } else { used_at },
            "{sent} {answered}"
        );
    }
}

#[test]
fn small_writes_leave_in_one_frame_that_counts_as_one() {
    let (mut scene, keys) = shared(2);
    let (first, other) = (keys[0], keys[1]);
    for _ in 0..64 {
        assert_eq!(scene.write(first, 1 << 10).unwrap().unwrap(), 1 << 10);
    }
    assert!(scene.write(first, 1).is_none(), "a batch is not for one alone");
    scene.write(other, 1).unwrap().unwrap();
    let (id, other) = (scene.id(first), scene.id(other));
    assert_eq!(
        scene.written(),
        [Wrote::Data(id, 64 << 10), Wrote::Data(other, 1)]
    );
    scene.write(first, 1).unwrap().unwrap();
    assert_eq!(
        scene.written(),
        [Wrote::Data(id, 1)],
        "what has left does not grow"
    );
}
