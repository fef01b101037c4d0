//! Which endpoints a request may go to: a pure function of the Service, the port that was asked for and the client's protocol.

use std::sync::Arc;
use std::time::Duration;

use crate::proxy::error::Error;
use crate::registry::{Endpoint, Protocol, ServiceKind, ServicePort, View};

/// The pods' port of a Service that declares none: documented last resort of the seed.
const PORT_OF_LAST_RESORT: u16 = 8080;

/// The port that `https` URLs mean.
const HTTPS: u16 = 443;

/// Where a request may go.
#[derive(Debug)]
pub(crate) struct Route {
    /// The endpoints that may get it, each with the port to connect to; never empty.
    pub(crate) candidates: Vec<(Arc<Endpoint>, u16)>,
    /// What the port says about its protocol.
    pub(crate) hint: Hint,
    /// For how long a client stays with an endpoint after its last request, if it does.
    pub(crate) affinity: Option<Duration>,
}

/// What a Service port declares about the protocol behind it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    /// HTTP/2 without asking.
    pub(crate) http2: bool,
    /// TLS, which the proxy then speaks to the pod.
    pub(crate) tls: bool,
}

/// Finds the candidates of a request to `port` of the Service, or to the endpoint named `hostname`.
///
/// # Errors
/// [`Error::NoSuchPort`], [`Error::NoEndpoint`], [`Error::NoPod`] or [`Error::ExternalName`].
pub(crate) fn route(view: &View, port: u16, hostname: Option<&str>) -> Result<Route, Error> {
    let service = &view.service;
    if let ServiceKind::ExternalName(name) = &service.kind {
        return Err(Error::ExternalName(service.name.clone(), name.clone()));
    }
    let port = choose_port(view, port)?;
    let number = |endpoint: &Endpoint| match port {
        Some(port) => endpoint.ports.get(&port.name).copied(),
        None => Some(PORT_OF_LAST_RESORT),
    };
    let named = |endpoint: &Endpoint| hostname.is_none() || endpoint.hostname.as_deref() == hostname;
    let candidates: Vec<_> = view
        .endpoints
        .iter()
        .filter(|endpoint| view.serves(endpoint) && named(endpoint))
        .filter_map(|endpoint| Some((endpoint.clone(), number(endpoint)?)))
        .collect();
    if view.endpoints.is_empty() && !view.podless.is_empty() {
        return Err(Error::NoPod {
            service: service.name.clone(),
            addresses: some(&view.podless),
        });
    }
    if candidates.is_empty() {
        return Err(Error::NoEndpoint {
            service: service.name.clone(),
            detail: missing(view, hostname),
        });
    }
    // As in the cluster: whoever asks for a pod by name has chosen, and a headless Service has nobody to choose for them.
    let sticks = service.kind == ServiceKind::Virtual && hostname.is_none();
    Ok(Route {
        candidates,
        affinity: service.affinity.filter(|_| sticks),
        hint: port.map_or_else(Hint::default, hint),
    })
}

/// A Service with one TCP port serves it whatever the number; otherwise the number must be one of its own.
fn choose_port(view: &View, wanted: u16) -> Result<Option<&ServicePort>, Error> {
    let ports = &view.service.ports;
    if ports.is_empty() {
        return Ok(None);
    }
    let mut tcp = ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    if let Some(port) = tcp.clone().find(|port| port.number == wanted) {
        return Ok(Some(port));
    }
    match (tcp.next(), tcp.next()) {
        (Some(only), None) if ports.len() == 1 => Ok(Some(only)),
        _ => Err(Error::NoSuchPort {
            service: view.service.name.clone(),
            port: wanted,
            known: list(ports),
        }),
    }
}

fn list(ports: &[ServicePort]) -> String {
    let words = ports.iter().map(|port| {
        let name = if port.name.is_empty() {
            String::new()
        } else {
            format!(" ({})", port.name)
        };
        match port.protocol {
            Protocol::Tcp => format!("{}{name}", port.number),
            Protocol::Udp => format!("{}/UDP{name}, which a port-forward cannot carry", port.number),
            Protocol::Sctp => format!("{}/SCTP{name}, which a port-forward cannot carry", port.number),
        }
    });
    words.collect::<Vec<_>>().join(", ")
}

/// Words a list that may be long.
fn some(list: &[Arc<str>]) -> String {
    const SHOWN: usize = 3;
    let shown = list.iter().take(SHOWN).map(|item| &**item).collect::<Vec<_>>();
    let more = if list.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// Reads `appProtocol` (KEP-3726 and the values that meshes use) and else the port's name, by the usual prefixes. Port 443
/// means TLS unless one of them says otherwise.
fn hint(port: &ServicePort) -> Hint {
    let word = match &port.app_protocol {
        Some(protocol) => protocol,
        None => port.name.split('-').next().unwrap_or_default(),
    };
    let is = |words: &[&str]| words.iter().any(|known| word.eq_ignore_ascii_case(known));
    let (http2, tls) = if is(&["kubernetes.io/h2c", "h2c", "http2", "grpc"]) {
        (true, false)
    } else if is(&["https", "kubernetes.io/wss", "wss", "tls"]) {
        (false, true)
    } else if is(&["h2", "grpcs"]) {
        (true, true)
    } else if is(&["http", "kubernetes.io/ws", "ws"]) {
        (false, false)
    } else {
        (false, port.number == HTTPS)
    };
    Hint { http2, tls }
}

fn missing(view: &View, hostname: Option<&str>) -> String {
    let total = view.endpoints.len();
    let terminating = view
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.terminating)
        .count();
    match (total, hostname) {
        (0, _) if !view.service.has_selector => "it has no selector, and no pods were assigned to it".into(),
        (0, _) => "its selector matches no pod".into(),
        (_, Some(hostname)) => format!("none is called {hostname:?} and ready"),
        _ => format!(
            "{total} found, {terminating} of them terminating, the others not ready or without that port"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{PortRef, ServiceName};
    use crate::registry::{PodRef, Service};

    fn port(name: &str, number: u16, protocol: Protocol) -> ServicePort {
        ServicePort {
            name: name.into(),
            number,
            protocol,
            app_protocol: None,
            target: PortRef::Number(number),
        }
    }

    fn endpoint(name: &str, ports: &[(&str, u16)]) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            pod: PodRef {
                namespace: "default".into(),
                name: name.into(),
                uid: name.into(),
            },
            addresses: Vec::new(),
            hostname: Some(name.into()),
            ready: true,
            terminating: false,
            ports: ports
                .iter()
                .map(|(name, number)| ((*name).to_owned(), *number))
                .collect(),
            is_itself: false,
            load: Arc::default(),
        })
    }

    fn view(ports: Vec<ServicePort>, endpoints: Vec<Arc<Endpoint>>) -> View {
        let service = Service {
            name: ServiceName::new("default", "web").unwrap(),
            kind: ServiceKind::Virtual,
            ports,
            has_selector: true,
            publish_not_ready: false,
            affinity: None,
        };
        View {
            service,
            endpoints,
            podless: vec![],
            served: false,
        }
    }

    fn chosen(route: &Route) -> Vec<(&str, u16)> {
        route
            .candidates
            .iter()
            .map(|(endpoint, port)| (&*endpoint.pod.name, *port))
            .collect()
    }

    #[test]
    fn a_service_with_one_port_serves_it_whatever_the_number() {
        let view = view(
            vec![port("http", 80, Protocol::Tcp)],
            vec![endpoint("a", &[("http", 8080)])],
        );
        for asked in [80, 8080, 9999] {
            assert_eq!(chosen(&route(&view, asked, None).unwrap()), [("a", 8080)]);
        }
    }

    #[test]
    fn several_ports_need_the_exact_number_and_the_error_lists_them() {
        let ports = vec![
            port("http", 80, Protocol::Tcp),
            port("admin", 9090, Protocol::Tcp),
            port("dns", 53, Protocol::Udp),
        ];
        let view = view(ports, vec![endpoint("a", &[("http", 8080), ("admin", 9091)])]);
        assert_eq!(chosen(&route(&view, 80, None).unwrap()), [("a", 8080)]);
        assert_eq!(chosen(&route(&view, 9090, None).unwrap()), [("a", 9091)]);
        let error = route(&view, 8080, None).unwrap_err().to_string();
        assert!(error.contains("80 (http), 9090 (admin), 53/UDP (dns)"), "{error}");
        assert!(matches!(route(&view, 53, None), Err(Error::NoSuchPort { .. })));
    }

    #[test]
    fn a_named_target_is_taken_from_each_pod() {
        let endpoints = vec![
            endpoint("old", &[("http", 8080)]),
            endpoint("new", &[("http", 8081)]),
        ];
        let view = view(vec![port("http", 80, Protocol::Tcp)], endpoints);
        assert_eq!(
            chosen(&route(&view, 80, None).unwrap()),
            [("old", 8080), ("new", 8081)]
        );
    }

    #[test]
    fn unready_and_terminating_pods_get_nothing() {
        let mut unready = (*endpoint("unready", &[("http", 1)])).clone();
        unready.ready = false;
        let mut leaving = (*endpoint("leaving", &[("http", 1)])).clone();
        leaving.terminating = true;
        let mut view = view(
            vec![port("http", 80, Protocol::Tcp)],
            vec![Arc::new(unready), Arc::new(leaving)],
        );
        let error = route(&view, 80, None).unwrap_err();
        assert_eq!(error.reply().status, 503);
        view.service.publish_not_ready = true;
        assert_eq!(chosen(&route(&view, 80, None).unwrap()), [("unready", 1)]);
    }

    #[test]
    fn a_host_name_picks_that_endpoint() {
        let endpoints = vec![endpoint("db-0", &[("", 5432)]), endpoint("db-1", &[("", 5432)])];
        let view = view(vec![port("", 5432, Protocol::Tcp)], endpoints);
        assert_eq!(chosen(&route(&view, 80, Some("db-1")).unwrap()), [("db-1", 5432)]);
        assert!(route(&view, 80, Some("db-7")).is_err());
    }

    #[test]
    fn a_service_without_ports_is_tried_on_8080() {
        let view = view(vec![], vec![endpoint("a", &[])]);
        assert_eq!(chosen(&route(&view, 80, None).unwrap()), [("a", 8080)]);
    }

    #[test]
    fn an_external_name_is_refused_with_its_target() {
        let mut view = view(vec![], vec![]);
        view.service.kind = ServiceKind::ExternalName("example.org".into());
        assert!(
            route(&view, 80, None)
                .unwrap_err()
                .to_string()
                .contains("example.org")
        );
    }

    #[test]
    fn addresses_without_a_pod_are_refused_and_pods_beside_them_are_used() {
        let mut view = view(vec![], vec![]);
        view.podless = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"]
            .map(Arc::from)
            .into();
        let error = route(&view, 80, None).unwrap_err();
        assert!(
            error.to_string().contains("(192.0.2.1, 192.0.2.2, 192.0.2.3, …)"),
            "{error}"
        );
        view.endpoints.push(endpoint("a", &[]));
        assert_eq!(chosen(&route(&view, 80, None).unwrap()), [("a", 8080)]);
    }

    #[test]
    fn app_protocol_port_names_and_443_hint_at_the_protocol() {
        let hints = |name: &str, number: u16, app_protocol: Option<&str>| {
            let port = port(name, number, Protocol::Tcp);
            let Hint { http2, tls } = hint(&ServicePort {
                app_protocol: app_protocol.map(str::to_owned),
                ..port
            });
            (http2, tls)
        };
        assert_eq!(hints("x", 80, Some("kubernetes.io/h2c")), (true, false));
        assert_eq!(hints("grpc-api", 80, None), (true, false));
        assert_eq!(
            hints("grpc", 80, Some("http")),
            (false, false),
            "appProtocol wins over the name"
        );
        assert_eq!(hints("http", 80, None), (false, false));
        assert_eq!(hints("https-admin", 8443, None), (false, true));
        assert_eq!(hints("x", 9000, Some("kubernetes.io/wss")), (false, true));
        assert_eq!(hints("", 443, None), (false, true));
        assert_eq!(
            hints("http", 443, None),
            (false, false),
            "the name wins over the number"
        );
    }
}
