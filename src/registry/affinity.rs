//! Session affinity (`sessionAffinity: ClientIP`): which endpoint each client of a Service is with.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::name::ServiceName;
use crate::registry::PodRef;

/// How many sessions are remembered: more than clients of one proxy, and less than a megabyte. Beyond it the one that was
/// longest without a request is forgotten.
const MAX_SESSIONS: usize = 4096;

/// A client's session with a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The Service.
    pub service: ServiceName,
    /// The client's address, without its port.
    pub client: IpAddr,
    /// How long it outlasts the last request.
    pub timeout: Duration,
}

impl Session {
    /// An IPv4 client is the same on a socket of either family.
    fn key(&self) -> (ServiceName, IpAddr) {
        (self.service.clone(), self.client.to_canonical())
    }
}

/// An endpoint that a client is with.
#[derive(Debug)]
struct Stuck {
    pod: PodRef,
    /// When the session ends unless a request extends it.
    until: Instant,
}

/// The sessions of a proxy.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<(ServiceName, IpAddr), Stuck>>);

impl Sessions {
    /// Returns the pod that a session is with.
    pub(super) fn find(&self, session: &Session, now: Instant) -> Option<PodRef> {
        let sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck = sessions.get(&session.key())?;
        (now < stuck.until).then(|| stuck.pod.clone())
    }

    /// Notes that a request of the session goes to this pod.
    pub(super) fn stick(&self, session: &Session, pod: &PodRef, now: Instant) {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = session.key();
        if sessions.len() >= MAX_SESSIONS && !sessions.contains_key(&key) {
            sessions.retain(|_, stuck| now < stuck.until);
            let nearest = sessions.iter().min_by_key(|(_, stuck)| stuck.until);
            if let Some(key) = nearest
                .map(|(key, _)| key.clone())
                .filter(|_| sessions.len() >= MAX_SESSIONS)
            {
                sessions.remove(&key);
            }
        }
        let stuck = Stuck {
            pod: pod.clone(),
            until: now + session.timeout,
        };
        sessions.insert(key, stuck);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn session(client: u32) -> Session {
        Session {
            service: ServiceName::new("ns", "web").unwrap(),
            client: Ipv4Addr::from(client).into(),
            timeout: Duration::from_secs(60),
        }
    }

    fn pod(name: &str) -> PodRef {
        PodRef {
            namespace: "ns".into(),
            name: name.into(),
            uid: name.into(),
        }
    }

    #[test]
    fn beyond_the_limit_the_session_that_ends_first_is_forgotten() {
        let (sessions, begun) = (Sessions::default(), Instant::now());
        let pod = pod("a");
        let limit = u32::try_from(MAX_SESSIONS).unwrap();
        for client in 0..=limit {
            sessions.stick(
                &session(client),
                &pod,
                begun + Duration::from_millis(client.into()),
            );
        }
        let now = begun + Duration::from_secs(10);
        assert_eq!(sessions.0.lock().unwrap().len(), MAX_SESSIONS);
        assert_eq!(sessions.find(&session(0), now), None);
        assert!((1..=limit).all(|client| sessions.find(&session(client), now).is_some()));
        sessions.stick(&session(limit + 1), &pod, begun + Duration::from_secs(600));
        assert_eq!(sessions.0.lock().unwrap().len(), 1, "what has ended goes first");
    }

    #[test]
    fn services_and_clients_have_sessions_of_their_own() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        sessions.stick(&session(1), &pod("a"), now);
        let other = Session {
            service: ServiceName::new("ns", "other").unwrap(),
            ..session(1)
        };
        assert_eq!(sessions.find(&other, now), None);
        assert_eq!(sessions.find(&session(2), now), None);
        let mapped = Session {
            client: Ipv4Addr::from(1).to_ipv6_mapped().into(),
            ..session(1)
        };
        assert_eq!(sessions.find(&mapped, now), Some(pod("a")));
    }
}
