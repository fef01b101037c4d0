//! The sessions to all pods.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::drain::Drain;
use crate::k8s::portforward::dial::Dialer;
use crate::k8s::portforward::pool::Pool;
use crate::registry::PodRef;

/// How many pods wait to be made ready at most: those of the first few Services that are asked for.
const POSTPONED: usize = 16;

/// The pools of all pods in use. Clones share them.
#[derive(Debug, Clone)]
pub(in crate::k8s) struct Pools(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    dialer: Arc<Dialer>,
    drain: Drain,
    state: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    by_pod: HashMap<PodRef, Arc<Pool>>,
    /// What is to be made ready once it is known how.
    postponed: Vec<PodRef>,
    /// Whether the end has come.
    closed: bool,
}

impl Pools {
    /// Makes none yet. Sessions are opened by `dialer`, and run under `drain`.
    pub(super) fn new(dialer: Dialer, drain: Drain) -> Self {
        Self(Arc::new(Shared {
            dialer: Arc::new(dialer),
            drain,
            state: Mutex::default(),
        }))
    }

    /// Returns what opens sessions.
    pub(super) fn dialer(&self) -> &Dialer {
        &self.0.dialer
    }

    /// Returns the pool of a pod, a new one if there is none; nothing once they are closed.
    pub(super) fn of(&self, pod: &PodRef) -> Option<Arc<Pool>> {
        let mut inner = self.lock();
        if inner.closed {
            return None;
        }
        if let Some(pool) = inner.by_pod.get(pod) {
            return Some(pool.clone());
        }
        let Shared { dialer, drain, .. } = &*self.0;
        let pool = Arc::new(Pool::new(pod.clone(), dialer.clone(), drain.clone()));
        inner.by_pod.insert(pod.clone(), pool.clone());
        Some(pool)
    }

    /// Has a way to a pod made ready, which will probably be used soon. What gets through to this cluster is for one connection
    /// to find out; until then it is only remembered.
    pub(in crate::k8s) fn prepare(&self, pod: &PodRef) {
        if self.0.dialer.carriers.is_known() {
            if let Some(pool) = self.of(pod) {
                pool.prepare();
            }
            return;
        }
        let mut inner = self.lock();
        if inner.postponed.len() < POSTPONED && !inner.postponed.contains(pod) {
            inner.postponed.push(pod.clone());
        }
    }

    /// Makes ready what was postponed: a connection has found its way.
    pub(super) fn go_on(&self) {
        let postponed = mem::take(&mut self.lock().postponed);
        postponed.iter().for_each(|pod| self.prepare(pod));
    }

    /// Gives up what leads to a pod that is ending or gone: its sessions end with the connections they have. A connection that
    /// is asked for later all the same gets sessions of its own.
    pub(in crate::k8s) fn leave(&self, pod: &PodRef) {
        let mut inner = self.lock();
        inner.postponed.retain(|other| other != pod);
        let left = inner.by_pod.remove(pod);
        drop(inner);
        if let Some(pool) = left {
            pool.close();
        }
    }

    /// Closes what is unused.
    pub(super) fn expire(&self, idle_timeout: Duration, now: Instant) {
        self.lock()
            .by_pod
            .retain(|_, pool| pool.expire(idle_timeout, now));
    }

    /// Closes every session as soon as it is unused, and makes no more.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.by_pod.drain().for_each(|(_, pool)| pool.close());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
