//! The parts of a port-forward without a cluster: for the fuzz targets, benches and measurements of this package. Nothing
//! that another program may build upon.

use std::fmt;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::drain::Drain;
use crate::k8s::Cluster;
use crate::k8s::portforward::carrier::{self, Upgrade};
use crate::k8s::portforward::spdy;
pub use crate::k8s::portforward::spdy::bare::{Codec, Machine};
use crate::k8s::portforward::spdy::{Phase, SlowReaders};
use crate::k8s::portforward::websocket::WebSocket;
use crate::registry::PodRef;
use crate::transport::{BoxStream, ConnectError};

/// A session on any connection.
pub struct Session(spdy::Session);

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Session").finish()
    }
}

impl Session {
    /// Starts a session to a pod of which nothing is known. Its task runs under `drain`.
    pub fn start<S>(io: S, drain: &Drain) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self(spdy::Session::start(
            io,
            std::sync::Arc::default(),
            SlowReaders::default(),
            std::sync::Arc::default(),
            drain,
        ))
    }

    /// Opens a connection to a port.
    #[must_use]
    pub fn connect(&self, port: u16) -> BoxStream {
        Box::new(self.0.connect(port, false))
    }

    /// Tells why the session has ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<String> {
        match &*self.0.phase().borrow() {
            Phase::Ended(reason) => Some(reason.to_string()),
            Phase::Unproven | Phase::Proven => None,
        }
    }
}

/// Takes the byte stream out of a WebSocket tunnel, from the first byte after the upgrade on.
pub fn tunnel<S>(io: S) -> impl AsyncRead + AsyncWrite + Send + Unpin
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    WebSocket::tunnel(io)
}

/// Upgrades one connection to a pod, on which SPDY is to be spoken.
///
/// # Errors
/// When the API server refuses, or takes longer than `timeout`.
pub async fn upgrade(
    cluster: &Cluster,
    pod: &PodRef,
    timeout: Duration,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, ConnectError> {
    let upgraded = carrier::upgrade(&cluster.client, Upgrade::Spdy, pod, timeout).await;
    upgraded.map_err(|refusal| refusal.error)
}
