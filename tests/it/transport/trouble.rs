//! Trouble while port-forwards are opened, and what it must not do to others (contract G1, G4).

use std::time::Duration;

use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kube_tunnel::config::setting;
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{Carrier, FakeCluster, ForwardFault};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::{PATIENCE, TestApp, eventually, web};
use crate::backends::{behind, scripted};
use crate::client::{Client, fetch, get};
use crate::transport::{FEW, WEB, pod, submit};

/// How often a port-forward was asked for.
fn asked(cluster: &FakeCluster) -> usize {
    let calls = cluster.calls();
    calls.iter().filter(|call| call.subresource.is_some()).count()
}

/// Asks for a stream that lasts, and reads so many of its events.
async fn stream(app: &TestApp, events: usize) -> Response<Incoming> {
    let mut client = Client::http1(app.address).await;
    let mut response = client.send(get(WEB, "/sse?count=1000&interval_ms=100")).await;
    for _ in 0..events {
        response.body_mut().frame().await.unwrap().unwrap();
    }
    response
}

#[tokio::test]
async fn the_pods_of_a_dead_node_hold_up_nobody_else() {
    const DEAD: usize = 20;
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let dead = cluster.workload("dead", "web").port("http", 80, 8080);
    let dead = dead
        .serve(Serve::Http(Protocols::Any))
        .replicas(DEAD)
        .create()
        .unwrap();
    for pod in &dead.pods {
        let fault = ForwardFault::Unanswered;
        cluster.faults().set_forward("dead", &pod.name, Some(fault));
    }
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let mut hanging = JoinSet::new();
    for _ in 0..DEAD {
        hanging.spawn(async move { fetch(address, "web.dead", "/").await.status });
    }
    // All that are let through at a time, if they are held by those that hang.
    eventually("port-forwards to the dead node", || asked(&cluster) >= 8).await;
    let before = Instant::now();
    assert_eq!(fetch(address, WEB, "/").await.status, StatusCode::OK);
    let waited = before.elapsed();
    assert!(waited < Duration::from_secs(4), "{waited:?}");
}

#[tokio::test]
async fn a_connection_shares_a_session_when_a_new_one_does_not_come() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let mut streams = vec![stream(&app, 1).await];
    // The session that is kept ready.
    cluster.forwards().until(|counts| counts.sessions_open == 2).await;
    let fault = ForwardFault::Unanswered;
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(fault));
    // After a second, streams have come to stay, and newcomers rather get a session of their own.
    streams.push(stream(&app, 15).await);
    let before = Instant::now();
    assert_eq!(submit(app.address, WEB, "/").await.status, StatusCode::OK);
    let waited = before.elapsed();
    assert!(waited < Duration::from_secs(4), "{waited:?}");
    assert_eq!(cluster.forwards().counts().sessions_open, 2);
}

#[tokio::test]
async fn a_connection_shares_a_session_when_a_new_one_is_refused() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let flags = [(&setting::MAX_RETRIES, "0")];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    let mut streams = vec![stream(&app, 1).await];
    cluster.forwards().until(|counts| counts.sessions_open == 2).await;
    let fault = ForwardFault::Upgrade(StatusCode::SERVICE_UNAVAILABLE);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(fault));
    streams.push(stream(&app, 15).await);
    let reply = submit(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
}

#[tokio::test]
async fn a_form_that_is_answered_with_an_error_of_the_server_is_got_round_and_used_when_it_works() {
    for status in [
        StatusCode::INTERNAL_SERVER_ERROR,
        StatusCode::BAD_GATEWAY,
        StatusCode::SERVICE_UNAVAILABLE,
    ] {
        let cluster = FakeCluster::start().await.unwrap();
        let _workload = pod(&cluster);
        cluster.faults().answer_carrier(Carrier::Spdy, Some(status));
        let app = TestApp::start(&cluster).await;
        assert_eq!(
            fetch(app.address, WEB, "/").await.status,
            StatusCode::OK,
            "{status}"
        );
        let upgrades = |carrier| cluster.forwards().counts().upgrades(carrier);
        assert_eq!((upgrades(Carrier::Spdy), upgrades(Carrier::Channel)), (0, 0));
        cluster.faults().answer_carrier(Carrier::Spdy, None);
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(31)).await;
        tokio::time::resume();
        // Nobody waits for the better form to be tried.
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
        let better = cluster
            .forwards()
            .until(|counts| counts.upgrades(Carrier::Spdy) > 0);
        assert!(tokio::time::timeout(PATIENCE, better).await.is_ok(), "{status}");
    }
}

#[tokio::test]
async fn channels_give_way_to_sessions_some_time_after_those_are_let_through() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    for carrier in [Carrier::Spdy, Carrier::Tunnel] {
        cluster.faults().refuse_carrier(carrier, true);
    }
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    for carrier in [Carrier::Spdy, Carrier::Tunnel] {
        cluster.faults().refuse_carrier(carrier, false);
    }
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(601)).await;
    tokio::time::resume();
    let sessions = || cluster.forwards().counts().upgrades(Carrier::Spdy) > 0;
    let before = Instant::now();
    while !sessions() {
        assert!(before.elapsed() < PATIENCE, "channels for ever");
        cluster.restart();
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    }
    let channels = cluster.forwards().counts().upgrades(Carrier::Channel);
    cluster.restart();
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    assert_eq!(cluster.forwards().counts().upgrades(Carrier::Channel), channels);
}

#[tokio::test]
async fn a_server_that_asks_to_wait_is_left_alone_until_then() {
    const CLIENTS: usize = 20;
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    cluster.faults().set_busy(Some(1));
    let before = Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..CLIENTS {
        requests.spawn(async move { submit(address, WEB, "/").await.status });
    }
    eventually("a refusal", || asked(&cluster) > 0).await;
    cluster.faults().set_busy(None);
    for status in requests.join_all().await {
        assert_eq!(status, StatusCode::OK);
    }
    let waited = before.elapsed();
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    // The one that was refused, the one that was let through, and those that are kept ready.
    assert!(
        asked(&cluster) as u64 <= 1 + FEW,
        "{} were asked for",
        asked(&cluster)
    );
}

#[tokio::test]
async fn a_session_that_is_being_opened_does_not_hold_up_the_end() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let first = stream(&app, 1).await;
    cluster.forwards().until(|counts| counts.sessions_open == 2).await;
    let fault = ForwardFault::Unanswered;
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(fault));
    let before = asked(&cluster);
    let second = stream(&app, 1).await;
    eventually("a session to be made ready", || asked(&cluster) > before).await;
    drop((first, second));
    let before = Instant::now();
    app.stop().await;
    // A second less than the deadline by which the rest is cut off.
    assert!(
        before.elapsed() < Duration::from_secs(1),
        "{:?}",
        before.elapsed()
    );
}

#[tokio::test]
async fn the_sessions_to_a_pod_that_ends_do_so_with_their_connections() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = scripted(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok").await;
    for ending in [FakeCluster::terminate_pod, FakeCluster::delete_pod] {
        let workload = behind(&cluster, address);
        let app = TestApp::start(&cluster).await;
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
        let forwards = cluster.forwards();
        forwards.until(|counts| counts.sessions_open == 2).await;
        assert!(ending(&cluster, "shop", &workload.pods[0].name));
        let ended = forwards.until(|counts| counts.sessions_open == 0);
        assert!(tokio::time::timeout(PATIENCE, ended).await.is_ok());
        app.stop().await;
    }
}

#[tokio::test]
async fn a_stream_from_a_pod_that_ends_is_not_cut_off() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    let mut client = Client::http1(app.address).await;
    let events = client.send(get(WEB, "/sse?count=20&interval_ms=50")).await;
    cluster.forwards().until(|counts| counts.sessions_open == 2).await;
    assert!(cluster.terminate_pod("shop", &workload.pods[0].name));
    // The one that was kept ready goes at once.
    cluster.forwards().until(|counts| counts.sessions_open == 1).await;
    let body = events.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body.windows(5).filter(|window| window == b"data:").count(), 20);
}
