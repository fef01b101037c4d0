//! Workloads: a Service, its Pods and its EndpointSlice, kept in step as a real cluster's controllers do.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::cluster::{Cluster, lock};
use super::resource::Kind;
use super::store::{Key, new_uid, now};

/// Marks a pod and its endpoints ready or not; false when there is no such pod.
pub(super) fn set_ready(cluster: &Cluster, namespace: &str, pod: &str, ready: bool) -> bool {
    let found = cluster
        .store
        .update(&Key::new(Kind::Pod, namespace, pod), |object| {
            write_readiness(object, ready);
        });
    describe_endpoints(cluster, namespace, pod);
    found
}

/// Starts the graceful end of a pod: terminating, still serving, and no longer ready unless its Service wants such pods.
pub(super) fn terminate(cluster: &Cluster, namespace: &str, pod: &str) -> bool {
    let found = cluster
        .store
        .update(&Key::new(Kind::Pod, namespace, pod), |object| {
            object["metadata"]["deletionTimestamp"] = now().into();
            object["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        });
    describe_endpoints(cluster, namespace, pod);
    found
}

/// Removes a pod, its endpoints and its routes; false when there is no such pod. What is forwarded to it ends soon after.
pub(super) fn delete(cluster: &Cluster, namespace: &str, pod: &str) -> bool {
    change_endpoints(cluster, namespace, pod, |_, _| false);
    lock(&cluster.routes).retain(|(ns, name, _), _| (ns.as_str(), name.as_str()) != (namespace, pod));
    cluster
        .store
        .delete(&Key::new(Kind::Pod, namespace, pod))
        .is_some()
}

/// Puts a new pod into the place of `old`, as a rollout does: new name, uid and address, routes of the old pod. The
/// new pod is ready before the old one goes. Returns the new name.
pub(super) fn replace(cluster: &Cluster, namespace: &str, old: &str) -> Option<String> {
    let before = cluster.store.get(&Key::new(Kind::Pod, namespace, old))?;
    let base = old.rsplit_once('-').map_or(old, |(base, _)| base);
    let name = format!("{base}-{}", suffix(5));
    let (uid, ip) = (new_uid(), new_pod_ip());

    let mut pod = Value::clone(&before);
    let meta =
        json!({"name": name, "namespace": namespace, "labels": before["metadata"]["labels"], "uid": uid});
    pod["metadata"] = meta;
    set_pod_ip(&mut pod, &ip);
    write_readiness(&mut pod, true);
    {
        let mut routes = lock(&cluster.routes);
        let copied: Vec<(u16, SocketAddr)> = routes
            .iter()
            .filter(|((ns, pod, _), _)| (ns.as_str(), pod.as_str()) == (namespace, old))
            .map(|((_, _, port), address)| (*port, *address))
            .collect();
        for (port, address) in copied {
            routes.insert((namespace.to_owned(), name.clone(), port), address);
        }
    }
    cluster.store.apply(pod).ok()?;
    for slice in slices_of(cluster, namespace, old) {
        cluster.store.update(&slice, |slice| {
            let Some(endpoints) = slice["endpoints"].as_array_mut() else {
                return;
            };
            let Some(mut new) = endpoints.iter().find(|endpoint| leads_to(endpoint, old)).cloned() else {
                return;
            };
            new["addresses"] = json!([ip]);
            new["conditions"] = json!({"ready": true, "serving": true, "terminating": false});
            new["targetRef"]["name"] = name.as_str().into();
            new["targetRef"]["uid"] = uid.as_str().into();
            endpoints.push(new);
        });
    }
    delete(cluster, namespace, old);
    Some(name)
}

/// A random pod name or slice name ending, from the alphabet of `apimachinery:pkg/util/rand/rand.go`.
pub(super) fn suffix(length: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..length)
        .map(|_| char::from(ALPHABET[fastrand::usize(..ALPHABET.len())]))
        .collect()
}

/// An address of the pod network.
pub(super) fn new_pod_ip() -> String {
    format!("10.244.{}.{}", fastrand::u8(..), fastrand::u8(2..255))
}

/// Writes a pod's address into its status.
pub(super) fn set_pod_ip(pod: &mut Value, ip: &str) {
    pod["status"]["podIP"] = ip.into();
    pod["status"]["podIPs"] = json!([{"ip": ip}]);
}

fn slices_of(cluster: &Cluster, namespace: &str, pod: &str) -> Vec<Key> {
    let (slices, _) = cluster.store.list(Kind::EndpointSlice, Some(namespace));
    let holds = |slice: &&Arc<Value>| {
        slice["endpoints"]
            .as_array()
            .is_some_and(|endpoints| endpoints.iter().any(|e| leads_to(e, pod)))
    };
    slices
        .iter()
        .filter(holds)
        .filter_map(|slice| slice["metadata"]["name"].as_str())
        .map(|name| Key::new(Kind::EndpointSlice, namespace, name))
        .collect()
}

/// Writes a pod's state into its endpoints as the EndpointSlice controller does
/// (`kubernetes:staging/src/k8s.io/endpointslice/utils.go`, podToEndpoint).
fn describe_endpoints(cluster: &Cluster, namespace: &str, name: &str) {
    let Some(pod) = cluster.store.get(&Key::new(Kind::Pod, namespace, name)) else {
        return;
    };
    let serving = is_ready(&pod);
    let terminating = !pod["metadata"]["deletionTimestamp"].is_null();
    change_endpoints(cluster, namespace, name, |endpoint, publishes_unready| {
        let ready = publishes_unready || serving && !terminating;
        endpoint["conditions"] = json!({"ready": ready, "serving": serving, "terminating": terminating});
        true
    });
}

/// Changes every endpoint of a pod; endpoints for which `change` returns false are removed. It is told whether the Service
/// of the endpoint publishes pods that are not ready.
fn change_endpoints(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    change: impl Fn(&mut Value, bool) -> bool,
) {
    for slice in slices_of(cluster, namespace, pod) {
        let publishes_unready = publishes_unready(cluster, &slice);
        cluster.store.update(&slice, |slice| {
            if let Some(endpoints) = slice["endpoints"].as_array_mut() {
                endpoints
                    .retain_mut(|endpoint| !leads_to(endpoint, pod) || change(endpoint, publishes_unready));
            }
        });
    }
}

/// Whether the Service of a slice publishes pods that are not ready.
fn publishes_unready(cluster: &Cluster, slice: &Key) -> bool {
    let service = cluster.store.get(slice).and_then(|object| {
        let name = object["metadata"]["labels"]["kubernetes.io/service-name"].as_str()?;
        cluster
            .store
            .get(&Key::new(Kind::Service, &slice.namespace, name))
    });
    service.is_some_and(|service| service["spec"]["publishNotReadyAddresses"] == true)
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn write_readiness(pod: &mut Value, ready: bool) {
    let status = if ready { "True" } else { "False" };
    for condition in each(&mut pod["status"]["conditions"]) {
        if matches!(condition["type"].as_str(), Some("Ready" | "ContainersReady")) {
            condition["status"] = status.into();
        }
    }
    for container in each(&mut pod["status"]["containerStatuses"]) {
        container["ready"] = ready.into();
    }
}

fn leads_to(endpoint: &Value, pod: &str) -> bool {
    endpoint["targetRef"]["kind"] == "Pod" && endpoint["targetRef"]["name"] == pod
}

fn each(list: &mut Value) -> impl Iterator<Item = &mut Value> {
    list.as_array_mut().into_iter().flatten()
}
