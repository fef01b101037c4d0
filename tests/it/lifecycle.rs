//! Start, stop and drain.

use std::net::TcpListener;

use http::StatusCode;
use http_body_util::BodyExt;
use kube_tunnel::config::setting;
use kube_tunnel::testing::FakeCluster;
use kube_tunnel::testing::backend::{Protocols, Serve};

use crate::app::{PATIENCE, TestApp, eventually, web};
use crate::client::{Client, fetch, get};

const WEB: &str = "web.shop.svc.cluster.local";

#[tokio::test]
async fn running_requests_end_before_the_program_does() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    for http2 in [false, true] {
        let mut app = TestApp::start(&cluster).await;
        let mut client = if http2 {
            Client::h2c(app.address).await
        } else {
            Client::http1(app.address).await
        };
        let response = client.send(get(WEB, "/sse?count=5&interval_ms=100")).await;
        app.begin_stop();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(
            body.windows(5).filter(|window| window == b"data:").count(),
            5,
            "the stream was cut off"
        );
        app.ended().await;
    }
}

#[tokio::test]
async fn the_deadline_cuts_off_what_does_not_end() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::DRAIN_TIMEOUT, "100ms")]).await;
    let mut client = Client::http1(app.address).await;
    let response = client.send(get(WEB, "/sse?count=1000000&interval_ms=50")).await;
    app.stop().await;
    assert!(
        response.into_body().collect().await.is_err(),
        "the end of a cut-off stream looked complete"
    );
}

#[tokio::test]
async fn the_port_is_free_once_the_drain_has_started() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let mut app = TestApp::start(&cluster).await;
    let (address, backend) = (app.address, workload.pods[0].backends[0].http().unwrap());
    let mut client = Client::http1(address).await;
    let events = client.send(get(WEB, "/sse?count=1000000&interval_ms=20")).await;
    app.begin_stop();
    eventually("the port to be free", || TcpListener::bind(address).is_ok()).await;
    assert_eq!(backend.in_flight(), 1, "the drain was over");
    drop((events, client));
    app.ended().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request_at_the_backend() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let backend = workload.pods[0].backends[0].http().unwrap();
    let mut client = Client::http1(app.address).await;
    let response = client.send(get(WEB, "/sse?count=1000000&interval_ms=20")).await;
    assert_eq!(response.status(), StatusCode::OK);
    drop(response);
    drop(client);
    eventually("the request to end at the backend", || backend.in_flight() == 0).await;
}

#[tokio::test]
async fn port_forwards_are_closed_in_order_at_the_end() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .serve(Serve::Http(Protocols::Any))
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, "web.shop", "/").await.status, StatusCode::OK);
    app.stop().await;
    let closed = cluster.forwards().until(|counts| counts.go_aways > 0);
    tokio::time::timeout(PATIENCE, closed)
        .await
        .expect("the API server is left to find out by itself");
    drop(workload);
}
