//! Looks after idle connections, which no request polls: their ends are noticed, signs of life are asked for and given, and what
//! a message left behind is sent.

use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use crate::drain::Drain;
use crate::proxy::upstream::http1::Pool;
use crate::proxy::upstream::lock;

/// How long connections are left alone after their use. In a busy pool most are used again by then, and nothing is urgent so soon.
pub(super) const SOON: Duration = Duration::from_millis(100);

/// Looks after the idle connections of a pool until it is dropped or `drain` starts.
pub(super) fn start(pool: &Arc<Pool>, drain: &Drain) {
    let (pool, draining) = (Arc::downgrade(pool), drain.clone());
    drain.spawn(async move {
        tokio::select! {
            () = draining.started() => {}
            () = keep(&pool) => {}
        }
    });
}

async fn keep(pool: &Weak<Pool>) {
    let mut there = true;
    while there {
        tokio::time::sleep(SOON).await;
        let mut looked = false;
        there = poll_fn(|cx| {
            let Some(pool) = pool.upgrade() else {
                return Poll::Ready(false);
            };
            let mut state = lock(&pool.state);
            // Woken by a connection that was put there, not by one that was there.
            if std::mem::replace(&mut looked, true) && state.keeper.is_none() {
                return Poll::Ready(true);
            }
            state.idle.retain_mut(|(connection, _)| connection.is_alive(cx));
            state.keeper = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
