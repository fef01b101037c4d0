//! The proxy: one listener, whose connections are told apart by their first bytes, and whose requests go to pods by the
//! Service that their host names.

mod admission;
mod body;
mod connection;
mod cors;
pub mod detect;
mod error;
mod front;
mod h2c;
mod http;
mod limits;
mod listener;
mod notice;
mod own;
mod replay;
mod reply;
mod retry;
mod route;
mod socket;
mod tcp;
mod upstream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use crate::drain::Drain;
use crate::files;
use crate::name::Naming;
use crate::proxy::admission::Admission;
use crate::proxy::socket::{Reset, Socket};
use crate::registry::{Balancer, Registry};
use crate::traffic::AccessLog;
use crate::transport::Connect;

pub use cors::AllowOrigin;
pub use error::{Error, Reply};
pub use limits::Limits;
pub use listener::{Bind, BindError, Listener};
pub use retry::RetryPolicy;
pub use tcp::{Carried, relay};
pub use upstream::PodTls;

/// Settings of the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen.
    pub bind: Bind,
    /// The one port; 0 takes any free one.
    pub port: u16,
    /// How host names are read.
    pub naming: Naming,
    /// What is tried again.
    pub retry: RetryPolicy,
    /// How long a request waits while a Service is between pods.
    pub ready_timeout: Duration,
    /// Which origins may read the responses of backends that say nothing about it.
    pub cors: AllowOrigin,
    /// Whether requests tell the pod about the client (`X-Forwarded-*`, `Via`).
    pub forwarded_headers: bool,
    /// How long a client may take to say which protocol it speaks, and to send the headers of a request.
    pub header_timeout: Duration,
    /// How long a connection to a pod is kept without use.
    pub idle_timeout: Duration,
    /// How much is taken on at the same time.
    pub limits: Limits,
}

/// Both sides of TLS.
#[derive(Debug)]
pub struct Tls {
    /// Towards clients.
    pub server: Arc<ServerConfig>,
    /// Towards pods.
    pub pods: PodTls,
}

/// What every request needs.
#[derive(Debug)]
struct Context {
    naming: Naming,
    retry: RetryPolicy,
    ready_timeout: Duration,
    cors: AllowOrigin,
    forwarded_headers: bool,
    header_timeout: Duration,
    limits: Limits,
    /// The server's side of TLS.
    tls: Arc<ServerConfig>,
    registry: Registry,
    upstream: upstream::Upstream,
    /// Chooses among endpoints.
    balancer: Balancer,
    /// Opens the records of requests.
    log: AccessLog,
    /// The connections of clients, which are what shutdown waits for.
    clients: Drain,
}

/// A proxy whose listeners are bound.
#[derive(Debug)]
pub struct Proxy {
    listener: Listener,
    context: Arc<Context>,
}

impl Proxy {
    /// Puts the proxy together. Clients' connections run under `clients`; those to pods run under `pods`, which must be
    /// drained afterwards.
    #[must_use]
    pub fn new(
        listener: Listener,
        config: &Config,
        tls: Tls,
        registry: Registry,
        connect: Arc<dyn Connect>,
        clients: Drain,
        pods: &Drain,
    ) -> Self {
        let log = AccessLog::default();
        clients.spawn(log.clone().run(clients.clone()));
        let context = Context {
            naming: config.naming.clone(),
            retry: config.retry,
            ready_timeout: config.ready_timeout,
            cors: config.cors.clone(),
            forwarded_headers: config.forwarded_headers,
            header_timeout: config.header_timeout,
            limits: config.limits.clone(),
            tls: tls.server,
            registry,
            upstream: upstream::Upstream::new(
                connect,
                tls.pods,
                config.idle_timeout,
                config.limits.clone(),
                config.ready_timeout,
                pods,
            ),
            balancer: Balancer::default(),
            log,
            clients,
        };
        Self {
            listener,
            context: Arc::new(context),
        }
    }

    /// Returns the addresses that clients may connect to.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listener.addresses()
    }

    /// Serves one client on a stream of any make until it ends, as [`run`](Self::run) does on each that it accepts: what
    /// tests and fuzz targets do without a socket.
    #[doc(hidden)]
    pub fn serve<S>(&self, stream: S, client: SocketAddr) -> impl Future<Output = ()> + Send + use<S>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let ends = connection::Ends {
            client,
            local: self.addresses().first().copied().unwrap_or(client),
            reset: Reset::default(),
        };
        connection::serve(self.context.clone(), stream, ends, None)
    }

    /// Accepts clients until their drain starts. Their connections go on until they end or the drain is forced.
    pub async fn run(self) {
        let Self { listener, context } = self;
        let clients = context.clients.clone();
        let limit = context.limits.connections(files::limit());
        debug!(limit, "connections of clients");
        let admission = Admission::new(limit, context.limits.connections_per_client);
        listener
            .run(&clients, &admission, move |stream, client, admitted| {
                let context = context.clone();
                async move {
                    match stream.local_addr() {
                        Ok(local) => {
                            let reset = Reset::default();
                            let stream = Socket::new(stream, reset.clone());
                            let ends = connection::Ends { client, local, reset };
                            connection::serve(context, stream, ends, Some(admitted)).await;
                        }
                        Err(error) => debug!(%client, %error, "closed: the connection has ended already"),
                    }
                }
            })
            .await;
    }
}
