//! The pod's side of a port-forward, as the container runtime plays it.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::closing::End;
use crate::testing::ContainerRuntime;
use crate::testing::cluster::{Cluster, pause};
use crate::testing::faults::{ForwardFault, STALLED_SOCKET};

/// Bytes copied at once, either way: Go's copy buffer, which is what real clients see.
const COPY_SIZE: usize = 32 * 1024;

/// A pod that connections are forwarded to.
#[derive(Debug)]
pub(super) struct Pod {
    /// The cluster that knows routes and faults.
    pub(super) cluster: Arc<Cluster>,
    /// Namespace of the pod.
    namespace: String,
    /// Name of the pod.
    name: String,
    /// Sandbox id, which runtimes put into their messages.
    sandbox: String,
    /// Cancelled when the sandbox ends. A later pod of the same name has another.
    ended: CancellationToken,
}

/// The client's end of one forwarded connection, as a carrier offers it.
pub(super) trait Client: Sync {
    /// The client's next bytes; `None` once it has sent FIN or is gone. Cancel-safe.
    fn read(&self) -> impl Future<Output = Option<Bytes>> + Send;

    /// Sends bytes to the client.
    fn write(&self, bytes: Bytes) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// Nothing reaches the client any more.
#[derive(Debug)]
pub(super) struct Gone;

/// How a forwarded connection came to its end.
#[derive(Debug)]
pub(super) struct Outcome {
    /// What the carrier has to tell the client.
    pub(super) end: End,
    /// The copier towards the pod still waits for the client's bytes. It takes what comes next before it finds that its
    /// socket is gone.
    pub(super) reading: bool,
}

impl Pod {
    /// Names a pod, whose sandbox lives until `ended`.
    pub(super) fn new(cluster: Arc<Cluster>, namespace: &str, name: &str, ended: CancellationToken) -> Self {
        let sandbox = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        Self {
            cluster,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sandbox,
            ended,
        }
    }

    /// Connects to a container port and moves bytes both ways until the runtime would stop.
    pub(super) async fn forward(&self, port: u16, client: &impl Client) -> Outcome {
        let reading = AtomicBool::new(false);
        let end = match self.try_forward(port, client, &reading).await {
            Ok(()) => End::Clean,
            Err(failure) => {
                let Failure { reset, cause } = failure;
                let text = format!(
                    "error forwarding port {port} to pod {}, uid : {cause}",
                    self.sandbox
                );
                if reset {
                    End::Reset(text)
                } else {
                    End::Failed(text)
                }
            }
        };
        Outcome {
            end,
            reading: reading.into_inner(),
        }
    }

    async fn try_forward(
        &self,
        port: u16,
        client: &impl Client,
        reading: &AtomicBool,
    ) -> Result<(), Failure> {
        if self.ended.is_cancelled() {
            return Err(self.sandbox_gone());
        }
        match self.fault(port) {
            Some(ForwardFault::Refused) => return Err(self.refused(port, "connection refused")),
            Some(ForwardFault::Runtime(cause)) => return Err(Failure { reset: false, cause }),
            Some(ForwardFault::Reset) => {
                let error = io::ErrorKind::ConnectionReset.into();
                client.read().await;
                // Bytes that come now break the other direction as well, which ends the wait.
                let _ = timeout(self.close_grace(), client.read()).await;
                return Err(self.broken(port, &error));
            }
            _ => {}
        }
        let Some(address) = self.cluster.route(&self.namespace, &self.name, port) else {
            return Err(self.refused(port, "connection refused"));
        };
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| self.refused(port, go_error(&error)))?;
        stream
            .set_nodelay(true)
            .map_err(|error| self.broken(port, &error))?;
        let _counted = self.cluster.forwards.connected();
        let (read, write) = stream.into_split();
        let up = self.upload(port, client, write, reading);
        let down = self.download(port, read, client);
        tokio::pin!(up, down);
        let moved = async {
            if self.cluster.runtime().waits_for_both_directions() {
                let (up, down) = tokio::join!(&mut up, &mut down);
                up.and(down)
            } else {
                // Wait for one direction, give the other a moment, then close everything; never a half-close towards the
                // pod.
                let grace = self.close_grace();
                let (first, second) = tokio::select! {
                    first = &mut up => (first, timeout(grace, &mut down).await),
                    first = &mut down => (first, timeout(grace, &mut up).await),
                };
                first.and(second.unwrap_or(Ok(())))
            }
        };
        let ended = tokio::select! {
            ended = moved => ended,
            () = self.sandbox_ends() => Ok(()),
        };
        ended.map_err(|error| self.broken(port, &error))
    }

    /// Waits until the sandbox and everything in it has ended, and the runtime has given the other direction its moment.
    async fn sandbox_ends(&self) {
        self.ended.cancelled().await;
        pause(self.close_grace()).await;
    }

    /// Counts a PING that came beside what is forwarded.
    pub(super) fn received_ping(&self) {
        self.cluster.forwards.count(|counts| counts.pings += 1);
    }

    /// How long the second direction may outlive the first.
    pub(super) fn close_grace(&self) -> Duration {
        self.cluster.faults.close_grace()
    }

    fn fault(&self, port: u16) -> Option<ForwardFault> {
        self.cluster
            .faults
            .port_forward(&self.namespace, &self.name, port)
    }

    fn reads_stalled(&self, port: u16) -> bool {
        matches!(
            self.fault(port),
            Some(ForwardFault::Stalled | ForwardFault::NotReading)
        )
    }

    fn writes_stalled(&self, port: u16) -> bool {
        matches!(
            self.fault(port),
            Some(ForwardFault::Stalled | ForwardFault::NotWriting)
        )
    }

    /// Copies from the client to the application.
    async fn upload(
        &self,
        port: u16,
        client: &impl Client,
        mut socket: OwnedWriteHalf,
        reading: &AtomicBool,
    ) -> io::Result<()> {
        let mut changes = self.cluster.faults.changes();
        // What a socket holds whose application does not read.
        let mut held = BytesMut::new();
        let result = async {
            loop {
                reading.store(true, Ordering::Relaxed);
                let bytes = loop {
                    tokio::select! {
                        bytes = client.read() => break bytes,
                        _ = changes.changed() => if !self.reads_stalled(port) {
                            socket.write_all_buf(&mut held).await?;
                        },
                    }
                };
                reading.store(false, Ordering::Relaxed);
                let Some(bytes) = bytes else {
                    return Ok(());
                };
                let length = bytes.len() as u64;
                self.cluster
                    .forwards
                    .count(|counts| counts.bytes_to_pods += length);
                for chunk in bytes.chunks(COPY_SIZE) {
                    while self.reads_stalled(port) && held.len() + chunk.len() > STALLED_SOCKET {
                        let _ = changes.changed().await;
                    }
                    if self.reads_stalled(port) {
                        held.extend_from_slice(chunk);
                    } else {
                        socket.write_all_buf(&mut held).await?;
                        socket.write_all(chunk).await?;
                    }
                }
            }
        }
        .await;
        // The write half must outlive the download: dropping it would be a half-close.
        socket.forget();
        result
    }

    /// Copies from the application to the client.
    async fn download(&self, port: u16, mut socket: OwnedReadHalf, client: &impl Client) -> io::Result<()> {
        let mut changes = self.cluster.faults.changes();
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(COPY_SIZE);
            let read = socket.read_buf(&mut buffer).await;
            while self.writes_stalled(port) {
                let _ = changes.changed().await;
            }
            let length = read? as u64;
            self.cluster
                .forwards
                .count(|counts| counts.bytes_from_pods += length);
            if length == 0 || client.write(buffer.split().freeze()).await.is_err() {
                return Ok(());
            }
        }
    }

    /// The text of a failed dial (`containerd:internal/cri/server/sandbox_portforward_linux.go`,
    /// `cri-o:internal/oci/runtime_oci_linux.go`, `kwok:pkg/kwok/server/debugging_port_forword.go`).
    fn refused(&self, port: u16, cause: &str) -> Failure {
        let sandbox = &self.sandbox;
        let cause = match self.cluster.runtime() {
            ContainerRuntime::Kwok => {
                format!("failed to dial 127.0.0.1:{port}: dial tcp 127.0.0.1:{port}: connect: {cause}")
            }
            ContainerRuntime::CriO => format!(
                "port forward into network namespace \"{}\": failed to connect to localhost:{port} inside namespace \
                 {sandbox}: dial tcp 127.0.0.1:{port}: connect: {cause}",
                self.network_namespace()
            ),
            _ => self.in_namespace(&format!(
                "failed to connect to localhost:{port} inside namespace \"{sandbox}\", IPv4: dial tcp4 \
                 127.0.0.1:{port}: connect: {cause} IPv6 dial tcp6 [::1]:{port}: connect: {cause} "
            )),
        };
        Failure { reset: false, cause }
    }

    /// The text of a sandbox that has ended (`containerd:internal/cri/server/sandbox_portforward_linux.go`,
    /// `cri-o:server/container_portforward.go`).
    fn sandbox_gone(&self) -> Failure {
        let sandbox = &self.sandbox;
        let cause = match self.cluster.runtime() {
            ContainerRuntime::CriO => format!("sandbox {sandbox} is not running"),
            _ => format!("network namespace for sandbox \"{sandbox}\" is closed"),
        };
        Failure { reset: false, cause }
    }

    /// The error of a connection that broke while it was forwarded.
    fn broken(&self, port: u16, error: &io::Error) -> Failure {
        let verb = match error.kind() {
            io::ErrorKind::BrokenPipe => "write",
            _ => "read",
        };
        let peers = format!("127.0.0.1:49152->127.0.0.1:{port}");
        Failure {
            reset: matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ),
            cause: self.in_namespace(&format!("{verb} tcp4 {peers}: {verb}: {}", go_error(error))),
        }
    }

    fn in_namespace(&self, cause: &impl Display) -> String {
        let netns = self.network_namespace();
        format!("failed to execute portforward in network namespace \"{netns}\": {cause}")
    }

    fn network_namespace(&self) -> String {
        format!(
            "/var/run/netns/cni-{}",
            self.sandbox.get(..16).unwrap_or_default()
        )
    }
}

/// Why a connection could not be forwarded, or no longer.
#[derive(Debug)]
struct Failure {
    /// The application's side reset it: EPIPE or ECONNRESET.
    reset: bool,
    /// The runtime's words.
    cause: String,
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
