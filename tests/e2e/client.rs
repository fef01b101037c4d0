//! A small HTTP client: one connection, one protocol, bodies of any size.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Longer than one small request takes, its retries included.
const LIMIT: Duration = Duration::from_secs(60);

/// The body of a request.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    H2c,
}

/// Both, for what must hold for either.
pub(crate) const PROTOCOLS: [Protocol; 2] = [Protocol::Http1, Protocol::H2c];

/// A connection to the proxy.
pub(crate) struct Client {
    sender: Sender,
    /// Of the URLs that HTTP/2 sends.
    scheme: &'static str,
    /// Ends with the client.
    connection: JoinSet<()>,
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

impl Client {
    /// Opens a connection.
    pub(crate) async fn connect(proxy: SocketAddr, protocol: Protocol) -> Result<Self> {
        let stream = TcpStream::connect(proxy).await.context("cannot connect")?;
        match protocol {
            Protocol::Http1 => Self::http1(stream).await,
            Protocol::H2c => Self::http2(stream, "http").await,
        }
    }

    /// Speaks HTTP/1.1 on a stream.
    pub(crate) async fn http1(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async { drop(connection.with_upgrades().await) });
        Ok(Self {
            sender: Sender::Http1(sender),
            scheme: "http",
            connection: tasks,
        })
    }

    /// Speaks HTTP/2 on a stream.
    pub(crate) async fn http2(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        scheme: &'static str,
    ) -> Result<Self> {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async { drop(connection.await) });
        Ok(Self {
            sender: Sender::Http2(sender),
            scheme,
            connection: tasks,
        })
    }

    /// Lets a task end with the client.
    pub(crate) fn adopt(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.connection.spawn(task);
    }

    /// Sends a request and gets the head of its response.
    pub(crate) async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>> {
        let sending = async {
            Ok(match &mut self.sender {
                Sender::Http1(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await?
                }
                Sender::Http2(sender) => {
                    let (mut parts, body) = request.into_parts();
                    // Without a host it is a request in the form that HTTP/1.1 gave it.
                    if let Some(host) = parts.headers.remove("host") {
                        parts.uri = format!("{}://{}{}", self.scheme, host.to_str()?, parts.uri).parse()?;
                    }
                    sender.send_request(Request::from_parts(parts, body)).await?
                }
            })
        };
        sending.await
    }

    /// Sends a small request and reads the whole response.
    pub(crate) async fn exchange(&mut self, request: Request<Body>) -> Result<Reply> {
        let exchange = async { Reply::read(self.send(request).await?).await };
        tokio::time::timeout(LIMIT, exchange)
            .await
            .context("no answer in time")?
    }

    /// Sends a GET and reads the whole response.
    pub(crate) async fn get(&mut self, host: &str, path: &str) -> Reply {
        let reply = self.exchange(get(host, path)).await;
        reply.unwrap_or_else(|error| panic!("{host}{path}: {error:#}"))
    }
}

/// Makes a GET.
pub(crate) fn get(host: &str, path: &str) -> Request<Body> {
    Request::get(path).header("host", host).body(empty()).unwrap()
}

/// Makes an empty body.
pub(crate) fn empty() -> Body {
    Empty::new().boxed_unsync()
}

/// Makes a body.
pub(crate) fn full(text: &str) -> Body {
    Full::from(text.to_owned()).boxed_unsync()
}

/// Makes a body that is sent piece by piece, as they come.
pub(crate) fn pieces() -> (mpsc::UnboundedSender<Frame<Bytes>>, Body) {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let pieces = stream::poll_fn(move |cx| receiver.poll_recv(cx).map(|piece| piece.map(Ok)));
    (sender, StreamBody::new(pieces).boxed_unsync())
}

/// Sends one GET on a connection of its own.
pub(crate) async fn try_fetch(proxy: SocketAddr, host: &str, path: &str) -> Result<Reply> {
    Client::connect(proxy, Protocol::Http1)
        .await?
        .exchange(get(host, path))
        .await
}

/// Sends one GET that must get an answer, of whatever status.
pub(crate) async fn fetch(proxy: SocketAddr, host: &str, path: &str) -> Reply {
    let reply = try_fetch(proxy, host, path).await;
    reply.unwrap_or_else(|error| panic!("{host}{path}: {error:#}"))
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Reply {
    async fn read(response: Response<Incoming>) -> Result<Self> {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned();
        let body = collected.to_bytes();
        Ok(Self {
            status: parts.status,
            headers: parts.headers,
            body,
            trailers,
        })
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The pod that answered, as the test server says it.
    pub(crate) fn pod(&self) -> String {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        self.json()["pod"]
            .as_str()
            .unwrap_or_else(|| panic!("no pod in {}", self.text()))
            .to_owned()
    }
}

/// Reads the body of a response by length, while more of it is to come.
pub(crate) struct Pieces {
    body: Incoming,
    read: Vec<u8>,
}

impl Pieces {
    pub(crate) fn of(body: Incoming) -> Self {
        Self {
            body,
            read: Vec::new(),
        }
    }

    /// Waits for that many bytes.
    pub(crate) async fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.read.len() < length {
            let frame = self.body.frame().await.context("the body ended")??;
            let data = frame.into_data().ok().context("trailers in place of data")?;
            self.read.extend_from_slice(&data);
        }
        Ok(self.read.drain(..length).collect())
    }

    /// Waits for the end, and the trailers before it.
    pub(crate) async fn end(&mut self) -> Result<Option<HeaderMap>> {
        loop {
            ensure!(self.read.is_empty(), "more data: {:?}", self.read);
            let Some(frame) = self.body.frame().await.transpose()? else {
                return Ok(None);
            };
            match frame.into_data() {
                // HTTP/2 may end a body with an empty frame.
                Ok(data) => self.read.extend_from_slice(&data),
                Err(frame) => return Ok(frame.into_trailers().ok()),
            }
        }
    }
}
