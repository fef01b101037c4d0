//! Port-forwards through the API server's WebSocket channel protocol (`v4.channel.k8s.io`): one upgraded connection for
//! each stream, as the kube crate offers it. Works on every server version.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, DuplexStream, ReadBuf};

use crate::k8s::error;
use crate::k8s::portforward::carrier::{Refusal, Verdict};
use crate::k8s::portforward::cause;
use crate::transport::{BoxStream, ConnectError, Target};

/// Opens a stream as a port-forward of its own; `timeout` bounds the upgrade.
pub(super) async fn open(client: Client, target: &Target, timeout: Duration) -> Result<BoxStream, Refusal> {
    let pods: Api<Pod> = Api::namespaced(client, &target.pod.namespace);
    let ports = [target.port];
    let opening = pods.portforward(&target.pod.name, &ports);
    let mut forward = tokio::time::timeout(timeout, opening)
        .await
        .map_err(|_| Refusal {
            error: ConnectError::Timeout(target.clone(), timeout),
            verdict: Verdict::Silent,
        })?
        .map_err(|error| Refusal::of_call(&error))?;
    let unavailable = || Refusal {
        error: ConnectError::Unavailable("the port-forward has no stream".into()),
        verdict: Verdict::Final,
    };
    let stream = forward.take_stream(target.port).ok_or_else(unavailable)?;
    let failure = forward.take_error(target.port).ok_or_else(unavailable)?;
    let broken = async move {
        let error = forward.join().await.err()?;
        Some(format!("the port-forward broke: {error}"))
    };
    Ok(Box::new(BufReader::new(PodStream {
        stream,
        failure: Some(Box::pin(failure)),
        broken: Some(Box::pin(broken)),
    })))
}

/// Resolves with the text of a failure, or with nothing when there was none.
type Failure = Pin<Box<dyn Future<Output = Option<String>> + Send>>;

/// The data channel of one forward. kube's task moves the bytes between it and the WebSocket, and closes it in the same way
/// at the end of the data and at a failure; so the end is looked into before it is believed.
struct PodStream {
    stream: DuplexStream,
    /// The forward's error channel; taken when it has resolved. Without a text it does so only when kube's task has let go
    /// of it, which is before the task lets go of the data.
    failure: Option<Failure>,
    /// The end of kube's task; taken when it is known or of no interest any more.
    broken: Option<Failure>,
}

impl PodStream {
    /// Tells why the data has ended: nothing for a Close frame, after which kube's task goes on until we close too. Pending
    /// only for the moment in which the task ends.
    fn poll_cause(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Error>> {
        if let Some(failure) = &mut self.failure {
            let Poll::Ready(text) = failure.as_mut().poll(cx) else {
                return Poll::Ready(None);
            };
            self.failure = None;
            if let Some(text) = text {
                self.broken = None;
                return Poll::Ready(Some(io::Error::new(cause::kind(&text), error::one_line(&text))));
            }
        }
        let Some(broken) = &mut self.broken else {
            return Poll::Ready(None);
        };
        let text = ready!(broken.as_mut().poll(cx));
        self.broken = None;
        Poll::Ready(text.map(|text| io::Error::new(io::ErrorKind::ConnectionAborted, error::one_line(&text))))
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
        if !ended {
            return Poll::Ready(result);
        }
        match ready!(self.poll_cause(cx)) {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Ready(result),
        }
    }
}

impl AsyncWrite for PodStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(result.map_err(|error| match self.poll_cause(cx) {
            Poll::Ready(Some(cause)) => cause,
            // A reader may be waiting for the same answer, and has the better claim on it.
            Poll::Ready(None) | Poll::Pending => error,
        }))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // From here on kube takes nothing more from the pod, so that whatever becomes of its task breaks nothing off.
        self.broken = None;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
