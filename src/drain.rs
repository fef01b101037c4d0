//! Orderly shutdown: every task is spawned through a [`Drain`], which knows when the last one has ended.
//!
//! A drain has two steps. First its tasks are asked to finish what they do ([`Drain::started`]); when a deadline passes
//! they are told to stop where they are by dropping their futures. Components that must end one after the other get a drain each.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tokio_util::task::TaskTracker;

/// How long tasks that were told to stop may take to do so; they only have to unwind.
const FORCED_GRACE: Duration = Duration::from_secs(1);

/// Tracks a component's tasks and carries the word to stop. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    /// Cancelled when draining begins.
    started: CancellationToken,
    /// Cancelled when the deadline has passed.
    forced: CancellationToken,
    /// Every task that has not ended yet.
    tasks: TaskTracker,
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
                () = forced.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Resolves when draining begins. Cancel-safe.
    pub fn started(&self) -> WaitForCancellationFuture<'_> {
        self.started.cancelled()
    }

    /// Whether draining has begun.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started.is_cancelled()
    }

    /// Starts the drain and waits until every task has ended, by force after `deadline`.
    ///
    /// Dropping the future leaves the drain started; calling it again waits again.
    pub async fn complete(&self, deadline: Duration) -> Drained {
        self.started.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok() {
            return Drained::Gracefully;
        }
        let left = self.tasks.len();
        self.forced.cancel();
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

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
}
