//! The pod's side of a port-forward, as the container runtime plays it.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::testing::cluster::Cluster;
use crate::testing::faults::ForwardFault;

/// Bytes read from the pod at once: Go's copy buffer, which is what real clients see.
const READ_SIZE: usize = 32 * 1024;

/// Bytes that fit into the socket buffers of a connection nobody reads.
const STALLED_BUFFER: usize = 256 * 1024;

/// A pod that connections are forwarded to.
#[derive(Debug)]
pub(super) struct Pod {
    /// The cluster that knows routes and faults.
    cluster: Arc<Cluster>,
    /// Namespace of the pod.
    namespace: String,
    /// Name of the pod.
    name: String,
    /// Sandbox id, which runtimes put into their messages.
    sandbox: String,
}

impl Pod {
    /// Names a pod.
    pub(super) fn new(cluster: Arc<Cluster>, namespace: &str, name: &str) -> Self {
        let sandbox = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        Self {
            cluster,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sandbox,
        }
    }

    /// Connects to a container port and moves bytes both ways until the runtime would stop; the error is the text
    /// for the error stream.
    ///
    /// `frame` turns bytes from the pod into what the carrier sends. The end of `from_client` is the client's FIN.
    pub(super) async fn forward<T: Send>(
        &self,
        port: u16,
        from_client: mpsc::Receiver<Bytes>,
        to_client: &mpsc::Sender<T>,
        frame: impl Fn(Bytes) -> T + Send,
    ) -> Result<(), String> {
        self.try_forward(port, from_client, to_client, frame)
            .await
            .map_err(|cause| {
                format!(
                    "error forwarding port {port} to pod {}, uid : {cause}",
                    self.sandbox
                )
            })
    }

    async fn try_forward<T: Send>(
        &self,
        port: u16,
        mut from_client: mpsc::Receiver<Bytes>,
        to_client: &mpsc::Sender<T>,
        frame: impl Fn(Bytes) -> T + Send,
    ) -> Result<(), String> {
        match self.cluster.faults.forward(&self.namespace, &self.name) {
            Some(ForwardFault::Refused) => return Err(self.refused(port, "connection refused")),
            Some(ForwardFault::Runtime(text)) => return Err(text),
            Some(ForwardFault::Stalled) => {
                stall(from_client).await;
                tokio::time::sleep(self.close_grace()).await;
                return Ok(());
            }
            Some(ForwardFault::Reset) => {
                from_client.recv().await;
                let peers = format!("127.0.0.1:49152->127.0.0.1:{port}");
                return Err(self.in_namespace(&format!("read tcp4 {peers}: read: connection reset by peer")));
            }
            Some(ForwardFault::PodGone | ForwardFault::Upgrade(_)) | None => {}
        }
        let Some(address) = self.cluster.route(&self.namespace, &self.name, port) else {
            return Err(self.refused(port, "connection refused"));
        };
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| self.refused(port, go_error(&error)))?;
        stream
            .set_nodelay(true)
            .map_err(|error| self.in_namespace(&error))?;
        let (read, write) = stream.into_split();
        let up = upload(from_client, write);
        let down = download(read, to_client, frame);
        tokio::pin!(up, down);
        // containerd: wait for one direction, give the other a moment, then close everything; never a half-close
        // towards the pod.
        let grace = self.close_grace();
        let (first, second) = tokio::select! {
            first = &mut up => (first, timeout(grace, &mut down).await),
            first = &mut down => (first, timeout(grace, &mut up).await),
        };
        first
            .and(second.unwrap_or(Ok(())))
            .map_err(|error| self.in_namespace(&go_error(&error)))
    }

    /// How long the second direction may outlive the first.
    pub(super) fn close_grace(&self) -> Duration {
        self.cluster.faults.close_grace()
    }

    /// The text of a failed dial (`containerd:internal/cri/server/sandbox_portforward_linux.go`).
    fn refused(&self, port: u16, cause: &str) -> String {
        self.in_namespace(&format!(
            "failed to connect to localhost:{port} inside namespace \"{}\", IPv4: dial tcp4 127.0.0.1:{port}: \
             connect: {cause} IPv6 dial tcp6 [::1]:{port}: connect: {cause} ",
            self.sandbox
        ))
    }

    fn in_namespace(&self, cause: &impl Display) -> String {
        let netns = format!(
            "/var/run/netns/cni-{}",
            self.sandbox.get(..16).unwrap_or_default()
        );
        format!("failed to execute portforward in network namespace \"{netns}\": {cause}")
    }
}

/// A connected application that never reads: the kernel takes some bytes, then nothing moves.
async fn stall(mut from_client: mpsc::Receiver<Bytes>) {
    let mut taken = 0;
    while let Some(bytes) = from_client.recv().await {
        taken += bytes.len();
        if taken > STALLED_BUFFER {
            // Nobody will read on; the session's end cancels this.
            std::future::pending::<()>().await;
        }
    }
}

async fn upload(mut from_client: mpsc::Receiver<Bytes>, mut pod: OwnedWriteHalf) -> io::Result<()> {
    let result = async {
        while let Some(bytes) = from_client.recv().await {
            pod.write_all(&bytes).await?;
        }
        Ok(())
    }
    .await;
    // The write half must outlive the download: dropping it would be a half-close.
    pod.forget();
    result
}

async fn download<T>(
    mut pod: OwnedReadHalf,
    to_client: &mpsc::Sender<T>,
    frame: impl Fn(Bytes) -> T,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ_SIZE);
        if pod.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        if to_client.send(frame(buffer.split().freeze())).await.is_err() {
            return Ok(());
        }
    }
}

/// The words Go uses for a socket error.
fn go_error(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset => "connection reset by peer",
        io::ErrorKind::BrokenPipe => "broken pipe",
        io::ErrorKind::TimedOut => "connection timed out",
        _ => "input/output error",
    }
}
