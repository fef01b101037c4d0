//! The pods' side of the proxy: HTTP connections over whatever [`Connect`] opens, pooled by endpoint and protocol.
//!
//! An HTTP/1.1 connection carries one request at a time and goes back to its pool at the end of the response; an HTTP/2
//! connection is shared. Connections that nobody used for the idle time are closed.

mod cause;
mod http1;
mod http2;
mod lease;

use std::collections::HashMap;
use std::error::Error as _;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use tokio::time::Instant;
use tracing::debug;

use crate::drain::Drain;
use crate::proxy::error::Error;
use crate::proxy::replay::RequestBody;
use crate::proxy::upstream::cause::Cause;
use crate::transport::{Connect, ConnectError, Target, io_cause};

pub(crate) use lease::Lease;

/// How many fields a pod's response may have over HTTP/1.1, and how many bytes they may take over HTTP/2: ample for gRPC's
/// error details and the cookies of large applications, and bounded.
const MAX_FIELDS: usize = 256;
const MAX_HEADER_LIST: u32 = 256 << 10;

/// The protocol spoken to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 in clear text with prior knowledge.
    H2c,
}

impl Wire {
    /// Returns the other one.
    #[must_use]
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Http1 => Self::H2c,
            Self::H2c => Self::Http1,
        }
    }

    /// Names the protocol as access records do.
    #[must_use]
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1",
            Self::H2c => "h2c",
        }
    }
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
    drain: Drain,
}

/// Sends requests to pods. Clones share the pools.
#[derive(Clone)]
pub(crate) struct Upstream {
    shared: Arc<Shared>,
    pools: Arc<Mutex<HashMap<(Target, Wire), Pool>>>,
    /// What the ports have answered in; kept as long as there are connections to them.
    spoken: Arc<Mutex<HashMap<Target, Wire>>>,
}

#[derive(Clone)]
enum Pool {
    Http1(Arc<http1::Pool>),
    H2c(Arc<http2::Pool>),
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("connect", &self.shared.connect)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// Makes empty pools over `connect`; connections unused for `idle_timeout` are closed. Its tasks run under `drain`.
    #[must_use]
    pub(crate) fn new(connect: Arc<dyn Connect>, idle_timeout: Duration, drain: &Drain) -> Self {
        let this = Self {
            shared: Arc::new(Shared {
                connect,
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
        target: &Target,
        wire: Wire,
        fresh: Fresh,
        request: Request<RequestBody>,
    ) -> Result<Answer, Failure> {
        let unopened = |error: ConnectError| {
            let error = Error::Connect(target.clone(), error);
            Failure {
                error,
                untouched: true,
                reused: false,
            }
        };
        match self.pool(target, wire) {
            Pool::Http1(pool) => {
                let (mut connection, reused) = pool.checkout(&self.shared, fresh).await.map_err(unopened)?;
                match connection.sender.try_send_request(request).await {
                    Ok(response) => {
                        let lease = Lease::http1(pool, connection, self.shared.drain.clone());
                        Ok(Answer {
                            response,
                            lease,
                            reused,
                        })
                    }
                    Err(error) => Err(failure(target, wire, error, &connection.cause, reused)),
                }
            }
            Pool::H2c(pool) => {
                let (mut stream, reused) = pool.checkout(&self.shared, fresh).await.map_err(unopened)?;
                match stream.sender.try_send_request(request).await {
                    Ok(response) => Ok(Answer {
                        response,
                        lease: Lease::http2(stream.slot),
                        reused,
                    }),
                    Err(error) => Err(failure(target, wire, error, &stream.cause, reused)),
                }
            }
        }
    }

    /// Returns which protocol a port is known to speak.
    pub(crate) fn spoken(&self, target: &Target) -> Option<Wire> {
        lock(&self.spoken).get(target).copied()
    }

    /// Remembers which protocol a port speaks.
    pub(crate) fn learn(&self, target: &Target, wire: Wire) {
        let mut spoken = lock(&self.spoken);
        if spoken.get(target) != Some(&wire) {
            spoken.insert(target.clone(), wire);
        }
    }

    fn pool(&self, target: &Target, wire: Wire) -> Pool {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(&(target.clone(), wire)) {
            return pool.clone();
        }
        let pool = match wire {
            Wire::Http1 => Pool::Http1(Arc::new(http1::Pool::new(target.clone()))),
            Wire::H2c => Pool::H2c(Arc::new(http2::Pool::new(target.clone()))),
        };
        pools.insert((target.clone(), wire), pool.clone());
        pool
    }

    /// Closes idle connections and forgets empty pools, at least each minute (contract G2).
    async fn sweep(&self, idle_timeout: Duration) {
        let period = (idle_timeout / 10).clamp(Duration::from_millis(10), Duration::from_mins(1));
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            let Some(limit) = Instant::now().checked_sub(idle_timeout) else {
                continue;
            };
            let mut pools = lock(&self.pools);
            pools.retain(|(target, wire), pool| {
                let keep = match pool {
                    Pool::Http1(pool) => pool.expire(limit),
                    Pool::H2c(pool) => pool.expire(limit),
                };
                if !keep {
                    debug!(%target, protocol = wire.as_str(), "idle connections closed");
                }
                keep
            });
            let used = |target: &Target| {
                [Wire::Http1, Wire::H2c]
                    .iter()
                    .any(|wire| pools.contains_key(&(target.clone(), *wire)))
            };
            lock(&self.spoken).retain(|target, _| used(target));
        }
    }
}

/// Words the failure of a request that a connection was found for.
fn failure(
    target: &Target,
    wire: Wire,
    mut error: TrySendError<Request<RequestBody>>,
    cause: &Cause,
    reused: bool,
) -> Failure {
    let untouched = error.take_message().is_some();
    let error = classify(target.clone(), wire, &error.into_error(), cause, reused);
    Failure {
        error,
        untouched,
        reused,
    }
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
            _ => {}
        }
    }
    let noted = cause.get();
    match io_cause(error).or(noted.as_ref()) {
        // The port can only have refused a connection that never carried anything.
        Some(io) if io.kind() == std::io::ErrorKind::ConnectionRefused && !reused => {
            Error::Refused(target, io.to_string())
        }
        Some(io) => Error::Reset(target, io.to_string()),
        None => Error::Reset(target, error.to_string()),
    }
}

/// Locks what only plain code guards; a panic inside such code left it consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
