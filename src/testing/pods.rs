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
            let status = if ready { "True" } else { "False" };
            for condition in each(&mut object["status"]["conditions"]) {
                if matches!(condition["type"].as_str(), Some("Ready" | "ContainersReady")) {
                    condition["status"] = status.into();
                }
            }
            for container in each(&mut object["status"]["containerStatuses"]) {
                container["ready"] = ready.into();
            }
        });
    change_endpoints(cluster, namespace, pod, |endpoint| {
        endpoint["conditions"]["ready"] = ready.into();
        endpoint["conditions"]["serving"] = ready.into();
        true
    });
    found
}

/// Starts the graceful end of a pod: not ready, terminating, still serving.
pub(super) fn terminate(cluster: &Cluster, namespace: &str, pod: &str) -> bool {
    change_endpoints(cluster, namespace, pod, |endpoint| {
        endpoint["conditions"]["ready"] = false.into();
        endpoint["conditions"]["terminating"] = true.into();
        true
    });
    cluster
        .store
        .update(&Key::new(Kind::Pod, namespace, pod), |object| {
            object["metadata"]["deletionTimestamp"] = now().into();
            object["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        })
}

/// Removes a pod, its endpoints and its routes; false when there is no such pod.
pub(super) fn delete(cluster: &Cluster, namespace: &str, pod: &str) -> bool {
    change_endpoints(cluster, namespace, pod, |_| false);
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

/// Changes every endpoint of a pod; endpoints for which `change` returns false are removed.
fn change_endpoints(cluster: &Cluster, namespace: &str, pod: &str, change: impl Fn(&mut Value) -> bool) {
    for slice in slices_of(cluster, namespace, pod) {
        cluster.store.update(&slice, |slice| {
            if let Some(endpoints) = slice["endpoints"].as_array_mut() {
                endpoints.retain_mut(|endpoint| !leads_to(endpoint, pod) || change(endpoint));
            }
        });
    }
}

fn leads_to(endpoint: &Value, pod: &str) -> bool {
    endpoint["targetRef"]["kind"] == "Pod" && endpoint["targetRef"]["name"] == pod
}

fn each(list: &mut Value) -> impl Iterator<Item = &mut Value> {
    list.as_array_mut().into_iter().flatten()
}
