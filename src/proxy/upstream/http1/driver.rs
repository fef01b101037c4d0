//! What moves the bytes of a connection: polled by whoever uses the connection, so that a request and its answer wake no task
//! besides the request's own, which for a small one cost as much as reading the answer.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use tokio::runtime::Handle;
use tokio::task::coop::unconstrained;

use crate::drain::Drain;

/// The future that moves a connection's bytes, until the connection ends.
pub(super) struct Driver {
    /// Nothing once it has ended, or is a task of its own.
    moving: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// What the future wakes, and that as the future sees it.
    bell: Arc<Bell>,
    waker: Waker,
    drain: Drain,
}

/// Wakes whoever polled last.
#[derive(Default)]
struct Bell {
    user: AtomicWaker,
    /// Whether the user is about to look at what there is anyway.
    muted: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.muted.load(Ordering::Relaxed) {
            self.user.wake();
        }
    }
}

impl Driver {
    /// Takes the future, which becomes a task of `drain` when nobody is there to poll it.
    pub(super) fn new(moving: impl Future<Output = ()> + Send + 'static, drain: &Drain) -> Self {
        let bell = Arc::<Bell>::default();
        Self {
            moving: Some(Box::pin(moving)),
            waker: bell.clone().into(),
            bell,
            drain: drain.clone(),
        }
    }

    /// Moves what can be moved now.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) {
        let Some(moving) = &mut self.moving else { return };
        self.bell.user.register(cx.waker());
        if moving
            .as_mut()
            .poll(&mut Context::from_waker(&self.waker))
            .is_ready()
        {
            self.moving = None;
        }
    }

    /// Polls for something that only the connection can bring.
    pub(super) fn poll_for<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if self.moving.is_some() {
            // It comes while the future is polled, here: there is no need to be woken for it.
            let mut looking = || {
                let looking = pin!(unconstrained(std::future::poll_fn(&mut poll)));
                looking.poll(&mut Context::from_waker(Waker::noop()))
            };
            // Looking may tell the future that somebody wants something. It is polled next, or when there is a next look.
            self.bell.muted.store(true, Ordering::Relaxed);
            let brought = looking();
            self.bell.muted.store(false, Ordering::Relaxed);
            if brought.is_ready() {
                return brought;
            }
            self.poll(cx);
            if self.moving.is_some() {
                return looking();
            }
        }
        poll(cx)
    }

    /// Makes it a task of its own: there will be things to move while nobody polls.
    pub(super) fn detach(&mut self) {
        if let Some(moving) = self.moving.take()
            && Handle::try_current().is_ok()
        {
            self.drain.spawn(moving);
        }
    }
}

impl Drop for Driver {
    /// Lets the connection end as its protocol wants it.
    fn drop(&mut self) {
        self.detach();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    /// Counts how often it was rung.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn what_the_connection_brings_is_there_at_once_and_wakes_nobody_for_it() {
        let (bring, mut brought) = oneshot::channel();
        let (arrive, arrived) = oneshot::channel::<()>();
        let moving = async {
            arrived.await.unwrap();
            bring.send(1).unwrap();
            std::future::pending::<()>().await;
        };
        let mut driver = Driver::new(moving, &Drain::new());
        let bell = Arc::new(Counter::default());
        let waker = bell.clone().into();
        let mut cx = Context::from_waker(&waker);
        let mut poll = || driver.poll_for(&mut cx, |cx| Pin::new(&mut brought).poll(cx));
        assert!(poll().is_pending());
        arrive.send(()).unwrap();
        assert_eq!(bell.0.load(Ordering::Relaxed), 1, "woken for what has arrived");
        assert_eq!(poll(), Poll::Ready(Ok(1)));
        assert_eq!(bell.0.load(Ordering::Relaxed), 1, "and not for what that brings");
    }

    #[tokio::test]
    async fn a_look_that_is_followed_by_a_poll_wakes_nobody_and_one_after_it_does() {
        let wanted = Arc::new(AtomicWaker::new());
        let moving = {
            let wanted = wanted.clone();
            std::future::poll_fn(move |cx| {
                wanted.register(cx.waker());
                Poll::Pending
            })
        };
        let mut driver = Driver::new(moving, &Drain::new());
        let bell = Arc::new(Counter::default());
        let waker = bell.clone().into();
        let mut cx = Context::from_waker(&waker);
        driver.poll(&mut cx);
        for (waking, woken) in [(1, 0), (2, 1)] {
            let mut looks = 0;
            let _ = driver.poll_for(&mut cx, |_| {
                looks += 1;
                if looks == waking {
                    wanted.wake();
                }
                Poll::<()>::Pending
            });
            assert_eq!((looks, bell.0.load(Ordering::Relaxed)), (2, woken));
        }
    }

    #[tokio::test]
    async fn what_a_connection_of_its_own_brings_is_waited_for() {
        let (bring, mut brought) = oneshot::channel();
        let mut driver = Driver::new(
            async {
                tokio::task::yield_now().await;
                bring.send(1).unwrap();
            },
            &Drain::new(),
        );
        driver.detach();
        let waiting = std::future::poll_fn(|cx| driver.poll_for(cx, |cx| Pin::new(&mut brought).poll(cx)));
        let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        assert_eq!(waited.unwrap(), Ok(1));
    }

    #[tokio::test]
    async fn a_connection_that_nobody_uses_any_more_goes_on_to_its_end() {
        let (over, mut ended) = oneshot::channel();
        let drain = Drain::new();
        let driver = Driver::new(async { over.send(()).unwrap() }, &drain);
        tokio::task::yield_now().await;
        assert_eq!(ended.try_recv(), Err(TryRecvError::Empty));
        drop(driver);
        drain.complete(Duration::from_secs(10)).await;
        assert_eq!(ended.try_recv(), Ok(()));
    }
}
