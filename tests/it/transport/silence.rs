//! Sessions that go silent with their connection open: nothing tells of it but time. The clock stands still until nothing
//! else is to be done, and then goes on to the next moment that somebody waits for.

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use kube_tunnel::config::setting;
use kube_tunnel::testing::{Carrier, FakeCluster, Workload};
use tokio::time::Instant;

use crate::app::TestApp;
use crate::client::{Client, fetch, get};
use crate::transport::{WEB, pod, submit};

/// How long a session may be dead before it is noticed: with something under way, and without.
const ACTIVE: Duration = Duration::from_secs(6);
const QUIET: Duration = Duration::from_secs(15);

/// How much longer a request takes that is sent again over a session that is silent too, and asked already.
const AGAIN: Duration = Duration::from_secs(4);

/// How long a form may take to prove that it works.
const PROOF: Duration = Duration::from_secs(3);

/// For timers, and what is done after it was noticed.
const SLACK: Duration = Duration::from_millis(500);

/// Makes the sessions of a pod silent.
type Silence = fn(&FakeCluster, &Workload);

/// A form of port-forward, and how its sessions go silent.
const WAYS: [(&str, Silence); 3] = [
    ("tunnel", |cluster, _| {
        cluster.forwards().restart_runtime();
    }),
    ("spdy", silence_pod),
    ("channel", silence_pod),
];

/// Waits until the first PING of a channel was answered: before, nobody knows whether any are. Sessions need no such proof.
async fn is_answered(cluster: &FakeCluster, form: &str) {
    if form == "channel" {
        cluster.forwards().until(|counts| counts.pings > 0).await;
    }
}

fn silence_pod(cluster: &FakeCluster, workload: &Workload) {
    let pod = &workload.pods[0].name;
    cluster.forwards().silence_sessions("shop", pod);
}

#[tokio::test]
async fn a_post_on_a_silent_session_fails_within_six_seconds_and_a_get_is_served_soon() {
    for (form, silence) in WAYS {
        for (method, status, most) in [
            ("GET", StatusCode::OK, ACTIVE + AGAIN),
            ("POST", StatusCode::BAD_GATEWAY, ACTIVE),
        ] {
            let cluster = FakeCluster::start().await.unwrap();
            let workload = pod(&cluster);
            let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::PORT_FORWARD, form)]).await;
            assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
            is_answered(&cluster, form).await;
            silence(&cluster, &workload);
            tokio::time::pause();
            let before = Instant::now();
            let reply = match method {
                "GET" => fetch(app.address, WEB, "/").await,
                _ => submit(app.address, WEB, "/").await,
            };
            let elapsed = before.elapsed();
            tokio::time::resume();
            assert_eq!(reply.status, status, "{form} {method}: {}", reply.text());
            let silent = elapsed > Duration::from_secs(1);
            assert!(silent && elapsed <= most + SLACK, "{form} {method}: {elapsed:?}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_waits_on_a_silent_session_breaks_within_fifteen_seconds() {
    for (form, silence) in WAYS {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = pod(&cluster);
        let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::PORT_FORWARD, form)]).await;
        let mut events = Client::http1(app.address)
            .await
            .send(get(WEB, "/sse?count=2&interval_ms=3600000"))
            .await;
        events.body_mut().frame().await.unwrap().unwrap();
        is_answered(&cluster, form).await;
        silence(&cluster, &workload);
        tokio::time::pause();
        let before = Instant::now();
        let rest = events.into_body().collect().await;
        let elapsed = before.elapsed();
        tokio::time::resume();
        assert!(rest.is_err(), "{form}: half a stream looked complete");
        assert!(
            elapsed > Duration::from_secs(1),
            "{form}: it was not silent: {elapsed:?}"
        );
        assert!(elapsed <= QUIET + SLACK, "{form}: {elapsed:?}");
    }
}

#[tokio::test]
async fn a_stream_without_a_word_for_an_hour_lives_on() {
    for (form, _) in WAYS {
        let cluster = FakeCluster::start().await.unwrap();
        let _workload = pod(&cluster);
        let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::PORT_FORWARD, form)]).await;
        let mut events = Client::http1(app.address)
            .await
            .send(get(WEB, "/sse?count=2&interval_ms=3600000"))
            .await;
        events.body_mut().frame().await.unwrap().unwrap();
        tokio::time::pause();
        let rest = events.into_body().collect().await;
        tokio::time::resume();
        assert!(rest.unwrap().to_bytes().starts_with(b"data:"), "{form}");
    }
}

#[tokio::test]
async fn a_proxy_that_begins_to_swallow_spdy_is_got_round() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = pod(&cluster);
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    // The user's laptop is in another network now.
    cluster.faults().set_black_hole(Carrier::Spdy, true);
    tokio::time::pause();
    let before = Instant::now();
    let reply = fetch(app.address, WEB, "/").await;
    let elapsed = before.elapsed();
    tokio::time::resume();
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert!(elapsed <= ACTIVE + AGAIN + PROOF + SLACK, "{elapsed:?}");
}
