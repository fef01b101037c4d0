//! What happens to requests when sessions, the runtime, the API server or the pod go (contract G4, G5).

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use kube_tunnel::config::setting;
use kube_tunnel::testing::backend::{Backend, Protocols, Serve};
use kube_tunnel::testing::{Carrier, FakeCluster, ForwardFault, Identity, Rule, Workload};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::{TestApp, eventually};
use crate::client::{Client, fetch, get};
use crate::transport::{FEW, WEB, backend, pod, submit};

/// How often the application has seen a request.
fn seen(workload: &Workload, request: &str) -> usize {
    let (method, path) = request.split_once(' ').unwrap();
    let is = |seen: &&String| seen.starts_with(method) && seen.contains(path);
    backend(workload).requests().iter().filter(is).count()
}

fn upgrades(cluster: &FakeCluster) -> u64 {
    cluster.forwards().counts().upgrades(Carrier::Spdy)
}

#[tokio::test]
async fn a_get_whose_session_is_cut_is_sent_again() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let request = tokio::spawn(async move { fetch(address, WEB, "/slow?ms=500").await.status });
    eventually("the request", || backend(&workload).in_flight() == 1).await;
    cluster.forwards().kill_sessions("shop", &workload.pods[0].name);
    assert_eq!(request.await.unwrap(), StatusCode::OK);
    assert_eq!(seen(&workload, "GET /slow"), 2);
}

#[tokio::test]
async fn a_post_whose_session_is_cut_is_not_sent_again() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let request = tokio::spawn(async move { submit(address, WEB, "/slow?ms=500").await.status });
    eventually("the request", || backend(&workload).in_flight() == 1).await;
    cluster.forwards().kill_sessions("shop", &workload.pods[0].name);
    assert_eq!(request.await.unwrap(), StatusCode::BAD_GATEWAY);
    // What comes later shows that nothing else came before it.
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    assert_eq!(seen(&workload, "POST /slow"), 1);
}

#[tokio::test]
async fn a_post_after_its_idle_session_was_cut_is_served_once() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    for round in 1..=5 {
        cluster.forwards().kill_sessions("shop", &workload.pods[0].name);
        cluster.forwards().until(|counts| counts.sessions_open == 0).await;
        let reply = submit(app.address, WEB, "/once").await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        assert_eq!(seen(&workload, "POST /once"), round);
    }
}

#[tokio::test]
async fn a_session_that_goes_away_ends_its_streams_in_peace_and_takes_no_others() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let events = Client::http1(app.address)
        .await
        .send(get(WEB, "/sse?count=20&interval_ms=50"))
        .await;
    cluster.forwards().send_go_away("shop", &workload.pods[0].name);
    let before = Instant::now();
    for _ in 0..5 {
        // Each over a connection of its own, since the last one is busy.
        let busy = Client::http1(app.address)
            .await
            .send(get(WEB, "/sse?interval_ms=50"))
            .await;
        assert_eq!(busy.status(), StatusCode::OK);
        drop(busy);
    }
    assert!(
        before.elapsed() < Duration::from_secs(2),
        "{:?}",
        before.elapsed()
    );
    let body = events.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body.windows(5).filter(|window| window == b"data:").count(), 20);
}

#[tokio::test]
async fn the_runtime_restarts_and_the_next_request_does_not_notice() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let mut events = Client::http1(app.address)
        .await
        .send(get(WEB, "/sse?count=2&interval_ms=3600000"))
        .await;
    events.body_mut().frame().await.unwrap().unwrap();
    for _ in 0..3 {
        cluster.forwards().restart_runtime();
        let reply = submit(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    }
    assert!(
        events.into_body().collect().await.is_err(),
        "half a stream looked complete"
    );
}

#[tokio::test]
async fn fifty_clients_after_a_restart_of_the_api_server_are_no_storm() {
    const CLIENTS: usize = 50;
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::http1(app.address).await);
    }
    let requests = |clients: Vec<Client>| async {
        let mut running = JoinSet::new();
        for mut client in clients {
            running.spawn(async move {
                let reply = client.get(WEB, "/slow?ms=200").await;
                assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
                client
            });
        }
        running.join_all().await
    };
    let clients = requests(clients).await;
    assert!(cluster.forwards().counts().connections_open >= CLIENTS as u64 / 2);
    let before = upgrades(&cluster);
    cluster.restart();
    requests(clients).await;
    let after = upgrades(&cluster) - before;
    assert!(after <= FEW, "{after} sessions");
}

#[tokio::test]
async fn an_api_server_that_comes_back_finds_its_clients_again() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    cluster.faults().set_api_down(true);
    cluster.restart();
    let down = submit(app.address, WEB, "/").await;
    assert_eq!(down.status, StatusCode::SERVICE_UNAVAILABLE, "{}", down.text());
    cluster.faults().set_api_down(false);
    // The very next one: what failed before is no reason to wait.
    let back = submit(app.address, WEB, "/").await;
    assert_eq!(back.status, StatusCode::OK, "{}", back.text());
}

#[tokio::test]
async fn a_kubelet_that_has_just_restarted_costs_no_request() {
    let troubles = [
        ForwardFault::PodGone,
        ForwardFault::Kubelet(StatusCode::NOT_FOUND, "pod does not exist".into()),
        ForwardFault::Upgrade(StatusCode::INTERNAL_SERVER_ERROR),
        ForwardFault::Upgrade(StatusCode::SERVICE_UNAVAILABLE),
    ];
    for trouble in troubles {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = pod(&cluster);
        let name = &workload.pods[0].name;
        cluster.faults().set_forward("shop", name, Some(trouble.clone()));
        // Fewer retries than the trouble takes: it is waited for as a pod would be.
        let flags = [(&setting::RETRY_DELAY_MS, "50"), (&setting::MAX_RETRIES, "1")];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        let address = app.address;
        let request = tokio::spawn(async move { submit(address, WEB, "/").await });
        eventually("upgrades refused more often than retries go", || {
            let calls = cluster.calls();
            calls.iter().filter(|call| call.subresource.is_some()).count() > 3
        })
        .await;
        cluster.faults().set_forward("shop", name, None);
        let reply = request.await.unwrap();
        assert_eq!(reply.status, StatusCode::OK, "{trouble:?}: {}", reply.text());
    }
}

#[tokio::test]
async fn a_way_that_never_comes_is_waited_for_as_long_as_for_a_pod() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let name = &workload.pods[0].name;
    let broken = ForwardFault::Upgrade(StatusCode::INTERNAL_SERVER_ERROR);
    cluster.faults().set_forward("shop", name, Some(broken));
    for (retries, wait) in [("3", "200ms"), ("0", "10m")] {
        let flags = [
            (&setting::RETRY_DELAY_MS, "50"),
            (&setting::MAX_RETRIES, retries),
            (&setting::READY_TIMEOUT, wait),
        ];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        let reply = submit(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{}", reply.text());
    }
}

#[tokio::test]
async fn a_pod_that_is_replaced_under_its_name_gets_a_session_of_its_own() {
    let cluster = FakeCluster::start().await.unwrap();
    let builder = cluster.workload("shop", "db").port("http", 80, 8080);
    let builder = builder.serve(Serve::Http(Protocols::Any));
    let workload = builder.headless().create().unwrap();
    let name = workload.pods[0].name.clone();
    // With the pods themselves as the source of endpoints, one change tells all.
    cluster.add_token("dev", "dev-token");
    let rules = [
        Rule::new(&["get", "list", "watch"], &["services", "pods"]),
        Rule::new(&["create"], &["pods/portforward"]),
    ];
    cluster.allow_only("dev", &rules);
    let app = TestApp::start_as(&cluster, &Identity::Token("dev-token".into())).await;
    assert_eq!(fetch(app.address, "db.shop", "/").await.pod(), name);
    // The session that is kept ready.
    cluster.forwards().until(|counts| counts.sessions_open == 2).await;
    let before = upgrades(&cluster);

    let _new = take_over(&cluster, &name);
    let mut asked = 0;
    while fetch(app.address, "db.shop", "/").await.pod() != "the new one" {
        asked += 1;
        assert!(asked < 1000, "the old connection was used for ever");
    }
    assert!(upgrades(&cluster) > before, "the old pod's session was used");
}

#[tokio::test]
async fn sessions_whose_sandbox_has_ended_are_left_although_nobody_has_said_that_the_pod_has() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.faults().set_close_grace(Duration::from_millis(20));
    let builder = cluster.workload("shop", "db").port("http", 80, 8080);
    let builder = builder.serve(Serve::Http(Protocols::Any));
    let workload = builder.headless().create().unwrap();
    let name = workload.pods[0].name.clone();
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, "db.shop", "/").await.pod(), name);
    let forwards = cluster.forwards();
    forwards.until(|counts| counts.sessions_open == 2).await;

    // The EndpointSlice goes on naming the old pod, and both sessions stay open.
    let _new = take_over(&cluster, &name);
    forwards.until(|counts| counts.connections_open == 0).await;
    assert_eq!(forwards.counts().sessions_open, 2);
    let reply = fetch(app.address, "db.shop", "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert_eq!(reply.pod(), "the new one");
}

/// Puts another pod in the place of the one of this name.
fn take_over(cluster: &FakeCluster, name: &str) -> Backend {
    let new = Backend::start(&Serve::Http(Protocols::Any), "the new one").unwrap();
    cluster.route("shop", name, 8080, new.address());
    let mut pod = cluster.get("Pod", "shop", name).unwrap();
    pod["metadata"]["uid"] = json!("another");
    cluster.apply(pod).unwrap();
    new
}
