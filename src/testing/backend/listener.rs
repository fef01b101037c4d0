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

/// What an accepted connection is held by. It counts as open while any clone of this lives.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// Ends it.
    ended: CancellationToken,
    /// Counts it.
    open: Arc<Open>,
}

/// Counts a connection while it lives.
#[derive(Debug)]
struct Open(Arc<Shared>);

impl Listener {
    /// Binds a free port and hands each connection to `serve`.
    pub(super) fn start<F>(serve: impl Fn(TcpStream, Connection) -> F + Send + 'static) -> io::Result<Self>
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

impl Connection {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.open.fetch_add(1, Ordering::Relaxed);
        Self {
            ended: lock(&shared.live).child_token(),
            open: Arc::new(Open(shared.clone())),
        }
    }

    /// Runs a task that keeps the connection open, and ends when it is cut.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let Self { ended, open } = self.clone();
        self.tasks().spawn(async move {
            tokio::select! {
                () = task => {}
                () = ended.cancelled() => {}
            }
            drop(open);
        });
    }

    /// Every task of the listener.
    pub(super) fn tasks(&self) -> &TaskTracker {
        &self.open.0.tasks
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

async fn accept<F>(socket: TcpListener, shared: Arc<Shared>, serve: impl Fn(TcpStream, Connection) -> F)
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
        let connection = Connection::new(&shared);
        connection.spawn(serve(stream, connection.clone()));
    }
}
