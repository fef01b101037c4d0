//! The Kubernetes side: reads the kubeconfig, follows the Services that were asked for, and opens port-forwards.
//!
//! Besides the test double, nothing else in the program sees a Kubernetes API type.

mod client;
mod convert;
mod credentials;
mod discovery;
mod error;
mod follow;
mod itself;
mod outage;
mod portforward;
mod proxy;
#[cfg(test)]
mod scripted;
mod token_file;

pub use client::{Cluster, Config, ConnectionError};
pub use discovery::Discovery;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub use portforward::bare;
pub use portforward::{Carriers, PortForward, SlowReaders};
