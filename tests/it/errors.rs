//! What a client is told when no pod answers (contract D8).

use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{Carrier, FakeCluster, ForwardFault, Identity, Rule};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::app::{TestApp, web};
use crate::client::{Client, Reply, fetch, get};

async fn cluster() -> FakeCluster {
    let cluster = FakeCluster::start().await.unwrap();
    let any = || Serve::Http(Protocols::Any);
    // The backends of a dropped workload are gone; these rows never get as far as a backend.
    let two = cluster
        .workload("shop", "two")
        .port("http", 80, 8080)
        .serve(any())
        .port("admin", 9090, 9090)
        .create();
    drop(two.unwrap());
    cluster
        .workload("shop", "none")
        .port("http", 80, 8080)
        .replicas(0)
        .create()
        .unwrap();
    cluster
        .workload("shop", "refusing")
        .port("http", 80, 8080)
        .create()
        .unwrap();
    cluster
}

#[tokio::test]
async fn each_failure_has_its_status_and_says_what_to_do() {
    let cluster = cluster().await;
    let app = TestApp::start(&cluster).await;
    let rows = [
        ("nosuch.shop", StatusCode::NOT_FOUND, "kubectl get svc -n shop"),
        ("two.shop:8081", StatusCode::NOT_FOUND, "80 (http), 9090 (admin)"),
        (
            "none.shop",
            StatusCode::SERVICE_UNAVAILABLE,
            "kubectl get pods,endpointslices -n shop",
        ),
        ("refusing.shop", StatusCode::BAD_GATEWAY, "connection refused"),
        (
            "a.svc.cluster.local",
            StatusCode::BAD_REQUEST,
            "service.namespace.svc.cluster.local",
        ),
        (
            "www.example.com",
            StatusCode::BAD_REQUEST,
            "service.namespace.svc.cluster.local",
        ),
        ("two.shop:99999", StatusCode::BAD_REQUEST, "port number"),
        ("localhost", StatusCode::NOT_FOUND, "curl -H"),
    ];
    for (host, status, words) in rows {
        let reply = fetch(app.address, host, "/page").await;
        assert_eq!(reply.status, status, "{host}: {}", reply.text());
        assert!(reply.text().contains(words), "{host}: {}", reply.text());
        assert_eq!(reply.text().lines().count(), 1, "{host}: {}", reply.text());
    }
}

#[tokio::test]
async fn the_form_of_an_error_is_what_the_client_accepts() {
    let cluster = cluster().await;
    let app = TestApp::start(&cluster).await;
    let mut request = get("nosuch.shop", "/");
    request
        .headers_mut()
        .insert("accept", "application/json".parse().unwrap());
    let reply = Reply::read(Client::http1(app.address).await.send(request).await).await;
    assert_eq!(reply.headers["content-type"], "application/json");
    assert_eq!(reply.json()["status"], 404);

    let call = Request::post("/demo.Greeter/Hello")
        .header("host", "nosuch.shop")
        .header("content-type", "application/grpc")
        .body(Full::default())
        .unwrap();
    let reply = Reply::read(Client::h2c(app.address).await.send(call).await).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(
        reply.headers["grpc-status"], "5",
        "a response without a body has its status in the headers"
    );
    assert!(reply.headers["grpc-message"].to_str().unwrap().contains("nosuch"));
}

#[tokio::test]
async fn a_refused_lookup_names_the_verb_and_the_resource() {
    let cluster = cluster().await;
    cluster.add_token("dev", "dev-token");
    cluster.allow_only("dev", &[Rule::new(&["get", "list", "watch"], &["pods"])]);
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    let reply = fetch(app.address, "two.shop", "/").await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
    assert!(
        reply.text().contains(r#"cannot get resource "services""#),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn a_refused_port_forward_names_the_verb_and_the_resource() {
    let cluster = cluster().await;
    cluster.add_token("dev", "dev-token");
    cluster.allow_only(
        "dev",
        &[Rule::new(
            &["get", "list", "watch"],
            &["services", "endpointslices"],
        )],
    );
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    let reply = fetch(app.address, "two.shop", "/").await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
    assert!(reply.text().contains("pods/portforward"), "{}", reply.text());
}

#[tokio::test]
async fn a_namespace_without_port_forwards_costs_the_others_nothing() {
    let cluster = cluster().await;
    let serve = |namespace| {
        let workload = cluster.workload(namespace, "web").port("http", 80, 8080);
        workload.serve(Serve::Http(Protocols::Any)).create().unwrap()
    };
    let _workloads = [serve("closed"), serve("open")];
    cluster.add_token("dev", "dev-token");
    cluster.allow_only(
        "dev",
        &[
            Rule::new(&["get", "list", "watch"], &["services", "endpointslices"]),
            Rule::new(&["get", "create"], &["pods/portforward"]).in_namespace("open"),
        ],
    );
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    let reply = fetch(app.address, "web.closed", "/").await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
    let reply = fetch(app.address, "web.open", "/").await;
    assert_eq!(reply.status, StatusCode::OK);
    let counts = cluster.forwards().counts();
    assert_eq!(
        counts.upgrades(Carrier::Channel),
        0,
        "the form for all was changed"
    );
}

#[tokio::test]
async fn an_expired_token_asks_for_a_login() {
    let cluster = cluster().await;
    cluster.add_token("dev", "dev-token");
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    cluster.expire_token("dev-token");
    let reply = fetch(app.address, "two.shop", "/").await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    assert!(reply.text().contains("log in again"), "{}", reply.text());
}

#[tokio::test]
async fn an_api_server_that_is_down_is_named_after_the_wait() {
    let cluster = cluster().await;
    let app = TestApp::start(&cluster).await;
    cluster.faults().set_api_down(true);
    cluster.restart();
    let reply = fetch(app.address, "two.shop", "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(reply.text().contains("kubectl cluster-info"), "{}", reply.text());
}

#[tokio::test]
async fn a_pod_that_resets_is_a_502_for_a_post_and_is_asked_once() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let pod = &workload.pods[0].name;
    cluster
        .faults()
        .set_forward("shop", pod, Some(ForwardFault::Reset));
    let app = TestApp::start(&cluster).await;
    let request = Request::post("/")
        .header("host", "web.shop")
        .body(Full::from("once"))
        .unwrap();
    let reply = Reply::read(Client::http1(app.address).await.send(request).await).await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    let streams = cluster.forwards().counts().streams_opened;
    assert_eq!(streams, 2, "an unsafe request was sent again");
}

#[tokio::test]
async fn a_host_header_is_needed_and_only_one() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let cluster = cluster().await;
    let app = TestApp::start(&cluster).await;
    for head in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET http://two.shop/ HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: two.shop\r\nHost: none.shop\r\n\r\n",
    ] {
        let mut stream = tokio::net::TcpStream::connect(app.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
}

/// A pod whose one response ends with the connection, when the returned sender is dropped.
async fn until_closed(cluster: &FakeCluster) -> oneshot::Sender<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (close, closed) = oneshot::channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").await.unwrap();
        drop(closed.await);
    });
    let backend = cluster.workload("shop", "old").port("http", 80, 8080);
    backend.backend(move |_| address).create().unwrap();
    close
}

#[tokio::test]
async fn a_response_that_ends_with_the_connection_is_complete() {
    let cluster = FakeCluster::start().await.unwrap();
    let close = until_closed(&cluster).await;
    let app = TestApp::start(&cluster).await;
    let response = Client::http1(app.address).await.send(get("old.shop", "/")).await;
    drop(close);
    assert_eq!(Reply::read(response).await.text(), "hello");
}

#[tokio::test]
async fn a_port_forward_that_breaks_does_not_look_like_the_end_of_a_response() {
    let cluster = FakeCluster::start().await.unwrap();
    let _close = until_closed(&cluster).await;
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    let mut response = client.send(get("old.shop", "/")).await;
    let first = response.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "hello");
    cluster.restart();
    assert!(
        response.into_body().collect().await.is_err(),
        "half a response looked complete"
    );
}

#[tokio::test]
async fn an_external_name_is_told_to_users_who_may_not_read_endpointslices() {
    let cluster = cluster().await;
    let service = json!({
        "kind": "Service",
        "metadata": {"name": "outside", "namespace": "shop"},
        "spec": {"type": "ExternalName", "externalName": "example.org"},
    });
    cluster.apply(service).unwrap();
    cluster.add_token("dev", "dev-token");
    let rules = [Rule::new(&["get", "list", "watch"], &["services"])];
    cluster.allow_only("dev", &rules);
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    let reply = fetch(app.address, "outside.shop", "/").await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    assert!(reply.text().contains("example.org"), "{}", reply.text());
}
