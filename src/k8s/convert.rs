//! Kubernetes objects to the registry's types: the only place that reads them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    ObjectReference, Pod, PodStatus, Service as KubeService, ServicePort as KubePort, ServiceSpec,
};
use k8s_openapi::api::discovery::v1::{Endpoint as KubeEndpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::k8s::itself::is_itself;
use crate::name::{PortRef, ServiceName, is_label};
use crate::registry::{Endpoint, Load, PodRef, Protocol, Service, ServiceKind, ServicePort};

/// The loads of the endpoints known so far, so that an update of an endpoint keeps its count.
pub(super) type Loads = HashMap<PodRef, Arc<Load>>;

/// Converts a Service object. Its name is the one it was asked for by.
pub(super) fn service(name: ServiceName, object: &KubeService) -> Service {
    let spec = object.spec.clone().unwrap_or_default();
    let affinity = affinity(&spec);
    let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
        (Some("ExternalName"), _) => ServiceKind::ExternalName(spec.external_name.unwrap_or_default()),
        (_, Some("None")) => ServiceKind::Headless,
        _ => ServiceKind::Virtual,
    };
    Service {
        name,
        kind,
        affinity,
        ports: spec
            .ports
            .unwrap_or_default()
            .iter()
            .filter_map(service_port)
            .collect(),
        has_selector: spec.selector.is_some_and(|selector| !selector.is_empty()),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
    }
}

/// How long a client sticks to an endpoint; the default is that of the API (core/v1 ClientIPConfig: three hours).
fn affinity(spec: &ServiceSpec) -> Option<Duration> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let config = spec.session_affinity_config.as_ref();
    let seconds = config.and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Some(Duration::from_secs(seconds.unwrap_or(10_800)))
}

fn service_port(port: &KubePort) -> Option<ServicePort> {
    let number = u16::try_from(port.port).ok()?;
    Some(ServicePort {
        name: port.name.clone().unwrap_or_default(),
        number,
        protocol: match port.protocol.as_deref() {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        },
        app_protocol: port.app_protocol.clone(),
        target: match &port.target_port {
            Some(IntOrString::String(name)) => PortRef::Name(name.clone()),
            // "0" and an absent value both mean the Service port's own number (core/v1 ServicePort).
            Some(IntOrString::Int(target)) => {
                PortRef::Number(u16::try_from(*target).ok().filter(|n| *n > 0).unwrap_or(number))
            }
            None => PortRef::Number(number),
        },
    })
}

/// Returns the Service's selector in the syntax of a label selector, if it has one.
pub(super) fn selector(object: &KubeService) -> Option<String> {
    let selector = object
        .spec
        .as_ref()?
        .selector
        .as_ref()
        .filter(|selector| !selector.is_empty())?;
    Some(
        selector
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(","),
    )
}

/// Converts the EndpointSlices of one Service. A pod with addresses of both families stands in two slices and is one
/// endpoint here; endpoints without a pod cannot be forwarded to and are left out.
pub(super) fn endpoints_from_slices(slices: &[EndpointSlice], loads: &mut Loads) -> Vec<Arc<Endpoint>> {
    let mut found: BTreeMap<PodRef, Endpoint> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type != "FQDN") {
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        let ports = slice_ports(slice.ports.as_deref().unwrap_or_default());
        for endpoint in slice.endpoints.iter().flatten() {
            if let Some(endpoint) = slice_endpoint(namespace, endpoint, &ports) {
                match found.entry(endpoint.pod.clone()) {
                    Entry::Vacant(entry) => drop(entry.insert(endpoint)),
                    Entry::Occupied(mut entry) => merge(entry.get_mut(), endpoint),
                }
            }
        }
    }
    keep_loads(found, loads)
}

/// Lists the addresses of endpoints that no pod is behind, as they are written: the API server's own Service has such, and
/// Services whose EndpointSlices somebody writes by hand.
pub(super) fn podless(slices: &[EndpointSlice]) -> Vec<Arc<str>> {
    let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    let podless = endpoints.filter(|endpoint| pod_of(endpoint).is_none());
    let found: BTreeSet<Arc<str>> = podless
        .flat_map(|endpoint| endpoint.addresses.iter().map(|address| address.as_str().into()))
        .collect();
    found.into_iter().collect()
}

/// The pod behind an endpoint, if there is one.
fn pod_of(endpoint: &KubeEndpoint) -> Option<&ObjectReference> {
    let target = endpoint.target_ref.as_ref()?;
    Some(target).filter(|target| target.kind.as_deref() == Some("Pod"))
}

/// Joins what two slices say of one pod. The EndpointSlice API allows an endpoint in several slices while it moves; the ready
/// one is the newer.
fn merge(known: &mut Endpoint, mut other: Endpoint) {
    if !known.ready {
        std::mem::swap(known, &mut other);
    }
    known.addresses.extend(other.addresses);
    known.addresses.sort_unstable();
    known.addresses.dedup();
    if other.ready {
        // Subsets of Endpoints, and slices written by hand, may divide the ports of one pod among them.
        for (name, port) in other.ports {
            known.ports.entry(name).or_insert(port);
        }
    }
}

fn slice_ports(ports: &[EndpointPort]) -> BTreeMap<String, u16> {
    let tcp = ports
        .iter()
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
    tcp.filter_map(|port| {
        Some((
            port.name.clone().unwrap_or_default(),
            u16::try_from(port.port?).ok()?,
        ))
    })
    .collect()
}

fn slice_endpoint(
    namespace: &str,
    endpoint: &KubeEndpoint,
    ports: &BTreeMap<String, u16>,
) -> Option<Endpoint> {
    let target = pod_of(endpoint)?;
    let name = target.name.as_deref().filter(|name| is_subdomain(name))?;
    // Nobody checks what an EndpointSlice refers to. Who may write one must not send our user, who may have more rights, to
    // pods elsewhere, or to anything but a pod (CVE-2021-25740).
    if target
        .namespace
        .as_deref()
        .is_some_and(|other| other != namespace)
    {
        return None;
    }
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let pod = PodRef {
        namespace: namespace.into(),
        name: name.into(),
        uid: target.uid.as_deref().unwrap_or_default().into(),
    };
    Some(Endpoint {
        is_itself: is_itself(&pod),
        pod,
        addresses: endpoint
            .addresses
            .iter()
            .filter_map(|address| address.parse().ok())
            .collect(),
        hostname: endpoint.hostname.as_deref().map(Arc::from),
        // An absent condition means true for `ready` and false for `terminating` (discovery/v1 EndpointConditions).
        ready: conditions.ready.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        ports: ports.clone(),
        load: Arc::default(),
    })
}

/// Tells whether this may be a pod's name: a DNS subdomain (apimachinery: `IsDNS1123Subdomain`).
fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Converts the pods that a Service selects, for users who may not read EndpointSlices: does what the EndpointSlice
/// controller would.
pub(super) fn endpoints_from_pods(service: &Service, pods: &[Pod], loads: &mut Loads) -> Vec<Arc<Endpoint>> {
    let found = pods
        .iter()
        .filter_map(|pod| pod_endpoint(service, pod))
        .map(|endpoint| (endpoint.pod.clone(), endpoint));
    keep_loads(found.collect(), loads)
}

fn pod_endpoint(service: &Service, pod: &Pod) -> Option<Endpoint> {
    let status = pod.status.as_ref()?;
    // Pods that have ended, or were not given an address yet, are no endpoints.
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if ended || status.pod_ip.as_deref().unwrap_or_default().is_empty() {
        return None;
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let hostname = spec.and_then(|spec| {
        spec.hostname
            .as_deref()
            .filter(|_| spec.subdomain.as_deref() == Some(service.name.name()))
    });
    let meta = &pod.metadata;
    let reference = PodRef {
        namespace: (meta.namespace.as_deref())
            .unwrap_or(service.name.namespace())
            .into(),
        name: meta.name.as_deref()?.into(),
        uid: meta.uid.as_deref().unwrap_or_default().into(),
    };
    Some(Endpoint {
        is_itself: is_itself(&reference),
        pod: reference,
        addresses: pod_addresses(status),
        hostname: hostname.map(Arc::from),
        ready: conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        ports: service
            .ports
            .iter()
            .filter_map(|port| Some((port.name.clone(), pod_port(port, pod)?)))
            .collect(),
        load: Arc::default(),
    })
}

/// Returns a pod's addresses; a cluster with one family of them may leave the list out.
fn pod_addresses(status: &PodStatus) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().flatten().map(|address| &address.ip);
    let mut addresses: Vec<IpAddr> = listed
        .chain(&status.pod_ip)
        .filter_map(|address| address.parse().ok())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Finds the number of a Service port's target in one pod; a named target may differ from pod to pod.
fn pod_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    let name = match &port.target {
        _ if port.protocol != Protocol::Tcp => return None,
        PortRef::Number(number) => return Some(*number),
        PortRef::Name(name) => name,
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let found = ports.find(|port| {
        port.name.as_deref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == "TCP"
    })?;
    u16::try_from(found.container_port).ok()
}

/// Gives each endpoint the load it had before, and forgets those of endpoints that are gone.
fn keep_loads(found: BTreeMap<PodRef, Endpoint>, loads: &mut Loads) -> Vec<Arc<Endpoint>> {
    let before = std::mem::take(loads);
    let endpoints = found.into_values().map(|mut endpoint| {
        if let Some(load) = before.get(&endpoint.pod) {
            endpoint.load = load.clone();
        }
        loads.insert(endpoint.pod.clone(), endpoint.load.clone());
        Arc::new(endpoint)
    });
    endpoints.collect()
}

#[cfg(test)]
mod tests;
