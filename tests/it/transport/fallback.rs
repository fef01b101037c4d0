//! Which form of port-forward is used, with which rights, and how that is found out.

use std::time::Duration;

use http::StatusCode;
use kube_tunnel::config::setting;
use kube_tunnel::testing::{Carrier, FakeCluster, ForwardFault, Identity, Rule};
use tokio::time::Instant;

use crate::app::{TestApp, eventually, web};
use crate::client::fetch;
use crate::transport::WEB;

/// How many upgrades to each form were answered with 101: SPDY, tunnel, channels.
fn upgrades(cluster: &FakeCluster) -> [bool; 3] {
    let counts = cluster.forwards().counts();
    [Carrier::Spdy, Carrier::Tunnel, Carrier::Channel].map(|carrier| counts.upgrades(carrier) > 0)
}

/// How often a port-forward was asked for with this verb: SPDY is a `create`, WebSockets are a `get`.
fn asked(cluster: &FakeCluster, verb: &str) -> usize {
    let calls = cluster.calls();
    let asked = |call: &&kube_tunnel::testing::ApiCall| {
        call.subresource.as_deref() == Some("portforward") && call.verb == verb
    };
    calls.iter().filter(asked).count()
}

async fn assert_served(app: &TestApp) {
    let reply = fetch(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
}

/// Serves requests over new sessions, several times.
async fn serve_anew(cluster: &FakeCluster, app: &TestApp) {
    for _ in 0..3 {
        cluster.restart();
        assert_served(app).await;
    }
}

#[tokio::test]
async fn spdy_is_used_where_it_is_allowed() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    serve_anew(&cluster, &app).await;
    assert_eq!(upgrades(&cluster), [true, false, false]);
    assert_eq!(asked(&cluster, "get"), 0);
}

#[tokio::test]
async fn where_spdy_is_refused_it_goes_through_a_websocket_and_that_is_remembered() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    cluster.faults().refuse_carrier(Carrier::Spdy, true);
    let app = TestApp::start(&cluster).await;
    assert_served(&app).await;
    serve_anew(&cluster, &app).await;
    assert_eq!(upgrades(&cluster), [false, true, false]);
    assert_eq!(asked(&cluster, "create"), 1, "a refused form was tried again");
}

#[tokio::test]
async fn where_every_spdy_is_refused_channels_are_used_and_that_is_remembered_for_all_pods() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 2);
    for carrier in [Carrier::Spdy, Carrier::Tunnel] {
        cluster.faults().refuse_carrier(carrier, true);
    }
    let app = TestApp::start(&cluster).await;
    assert_served(&app).await;
    for _ in 0..4 {
        serve_anew(&cluster, &app).await;
    }
    assert_eq!(upgrades(&cluster), [false, false, true]);
    assert_eq!(asked(&cluster, "create"), 1, "a refused form was tried again");
    let channels = cluster.forwards().counts().upgrades(Carrier::Channel);
    assert_eq!(
        asked(&cluster, "get") as u64,
        channels + 1,
        "a refused form was tried again"
    );
}

#[tokio::test]
async fn a_proxy_that_swallows_spdy_costs_three_seconds_once() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    cluster.faults().set_black_hole(Carrier::Spdy, true);
    let app = TestApp::start(&cluster).await;
    // The clock only goes on to the next moment that somebody waits for.
    tokio::time::pause();
    let before = Instant::now();
    assert_served(&app).await;
    let first = before.elapsed();
    tokio::time::resume();
    assert!(first < Duration::from_millis(3_500), "{first:?}");
    serve_anew(&cluster, &app).await;
    assert_eq!(upgrades(&cluster), [true, true, false]);
    assert_eq!(asked(&cluster, "create"), 1, "the swallowed form was tried again");
}

#[tokio::test]
async fn a_form_that_was_asked_for_is_the_only_one_and_the_error_says_so() {
    let rows = [
        ("spdy", Carrier::Spdy),
        ("tunnel", Carrier::Tunnel),
        ("channel", Carrier::Channel),
    ];
    for (name, carrier) in rows {
        let cluster = FakeCluster::start().await.unwrap();
        let _workload = web(&cluster, 1);
        let flags = [(&setting::PORT_FORWARD, name)];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        cluster.faults().refuse_carrier(carrier, true);
        let reply = fetch(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::FORBIDDEN, "{name}: {}", reply.text());
        assert_eq!(upgrades(&cluster), [false; 3], "{name}");
        let words = format!("port-forward={name} allows no other form");
        assert!(reply.text().contains(&words), "{}", reply.text());

        cluster.faults().refuse_carrier(carrier, false);
        assert_served(&app).await;
        let used = [Carrier::Spdy, Carrier::Tunnel, Carrier::Channel].map(|other| other == carrier);
        assert_eq!(upgrades(&cluster), used, "{name}");
    }
}

/// A user of the namespace `shop` who may read services and pods, as the seed's role has it, and do this with port-forwards.
fn user(cluster: &FakeCluster, verbs: &[&str]) -> Identity {
    cluster.add_token("dev", "dev-token");
    let mut rules = vec![Rule::new(&["get", "list"], &["services", "pods"]).in_namespace("shop")];
    if !verbs.is_empty() {
        rules.push(Rule::new(verbs, &["pods/portforward"]).in_namespace("shop"));
    }
    cluster.allow_only("dev", &rules);
    Identity::Token("dev-token".into())
}

#[tokio::test]
async fn the_right_to_create_port_forwards_is_enough() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start_as(&cluster, &user(&cluster, &["create"])).await;
    serve_anew(&cluster, &app).await;
    assert_eq!(upgrades(&cluster), [true, false, false]);
}

#[tokio::test]
async fn the_right_to_get_port_forwards_is_enough_too() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start_as(&cluster, &user(&cluster, &["get"])).await;
    assert_served(&app).await;
    serve_anew(&cluster, &app).await;
    assert_eq!(upgrades(&cluster), [false, true, false]);
    assert_eq!(asked(&cluster, "create"), 1, "a forbidden form was tried again");
}

#[tokio::test]
async fn servers_that_want_create_for_websockets_get_it_at_once() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    cluster.require_create_for_websockets(true);
    cluster.faults().refuse_carrier(Carrier::Spdy, true);
    let app = TestApp::start_as(&cluster, &user(&cluster, &["get", "create"])).await;
    assert_served(&app).await;
    assert_eq!(upgrades(&cluster), [false, true, false]);
}

#[tokio::test]
async fn without_either_right_the_error_names_the_verb_and_the_resource() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start_as(&cluster, &user(&cluster, &[])).await;
    let reply = fetch(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
    let words = r#"cannot create resource "pods/portforward""#;
    assert!(reply.text().contains(words), "{}", reply.text());
}

#[tokio::test]
async fn rights_that_come_later_are_used_at_once_and_to_the_full() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let app = TestApp::start_as(&cluster, &user(&cluster, &[])).await;
    for _ in 0..2 {
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::FORBIDDEN);
    }
    user(&cluster, &["create"]);
    assert_served(&app).await;
    assert_eq!(upgrades(&cluster), [true, false, false]);
}

#[tokio::test]
async fn channels_that_are_refused_later_give_way_to_what_is_allowed_then() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let spdy = |refuse| {
        for carrier in [Carrier::Spdy, Carrier::Tunnel] {
            cluster.faults().refuse_carrier(carrier, refuse);
        }
    };
    spdy(true);
    let app = TestApp::start(&cluster).await;
    assert_served(&app).await;
    assert_eq!(upgrades(&cluster), [false, false, true]);
    spdy(false);
    cluster.faults().refuse_carrier(Carrier::Channel, true);
    cluster.restart();
    // It tells that channels are refused now.
    fetch(app.address, WEB, "/").await;
    assert_served(&app).await;
    assert_eq!(upgrades(&cluster), [true, false, true]);
}

#[tokio::test]
async fn a_form_that_is_forbidden_does_not_make_a_moments_trouble_of_another_final() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let fault = |fault| {
        let pod = &workload.pods[0].name;
        cluster.faults().set_forward("shop", pod, fault);
    };
    fault(Some(ForwardFault::Upgrade(StatusCode::BAD_GATEWAY)));
    let app = TestApp::start_as(&cluster, &user(&cluster, &["get"])).await;
    let address = app.address;
    let request = tokio::spawn(async move { fetch(address, WEB, "/").await });
    eventually("both forms to be tried", || asked(&cluster, "get") > 0).await;
    fault(None);
    let reply = request.await.unwrap();
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
}

#[tokio::test]
async fn a_right_that_is_missing_is_told_at_once_though_something_on_the_way_refuses_the_better_form() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let refusal = ForwardFault::Kubelet(StatusCode::BAD_REQUEST, "Upgrade request required".into());
    let pod = &workload.pods[0].name;
    cluster.faults().set_forward("shop", pod, Some(refusal));
    let app = TestApp::start_as(&cluster, &user(&cluster, &["create"])).await;
    let reply = fetch(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN, "{}", reply.text());
    let words = r#"cannot get resource "pods/portforward""#;
    assert!(reply.text().contains(words), "{}", reply.text());
}
