//! For tests of pools: ways to pods that say nothing.

use std::future::ready;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use crate::drain::Drain;
use crate::proxy::Limits;
use crate::proxy::notice::Notice;
use crate::proxy::upstream::{Peer, PodTls, Shared, Wire, lock};
use crate::registry::PodRef;
use crate::tls::Trust;
use crate::transport::{BoxStream, Company, Connect, Connecting, Stream, Target};

const PATIENCE: Duration = Duration::from_secs(10);

/// Opens streams to nobody, of which the first few have a transfer beside them.
#[derive(Debug, Default)]
pub(super) struct Way {
    pub(super) bulk: Arc<AtomicUsize>,
    pub(super) opened: AtomicUsize,
    pub(super) end: Arc<End>,
    /// Whether streams take nothing any more, and how many bytes they have taken.
    pub(super) broken: Arc<AtomicBool>,
    pub(super) taken: Arc<AtomicUsize>,
}

/// The end of all streams.
#[derive(Debug, Default)]
pub(super) struct End {
    come: AtomicBool,
    readers: Mutex<Vec<Waker>>,
}

impl End {
    pub(super) fn come(&self) {
        self.come.store(true, Ordering::Relaxed);
        lock(&self.readers).drain(..).for_each(Waker::wake);
    }
}

/// A stream to nobody.
struct Nobody {
    /// Its place among all streams, and how many of the first are beside a transfer.
    place: usize,
    bulk: Arc<AtomicUsize>,
    end: Arc<End>,
    broken: Arc<AtomicBool>,
    taken: Arc<AtomicUsize>,
}

impl Stream for Nobody {
    fn company(&self) -> Company {
        let (place, bulk) = (self.place, self.bulk.clone());
        Company::new(move || place < bulk.load(Ordering::Relaxed))
    }
}

impl AsyncRead for Nobody {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.end.come.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        lock(&self.end.readers).push(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncBufRead for Nobody {
    fn poll_fill_buf(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Poll::Pending
    }

    fn consume(self: Pin<&mut Self>, _: usize) {}
}

impl AsyncWrite for Nobody {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.broken.load(Ordering::Relaxed) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        self.taken.fetch_add(bytes.len(), Ordering::Relaxed);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Connect for Way {
    fn connect<'a>(&'a self, _: &'a Target) -> Connecting<'a> {
        let (place, bulk) = (self.opened.fetch_add(1, Ordering::Relaxed), self.bulk.clone());
        let stream: BoxStream = Box::new(Nobody {
            place,
            bulk,
            end: self.end.clone(),
            broken: self.broken.clone(),
            taken: self.taken.clone(),
        });
        Box::pin(ready(Ok(stream)))
    }
}

/// Somebody to open connections to.
pub(super) fn peer(wire: Wire) -> Peer {
    Peer {
        target: Target {
            pod: PodRef {
                namespace: "shop".into(),
                name: "web-0".into(),
                uid: "".into(),
            },
            port: 80,
        },
        wire,
        server_name: None,
        alone: false,
    }
}

/// What pools share that open so many connections over a way, at most.
pub(super) fn shared(way: Arc<Way>, places: usize) -> Arc<Shared> {
    Arc::new(Shared {
        connect: way,
        tls: PodTls::new(&Trust::Skip).unwrap(),
        limits: Limits {
            connections: None,
            connections_per_client: None,
            connections_per_pod: places,
            header_bytes: 1 << 16,
            header_fields: 100,
            response_header_bytes: 1 << 16,
            response_header_fields: 100,
            replay_bytes: 1,
            linger: Duration::ZERO,
            streams: 1,
        },
        patience: PATIENCE,
        full: Notice::default(),
        drain: Drain::new(),
    })
}
