//! What is asked of the API server, with which rights, and how changes in the cluster are followed.

use std::collections::BTreeSet;

use http::StatusCode;
use kube_tunnel::config::setting;
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, ForwardFault, Identity, Rule};
use serde_json::{Value, json};

use crate::app::{TestApp, eventually, web};
use crate::client::fetch;
use crate::transport::submit;

const WEB: &str = "web.shop.svc.cluster.local";

/// A user with exactly these rights in the namespace `shop`.
fn user(cluster: &FakeCluster, rules: &[Rule]) -> Identity {
    cluster.add_token("dev", "dev-token");
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| rule.clone().in_namespace("shop"))
        .collect();
    cluster.allow_only("dev", &rules);
    Identity::Token("dev-token".into())
}

#[tokio::test]
async fn a_namespaced_role_is_enough_and_nothing_cluster_wide_is_asked() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 2);
    let identity = user(
        &cluster,
        &[
            Rule::new(&["get", "list", "watch"], &["services", "pods", "endpointslices"]),
            Rule::new(&["get", "create"], &["pods/portforward"]),
        ],
    );
    let app = TestApp::start_as(&cluster, &identity).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    for call in cluster.calls() {
        assert!(
            call.resource.is_empty() || call.namespace.as_deref() == Some("shop"),
            "{call:?}"
        );
    }
}

#[tokio::test]
async fn without_endpointslices_and_watch_pods_are_polled() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let identity = user(
        &cluster,
        &[
            Rule::new(&["get", "list"], &["services", "pods"]),
            Rule::new(&["get", "create"], &["pods/portforward"]),
        ],
    );
    let kubeconfig = cluster.kubeconfig_for(&identity).unwrap();
    let app = TestApp::with(&kubeconfig, &[(&setting::POLL_INTERVAL, "20ms")]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);

    cluster.set_ready("shop", &workload.pods[0].name, false);
    let only = &workload.pods[1].name;
    // Two lists more have seen the change.
    cluster.clear_calls();
    let lists = || {
        cluster
            .calls()
            .iter()
            .filter(|call| call.verb == "list" && call.resource == "pods")
            .count()
    };
    eventually("two polls", || lists() >= 2).await;
    for _ in 0..4 {
        assert_eq!(&fetch(app.address, WEB, "/").await.pod(), only);
    }
}

#[tokio::test]
async fn a_client_certificate_is_as_good_as_a_token() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let identity = Identity::ClientCertificate {
        name: "admin".into(),
        group: Some("system:masters".into()),
    };
    let app = TestApp::start_as(&cluster, &identity).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn an_unready_pod_gets_no_more_requests_and_comes_back() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let app = TestApp::start(&cluster).await;
    fetch(app.address, WEB, "/").await;
    let (away, stays) = (&workload.pods[0].name, &workload.pods[1].name);
    cluster.set_ready("shop", away, false);
    wait_for_pods(&app, &[stays]).await;
    cluster.set_ready("shop", away, true);
    wait_for_pods(&app, &[away, stays]).await;
}

/// Waits until eight requests in a row are answered by exactly these pods.
async fn wait_for_pods(app: &TestApp, pods: &[&String]) {
    let wanted: BTreeSet<String> = pods.iter().map(|pod| (*pod).clone()).collect();
    let waiting = async {
        loop {
            let mut seen = BTreeSet::new();
            for _ in 0..8 {
                let reply = fetch(app.address, WEB, "/").await;
                assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
                seen.insert(reply.pod());
            }
            if seen == wanted {
                return;
            }
        }
    };
    tokio::time::timeout(crate::app::PATIENCE, waiting)
        .await
        .expect("the pods never changed");
}

/// Waits until somebody has asked for EndpointSlices.
async fn until_asked_for_slices(cluster: &FakeCluster) {
    eventually("the lookup", || {
        cluster
            .calls()
            .iter()
            .any(|call| call.resource == "endpointslices")
    })
    .await;
}

#[tokio::test]
async fn a_replaced_pod_costs_no_request() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let app = TestApp::start(&cluster).await;
    // The backends outlive the pods they were started for, and are what tells who has answered.
    let backends = [&workload.pods[0].name, &workload.pods[1].name];
    let mut pod = workload.pods[0].name.clone();
    for _ in 0..3 {
        wait_for_pods(&app, &backends).await;
        pod = cluster.replace_pod("shop", &pod).unwrap();
    }
    wait_for_pods(&app, &backends).await;
    assert!(cluster.delete_pod("shop", &pod));
    wait_for_pods(&app, &backends[1..]).await;
}

#[tokio::test]
async fn a_pod_that_is_gone_is_passed_over_before_the_cluster_says_so() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::PodGone));
    let app = TestApp::start(&cluster).await;
    for _ in 0..4 {
        let reply = fetch(app.address, WEB, "/").await;
        assert_eq!(
            (reply.status, reply.pod()),
            (StatusCode::OK, workload.pods[1].name.clone())
        );
    }
}

#[tokio::test]
async fn a_pod_that_its_kubelet_has_lost_is_passed_over_even_for_a_post() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let (lost, other) = (&workload.pods[0].name, &workload.pods[1].name);
    let answer = ForwardFault::Kubelet(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("pod not found (\"{lost}_shop\")"),
    );
    cluster.faults().set_forward("shop", lost, Some(answer));
    cluster.set_ready("shop", other, false);
    let app = TestApp::start(&cluster).await;
    let address = app.address;
    let request = tokio::spawn(async move { submit(address, WEB, "/").await });
    let asked = || {
        cluster
            .calls()
            .into_iter()
            .find(|call| call.subresource.is_some())
    };
    eventually("an upgrade", || asked().is_some()).await;
    cluster.set_ready("shop", other, true);
    let reply = request.await.unwrap();
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert_eq!(&reply.pod(), other);
    // The form of the port-forward is not to blame: none by GET was tried.
    let forms: BTreeSet<_> = cluster
        .calls()
        .into_iter()
        .filter(|call| call.subresource.is_some())
        .map(|call| call.verb)
        .collect();
    assert_eq!(forms, BTreeSet::from(["create".to_owned()]));
}

#[tokio::test]
async fn a_pod_that_refuses_is_passed_over_even_for_a_post() {
    use crate::client::{Client, Reply};
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::Refused));
    let app = TestApp::start(&cluster).await;
    for _ in 0..4 {
        let request = http::Request::post("/")
            .header("host", WEB)
            .body(http_body_util::Full::default())
            .unwrap();
        let reply = Reply::read(Client::http1(app.address).await.send(request).await).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    }
}

#[tokio::test]
async fn a_service_that_appears_is_found() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::NOT_FOUND);
    let _workload = web(&cluster, 1);
    let waiting = async { while fetch(app.address, WEB, "/").await.status != StatusCode::OK {} };
    tokio::time::timeout(crate::app::PATIENCE, waiting)
        .await
        .expect("the new service was never found");
}

#[tokio::test]
async fn lookups_survive_a_restart_of_the_api_server_that_forgets_history() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let app = TestApp::start(&cluster).await;
    fetch(app.address, WEB, "/").await;
    cluster.set_ready("shop", &workload.pods[0].name, false);
    cluster.compact(); // a watch from before is now answered 410 Gone
    cluster.restart();
    wait_for_pods(&app, &[&workload.pods[1].name]).await;
}

#[tokio::test]
async fn a_service_is_followed_only_while_it_is_used() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let kubeconfig = cluster.kubeconfig();
    let app = TestApp::with(&kubeconfig, &[(&setting::IDLE_TIMEOUT, "200ms")]).await;
    fetch(app.address, WEB, "/").await;
    let backend = workload.pods[0].backends[0].http().unwrap();
    eventually("the idle connection to close", || backend.open_connections() == 0).await;
    cluster.clear_calls();
    fetch(app.address, WEB, "/").await;
    let lists = || cluster.calls().iter().filter(|call| call.verb == "list").count();
    eventually("a new lookup", || lists() >= 2).await;
}

#[tokio::test]
async fn a_pod_that_is_gone_makes_polled_endpoints_be_read_again() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let identity = user(
        &cluster,
        &[
            Rule::new(&["get", "list"], &["services", "pods"]),
            Rule::new(&["get", "create"], &["pods/portforward"]),
        ],
    );
    let kubeconfig = cluster.kubeconfig_for(&identity).unwrap();
    let flags = [(&setting::POLL_INTERVAL, "1h"), (&setting::MAX_RETRIES, "1")];
    let app = TestApp::with(&kubeconfig, &flags).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);

    cluster.replace_pod("shop", &workload.pods[0].name).unwrap();
    cluster.restart(); // the connection to the old pod is still good
    cluster.clear_calls();
    // It may fail, but it tells that the pod is gone.
    fetch(app.address, WEB, "/").await;
    let listed = |resource: &str| {
        let calls = cluster.calls();
        calls
            .iter()
            .any(|call| call.verb == "list" && call.resource == resource)
    };
    eventually("both lists", || listed("services") && listed("pods")).await;
    let waiting = async { while fetch(app.address, WEB, "/").await.status != StatusCode::OK {} };
    tokio::time::timeout(crate::app::PATIENCE, waiting)
        .await
        .expect("the new pod was never found");
}

#[tokio::test]
async fn without_endpointslices_a_service_that_loses_its_selector_loses_its_pods() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let identity = user(
        &cluster,
        &[
            Rule::new(&["get", "list", "watch"], &["services", "pods"]),
            Rule::new(&["get", "create"], &["pods/portforward"]),
        ],
    );
    let app = TestApp::start_as(&cluster, &identity).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    let mut service = cluster.get("Service", "shop", "web").unwrap();
    service["spec"].as_object_mut().unwrap().remove("selector");
    cluster.apply(service).unwrap();
    let waiting = async {
        loop {
            let reply = fetch(app.address, WEB, "/").await;
            if reply.status == StatusCode::FORBIDDEN {
                return reply;
            }
        }
    };
    let reply = tokio::time::timeout(crate::app::PATIENCE, waiting)
        .await
        .expect("the old pod was used for ever");
    assert!(reply.text().contains("selector"), "{}", reply.text());
}

#[tokio::test]
async fn endpointslices_that_are_refused_later_are_replaced_by_pods() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let forward = Rule::new(&["get", "create"], &["pods/portforward"]);
    let all = Rule::new(&["get", "list", "watch"], &["services", "pods", "endpointslices"]);
    let identity = user(&cluster, &[forward.clone(), all]);
    let app = TestApp::start_as(&cluster, &identity).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);

    let fewer = Rule::new(&["get", "list", "watch"], &["services", "pods"]);
    user(&cluster, &[forward, fewer]);
    cluster.restart();
    cluster.set_ready("shop", &workload.pods[0].name, false);
    wait_for_pods(&app, &[&workload.pods[1].name]).await;
}

#[tokio::test]
async fn endpointslices_that_are_refused_for_a_moment_are_read_again() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let forward = Rule::new(&["get", "create"], &["pods/portforward"]);
    let services = Rule::new(&["get", "list", "watch"], &["services"]);
    let slices = Rule::new(&["get", "list", "watch"], &["endpointslices"]);
    let all = [forward.clone(), services.clone(), slices];
    let identity = user(&cluster, &all);
    let app = TestApp::start_as(&cluster, &identity).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);

    user(&cluster, &[forward, services]);
    cluster.restart();
    cluster.clear_calls();
    until_asked_for_slices(&cluster).await;
    user(&cluster, &all);
    cluster.set_ready("shop", &workload.pods[0].name, false);
    wait_for_pods(&app, &[&workload.pods[1].name]).await;
}

#[tokio::test]
async fn a_request_that_finds_no_ready_pod_waits_for_one() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let pod = &workload.pods[0].name;
    cluster.set_ready("shop", pod, false);
    cluster.clear_calls();
    let address = app.address;
    let waiting = tokio::spawn(async move { fetch(address, WEB, "/").await.status });
    until_asked_for_slices(&cluster).await;
    cluster.set_ready("shop", pod, true);
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn a_service_that_publishes_unready_pods_has_them_asked() {
    let resources = ["services", "pods", "endpointslices"];
    for readable in [&resources[..], &resources[..2]] {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = cluster
            .workload("shop", "web")
            .port("http", 80, ("http", 8080))
            .serve(Serve::Http(Protocols::Any))
            .spec("publishNotReadyAddresses", true)
            .create()
            .unwrap();
        assert!(cluster.set_ready("shop", &workload.pods[0].name, false));
        let identity = user(
            &cluster,
            &[
                Rule::new(&["get", "list", "watch"], readable),
                Rule::new(&["get", "create"], &["pods/portforward"]),
            ],
        );
        let kubeconfig = cluster.kubeconfig_for(&identity).unwrap();
        let app = TestApp::with(&kubeconfig, &[(&setting::READY_TIMEOUT, "100ms")]).await;
        let reply = fetch(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::OK, "{readable:?}: {}", reply.text());
    }
}

#[tokio::test]
async fn the_wait_for_a_ready_pod_is_bounded() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::READY_TIMEOUT, "100ms")]).await;
    cluster.set_ready("shop", &workload.pods[0].name, false);
    assert_eq!(
        fetch(app.address, WEB, "/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[tokio::test]
async fn a_service_without_a_selector_reaches_the_pods_that_its_slices_name_and_no_other_address() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let service = |name: &str| {
        json!({
            "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": "10.96.7.7", "ports": [{"name": "http", "port": 80}]},
        })
    };
    let slice = |service: &str, endpoint: Value| {
        json!({
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-by-hand"), "namespace": "shop",
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [endpoint],
        })
    };
    let pod = json!({"kind": "Pod", "namespace": "shop", "name": workload.pods[0].name});
    let rows = [
        (
            "by-hand",
            Some(json!({"addresses": ["10.0.0.9"], "targetRef": pod})),
        ),
        ("outside", Some(json!({"addresses": ["192.0.2.1"]}))),
        (
            "a-node",
            Some(json!({"addresses": ["192.0.2.2"], "targetRef": {"kind": "Node", "name": "n"}})),
        ),
        ("nothing", None),
    ];
    for (name, endpoint) in rows {
        cluster.apply(service(name)).unwrap();
        if let Some(endpoint) = endpoint {
            cluster.apply(slice(name, endpoint)).unwrap();
        }
    }
    let app = TestApp::start(&cluster).await;
    assert_eq!(
        fetch(app.address, "by-hand.shop", "/").await.pod(),
        workload.pods[0].name
    );
    for (name, status, words) in [
        (
            "outside",
            StatusCode::BAD_GATEWAY,
            "addresses without a pod (192.0.2.1)",
        ),
        (
            "a-node",
            StatusCode::BAD_GATEWAY,
            "addresses without a pod (192.0.2.2)",
        ),
        (
            "nothing",
            StatusCode::SERVICE_UNAVAILABLE,
            "no selector, and no pods",
        ),
    ] {
        let reply = fetch(app.address, &format!("{name}.shop"), "/").await;
        assert_eq!(reply.status, status, "{name}: {}", reply.text());
        assert!(reply.text().contains(words), "{name}: {}", reply.text());
    }
}
