//! A listening socket with its accept loop and its connections.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::testing::cluster::lock;

/// A bound port; dropping it ends the accept loop and every connection.
#[derive(Debug)]
pub(super) struct Listener {
    /// The bound address.
    address: SocketAddr,
    /// State shared with the accept loop.
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Connections accepted.
    accepted: AtomicU64,
    /// Connections that have not ended.
    open: AtomicUsize,
    /// Ends everything.
    stop: CancellationToken,
    /// Ends the connections of now.
    live: Mutex<CancellationToken>,
    /// Every task.
    tasks: TaskTracker,
}

impl Listener {
    /// Binds a free port and hands each connection to `serve`, which also gets the tracker for tasks of its own.
    pub(super) fn start<F>(serve: impl Fn(TcpStream, TaskTracker) -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        let socket = TcpListener::from_std(socket)?;
        let address = socket.local_addr()?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            accepted: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            live: Mutex::new(stop.child_token()),
            stop,
            tasks: TaskTracker::new(),
        });
        shared.tasks.spawn(accept(socket, shared.clone(), serve));
        Ok(Self { address, shared })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Connections that are open now.
    pub(super) fn open(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Cuts the connections that exist now.
    pub(super) fn close_connections(&self) {
        let old = std::mem::replace(&mut *lock(&self.shared.live), self.shared.stop.child_token());
        old.cancel();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

async fn accept<F>(socket: TcpListener, shared: Arc<Shared>, serve: impl Fn(TcpStream, TaskTracker) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = shared.stop.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let ended = lock(&shared.live).child_token();
        let connection = serve(stream, shared.tasks.clone());
        shared.open.fetch_add(1, Ordering::Relaxed);
        let counted = shared.clone();
        shared.tasks.spawn(async move {
            tokio::select! {
                () = connection => {}
                () = ended.cancelled() => {}
            }
            counted.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}
