//! Requests that leave HTTP (contract D5).

use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube_tunnel::testing::{FakeCluster, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Message, protocol::Role};

use crate::app::{PATIENCE, TestApp, web};
use crate::backends::behind;
use crate::interim::until;

const WEB: &str = "web.shop.svc.cluster.local";

async fn app() -> (FakeCluster, Workload, TestApp) {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    (cluster, workload, app)
}

async fn echo(mut socket: WebSocketStream<impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>) {
    for text in ["first", "second"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
    let large = Message::binary(vec![7; 1 << 20]);
    socket.send(large.clone()).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), large);
    socket.close(None).await.unwrap();
    assert!(socket.next().await.unwrap().unwrap().is_close());
}

#[tokio::test]
async fn a_websocket_passes_over_http1() {
    let (_cluster, _workload, app) = app().await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let url = format!("ws://{WEB}/ws");
    let (socket, answer) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    echo(socket).await;
}

fn empty() -> UnsyncBoxBody<bytes::Bytes, hyper::Error> {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

#[tokio::test]
async fn a_websocket_passes_over_http2() {
    let (_cluster, _workload, app) = app().await;
    let io = TokioIo::new(TcpStream::connect(app.address).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http2::handshake::<
        _,
        _,
        UnsyncBoxBody<bytes::Bytes, hyper::Error>,
    >(TokioExecutor::new(), io)
    .await
    .unwrap();
    tokio::spawn(connection);
    // An answer proves that the server's settings, which offer extended CONNECT, have arrived.
    let get = Request::get(format!("http://{WEB}/")).body(empty()).unwrap();
    assert_eq!(sender.send_request(get).await.unwrap().status(), StatusCode::OK);
    let connect = |path: &str| {
        Request::connect(format!("http://{WEB}{path}"))
            .extension(hyper::ext::Protocol::from_static("websocket"))
            .header("sec-websocket-version", "13")
            .body(empty())
            .unwrap()
    };
    let answer = sender.send_request(connect("/ws")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.headers().get("sec-websocket-accept").is_none());
    let upgraded = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    echo(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await).await;
    // Where the pod just answers, success would mean to the client that a WebSocket had begun (RFC 8441 section 5).
    let answer = sender.send_request(connect("/page")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn any_other_protocol_passes_as_bytes_in_both_directions() {
    let cluster = FakeCluster::start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let backend = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let length = stream.read(&mut head).await.unwrap();
        // The first bytes of the other protocol come in the same packet as the agreement.
        stream
            .write_all(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: chat/2\r\n\r\nwelcome")
            .await
            .unwrap();
        let mut question = [0; 8];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(&question).await.unwrap();
        String::from_utf8_lossy(&head[..length]).to_ascii_lowercase()
    });
    let _workload = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .backend(move |_| address)
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    let mut stream = TcpStream::connect(app.address).await.unwrap();
    let request = format!(
        "GET /chat HTTP/1.1\r\nHost: {WEB}\r\nConnection: Upgrade\r\nUpgrade: chat/2\r\n\r\nquestion"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nwelcomequestion"), "{answer}");
    let head = backend.await.unwrap();
    assert!(
        head.contains("connection: upgrade\r\n") && head.contains("upgrade: chat/2\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_backend_that_does_not_agree_answers_as_usual() {
    let (_cluster, _workload, app) = app().await;
    let mut client = crate::client::Client::http1(app.address).await;
    let mut request = crate::client::get(WEB, "/page");
    request
        .headers_mut()
        .insert("connection", "upgrade".parse().unwrap());
    request.headers_mut().insert("upgrade", "chat/2".parse().unwrap());
    let reply = crate::client::Reply::read(client.send(request).await).await;
    assert_eq!(
        (reply.status, &reply.json()["target"]),
        (StatusCode::OK, &"/page".into())
    );
}

/// Reads one HTTP/2 frame: its type, flags, stream and payload.
pub(crate) async fn frame(stream: &mut TcpStream) -> (u8, u8, u32, Vec<u8>) {
    let mut header = [0; 9];
    stream.read_exact(&mut header).await.unwrap();
    let length = header[..3]
        .iter()
        .fold(0, |length, &byte| length << 8 | usize::from(byte));
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await.unwrap();
    (
        header[3],
        header[4],
        u32::from_be_bytes(header[5..].try_into().unwrap()),
        payload,
    )
}

#[tokio::test]
async fn a_pod_that_breaks_off_resets_a_client_that_could_take_it_for_an_end() {
    let upgraded = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    for (version, answer, last) in [("1.1", upgraded, "\r\n\r\n"), ("1.0", chunked, "hello")] {
        let cluster = FakeCluster::start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (break_off, broken_off) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            until(&mut stream, "\r\n\r\n").await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            let _ = broken_off.await;
            stream.set_zero_linger().unwrap();
        });
        let _workload = behind(&cluster, address);
        let app = TestApp::start(&cluster).await;
        let mut client = TcpStream::connect(app.address).await.unwrap();
        let request =
            format!("GET / HTTP/{version}\r\nHost: web.shop\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        until(&mut client, last).await;
        break_off.send(()).unwrap();
        let ended = tokio::time::timeout(PATIENCE, client.read(&mut [0]))
            .await
            .unwrap();
        let kind = ended.map_err(|error| error.kind());
        assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset), "HTTP/{version}");
    }
}

#[tokio::test]
async fn an_upgrade_to_h2c_ends_on_http2_with_stream_1_answered() {
    const HEADERS: u8 = 1;
    const DATA: u8 = 0;
    const END_STREAM: u8 = 1;
    let (_cluster, _workload, app) = app().await;
    let mut stream = TcpStream::connect(app.address).await.unwrap();
    let request = format!(
        "GET /page?x=1 HTTP/1.1\r\nHost: {WEB}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nX-Mine: kept\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 101 ") && head.contains("upgrade: h2c\r\n"),
        "{head}"
    );

    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    let (mut status, mut body) = (None, Vec::new());
    loop {
        let (kind, flags, id, payload) = frame(&mut stream).await;
        match kind {
            HEADERS => status = Some((id, payload[0])),
            DATA => body.extend(payload),
            _ => {}
        }
        if kind <= HEADERS && flags & END_STREAM != 0 {
            break;
        }
    }
    assert_eq!(
        status,
        Some((1, 0x88)),
        "stream 1, and `:status: 200` of the static table"
    );
    let seen: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (&seen["target"], &seen["host"]),
        (&"/page?x=1".into(), &WEB.into())
    );
    let fields = seen["headers"].to_string();
    assert!(
        fields.contains("kept") && !fields.contains("http2-settings"),
        "{fields}"
    );
}
