//! A Service as the proxy needs it, and the [`View`] that joins it with its endpoints.

use std::sync::Arc;
use std::time::Duration;

use crate::name::{PortRef, ServiceName};
use crate::registry::Endpoint;

/// What kind of Service it is, as far as reaching it differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceKind {
    /// Has a cluster IP (ClusterIP, NodePort, LoadBalancer).
    Virtual,
    /// `clusterIP: None`: its endpoints are addressed one by one.
    Headless,
    /// Stands for a DNS name outside the cluster.
    ExternalName(String),
}

/// The transport protocol of a Service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, the only one that a port-forward carries.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One port that a Service declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; a Service with one port may leave it empty.
    pub name: String,
    /// The number that clients use.
    pub number: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// `appProtocol`, such as `kubernetes.io/h2c` (KEP-3726).
    pub app_protocol: Option<String>,
    /// The pods' port, when no EndpointSlice says it.
    pub target: PortRef,
}

/// One Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// How it is reached.
    pub kind: ServiceKind,
    /// The ports it declares, in the order of the object.
    pub ports: Vec<ServicePort>,
    /// Whether it selects pods itself; without a selector somebody else writes its EndpointSlices.
    pub has_selector: bool,
    /// Whether endpoints count before they are ready (`publishNotReadyAddresses`).
    pub publish_not_ready: bool,
    /// For how long after its last request a client's next one goes to the same endpoint (`sessionAffinity: ClientIP`);
    /// nothing when requests are spread one by one.
    pub affinity: Option<Duration>,
}

/// A Service and its endpoints at one moment.
#[derive(Debug, Clone)]
pub struct View {
    /// The Service.
    pub service: Service,
    /// All its endpoints, ready or not, ordered by pod so that equal states are equal.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Addresses, or names, that the Service sends to as well and that no pod is behind, in order.
    pub podless: Vec<Arc<str>>,
    /// Whether there has been an endpoint that serves since the Service is followed; kept by the registry.
    pub served: bool,
}

impl View {
    /// Reports whether an endpoint that serves may be expected soon: there are pods that are not ready, or there was one
    /// that was.
    #[must_use]
    pub fn is_between_pods(&self) -> bool {
        self.served || !self.endpoints.is_empty()
    }

    /// Reports whether `endpoint` may get new connections: ready, or published before it is ready, and not terminating.
    #[must_use]
    pub fn serves(&self, endpoint: &Endpoint) -> bool {
        !endpoint.terminating && (endpoint.ready || self.service.publish_not_ready)
    }
}
