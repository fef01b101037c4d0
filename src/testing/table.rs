//! The `Table` form of objects: the columns `kubectl get` shows.

use serde_json::{Value, json};

use super::resource::Kind;

/// What a row holds of its object besides the cells: kubectl asks for the whole to sort by a field of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Include {
    /// Nothing.
    Nothing,
    /// Its metadata.
    Metadata,
    /// The object.
    Object,
}

/// Renders objects as a `meta.k8s.io/v1` Table.
pub(super) fn of(kind: Kind, objects: &[&Value], version: &str, include: Include) -> Value {
    let columns: Vec<_> = columns(kind)
        .iter()
        .map(|&(name, priority)| {
            let format = if name == "Name" { "name" } else { "" };
            json!({"name": name, "type": "string", "format": format, "description": "", "priority": priority})
        })
        .collect();
    let rows: Vec<_> = objects
        .iter()
        .map(|object| {
            let included = match include {
                Include::Nothing => Value::Null,
                Include::Metadata => json!({
                    "kind": "PartialObjectMetadata",
                    "apiVersion": "meta.k8s.io/v1",
                    "metadata": object["metadata"],
                }),
                Include::Object => Value::clone(object),
            };
            json!({"cells": cells(kind, object), "object": included})
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": columns,
        "rows": rows,
    })
}

/// Names and priorities; priority 1 shows with `-o wide` only.
fn columns(kind: Kind) -> &'static [(&'static str, u8)] {
    match kind {
        Kind::Namespace => &[("Name", 0), ("Status", 0), ("Age", 0)],
        Kind::Service => &[
            ("Name", 0),
            ("Type", 0),
            ("Cluster-IP", 0),
            ("External-IP", 0),
            ("Port(s)", 0),
            ("Age", 0),
            ("Selector", 1),
        ],
        Kind::Pod => &[
            ("Name", 0),
            ("Ready", 0),
            ("Status", 0),
            ("Restarts", 0),
            ("Age", 0),
            ("IP", 1),
            ("Node", 1),
        ],
        Kind::EndpointSlice => &[
            ("Name", 0),
            ("AddressType", 0),
            ("Ports", 0),
            ("Endpoints", 0),
            ("Age", 0),
        ],
    }
}

fn cells(kind: Kind, object: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("<none>").to_owned();
    let name = text(&object["metadata"]["name"]);
    let age = age(&object["metadata"]["creationTimestamp"]);
    match kind {
        Kind::Namespace => vec![name, text(&object["status"]["phase"]), age],
        Kind::Service => {
            let spec = &object["spec"];
            let external = match spec["externalName"].as_str() {
                Some(external) => external.to_owned(),
                None => "<none>".to_owned(),
            };
            let ports = join(&spec["ports"], |port| {
                let protocol = port["protocol"].as_str().unwrap_or("TCP");
                format!("{}/{protocol}", port["port"])
            });
            let kind = spec["type"].as_str().unwrap_or("ClusterIP").to_owned();
            vec![
                name,
                kind,
                text(&spec["clusterIP"]),
                external,
                ports,
                age,
                selector(&spec["selector"]),
            ]
        }
        Kind::Pod => {
            let statuses = object["status"]["containerStatuses"]
                .as_array()
                .map_or(&[][..], Vec::as_slice);
            let ready = statuses.iter().filter(|status| status["ready"] == true).count();
            let phase = if object["metadata"]["deletionTimestamp"].is_string() {
                "Terminating".to_owned()
            } else {
                text(&object["status"]["phase"])
            };
            let restarts: u64 = statuses
                .iter()
                .filter_map(|status| status["restartCount"].as_u64())
                .sum();
            vec![
                name,
                format!("{ready}/{}", statuses.len()),
                phase,
                restarts.to_string(),
                age,
                text(&object["status"]["podIP"]),
                text(&object["spec"]["nodeName"]),
            ]
        }
        Kind::EndpointSlice => {
            let ports = join(&object["ports"], |port| port["port"].to_string());
            let endpoints = join(&object["endpoints"], |endpoint| {
                endpoint["addresses"][0].as_str().unwrap_or_default().to_owned()
            });
            vec![name, text(&object["addressType"]), ports, endpoints, age]
        }
    }
}

fn join(list: &Value, show: impl Fn(&Value) -> String) -> String {
    match list.as_array() {
        Some(items) if !items.is_empty() => items.iter().map(show).collect::<Vec<_>>().join(","),
        _ => "<none>".to_owned(),
    }
}

fn selector(labels: &Value) -> String {
    let Some(labels) = labels.as_object().filter(|labels| !labels.is_empty()) else {
        return "<none>".to_owned();
    };
    let pairs: Vec<_> = labels
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    pairs.join(",")
}

fn age(created: &Value) -> String {
    let Some(created) = created
        .as_str()
        .and_then(|text| text.parse::<jiff::Timestamp>().ok())
    else {
        return "<unknown>".to_owned();
    };
    let seconds = jiff::Timestamp::now()
        .as_second()
        .saturating_sub(created.as_second())
        .max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
