//! The pods' side of the proxy: HTTP connections over whatever [`Connect`] opens, pooled by endpoint and protocol.
//!
//! An HTTP/1.1 connection carries one request at a time and goes back to its pool at the end of the response; an HTTP/2
//! connection is shared. Connections that nobody used for the idle time are closed.

mod cause;
mod http1;
mod http2;
mod lease;
#[cfg(test)]
mod nobody;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use rustls::pki_types::ServerName;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::proxy::Limits;
use crate::proxy::error::Error;
use crate::proxy::notice::Notice;
use crate::proxy::replay::RequestBody;
use crate::proxy::upstream::cause::Cause;
use crate::tls::{self, Trust};
use crate::traffic::milliseconds;
use crate::transport::{BoxStream, Company, Connect, ConnectError, Stream, Target, io_cause};

pub(crate) use lease::Lease;

/// How long a pod may take for a TLS handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// The versions of HTTP, as TLS names them.
const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// The protocol spoken to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 in clear text with prior knowledge.
    H2c,
    /// HTTP/1.1 over TLS.
    Http1Tls,
    /// HTTP/2 over TLS.
    H2,
}

impl Wire {
    /// Returns the other version of HTTP, over TLS if this one is.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Http1 => Self::H2c,
            Self::H2c => Self::Http1,
            Self::Http1Tls => Self::H2,
            Self::H2 => Self::Http1Tls,
        }
    }

    /// Returns the same version of HTTP over TLS.
    pub(crate) fn over_tls(self) -> Self {
        match self {
            Self::Http1 | Self::Http1Tls => Self::Http1Tls,
            Self::H2c | Self::H2 => Self::H2,
        }
    }

    /// Names the protocol as access records do.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1",
            Self::H2c => "h2c",
            Self::Http1Tls => "HTTP/1.1+TLS",
            Self::H2 => "h2",
        }
    }
}

/// Whom connections are pooled for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Peer {
    /// The pod's port.
    pub(crate) target: Target,
    /// The protocol spoken there.
    pub(crate) wire: Wire,
    /// The name that TLS asks for, the Service's; nothing in clear text.
    pub(crate) server_name: Option<Arc<str>>,
    /// Whether TLS is to offer no other version of HTTP: the request could not be sent in it.
    pub(crate) alone: bool,
}

/// A pod's response.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The response.
    pub(crate) response: Response<Incoming>,
    /// To be given back when the response's body has been read to its end.
    pub(crate) lease: Lease,
    /// Whether the connection was there before the request.
    pub(crate) reused: bool,
    /// How long the request waited for it.
    pub(crate) waited: Duration,
}

/// A request that got no response.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Why.
    pub(crate) error: Error,
    /// Whether no byte of the request was written.
    pub(crate) untouched: bool,
    /// Whether it went to a connection that had been used before: that one may have died meanwhile, which says nothing about
    /// the endpoint.
    pub(crate) reused: bool,
    /// Whether what came back proves that the pod did not understand the request: it is in the other version of HTTP, or in none.
    pub(crate) misunderstood: bool,
    /// How long the request waited for a connection.
    pub(crate) waited: Duration,
}

/// What is open to one port of one pod.
#[derive(Debug)]
pub(crate) struct Open {
    /// The port.
    pub(crate) target: Target,
    /// Connections, idle ones too, of any protocol. Those that were upgraded from HTTP are no longer among them.
    pub(crate) connections: usize,
    /// What the port is known to speak.
    pub(crate) spoken: Option<Wire>,
}

/// Whether a request may go over a connection that was idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// It may.
    No,
    /// It may not: the idle connections are under suspicion and are closed.
    Yes,
}

/// What the pools share.
struct Shared {
    connect: Arc<dyn Connect>,
    /// The client's side of TLS, for either version of HTTP.
    tls: PodTls,
    limits: Limits,
    /// How long a request waits for one of the HTTP/1.1 connections that a port of a pod may have.
    patience: Duration,
    /// For the warning that one has them all.
    full: Notice,
    drain: Drain,
}

/// The client's side of TLS towards pods.
#[derive(Clone)]
pub struct PodTls {
    /// Offers both versions of HTTP: the pod chooses.
    either: TlsConnector,
    /// Offers HTTP/1.1 alone.
    http1: TlsConnector,
    /// Offers HTTP/2 alone.
    http2: TlsConnector,
    /// Whether to say that certificates are not checked: once, when it first matters.
    warn: Arc<AtomicBool>,
}

impl fmt::Debug for PodTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodTls").finish_non_exhaustive()
    }
}

impl PodTls {
    /// Makes it with this trust.
    ///
    /// # Errors
    /// A [`tls::Error`] for the file of authorities.
    pub fn new(trust: &Trust) -> Result<Self, tls::Error> {
        Ok(Self {
            either: tls::client_config(trust, &[HTTP1, HTTP2])?.into(),
            http1: tls::client_config(trust, &[HTTP1])?.into(),
            http2: tls::client_config(trust, &[HTTP2])?.into(),
            warn: Arc::new(AtomicBool::new(*trust == Trust::Skip)),
        })
    }
}

impl Shared {
    /// Opens a stream to a peer, and tells the log how long that took.
    ///
    /// # Errors
    /// [`Error::Connect`], or [`Error::Protocol`] when the pod's side of TLS wants another version of HTTP.
    async fn open(&self, peer: &Peer) -> Result<BoxStream, Error> {
        let begun = Instant::now();
        let opened = self.open_unseen(peer).await;
        let (target, protocol, ms) = (&peer.target, peer.wire.as_str(), milliseconds(begun.elapsed()));
        match &opened {
            Ok(_) => debug!(endpoint = %target, protocol, ms, "stream to the pod opened"),
            Err(error) => debug!(endpoint = %target, protocol, ms, %error, "no stream to the pod"),
        }
        opened
    }

    /// Goes through TLS where that is spoken.
    async fn open_unseen(&self, peer: &Peer) -> Result<BoxStream, Error> {
        let unopened = |error| Error::Connect(peer.target.clone(), error);
        let stream = self.connect.connect(&peer.target).await.map_err(unopened)?;
        let (tls, wanted) = match peer.wire {
            Wire::Http1 | Wire::H2c => return Ok(stream),
            Wire::Http1Tls if peer.alone => (&self.tls.http1, HTTP1),
            Wire::Http1Tls => (&self.tls.either, HTTP1),
            Wire::H2 => (&self.tls.http2, HTTP2),
        };
        if self.tls.warn.swap(false, Ordering::Relaxed) {
            warn!(endpoint = %peer.target, "certificates of pods are not checked; --backend-tls names authorities that count");
        }
        let failed = |reason: String| Error::NoTls(peer.target.clone(), reason);
        let other =
            |reason: &str| Error::Protocol(peer.target.clone(), peer.wire.as_str(), reason.to_owned());
        let name = ServerName::try_from(peer.server_name.as_deref().unwrap_or_default().to_owned())
            .map_err(|error| failed(error.to_string()))?;
        let handshake = tokio::time::timeout(TLS_TIMEOUT, tls.connect(name, stream));
        match handshake.await {
            Ok(Ok(stream)) => match stream.get_ref().1.alpn_protocol() {
                Some(agreed) if agreed != wanted => Err(other("TLS chose the other version")),
                // A server without ALPN leaves it to us.
                Some(_) | None => Ok(Box::new(stream)),
            },
            Ok(Err(error)) if refuses_protocol(&error) => Err(other("TLS refused it")),
            Ok(Err(error)) if tls_error(&error).is_some() => Err(failed(error.to_string())),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(Error::Refused(peer.target.clone(), error.to_string()))
            }
            Ok(Err(error)) => Err(Error::Handshake(peer.target.clone(), error.to_string())),
            Err(_) => Err(unopened(ConnectError::Timeout(peer.target.clone(), TLS_TIMEOUT))),
        }
    }
}

impl Stream for TlsStream<BoxStream> {
    fn company(&self) -> Company {
        self.get_ref().0.company()
    }
}

/// Why TLS does not come about, if it is not that the connection broke.
fn tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Whether the other side of a handshake knows none of the protocols that were offered (RFC 7301 section 3.2).
fn refuses_protocol(error: &std::io::Error) -> bool {
    let refusal = rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol);
    tls_error(error) == Some(&refusal)
}

/// Sends requests to pods. Clones share the pools.
#[derive(Clone)]
pub(crate) struct Upstream {
    shared: Arc<Shared>,
    pools: Arc<Mutex<HashMap<Peer, Pool>>>,
    /// What the ports have answered in; kept as long as there are connections to them.
    spoken: Arc<Mutex<HashMap<Target, Wire>>>,
}

#[derive(Clone)]
enum Pool {
    Http1(Arc<http1::Pool>),
    Http2(Arc<http2::Pool>),
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("connect", &self.shared.connect)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// Makes empty pools over `connect`; connections unused for `idle_timeout` are closed. Where a port of a pod has as many of
    /// HTTP/1.1 as `limits` allow, a request waits no longer than `patience`. Its tasks run under `drain`.
    #[must_use]
    pub(crate) fn new(
        connect: Arc<dyn Connect>,
        tls: PodTls,
        idle_timeout: Duration,
        limits: Limits,
        patience: Duration,
        drain: &Drain,
    ) -> Self {
        let this = Self {
            shared: Arc::new(Shared {
                connect,
                tls,
                limits,
                patience,
                full: Notice::default(),
                drain: drain.clone(),
            }),
            pools: Arc::default(),
            spoken: Arc::default(),
        };
        let (swept, waiting) = (this.clone(), drain.clone());
        drain.spawn(async move {
            tokio::select! {
                () = waiting.started() => {}
                () = swept.sweep(idle_timeout) => {}
            }
        });
        this
    }

    /// Sends `request` to `target` and waits for the response's headers. Dropping the future gives up the request; on
    /// HTTP/1.1 that closes its connection.
    ///
    /// # Errors
    /// A [`Failure`].
    pub(crate) async fn send(
        &self,
        peer: &Peer,
        fresh: Fresh,
        request: Request<RequestBody>,
    ) -> Result<Answer, Failure> {
        let begun = Instant::now();
        let unopened = |error| Failure {
            error,
            untouched: true,
            reused: false,
            misunderstood: false,
            waited: begun.elapsed(),
        };
        match self.pool(peer) {
            Pool::Http1(pool) => {
                let (mut connection, reused) = pool.checkout(&self.shared, fresh).await.map_err(unopened)?;
                let waited = begun.elapsed();
                match connection.exchange(request).await {
                    Ok(response) => {
                        let lease = Lease::http1(pool, connection, self.shared.drain.clone());
                        Ok(Answer {
                            response,
                            lease,
                            reused,
                            waited,
                        })
                    }
                    Err(error) => Err(failure(peer, error, &connection.cause, reused, waited)),
                }
            }
            Pool::Http2(pool) => {
                let (mut stream, reused) = pool.checkout(&self.shared, fresh).await.map_err(unopened)?;
                let waited = begun.elapsed();
                match stream.sender.try_send_request(request).await {
                    Ok(response) => Ok(Answer {
                        response,
                        lease: Lease::http2(stream.slot),
                        reused,
                        waited,
                    }),
                    Err(error) => Err(failure(peer, error, &stream.cause, reused, waited)),
                }
            }
        }
    }

    /// Returns which protocol a port is known to speak.
    pub(crate) fn spoken(&self, target: &Target) -> Option<Wire> {
        lock(&self.spoken).get(target).copied()
    }

    /// Lists what is open, or was until a moment ago.
    pub(crate) fn open(&self) -> Vec<Open> {
        let mut open: Vec<Open> = Vec::new();
        for (peer, pool) in lock(&self.pools).iter() {
            let connections = match pool {
                Pool::Http1(pool) => pool.open(),
                Pool::Http2(pool) => pool.open(),
            };
            match open.iter_mut().find(|open| open.target == peer.target) {
                Some(open) => open.connections += connections,
                None => open.push(Open {
                    target: peer.target.clone(),
                    connections,
                    spoken: self.spoken(&peer.target),
                }),
            }
        }
        open
    }

    /// Remembers which protocol a port speaks.
    pub(crate) fn learn(&self, target: &Target, wire: Wire) {
        let mut spoken = lock(&self.spoken);
        if spoken.get(target) != Some(&wire) {
            spoken.insert(target.clone(), wire);
        }
    }

    fn pool(&self, peer: &Peer) -> Pool {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(peer) {
            return pool.clone();
        }
        let pool = match peer.wire {
            Wire::Http1 | Wire::Http1Tls => {
                let places = self.shared.limits.connections_per_pod;
                Pool::Http1(http1::Pool::start(peer.clone(), places, &self.shared.drain))
            }
            Wire::H2c | Wire::H2 => Pool::Http2(Arc::new(http2::Pool::new(peer.clone()))),
        };
        pools.insert(peer.clone(), pool.clone());
        pool
    }

    /// Closes idle connections and forgets empty pools, more often than each minute (contract G2).
    async fn sweep(&self, idle_timeout: Duration) {
        let period = (idle_timeout / 10).clamp(Duration::from_millis(10), http1::SURPLUS);
        let mut ticks = tokio::time::interval(period);
        loop {
            let now = ticks.tick().await;
            let mut pools = lock(&self.pools);
            pools.retain(|peer, pool| {
                let keep = match pool {
                    Pool::Http1(pool) => pool.expire(now, idle_timeout),
                    Pool::Http2(pool) => pool.expire(now, idle_timeout),
                };
                if !keep {
                    debug!(endpoint = %peer.target, protocol = peer.wire.as_str(), "idle connections closed");
                }
                keep
            });
            let used: HashSet<&Target> = pools.keys().map(|peer| &peer.target).collect();
            lock(&self.spoken).retain(|target, _| used.contains(target));
        }
    }
}

/// Words the failure of a request that a connection was found for.
fn failure(
    peer: &Peer,
    mut error: TrySendError<Request<RequestBody>>,
    cause: &Cause,
    reused: bool,
    waited: Duration,
) -> Failure {
    let returned = error.take_message().is_some();
    let error = error.into_error();
    let http1 = matches!(peer.wire, Wire::Http1 | Wire::Http1Tls);
    let misunderstood = cause.is_http1().is_some_and(|answered| answered != http1) || wants_http1(&error);
    let error = classify(peer.target.clone(), peer.wire, &error, cause, reused);
    // Nobody else's bytes go over a connection of HTTP/1.1 meanwhile. TLS may have written some and then failed all the same.
    let unwritten = peer.wire == Wire::Http1 && !cause.has_written() && !matches!(error, Error::ClientGone);
    let untouched = returned || unwritten;
    Failure {
        error,
        untouched,
        reused,
        misunderstood,
        waited,
    }
}

/// Whether a server of HTTP/2 wants the request in HTTP/1.1 instead (RFC 9113 section 7).
fn wants_http1(error: &hyper::Error) -> bool {
    let http2 = error
        .source()
        .and_then(|source| source.downcast_ref::<h2::Error>());
    http2.is_some_and(|http2| http2.reason() == Some(h2::Reason::HTTP_1_1_REQUIRED))
}

fn classify(target: Target, wire: Wire, error: &hyper::Error, cause: &Cause, reused: bool) -> Error {
    let source = error.source();
    if error.is_user() && source.is_some_and(|source| source.is::<hyper::Error>()) {
        return Error::ClientGone; // the request's body is the client's, and its errors are too
    }
    if error.is_parse() || error.is_parse_too_large() {
        return Error::Protocol(target, wire.as_str(), error.to_string());
    }
    if let Some(http2) = source.and_then(|source| source.downcast_ref::<h2::Error>()) {
        let remote_goaway = http2.is_go_away() && http2.is_remote();
        match http2.reason() {
            // A stream above the last one of a GOAWAY was not processed, and no other is failed by it.
            _ if remote_goaway => return Error::NotProcessed(target, http2.to_string()),
            Some(h2::Reason::REFUSED_STREAM) => return Error::NotProcessed(target, http2.to_string()),
            Some(h2::Reason::HTTP_1_1_REQUIRED) => {
                return Error::Protocol(target, wire.as_str(), http2.to_string());
            }
            Some(_) if http2.is_library() => {
                return Error::Protocol(target, wire.as_str(), http2.to_string());
            }
            Some(reason) if http2.is_reset() && http2.is_remote() => {
                return Error::StreamReset(target, reason);
            }
            _ => {}
        }
    }
    let noted = cause.get();
    match io_cause(error).or(noted.as_ref()) {
        // The port can only have refused a connection that never carried anything.
        Some(io) if io.kind() == std::io::ErrorKind::ConnectionRefused && !reused => {
            Error::Refused(target, io.to_string())
        }
        Some(io) if io.kind() == std::io::ErrorKind::NotConnected => {
            Error::NotProcessed(target, io.to_string())
        }
        Some(io) => Error::Reset(target, io.to_string()),
        None => Error::Reset(target, error.to_string()),
    }
}

/// Locks what only plain code guards; a panic inside such code left it consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
