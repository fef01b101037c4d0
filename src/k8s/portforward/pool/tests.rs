use super::*;
use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use kube::client::{Body, Client};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::drain::Drained;
use crate::k8s::portforward::memory::Memory;
use crate::k8s::portforward::ports::Size;
use crate::k8s::portforward::spdy::{MAX_AGE, MAX_OPENED};
use crate::k8s::portforward::turns::Turns;
use crate::k8s::portforward::{Carriers, SlowReaders};

const LONG: Duration = Duration::from_secs(60);

/// A pool before an API server that never answers.
fn pool(drain: &Drain) -> Arc<Pool> {
    let silent =
        tower::service_fn(|_: Request<Body>| pending::<Result<Response<Empty<Bytes>>, Infallible>>());
    let client = Client::new(silent, "default");
    let dialer = Dialer::new(
        client,
        Memory::new(Carriers::Auto),
        LONG,
        SlowReaders::default(),
        Turns::default(),
        drain.clone(),
    );
    let pod = PodRef {
        namespace: "default".into(),
        name: "web-1".into(),
        uid: "u".into(),
    };
    Arc::new(Pool::new(pod, Arc::new(dialer), drain.clone()))
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_was_given_up_sends_connections_to_another() {
    let pool = pool(&Drain::new());
    assert!(!pool.expire(Duration::ZERO, Instant::now()), "it is not used");
    let connected = tokio::time::timeout(LONG, pool.connect(80)).await;
    assert!(matches!(connected, Ok(Ok(Way::Closed))), "{connected:?}");
    assert_eq!(pool.lock().dialing, 0, "nobody would close the session");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_waits_keeps_its_pool() {
    let pool = pool(&Drain::new());
    let mut connecting = pin!(pool.connect(80));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(connecting.as_mut().poll(&mut cx).is_pending());
    assert!(pool.expire(Duration::ZERO, Instant::now()), "it was given up");
}

#[tokio::test(start_paused = true)]
async fn a_pool_is_made_ready_once_and_not_for_long() {
    let drain = Drain::new();
    let ready = pool(&drain);
    ready.prepare();
    ready.prepare();
    assert_eq!(ready.lock().dialing, 1);
    let mut connecting = pin!(ready.connect(80));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(connecting.as_mut().poll(&mut cx).is_pending());
    assert_eq!(ready.lock().dialing, 1, "who comes now waits for that one");

    for (used, closed) in [(false, true), (true, false)] {
        let pool = pool(&drain);
        let session = session(&drain);
        pool.add(&session, Duration::ZERO);
        pool.prepare();
        assert_eq!(pool.lock().dialing, 0, "it has a way already");
        if used {
            drop(stream(&pool).await);
        }
        tokio::time::sleep(2 * SURPLUS).await;
        assert!(
            pool.expire(10 * SURPLUS, Instant::now()),
            "what is known of it stays"
        );
        assert_eq!(pool.lock().sessions.is_empty(), closed, "used: {used}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_does_not_wait_for_what_is_being_opened() {
    let drain = Drain::new();
    let pool = pool(&drain);
    let before = Instant::now();
    let (connected, drained) = tokio::join!(pool.connect(80), async {
        tokio::task::yield_now().await;
        drain.complete(LONG).await
    });
    assert!(
        matches!(connected, Err(ConnectError::Unavailable(_))),
        "{connected:?}"
    );
    assert_eq!(drained, Drained::Gracefully);
    assert!(before.elapsed() < PATIENCE, "{:?}", before.elapsed());
}

#[test]
fn a_connection_on_a_runtime_that_has_ended_fails_at_once() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let handle = runtime.handle().clone();
    let pool = runtime.block_on(async { pool(&Drain::new()) });
    drop(runtime);
    let (tell, told) = std::sync::mpsc::channel();
    // In a thread of its own, since it must not hang the test.
    std::thread::spawn(move || {
        let _entered = handle.enter();
        let mut connecting = pin!(pool.connect(80));
        let polled = connecting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        tell.send(matches!(polled, Poll::Ready(Err(_))))
    });
    assert_eq!(told.recv_timeout(LONG), Ok(true));
}

#[tokio::test(start_paused = true)]
async fn a_worn_session_takes_no_newcomer_and_ends_with_the_last_connection_that_it_has() {
    for by_age in [false, true] {
        let drain = Drain::new();
        let pool = pool(&drain);
        // What is small shares a session as long as that takes newcomers.
        (0..16).for_each(|_| pool.ports.note_size(80, Size::Small));
        let old = session(&drain);
        pool.add(&old, Duration::ZERO);
        let (mut kept, neighbour) = (stream(&pool).await, stream(&pool).await);
        assert_eq!(old.load().live, 2);
        drop(neighbour);
        if by_age {
            tokio::time::sleep(MAX_AGE).await;
        } else {
            (2..MAX_OPENED).for_each(|_| drop(old.connect(80, false)));
        }
        let ready = session(&drain);
        pool.add(&ready, Duration::ZERO);

        let before = Instant::now();
        let _newcomer = stream(&pool).await;
        assert_eq!(before.elapsed(), Duration::ZERO, "one was ready");
        assert_eq!((old.load().live, ready.load().live), (1, 1), "by age: {by_age}");
        echo(&mut kept).await;
        assert_eq!(*old.phase().borrow(), Phase::Proven);
        drop(kept);
        assert_ends(&old).await;
        assert_eq!(*ready.phase().borrow(), Phase::Proven);
    }
}

#[tokio::test(start_paused = true)]
async fn where_all_sessions_are_worn_another_is_opened_at_once() {
    let drain = Drain::new();
    let pool = pool(&drain);
    let old = session(&drain);
    pool.add(&old, Duration::ZERO);
    tokio::time::sleep(MAX_AGE).await;
    assert_eq!(pool.lock().dialing, 0);
    let mut connecting = pin!(pool.connect(80));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(connecting.as_mut().poll(&mut cx).is_pending());
    assert_eq!(pool.lock().dialing, 1);
    assert_ends(&old).await;
}

/// A session whose peer answers signs of life, takes connections, and sends back what it gets.
fn session(drain: &Drain) -> Session {
    let (ours, theirs) = duplex(64 << 10);
    drain.spawn(peer(theirs));
    Session::start(
        ours,
        Arc::default(),
        SlowReaders::default(),
        Arc::default(),
        drain,
    )
}

async fn peer(mut io: DuplexStream) {
    let mut unread = Vec::new();
    while io.read_buf(&mut unread).await.unwrap_or(0) > 0 {
        while let [first, _, _, kind, _, length @ ..] = &unread[..]
            && let [high, middle, low, payload @ ..] = length
            && let size = u32::from_be_bytes([0, *high, *middle, *low]) as usize
            && let Some(payload) = payload.get(..size)
        {
            let id = payload.get(..4).unwrap_or_default();
            let answer = match (first, kind) {
                // The id that is too low is refused, every other stream taken.
                (0x80, 1) if id == [0, 0, 0, 1] => [&[0x80, 3, 0, 3, 0, 0, 0, 8], id, &[0, 0, 0, 1]].concat(),
                (0x80, 1) => [&[0x80, 3, 0, 2, 0, 0, 0, 4], id].concat(),
                (0x80, 6) => unread[..8 + size].to_vec(),
                (0x80, _) => Vec::new(),
                _ if size == 0 => Vec::new(),
                _ => unread[..8 + size].to_vec(),
            };
            unread.drain(..8 + size);
            if io.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

async fn stream(pool: &Arc<Pool>) -> PodStream {
    match pool.connect(80).await {
        Ok(Way::Stream(mut stream)) => {
            echo(&mut stream).await;
            stream
        }
        other => panic!("no stream: {other:?}"),
    }
}

/// Sends something, and waits until it is back.
async fn echo(stream: &mut PodStream) {
    stream.write_all(b"word").await.unwrap();
    let mut back = [0; 4];
    let read = tokio::time::timeout(LONG, stream.read_exact(&mut back)).await;
    assert!(matches!(read, Ok(Ok(_))), "{read:?}");
    assert_eq!(&back, b"word");
}

async fn assert_ends(session: &Session) {
    let mut phase = session.phase();
    let ended = phase.wait_for(|phase| matches!(phase, Phase::Ended(_)));
    assert!(tokio::time::timeout(LONG, ended).await.is_ok(), "it goes on");
}
