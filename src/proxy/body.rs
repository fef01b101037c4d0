//! The bodies that pass through the proxy: they count bytes and keep what must live as long as they do.

use std::error::Error as StdError;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio_util::sync::DropGuard;

use crate::proxy::front::Front;
use crate::proxy::socket::Reset;
use crate::proxy::upstream::Lease;
use crate::registry::InFlight;
use crate::traffic::{OpenRecord, Outcome};

/// The error of a body, whatever its source.
pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// How many pieces of a body that nobody wants are taken from the HTTP library, which holds one or two.
const LEFTOVERS: usize = 4;

/// A client's body. It tells an HTTP/1.1 connection whether it has been read to its end.
#[derive(Debug)]
pub(crate) struct ClientBody {
    body: Incoming,
    front: Option<Arc<Front>>,
    /// Whether the client was told to send it, or sends it without a word.
    asked: bool,
    /// Whether it has been read to its end.
    read: bool,
}

impl ClientBody {
    /// Takes the body of a request. `front`: what it came over, if that was HTTP/1.1. `expected`: the client waits to be told
    /// to send it, which the first reading does.
    pub(crate) fn new(body: Incoming, front: Option<Arc<Front>>, expected: bool) -> Self {
        Self {
            body,
            front,
            asked: !expected,
            read: false,
        }
    }
}

/// Polls a body that comes over HTTP/2 for its next frame. The HTTP library takes a reset with NO_ERROR for the end of the body. It
/// is one only behind an END_STREAM, or the length that was told (RFC 9113 section 8.1); proxies reset answers so whose own
/// source has failed.
pub(crate) fn poll_http2_frame(
    body: &mut Incoming,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
    let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
    if frame.is_none() && !body.is_end_stream() && body.size_hint().exact() != Some(0) {
        return Poll::Ready(Some(Err("the stream was reset before its end (NO_ERROR)".into())));
    }
    Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.asked = true;
        let frame = match &self.front {
            Some(_) => ready!(Pin::new(&mut self.body).poll_frame(cx)).map(|frame| frame.map_err(Into::into)),
            None => ready!(poll_http2_frame(&mut self.body, cx)),
        };
        // Nothing follows trailers, and nobody has to ask whether anything does.
        let last = matches!(&frame, Some(Ok(frame)) if frame.is_trailers());
        if last || frame.is_none() || self.body.is_end_stream() {
            self.read = true;
            if let Some(front) = &self.front {
                front.body_read();
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ClientBody {
    fn drop(&mut self) {
        let Some(front) = self.front.clone() else { return };
        // What has arrived already is taken, so that a short body does not cost the connection.
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..LEFTOVERS {
            if self.read || self.is_end_stream() {
                return;
            }
            let ready = self.asked
                && matches!(
                    Pin::new(&mut *self).poll_frame(&mut cx),
                    Poll::Ready(None | Some(Ok(_)))
                );
            if !ready {
                break;
            }
        }
        if !self.read {
            front.abandon_body();
        }
    }
}

/// The body of a response on its way to the client.
#[derive(Debug)]
pub(crate) enum ResponseBody {
    /// A pod's.
    Upstream(Box<Passed>),
    /// The proxy's own; nothing once it was sent.
    Own(Option<Bytes>),
}

/// A pod's body as it passes. It owns what must live as long: the access record, which is emitted when the body is dropped,
/// the connection, which goes back to its pool at the end, and the pod's count of requests under way.
#[derive(Debug)]
pub(crate) struct Passed {
    body: Incoming,
    lease: Option<Lease>,
    /// Ends a request whose body was not asked for.
    _unasked: Option<DropGuard>,
    _in_flight: InFlight,
    /// Resets the client's connection if the body breaks.
    reset: Option<Reset>,
    record: OpenRecord,
}

impl ResponseBody {
    /// Passes on a pod's body.
    pub(crate) fn upstream(
        body: Incoming,
        lease: Lease,
        unasked: Option<DropGuard>,
        in_flight: InFlight,
        reset: Option<Reset>,
        record: OpenRecord,
    ) -> Self {
        let mut passed = Passed {
            body,
            lease: Some(lease),
            _unasked: unasked,
            _in_flight: in_flight,
            reset,
            record,
        };
        if passed.body.is_end_stream() {
            passed.finish(Outcome::Complete);
        }
        Self::Upstream(Box::new(passed))
    }

    /// Sends bytes of our own.
    pub(crate) fn own(bytes: Bytes) -> Self {
        Self::Own(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

impl Passed {
    /// Polls for the next frame; there is none once the lease has gone.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.lease {
            Some(lease) => lease.poll_frame(&mut self.body, cx),
            None => Poll::Ready(None),
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.record.outcome = outcome;
        if let Some(lease) = self.lease.take()
            && outcome == Outcome::Complete
        {
            lease.give_back();
        }
    }

    fn observe(&mut self, frame: Option<&Result<Frame<Bytes>, BoxError>>) {
        match frame {
            None => self.finish(Outcome::Complete),
            Some(Err(error)) => {
                self.record.reason.get_or_insert_with(|| error.to_string());
                if let Some(reset) = &self.reset {
                    reset.wish();
                }
                self.finish(Outcome::Broken);
            }
            Some(Ok(frame)) => {
                self.record.sent += frame.data_ref().map_or(0, Bytes::len) as u64;
                if let Some(status) = frame.trailers_ref().and_then(grpc_status) {
                    self.record.grpc_status = Some(status);
                }
                if self.body.is_end_stream() {
                    // The server side does not poll again once it knows that the body has ended.
                    self.finish(Outcome::Complete);
                }
            }
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream(passed) => {
                let frame = ready!(passed.poll_frame(cx));
                passed.observe(frame.as_ref());
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Upstream(passed) => passed.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upstream(passed) => passed.body.size_hint(),
        }
    }
}

/// Reads `grpc-status` from headers or trailers.
#[must_use]
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(GRPC_STATUS)?.to_str().ok()?.to_owned())
}
