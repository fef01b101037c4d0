//! A small HTTP client for tests: one connection, one protocol, every byte under control.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;

/// A connection to the proxy.
pub(crate) enum Client {
    Http1(http1::SendRequest<Full<Bytes>>),
    H2c(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    /// Opens an HTTP/1.1 connection.
    pub(crate) async fn http1(proxy: SocketAddr) -> Self {
        let stream = TcpStream::connect(proxy).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self::Http1(sender)
    }

    /// Opens an HTTP/2 connection with prior knowledge.
    pub(crate) async fn h2c(proxy: SocketAddr) -> Self {
        let stream = TcpStream::connect(proxy).await.unwrap();
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self::H2c(sender)
    }

    /// Sends a request and gets the head of its response.
    pub(crate) async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request).await.unwrap()
            }
            Self::H2c(sender) => {
                let (mut parts, body) = request.into_parts();
                let host = parts.headers.remove("host").unwrap();
                parts.uri = format!("http://{}{}", host.to_str().unwrap(), parts.uri)
                    .parse()
                    .unwrap();
                sender
                    .send_request(Request::from_parts(parts, body))
                    .await
                    .unwrap()
            }
        }
    }

    /// Sends a GET and reads the whole response.
    pub(crate) async fn get(&mut self, host: &str, path: &str) -> Reply {
        let request = get(host, path);
        Reply::read(self.send(request).await).await
    }
}

/// Makes a GET.
pub(crate) fn get(host: &str, path: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .uri(path)
        .header("host", host)
        .body(Full::default())
        .unwrap()
}

/// Sends one GET on a connection of its own.
pub(crate) async fn fetch(proxy: SocketAddr, host: &str, path: &str) -> Reply {
    Client::http1(proxy).await.get(host, path).await
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
    /// Reads a response to its end.
    pub(crate) async fn read(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.unwrap();
        let trailers = collected.trailers().cloned();
        Self {
            status: parts.status,
            headers: parts.headers,
            body: collected.to_bytes(),
            trailers,
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The pod that answered, as the sample applications say it.
    pub(crate) fn pod(&self) -> String {
        self.json()["pod"]
            .as_str()
            .unwrap_or_else(|| panic!("no pod in {}", self.text()))
            .to_owned()
    }
}
