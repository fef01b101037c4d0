//! The bodies that pass through the proxy: they count bytes and keep what must live as long as they do.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::proxy::upstream::Lease;
use crate::registry::InFlight;
use crate::traffic::{AccessRecord, Outcome};

/// The error of a body, whatever its source.
pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

/// The body of a response on its way to the client. It owns the access record, which is emitted when the body is dropped.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    source: Source,
    record: AccessRecord,
}

/// Where the bytes come from.
#[derive(Debug)]
enum Source {
    /// A pod. The connection goes back to its pool at the end of the body, and the pod counts as busy until then.
    Upstream {
        body: Incoming,
        lease: Option<Lease>,
        _in_flight: InFlight,
    },
    /// The proxy itself.
    Own(Option<Bytes>),
}

impl ResponseBody {
    /// Passes on a pod's body.
    #[must_use]
    pub(crate) fn upstream(
        body: Incoming,
        lease: Option<Lease>,
        in_flight: InFlight,
        record: AccessRecord,
    ) -> Self {
        let mut this = Self {
            source: Source::Upstream {
                body,
                lease,
                _in_flight: in_flight,
            },
            record,
        };
        if let Source::Upstream { body, .. } = &this.source
            && body.is_end_stream()
        {
            this.finish(Outcome::Complete);
        }
        this
    }

    /// Sends bytes of our own.
    #[must_use]
    pub(crate) fn own(bytes: Bytes, mut record: AccessRecord) -> Self {
        record.sent.add(bytes.len());
        // Whether the client reads these few bytes is not observed.
        record.outcome = Outcome::Complete;
        Self {
            source: Source::Own(Some(bytes).filter(|bytes| !bytes.is_empty())),
            record,
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.record.outcome = outcome;
        if let Source::Upstream { lease, .. } = &mut self.source
            && let Some(lease) = lease.take()
            && outcome == Outcome::Complete
        {
            lease.give_back();
        }
    }

    fn observe(&mut self, frame: Option<&Result<Frame<Bytes>, hyper::Error>>) {
        match frame {
            None => self.finish(Outcome::Complete),
            Some(Err(error)) => {
                self.record.reason.get_or_insert_with(|| error.to_string());
                self.finish(Outcome::Broken);
            }
            Some(Ok(frame)) => {
                self.record.sent.add(frame.data_ref().map_or(0, Bytes::len));
                if let Some(status) = frame.trailers_ref().and_then(grpc_status) {
                    self.record.grpc_status = Some(status);
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
        let frame = match &mut self.source {
            Source::Own(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Source::Upstream { body, .. } => ready!(Pin::new(body).poll_frame(cx)),
        };
        self.observe(frame.as_ref());
        // The server side does not poll again once it knows that the body has ended, after its last byte or trailers.
        if let Source::Upstream { body, .. } = &self.source
            && matches!(frame, Some(Ok(_)))
            && body.is_end_stream()
        {
            self.finish(Outcome::Complete);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Own(bytes) => bytes.is_none(),
            Source::Upstream { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Source::Upstream { body, .. } => body.size_hint(),
        }
    }
}

/// Reads `grpc-status` from headers or trailers.
#[must_use]
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<String> {
    Some(headers.get("grpc-status")?.to_str().ok()?.to_owned())
}
