//! What is sent through each pair of protocols: one exchange of each kind that people rely on.

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message, protocol::Role};

use crate::client::{Client, Pieces, empty, get, pieces};
use crate::events::Events;
use crate::front::{Front, Io};
use crate::program::Proxy;
use crate::rpc::{self, Bidi};

/// One kind of exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Get,
    PostStream,
    Trailers,
    Events,
    WebSocket,
    GrpcUnary,
    GrpcBidi,
    Continue,
}

/// All of them.
pub(crate) const CASES: [Case; 8] = [
    Case::Get,
    Case::PostStream,
    Case::Trailers,
    Case::Events,
    Case::WebSocket,
    Case::GrpcUnary,
    Case::GrpcBidi,
    Case::Continue,
];

impl Case {
    /// Heads its column.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::PostStream => "POST stream",
            Self::Trailers => "trailers",
            Self::Events => "SSE",
            Self::WebSocket => "WebSocket",
            Self::GrpcUnary => "gRPC unary",
            Self::GrpcBidi => "gRPC bidi",
            Self::Continue => "100-continue",
        }
    }

    /// Goes through it on a connection of its own.
    ///
    /// # Errors
    /// In words what went another way.
    pub(crate) async fn run(self, proxy: &Proxy, front: Front, host: &str) -> Result<()> {
        let mut client = front.connect(proxy, host).await?.0;
        match self {
            Self::Get => version_at_the_pod(proxy, front, host).await.map(drop),
            Self::PostStream => post_stream(&mut client, host).await,
            Self::Trailers => trailers(&mut client, host).await,
            Self::Events => events(&mut client, host).await,
            Self::WebSocket if front.is_http2() => web_socket_by_connect(&mut client, host).await,
            Self::WebSocket => web_socket(front.stream(proxy, host).await?, host).await,
            Self::GrpcUnary => rpc::unary(&mut client, host).await.map(drop),
            Self::GrpcBidi => grpc_bidi(&mut client, host).await,
            Self::Continue if front.is_http2() => no_interim_response(&mut client, host).await,
            Self::Continue => interim_response(front.stream(proxy, host).await?, host).await,
        }
    }
}

/// Gets `/hello` and returns the version of HTTP that the pod has seen.
pub(crate) async fn version_at_the_pod(proxy: &Proxy, front: Front, host: &str) -> Result<String> {
    let reply = match front.connect(proxy, host).await? {
        (_, Some(reply)) => reply,
        (mut client, None) => client.exchange(get(host, "/hello")).await?,
    };
    ensure!(reply.status == 200, "{} {}", reply.status, reply.text());
    let seen = reply.json();
    ensure!(
        seen["method"] == "GET" && seen["target"] == "/hello" && seen["host"] == host,
        "{seen}"
    );
    Ok(seen["proto"].as_str().context("no version")?.to_owned())
}

/// Each piece comes back before the next is sent.
async fn post_stream(client: &mut Client, host: &str) -> Result<()> {
    let (send, body) = pieces();
    let request = Request::post("/pipe").header("host", host).body(body)?;
    send.send(Frame::data("first".into()))?;
    let response = client.send(request).await?;
    let status = response.status();
    let mut back = Pieces::of(response.into_body());
    ensure!(status == 200, "{status}");
    ensure!(back.take(5).await? == b"first");
    for text in ["second", "third"] {
        send.send(Frame::data(text.into()))?;
        ensure!(back.take(text.len()).await? == text.as_bytes());
    }
    drop(send);
    ensure!(back.end().await?.is_none(), "trailers out of nowhere");
    Ok(())
}

/// The request's reach the pod, and the response's the client.
async fn trailers(client: &mut Client, host: &str) -> Result<()> {
    let (send, body) = pieces();
    send.send(Frame::data("body".into()))?;
    let mut fields = HeaderMap::new();
    fields.insert("x-sent-last", HeaderValue::from_static("yes"));
    send.send(Frame::trailers(fields))?;
    drop(send);
    let request = Request::post("/echo").header("host", host);
    let reply = client
        .exchange(request.header("trailer", "x-sent-last").body(body)?)
        .await?;
    ensure!(reply.status == 200, "{} {}", reply.status, reply.text());
    let seen = reply.json();
    ensure!(
        seen["body"] == "body" && seen["trailers"][0][0] == "X-Sent-Last",
        "{seen}"
    );
    let mut request = get(host, "/trailers");
    request
        .headers_mut()
        .insert("te", HeaderValue::from_static("trailers"));
    let trailers = client
        .exchange(request)
        .await?
        .trailers
        .context("no trailers came")?;
    ensure!(trailers.contains_key("x-body-sha256"), "{trailers:?}");
    Ok(())
}

/// The second event is an hour away, so the first can only come if nothing holds it back.
async fn events(client: &mut Client, host: &str) -> Result<()> {
    let mut events = Events::open(client, host, "/sse?count=2&interval_ms=3600000").await;
    let first = events.next().await.context("no event")?;
    ensure!(first["seq"] == 0, "{first}");
    Ok(())
}

/// `Upgrade` of HTTP/1.1 (RFC 6455).
async fn web_socket(stream: Box<dyn Io>, host: &str) -> Result<()> {
    match tokio_tungstenite::client_async(format!("ws://{host}/ws"), stream).await {
        Ok((socket, _)) => echo(socket).await,
        Err(tungstenite::Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            bail!("{} {}", response.status(), String::from_utf8_lossy(body))
        }
        Err(error) => Err(error.into()),
    }
}

/// Extended CONNECT of HTTP/2 (RFC 8441).
async fn web_socket_by_connect(client: &mut Client, host: &str) -> Result<()> {
    // An answer proves that the settings which offer it have arrived.
    client.get(host, "/hello").await;
    let request = Request::connect("/ws")
        .header("host", host)
        .header("sec-websocket-version", "13")
        .extension(hyper::ext::Protocol::from_static("websocket"));
    let response = client.send(request.body(empty())?).await?;
    if response.status() != 200 {
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        bail!("{status} {}", String::from_utf8_lossy(&body));
    }
    let stream = TokioIo::new(hyper::upgrade::on(response).await?);
    echo(WebSocketStream::from_raw_socket(stream, Role::Client, None).await).await
}

async fn echo(mut socket: WebSocketStream<impl Io>) -> Result<()> {
    for message in [Message::text("text"), Message::binary(vec![0; 70_000])] {
        socket.send(message.clone()).await?;
        let back = socket.next().await.context("the socket ended")??;
        ensure!(back == message, "{back:?}");
    }
    socket.close(None).await?;
    ensure!(matches!(socket.next().await, Some(Ok(Message::Close(_)))));
    Ok(())
}

/// Waits for the interim response before it sends the body (RFC 9110 section 10.1.1).
async fn interim_response(mut stream: Box<dyn Io>, host: &str) -> Result<()> {
    let head = format!(
        "POST /echo HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: \
         close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut interim = Vec::new();
    while !interim.ends_with(b"\r\n\r\n") {
        interim.push(stream.read_u8().await?);
    }
    let interim = String::from_utf8(interim)?;
    ensure!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    stream.write_all(b"body").await?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await?;
    ensure!(
        rest.starts_with("HTTP/1.1 200 ") && rest.contains("\"body\":\"body\""),
        "{rest}"
    );
    Ok(())
}

/// Sends the body at once, as a client that does not wait.
async fn no_interim_response(client: &mut Client, host: &str) -> Result<()> {
    let (send, body) = pieces();
    let request = Request::post("/echo")
        .header("host", host)
        .header("expect", "100-continue");
    send.send(Frame::data("body".into()))?;
    drop(send);
    let reply = client.exchange(request.body(body)?).await?;
    ensure!(
        reply.status == 200 && reply.json()["body"] == "body",
        "{}",
        reply.text()
    );
    bail!("answered without an interim response")
}

/// Each message is answered before the next is sent.
async fn grpc_bidi(client: &mut Client, host: &str) -> Result<()> {
    let mut call = Bidi::open(client, host).await?;
    call.again().await?;
    call.again().await?;
    call.close().await
}
