//! What a connection feels of the others beside it: 16 bytes there and back, one at a time.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use futures_util::future::join_all;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::aside::Aside;
use crate::bulk::{self, Way};
use crate::contestant::Running;
use crate::load::{Ask, Load, lines, repeat};

/// The ports of the test server that a contestant carries here, in the order of [`Running::address`].
pub(crate) const PORTS: [u16; 4] = [8080, 9000, 9002, 9004];

/// How long the pinging connection is open before its neighbours come.
const SETTLED: Duration = Duration::from_millis(1500);

/// What goes on beside.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Beside {
    /// Nothing.
    Quiet,
    /// One stream of bytes at full speed.
    Bulk(Way),
    /// The same through another process of the contestant: what machine and cluster do to each other's share of a processor.
    Elsewhere(Way),
    /// Clients that read nothing of what the pod sends without end.
    StalledReaders(usize),
    /// The same through another process of the contestant.
    StalledElsewhere(usize),
    /// One such client that connects at once after the pinging one: nothing is known of either yet.
    StalledTwin,
    /// A program in the pod that reads nothing of what its client sends without end.
    StalledApp,
}

/// Measures beside something, from its very beginning: what it does at first is felt, too.
/// `other`: the process that the neighbours go through.
pub(crate) async fn run(running: &Running, other: &Running, beside: Beside, time: Duration) -> Result<Load> {
    let place = |port: u16| PORTS.iter().position(|known| *known == port).unwrap_or(0);
    let address = |port| other.address(place(port));
    // Its connection is there first, as that of somebody who is at work when the others come.
    let line = lines(running.address(place(9000)), &Ask::echo(16, true), 1).await?;
    if !matches!(beside, Beside::StalledTwin) {
        sleep(SETTLED).await;
    }
    let neighbour = match beside {
        Beside::Quiet => None,
        Beside::Bulk(way) | Beside::Elsewhere(way) => {
            let (to, host) = (address(8080), running.host.clone());
            let work = move || async move { drop(bulk::stream(to, &host, way, &Cell::new(0)).await) };
            Some(Aside::start(work)?)
        }
        Beside::StalledReaders(count) | Beside::StalledElsewhere(count) => Some(Aside::start({
            let to = address(9004);
            move || stall_readers(to, count)
        })?),
        Beside::StalledTwin => Some(Aside::start({
            let to = address(9004);
            move || stall_readers(to, 1)
        })?),
        Beside::StalledApp => Some(Aside::start({
            let to = address(9002);
            move || stall_app(to)
        })?),
    };
    let load = repeat(line, time).await;
    drop(neighbour);
    Ok(load)
}

async fn stall_readers(address: SocketAddr, count: usize) {
    let _connections = join_all((0..count).map(|_| TcpStream::connect(address))).await;
    std::future::pending().await
}

async fn stall_app(address: SocketAddr) {
    if let Ok(mut connection) = TcpStream::connect(address).await {
        let bytes = vec![0; 256 * 1024];
        while connection.write_all(&bytes).await.is_ok() {}
    }
}
