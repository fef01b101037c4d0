//! Serves the registry's interests: each Service that somebody asked for is followed until nobody asks any more.
//!
//! A Service and its EndpointSlices are asked for at the same time. Users who may not read EndpointSlices get the endpoints
//! from the pods that the Service selects.

mod follower;
mod followers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::k8s::discovery::follower::Follower;
use crate::k8s::discovery::followers::Followers;
use crate::k8s::follow::Pace;
use crate::k8s::portforward::{Pools, PortForward};
use crate::k8s::{Cluster, Config};
use crate::name::ServiceName;
use crate::registry::{Interest, LookupError, LookupErrorKind, Writer};

/// How long the answer "there is none" or "you may not" stands without being asked again.
const NEGATIVE_TTL: Duration = Duration::from_secs(5);

/// How many Services are followed at the same time. Each costs two watches, and a client that makes up names must not have
/// one made for each; nobody's programs use that many.
const MAX_FOLLOWED: usize = 1000;

/// Serves interests until the drain starts.
#[derive(Debug)]
pub struct Discovery {
    cluster: Cluster,
    pace: Pace,
    idle_timeout: Duration,
    writer: Arc<Writer>,
    /// The port-forwards, which are told of pods that end.
    pools: Pools,
    /// How many Services are followed at most.
    limit: usize,
}

impl Discovery {
    /// Makes the server of `writer`'s interests. It tells `forward` which pods end or are gone.
    #[must_use]
    pub fn new(cluster: Cluster, config: &Config, writer: Writer, forward: &PortForward) -> Self {
        Self {
            cluster,
            pace: Pace {
                poll: config.poll_interval,
                timeout: config.timeout,
            },
            idle_timeout: config.idle_timeout,
            writer: Arc::new(writer),
            pools: forward.pools(),
            limit: MAX_FOLLOWED,
        }
    }

    /// Runs until `drain` starts.
    pub async fn run(self, mut interests: mpsc::UnboundedReceiver<Interest>, drain: Drain) {
        let mut followers = Followers::default();
        let mut refusals = VecDeque::new();
        loop {
            tokio::select! {
                () = drain.started() => return,
                interest = interests.recv() => match interest {
                    None => return,
                    Some(Interest::Recheck(service)) => followers.recheck(&service),
                    // Readers repeat themselves.
                    Some(Interest::Follow(service)) if self.writer.has(&service) => {}
                    Some(Interest::Follow(service)) => {
                        self.writer.begin(&service);
                        if self.make_room(&mut followers) {
                            self.follow(service, &mut followers);
                        } else {
                            self.refuse(service, &mut refusals);
                        }
                    }
                },
                // Removed here and not by the follower, so that an interest that comes now starts a new one.
                service = followers.ended() => self.writer.remove(&service),
                service = stale(&mut refusals) => self.writer.remove(&service),
            }
        }
    }

    /// Makes sure that one more Service may be followed: where there are too many, the one goes that has only an error to
    /// tell and was not asked for in the longest time.
    fn make_room(&self, followers: &mut Followers) -> bool {
        if followers.len() < self.limit {
            return true;
        }
        let Some(idlest) = self.writer.idlest_error(|service| followers.contains(service)) else {
            return false;
        };
        debug!(service = %idlest, "no longer followed: others need the room");
        followers.abort(&idlest);
        self.writer.remove(&idlest);
        true
    }

    fn follow(&self, service: ServiceName, followers: &mut Followers) {
        followers.spawn(service.clone(), |recheck| {
            let client = &self.cluster.client;
            let (writer, pools) = (self.writer.clone(), self.pools.clone());
            Follower::new(
                client,
                service,
                self.pace,
                self.idle_timeout,
                recheck,
                writer,
                pools,
            )
            .run()
        });
    }

    /// Answers that there are too many. The answers stand as any other error does, and are limited in number too.
    fn refuse(&self, service: ServiceName, refusals: &mut VecDeque<(ServiceName, Instant)>) {
        let message = format!(
            "too many different services in use: {} are followed, and one is given up when nobody asked for it for {:?}",
            self.limit, self.idle_timeout
        );
        if refusals.is_empty() {
            warn!("{message}");
        }
        let kind = LookupErrorKind::Unavailable;
        self.writer.answer(&service, Err(LookupError { kind, message }));
        if refusals.len() >= self.limit
            && let Some((oldest, _)) = refusals.pop_front()
        {
            self.writer.remove(&oldest);
        }
        refusals.push_back((service, Instant::now() + NEGATIVE_TTL));
    }
}

/// Waits until the oldest refusal has stood for long enough, and takes it. Cancel-safe.
async fn stale(refusals: &mut VecDeque<(ServiceName, Instant)>) -> ServiceName {
    if let Some((_, end)) = refusals.front() {
        tokio::time::sleep_until(*end).await;
        if let Some((service, _)) = refusals.pop_front() {
            return service;
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests;
