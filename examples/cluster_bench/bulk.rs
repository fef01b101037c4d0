//! Many bytes, in one direction or in both at once, over HTTP: the one protocol that all contestants carry.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};

use crate::contestant::Running;
use crate::profile::Profile;

/// More than any measurement moves.
const ENDLESS: u64 = 1 << 44;

/// Time for the streams to be opened and the buffers to fill, before anything counts.
const RAMP: Duration = Duration::from_millis(500);

/// The direction, as the client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// A download.
    Down,
    /// An upload.
    Up,
}

/// What went through.
#[derive(Debug)]
pub(crate) struct Moved {
    /// Bytes per second, in all directions together.
    pub(crate) rate: f64,
    /// Bytes per second in the slowest direction: a sum does not tell whether one of them starves.
    pub(crate) slowest: f64,
    /// How much, in GiB.
    pub(crate) amount: f64,
    /// Who took the processors meanwhile.
    pub(crate) profile: Profile,
}

/// Moves bytes in some directions at once, over that many streams in each.
pub(crate) async fn run(running: &Running, ways: &[Way], streams: usize, time: Duration) -> Result<Moved> {
    let address = running.address(0);
    let counts = vec![Cell::new(0); ways.len()];
    let work = ways.iter().zip(&counts).flat_map(|(way, count)| {
        let one = move |_| stream(address, &running.host, *way, None, count);
        (0..streams).map(one)
    });
    let work = try_join_all(work);
    let clock = async {
        sleep(RAMP).await;
        counts.iter().for_each(|count| count.set(0));
        let (begun, before) = (Instant::now(), running.profile()?);
        sleep(time).await;
        let seconds = begun.elapsed().as_secs_f64();
        let moved = || counts.iter().map(Cell::get);
        let (bytes, least) = (moved().sum::<u64>() as f64, moved().min().unwrap_or(0) as f64);
        ensure!(bytes > 0.0, "nothing was moved");
        Ok(Moved {
            rate: bytes / seconds,
            slowest: least / seconds,
            amount: bytes / f64::from(1 << 30),
            profile: running.profile()?.since(before)?,
        })
    };
    tokio::select! {
        ended = work => {
            ended?;
            Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
        }
        moved = clock => moved,
    }
}

/// Moves bytes over one connection until it fails, at most `pace` of them in a second, and adds them to `count`.
pub(crate) async fn stream(
    address: SocketAddr,
    host: &str,
    way: Way,
    pace: Option<u64>,
    count: &Cell<u64>,
) -> io::Result<()> {
    let mut connection = TcpStream::connect(address).await?;
    let request = match way {
        Way::Down => format!("GET /bytes/{ENDLESS} HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        Way::Up => {
            format!("POST /upload?hash=0 HTTP/1.1\r\nHost: {host}\r\nContent-Length: {ENDLESS}\r\n\r\n")
        }
    };
    connection.write_all(request.as_bytes()).await?;
    let mut buffer = vec![0; pace.map_or(256 * 1024, |_| 64 * 1024)];
    let (begun, mut moved) = (Instant::now(), 0);
    loop {
        if let Some(pace) = pace {
            sleep_until(begun + Duration::from_secs_f64(moved as f64 / pace as f64)).await;
        }
        let length = match way {
            Way::Down => connection.read(&mut buffer).await?,
            Way::Up => connection.write(&buffer).await?,
        };
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        moved += length as u64;
        count.set(count.get() + length as u64);
    }
}
