//! Reaches every `service.namespace.svc.cluster.local` of a Kubernetes cluster through one local port.
//!
//! `ARCHITECTURE.md` tells the levels of these modules and one request's way through them; `tests/layering.rs` keeps them.

pub mod app;
pub mod cli;
pub mod config;
pub mod drain;
pub mod files;
pub mod k8s;
pub mod name;
pub mod privileges;
pub mod proxy;
pub mod registry;
pub mod runtime;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tls;
pub mod traffic;
pub mod transport;
