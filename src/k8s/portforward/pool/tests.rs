use super::*;
use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use kube::client::{Body, Client};

use crate::drain::Drained;
use crate::k8s::portforward::memory::Memory;
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
