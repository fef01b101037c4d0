//! The discovery documents kubectl reads before anything else.

use serde_json::{Value, json};

use super::resource::Kind;

/// Answers a discovery or version path; `None` when it is not one.
pub(super) fn answer(path: &str) -> Option<Value> {
    Some(match path.trim_end_matches('/') {
        "/version" => json!({
            "major": "1",
            "minor": "33",
            "gitVersion": "v1.33.0+kube-tunnel-testing",
            "gitCommit": "0000000000000000000000000000000000000000",
            "gitTreeState": "clean",
            "buildDate": "2025-04-23T00:00:00Z",
            "goVersion": "none",
            "compiler": "rustc",
            "platform": "linux/amd64",
        }),
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [group("discovery.k8s.io"), group("authorization.k8s.io")],
        }),
        "/apis/discovery.k8s.io" => group("discovery.k8s.io"),
        "/apis/authorization.k8s.io" => group("authorization.k8s.io"),
        "/api/v1" => {
            let mut resources: Vec<_> = [Kind::Namespace, Kind::Pod, Kind::Service]
                .into_iter()
                .map(resource)
                .collect();
            resources.push(json!({
                "name": "pods/portforward",
                "singularName": "",
                "namespaced": true,
                "kind": "PodPortForwardOptions",
                "verbs": ["create", "get"],
            }));
            resource_list("v1", &resources)
        }
        "/apis/discovery.k8s.io/v1" => resource_list("discovery.k8s.io/v1", &[resource(Kind::EndpointSlice)]),
        "/apis/authorization.k8s.io/v1" => resource_list(
            "authorization.k8s.io/v1",
            &[json!({
                "name": "selfsubjectaccessreviews",
                "singularName": "selfsubjectaccessreview",
                "namespaced": false,
                "kind": "SelfSubjectAccessReview",
                "verbs": ["create"],
            })],
        ),
        _ => return None,
    })
}

fn group(name: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
    json!({
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": name,
        "versions": [version],
        "preferredVersion": version,
    })
}

fn resource_list(version: &str, resources: &[Value]) -> Value {
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources})
}

fn resource(kind: Kind) -> Value {
    let short: &[&str] = match kind {
        Kind::Namespace => &["ns"],
        Kind::Service => &["svc"],
        Kind::Pod => &["po"],
        Kind::EndpointSlice => &[],
    };
    let categories: &[&str] = match kind {
        Kind::Service | Kind::Pod => &["all"],
        Kind::Namespace | Kind::EndpointSlice => &[],
    };
    json!({
        "name": kind.plural(),
        "singularName": kind.name().to_lowercase(),
        "namespaced": kind.namespaced(),
        "kind": kind.name(),
        "verbs": ["get", "list", "watch"],
        "shortNames": short,
        "categories": categories,
    })
}
