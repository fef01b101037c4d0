//! Messages that are cut off over HTTP/2, of which no part may be taken for the whole (contract D3, F3; RFC 9113 section 8.1).

use std::sync::Arc;

use bytes::Bytes;
use h2::Reason;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube_tunnel::testing::{FakeCluster, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

use crate::app::{PATIENCE, TestApp};
use crate::backends::behind_http2;
use crate::client::{Client, get};
use crate::interim::{scene, until};
use crate::upgrade::frame;

/// A pod that speaks HTTP/2, each of whose connections `serve` has.
async fn pod<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> (FakeCluster, Workload, TestApp)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    let cluster = FakeCluster::start().await.unwrap();
    let workload = behind_http2(&cluster, address);
    let app = TestApp::start(&cluster).await;
    (cluster, workload, app)
}

/// What a pod tells of uploads.
#[derive(Debug, PartialEq, Eq)]
enum Upload {
    Goes,
    IsWhole,
    IsCutOff,
}

/// A pod that tells of uploads.
async fn receiver() -> ((FakeCluster, Workload, TestApp), mpsc::UnboundedReceiver<Upload>) {
    let (told, uploads) = mpsc::unbounded_channel();
    let scene = pod(move |stream| {
        let told = told.clone();
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let told = told.clone();
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let end = loop {
                        match body.data().await {
                            Some(Ok(_)) => told.send(Upload::Goes).unwrap(),
                            None if body.is_end_stream() => break Upload::IsWhole,
                            None | Some(Err(_)) => break Upload::IsCutOff,
                        }
                    };
                    told.send(end).unwrap();
                    let _ = respond.send_response(Response::new(()), true);
                });
            }
        }
    });
    (scene.await, uploads)
}

#[tokio::test]
async fn an_upload_that_its_client_breaks_off_is_not_sent_again_as_a_whole_one() {
    let ((_cluster, _workload, app), mut uploads) = receiver().await;
    let mut client = TcpStream::connect(app.address).await.unwrap();
    let half = b"PUT / HTTP/1.1\r\nHost: web.shop\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    client.write_all(half).await.unwrap();
    assert_eq!(uploads.recv().await, Some(Upload::Goes));
    client.write_all(b"no chunk\r\n").await.unwrap();
    let mut answer = String::new();
    let reading = client.read_to_string(&mut answer);
    tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(uploads.recv().await, Some(Upload::IsCutOff));
    // Had it been sent again, that would have come before this.
    let reply = Client::http1(app.address).await.get("web.shop", "/").await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(uploads.recv().await, Some(Upload::IsWhole));
    assert!(uploads.is_empty());
}

#[tokio::test]
async fn an_upload_that_is_reset_without_an_error_is_not_complete() {
    let ((_cluster, _workload, app), mut uploads) = receiver().await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://web.shop/").body(()).unwrap();
    let (_answer, mut body) = sender
        .ready()
        .await
        .unwrap()
        .send_request(request, false)
        .unwrap();
    body.send_data(Bytes::from_static(b"half"), false).unwrap();
    assert_eq!(uploads.recv().await, Some(Upload::Goes));
    body.send_reset(Reason::NO_ERROR);
    let end = tokio::time::timeout(PATIENCE, uploads.recv()).await.unwrap();
    assert_eq!(end, Some(Upload::IsCutOff));
}

/// A pod that answers each request with a body, with its end or without, and then resets the stream without an error.
async fn resetting(whole: bool, reset: Arc<Notify>) -> (FakeCluster, Workload, TestApp) {
    const HEADERS: u8 = 1;
    pod(move |mut stream| {
        let reset = reset.clone();
        async move {
            stream.read_exact(&mut [0; 24]).await.unwrap();
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            loop {
                let (kind, _, id, _) = frame(&mut stream).await;
                if kind != HEADERS {
                    continue;
                }
                let id = id.to_be_bytes();
                let mut answer = [&[0, 0, 1, HEADERS, 4][..], &id, &[0x88]].concat();
                answer.extend([&[0, 0, 4, 0, u8::from(whole)][..], &id, b"body"].concat());
                stream.write_all(&answer).await.unwrap();
                reset.notified().await;
                let ending = [&[0, 0, 4, 3, 0][..], &id, &[0; 4]].concat();
                stream.write_all(&ending).await.unwrap();
            }
        }
    })
    .await
}

#[tokio::test]
async fn an_answer_that_is_reset_without_an_error_is_complete_only_behind_its_end() {
    for whole in [false, true] {
        let reset = Arc::new(Notify::new());
        let (_cluster, _workload, app) = resetting(whole, reset.clone()).await;
        for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
            let response = client.send(get("web.shop", "/")).await;
            assert_eq!(response.status(), StatusCode::OK);
            reset.notify_one();
            assert_eq!(response.into_body().collect().await.is_ok(), whole);
        }
    }
}

#[tokio::test]
async fn an_upload_that_was_asked_for_does_not_cost_the_connection_to_the_pod() {
    let (_cluster, listener, app) = scene().await;
    let pod = async {
        let (mut pod, _) = listener.accept().await.unwrap();
        for _ in 0..2 {
            until(&mut pod, "\r\n\r\n").await;
            pod.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
            until(&mut pod, "body").await;
            pod.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await
                .unwrap();
        }
    };
    let client = async {
        let mut client = TcpStream::connect(app.address).await.unwrap();
        for _ in 0..2 {
            let head =
                "POST / HTTP/1.1\r\nHost: web.shop\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
            client.write_all(head.as_bytes()).await.unwrap();
            until(&mut client, "\r\n\r\n").await;
            client.write_all(b"body").await.unwrap();
            until(&mut client, "\r\n\r\nok").await;
        }
    };
    let both = async { tokio::join!(pod, client) };
    tokio::time::timeout(PATIENCE, both)
        .await
        .expect("it is opened anew");
}
