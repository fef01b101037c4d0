//! The tasks that follow Services: which Service each is for, and how it is told to look again.

use std::collections::HashMap;

use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinSet};
use tracing::error;

use crate::k8s::follow::Recheck;
use crate::name::ServiceName;

/// The tasks; dropping it ends them.
#[derive(Debug, Default)]
pub(super) struct Followers {
    tasks: JoinSet<()>,
    /// The Service of each task that still counts.
    services: HashMap<Id, ServiceName>,
    followed: HashMap<ServiceName, Followed>,
}

#[derive(Debug)]
struct Followed {
    task: AbortHandle,
    recheck: watch::Sender<()>,
}

impl Followers {
    /// Starts the task that follows `service`.
    pub(super) fn spawn<F>(&mut self, service: ServiceName, task: impl FnOnce(Recheck) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (recheck, rechecked) = watch::channel(());
        let task = self.tasks.spawn(task(rechecked));
        self.services.insert(task.id(), service.clone());
        self.followed.insert(service, Followed { task, recheck });
    }

    /// Returns how many Services are followed.
    pub(super) fn len(&self) -> usize {
        self.followed.len()
    }

    /// Reports whether `service` is followed.
    pub(super) fn contains(&self, service: &ServiceName) -> bool {
        self.followed.contains_key(service)
    }

    /// Asks for a new look at `service`.
    pub(super) fn recheck(&self, service: &ServiceName) {
        if let Some(followed) = self.followed.get(service) {
            followed.recheck.send_replace(());
        }
    }

    /// Ends the task of `service` without waiting for it.
    pub(super) fn abort(&mut self, service: &ServiceName) {
        if let Some(followed) = self.followed.remove(service) {
            self.services.remove(&followed.task.id());
            followed.task.abort();
        }
    }

    /// Waits until a task has ended by itself and returns its Service. Cancel-safe.
    pub(super) async fn ended(&mut self) -> ServiceName {
        while let Some(ended) = self.tasks.join_next_with_id().await {
            let id = match &ended {
                Ok((id, ())) => *id,
                Err(failure) => failure.id(),
            };
            // Those that were aborted do not count any more.
            let Some(service) = self.services.remove(&id) else {
                continue;
            };
            if let Err(failure) = ended {
                error!(%service, error = %failure, "following the service failed; the next request looks it up again");
            }
            self.followed.remove(&service);
            return service;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ServiceName {
        ServiceName::new("default", name).unwrap()
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_as_any_other_does() {
        let mut followers = Followers::default();
        followers.spawn(name("stays"), |_| std::future::pending());
        followers.spawn(name("panics"), |_| async { panic!("on purpose") });
        assert_eq!(followers.ended().await, name("panics"));
        assert!(followers.contains(&name("stays")) && followers.len() == 1);
    }

    #[tokio::test]
    async fn an_aborted_task_is_not_told_of_even_when_its_service_is_followed_again() {
        let mut followers = Followers::default();
        followers.spawn(name("web"), |_| std::future::pending());
        followers.abort(&name("web"));
        followers.spawn(name("web"), |_| std::future::pending());
        followers.spawn(name("last"), |_| async {});
        assert_eq!(followers.ended().await, name("last"));
        assert!(followers.contains(&name("web")));
    }

    #[tokio::test]
    async fn a_recheck_reaches_everything_that_follows_the_service() {
        let mut followers = Followers::default();
        followers.spawn(name("web"), |recheck| async move {
            let (mut service, mut endpoints) = (recheck.clone(), recheck);
            let both = async { tokio::join!(service.changed(), endpoints.changed()) };
            drop(both.await);
        });
        followers.recheck(&name("web"));
        assert_eq!(followers.ended().await, name("web"));
    }
}
