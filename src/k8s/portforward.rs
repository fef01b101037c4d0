//! Port-forwards through the API server's WebSocket channel protocol (`v4.channel.k8s.io`): one upgraded connection for
//! each stream, as the kube crate offers it. Works on every server version.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use crate::k8s::Cluster;
use crate::k8s::error::{self, Kind};
use crate::transport::{BoxStream, Connect, ConnectError, Connecting, Target};

/// Opens each stream as a port-forward of its own.
#[derive(Clone)]
pub struct ChannelForward {
    client: Client,
    timeout: Duration,
}

impl std::fmt::Debug for ChannelForward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelForward")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl ChannelForward {
    /// Makes the transport. `timeout` bounds one upgrade.
    #[must_use]
    pub fn new(cluster: &Cluster, timeout: Duration) -> Self {
        Self {
            client: cluster.client.clone(),
            timeout,
        }
    }

    async fn open(&self, target: &Target) -> Result<BoxStream, ConnectError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.pod.namespace);
        let ports = [target.port];
        let opening = pods.portforward(&target.pod.name, &ports);
        let mut forward = tokio::time::timeout(self.timeout, opening)
            .await
            .map_err(|_| ConnectError::Timeout(target.clone(), self.timeout))?
            .map_err(|error| connect_error(&error))?;
        let unavailable = || ConnectError::Unavailable("the port-forward has no stream".into());
        let stream = forward.take_stream(target.port).ok_or_else(unavailable)?;
        let failure = forward.take_error(target.port).ok_or_else(unavailable)?;
        Ok(Box::new(PodStream {
            stream,
            failure: Some(Box::pin(failure)),
        }))
    }
}

impl Connect for ChannelForward {
    fn connect<'a>(&'a self, target: &'a Target) -> Connecting<'a> {
        Box::pin(self.open(target))
    }
}

fn connect_error(error: &kube::Error) -> ConnectError {
    let message = error::message(error);
    match error::kind(error) {
        Kind::Unauthorized => ConnectError::Unauthorized(message),
        Kind::Forbidden => ConnectError::Forbidden(message),
        // Besides a pod that was deleted, a kubelet that has just restarted answers so for a moment.
        Kind::NotFound => ConnectError::PodGone(message),
        Kind::Unavailable if pod_is_gone(&message) => ConnectError::PodGone(message),
        Kind::Unavailable => ConnectError::Unavailable(message),
    }
}

/// The runtime's and the kubelet's words for a pod that has ended but whose object is still there.
fn pod_is_gone(message: &str) -> bool {
    [
        "pod not found",
        "not running",
        "does not exist",
        "failed to find sandbox",
        "is closed",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// The error channel of one forward: resolves with the runtime's text, or with nothing when the forward ends well.
type Failure = Pin<Box<dyn Future<Output = Option<String>> + Send>>;

/// The data channel of one forward. Where the data ends because the forward failed, the text of the error channel becomes
/// the error of that read or write.
struct PodStream {
    stream: DuplexStream,
    /// Taken when it has resolved.
    failure: Option<Failure>,
}

impl PodStream {
    /// Returns the failure that has been reported by now. The text comes before the end of the data on the wire, and kube
    /// hands both on in that order.
    fn failed(&mut self, cx: &mut Context<'_>) -> Option<io::Error> {
        let Poll::Ready(text) = self.failure.as_mut()?.as_mut().poll(cx) else {
            return None;
        };
        self.failure = None;
        text.map(|text| io::Error::new(failure_kind(&text), error::one_line(&text)))
    }
}

/// Tells what a runtime's text means for the stream (containerd's and cri-o's wording).
fn failure_kind(text: &str) -> io::ErrorKind {
    let has = |words: &str| text.contains(words);
    if has("connection reset") || has("broken pipe") {
        io::ErrorKind::ConnectionReset
    } else if has("refused")
        || has("failed to connect")
        || has("failed to dial")
        || has("namespace for sandbox")
    {
        io::ErrorKind::ConnectionRefused
    } else {
        io::ErrorKind::ConnectionAborted
    }
}

impl AsyncRead for PodStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let ended = result.is_err() || (buf.filled().len() == before && buf.remaining() > 0);
        match if ended { self.failed(cx) } else { None } {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Ready(result),
        }
    }
}

impl AsyncWrite for PodStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(result.map_err(|error| self.failed(cx).unwrap_or(error)))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_texts_are_told_apart() {
        let containerd = "error forwarding port 8080 to pod 1f, uid : failed to execute portforward in network namespace \
             \"/var/run/netns/cni-1\": failed to connect to localhost:8080 inside namespace \"1f\", IPv4: dial tcp4 \
             127.0.0.1:8080: connect: connection refused";
        assert_eq!(failure_kind(containerd), io::ErrorKind::ConnectionRefused);
        let reset = "error forwarding port 9003 to pod 1f, uid : read tcp4 127.0.0.1:1->127.0.0.1:9003: read: connection reset by peer";
        assert_eq!(failure_kind(reset), io::ErrorKind::ConnectionReset);
        assert_eq!(
            failure_kind("error forwarding port: context deadline exceeded"),
            io::ErrorKind::ConnectionAborted
        );
    }
}
