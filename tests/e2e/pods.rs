//! Pods that come and go.

use http::{Request, StatusCode};

use crate::client::{Client, Protocol, empty, fetch};
use crate::cluster::Namespace;
use crate::command::eventually;
use crate::note::note;
use crate::program::Proxy;
use crate::scene::Scene;
use crate::traffic::{Tally, Traffic};

/// Says what went on while the pods changed.
fn report(what: &str, tally: &Tally) {
    note(&format!(
        "{what}: {} answered, {} failed: {:#?}",
        tally.answered,
        tally.failures.len(),
        tally.failures
    ));
}

#[tokio::test]
async fn after_a_rollout_the_next_request_is_answered_by_a_new_pod() {
    let _scene = Scene::together().await;
    let own = Namespace::web("rollout").await;
    let proxy = Proxy::start().await;
    let host = own.host("web");
    let old = own.pods("web").await;
    assert!(old.contains(&fetch(proxy.address, &host, "/health").await.pod()));
    let traffic = Traffic::start(proxy.address, host.clone());

    own.kubectl(&["rollout", "restart", "deployment/web"])
        .await
        .succeeded();
    own.rolled_out("deployment/web").await;

    for _ in 0..20 {
        let reply = fetch(proxy.address, &host, "/health").await;
        assert!(!old.contains(&reply.pod()), "{}", reply.text());
    }
    let tally = traffic.stop().await;
    report("rollout", &tally);
    assert!(tally.answered > 0, "{tally:?}");
}

#[tokio::test]
async fn no_get_fails_when_a_pod_is_deleted() {
    let _scene = Scene::together().await;
    let own = Namespace::web("deletion").await;
    let proxy = Proxy::start().await;
    let host = own.host("web");
    for mode in [&["--grace-period=5"][..], &["--grace-period=0", "--force"]] {
        let traffic = Traffic::start(proxy.address, host.clone());
        let pod = fetch(proxy.address, &host, "/health").await.pod();

        own.kubectl(&[&["delete", "pod", &pod], mode].concat())
            .await
            .succeeded();

        // A forced deletion returns before the endpoints have followed; until then the pod may still answer.
        eventually("another pod to answer", async || {
            fetch(proxy.address, &host, "/health").await.pod() != pod
        })
        .await;
        own.rolled_out("deployment/web").await;
        own.ready_endpoints("web", 2).await;
        let tally = traffic.stop().await;
        report(&format!("deletion {mode:?}"), &tally);
        assert!(
            tally.answered > 0 && tally.failures.is_empty(),
            "{mode:?}: {tally:?}"
        );
    }
}

#[tokio::test]
async fn a_kept_connection_outlives_the_pod_behind_it() {
    let _scene = Scene::together().await;
    let own = Namespace::web("kept").await;
    let proxy = Proxy::start().await;
    for protocol in [Protocol::Http1, Protocol::H2c] {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let pod = client.get(&own.host("web"), "/health").await.pod();

        own.kubectl(&["delete", "pod", &pod]).await.succeeded();

        for _ in 0..4 {
            assert_ne!(
                client.get(&own.host("web"), "/health").await.pod(),
                pod,
                "{protocol:?}"
            );
        }
        own.rolled_out("deployment/web").await;
        own.ready_endpoints("web", 2).await;
    }
}

#[tokio::test]
async fn a_container_that_starts_again_is_reached_again() {
    let _scene = Scene::together().await;
    let own = Namespace::web("exit").await;
    own.kubectl(&["scale", "deployment/web", "--replicas=1"])
        .await
        .succeeded();
    own.ready_endpoints("web", 1).await;
    let proxy = Proxy::start().await;
    let host = own.host("web");
    let pod = fetch(proxy.address, &host, "/health").await.pod();

    // The request that ends the container has no answer but ours, and is not sent again.
    let mut client = Client::connect(proxy.address, Protocol::Http1).await.unwrap();
    let request = Request::post("/exit")
        .header("host", &host)
        .body(empty())
        .unwrap();
    let reply = client.exchange(request).await.unwrap();
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{}", reply.text());

    eventually("the container to answer again", async || {
        let reply = fetch(proxy.address, &host, "/health").await;
        reply.status == StatusCode::OK && reply.pod() == pod
    })
    .await;
}

#[tokio::test]
async fn a_deployment_scaled_to_nothing_and_back_is_followed() {
    let _scene = Scene::together().await;
    let own = Namespace::web("scaled").await;
    let proxy = Proxy::start().await;
    let host = own.host("web");
    fetch(proxy.address, &host, "/health").await.pod();

    own.kubectl(&["scale", "deployment/web", "--replicas=0"])
        .await
        .succeeded();
    own.kubectl(&["wait", "--for=delete", "pod", "-l", "app=web", "--timeout=60s"])
        .await
        .succeeded();
    let mut reply = fetch(proxy.address, &host, "/health").await;
    eventually("no pod", async || {
        reply = fetch(proxy.address, &host, "/health").await;
        reply.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    assert!(
        reply.text().contains("no ready pod") && reply.headers.contains_key("retry-after"),
        "{}",
        reply.text()
    );

    own.kubectl(&["scale", "deployment/web", "--replicas=1"])
        .await
        .succeeded();
    own.rolled_out("deployment/web").await;
    own.ready_endpoints("web", 1).await;
    eventually("the new pod", async || {
        fetch(proxy.address, &host, "/health").await.status == StatusCode::OK
    })
    .await;
}
