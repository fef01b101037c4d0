//! Answers that come before the request has been read, and clients that stop in the middle (contract D3, C5).

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use kube_tunnel::testing::FakeCluster;
use kube_tunnel::testing::backend::{Protocols, Serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::app::{PATIENCE, TestApp, eventually, web};
use crate::backends::{behind, raw};
use crate::client::{Client, get};
use crate::interim::{scene, until};

/// More than the buffers of both sides hold.
const LARGE: usize = 32 << 20;

/// Sends the whole upload before it reads a byte of the answer, as simple clients do.
async fn upload(app: &TestApp, host: &str) -> TcpStream {
    send(TcpStream::connect(app.address).await.unwrap(), host).await
}

async fn send(mut client: TcpStream, host: &str) -> TcpStream {
    let head = format!("POST /upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {LARGE}\r\n\r\n");
    let exchange = async {
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&vec![0; LARGE]).await.unwrap();
        client
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

#[tokio::test]
async fn our_own_answer_is_read_by_a_client_that_sends_everything_first() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    let mut answer = String::new();
    let mut client = upload(&app, "nosuch.shop").await;
    let reading = client.read_to_string(&mut answer);
    tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    let answer = answer.to_ascii_lowercase();
    assert!(
        answer.starts_with("http/1.1 404 ") && answer.contains("\r\nconnection: close\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_pods_early_answer_is_read_by_a_client_that_sends_everything_first() {
    let (_cluster, listener, app) = scene().await;
    tokio::spawn(async move {
        let (mut pod, _) = listener.accept().await.unwrap();
        until(&mut pod, "\r\n\r\n").await;
        pod.write_all(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
            .await
            .unwrap();
        pod.shutdown().await.unwrap();
        let _ = tokio::io::copy(&mut pod, &mut tokio::io::sink()).await;
    });
    let answer = until(&mut upload(&app, "web.shop").await, "\r\n\r\nno").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn an_upload_goes_on_while_nobody_reads_its_early_answer() {
    // More than the client's connection holds, and no more than the port-forward does.
    const ANSWER: usize = 4 << 20;
    let (_cluster, listener, app) = scene().await;
    tokio::spawn(async move {
        let (mut pod, _) = listener.accept().await.unwrap();
        until(&mut pod, "\r\n\r\n").await;
        let (mut upload, mut answer) = pod.into_split();
        let answering = async {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {ANSWER}\r\n\r\n");
            answer.write_all(head.as_bytes()).await.unwrap();
            answer.write_all(&vec![b'.'; ANSWER]).await.unwrap();
        };
        let reading = async { tokio::io::copy(&mut upload, &mut tokio::io::sink()).await };
        let ((), _) = tokio::join!(answering, reading);
    });
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    let client = socket.connect(app.address).await.unwrap();
    let mut client = send(client, "web.shop").await;
    until(&mut client, "\r\n\r\n").await;
    let mut body = vec![0; ANSWER];
    let reading = client.read_exact(&mut body);
    tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
}

#[tokio::test]
async fn trailers_of_a_request_do_not_cost_the_connection() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let post = "POST /upload HTTP/1.1\r\nHost: web.shop\r\nTransfer-Encoding: chunked\r\nTrailer: x-last\r\n\r\n\
                4\r\nbody\r\n0\r\nx-last: yes\r\n\r\n";
    let last = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answers = raw(app.address, &format!("{post}{post}{last}")).await;
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 2, "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 404 ").count(), 1, "{answers}");
}

#[tokio::test]
async fn a_short_body_that_nobody_reads_does_not_cost_the_connection() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    let post = "POST / HTTP/1.1\r\nHost: nosuch.shop\r\nContent-Length: 4\r\n\r\nbody";
    let last = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answers = raw(app.address, &format!("{post}{post}{last}")).await;
    assert_eq!(answers.matches("HTTP/1.1 404 ").count(), 3, "{answers}");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_answered_before_the_close() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    let head = format!(
        "GET / HTTP/1.1\r\nHost: web.shop\r\nX-Large: {}\r\n\r\n",
        "x".repeat(4 << 20)
    );
    let answer = raw(app.address, &head).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test]
async fn a_client_of_http2_is_told_after_the_answer_to_stop_sending() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://nosuch.shop/").body(()).unwrap();
    let (answer, mut body) = sender.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(b"and more to come"), false)
        .unwrap();
    let mut answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    let mut text = Vec::new();
    while let Some(data) = answer.body_mut().data().await {
        text.extend(data.unwrap());
    }
    assert!(
        !text.is_empty() && answer.body().is_end_stream(),
        "the answer is complete"
    );
    let reset = std::future::poll_fn(|cx| body.poll_reset(cx));
    let reason = tokio::time::timeout(PATIENCE, reset).await.unwrap().unwrap();
    assert_eq!(reason, h2::Reason::NO_ERROR, "RFC 9113 section 8.1");
}

#[tokio::test]
async fn a_client_that_has_stopped_sending_still_gets_its_answer() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for request in [
        "GET /slow?ms=200 HTTP/1.1\r\nHost: web.shop\r\nConnection: close\r\n\r\n",
        "GET /slow?ms=200 HTTP/1.0\r\nHost: web.shop\r\n\r\n",
        "POST /slow?ms=200 HTTP/1.1\r\nHost: web.shop\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody",
    ] {
        let mut client = TcpStream::connect(app.address).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        let reading = client.read_to_string(&mut answer);
        tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        assert!(answer.contains(" 200 OK\r\n"), "{request:?}: {answer}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_known_at_a_silent_pod() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let backend = workload.pods[0].backends[0].http().unwrap();
    // The next event is an hour away: the pod can learn it only from the connection.
    for path in ["/sse?count=2&interval_ms=3600000", "/slow?ms=3600000"] {
        for http2 in [false, true] {
            let mut client = if http2 {
                Client::h2c(app.address).await
            } else {
                Client::http1(app.address).await
            };
            let request = tokio::spawn(async move {
                let response = client.send(get("web.shop", path)).await;
                std::future::pending::<()>().await;
                drop(response);
            });
            eventually("the request at the pod", || backend.in_flight() == 1).await;
            request.abort();
            eventually("its end at the pod", || backend.in_flight() == 0).await;
        }
    }
}

/// Answers each connection's first request with the beginning of a body, and dies.
async fn dying(answer: &'static [u8]) -> (FakeCluster, TestApp) {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = crate::backends::scripted(answer).await;
    behind(&cluster, address);
    let app = TestApp::start(&cluster).await;
    (cluster, app)
}

#[tokio::test]
async fn a_body_that_breaks_off_never_looks_complete() {
    use http_body_util::BodyExt;
    for answer in [
        &b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"[..],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
    ] {
        let (_cluster, app) = dying(answer).await;
        for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
            let response = client.send(get("web.shop", "/")).await;
            assert_eq!(response.status(), StatusCode::OK);
            let error = response.into_body().collect().await.unwrap_err();
            if let Client::H2c(_) = client {
                let source = std::error::Error::source(&error).unwrap();
                let reset = source.downcast_ref::<h2::Error>().unwrap();
                assert!(reset.is_reset() && reset.is_remote(), "{reset:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_transfer_coding_that_cannot_be_passed_on_is_an_error_and_not_another_body() {
    for (answer, coding) in [
        (
            &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n4\r\ncode\r\n0\r\n\r\n"[..],
            "gzip, chunked",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\ncode", "gzip"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\ncode",
            "identity",
        ),
    ] {
        let (_cluster, app) = dying(answer).await;
        for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
            let reply = client.get("web.shop", "/").await;
            assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
            let words = format!("Transfer-Encoding: {coding},");
            assert!(reply.text().contains(&words), "{}", reply.text());
        }
    }
}

#[tokio::test]
async fn a_request_in_an_unknown_transfer_coding_is_refused() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for (coding, status) in [
        ("gzip, chunked", "501"),
        ("gzip", "400"),
        ("chunked, gzip", "400"),
    ] {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: web.shop\r\nTransfer-Encoding: {coding}\r\nConnection: close\r\n\r\n4\r\ncode\r\n0\r\n\r\n"
        );
        let answer = raw(app.address, &request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{coding}: {answer}"
        );
    }
    assert_eq!(
        workload.pods[0].backends[0].http().unwrap().requests(),
        Vec::<String>::new()
    );
}

/// Lets a day pass for every timer of the process.
async fn a_day_passes() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_hours(24)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn a_stream_that_is_silent_for_a_day_goes_on() {
    use futures_util::{SinkExt, StreamExt};
    use http_body_util::BodyExt;
    use tokio_tungstenite::tungstenite::Message;
    let cluster = FakeCluster::start().await.unwrap();
    // In a day that passes at once nobody can keep the runtime from taking it for silence.
    cluster.faults().set_idle_timeout(Duration::from_hours(48));
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let h2c = cluster.workload("shop", "h2c").port("http", 80, 8080);
    let h2c = h2c.app_protocol("kubernetes.io/h2c");
    let _h2c = h2c.serve(Serve::Http(Protocols::Http2)).create().unwrap();
    let mut streams = Vec::new();
    for host in ["web.shop", "h2c.shop"] {
        for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
            // The second event is due in the middle of the day.
            let mut response = client.send(get(host, "/sse?count=2&interval_ms=43200000")).await;
            response.body_mut().frame().await.unwrap().unwrap();
            streams.push((client, response));
        }
    }
    let socket = TcpStream::connect(app.address).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://web.shop/ws", socket)
        .await
        .unwrap();
    socket.send(Message::text("before")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("before"));

    a_day_passes().await;
    socket.send(Message::text("after")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("after"));
    for (_client, response) in streams {
        let rest = tokio::time::timeout(PATIENCE, response.into_body().collect()).await;
        let rest = rest
            .expect("the event was lost")
            .expect("the stream was cut")
            .to_bytes();
        assert!(rest.starts_with(b"data: {\"seq\":1"), "{rest:?}");
    }
}
