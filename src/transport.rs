//! How a byte stream to a pod's port comes about: the trait [`Connect`] and its errors. What runs over the stream is not
//! known here.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, BufReader};
use tokio::net::TcpStream;

use crate::registry::PodRef;

/// A byte stream in both directions, which can be read in place.
pub trait Stream: AsyncBufRead + AsyncWrite + Send + Unpin {
    /// Returns what is known of those that go the same way. It may be asked when the stream itself is in use elsewhere.
    fn company(&self) -> Company {
        Company::default()
    }

    /// Sends what has come from `source`, without a copy in between. Resolves with how many bytes that was, 0 at the end of
    /// `source`. `None`: there is no such way, or nothing to be gained by it now; it is to be written as usual.
    ///
    /// # Errors
    /// Those of `source`.
    fn poll_send_from(
        &mut self,
        source: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Option<Poll<io::Result<usize>>> {
        let _ = (source, cx);
        None
    }
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for BufReader<T> {}

/// Who else goes a stream's way. The default is nobody.
#[derive(Clone, Default)]
pub struct Company(Option<Arc<dyn Fn() -> bool + Send + Sync>>);

impl Company {
    /// `in_the_way` tells whether a stream may have to wait for others at the moment.
    pub(crate) fn new(in_the_way: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(in_the_way)))
    }

    /// Tells whether the stream may have to wait for others at the moment: for their transfers, for a reader that stalls, or for an
    /// application that does. A new one may do better.
    #[must_use]
    pub fn is_in_the_way(&self) -> bool {
        self.0.as_ref().is_some_and(|in_the_way| in_the_way())
    }
}

impl fmt::Debug for Company {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Company")
            .field("is_in_the_way", &self.is_in_the_way())
            .finish()
    }
}

/// A byte stream of whatever make.
pub type BoxStream = Box<dyn Stream>;

/// The future of a [`Connect::connect`].
pub type Connecting<'a> = Pin<Box<dyn Future<Output = Result<BoxStream, ConnectError>> + Send + 'a>>;

/// One port of one pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The pod.
    pub pod: PodRef,
    /// The port's number in the pod.
    pub port: u16,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pod, self.port)
    }
}

/// Opens byte streams to pods.
///
/// A stream may be handed out before the pod's port has accepted: the failure then shows as the stream's first read or
/// write error, of kind `ConnectionRefused` when no byte can have reached the application.
pub trait Connect: fmt::Debug + Send + Sync {
    /// Opens one stream to `target`. Dropping the future abandons the attempt.
    fn connect<'a>(&'a self, target: &'a Target) -> Connecting<'a>;
}

/// Why no stream came about. Variants say what the caller can do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The pod is gone or not running: try another endpoint.
    #[error("{0}")]
    PodGone(String),
    /// The user may not open port-forwards there; trying again is no use.
    #[error("{0}")]
    Forbidden(String),
    /// The credentials are missing, wrong or expired.
    #[error("{0}")]
    Unauthorized(String),
    /// The API server itself cannot be reached: worth another try.
    #[error("{0}")]
    Unreachable(String),
    /// The API server or the node did not take the request: worth another try.
    #[error("{0}")]
    Unavailable(String),
    /// Nothing was decided in time.
    #[error("no connection to {0} within {1:?}")]
    Timeout(Target, std::time::Duration),
}

/// Finds the `io::Error` that lies at the bottom of an error's chain of sources.
pub fn io_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        next = error.source();
    }
    None
}
