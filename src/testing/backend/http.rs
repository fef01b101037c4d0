//! The HTTP application: HTTP/1.1 and h2c on one port, gRPC by content type, with counters for tests.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use http::header::CONTENT_TYPE;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;
use tonic::body::Body;

use super::grpc::Grpc;
use super::listener::{Connection, Listener};
use super::{pages, websocket};
use crate::testing::cluster::{lock, remember};

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocols {
    /// HTTP/1.1, or HTTP/2 when the connection starts with its preface.
    Any,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 with prior knowledge only.
    Http2,
}

/// A running HTTP application.
#[derive(Debug)]
pub struct HttpBackend {
    /// Its port.
    listener: Listener,
    /// State shared with requests.
    shared: Arc<Shared>,
}

/// What requests share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The name it answers with.
    pub(super) pod: String,
    /// Method and target of each request, the latest of them.
    seen: Mutex<Vec<String>>,
    /// Requests whose answer has not ended.
    in_flight: AtomicUsize,
}

impl HttpBackend {
    /// Starts the application; `pod` is the name it answers with. Must be called inside a Tokio runtime.
    pub fn start(pod: &str, protocols: Protocols) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            pod: pod.to_owned(),
            seen: Mutex::default(),
            in_flight: AtomicUsize::new(0),
        });
        let grpc = Grpc::new(pod).map_err(io::Error::other)?;
        let state = shared.clone();
        let listener = Listener::start(move |stream, connection| {
            serve(stream, connection, protocols, state.clone(), grpc.clone())
        })?;
        Ok(Self { listener, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.listener.accepted()
    }

    /// Connections that are open now, as WebSockets too.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.listener.open()
    }

    /// Method and target of every request so far, such as `GET /echo?a=1`.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        lock(&self.shared.seen).clone()
    }

    /// Requests whose answer has not ended: a cancellation that reaches the backend brings it down.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// Cuts every connection that exists now.
    pub fn close_connections(&self) {
        self.listener.close_connections();
    }
}

async fn serve(
    stream: TcpStream,
    connection: Connection,
    protocols: Protocols,
    shared: Arc<Shared>,
    grpc: Grpc,
) {
    let tasks = connection.tasks().clone();
    let service = service_fn(move |request| {
        let (shared, grpc, connection) = (shared.clone(), grpc.clone(), connection.clone());
        async move { Ok::<_, Infallible>(answer(shared, grpc, &connection, request).await) }
    });
    let io = TokioIo::new(stream);
    // WebSockets over HTTP/2 (RFC 8441), and windows that do not hold bulk transfers back.
    let ended = match protocols {
        Protocols::Any => {
            let mut builder = auto::Builder::new(Tracked(tasks));
            builder.http1().timer(TokioTimer::new());
            builder
                .http2()
                .timer(TokioTimer::new())
                .enable_connect_protocol()
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(4 << 20);
            builder.serve_connection_with_upgrades(io, service).await
        }
        // Not the builder above with one version chosen: with upgrades it still takes both.
        Protocols::Http1 => {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(io, service);
            connection.with_upgrades().await.map_err(Into::into)
        }
        Protocols::Http2 => {
            let mut builder = http2::Builder::new(Tracked(tasks));
            builder.timer(TokioTimer::new()).enable_connect_protocol();
            builder.serve_connection(io, service).await.map_err(Into::into)
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "backend connection failed");
    }
}

async fn answer(
    shared: Arc<Shared>,
    grpc: Grpc,
    connection: &Connection,
    request: Request<Incoming>,
) -> Response<Body> {
    let asked = format!("{} {}", request.method(), request.uri());
    remember(&mut lock(&shared.seen), asked);
    let guard = InFlight::new(shared.clone());
    let is_grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let response = if is_grpc {
        grpc.answer(request).await
    } else if request.uri().path() == "/ws" {
        websocket::answer(connection, request)
    } else {
        pages::answer(&shared.pod, request).await
    };
    // The body owns the guard: it is dropped when the answer has been sent or given up.
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _ = &guard;
            frame
        }))
    })
}

/// Counts a request from its start to the end of its answer.
struct InFlight(Arc<Shared>);

impl InFlight {
    fn new(shared: Arc<Shared>) -> Self {
        shared.in_flight.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Spawns HTTP/2 streams under the backend's tracker.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> Executor<F> for Tracked
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
