//! What the proxy answers when no pod can, and that it says what to do.

use serde_json::json;

use crate::client::{Client, PROTOCOLS, fetch};
use crate::cluster::Namespace;
use crate::command::eventually;
use crate::program::Proxy;
use crate::scene::Scene;

/// A Service whose port nobody has opened: selected pods are ready, and refuse.
fn closed() -> String {
    let ports = json!([{"name": "http", "port": 80, "targetPort": 4444}]);
    let spec = json!({"selector": {"app": "web"}, "ports": ports});
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "closed"}, "spec": spec}).to_string()
}

#[tokio::test]
async fn each_kind_of_trouble_has_its_status_and_says_what_to_do() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let shop = scene.shop;
    let elsewhere = "web.kube-tunnel-e2e-nowhere.svc.cluster.local".to_owned();
    let next = format!("kubectl get pods,endpointslices -n {}", shop.name);
    let rows: [(String, u16, &[&str]); 8] = [
        (
            shop.host("missing"),
            404,
            &["services \"missing\" not found", "kubectl get svc -n"],
        ),
        (
            elsewhere,
            404,
            &["not found", "kubectl get svc -n kube-tunnel-e2e-nowhere"],
        ),
        (
            format!("{}:81", shop.host("multi")),
            404,
            &["no port 81", "80 (http)", "8082 (h2c)", "9003 (reset)"],
        ),
        (shop.host("empty"), 503, &["its selector matches no pod", &next]),
        (shop.host("noselector"), 503, &["it has no selector", &next]),
        (
            shop.host("external"),
            502,
            &["ExternalName for example.org", "ask for example.org itself"],
        ),
        (
            "www.example.org".into(),
            400,
            &[
                "not a host of this cluster",
                "service.namespace.svc.cluster.local",
            ],
        ),
        (format!("under_score.{}", shop.name), 400, &["under_score"]),
    ];
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        for (host, status, words) in &rows {
            let reply = client.get(host, "/").await;
            assert_eq!(reply.status, *status, "{protocol:?} {host}: {}", reply.text());
            for word in *words {
                assert!(
                    reply.text().contains(word),
                    "{protocol:?} {host}: no {word:?} in {}",
                    reply.text()
                );
            }
        }
        assert_eq!(
            client.get(&shop.host("web"), "/").await.status,
            200,
            "the connection is good after all that"
        );
    }
}

#[tokio::test]
async fn a_refused_port_is_a_bad_gateway_in_the_words_of_the_runtime() {
    let scene = Scene::together().await;
    scene.shop.apply(&closed()).await;
    scene.shop.ready_endpoints("closed", 2).await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let reply = client.get(&scene.shop.host("closed"), "/").await;
        assert_eq!(reply.status, 502, "{}", reply.text());
        for words in [
            "4444",
            "connection refused",
            "check that a container listens on that port",
        ] {
            assert!(reply.text().contains(words), "no {words:?} in {}", reply.text());
        }
        client.get(&scene.shop.host("web"), "/").await.pod();
    }
}

#[tokio::test]
async fn a_pod_that_resets_harms_no_other_request() {
    let scene = Scene::together().await;
    // The runtime holds each of them back for a second.
    let proxy = Proxy::with(&["--max-retries=0"]).await;
    let (reset, web) = (
        format!("{}:9003", scene.shop.host("multi")),
        scene.shop.host("web"),
    );
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        client.get(&web, "/").await.pod();
        for _ in 0..2 {
            let reply = client.get(&reset, "/").await;
            assert_eq!(reply.status, 502, "{}", reply.text());
            client.get(&web, "/").await.pod();
        }
    }
}

#[tokio::test]
async fn a_service_that_appears_is_found_and_one_that_goes_is_missed() {
    let _scene = Scene::together().await;
    let own = Namespace::web("appears").await;
    let proxy = Proxy::start().await;
    let host = own.host("late");
    assert_eq!(fetch(proxy.address, &host, "/").await.status, 404);

    own.apply(&closed().replace("closed", "late").replace("4444", "8080"))
        .await;
    own.ready_endpoints("late", 2).await;
    eventually("the new service", async || {
        fetch(proxy.address, &host, "/").await.status == 200
    })
    .await;

    own.kubectl(&["delete", "service", "late"]).await.succeeded();
    eventually("its end", async || {
        fetch(proxy.address, &host, "/").await.status == 404
    })
    .await;
}
