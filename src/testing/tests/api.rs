//! Get, list, watch, authentication, authorization.

use std::time::Duration;

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::Status;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Error, ResourceExt};
use serde_json::{Value, json};

use super::{admin, client_from, user, within};
use crate::testing::{FakeCluster, Identity, Rule};

fn service(name: &str, labels: &Value) -> Value {
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "shop", "labels": labels}})
}

fn services(client: Client) -> Api<Service> {
    Api::namespaced(client, "shop")
}

fn api_error<T: std::fmt::Debug>(result: Result<T, Error>) -> Status {
    match result.unwrap_err() {
        Error::Api(status) => *status,
        other => panic!("not an API error: {other:?}"),
    }
}

/// Event and object name, or the code of an error.
async fn next(events: &mut (impl Stream<Item = Result<WatchEvent<Service>, Error>> + Unpin)) -> String {
    match within(events.next()).await.expect("the watch ended").unwrap() {
        WatchEvent::Added(object) => format!("ADDED {}", object.name_any()),
        WatchEvent::Modified(object) => format!("MODIFIED {}", object.name_any()),
        WatchEvent::Deleted(object) => format!("DELETED {}", object.name_any()),
        WatchEvent::Bookmark(_) => "BOOKMARK".to_owned(),
        WatchEvent::Error(status) => format!("ERROR {}", status.code),
    }
}

#[tokio::test]
async fn a_workload_is_a_service_pods_and_a_slice_that_agree() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = cluster
        .workload("shop", "web")
        .port("http", 80, ("web", 8080))
        .app_protocol("kubernetes.io/h2c")
        .replicas(2)
        .create()
        .unwrap();
    let client = admin(&cluster).await;

    let service = services(client.clone()).get("web").await.unwrap();
    assert_eq!(service.spec.unwrap().ports.unwrap()[0].port, 80);
    let pods: Api<Pod> = Api::namespaced(client.clone(), "shop");
    let selected = pods.list(&ListParams::default().labels("app=web")).await.unwrap();
    assert_eq!(selected.items.len(), 2);
    let slices: Api<EndpointSlice> = Api::namespaced(client, "shop");
    let selected = slices
        .list(&ListParams::default().labels("kubernetes.io/service-name=web"))
        .await
        .unwrap();
    let endpoints = &selected.items[0].endpoints;
    assert_eq!(endpoints.as_ref().unwrap().len(), 2);
    assert_eq!(
        endpoints.as_ref().unwrap()[0].addresses,
        [workload.pods[0].ip.clone()]
    );
    assert_eq!(selected.items[0].ports.as_ref().unwrap()[0].port, Some(8080));
}

#[tokio::test]
async fn lists_narrow_by_namespace_and_field() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("web", &json!({}))).unwrap();
    cluster
        .apply(json!({"kind": "Service", "metadata": {"name": "web", "namespace": "bank"}}))
        .unwrap();
    let client = admin(&cluster).await;
    let all: Api<Service> = Api::all(client.clone());
    assert_eq!(all.list(&ListParams::default()).await.unwrap().items.len(), 2);
    let one = all
        .list(&ListParams::default().fields("metadata.namespace=bank"))
        .await
        .unwrap();
    assert_eq!(one.items[0].namespace().as_deref(), Some("bank"));
    assert_eq!(
        services(client)
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .len(),
        1
    );
}

#[tokio::test]
async fn a_missing_object_is_named_in_the_answer() {
    let cluster = FakeCluster::start().await.unwrap();
    let status = api_error(services(admin(&cluster).await).get("web").await);
    assert_eq!((status.code, status.reason.as_str()), (404, "NotFound"));
    assert_eq!(status.message, "services \"web\" not found");
}

#[tokio::test]
async fn a_watch_replays_history_after_its_version() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("a", &json!({}))).unwrap();
    let api = services(admin(&cluster).await);
    let version = api
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    cluster.apply(service("b", &json!({}))).unwrap();
    cluster.delete("Service", "shop", "a");

    let mut events = api
        .watch(&WatchParams::default(), &version)
        .await
        .unwrap()
        .boxed();
    assert_eq!(next(&mut events).await, "ADDED b");
    assert_eq!(next(&mut events).await, "DELETED a");
    cluster.apply(service("b", &json!({"new": "label"}))).unwrap();
    assert_eq!(next(&mut events).await, "MODIFIED b");
}

#[tokio::test]
async fn a_watch_without_a_version_starts_with_what_exists() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("a", &json!({}))).unwrap();
    let api = services(admin(&cluster).await);
    let mut events = api.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    assert_eq!(next(&mut events).await, "ADDED a");
}

#[tokio::test]
async fn crossing_a_watch_s_selector_looks_like_creation_and_deletion() {
    let cluster = FakeCluster::start().await.unwrap();
    let api = services(admin(&cluster).await);
    let mut events = api
        .watch(&WatchParams::default().labels("tier=front"), "0")
        .await
        .unwrap()
        .boxed();
    cluster.apply(service("web", &json!({"tier": "back"}))).unwrap();
    cluster.apply(service("web", &json!({"tier": "front"}))).unwrap();
    cluster.apply(service("web", &json!({"tier": "back"}))).unwrap();
    assert_eq!(next(&mut events).await, "ADDED web");
    assert_eq!(next(&mut events).await, "DELETED web");
}

#[tokio::test]
async fn a_watch_from_forgotten_history_gets_410_inside_the_stream() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("a", &json!({}))).unwrap();
    let api = services(admin(&cluster).await);
    let version = api
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    let mut old = api
        .watch(&WatchParams::default(), &version)
        .await
        .unwrap()
        .boxed();
    cluster.apply(service("b", &json!({}))).unwrap();
    assert_eq!(next(&mut old).await, "ADDED b");
    cluster.compact();
    let mut events = api
        .watch(&WatchParams::default(), &version)
        .await
        .unwrap()
        .boxed();
    assert_eq!(next(&mut events).await, "ERROR 410");
    // One that was up to date goes on.
    cluster.apply(service("c", &json!({}))).unwrap();
    assert_eq!(next(&mut old).await, "ADDED c");
}

#[tokio::test]
async fn bookmarks_come_on_demand_after_earlier_writes() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("a", &json!({}))).unwrap();
    let api = services(admin(&cluster).await);
    let mut events = api.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    assert_eq!(next(&mut events).await, "ADDED a");
    cluster.apply(service("b", &json!({}))).unwrap();
    cluster.send_bookmarks();
    assert_eq!(next(&mut events).await, "ADDED b");
    assert_eq!(next(&mut events).await, "BOOKMARK");
}

#[tokio::test]
async fn a_watch_ends_at_its_timeout() {
    let cluster = FakeCluster::start().await.unwrap();
    let api = services(admin(&cluster).await);
    let events = api.watch(&WatchParams::default().timeout(1), "0").await.unwrap();
    let rest: Vec<_> = within(events.collect()).await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_watch_with_a_timeout_of_zero_goes_on() {
    let cluster = FakeCluster::start().await.unwrap();
    let api = services(admin(&cluster).await);
    let forever = WatchParams::default().timeout(0);
    let mut events = api.watch(&forever, "0").await.unwrap().boxed();
    cluster.apply(service("a", &json!({}))).unwrap();
    assert_eq!(next(&mut events).await, "ADDED a");
}

#[tokio::test]
async fn a_timeout_that_is_none_is_refused() {
    let cluster = FakeCluster::start().await.unwrap();
    let client = admin(&cluster).await;
    for timeout in ["10000000000000000000", "-1", "soon"] {
        let path = format!("/api/v1/services?watch=1&timeoutSeconds={timeout}");
        let request = http::Request::get(path).body(Vec::new()).unwrap();
        assert_eq!(
            api_error(client.request_text(request).await).code,
            400,
            "{timeout}"
        );
    }
}

#[tokio::test]
async fn the_rows_of_a_table_hold_as_much_of_their_objects_as_was_asked_for() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("web", &json!({}))).unwrap();
    let client = admin(&cluster).await;
    for (query, kind) in [
        ("", Some("PartialObjectMetadata")),
        ("?includeObject=Metadata", Some("PartialObjectMetadata")),
        ("?includeObject=Object", Some("Service")),
        ("?includeObject=None", None),
    ] {
        let request = http::Request::get(format!("/api/v1/services{query}"))
            .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
            .body(Vec::new())
            .unwrap();
        let table: Value = client.request(request).await.unwrap();
        let row = &table["rows"][0];
        assert_eq!(row["cells"][0], "web");
        assert_eq!(row["object"]["kind"].as_str(), kind, "{query}");
    }
}

#[tokio::test]
async fn the_watcher_of_kube_rs_survives_compaction_and_restart() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.apply(service("a", &json!({}))).unwrap();
    let api = services(admin(&cluster).await);
    let mut events = watcher(api, watcher::Config::default()).boxed();
    let mut seen = std::collections::BTreeSet::new();
    let mut wait_for = async |name: &str| {
        while !seen.contains(name) {
            match within(events.next()).await.expect("the watcher ended") {
                Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                    seen.insert(object.name_any());
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    wait_for("a").await;
    cluster.restart();
    cluster.apply(service("b", &json!({}))).unwrap();
    cluster.compact();
    wait_for("b").await;
}

#[tokio::test]
async fn an_expired_token_is_unauthorized() {
    let cluster = FakeCluster::start().await.unwrap();
    let api = services(user(&cluster, "dev").await);
    api.list(&ListParams::default()).await.unwrap();
    cluster.expire_token("token-of-dev");
    let status = api_error(api.list(&ListParams::default()).await);
    assert_eq!((status.code, status.reason.as_str()), (401, "Unauthorized"));
    assert_eq!(status.message, "Unauthorized");
}

#[tokio::test]
async fn a_client_certificate_names_its_user() {
    let cluster = FakeCluster::start().await.unwrap();
    let identity = Identity::ClientCertificate {
        name: "carol".to_owned(),
        group: Some("ops".to_owned()),
    };
    let client = client_from(&cluster.kubeconfig_for(&identity).unwrap()).await;
    services(client).list(&ListParams::default()).await.unwrap();
    let calls = cluster.calls();
    assert_eq!(calls.len(), 1);
    assert_eq!(
        (calls[0].user.as_str(), calls[0].verb.as_str()),
        ("carol", "list")
    );
    assert_eq!(
        (calls[0].resource.as_str(), calls[0].namespace.as_deref()),
        ("services", Some("shop"))
    );
}

#[tokio::test]
async fn denials_speak_like_rbac() {
    let cluster = FakeCluster::start().await.unwrap();
    cluster.allow_only("dev", &[Rule::new(&["list"], &["services"]).in_namespace("shop")]);
    let client = user(&cluster, "dev").await;
    let api = services(client.clone());
    api.list(&ListParams::default()).await.unwrap();
    let status = api_error(api.get("web").await);
    assert_eq!((status.code, status.reason.as_str()), (403, "Forbidden"));
    assert_eq!(
        status.message,
        "services \"web\" is forbidden: User \"dev\" cannot get resource \"services\" in API group \"\" in the \
         namespace \"shop\""
    );
    let slices: Api<EndpointSlice> = Api::all(client);
    assert_eq!(
        api_error(slices.list(&ListParams::default()).await).message,
        "endpointslices.discovery.k8s.io is forbidden: User \"dev\" cannot list resource \"endpointslices\" in API \
         group \"discovery.k8s.io\" at the cluster scope"
    );
    cluster.allow_all();
    assert_eq!(api_error(api.get("web").await).code, 404);
}

#[tokio::test]
async fn pods_and_slices_stay_in_step() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = cluster
        .workload("shop", "web")
        .port("", 80, 8080)
        .replicas(2)
        .create()
        .unwrap();
    let client = admin(&cluster).await;
    let slices: Api<EndpointSlice> = Api::namespaced(client, "shop");
    let endpoints = async || {
        let slice = slices.list(&ListParams::default()).await.unwrap().items.remove(0);
        let mut endpoints: Vec<(String, bool)> = slice
            .endpoints
            .into_iter()
            .flatten()
            .map(|e| {
                (
                    e.target_ref.unwrap().name.unwrap(),
                    e.conditions.unwrap().ready.unwrap(),
                )
            })
            .collect();
        endpoints.sort();
        endpoints
    };
    let (first, second) = (workload.pods[0].name.clone(), workload.pods[1].name.clone());

    assert!(cluster.set_ready("shop", &first, false));
    assert!(endpoints().await.contains(&(first.clone(), false)));
    let third = cluster.replace_pod("shop", &first).unwrap();
    let mut expected = vec![(second.clone(), true), (third.clone(), true)];
    expected.sort();
    assert_eq!(endpoints().await, expected);
    assert!(cluster.get("Pod", "shop", &first).is_none());
    assert!(cluster.delete_pod("shop", &second));
    assert_eq!(endpoints().await, [(third, true)]);
}

#[tokio::test]
async fn endpoints_say_of_a_pod_what_the_controller_would() {
    for (publishes, unready, ending) in [
        (false, [false, false, false], [false, true, true]),
        (true, [true, false, false], [true, true, true]),
    ] {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = cluster
            .workload("shop", "web")
            .port("", 80, 8080)
            .spec("publishNotReadyAddresses", publishes)
            .create()
            .unwrap();
        let slices: Api<EndpointSlice> = Api::namespaced(admin(&cluster).await, "shop");
        let conditions = async || {
            let slice = slices.list(&ListParams::default()).await.unwrap().items.remove(0);
            let conditions = slice.endpoints.unwrap().remove(0).conditions.unwrap();
            [conditions.ready, conditions.serving, conditions.terminating].map(Option::unwrap)
        };
        let pod = &workload.pods[0].name;
        assert_eq!(conditions().await, [true, true, false]);
        assert!(cluster.set_ready("shop", pod, false));
        assert_eq!(conditions().await, unready);
        assert!(cluster.set_ready("shop", pod, true));
        assert!(cluster.terminate_pod("shop", pod));
        assert_eq!(conditions().await, ending);
    }
}

#[tokio::test]
async fn an_api_server_that_is_down_drops_connections_until_it_is_back() {
    let cluster = FakeCluster::start().await.unwrap();
    let api = services(admin(&cluster).await);
    cluster.faults().set_api_down(true);
    cluster.restart();
    within(api.list(&ListParams::default())).await.unwrap_err();
    cluster.faults().set_api_down(false);
    within(api.list(&ListParams::default())).await.unwrap();
}

#[tokio::test]
async fn shutdown_leaves_nothing_behind() {
    let cluster = FakeCluster::start().await.unwrap();
    let address = cluster.address();
    let api = services(admin(&cluster).await);
    let events = api.watch(&WatchParams::default(), "0").await.unwrap();
    within(cluster.shutdown()).await;
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    drop(events);
}
