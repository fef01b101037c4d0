//! Orderly shutdown: every task is spawned through a [`Drain`], which knows when the last one has ended.
//!
//! A drain has two steps. First its tasks are asked to finish what they do ([`Drain::started`]); when a deadline passes
//! they are told to stop where they are by dropping their futures. Components that must end one after the other get a drain each.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long tasks that were told to stop may take to do so; they only have to unwind.
const FORCED_GRACE: Duration = Duration::from_secs(1);

/// Tracks a component's tasks and carries the word to stop. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    /// Given when draining begins.
    started: Word,
    /// Given when the deadline has passed.
    forced: Word,
    /// Every task that has not ended yet.
    tasks: TaskTracker,
}

/// A word that is given once. Every task waits for one beside its work, and asks at each of its polls whether it has been given;
/// so that must cost next to nothing.
#[derive(Debug, Clone, Default)]
struct Word {
    /// Set before the token is cancelled: to be asked without its locks.
    given: Arc<AtomicBool>,
    token: CancellationToken,
}

impl Word {
    fn give(&self) {
        self.given.store(true, Ordering::Release);
        self.token.cancel();
    }

    fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Resolves when the word is given. Cancel-safe.
    async fn heard(&self) {
        let mut cancelled = pin!(self.token.cancelled());
        let mut known: Option<Waker> = None;
        poll_fn(|cx| {
            // The token has this waker already, and calls it when the word is given.
            let waits = known.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            if waits && !self.is_given() {
                return Poll::Pending;
            }
            known = Some(cx.waker().clone());
            cancelled.as_mut().poll(cx)
        })
        .await;
    }
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every task finished by itself.
    Gracefully,
    /// So many tasks were cut off at the deadline.
    Forced(usize),
}

impl Drain {
    /// Makes a drain that has not started.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `task` until it ends or the drain is forced, whichever comes first.
    pub fn spawn<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let forced = self.forced.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = forced.heard() => {}
                () = task => {}
            }
        });
    }

    /// Resolves when draining begins. Cancel-safe.
    pub async fn started(&self) {
        self.started.heard().await;
    }

    /// Whether draining has begun.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started.is_given()
    }

    /// Starts the drain and waits until every task has ended, by force after `deadline`.
    ///
    /// Dropping the future leaves the drain started; calling it again waits again, by another deadline if need be.
    pub async fn complete(&self, deadline: Duration) -> Drained {
        self.started.give();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok() {
            return Drained::Gracefully;
        }
        let left = self.tasks.len();
        self.forced.give();
        // A task that blocks its thread cannot be waited for without end; the process exits anyway.
        let _ = tokio::time::timeout(FORCED_GRACE, self.tasks.wait()).await;
        Drained::Forced(left)
    }
}

/// Lets hyper run its connection tasks under the drain.
impl<F> hyper::rt::Executor<F> for Drain
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use std::task::{Context, Wake};

    /// Notes that it was called.
    #[derive(Default)]
    struct Bell(AtomicBool);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn whoever_polled_last_is_woken_by_the_word() {
        let drain = Drain::new();
        let mut started = pin!(drain.started());
        let bells = [(); 2].map(|()| Arc::new(Bell::default()));
        for bell in [&bells[0], &bells[1], &bells[1]] {
            let waker = bell.clone().into();
            assert!(
                started
                    .as_mut()
                    .poll(&mut Context::from_waker(&waker))
                    .is_pending()
            );
        }
        drain.complete(Duration::ZERO).await;
        assert_eq!(
            bells.each_ref().map(|bell| bell.0.load(Ordering::SeqCst)),
            [false, true]
        );
        assert!(started.as_mut().now_or_never().is_some());
        assert!(drain.started().now_or_never().is_some(), "it was given before");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_heeds_the_start_ends_gracefully() {
        let drain = Drain::new();
        let task = drain.clone();
        drain.spawn(async move { task.started().await });
        assert_eq!(drain.complete(Duration::from_secs(30)).await, Drained::Gracefully);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_is_cut_off_at_the_deadline() {
        struct Flag(Arc<AtomicBool>);
        impl Drop for Flag {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let dropped = Arc::new(AtomicBool::new(false));
        let flag = Flag(dropped.clone());
        let drain = Drain::new();
        drain.spawn(async move {
            let _flag = flag;
            std::future::pending::<()>().await;
        });
        let before = tokio::time::Instant::now();
        assert_eq!(drain.complete(Duration::from_secs(30)).await, Drained::Forced(1));
        assert_eq!(before.elapsed().as_secs(), 30);
        assert!(dropped.load(Ordering::SeqCst), "the task was not dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn who_loses_patience_waits_no_longer() {
        let drain = Drain::new();
        drain.spawn(std::future::pending());
        let patient = drain.complete(Duration::from_secs(30)).now_or_never();
        assert_eq!(patient, None);
        let before = tokio::time::Instant::now();
        assert_eq!(drain.complete(Duration::ZERO).await, Drained::Forced(1));
        assert!(before.elapsed() < FORCED_GRACE, "{:?}", before.elapsed());
    }
}
