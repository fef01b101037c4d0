//! What a connection feels of the others beside it: 16 bytes there and back, one at a time.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// That many neighbours.
    Here(Neighbour, usize),
    /// The same through another process of the contestant: what machine and cluster do to each other's share of a processor.
    Elsewhere(Neighbour, usize),
    /// One that connects at once after the pinging one: nothing is known of either yet.
    Twin(Neighbour),
}

/// What a neighbour does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Neighbour {
    /// Moves bytes, at full speed or so many in a second, which leaves the processors time.
    Bulk(Way, Option<u64>),
    /// Reads nothing of what the pod sends without end.
    StalledReader,
    /// Sends without end to a program in the pod that reads nothing.
    StalledUpload,
}

impl Neighbour {
    /// Returns the port of the test server that it goes to.
    fn port(self) -> u16 {
        match self {
            Self::Bulk(..) => 8080,
            Self::StalledReader => 9004,
            Self::StalledUpload => 9002,
        }
    }

    /// Does it until it is cut, or fails.
    async fn act(self, address: SocketAddr, host: &str) {
        match self {
            Self::Bulk(way, pace) => drop(bulk::stream(address, host, way, pace, &Cell::new(0)).await),
            Self::StalledReader => {
                let _connection = TcpStream::connect(address).await;
                std::future::pending().await
            }
            Self::StalledUpload => {
                if let Ok(mut connection) = TcpStream::connect(address).await {
                    let bytes = vec![0; 256 * 1024];
                    while connection.write_all(&bytes).await.is_ok() {}
                }
            }
        }
    }
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Pings {
    pub(crate) load: Load,
    /// Neighbours that ended before it did.
    pub(crate) left: usize,
}

/// Measures beside something, from its very beginning: what it does at first is felt, too.
/// `other`: the process that the neighbours go through.
pub(crate) async fn run(running: &Running, other: &Running, beside: Beside, time: Duration) -> Result<Pings> {
    let place = |port: u16| PORTS.iter().position(|known| *known == port).unwrap_or(0);
    // Its connection is there first, as that of somebody who is at work when the others come.
    let line = lines(running.address(place(9000)), &Ask::echo(16, true), 1).await?;
    if !matches!(beside, Beside::Twin(_)) {
        sleep(SETTLED).await;
    }
    let neighbours = match beside {
        Beside::Quiet => None,
        Beside::Here(neighbour, count) | Beside::Elsewhere(neighbour, count) => Some((neighbour, count)),
        Beside::Twin(neighbour) => Some((neighbour, 1)),
    };
    let left = Arc::new(AtomicUsize::new(0));
    let work = neighbours.map(|(neighbour, count)| {
        let left = left.clone();
        let (to, host) = (other.address(place(neighbour.port())), other.host.clone());
        Aside::start(move || async move {
            let one = |_| async {
                neighbour.act(to, &host).await;
                left.fetch_add(1, Ordering::Relaxed);
            };
            join_all((0..count).map(one)).await;
        })
    });
    let work = work.transpose()?;
    let load = repeat(line, time).await;
    let left = left.load(Ordering::Relaxed);
    drop(work);
    Ok(Pings { load, left })
}
