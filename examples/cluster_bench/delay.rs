//! A longer way to the API server: a relay that holds every piece of bytes for half of the added round trip, or swallows it.

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::aside::Aside;

/// Pieces that may be on their way in one direction: what a long line holds.
const UNDER_WAY: usize = 1024;

/// A relay, and the kubeconfig that leads through it.
#[derive(Debug)]
pub(crate) struct Delayed {
    folder: TempDir,
    /// How often connections have been swallowed.
    swallowed: Arc<AtomicUsize>,
    _relay: Aside,
}

impl Delayed {
    /// Starts a relay to the cluster of the environment.
    pub(crate) fn start(round_trip: Duration) -> Result<Self> {
        let view = Command::new("kubectl")
            .args(["config", "view", "--raw", "--flatten", "--minify", "-o", "json"])
            .output()?;
        ensure!(view.status.success(), "kubectl config view failed");
        let mut kubeconfig: Value = serde_json::from_slice(&view.stdout)?;
        let cluster = kubeconfig
            .pointer_mut("/clusters/0/cluster")
            .context("a kubeconfig without a cluster")?;
        let server: http::Uri = cluster["server"].as_str().context("no server")?.parse()?;
        let host = server.host().context("a server without a host")?.to_owned();
        let upstream = format!("{host}:{}", server.port_u16().unwrap_or(443));
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        // The certificate is the server's, not the relay's.
        cluster["tls-server-name"] = json!(host);
        cluster["server"] = json!(format!("https://{address}"));
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("kubeconfig"), kubeconfig.to_string())?;
        let swallowed = Arc::default();
        let way = Way {
            upstream,
            half: round_trip / 2,
            swallowed: Arc::clone(&swallowed),
        };
        let relay = Aside::start(move || accept(listener, way))?;
        Ok(Self {
            folder,
            swallowed,
            _relay: relay,
        })
    }

    /// Returns the kubeconfig that leads through the relay.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Has the connections that there are pass nothing any more, their ends neither.
    pub(crate) fn swallow(&self) {
        self.swallowed.fetch_add(1, Ordering::SeqCst);
    }
}

/// What all connections of a relay have in common.
#[derive(Clone)]
struct Way {
    upstream: String,
    half: Duration,
    swallowed: Arc<AtomicUsize>,
}

async fn accept(listener: std::net::TcpListener, way: Way) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let way = way.clone();
        connections.spawn(async move {
            // An end of one side reaches the other; what else goes wrong the measured program sees.
            drop(connect(client, way).await);
        });
    }
}

async fn connect(client: TcpStream, way: Way) -> io::Result<()> {
    let Way {
        upstream,
        half,
        swallowed,
    } = way;
    let before = swallowed.load(Ordering::SeqCst);
    let swallows = || swallowed.load(Ordering::SeqCst) != before;
    // The handshake of TCP takes a round trip, too: the client's first bytes come that much later.
    sleep_until(Instant::now() + 2 * half).await;
    let server = TcpStream::connect(upstream).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::try_join!(
        hold(&mut from_client, &mut to_server, half, &swallows),
        hold(&mut from_server, &mut to_client, half, &swallows),
    )?;
    Ok(())
}

/// Passes on what comes, and at last its end, `half` of a round trip later.
async fn hold(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    half: Duration,
    swallows: &impl Fn() -> bool,
) -> io::Result<()> {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let take = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = from.read(&mut buffer).await;
            if swallows() {
                match read {
                    Ok(1..) => continue,
                    Ok(0) | Err(_) => std::future::pending().await,
                }
            }
            let length = read?;
            let piece = (Instant::now() + half, buffer[..length].to_vec());
            if length == 0 || sender.send(piece).await.is_err() {
                drop(sender);
                return Ok::<_, io::Error>(());
            }
        }
    };
    let give = async {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            to.write_all(&piece).await?;
        }
        sleep_until(Instant::now() + half).await;
        to.shutdown().await
    };
    tokio::try_join!(take, give)?;
    Ok(())
}
