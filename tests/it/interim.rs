//! Interim responses and `Expect: 100-continue` (contract D3, D4; RFC 9110 sections 10.1.1 and 15.2).

use std::net::SocketAddr;
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use kube_tunnel::testing::FakeCluster;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::app::{PATIENCE, TestApp, web};
use crate::backends::{behind, behind_http2};

const HEAD: &str =
    "POST /upload HTTP/1.1\r\nHost: web.shop\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";

/// Reads until what was read ends with `end`.
pub(crate) async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut seen = Vec::new();
    let reading = async {
        while !seen.ends_with(end.as_bytes()) {
            seen.push(
                stream
                    .read_u8()
                    .await
                    .unwrap_or_else(|error| panic!("{error}: {seen:?}")),
            );
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .unwrap_or_else(|_| panic!("{end:?} never came, but {:?}", String::from_utf8_lossy(&seen)));
    String::from_utf8(seen).unwrap()
}

/// A pod's listener, and the proxy in front of it.
pub(crate) async fn scene() -> (FakeCluster, TcpListener, TestApp) {
    let cluster = FakeCluster::start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    (cluster, listener, app)
}

/// Sends the head of a request that expects to be told to go on.
async fn ask(proxy: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(proxy).await.unwrap();
    client.write_all(HEAD.as_bytes()).await.unwrap();
    client
}

#[tokio::test]
async fn the_body_is_asked_for_when_the_pod_asks_for_it() {
    let (_cluster, listener, app) = scene().await;
    let mut client = ask(app.address).await;
    let (mut pod, _) = listener.accept().await.unwrap();
    let head = until(&mut pod, "\r\n\r\n").await.to_ascii_lowercase();
    assert!(head.contains("\r\nexpect: 100-continue\r\n"), "{head}");
    pod.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
    assert_eq!(
        until(&mut client, "\r\n\r\n").await,
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.write_all(b"body").await.unwrap();
    until(&mut pod, "body").await;
    pod.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok")
        .await
        .unwrap();
    let answer = until(&mut client, "\r\n\r\nok").await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
}

#[tokio::test]
async fn a_pod_that_refuses_is_heard_before_the_body_is_sent() {
    let (_cluster, listener, app) = scene().await;
    for status in [
        "417 Expectation Failed",
        "401 Unauthorized",
        "413 Content Too Large",
    ] {
        let mut client = ask(app.address).await;
        let (mut pod, _) = listener.accept().await.unwrap();
        until(&mut pod, "\r\n\r\n").await;
        let refusal = format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nno");
        pod.write_all(refusal.as_bytes()).await.unwrap();
        let answer = until(&mut client, "\r\n\r\nno").await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {}", &status[..3])),
            "{answer}"
        );
        assert!(
            answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n"),
            "a body that was never read leaves the connection of no use: {answer}"
        );
        // The request to the pod was left in its middle, so its connection must end too.
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, pod.read_to_end(&mut rest)).await;
        ended
            .expect("the pod waits for a body that does not come")
            .unwrap();
        assert!(rest.is_empty(), "{rest:?}");
    }
}

#[tokio::test]
async fn a_pod_that_says_nothing_gets_the_body_after_a_moment() {
    let (_cluster, listener, app) = scene().await;
    let before = Instant::now();
    let mut client = ask(app.address).await;
    let (mut pod, _) = listener.accept().await.unwrap();
    until(&mut pod, "\r\n\r\n").await;
    assert_eq!(
        until(&mut client, "\r\n\r\n").await,
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    assert!(before.elapsed() >= Duration::from_secs(1));
    client.write_all(b"body").await.unwrap();
    until(&mut pod, "body").await;
    // It comes too late to be passed on: the client has been told.
    pod.write_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await
        .unwrap();
    let answer = until(&mut client, "\r\n\r\nok").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn an_answer_of_our_own_asks_for_no_body() {
    let (_cluster, _listener, app) = scene().await;
    let mut client = TcpStream::connect(app.address).await.unwrap();
    let head = HEAD.replace("web.shop", "nosuch.shop");
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test]
async fn real_servers_and_retries_know_the_expectation() {
    use kube_tunnel::testing::ForwardFault;
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::Refused));
    let app = TestApp::start(&cluster).await;
    for _ in 0..2 {
        let mut client = ask(app.address).await;
        assert_eq!(
            until(&mut client, "\r\n\r\n").await,
            "HTTP/1.1 100 Continue\r\n\r\n"
        );
        client.write_all(b"body").await.unwrap();
        let answer = until(&mut client, "\r\n0\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.contains("{\"bytes\":4}"),
            "{answer}"
        );
    }
}

type Empty = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, std::convert::Infallible>;

/// Sends a request that expects to be told to go on over HTTP/2, with a body that never comes.
fn ask_http2(proxy: SocketAddr) -> JoinHandle<http::Response<hyper::body::Incoming>> {
    tokio::spawn(async move {
        let io = hyper_util::rt::TokioIo::new(TcpStream::connect(proxy).await.unwrap());
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) = hyper::client::conn::http2::handshake::<_, _, Empty>(executor, io)
            .await
            .unwrap();
        tokio::spawn(connection);
        let body = StreamBody::new(futures_util::stream::pending()).boxed_unsync();
        let request = Request::post("http://web.shop/upload")
            .header("expect", "100-continue")
            .body(body)
            .unwrap();
        sender.send_request(request).await.unwrap()
    })
}

#[tokio::test]
async fn a_refusal_reaches_a_client_of_http2_that_waits_with_its_body() {
    let (_cluster, listener, app) = scene().await;
    let client = ask_http2(app.address);
    let (mut pod, _) = listener.accept().await.unwrap();
    until(&mut pod, "\r\n\r\n").await;
    pod.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno")
        .await
        .unwrap();
    let answer = client.await.unwrap();
    assert_eq!(answer.status(), StatusCode::EXPECTATION_FAILED);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "no");
}

#[tokio::test]
async fn early_hints_pass_to_clients_of_http11_and_to_no_others() {
    let (_cluster, listener, app) = scene().await;
    let pod = tokio::spawn(async move {
        let (mut pod, _) = listener.accept().await.unwrap();
        for _ in 0..3 {
            until(&mut pod, "\r\n\r\n").await;
            pod.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
                .await
                .unwrap();
            pod.write_all(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await
                .unwrap();
        }
    });
    let mut client = TcpStream::connect(app.address).await.unwrap();
    for version in ["1.1", "1.0"] {
        let head = format!("GET / HTTP/{version}\r\nHost: web.shop\r\nConnection: keep-alive\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        if version == "1.1" {
            assert_eq!(
                until(&mut client, "\r\n\r\n").await,
                "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n",
                "before the final response"
            );
            assert_eq!(
                until(&mut client, "\r\n\r\n").await,
                "HTTP/1.1 102 Processing\r\n\r\n"
            );
        }
        let answer = until(&mut client, "\r\n\r\nok").await;
        assert!(answer.starts_with(&format!("HTTP/{version} 200 ")), "{answer}");
    }
    // The HTTP library has no means to send them over HTTP/2: docs/limits.md.
    let mut client = crate::client::Client::h2c(app.address).await;
    assert_eq!(client.get("web.shop", "/").await.text(), "ok");
    pod.await.unwrap();
}

#[tokio::test]
async fn interim_responses_of_an_http2_pod_do_no_harm() {
    let cluster = FakeCluster::start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_request, mut respond))) = connection.accept().await {
            let mut hints = http::Response::new(());
            *hints.status_mut() = StatusCode::EARLY_HINTS;
            respond.send_informational(hints).unwrap();
            let mut body = respond.send_response(http::Response::new(()), false).unwrap();
            body.send_data(bytes::Bytes::from_static(b"ok"), true).unwrap();
        }
    });
    let _workload = behind_http2(&cluster, address);
    let app = TestApp::start(&cluster).await;
    assert_eq!(
        crate::client::fetch(app.address, "web.shop", "/").await.text(),
        "ok"
    );
}
