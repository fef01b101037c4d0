//! What port-forwards cost, and that they cost nothing once nobody needs them (contract G1, G2).

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use kube_tunnel::config::setting;
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{Carrier, FakeCluster, ForwardFault, WorkloadPod};

use crate::app::{PATIENCE, TestApp, eventually, settled};
use crate::client::{Client, fetch, get};
use crate::transport::{FEW, WEB, backend, pod, warm_up};

#[tokio::test]
async fn a_burst_of_two_hundred_connections_takes_few_sessions() {
    for form in ["spdy", "tunnel"] {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = pod(&cluster);
        let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::PORT_FORWARD, form)]).await;
        let bursts = warm_up(app.address, WEB, 200);
        let seen = async {
            let together = || backend(&workload).open_connections() >= 50;
            eventually("many connections at a time", together).await;
        };
        tokio::join!(bursts, seen);
        let counts = cluster.forwards().counts();
        let upgrades = counts.upgrades(Carrier::Spdy) + counts.upgrades(Carrier::Tunnel);
        assert!(upgrades <= FEW, "{upgrades} sessions");
    }
}

#[tokio::test]
async fn what_a_burst_needed_is_there_for_the_next_and_not_for_much_longer() {
    const CLIENTS: usize = 100;
    const KEPT: usize = 64;
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let open = || backend(&workload).open_connections();
    let together = async { eventually("a connection for each client", || open() >= CLIENTS).await };
    tokio::join!(warm_up(app.address, WEB, 2 * CLIENTS), together);
    let opened = cluster.forwards().counts().connections_opened;
    warm_up(app.address, WEB, CLIENTS).await;
    assert_eq!(cluster.forwards().counts().connections_opened, opened);

    // Less than the pod itself keeps them.
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(25)).await;
    tokio::time::resume();
    eventually("fewer connections", || open() == KEPT).await;
}

#[tokio::test]
async fn a_request_over_an_idle_connection_asks_the_api_server_for_nothing() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    fetch(app.address, WEB, "/").await;
    settled(&cluster).await;
    let before = cluster.forwards().counts();
    cluster.clear_calls();
    for _ in 0..20 {
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    }
    assert_eq!(cluster.calls(), []);
    let after = cluster.forwards().counts();
    assert_eq!(after.connections_opened, before.connections_opened);
}

#[tokio::test]
async fn the_first_request_makes_ways_ready_to_the_services_other_pods_too() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = cluster.workload("shop", "web").port("http", 80, 8080);
    let workload = workload
        .serve(Serve::Http(Protocols::Any))
        .replicas(3)
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    // The one in use has another session kept ready.
    let all = cluster.forwards().until(|counts| counts.sessions_open == 4);
    tokio::time::timeout(PATIENCE, all).await.unwrap();
    for pod in &workload.pods {
        let fault = ForwardFault::Unanswered;
        cluster.faults().set_forward("shop", &pod.name, Some(fault));
    }
    let answered = |pod: &WorkloadPod| !pod.backends[0].http().unwrap().requests().is_empty();
    for _ in 0..100 {
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    }
    assert!(workload.pods.iter().all(answered));
}

#[tokio::test]
async fn unused_sessions_are_closed_and_opened_again_when_needed() {
    for form in ["spdy", "tunnel"] {
        let cluster = FakeCluster::start().await.unwrap();
        let _workload = pod(&cluster);
        let flags = [(&setting::PORT_FORWARD, form), (&setting::IDLE_TIMEOUT, "200ms")];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        for _ in 0..2 {
            assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
            let closed = cluster
                .forwards()
                .until(|counts| counts.sessions_open == 0 && counts.connections_open == 0);
            let closed = tokio::time::timeout(PATIENCE, closed).await;
            assert!(closed.is_ok(), "{form}: {:?}", cluster.forwards().counts());
        }
    }
}

#[tokio::test]
async fn a_session_with_a_silent_stream_is_not_unused() {
    for form in ["spdy", "tunnel"] {
        let cluster = FakeCluster::start().await.unwrap();
        let _workload = pod(&cluster);
        let flags = [(&setting::PORT_FORWARD, form), (&setting::IDLE_TIMEOUT, "100ms")];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        // Many times as long as an unused session lives.
        let events = Client::http1(app.address)
            .await
            .send(get(WEB, "/sse?count=2&interval_ms=1500"))
            .await;
        let body = events.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body.windows(5).filter(|window| window == b"data:").count(), 2);
        assert_eq!(cluster.forwards().counts().connections_opened, 1, "{form}");
    }
}

/// In front of the real binary, whose memory is its own.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_short_connections_leave_nothing_behind() {
    use crate::backends::scripted;
    use crate::load::{Scene, many};

    const ROUNDS: usize = 5;
    let scene = Scene::start(&["--idle-timeout=1s"]).await;
    let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
    let (address, seen) = scripted(answer).await;
    let builder = scene.cluster.workload("shop", "short").port("http", 80, 8080);
    let _short = builder.backend(move |_| address).create().unwrap();
    let proxy = scene.address;
    let mut memory = Vec::new();
    for _ in 0..ROUNDS {
        let statuses = many(
            1_000,
            |_| async move { fetch(proxy, "short.shop", "/").await.status },
        )
        .await;
        assert!(statuses.iter().all(|&status| status == StatusCode::OK));
        memory.push(scene.memory());
    }
    assert_eq!(seen.load(std::sync::atomic::Ordering::SeqCst), 1_000 * ROUNDS);
    // The first round has filled pools and caches.
    let growth = memory[ROUNDS - 1].saturating_sub(memory[0]);
    assert!(growth < 8 << 20, "{growth} bytes more: {memory:?}");

    let services = fetch(proxy, "localhost", "/services").await.json();
    let services = services["services"].as_array().unwrap();
    let short = services
        .iter()
        .find(|service| service["name"] == "short")
        .unwrap();
    for endpoint in short["endpoints"].as_array().unwrap() {
        assert_eq!(endpoint["requests_in_flight"], 0);
        for port in endpoint["ports"].as_array().unwrap() {
            assert_eq!(port["connections"], 0, "{port}");
        }
    }
    let ended = scene
        .cluster
        .forwards()
        .until(|counts| counts.connections_open == 0 && counts.sessions_open == 0);
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
    assert!(ended.is_ok(), "{:?}", scene.cluster.forwards().counts());
}
