//! What a response holds of the connection that it comes over.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;
use hyper::body::Incoming;

use crate::drain::Drain;
use crate::proxy::body::{BoxError, poll_http2_frame};
use crate::proxy::upstream::http1::{Connection, Pool};
use crate::proxy::upstream::http2::Slot;

/// A connection's use by one response. Dropping it before the response is complete closes an HTTP/1.1 connection, which
/// could not be used for anything else.
#[derive(Debug)]
pub(crate) struct Lease(Held);

enum Held {
    Http1(Box<(Arc<Pool>, Connection, Drain)>),
    Retired(Box<(Arc<Pool>, Connection, Drain)>),
    Http2(#[expect(dead_code, reason = "counts the stream for as long as it lives")] Slot),
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http1(_) => "Http1",
            Self::Retired(_) => "Retired",
            Self::Http2(_) => "Http2",
        })
    }
}

impl Lease {
    pub(super) fn http1(pool: Arc<Pool>, connection: Connection, drain: Drain) -> Self {
        Self(Held::Http1(Box::new((pool, connection, drain))))
    }

    pub(super) fn http2(slot: Slot) -> Self {
        Self(Held::Http2(slot))
    }

    /// Polls the response's body for its next frame.
    pub(crate) fn poll_frame(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Held::Http1(held) | Held::Retired(held) => {
                let frame = ready!(held.1.poll_frame(body, cx));
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Held::Http2(_) => poll_http2_frame(body, cx),
        }
    }

    /// Lets the connection go on while nobody polls the response's body: there is more to it than that.
    pub(crate) fn detach(&mut self) {
        if let Held::Http1(held) | Held::Retired(held) = &mut self.0 {
            held.1.detach();
        }
    }

    /// Gives up the use of the connection for anything else; it still counts until this is dropped.
    pub(crate) fn retire(self) -> Self {
        match self.0 {
            Held::Http1(held) => Self(Held::Retired(held)),
            held => Self(held),
        }
    }

    /// Gives the connection back, to be called when the response's body has been read to its end.
    pub(crate) fn give_back(self) {
        let Held::Http1(held) = self.0 else { return };
        let (pool, mut connection, drain) = *held;
        if connection.is_ready() {
            pool.put(connection);
        } else if !connection.is_closed() {
            // It has yet to see the end of the message, or is still sending the request's body.
            drain.spawn(async move {
                if connection.ready().await {
                    pool.put(connection);
                }
            });
        }
    }
}
