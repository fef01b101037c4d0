use std::future::ready;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use super::*;
use crate::drain::Drain;
use crate::proxy::Limits;
use crate::proxy::notice::Notice;
use crate::proxy::upstream::{PodTls, Wire};
use crate::registry::PodRef;
use crate::tls::Trust;
use crate::transport::{BoxStream, Connect, Connecting, Stream, Target};

const PATIENCE: Duration = Duration::from_secs(10);

/// Opens streams to nobody, of which the first few have a transfer beside them.
#[derive(Debug, Default)]
struct Way {
    bulk: Arc<AtomicUsize>,
    opened: AtomicUsize,
    end: Arc<End>,
}

/// The end of all streams.
#[derive(Debug, Default)]
struct End {
    come: AtomicBool,
    readers: Mutex<Vec<Waker>>,
}

impl End {
    fn come(&self) {
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
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
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
        let end = self.end.clone();
        let stream: BoxStream = Box::new(Nobody { place, bulk, end });
        Box::pin(ready(Ok(stream)))
    }
}

struct Scene {
    way: Arc<Way>,
    pool: Arc<Pool>,
    shared: Arc<Shared>,
}

impl Scene {
    /// A pool for so many connections, one of which is idle.
    async fn new(places: usize) -> Self {
        let way = Arc::new(Way::default());
        let limits = Limits {
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
        };
        let peer = Peer {
            target: Target {
                pod: PodRef {
                    namespace: "shop".into(),
                    name: "web-0".into(),
                    uid: "".into(),
                },
                port: 80,
            },
            wire: Wire::Http1,
            server_name: None,
            alone: false,
        };
        let shared = Shared {
            connect: way.clone(),
            tls: PodTls::new(&Trust::Skip).unwrap(),
            limits,
            patience: PATIENCE,
            full: Notice::default(),
            drain: Drain::new(),
        };
        let scene = Self {
            way,
            pool: Pool::start(peer, places, &shared.drain),
            shared: Arc::new(shared),
        };
        let first = scene.checkout().await;
        scene.put(first).await;
        scene
    }

    async fn checkout(&self) -> Connection {
        let checkout = self.pool.checkout(&self.shared, Fresh::No).await;
        checkout.unwrap_or_else(|error| panic!("{error}")).0
    }

    /// Gives a connection back once it can carry another request.
    async fn put(&self, mut connection: Connection) {
        assert!(connection.ready().await);
        self.pool.put(connection);
    }

    fn opened(&self) -> usize {
        self.way.opened.load(Ordering::Relaxed)
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_requests_for_the_last_place_the_other_gets_what_was_passed_over() {
    let scene = Scene::new(2).await;
    scene.way.bulk.store(1, Ordering::Relaxed);
    let begun = Instant::now();
    let _both = tokio::join!(scene.checkout(), scene.checkout());
    assert_eq!((scene.opened(), begun.elapsed()), (2, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn where_a_new_connection_was_no_better_the_old_ones_do_for_a_while() {
    let scene = Scene::new(100).await;
    scene.way.bulk.store(usize::MAX, Ordering::Relaxed);
    for _ in 0..10 {
        let connection = scene.checkout().await;
        scene.put(connection).await;
    }
    assert_eq!(scene.opened(), 2);
    tokio::time::advance(FUTILE).await;
    let connection = scene.checkout().await;
    scene.put(connection).await;
    assert_eq!(scene.opened(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_let_go_of_when_the_pod_closes_it() {
    let scene = Scene::new(1).await;
    tokio::time::sleep(2 * keeper::SOON).await;
    assert_eq!(scene.pool.open(), 1);
    let begun = Instant::now();
    scene.way.end.come();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let idle = lock(&scene.pool.state).idle.len();
    assert_eq!((scene.pool.open(), idle, begun.elapsed()), (0, 0, Duration::ZERO));
}
