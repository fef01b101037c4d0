//! The state that all connections of the double share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::access::Access;
use super::faults::Faults;
use super::forwards::Forwards;
use super::resource::Target;
use super::runtime::ContainerRuntime;
use super::store::Store;

/// Entries of a record after which the older half of it is forgotten; more than any test or bench looks at.
const RECORD: usize = 100_000;

/// One authenticated request as RBAC sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiCall {
    /// Who asked.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, …
    pub verb: String,
    /// API group, empty for core.
    pub group: String,
    /// Plural resource name.
    pub resource: String,
    /// `portforward`, if any.
    pub subresource: Option<String>,
    /// Absent for all namespaces.
    pub namespace: Option<String>,
    /// Absent for collections.
    pub name: Option<String>,
}

/// Shared state; the parts lock themselves.
#[derive(Debug)]
pub(super) struct Cluster {
    /// Objects.
    pub(super) store: Store,
    /// Users and permissions.
    pub(super) access: Access,
    /// What is broken.
    pub(super) faults: Faults,
    /// Port-forward sessions.
    pub(super) forwards: Arc<Forwards>,
    /// What the nodes run.
    pub(super) runtime: Mutex<ContainerRuntime>,
    /// Where container ports really lead.
    pub(super) routes: Mutex<BTreeMap<(String, String, u16), SocketAddr>>,
    /// Requests seen, the latest of them.
    pub(super) calls: Mutex<Vec<ApiCall>>,
    /// Counts demanded bookmarks; watches send one whenever it changes.
    pub(super) bookmarks: watch::Sender<u64>,
    /// Every task of the double.
    pub(super) tasks: TaskTracker,
    /// Ends the double.
    pub(super) stop: CancellationToken,
    /// Ends the connections that exist now; replaced by each restart.
    pub(super) live: Mutex<CancellationToken>,
}

impl Cluster {
    /// An empty cluster.
    pub(super) fn new() -> Self {
        let stop = CancellationToken::new();
        Self {
            store: Store::new(),
            access: Access::default(),
            faults: Faults::new(),
            forwards: Arc::default(),
            runtime: Mutex::default(),
            routes: Mutex::default(),
            calls: Mutex::default(),
            bookmarks: watch::Sender::new(0),
            tasks: TaskTracker::new(),
            live: Mutex::new(stop.child_token()),
            stop,
        }
    }

    /// Where a container port of a pod leads.
    pub(super) fn route(&self, namespace: &str, pod: &str, port: u16) -> Option<SocketAddr> {
        lock(&self.routes)
            .get(&(namespace.to_owned(), pod.to_owned(), port))
            .copied()
    }

    /// What the nodes run.
    pub(super) fn runtime(&self) -> ContainerRuntime {
        *lock(&self.runtime)
    }

    /// The token of connections accepted now.
    pub(super) fn connection_token(&self) -> CancellationToken {
        lock(&self.live).child_token()
    }

    /// Cuts every connection that exists now.
    pub(super) fn cut_connections(&self) {
        let old = std::mem::replace(&mut *lock(&self.live), self.stop.child_token());
        old.cancel();
    }

    /// Writes a request into the record.
    pub(super) fn record(&self, user: &str, target: &Target) {
        let call = ApiCall {
            user: user.to_owned(),
            verb: target.verb.to_owned(),
            group: target.kind.group().to_owned(),
            resource: target.kind.plural().to_owned(),
            subresource: target.subresource.clone(),
            namespace: target.namespace.clone(),
            name: target.name.clone(),
        };
        remember(&mut lock(&self.calls), call);
    }
}

/// Adds to a record that does not grow for ever: the demo may run for days.
pub(super) fn remember<T>(record: &mut Vec<T>, entry: T) {
    if record.len() >= RECORD {
        record.drain(..RECORD / 2);
    }
    record.push(entry);
}

/// Locks without a way to fail: no code panics while it holds one of these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleeps; not at all for zero, where the timer would still take up to a millisecond.
pub(super) async fn pause(duration: Duration) {
    if !duration.is_zero() {
        tokio::time::sleep(duration).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_the_latest_entries_and_does_not_grow_for_ever() {
        let mut record = Vec::new();
        for number in 0..3 * RECORD {
            remember(&mut record, number);
        }
        assert!(record.len() <= RECORD, "{}", record.len());
        assert_eq!(record.last(), Some(&(3 * RECORD - 1)));
        assert!(record.is_sorted() && record.len() >= RECORD / 2);
    }
}
