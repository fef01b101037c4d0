//! Chooses the endpoint of a request: the one with the fewest requests under way, in turn where several have as few; or the
//! one that the client's session is with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

use crate::registry::Endpoint;
use crate::registry::affinity::{Session, Sessions};

/// Chooses endpoints; shared by all requests of a proxy.
#[derive(Debug, Default)]
pub struct Balancer {
    /// Counts the choices.
    turns: AtomicU64,
    /// Who sticks to which endpoint.
    sessions: Sessions,
}

impl Balancer {
    /// Picks an endpoint from `candidates`: that of the session if it is among them, else the one with the least load, which
    /// the session is then with.
    ///
    /// Returns nothing only when there is no candidate.
    pub fn pick<'a, T>(
        &self,
        candidates: &'a [T],
        endpoint: impl Fn(&T) -> &Arc<Endpoint>,
        session: Option<&Session>,
    ) -> Option<&'a T> {
        let Some(session) = session else {
            return self.least_loaded(candidates, endpoint);
        };
        let now = Instant::now();
        let stuck = self.sessions.find(session, now).and_then(|pod| {
            let mut candidates = candidates.iter();
            candidates.find(|candidate| endpoint(candidate).pod == pod)
        });
        let picked = stuck.or_else(|| self.least_loaded(candidates, &endpoint))?;
        self.sessions.stick(session, &endpoint(picked).pod, now);
        Some(picked)
    }

    /// Of several with as little load, takes the one that was taken longest ago: they take turns, whatever other Services are
    /// asked for in between.
    fn least_loaded<'a, T>(
        &self,
        candidates: &'a [T],
        endpoint: impl Fn(&T) -> &Arc<Endpoint>,
    ) -> Option<&'a T> {
        let least = candidates
            .iter()
            .min_by_key(|candidate| endpoint(candidate).load.rank())?;
        let turn = 1 + self.turns.fetch_add(1, Ordering::Relaxed);
        endpoint(least).load.choose(turn);
        Some(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::ServiceName;
    use crate::registry::{Load, PodRef};
    use std::collections::BTreeMap;
    use std::time::Duration;

    fn endpoints(count: usize) -> Vec<Arc<Endpoint>> {
        let endpoint = |number: usize| Endpoint {
            pod: PodRef {
                namespace: "ns".into(),
                name: number.to_string().into(),
                uid: "".into(),
            },
            addresses: Vec::new(),
            hostname: None,
            ready: true,
            terminating: false,
            ports: BTreeMap::new(),
            is_itself: false,
            load: Arc::new(Load::default()),
        };
        (0..count).map(|number| Arc::new(endpoint(number))).collect()
    }

    #[test]
    fn idle_endpoints_take_turns() {
        let endpoints = endpoints(3);
        let balancer = Balancer::default();
        let mut seen: Vec<_> = (0..6)
            .map(|_| {
                balancer
                    .pick(&endpoints, |e| e, None)
                    .unwrap()
                    .pod
                    .name
                    .to_string()
            })
            .collect();
        seen.sort();
        assert_eq!(seen, ["0", "0", "1", "1", "2", "2"]);
    }

    #[test]
    fn endpoints_take_turns_whatever_is_asked_for_in_between() {
        let services = [endpoints(2), endpoints(2)];
        let balancer = Balancer::default();
        for turn in 0..6 {
            for endpoints in &services {
                let picked = balancer.pick(endpoints, |e| e, None).unwrap();
                assert_eq!(*picked.pod.name, (turn % 2).to_string());
            }
        }
    }

    #[test]
    fn a_busy_endpoint_is_passed_over() {
        let endpoints = endpoints(2);
        let balancer = Balancer::default();
        let _busy = endpoints[0].load.begin();
        for _ in 0..4 {
            assert_eq!(&*balancer.pick(&endpoints, |e| e, None).unwrap().pod.name, "1");
        }
    }

    fn session(client: u8) -> Session {
        Session {
            service: ServiceName::new("ns", "web").unwrap(),
            client: [10, 0, 0, client].into(),
            timeout: Duration::from_secs(60),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_stays_with_its_endpoint_until_it_paused_for_the_timeout() {
        let endpoints = endpoints(3);
        let balancer = Balancer::default();
        let pick = |client| balancer.pick(&endpoints, |e| e, Some(&session(client))).unwrap();
        let (first, second) = (pick(1), pick(2));
        assert_ne!(first.pod, second.pod, "clients are spread");
        // Busy or not: leaving would end the session.
        let _busy = [first.load.begin(), first.load.begin()];
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(59)).await;
            assert_eq!(pick(1).pod, first.pod, "each request extends the session");
        }
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_ne!(pick(1).pod, first.pod);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_whose_endpoint_is_gone_moves_and_stays_there() {
        let mut endpoints = endpoints(3);
        let balancer = Balancer::default();
        let all = endpoints.clone();
        let first = balancer.pick(&all, |e| e, Some(&session(1))).unwrap();
        endpoints.retain(|endpoint| endpoint.pod != first.pod);
        let second = balancer.pick(&endpoints, |e| e, Some(&session(1))).unwrap();
        assert_ne!(second.pod, first.pod);
        for _ in 0..3 {
            let now = balancer.pick(&all, |e| e, Some(&session(1))).unwrap();
            assert_eq!(now.pod, second.pod, "the session is with the new endpoint");
        }
    }

    #[test]
    fn nothing_is_picked_from_nothing() {
        assert!(
            Balancer::default()
                .pick(&[], |e: &Arc<Endpoint>| e, None)
                .is_none()
        );
    }

    #[test]
    fn the_load_falls_when_the_guard_goes() {
        let load = Arc::new(Load::default());
        let guard = load.begin();
        assert_eq!(load.get(), 1);
        drop(guard);
        assert_eq!(load.get(), 0);
    }
}
