//! What is known of the cluster: the Services that somebody asked for, and where their endpoints are.
//!
//! The registry holds what was asked for, never the cluster. [`Registry::resolve`] registers an [`Interest`] and waits for
//! the first answer; whoever serves the interests (module `k8s`) is the only writer, through [`Writer`].

mod affinity;
mod balance;
mod endpoint;
mod index;
mod service;

pub use affinity::Session;
pub use balance::Balancer;
pub use endpoint::{Endpoint, InFlight, Load, PodRef};
pub use index::{Interest, Known, LookupError, LookupErrorKind, Registry, Writer, channel};
pub use service::{Protocol, Service, ServiceKind, ServicePort, View};
