//! Requests that leave HTTP: `Upgrade` of HTTP/1.1 (WebSocket above all, RFC 9110 section 7.8) and extended CONNECT of HTTP/2
//! (RFC 8441). Towards the pod both are an HTTP/1.1 Upgrade; after it the bytes pass both ways untouched.

use std::io;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, TE, UPGRADE,
};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy};
use tokio::time::Instant;
use tokio_util::io::InspectReader;

use crate::drain::Drain;
use crate::proxy::body::{BoxError, ResponseBody};
use crate::proxy::connection::Downstream;
use crate::proxy::http::exchange::Answered;
use crate::proxy::http::headers;
use crate::proxy::socket::Reset;
use crate::proxy::upstream::{Answer, Lease};
use crate::registry::InFlight;
use crate::traffic::{ByteCount, OpenRecord, Outcome};

/// The field that proves a WebSocket handshake; over HTTP/2 there is none (RFC 8441 section 5).
const ACCEPT: HeaderName = http::header::SEC_WEBSOCKET_ACCEPT;

/// A client's wish to leave HTTP.
pub(super) struct Upgrade {
    /// What it wants to speak.
    protocol: HeaderValue,
    /// The client's side of the bytes to come.
    client: OnUpgrade,
    /// Whether it asked by extended CONNECT.
    extended: bool,
}

impl Upgrade {
    /// Takes the wish out of a request, if it has one, and makes the request one that HTTP/1.1 can carry.
    pub(super) fn take<B>(request: &mut Request<B>) -> Option<Self> {
        if let Some(protocol) = request.extensions_mut().remove::<Protocol>() {
            let protocol = HeaderValue::from_str(protocol.as_str()).ok()?;
            let client = hyper::upgrade::on(&mut *request);
            *request.method_mut() = Method::GET;
            if protocol == "websocket" {
                // The handshake of HTTP/1.1 needs a nonce; the one who checks the answer to it is the next hop, us.
                let nonce: [u8; 16] = std::array::from_fn(|_| fastrand::u8(..));
                let key = HeaderValue::from_str(&STANDARD.encode(nonce)).ok()?;
                request.headers_mut().insert(SEC_WEBSOCKET_KEY, key);
                request
                    .headers_mut()
                    .entry(SEC_WEBSOCKET_VERSION)
                    .or_insert(HeaderValue::from_static("13"));
            }
            return Some(Self {
                protocol,
                client,
                extended: true,
            });
        }
        // In a request of HTTP/1.0 an Upgrade means nothing (RFC 9110 section 7.8).
        let asks =
            request.version() == Version::HTTP_11 && headers::lists(request.headers(), CONNECTION, "upgrade");
        let protocol = request.headers().get(UPGRADE).filter(|_| asks)?.clone();
        // HTTP/2 in clear text is asked for in the same way, but it is ours to answer, not the pod's.
        if headers::lists(request.headers(), UPGRADE, "h2c") {
            return None;
        }
        let client = hyper::upgrade::on(&mut *request);
        Some(Self {
            protocol,
            client,
            extended: false,
        })
    }

    /// Whether it came by extended CONNECT, so that the stream behind the request's head is no body.
    pub(super) fn is_extended(&self) -> bool {
        self.extended
    }

    /// Writes the wish into the head of the request to the pod, from which hop-by-hop fields are gone.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        // RFC 9110 section 10.1.4: a sender of TE must also name it in Connection.
        let options = if headers.contains_key(TE) {
            "te, upgrade"
        } else {
            "upgrade"
        };
        headers.insert(CONNECTION, HeaderValue::from_static(options));
        headers.insert(UPGRADE, self.protocol.clone());
    }

    /// Passes the pod's agreement on, and from then on the bytes of both sides, as a task of `drain`.
    pub(super) fn agree(
        self,
        answered: Answered,
        downstream: Arc<Downstream>,
        mut record: OpenRecord,
        drain: &Drain,
    ) -> Response<ResponseBody> {
        let Answered {
            answer, in_flight, ..
        } = answered;
        let Answer {
            mut response,
            mut lease,
            ..
        } = answer;
        lease.detach();
        let pod = hyper::upgrade::on(&mut response);
        let (mut parts, _) = response.into_parts();
        let protocol = parts.headers.get(UPGRADE).cloned().unwrap_or(self.protocol);
        headers::strip_hop_by_hop(&mut parts.headers);
        if self.extended {
            parts.status = StatusCode::OK;
            parts.headers.remove(ACCEPT);
        } else {
            parts
                .headers
                .insert(CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(UPGRADE, protocol);
        }
        record.status = Some(parts.status);
        record.first_byte = Some(Instant::now());
        // A stream of HTTP/2 is reset when it is dropped, and its connection is for others, too.
        let reset = (!self.extended).then(|| downstream.reset.clone());
        drain.spawn(join(
            self.client,
            pod,
            reset,
            (downstream, lease, in_flight),
            record,
        ));
        Response::from_parts(parts, ResponseBody::own(Bytes::new()))
    }
}

/// Copies both ways until both sides have ended; if one breaks, the client's connection is reset, so that it does not look
/// like an orderly end. The record is emitted then, and the pod counts as busy until then.
async fn join(
    client: OnUpgrade,
    pod: OnUpgrade,
    reset: Option<Reset>,
    _held: (Arc<Downstream>, Lease, InFlight),
    record: OpenRecord,
) {
    let mut passing = Passing {
        record,
        sent: ByteCount::default(),
        ended: false,
    };
    let counts = (passing.record.received.share(), passing.sent.share());
    let spliced = splice(client, pod, reset, &counts).await;
    passing.ended = true;
    match spliced {
        Ok(()) => passing.record.outcome = Outcome::Complete,
        Err(error) => {
            passing.record.reason = Some(error.to_string());
            passing.record.outcome = Outcome::Broken;
        }
    }
}

/// The record of bytes that pass, which tells how many there were however that ends.
struct Passing {
    record: OpenRecord,
    sent: ByteCount,
    ended: bool,
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.record.sent += self.sent.get();
        if !self.ended {
            // Nothing else cuts it off.
            self.record.reason = Some("kube-tunnel is shutting down".into());
            self.record.outcome = Outcome::Broken;
        }
    }
}

/// Counts what has come from the client, and from the pod.
type Counts = (ByteCount, ByteCount);

async fn splice(
    client: OnUpgrade,
    pod: OnUpgrade,
    reset: Option<Reset>,
    counts: &Counts,
) -> Result<(), BoxError> {
    let (client, pod) = tokio::try_join!(client, pod)?;
    let (client, pod) = (&mut TokioIo::new(client), &mut TokioIo::new(pod));
    let carried = carry(client, pod, counts).await;
    if carried.is_err()
        && let Some(reset) = reset
    {
        // While the client's stream is still there to be reset.
        reset.wish();
    }
    Ok(carried?)
}

/// Copies both ways until both sides have ended, or one has broken.
async fn carry<C, P>(client: C, pod: P, (received, sent): &Counts) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite,
    P: AsyncRead + AsyncWrite,
{
    let (from_client, mut to_client) = tokio::io::split(client);
    let (from_pod, mut to_pod) = tokio::io::split(pod);
    let mut from_client = InspectReader::new(from_client, |bytes| received.add(bytes.len()));
    let mut from_pod = InspectReader::new(from_pod, |bytes| sent.add(bytes.len()));
    let up = async {
        let copied = match copy(&mut from_client, &mut to_pod).await {
            Ok(_) => to_pod.shutdown().await,
            Err(error) => Err(error),
        };
        match copied {
            // The pod takes nothing more: what it has said is passed on all the same.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            copied => copied,
        }
    };
    let down = async {
        copy(&mut from_pod, &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::try_join!(up, down)?;
    Ok(())
}

/// Whether a request is an extended CONNECT, which names its target as other requests do.
pub(super) fn is_extended_connect<B>(request: &Request<B>) -> bool {
    request.method() == Method::CONNECT && request.extensions().get::<Protocol>().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tokio::io::{AsyncReadExt, duplex, empty, join, sink};

    /// A pod that has ended: it takes nothing.
    struct Ended;

    impl AsyncWrite for Ended {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
    }

    fn counts() -> Counts {
        [(); 2].map(|()| ByteCount::default().share()).into()
    }

    #[tokio::test]
    async fn what_a_pod_said_before_it_ended_arrives_though_it_takes_no_more() {
        for goodbye in [&b"goodbye"[..], b""] {
            let (said, mut says) = duplex(64);
            let (mut client, ours) = duplex(64);
            client.write_all(goodbye).await.unwrap();
            if goodbye.is_empty() {
                client.shutdown().await.unwrap();
            }
            let late = async {
                tokio::task::yield_now().await;
                says.write_all(b"last words").await.unwrap();
                drop(says);
                let mut heard = String::new();
                client.read_to_string(&mut heard).await.unwrap();
                heard
            };
            let counts = counts();
            let (carried, heard) = tokio::join!(carry(ours, join(said, Ended), &counts), late);
            carried.unwrap();
            assert_eq!((counts.0.get(), counts.1.get()), (goodbye.len() as u64, 10));
            assert_eq!(heard, "last words");
        }
    }

    #[tokio::test]
    async fn a_client_that_breaks_ends_both() {
        let broken = tokio_util::io::StreamReader::new(futures_util::stream::iter([Err::<Bytes, _>(
            io::Error::from(io::ErrorKind::ConnectionReset),
        )]));
        let (waits, _open) = duplex(64);
        let error = carry(join(broken, sink()), waits, &counts()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        carry(join(empty(), sink()), join(empty(), sink()), &counts())
            .await
            .unwrap();
    }
}
