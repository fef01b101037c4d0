//! The page `/services`: the Services in use, where their requests go, and what is open there. `docs/own-pages.md` documents
//! the fields, which programs read.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::proxy::Context;
use crate::proxy::upstream::Open;
use crate::registry::{Endpoint, Known, LookupErrorKind, Protocol, ServiceKind, ServicePort, View};
use crate::transport::Target;

/// Lists the Services that somebody asked for, by namespace and name.
pub(super) fn list(context: &Context) -> Value {
    let (now, open) = (Timestamp::now(), context.upstream.open());
    let services = context.registry.known();
    let services: Vec<Value> = services
        .iter()
        .map(|known| service(context, known, now, &open))
        .collect();
    json!({ "services": services })
}

fn service(context: &Context, known: &Known, now: Timestamp, open: &[Open]) -> Value {
    let name = &known.service;
    let last_used = SignedDuration::try_from(known.idle)
        .ok()
        .and_then(|idle| now.checked_sub(idle).ok())
        .unwrap_or(now);
    let mut object = json!({
        "name": name.name(),
        "namespace": name.namespace(),
        "host": name.dns_name(&context.naming.zone),
        "last_used": format!("{last_used:.3}"),
        "state": "looking-up",
        "type": null,
        "external_name": null,
        "ports": [],
        "endpoints": [],
        "addresses_without_pod": [],
        "error": null,
    });
    match &known.answer {
        None => {}
        Some(Err(error)) => {
            object["state"] = "error".into();
            object["error"] = json!({"kind": kind(error.kind), "message": error.message});
        }
        Some(Ok(view)) => {
            let ready = view.endpoints.iter().any(|endpoint| view.serves(endpoint));
            let external = match &view.service.kind {
                ServiceKind::ExternalName(name) => Some(name.as_str()),
                _ => None,
            };
            object["state"] = if ready || external.is_some() {
                "ready"
            } else {
                "no-ready-endpoint"
            }
            .into();
            object["type"] = match view.service.kind {
                ServiceKind::Virtual => "virtual",
                ServiceKind::Headless => "headless",
                ServiceKind::ExternalName(_) => "external-name",
            }
            .into();
            object["external_name"] = external.into();
            object["ports"] = view.service.ports.iter().map(port).collect();
            let endpoints = view.endpoints.iter();
            object["addresses_without_pod"] = view.podless.iter().map(|address| &**address).collect();
            object["endpoints"] = endpoints
                .map(|endpoint| self::endpoint(view, endpoint, open))
                .collect();
        }
    }
    object
}

fn port(port: &ServicePort) -> Value {
    json!({
        "name": port.name,
        "port": port.number,
        "protocol": match port.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        },
        "app_protocol": port.app_protocol,
        "target_port": port.target.to_string(),
    })
}

fn endpoint(view: &View, endpoint: &Endpoint, open: &[Open]) -> Value {
    let ports = endpoint.ports.iter().map(|(name, number)| {
        let target = Target {
            pod: endpoint.pod.clone(),
            port: *number,
        };
        let open = open.iter().find(|open| open.target == target);
        json!({
            "name": name,
            "port": number,
            "backend_protocol": open.and_then(|open| open.spoken).map(|wire| wire.as_str()),
            "connections": open.map_or(0, |open| open.connections),
        })
    });
    json!({
        "pod": &*endpoint.pod.name,
        "namespace": &*endpoint.pod.namespace,
        "addresses": endpoint.addresses,
        "ready": endpoint.ready,
        "terminating": endpoint.terminating,
        "serving": view.serves(endpoint),
        "requests_in_flight": endpoint.load.get(),
        "ports": ports.collect::<Vec<_>>(),
    })
}

/// Names what kept a lookup from an answer.
fn kind(kind: LookupErrorKind) -> &'static str {
    match kind {
        LookupErrorKind::NotFound => "not-found",
        LookupErrorKind::Forbidden => "forbidden",
        LookupErrorKind::Unauthorized => "unauthorized",
        LookupErrorKind::Unavailable => "unavailable",
        LookupErrorKind::Timeout => "timeout",
    }
}
