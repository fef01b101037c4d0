//! One endpoint of a Service: a pod, its state, and how busy we keep it.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Names one pod, in this incarnation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodRef {
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The object's UID: a pod that comes back under the same name is another one. Empty where the source has none.
    pub uid: Arc<str>,
}

impl Hash for PodRef {
    /// By the UID alone where there is one: no two pods share it, and every request looks up what is known of its pod.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let distinct = if self.uid.is_empty() {
            &self.name
        } else {
            &self.uid
        };
        distinct.hash(state);
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One endpoint, from an EndpointSlice or from a pod that the selector matches.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The pod behind it; a port-forward needs one.
    pub pod: PodRef,
    /// The pod's addresses in the cluster, in order.
    pub addresses: Vec<IpAddr>,
    /// The pod's DNS host name within a headless Service.
    pub hostname: Option<Arc<str>>,
    /// Whether it may get traffic, as its readiness probe says.
    pub ready: bool,
    /// Whether its pod is being deleted.
    pub terminating: bool,
    /// The pod's port number for each TCP port of the Service, by the Service port's name.
    pub ports: BTreeMap<String, u16>,
    /// Whether it is the pod that this program runs in.
    pub is_itself: bool,
    /// How many requests we have under way there; survives updates of the endpoint.
    pub load: Arc<Load>,
}

/// Counts the requests that are under way to one endpoint.
#[derive(Debug, Default)]
pub struct Load {
    under_way: AtomicUsize,
    /// When it was last chosen, in the count of all choices.
    chosen: AtomicU64,
}

impl Load {
    /// Counts one request until the returned guard is dropped.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        InFlight(self.clone())
    }

    /// Returns how many requests are under way.
    #[must_use]
    pub fn get(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    /// Notes that it was chosen, as the `turn`-th of all choices.
    pub(super) fn choose(&self, turn: u64) {
        self.chosen.store(turn, Ordering::Relaxed);
    }

    /// Returns what comes first where the lowest is wanted: the number of requests under way, then the last choice.
    pub(super) fn rank(&self) -> (usize, u64) {
        (self.get(), self.chosen.load(Ordering::Relaxed))
    }
}

/// One request under way; dropping it ends the count.
#[derive(Debug)]
pub struct InFlight(Arc<Load>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}
