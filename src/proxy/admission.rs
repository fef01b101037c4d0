//! Which clients get a connection: so many in all, and so many from one address.
//!
//! Above the first limit nobody is turned away: connections wait in the kernel's queue until one ends. Above the second the
//! connection is closed, because whoever has that many will not be helped by waiting, and others would wait behind it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use crate::proxy::notice::Notice;

/// What share of all connections an address of another machine may have by default.
const SHARE: usize = 4;

/// Counts clients' connections. Clones share the counts.
#[derive(Debug, Clone)]
pub(super) struct Admission(Arc<State>);

#[derive(Debug)]
struct State {
    places: Arc<Semaphore>,
    limit: usize,
    per_client: Option<usize>,
    clients: Mutex<HashMap<IpAddr, usize>>,
    full: Notice,
    refused: Notice,
}

/// A place among all connections.
#[derive(Debug)]
pub(super) struct Place(#[expect(dead_code, reason = "gives the place back")] OwnedSemaphorePermit);

/// A connection that may be served; counted until it is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    _place: Place,
    state: Arc<State>,
    client: IpAddr,
}

impl Admission {
    /// Counts from zero. `per_client`: see [`Limits`](crate::proxy::Limits::connections_per_client).
    pub(super) fn new(limit: usize, per_client: Option<usize>) -> Self {
        Self(Arc::new(State {
            places: Arc::new(Semaphore::new(limit)),
            limit,
            per_client,
            clients: Mutex::default(),
            full: Notice::default(),
            refused: Notice::default(),
        }))
    }

    /// Waits for a place for the next connection. Cancel-safe.
    pub(super) async fn place(&self) -> Place {
        let places = &self.0.places;
        if let Ok(place) = places.clone().try_acquire_owned() {
            return Place(place);
        }
        if self.0.full.due().is_some() {
            warn!(
                limit = self.0.limit,
                "every connection is taken, further ones wait; --max-connections allows more"
            );
        }
        let place = places.clone().acquire_owned().await;
        Place(place.expect("the semaphore is never closed"))
    }

    /// Admits a client's connection, unless it has as many as one may have.
    pub(super) fn admit(&self, place: Place, client: IpAddr) -> Option<Admitted> {
        let client = client.to_canonical();
        let state = &self.0;
        let limit = state.per_client.unwrap_or(if client.is_loopback() {
            state.limit
        } else {
            (state.limit / SHARE).max(1)
        });
        {
            let mut clients = state.clients();
            let count = clients.entry(client).or_default();
            if *count < limit {
                *count += 1;
                return Some(Admitted {
                    _place: place,
                    state: state.clone(),
                    client,
                });
            }
        }
        if let Some(times) = state.refused.due() {
            warn!(
                %client, limit, times,
                "connections closed: the client has as many as one may have; --max-connections-per-client allows more"
            );
        }
        None
    }
}

impl State {
    fn clients(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut clients = self.state.clients();
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::time::Duration;

    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    async fn admit(admission: &Admission, client: IpAddr) -> Option<Admitted> {
        admission.admit(admission.place().await, client)
    }

    #[tokio::test]
    async fn by_default_this_machine_may_have_all_and_another_a_quarter() {
        let admission = Admission::new(8, None);
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(admit(&admission, OTHER).await.unwrap());
        }
        assert!(admit(&admission, OTHER).await.is_none());
        for client in [HERE, Ipv6Addr::LOCALHOST.into(), HERE, HERE, HERE, HERE] {
            held.push(admit(&admission, client).await.unwrap());
        }
        held.remove(0);
        assert!(
            admit(&admission, OTHER).await.is_some(),
            "a connection that ends makes room"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn above_the_limit_of_all_one_waits_for_the_next_that_ends() {
        let admission = Admission::new(1, Some(5));
        let first = admit(&admission, HERE).await.unwrap();
        let waiting = tokio::time::timeout(Duration::from_hours(1), admission.place());
        assert!(waiting.await.is_err());
        drop(first);
        assert!(admit(&admission, OTHER).await.is_some());
        assert!(
            admission.0.clients().is_empty(),
            "addresses that left are forgotten"
        );
    }
}
