use std::future::poll_fn;

use futures_util::FutureExt as _;
use tokio_util::task::TaskTracker;

use super::*;

const PIECE: usize = 64 << 10;

/// So many transfers, of which each wants to go on at any moment.
fn busy(at_once: usize, count: usize) -> Vec<Transfer> {
    busy_at(true, at_once, count)
}

/// The same where the way is short, or may be long.
fn busy_at(near: bool, at_once: usize, count: usize) -> Vec<Transfer> {
    let turns = Arc::new(Turns::new(at_once));
    let mut transfers: Vec<Transfer> = (0..count).map(|_| Transfer::new(turns.clone())).collect();
    if near {
        transfers[0].note_near();
    }
    // The first is fast, which makes the others wait once they have moved anything.
    transfers[0].moved(BUSY as usize, Instant::now());
    for transfer in &mut transfers {
        transfer.moved(PIECE, Instant::now());
    }
    transfers
}

/// Moves pieces until it has to wait. Returns how much that was.
fn run(transfer: &mut Transfer, most: u64) -> u64 {
    let mut moved = 0;
    while !transfer.waits() && moved < most {
        transfer.moved(PIECE, Instant::now());
        moved += PIECE as u64;
    }
    moved
}

fn has_turn(transfer: &mut Transfer) -> bool {
    poll_fn(|cx| transfer.poll_turn(cx)).now_or_never().is_some()
}

#[tokio::test(start_paused = true)]
async fn they_go_on_one_after_the_other_and_all_get_the_same() {
    for count in [2, 3] {
        let mut transfers = busy(1, count);
        // It was there before the others.
        assert_eq!(run(&mut transfers[0], 2 * TURN), TURN - PIECE as u64);
        for index in (1..count).chain(0..count) {
            let having: Vec<bool> = transfers.iter_mut().map(has_turn).collect();
            let wanted: Vec<bool> = (0..count).map(|other| other == index).collect();
            assert_eq!(having, wanted);
            assert_eq!(run(&mut transfers[index], 2 * TURN), TURN);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn as_many_as_may_go_on_at_a_time_never_wait() {
    for (at_once, count) in [(1, 1), (2, 1), (2, 2)] {
        let mut transfers = busy(at_once, count);
        for transfer in &mut transfers {
            assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_slow_for_other_reasons_never_waits() {
    let turns = Arc::new(Turns::default());
    let mut transfers: Vec<Transfer> = (0..4).map(|_| Transfer::new(turns.clone())).collect();
    transfers[0].note_near();
    let piece = (BUSY / 8) as usize;
    for _ in 0..100 {
        for transfer in &mut transfers {
            transfer.moved(piece, Instant::now());
            assert!(!transfer.waits());
        }
        tokio::time::advance(SPAN).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_slow_beside_a_fast_one_neither_waits_nor_is_waited_for() {
    let mut transfers = busy(1, 2);
    run(&mut transfers[0], 2 * TURN);
    assert!(has_turn(&mut transfers[1]));
    let (begun, pause) = (Instant::now(), GAP / 2);
    while !has_turn(&mut transfers[0]) {
        transfers[1].moved(PIECE, Instant::now());
        tokio::time::advance(pause).await;
    }
    assert!((JUDGED..JUDGED + 2 * pause).contains(&begun.elapsed()));
    for _ in 0..3 * SPAN.as_millis() / pause.as_millis() {
        transfers[1].moved(PIECE, Instant::now());
        assert!(!transfers[1].waits());
        assert_eq!(run(&mut transfers[0], 2 * PIECE as u64), 2 * PIECE as u64);
        transfers[0].moved(BUSY as usize / 50, Instant::now());
        assert!(!transfers[0].waits(), "as if it were alone");
        tokio::time::advance(pause).await;
    }
    // It may be slow because of others that are.
    tokio::time::advance(SLOW - 4 * SPAN).await;
    transfers[0].moved(BUSY as usize, Instant::now());
    transfers[1].moved(PIECE, Instant::now());
    assert!(!transfers[1].waits());
    tokio::time::advance(SPAN).await;
    transfers[0].moved(BUSY as usize, Instant::now());
    transfers[1].moved(PIECE, Instant::now());
    assert!(transfers[1].waits());
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_slow_takes_part_again() {
    let mut transfers = busy(1, 2);
    run(&mut transfers[0], 2 * TURN);
    assert!(has_turn(&mut transfers[1]));
    while !has_turn(&mut transfers[0]) {
        transfers[1].moved(PIECE, Instant::now());
        tokio::time::advance(GAP / 2).await;
    }
    tokio::time::advance(SPAN).await;
    transfers[0].moved(BUSY as usize, Instant::now());
    transfers[1].moved(2 * LITTLE as usize, Instant::now());
    assert!(transfers[1].waits());
}

#[tokio::test(start_paused = true)]
async fn what_has_something_now_and_then_soon_keeps_nobody_waiting() {
    let mut transfers = busy(1, 2);
    let mut waited = Vec::new();
    for event in 0..100 {
        if event > 0 {
            transfers[1].moved(PIECE, Instant::now());
        }
        transfers[0].moved(TURN as usize, Instant::now());
        if transfers[0].waits() {
            waited.push(event);
            assert!(has_turn(&mut transfers[1]), "which has nothing more");
            tokio::time::advance(GAP).await;
            assert!(has_turn(&mut transfers[0]));
        }
        tokio::time::advance(3 * GAP).await;
    }
    assert_eq!(waited, [0, 1, 2, 3], "then it had had its turn for long enough");
    assert!(!transfers[1].waits());
}

#[tokio::test(start_paused = true)]
async fn where_several_go_on_at_a_time_each_may_be_so_much_slower() {
    let pause = GAP / 2;
    let rate = |at_once: u64| (LITTLE / at_once) as f64 * pause.div_duration_f64(SPAN);
    for at_once in [1, 4] {
        let mut transfers = busy(at_once as usize, at_once as usize + 1);
        let (begun, waits) = (Instant::now(), at_once as usize);
        while begun.elapsed() < 2 * JUDGED {
            for transfer in &mut transfers[..waits] {
                transfer.moved((1.1 * rate(at_once)) as usize, Instant::now());
            }
            tokio::time::advance(pause).await;
        }
        assert!(!has_turn(&mut transfers[waits]), "{at_once}: none is slow");
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_way_is_long_nobody_waits() {
    for transfer in &mut busy_at(false, 1, 4) {
        assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
    }
    // It was short for one that has gone.
    let mut transfers = busy(1, 5);
    drop(transfers.remove(0));
    for transfer in &mut transfers {
        assert!(has_turn(transfer));
        assert_eq!(run(transfer, 4 * TURN), 4 * TURN);
    }
}

#[tokio::test(start_paused = true)]
async fn turns_end_with_the_rush_that_made_them_necessary() {
    let mut transfers = busy(1, 3);
    tokio::time::advance(2 * SPAN).await;
    transfers[0].moved(PIECE, Instant::now());
    for transfer in &mut transfers {
        assert!(has_turn(transfer));
        assert_eq!(run(transfer, BUSY / 4), BUSY / 4);
    }
}

#[tokio::test(start_paused = true)]
async fn those_that_have_nothing_to_move_lose_their_turns_and_the_next_are_told() {
    let mut transfers = busy(1, 4);
    let tracker = TaskTracker::new();
    let waiting: Vec<_> = transfers
        .split_off(1)
        .into_iter()
        .map(|mut transfer| {
            tracker.spawn(async move {
                let begun = Instant::now();
                poll_fn(|cx| transfer.poll_turn(cx)).await;
                // Nothing comes for it either; it stays.
                (begun.elapsed(), transfer)
            })
        })
        .collect();
    for (gaps, waiting) in (1..).zip(waiting) {
        let (elapsed, transfer) = waiting.await.unwrap();
        let least = gaps * GAP;
        assert!((least..least + GAP / 2).contains(&elapsed), "{gaps}: {elapsed:?}");
        transfers.push(transfer);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_goes_away_hands_its_turn_on() {
    let mut transfers = busy(1, 2);
    let next = transfers.swap_remove(1);
    let mut waiting = TaskTracker::new().spawn(async move {
        let mut next = next;
        poll_fn(|cx| next.poll_turn(cx)).await;
    });
    tokio::task::yield_now().await;
    assert!((&mut waiting).now_or_never().is_none());
    let begun = Instant::now();
    drop(transfers.swap_remove(0));
    waiting.await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO);
}
