//! Backends that are old, odd or broken, played byte by byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, ForwardFault, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::app::{TestApp, web};
use crate::client::{Client, Reply, fetch, get};
use crate::log;

const WEB: &str = "web.shop.svc.cluster.local";

/// A backend that answers each connection's first request with `answer` and closes.
pub(crate) async fn scripted(answer: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = count.clone();
            tokio::spawn(async move {
                let mut head = [0; 4096];
                if stream.read(&mut head).await.unwrap_or(0) > 0 {
                    count.fetch_add(1, Ordering::SeqCst);
                    let _ = stream.write_all(answer).await;
                }
            });
        }
    });
    (address, seen)
}

pub(crate) fn behind(cluster: &FakeCluster, address: SocketAddr) -> Workload {
    cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .backend(move |_| address)
        .create()
        .unwrap()
}

/// The same for a backend of HTTP/2.
pub(crate) fn behind_http2(cluster: &FakeCluster, address: SocketAddr) -> Workload {
    let builder = cluster.workload("shop", "web").port("grpc", 80, 8080);
    let builder = builder.app_protocol("kubernetes.io/h2c");
    builder.backend(move |_| address).create().unwrap()
}

/// Sends a request as bytes and returns everything that comes back.
pub(crate) async fn raw(proxy: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(proxy).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn each_port_that_proves_not_to_speak_tls_is_asked_once_and_one_that_hangs_up_again() {
    for (answer, pods, asked) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], 1, 1),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 2, 2),
        (b"", 1, 4),
    ] {
        let cluster = FakeCluster::start().await.unwrap();
        let (address, seen) = scripted(answer).await;
        let builder = cluster.workload("shop", "web").port("https", 443, 8443);
        let builder = builder.backend(move |_| address).replicas(pods);
        let _workload = builder.create().unwrap();
        let app = TestApp::start(&cluster).await;
        let reply = fetch(app.address, "web.shop.svc.cluster.local:443", "/").await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
        assert!(reply.text().starts_with("no TLS with "), "{}", reply.text());
        assert_eq!(seen.load(Ordering::SeqCst), asked);
    }
}

#[tokio::test]
async fn an_http10_backend_is_passed_on_in_the_proxys_version() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = scripted(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let _workload = behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    let answer = raw(
        app.address,
        "GET / HTTP/1.1\r\nHost: web.shop\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_body_that_ends_with_the_connection_arrives_whole() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = scripted(b"HTTP/1.0 200 OK\r\n\r\nuntil the end").await;
    let _workload = behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.text(), "until the end");
}

#[tokio::test]
async fn a_transfer_coding_wins_over_a_contradicting_length() {
    let cluster = FakeCluster::start().await.unwrap();
    let answer =
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let (address, _) = scripted(answer).await;
    let _workload = behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        assert_eq!(client.get(WEB, "/").await.text(), "hello");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_http_is_a_502_after_both_versions() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, seen) = scripted(b"SSH-2.0-OpenSSH_9.2\r\n").await;
    let _workload = behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    let reply = fetch(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    assert!(
        reply.text().contains("does not answer in HTTP/1.1"),
        "{}",
        reply.text()
    );
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn an_answer_that_cannot_be_taken_is_no_reason_to_send_an_unsafe_request_again() {
    let fields: String = (0..300).map(|n| format!("x-{n}: 1\r\n")).collect();
    let answer = format!("HTTP/1.1 200 OK\r\n{fields}\r\n").leak();
    for (method, times) in [(Method::POST, 1), (Method::GET, 2)] {
        let cluster = FakeCluster::start().await.unwrap();
        let (address, seen) = scripted(answer.as_bytes()).await;
        let _workload = behind(&cluster, address);
        let app = TestApp::start(&cluster).await;
        let mut client = Client::http1(app.address).await;
        let request = Request::builder().method(&method).uri("/").header("host", WEB);
        let request = request.body(Full::from("body")).unwrap();
        let reply = Reply::read(client.send(request).await).await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{}", reply.text());
        assert_eq!(seen.load(Ordering::SeqCst), times, "{method}");
    }
}

#[tokio::test]
async fn a_preflight_in_the_pods_place_leaves_its_connection_and_is_in_the_log() {
    const TIMES: u64 = 20;
    let cluster = FakeCluster::start().await.unwrap();
    let workload = cluster.workload("shop", "web").port("http", 80, 8080);
    let workload = workload.serve(Serve::Http(Protocols::Http1)).create().unwrap();
    let (running, log, address) = log::start(&cluster, &[]).await;
    let mut client = Client::http1(address).await;
    for _ in 0..TIMES {
        let request = Request::options("/")
            .header("host", WEB)
            .header("origin", "http://localhost:3000")
            .header("access-control-request-method", "PUT");
        let reply = Reply::read(client.send(request.body(Full::default()).unwrap()).await).await;
        assert_eq!(reply.status, StatusCode::NO_CONTENT, "{}", reply.text());
        assert_eq!(
            reply.headers["access-control-allow-origin"],
            "http://localhost:3000"
        );
        assert_eq!(reply.headers["access-control-allow-methods"], "PUT");
    }
    let log = log.until("preflight").await;
    let line = log.seen.last().unwrap();
    assert!(line.contains("status=204") && !line.contains("DC"), "{line}");
    // A client that is quick finds it still in use now and then.
    let connections = workload.pods[0].backends[0].http().unwrap().connections();
    assert!(connections < TIMES / 2, "{connections} connections");
    running.signal("-TERM");
    running.wait().await;
}

#[tokio::test]
async fn a_port_that_says_nothing_of_itself_is_asked_once_and_remembered() {
    let cluster = FakeCluster::start().await.unwrap();
    let h2c = Serve::Http(Protocols::Http2);
    let workload = cluster
        .workload("shop", "web")
        .port("", 80, 8080)
        .serve(h2c)
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    for _ in 0..5 {
        let request = Request::post("/")
            .header("host", WEB)
            .body(Full::from("body"))
            .unwrap();
        let reply = Reply::read(client.send(request).await).await;
        assert_eq!(
            (reply.status, &reply.json()["proto"]),
            (StatusCode::OK, &"HTTP/2.0".into()),
            "{}",
            reply.text()
        );
    }
    assert_eq!(
        workload.pods[0].backends[0].connections(),
        2,
        "one in each version, and no more"
    );
}

#[tokio::test]
async fn a_get_that_breaks_every_time_is_sent_as_often_as_the_setting_says() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, seen) = scripted(b"").await;
    let _workload = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .backend(move |_| address)
        .replicas(5)
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::BAD_GATEWAY);
    assert_eq!(
        seen.load(Ordering::SeqCst),
        1 + 3,
        "five pods are no reason for more than three retries"
    );
}

#[tokio::test]
async fn an_h2c_stream_that_is_reset_every_time_is_tried_as_often_as_the_setting_says() {
    for (reason, code) in [(h2::Reason::INTERNAL_ERROR, "13"), (h2::Reason::CANCEL, "1")] {
        let cluster = FakeCluster::start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let count = count.clone();
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((_request, mut respond))) = connection.accept().await {
                        count.fetch_add(1, Ordering::SeqCst);
                        respond.send_reset(reason);
                    }
                });
            }
        });
        let _workload = behind_http2(&cluster, address);
        let app = TestApp::start(&cluster).await;
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::BAD_GATEWAY);
        assert_eq!(seen.load(Ordering::SeqCst), 1 + 3);
        // A call is a POST, and is told what became of it.
        let call = Request::post("/service/method")
            .header("host", WEB)
            .header("content-type", "application/grpc");
        let mut client = Client::h2c(app.address).await;
        let reply = Reply::read(client.send(call.body(Full::from("call")).unwrap()).await).await;
        assert_eq!(reply.headers["grpc-status"], code, "{:?}", reply.headers);
        assert_eq!(seen.load(Ordering::SeqCst), 1 + 3 + 1);
    }
}

#[tokio::test]
async fn more_h2c_streams_than_a_pod_allows_get_another_connection() {
    let cluster = FakeCluster::start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let mut connection = builder
                    .max_concurrent_streams(2)
                    .handshake::<_, Bytes>(stream)
                    .await
                    .unwrap();
                let mut open = Vec::new();
                while let Some(Ok((_request, mut respond))) = connection.accept().await {
                    // The answer begins and does not end.
                    open.push(respond.send_response(http::Response::new(()), false).unwrap());
                }
            });
        }
    });
    let _workload = behind_http2(&cluster, address);
    let app = TestApp::start(&cluster).await;
    let mut client = Client::h2c(app.address).await;
    let mut open = Vec::new();
    for _ in 0..7 {
        let answer = tokio::time::timeout(crate::app::PATIENCE, client.send(get(WEB, "/"))).await;
        open.push(answer.expect("a request waited for another's stream"));
    }
}

#[tokio::test]
async fn a_post_with_a_body_moves_on_from_a_pod_that_refuses() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::Refused));
    let app = TestApp::start(&cluster).await;
    for http2 in [false, true] {
        for _ in 0..4 {
            let mut client = if http2 {
                Client::h2c(app.address).await
            } else {
                Client::http1(app.address).await
            };
            let request = Request::post("/")
                .header("host", WEB)
                .body(Full::from("the whole body"))
                .unwrap();
            let reply = Reply::read(client.send(request).await).await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
            assert_eq!(reply.json()["body"], "the whole body");
        }
    }
}

#[tokio::test]
async fn a_client_of_a_service_with_session_affinity_stays_with_one_pod_while_it_is_there() {
    let cluster = FakeCluster::start().await.unwrap();
    let any = Serve::Http(Protocols::Any);
    let _workload = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .serve(any)
        .replicas(3)
        .spec("sessionAffinity", "ClientIP")
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    let pods = async || {
        let mut pods = std::collections::BTreeSet::new();
        for _ in 0..6 {
            pods.insert(fetch(app.address, WEB, "/").await.pod());
        }
        pods
    };
    let first = pods().await;
    assert_eq!(first.len(), 1, "{first:?}");
    assert!(cluster.delete_pod("shop", first.first().unwrap()));
    let second = pods().await;
    assert_eq!(second.len(), 1, "{second:?}");
    assert_ne!(first, second);
}

#[tokio::test]
async fn a_get_may_have_a_body_of_unknown_length() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io)
            .await
            .unwrap();
    tokio::spawn(connection);
    let frames = [Ok::<_, std::convert::Infallible>(http_body::Frame::data(
        Bytes::from_static(b"{\"query\":1}"),
    ))];
    let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
    let request = Request::get(format!("http://{WEB}/_search")).body(body).unwrap();
    let reply = Reply::read(sender.send_request(request).await.unwrap()).await;
    assert_eq!(reply.json()["body"], "{\"query\":1}");
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_of_its_body_is_not_blamed_on_the_pod() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let mut stream = TcpStream::connect(app.address).await.unwrap();
    let head = "POST /upload HTTP/1.1\r\nHost: web.shop\r\nContent-Length: 100\r\n\r\nonly this";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(!answer.contains("502"), "{answer}");
    let backend = workload.pods[0].backends[0].http().unwrap();
    assert!(backend.requests().len() <= 1, "{:?}", backend.requests());
}
