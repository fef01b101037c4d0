//! Serves the registry's interests: each Service that somebody asked for is followed until nobody asks any more.
//!
//! A Service and its EndpointSlices are asked for at the same time. Users who may not read EndpointSlices get the endpoints
//! from the pods that the Service selects.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service as KubeService};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::k8s::convert::{self, Loads};
use crate::k8s::error::{self, Kind};
use crate::k8s::follow::{Following, Selection, follow};
use crate::k8s::{Cluster, Config};
use crate::name::ServiceName;
use crate::registry::{Interest, LookupError, LookupErrorKind, View, Writer};

/// The label by which EndpointSlices name their Service (discovery/v1).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// How long the answer "there is none" or "you may not" stands without being asked again.
const NEGATIVE_TTL: Duration = Duration::from_secs(5);

/// Serves interests until the drain starts.
#[derive(Debug)]
pub struct Discovery {
    cluster: Cluster,
    poll_interval: Duration,
    idle_timeout: Duration,
    writer: Arc<Writer>,
}

impl Discovery {
    /// Makes the server of `writer`'s interests.
    #[must_use]
    pub fn new(cluster: Cluster, config: &Config, writer: Writer) -> Self {
        Self {
            cluster,
            poll_interval: config.poll_interval,
            idle_timeout: config.idle_timeout,
            writer: Arc::new(writer),
        }
    }

    /// Runs until `drain` starts.
    pub async fn run(self, mut interests: mpsc::UnboundedReceiver<Interest>, drain: Drain) {
        let mut followers = JoinSet::new();
        let mut rechecks: HashMap<ServiceName, Arc<Notify>> = HashMap::new();
        loop {
            tokio::select! {
                () = drain.started() => return,
                interest = interests.recv() => match interest {
                    None => return,
                    Some(Interest::Recheck(service)) => {
                        if let Some(recheck) = rechecks.get(&service) {
                            recheck.notify_one();
                        }
                    }
                    Some(Interest::Follow(service)) if rechecks.contains_key(&service) => {}
                    Some(Interest::Follow(service)) => {
                        let recheck = Arc::new(Notify::new());
                        rechecks.insert(service.clone(), recheck.clone());
                        self.writer.begin(&service);
                        followers.spawn(self.follower(service, recheck).run());
                    }
                },
                Some(ended) = followers.join_next() => {
                    let service = ended.expect("a follower does not panic and is not aborted");
                    rechecks.remove(&service);
                    // Removed here and not by the follower, so that an interest that comes now starts a new one.
                    self.writer.remove(&service);
                }
            }
        }
    }

    fn follower(&self, name: ServiceName, recheck: Arc<Notify>) -> Follower {
        let namespace = name.namespace();
        let client = &self.cluster.client;
        let services: Api<KubeService> = Api::namespaced(client.clone(), namespace);
        let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
        let by_name = Selection::Name(name.name().into());
        let by_label = Selection::Labels(format!("{SERVICE_NAME}={}", name.name()));
        Follower {
            services: follow(services, by_name, self.poll_interval, recheck.clone()),
            endpoints: Endpoints::Slices(follow(slices, by_label, self.poll_interval, recheck.clone())),
            pods: Api::namespaced(client.clone(), namespace),
            poll_interval: self.poll_interval,
            idle_timeout: self.idle_timeout,
            recheck,
            writer: self.writer.clone(),
            object: None,
            listed: None,
            refused: None,
            loads: Loads::new(),
            answered: false,
            name,
        }
    }
}

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
    /// Nowhere yet: EndpointSlices are refused and the selector is not known.
    Unknown,
}

/// What the endpoints were made of last.
enum Listed {
    Slices(Vec<EndpointSlice>),
    Pods(Vec<Pod>),
}

/// Follows one Service.
struct Follower {
    name: ServiceName,
    services: Following<KubeService>,
    endpoints: Endpoints,
    pods: Api<Pod>,
    poll_interval: Duration,
    idle_timeout: Duration,
    recheck: Arc<Notify>,
    writer: Arc<Writer>,
    /// The Service as last seen: nothing yet, or none, or one.
    object: Option<Option<KubeService>>,
    /// The endpoints' objects as last seen.
    listed: Option<Listed>,
    /// Why EndpointSlices cannot be read.
    refused: Option<LookupError>,
    loads: Loads,
    /// Whether a positive answer was given, which passing failures then leave alone.
    answered: bool,
}

enum News {
    Service(Result<Vec<KubeService>, kube::Error>),
    Slices(Result<Vec<EndpointSlice>, kube::Error>),
    Pods(Result<Vec<Pod>, kube::Error>),
}

impl Follower {
    /// Runs until nobody used the answer for long enough; gives back the Service's name.
    async fn run(mut self) -> ServiceName {
        loop {
            let limit = if self.answered {
                self.idle_timeout
            } else {
                NEGATIVE_TTL
            };
            let Some(left) = limit
                .checked_sub(self.writer.idle(&self.name))
                .filter(|left| !left.is_zero())
            else {
                debug!(service = %self.name, "no longer followed: nobody asked for a while");
                return self.name;
            };
            if let Ok(news) = tokio::time::timeout(left, self.news()).await {
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
        match news {
            News::Service(Ok(found)) => {
                self.object = Some(found.into_iter().next());
                self.follow_pods();
            }
            News::Slices(Ok(slices)) => self.listed = Some(Listed::Slices(slices)),
            News::Pods(Ok(pods)) => self.listed = Some(Listed::Pods(pods)),
            News::Slices(Err(error)) if error::kind(&error) == Kind::Forbidden && !self.answered => {
                debug!(service = %self.name, reason = error::message(&error), "reading pods instead of EndpointSlices");
                self.refused = Some(error::lookup_error(&error));
                self.endpoints = Endpoints::Unknown;
                self.follow_pods();
            }
            News::Service(Err(error)) | News::Slices(Err(error)) | News::Pods(Err(error)) => {
                return self.fail(&error);
            }
        }
        self.answer();
    }

    /// Follows the pods of the Service's selector, where EndpointSlices are refused.
    fn follow_pods(&mut self) {
        let wanted = self
            .object
            .as_ref()
            .and_then(|object| convert::selector(object.as_ref()?));
        match (&self.endpoints, wanted) {
            (Endpoints::Slices(_), _) => {}
            (Endpoints::Pods { selector, .. }, Some(wanted)) if *selector == wanted => {}
            (_, Some(selector)) => {
                let selection = Selection::Labels(selector.clone());
                let following = follow(
                    self.pods.clone(),
                    selection,
                    self.poll_interval,
                    self.recheck.clone(),
                );
                self.endpoints = Endpoints::Pods { selector, following };
                self.listed = None;
            }
            (_, None) => self.endpoints = Endpoints::Unknown,
        }
    }

    /// Tells the registry what is known, once it is enough for an answer.
    fn answer(&mut self) {
        let Some(object) = &self.object else { return };
        let answer = match (object, &self.listed, &self.refused) {
            (None, ..) => Err(LookupError {
                kind: LookupErrorKind::NotFound,
                message: format!(
                    "services {:?} not found in namespace {:?}",
                    self.name.name(),
                    self.name.namespace()
                ),
            }),
            (Some(object), Some(listed), _) => {
                let service = convert::service(self.name.clone(), object);
                let endpoints = match listed {
                    Listed::Slices(slices) => convert::endpoints_from_slices(slices, &mut self.loads),
                    Listed::Pods(pods) => convert::endpoints_from_pods(&service, pods, &mut self.loads),
                };
                Ok(View { service, endpoints })
            }
            (Some(object), None, Some(refused)) if convert::selector(object).is_none() => Err(LookupError {
                kind: LookupErrorKind::Forbidden,
                message: format!(
                    "{}; a Service without a selector has its endpoints nowhere else",
                    refused.message
                ),
            }),
            (Some(_), None, _) => return,
        };
        self.answered = answer.is_ok();
        self.writer.answer(&self.name, answer);
    }

    fn fail(&mut self, error: &kube::Error) {
        let lookup = error::lookup_error(error);
        let passing = error::kind(error) == Kind::Unavailable;
        if self.answered {
            warn!(service = %self.name, error = lookup.message, "cannot follow the service; what was last known stands");
        } else if passing {
            debug!(service = %self.name, error = lookup.message, "lookup failed, trying again");
            self.writer.trouble(&self.name, lookup);
        } else {
            self.writer.answer(&self.name, Err(lookup));
        }
    }
}
