//! Port-forwards through the API server: many connections over few upgraded ones.
//!
//! A connection to a pod's port costs no round trip of its own once there is a session to the pod ([`pool`], [`placement`]),
//! and none disturbs another ([`spdy`]). How sessions get through the API server ([`carrier`], [`dial`]) is found out once
//! ([`memory`]), and how many are opened at a time depends on how it fares ([`gate`]).

#[cfg(feature = "internals")]
pub mod bare;
mod carrier;
mod cause;
mod channel;
mod dial;
mod gate;
mod liveness;
mod memory;
mod placement;
mod pool;
mod pools;
mod ports;
mod spdy;
mod turns;
mod websocket;

use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::drain::Drain;
use crate::k8s::{Cluster, Config};
use crate::transport::{BoxStream, Connect, ConnectError, Connecting, Target};

use carrier::Carrier;
pub use carrier::Carriers;
use dial::Dialer;
use memory::Memory;
use pool::Way;
pub(in crate::k8s) use pools::Pools;
pub use spdy::SlowReaders;
use turns::Turns;

/// Opens connections to pods.
pub struct PortForward {
    pools: Pools,
}

impl fmt::Debug for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortForward")
            .field("dialer", self.pools.dialer())
            .finish_non_exhaustive()
    }
}

impl PortForward {
    /// Makes the transport; nothing is opened yet. The configuration is that of the cluster: its `timeout` bounds one upgrade,
    /// sessions unused for its `idle_timeout` are closed. Its tasks run under `drain`.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    #[must_use]
    pub fn new(cluster: &Cluster, config: &Config, drain: &Drain) -> Self {
        let idle_timeout = config.idle_timeout;
        let dialer = Dialer::new(
            cluster.client.clone(),
            Memory::new(config.carriers),
            config.timeout,
            config.slow_readers,
            Turns::new(Handle::current().metrics().num_workers()),
            drain.clone(),
        );
        let pools = Pools::new(dialer, drain.clone());
        let this = Self { pools: pools.clone() };
        let waiting = drain.clone();
        drain.spawn(async move {
            tokio::select! {
                () = waiting.started() => {}
                () = sweep(&pools, idle_timeout) => {}
            }
            pools.close();
        });
        this
    }

    /// Returns the sessions, for whoever learns that a pod will be needed, or is ending.
    pub(in crate::k8s) fn pools(&self) -> Pools {
        self.pools.clone()
    }

    async fn open(&self, target: &Target) -> Result<BoxStream, ConnectError> {
        loop {
            let Some(pool) = self.pools.of(&target.pod) else {
                return Err(ConnectError::Unavailable("kube-tunnel is shutting down".into()));
            };
            let opened = match pool.connect(target.port).await? {
                Way::Stream(stream) => Ok(Box::new(stream) as BoxStream),
                Way::Single(single) => {
                    let opened = self.pools.dialer().open_single(target, single).await;
                    if !self.pools.dialer().carriers.works(Carrier::Channel) {
                        pool.reconsider();
                    }
                    opened
                }
                Way::Closed => continue,
            };
            self.pools.go_on();
            return opened;
        }
    }
}

impl Connect for PortForward {
    fn connect<'a>(&'a self, target: &'a Target) -> Connecting<'a> {
        Box::pin(self.open(target))
    }
}

/// Closes what is unused, at least each minute (contract G2).
async fn sweep(pools: &Pools, idle_timeout: Duration) {
    let period = (idle_timeout / 10).clamp(Duration::from_millis(10), Duration::from_mins(1));
    let mut ticks = tokio::time::interval(period);
    loop {
        ticks.tick().await;
        pools.expire(idle_timeout, Instant::now());
    }
}
