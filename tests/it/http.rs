//! Requests through the proxy: what passes, how it is spread, what it costs.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use kube_tunnel::testing::backend::{HelloReply, HelloRequest, Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, Workload};
use prost::Message;
use tokio::time::Instant;

use crate::app::{TestApp, eventually, settled, web};
use crate::client::{Client, Reply, fetch, get};

const WEB: &str = "web.shop.svc.cluster.local";
const GRPC: &str = "greeter.shop.svc.cluster.local";

fn greeter(cluster: &FakeCluster) -> Workload {
    let h2c = Serve::Http(Protocols::Http2);
    let builder = cluster
        .workload("shop", "greeter")
        .port("grpc", 50051, 50051)
        .app_protocol("kubernetes.io/h2c");
    builder.serve(h2c).create().unwrap()
}

#[tokio::test]
async fn http1_and_h2c_clients_are_answered_by_a_pod() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        let reply = client.get(WEB, "/hello?x=1").await;
        assert_eq!(reply.status, StatusCode::OK);
        assert_eq!(reply.pod(), workload.pods[0].name);
        assert_eq!(reply.json()["target"], "/hello?x=1");
        assert_eq!(reply.json()["host"], WEB);
    }
}

#[tokio::test]
async fn the_raw_target_repeated_headers_and_the_body_pass_untouched() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        let request = Request::builder()
            .method(Method::POST)
            .uri("/a//b/%2F/../c?q=%20&r")
            .header("host", WEB)
            .header("x-many", "one")
            .header("x-many", "two")
            .header("accept", "application/json")
            .body(Full::new(Bytes::from_static(b"some body")))
            .unwrap();
        let seen = Reply::read(client.send(request).await).await.json();
        assert_eq!(seen["target"], "/a//b/%2F/../c?q=%20&r");
        assert_eq!(
            (&seen["body"], &seen["body_bytes"]),
            (&"some body".into(), &9.into())
        );
        let many: Vec<_> = seen["headers"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|pair| pair[0] == "x-many")
            .map(|pair| &pair[1])
            .collect();
        assert_eq!(many, ["one", "two"]);
    }
}

#[tokio::test]
async fn every_cookie_and_status_of_the_backend_arrives() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let reply = fetch(app.address, WEB, "/cookies").await;
    assert_eq!(reply.headers.get_all("set-cookie").iter().count(), 2);
    for status in [204, 304, 404, 418, 500, 503] {
        assert_eq!(
            fetch(app.address, WEB, &format!("/status/{status}"))
                .await
                .status
                .as_u16(),
            status
        );
    }
    let mut client = Client::http1(app.address).await;
    let mut head = get(WEB, "/bytes/1000");
    *head.method_mut() = Method::HEAD;
    let reply = Reply::read(client.send(head).await).await;
    assert_eq!(
        (&reply.headers["content-length"], reply.body.len()),
        (&"1000".parse().unwrap(), 0)
    );
    assert_eq!(
        client.get(WEB, "/health").await.status,
        StatusCode::OK,
        "the connection is good after a HEAD"
    );
}

#[tokio::test]
async fn trailers_arrive() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        let mut request = get(WEB, "/trailers");
        request.headers_mut().insert("te", "trailers".parse().unwrap());
        let reply = Reply::read(client.send(request).await).await;
        assert!(reply.trailers.is_some_and(|trailers| !trailers.is_empty()));
    }
}

#[tokio::test]
async fn large_bodies_stream_both_ways() {
    const SIZE: usize = 8 << 20;
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        for path in [format!("/bytes/{SIZE}"), format!("/bytes/{SIZE}?chunked=1")] {
            assert_eq!(client.get(WEB, &path).await.body.len(), SIZE);
        }
        let body = Full::new(Bytes::from(vec![7; SIZE]));
        let request = Request::post("/upload").header("host", WEB).body(body).unwrap();
        let reply = Reply::read(client.send(request).await).await;
        assert_eq!(reply.json()["bytes"], SIZE);
    }
}

#[tokio::test]
async fn an_event_passes_before_the_next_one_is_written() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
        // The second event is an hour away, so the first can only arrive if nothing holds it back.
        let mut response = client.send(get(WEB, "/sse?count=2&interval_ms=3600000")).await;
        let frame = tokio::time::timeout(Duration::from_secs(10), response.body_mut().frame()).await;
        let event = frame
            .expect("the event was held back")
            .unwrap()
            .unwrap()
            .into_data()
            .unwrap();
        assert!(event.starts_with(b"data: {\"seq\":0"), "{event:?}");
    }
}

#[tokio::test]
async fn grpc_calls_keep_their_trailers() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = greeter(&cluster);
    let app = TestApp::start(&cluster).await;
    // The pod's server does not announce them.
    for mut client in [Client::h2c(app.address).await, Client::http1(app.address).await] {
        let hello = greet(&mut client).await;
        assert!(hello.message.contains("you"), "{hello:?}");
    }
}

/// Calls the Service `greeter` of the namespace `shop`; the call succeeds and has its trailers.
pub(crate) async fn greet(client: &mut Client) -> HelloReply {
    let message = HelloRequest { name: "you".into() }.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    let request = Request::post("/demo.Greeter/Hello")
        .header("host", GRPC)
        .header("content-type", "application/grpc+proto")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(frame)))
        .unwrap();
    let reply = Reply::read(client.send(request).await).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(reply.trailers.as_ref().unwrap()["grpc-status"], "0");
    HelloReply::decode(&reply.body[5..]).unwrap()
}

#[tokio::test]
async fn requests_are_spread_over_the_ready_pods() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 3);
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    let mut seen = BTreeSet::new();
    for _ in 0..6 {
        seen.insert(client.get(WEB, "/").await.pod());
    }
    let all: BTreeSet<_> = workload.pods.iter().map(|pod| pod.name.clone()).collect();
    assert_eq!(seen, all);
}

#[tokio::test]
async fn a_warm_request_costs_no_api_call_and_no_new_connection() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    client.get(WEB, "/").await;
    settled(&cluster).await;
    cluster.clear_calls();
    for _ in 0..20 {
        client.get(WEB, "/").await;
    }
    assert_eq!(cluster.calls(), []);
    assert_eq!(workload.pods[0].backends[0].connections(), 1);
}

#[tokio::test]
async fn a_hundred_first_requests_share_one_set_up() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = greeter(&cluster);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let requests: Vec<_> = (0..100)
        .map(|_| tokio::spawn(async move { fetch(address, GRPC, "/").await.status }))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
    settled(&cluster).await;
    let calls = cluster.calls();
    let count = |verb: &str, resource: &str, subresource: Option<&str>| {
        let matches = |call: &&kube_tunnel::testing::ApiCall| {
            call.verb == verb && call.resource == resource && call.subresource.as_deref() == subresource
        };
        calls.iter().filter(matches).count()
    };
    assert_eq!(count("list", "services", None), 1);
    assert_eq!(count("list", "endpointslices", None), 1);
    // The one that all of them share, and the one kept ready beside it.
    assert_eq!(count("create", "pods", Some("portforward")), 2, "{calls:#?}");
}

#[tokio::test]
async fn a_burst_opens_no_more_connections_than_it_has_requests() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let requests: Vec<_> = (0..100)
        .map(|_| tokio::spawn(async move { fetch(address, WEB, "/").await.status }))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
    let opened = workload.pods[0].backends[0].connections();
    assert!(opened <= 100, "{opened} connections for 100 requests");
}

#[tokio::test]
async fn a_slow_service_does_not_delay_another() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let other = cluster.workload("shop", "slow").port("http", 80, 8080);
    let other = other.serve(Serve::Http(Protocols::Any)).create().unwrap();
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let slow = tokio::spawn(async move { fetch(address, "slow.shop", "/slow?ms=3000").await });
    let backend = other.pods[0].backends[0].http().unwrap();
    eventually("the slow request", || backend.in_flight() == 1).await;
    let before = Instant::now();
    fetch(address, WEB, "/").await;
    assert!(before.elapsed() < Duration::from_secs(2) && !slow.is_finished());
}

#[tokio::test]
async fn one_pod_of_a_headless_service_is_reached_by_its_name() {
    let cluster = FakeCluster::start().await.unwrap();
    let any = Serve::Http(Protocols::Any);
    let workload = cluster
        .workload("shop", "db")
        .port("", 5432, 5432)
        .serve(any)
        .replicas(2)
        .headless()
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    for pod in &workload.pods {
        for _ in 0..3 {
            let host = format!("{}.db.shop.svc.cluster.local", pod.name);
            assert_eq!(fetch(app.address, &host, "/").await.pod(), pod.name);
        }
    }
}

#[tokio::test]
async fn health_answers_on_own_hosts_and_belongs_to_the_backend_on_others() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let own = fetch(app.address, "localhost:8080", "/health").await.json();
    assert_eq!(
        (&own["status"], &own["protocol"]),
        (&"healthy".into(), &"HTTP/1.1 (cleartext)".into())
    );
    let own = Client::h2c(app.address)
        .await
        .get("127.0.0.1", "/health")
        .await
        .json();
    assert_eq!(own["protocol"], "HTTP/2.0 (cleartext)");
    assert_eq!(
        fetch(app.address, WEB, "/health").await.pod(),
        workload.pods[0].name
    );
}

#[tokio::test]
async fn pages_of_this_machine_may_read_and_other_sites_may_not() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    for (origin, allowed) in [("http://localhost:3000", true), ("https://evil.example", false)] {
        let mut request = get(WEB, "/");
        request.headers_mut().insert("origin", origin.parse().unwrap());
        let reply = Reply::read(client.send(request).await).await;
        let leave = reply
            .headers
            .get("access-control-allow-origin")
            .map(|value| value.to_str().unwrap());
        assert_eq!(leave, allowed.then_some(origin));
    }
}
