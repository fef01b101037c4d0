//! Follows one Service: joins the Service and its endpoints to the answer that readers get, for as long as somebody asks.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service as KubeService};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, Client};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::k8s::convert::{self, Loads};
use crate::k8s::discovery::NEGATIVE_TTL;
use crate::k8s::error::{self, Kind};
use crate::k8s::follow::{Following, Pace, Recheck, Selection, follow};
use crate::k8s::outage::{Outage, Source};
use crate::k8s::portforward::Pools;
use crate::name::ServiceName;
use crate::registry::{Endpoint, LookupError, LookupErrorKind, PodRef, ServiceKind, View, Writer};

/// The label by which EndpointSlices name their Service (discovery/v1).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// How many of a Service's pods a port-forward is made ready to before a request is sent there: as many as most have. Each is
/// a connection to the API server.
const PREPARED: usize = 3;

/// How lately somebody must have asked for the Service.
const LATELY: Duration = Duration::from_mins(1);

/// For how long EndpointSlices may be refused that could be read before, without pods being read instead: an API server that has
/// just started does not know all roles yet, and a role that is being replaced is back in a moment.
const MOMENT: Duration = Duration::from_secs(5);

/// Where endpoints are read.
enum Endpoints {
    /// From EndpointSlices.
    Slices(Following<EndpointSlice>),
    /// From the pods that the Service selects.
    Pods {
        /// The selector that is being followed.
        selector: String,
        following: Following<Pod>,
    },
    /// Nowhere yet: EndpointSlices are refused and there is no selector, or it is not known.
    Unknown,
}

/// What the endpoints were made of last.
enum Listed {
    Slices(Vec<EndpointSlice>),
    Pods(Vec<Pod>),
}

/// What readers were told last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Nothing yet.
    Nothing,
    /// A view, which failures leave alone for a while.
    View,
    /// An error, and since when.
    Error(Instant),
}

/// Follows one Service.
pub(super) struct Follower {
    name: ServiceName,
    services: Following<KubeService>,
    endpoints: Endpoints,
    pods: Api<Pod>,
    pace: Pace,
    idle_timeout: Duration,
    recheck: Recheck,
    writer: Arc<Writer>,
    /// The Service as last seen: nothing yet, or none, or one.
    object: Option<Option<KubeService>>,
    /// The endpoints' objects as last seen.
    listed: Option<Listed>,
    /// Why EndpointSlices cannot be read.
    refused: Option<LookupError>,
    /// Since when they cannot, where they could before.
    refused_since: Option<Instant>,
    loads: Loads,
    /// The pods as last seen, and whether they were ending.
    pods_seen: BTreeMap<PodRef, bool>,
    /// Who is told of those that will be needed, and of those that end.
    pools: Pools,
    told: Told,
    /// What fails since a view was told.
    outage: Outage,
}

enum News {
    Service(Result<Vec<KubeService>, kube::Error>),
    Slices(Result<Vec<EndpointSlice>, kube::Error>),
    Pods(Result<Vec<Pod>, kube::Error>),
}

impl Follower {
    /// Starts to follow `name`.
    pub(super) fn new(
        client: &Client,
        name: ServiceName,
        pace: Pace,
        idle_timeout: Duration,
        recheck: Recheck,
        writer: Arc<Writer>,
        pools: Pools,
    ) -> Self {
        let namespace = name.namespace();
        let services: Api<KubeService> = Api::namespaced(client.clone(), namespace);
        let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
        let by_name = Selection::Name(name.name().into());
        let by_label = Selection::Labels(format!("{SERVICE_NAME}={}", name.name()));
        Self {
            services: follow(services, by_name, pace, recheck.clone()),
            endpoints: Endpoints::Slices(follow(slices, by_label, pace, recheck.clone())),
            pods: Api::namespaced(client.clone(), namespace),
            pace,
            idle_timeout,
            recheck,
            writer,
            object: None,
            listed: None,
            refused: None,
            refused_since: None,
            loads: Loads::new(),
            pods_seen: BTreeMap::new(),
            pools,
            told: Told::Nothing,
            outage: Outage::default(),
            name,
        }
    }

    /// Runs until nobody used the answer for long enough, or the answer is an error that has stood for long enough.
    pub(super) async fn run(mut self) {
        loop {
            let now = Instant::now();
            let verdict = self.outage.verdict();
            if let Some((_, error)) = verdict.filter(|(time, _)| *time <= now) {
                let error = error.clone();
                self.tell(Err(error));
                continue;
            }
            let end = end(self.told, self.writer.idle(&self.name), self.idle_timeout, now);
            if end <= now {
                debug!(service = %self.name, told = ?self.told, "no longer followed");
                return;
            }
            let until = verdict.map_or(end, |(time, _)| time.min(end));
            if let Ok(news) = tokio::time::timeout_at(until, self.news()).await {
                self.take(news);
            }
        }
    }

    /// Waits for the next change. Cancel-safe: the streams keep what they were doing.
    async fn news(&mut self) -> News {
        let endpoints = async {
            match &mut self.endpoints {
                Endpoints::Slices(following) => following.next().await.map(News::Slices),
                Endpoints::Pods { following, .. } => following.next().await.map(News::Pods),
                Endpoints::Unknown => None,
            }
        };
        tokio::select! {
            Some(news) = self.services.next() => News::Service(news),
            Some(news) = endpoints => news,
            // Both streams are endless, so this is reached only while there is no source of endpoints.
            else => std::future::pending().await,
        }
    }

    fn take(&mut self, news: News) {
        let source = match &news {
            News::Service(_) => Source::Service,
            News::Slices(_) | News::Pods(_) => Source::Endpoints,
        };
        match news {
            News::Service(Ok(found)) => {
                self.object = Some(found.into_iter().next());
                self.follow_pods();
            }
            News::Slices(Ok(slices)) => {
                self.refused_since = None;
                self.listed = Some(Listed::Slices(slices));
            }
            News::Pods(Ok(pods)) => self.listed = Some(Listed::Pods(pods)),
            News::Slices(Err(error)) if error::kind(&error) == Kind::Forbidden => {
                let now = Instant::now();
                let since = *self.refused_since.get_or_insert(now);
                if self.told == Told::View && now.duration_since(since) < MOMENT {
                    return self.fail(source, &error);
                }
                return self.read_pods(error::lookup_error(&error));
            }
            News::Service(Err(error)) | News::Slices(Err(error)) | News::Pods(Err(error)) => {
                if source == Source::Endpoints {
                    self.refused_since = None;
                }
                return self.fail(source, &error);
            }
        }
        if self.outage.recovered(source) {
            info!(service = %self.name, "the service is followed again");
        }
        self.answer();
    }

    /// Reads pods from now on, since EndpointSlices are refused.
    fn read_pods(&mut self, refused: LookupError) {
        debug!(service = %self.name, reason = refused.message, "reading pods instead of EndpointSlices");
        if self.outage.recovered(Source::Endpoints) {
            info!(service = %self.name, "the service is followed by its pods");
        }
        self.refused = Some(refused);
        self.endpoints = Endpoints::Unknown;
        self.follow_pods();
        self.answer();
    }

    /// Follows the pods of the Service's selector, where EndpointSlices are refused.
    fn follow_pods(&mut self) {
        let wanted = self
            .object
            .as_ref()
            .and_then(|object| convert::selector(object.as_ref()?));
        match (&self.endpoints, wanted) {
            (Endpoints::Slices(_), _) => return,
            (Endpoints::Pods { selector, .. }, Some(wanted)) if *selector == wanted => return,
            (_, Some(selector)) => {
                let selection = Selection::Labels(selector.clone());
                let following = follow(self.pods.clone(), selection, self.pace, self.recheck.clone());
                self.endpoints = Endpoints::Pods { selector, following };
            }
            (_, None) => self.endpoints = Endpoints::Unknown,
        }
        self.listed = None;
    }

    /// Tells the registry what is known, once it is enough for an answer.
    fn answer(&mut self) {
        let Some(object) = &self.object else { return };
        let Some(object) = object else {
            let (name, namespace) = (self.name.name(), self.name.namespace());
            let message = format!("services {name:?} not found in namespace {namespace:?}");
            // Its pods mostly go with it, and nobody watches them now.
            self.see_off(&[]);
            return self.tell(Err(LookupError {
                kind: LookupErrorKind::NotFound,
                message,
            }));
        };
        let service = convert::service(self.name.clone(), object);
        let endpoints = match (&self.listed, &self.refused) {
            // It has no endpoints, so it does not matter where they may be read.
            _ if matches!(service.kind, ServiceKind::ExternalName(_)) => Vec::new(),
            (Some(Listed::Slices(slices)), _) => convert::endpoints_from_slices(slices, &mut self.loads),
            (Some(Listed::Pods(pods)), _) => convert::endpoints_from_pods(&service, pods, &mut self.loads),
            (None, Some(refused)) if !service.has_selector => {
                return self.tell(Err(LookupError {
                    kind: LookupErrorKind::Forbidden,
                    message: format!(
                        "{}; a Service without a selector has its endpoints nowhere else",
                        refused.message
                    ),
                }));
            }
            (None, _) => return,
        };
        let podless = match &self.listed {
            Some(Listed::Slices(slices)) => convert::podless(slices),
            _ => Vec::new(),
        };
        self.see_off(&endpoints);
        self.prepare(&endpoints);
        self.tell(Ok(View {
            service,
            endpoints,
            podless,
            served: false,
        }));
    }

    /// Has the port-forwards to pods given up that end or are gone. A pod that only leaves the Service gets new ones where
    /// another Service leads to it.
    fn see_off(&mut self, endpoints: &[Arc<Endpoint>]) {
        let now = endpoints.iter();
        let now = now.map(|endpoint| (endpoint.pod.clone(), endpoint.terminating));
        let before = mem::replace(&mut self.pods_seen, now.collect());
        for (pod, was_ending) in before {
            if self
                .pods_seen
                .get(&pod)
                .is_none_or(|&ending| ending && !was_ending)
            {
                debug!(%pod, service = %self.name, "the pod ends; its port-forwards take no more connections");
                self.pools.leave(&pod);
            }
        }
    }

    /// Has port-forwards to a few ready pods opened, where somebody asks for the Service: the next request to another of its
    /// pods, and the first to one that has just become ready, find a way there.
    fn prepare(&self, endpoints: &[Arc<Endpoint>]) {
        if self.writer.idle(&self.name) > LATELY {
            return;
        }
        let useful =
            |endpoint: &&Arc<Endpoint>| endpoint.ready && !endpoint.terminating && !endpoint.ports.is_empty();
        for endpoint in endpoints.iter().filter(useful).take(PREPARED) {
            self.pools.prepare(&endpoint.pod);
        }
    }

    fn tell(&mut self, answer: Result<View, LookupError>) {
        self.told = match (&answer, self.told) {
            (Ok(_), _) => Told::View,
            // The first of several errors counts: what led to it is looked into anew by another follower.
            (Err(_), Told::Error(since)) => Told::Error(since),
            (Err(_), Told::Nothing | Told::View) => Told::Error(Instant::now()),
        };
        if answer.is_err() {
            self.outage = Outage::default();
        }
        self.writer.answer(&self.name, answer);
    }

    fn fail(&mut self, source: Source, error: &kube::Error) {
        let lookup = error::lookup_error(error);
        if self.told != Told::View {
            debug!(service = %self.name, error = lookup.message, "lookup failed");
            match lookup.kind {
                LookupErrorKind::Unavailable => self.writer.trouble(&self.name, lookup),
                _ => self.tell(Err(lookup)),
            }
        } else if self.outage.failed(source, lookup.clone(), Instant::now()) {
            warn!(service = %self.name, error = lookup.message, "cannot follow the service; what was last known stands");
        } else {
            debug!(service = %self.name, error = lookup.message, "still cannot follow the service");
        }
    }
}

/// Returns when a Service stops being followed as things stand. An error is asked for anew now and then even if it is used all
/// the time: a role that was granted meanwhile may open a way that was given up.
fn end(told: Told, idle: Duration, idle_timeout: Duration, now: Instant) -> Instant {
    match told {
        Told::Nothing => now + NEGATIVE_TTL.saturating_sub(idle),
        Told::View => now + idle_timeout.saturating_sub(idle),
        Told::Error(since) => since + NEGATIVE_TTL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_lasts_while_it_is_used_and_an_error_does_not() {
        let now = Instant::now();
        let (minute, second) = (Duration::from_mins(1), Duration::from_secs(1));
        assert_eq!(end(Told::View, Duration::ZERO, minute, now), now + minute);
        assert_eq!(end(Told::View, minute + second, minute, now), now);
        assert_eq!(
            end(Told::Nothing, second, minute, now),
            now + NEGATIVE_TTL - second
        );
        let told = Told::Error(now);
        let later = now + NEGATIVE_TTL - second;
        assert_eq!(end(told, Duration::ZERO, minute, later), now + NEGATIVE_TTL);
    }
}
