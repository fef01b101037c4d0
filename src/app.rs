//! The composition root: makes every component, joins them, and ends them in order. No logic of its own.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::drain::{Drain, Drained};
use crate::k8s::{Cluster, Discovery, PortForward};
use crate::privileges::Privileges;
use crate::proxy::{Listener, PodTls, Proxy, Tls};
use crate::registry;
use crate::tls::{self, CertificateAuthority};

/// What is left when the clients are gone has nothing to finish, only to unwind.
const BACKGROUND_GRACE: Duration = Duration::from_secs(2);

/// The program, bound and ready to run.
#[derive(Debug)]
pub struct App {
    proxy: Proxy,
    /// Clients' connections: they end first, by themselves if they can.
    clients: Drain,
    /// Everything that clients' connections need; ends after them.
    background: Drain,
    /// Cancelled when a part has ended without which the program is of no use.
    broken: CancellationToken,
    drain_timeout: Duration,
}

impl App {
    /// Binds the port, gives up the rights that only that needed, reads the kubeconfig and makes sure that the API server is
    /// there and lets us in.
    ///
    /// # Errors
    /// One line for the user: [`crate::proxy::BindError`], [`crate::privileges::Error`] or [`crate::k8s::ConnectionError`].
    pub async fn bind(config: &Config, privileges: Privileges) -> Result<Self> {
        let listener = privileges.raised(|| Listener::bind(&config.proxy.bind, config.proxy.port))??;
        privileges.give_up()?;
        let cluster = Cluster::load(&config.k8s).await?;
        let version = cluster.check().await?;
        info!(server = cluster.url(), version, "connected to the cluster");

        let (clients, background) = (Drain::new(), Drain::new());
        let (registry, writer, interests) = registry::channel(config.resolve_timeout);
        let forward = Arc::new(PortForward::new(&cluster, &config.k8s, &background));
        let discovery = Discovery::new(cluster, &config.k8s, writer, &forward);
        let broken = CancellationToken::new();
        let discovering = discovery.run(interests, background.clone());
        background.spawn(essential(discovering, broken.clone()));
        let proxy = Proxy::new(
            listener,
            &config.proxy,
            Tls {
                server: tls::server_config(authority(config)?)?,
                pods: PodTls::new(&config.backend_tls)?,
            },
            registry,
            forward,
            clients.clone(),
            &background,
        );
        for address in proxy.addresses() {
            info!(%address, "listening");
        }
        Ok(Self {
            proxy,
            clients,
            background,
            broken,
            drain_timeout: config.drain_timeout,
        })
    }

    /// Returns the addresses that clients may connect to.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.proxy.addresses()
    }

    /// Runs until `stop` resolves or an essential part has failed, then stops accepting, lets running requests end until the
    /// deadline, or until `now` resolves, and ends the rest.
    ///
    /// # Errors
    /// When a part has failed; why is in the log.
    pub async fn run(self, stop: impl Future<Output = ()>, now: impl Future<Output = ()>) -> Result<()> {
        let Self {
            proxy,
            clients,
            background,
            broken,
            drain_timeout,
        } = self;
        clients.spawn(essential(proxy.run(), broken.clone()));
        let failed = tokio::select! {
            () = stop => false,
            () = broken.cancelled() => true,
        };
        let draining = async {
            match clients.complete(drain_timeout).await {
                Drained::Gracefully => info!("every request was completed"),
                Drained::Forced(left) => warn!(tasks = left, "cut off at the deadline"),
            }
            background.complete(BACKGROUND_GRACE).await;
        };
        tokio::select! {
            () = draining => {}
            () = now => {
                // The requests are dropped, and with them their records, which would be lost with the process.
                clients.complete(Duration::ZERO).await;
                background.complete(Duration::ZERO).await;
            }
        }
        ensure!(!failed, "a part of the program has failed; the log says why");
        Ok(())
    }
}

/// Cancels `broken` when `task` has ended, in whatever way.
async fn essential(task: impl Future<Output = ()>, broken: CancellationToken) {
    let _ended = broken.drop_guard();
    task.await;
}

/// Opens the certificate authority of this machine, or makes do with one that lives as long as the program.
fn authority(config: &Config) -> Result<CertificateAuthority> {
    let zone = &config.proxy.naming.zone;
    let Some(state) = &config.state_dir else {
        warn!("there is no home folder: certificates are signed by an authority that ends with this run");
        return Ok(CertificateAuthority::ephemeral(zone)?);
    };
    let folder = state.join("tls").join(zone.as_str());
    match CertificateAuthority::open(&folder, zone) {
        Ok(authority) => {
            let path = CertificateAuthority::certificate_path(&folder);
            info!(path = %path.display(), "certificates are signed by this authority; curl trusts it with --cacert");
            Ok(authority)
        }
        Err(error) => {
            warn!(%error, "certificates are signed by an authority that ends with this run");
            Ok(CertificateAuthority::ephemeral(zone)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_is_noticed() {
        let (drain, broken) = (Drain::new(), CancellationToken::new());
        drain.spawn(essential(async { panic!("on purpose") }, broken.clone()));
        broken.cancelled().await;
    }
}
