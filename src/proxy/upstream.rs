//! The pods' side of the proxy: HTTP connections over whatever [`Connect`] opens, pooled by endpoint and protocol.
//!
//! An HTTP/1.1 connection carries one request at a time and goes back to its pool at the end of the response; an HTTP/2
//! connection is shared. Connections that nobody used for the idle time are closed.

mod cause;
mod http1;
mod http2;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use tokio::time::Instant;
use tracing::debug;

use crate::drain::Drain;
use crate::proxy::body::RequestBody;
use crate::proxy::error::Error;
use crate::proxy::upstream::cause::Cause;
use crate::transport::{Connect, ConnectError, Target, io_cause};

pub(crate) use http1::Lease;

/// The protocol spoken to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 in clear text with prior knowledge.
    H2c,
}

impl Wire {
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
    /// The request, untouched, if no byte of it was written.
    pub(crate) unsent: Option<Request<RequestBody>>,
    /// Whether it went to a connection that had been idle: that one may have died meanwhile, which says nothing about the
    /// endpoint.
    pub(crate) reused: bool,
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
    pub(crate) fn new(connect: Arc<dyn Connect>, idle_timeout: Duration, drain: Drain) -> Self {
        let pools: Arc<Mutex<HashMap<(Target, Wire), Pool>>> = Arc::default();
        let (swept, waiting) = (pools.clone(), drain.clone());
        drain.spawn(async move {
            tokio::select! {
                () = waiting.started() => {}
                () = sweep(&swept, idle_timeout) => {}
            }
        });
        Self {
            shared: Arc::new(Shared { connect, drain }),
            pools,
        }
    }

    /// Sends `request` to `target` and waits for the response's headers. Dropping the future gives up the request; on
    /// HTTP/1.1 that closes its connection.
    ///
    /// # Errors
    /// A [`Failure`], which has the request back if none of it was sent.
    pub(crate) async fn send(
        &self,
        target: &Target,
        wire: Wire,
        request: Request<RequestBody>,
    ) -> Result<Answer, Failure> {
        let unconnected = |error: ConnectError| Error::Connect(target.clone(), error);
        let unopened = |(error, request)| Failure {
            error: unconnected(error),
            unsent: Some(request),
            reused: false,
        };
        match self.pool(target, wire) {
            Pool::Http1(pool) => {
                let (mut connection, reused) = match pool.checkout(&self.shared).await {
                    Ok(found) => found,
                    Err(error) => return Err(unopened((error, request))),
                };
                match connection.sender.try_send_request(request).await {
                    Ok(response) => {
                        let lease = Lease::new(pool, connection, self.shared.drain.clone());
                        Ok(Answer {
                            response,
                            lease,
                            reused,
                        })
                    }
                    Err(error) => Err(failure(target, error, &connection.cause, reused)),
                }
            }
            Pool::H2c(pool) => {
                let (mut connection, reused) = match pool.checkout(&self.shared).await {
                    Ok(found) => found,
                    Err(error) => return Err(unopened((error, request))),
                };
                match connection.sender.try_send_request(request).await {
                    Ok(response) => Ok(Answer {
                        response,
                        lease: Lease::none(),
                        reused,
                    }),
                    Err(error) => Err(failure(target, error, &connection.cause, reused)),
                }
            }
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
}

/// Closes idle connections and forgets empty pools, at least each minute (contract G2).
async fn sweep(pools: &Mutex<HashMap<(Target, Wire), Pool>>, idle_timeout: Duration) {
    let period = (idle_timeout / 10).clamp(Duration::from_millis(10), Duration::from_mins(1));
    let mut ticks = tokio::time::interval(period);
    loop {
        ticks.tick().await;
        let Some(limit) = Instant::now().checked_sub(idle_timeout) else {
            continue;
        };
        lock(pools).retain(|(target, wire), pool| {
            let keep = match pool {
                Pool::Http1(pool) => pool.expire(limit),
                Pool::H2c(pool) => pool.expire(limit),
            };
            if !keep {
                debug!(%target, protocol = wire.as_str(), "idle connections closed");
            }
            keep
        });
    }
}

/// Words the failure of a request that a connection was found for.
fn failure(
    target: &Target,
    mut error: TrySendError<Request<RequestBody>>,
    cause: &Cause,
    reused: bool,
) -> Failure {
    let unsent = error.take_message();
    let error = error.into_error();
    let target = target.clone();
    let noted = cause.get();
    let error = match io_cause(&error).or(noted.as_ref()) {
        Some(io) if io.kind() == std::io::ErrorKind::ConnectionRefused => {
            Error::Refused(target, io.to_string())
        }
        Some(io) => Error::Reset(target, io.to_string()),
        // The only user here is the request's body, which comes from the client.
        None if error.is_user() => Error::ClientGone,
        None => Error::Reset(target, error.to_string()),
    };
    Failure {
        error,
        unsent,
        reused,
    }
}

/// Locks what only plain code guards; a panic inside such code left it consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
