use serde_json::{Value, json};

use super::*;

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn web() -> ServiceName {
    ServiceName::new("default", "web").unwrap()
}

fn slice(address_type: &str, pods: &[(&str, bool)]) -> EndpointSlice {
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|(name, ready)| {
            json!({
                "addresses": ["10.0.0.1"],
                "conditions": {"ready": ready},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": name, "uid": format!("uid-{name}")},
            })
        })
        .collect();
    from(json!({
        "metadata": {"namespace": "default"},
        "addressType": address_type,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": endpoints,
    }))
}

fn pod(name: &str, extra: &Value) -> Pod {
    let mut object = json!({
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}")},
        "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    });
    for (key, value) in extra.as_object().unwrap() {
        object[key]
            .as_object_mut()
            .unwrap()
            .extend(value.as_object().unwrap().clone());
    }
    from(object)
}

fn object(spec: &Value) -> KubeService {
    from(json!({"metadata": {"name": "web"}, "spec": spec}))
}

#[test]
fn a_slice_that_refers_to_anything_but_a_pod_of_its_namespace_has_no_endpoint() {
    let referring = |namespace: &str, name: &str| {
        let mut slice = slice("IPv4", &[("web-1", true)]);
        let target = slice.endpoints.as_mut().unwrap()[0].target_ref.as_mut().unwrap();
        target.namespace = Some(namespace.into());
        target.name = Some(name.into());
        endpoints_from_slices(&[slice], &mut Loads::default()).len()
    };
    assert_eq!(referring("default", "web-1.sub"), 1);
    assert_eq!(referring("kube-system", "web-1"), 0);
    for name in [
        "",
        "..",
        "a/exec?command=sh&x=",
        "a%2Fexec",
        "a b",
        "a#",
        "-a",
        "a-",
        "A",
    ] {
        assert_eq!(referring("default", name), 0, "{name:?}");
    }
}

#[test]
fn the_kinds_of_service_are_told_apart() {
    let kind = |spec: Value| service(web(), &object(&spec)).kind;
    assert_eq!(kind(json!({"clusterIP": "10.96.0.7"})), ServiceKind::Virtual);
    assert_eq!(kind(json!({"clusterIP": "None"})), ServiceKind::Headless);
    let external = json!({"type": "ExternalName", "externalName": "example.org"});
    assert_eq!(kind(external), ServiceKind::ExternalName("example.org".into()));
}

#[test]
fn a_target_port_is_a_name_a_number_or_the_ports_own() {
    let ports = json!([
        {"name": "a", "port": 80, "targetPort": "http"},
        {"name": "b", "port": 81, "targetPort": 8081},
        {"name": "c", "port": 82},
        {"name": "d", "port": 83, "targetPort": 0},
    ]);
    let targets: Vec<_> = service(web(), &object(&json!({"ports": ports})))
        .ports
        .into_iter()
        .map(|p| p.target)
        .collect();
    let expected = [
        PortRef::Name("http".into()),
        PortRef::Number(8081),
        PortRef::Number(82),
        PortRef::Number(83),
    ];
    assert_eq!(targets, expected);
}

#[test]
fn a_pod_in_slices_of_both_families_is_one_endpoint() {
    let mut slices = [
        slice("IPv4", &[("web-1", true)]),
        slice("IPv6", &[("web-1", true)]),
        slice("FQDN", &[("x", true)]),
    ];
    slices[1].endpoints.as_mut().unwrap()[0].addresses = vec!["fd00::1".into()];
    let endpoints = endpoints_from_slices(&slices, &mut Loads::new());
    assert_eq!(endpoints.len(), 1);
    assert_eq!(
        endpoints[0].ports,
        BTreeMap::from([("http".to_owned(), 8080)]),
        "UDP ports cannot be forwarded"
    );
    let addresses = ["10.0.0.1", "fd00::1"].map(|address| address.parse::<IpAddr>().unwrap());
    assert_eq!(endpoints[0].addresses, addresses);
}

#[test]
fn slices_may_divide_the_ports_of_one_pod() {
    let mut other = slice("IPv4", &[("a", true), ("b", false)]);
    let mut ports = other.ports.take().unwrap();
    (ports[0].name, ports[0].port) = (Some("grpc".into()), Some(9090));
    other.ports = Some(ports);
    let slices = [slice("IPv4", &[("a", true), ("b", true)]), other];
    let ports: Vec<Vec<(String, u16)>> = endpoints_from_slices(&slices, &mut Loads::new())
        .iter()
        .map(|endpoint| endpoint.ports.clone().into_iter().collect())
        .collect();
    let (http, grpc) = (("http".to_owned(), 8080), ("grpc".to_owned(), 9090));
    assert_eq!(ports, [vec![grpc, http.clone()], vec![http]], "where it is ready");
}

#[test]
fn a_named_port_may_be_a_sidecars() {
    let spec = json!({"spec": {"initContainers": [
        {"name": "sidecar", "restartPolicy": "Always", "ports": [{"name": "tls", "containerPort": 8443}]},
        {"name": "once", "ports": [{"name": "set-up", "containerPort": 1}]},
    ]}});
    let ports = json!([
        {"name": "a", "port": 443, "targetPort": "tls"},
        {"name": "b", "port": 81, "targetPort": "set-up"},
    ]);
    let service = service(web(), &object(&json!({"ports": ports})));
    let found = endpoints_from_pods(&service, &[pod("x", &spec)], &mut Loads::new());
    let ports: Vec<_> = found[0].ports.iter().collect();
    assert_eq!(ports, [(&"a".to_owned(), &8443)]);
}

#[test]
fn session_affinity_lasts_as_long_as_the_service_says() {
    let affinity = |spec: Value| service(web(), &object(&spec)).affinity.map(|time| time.as_secs());
    assert_eq!(affinity(json!({})), None);
    assert_eq!(affinity(json!({"sessionAffinity": "None"})), None);
    assert_eq!(affinity(json!({"sessionAffinity": "ClientIP"})), Some(10_800));
    let config = json!({"clientIP": {"timeoutSeconds": 60}});
    let short = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config});
    assert_eq!(affinity(short), Some(60));
}

#[test]
fn absent_conditions_mean_ready_and_not_terminating() {
    let mut slice = slice("IPv4", &[("web-1", true)]);
    slice.endpoints.as_mut().unwrap()[0].conditions = None;
    let endpoints = endpoints_from_slices(&[slice], &mut Loads::new());
    assert!(endpoints[0].ready && !endpoints[0].terminating);
}

#[test]
fn an_update_keeps_the_load_of_an_endpoint_and_forgets_the_others() {
    let mut loads = Loads::new();
    let before = endpoints_from_slices(&[slice("IPv4", &[("web-1", true), ("web-2", true)])], &mut loads);
    let _busy = before[0].load.begin();
    let after = endpoints_from_slices(&[slice("IPv4", &[("web-1", false)])], &mut loads);
    assert_eq!((after[0].ready, after[0].load.get()), (false, 1));
    assert_eq!(loads.len(), 1);
}

#[test]
fn pods_become_the_endpoints_that_the_slice_controller_would_make() {
    let service = service(
        web(),
        &object(
            &json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}),
        ),
    );
    let pods = [
        pod("a-ready", &json!({})),
        pod(
            "b-unready",
            &json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
        ),
        pod(
            "c-leaving",
            &json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        ),
        pod("d-done", &json!({"status": {"phase": "Succeeded"}})),
        pod("e-pending", &json!({"status": {"podIP": ""}})),
    ];
    let endpoints = endpoints_from_pods(&service, &pods, &mut Loads::new());
    let seen: Vec<_> = endpoints
        .iter()
        .map(|e| (&*e.pod.name, e.ready, e.terminating))
        .collect();
    assert_eq!(
        seen,
        [
            ("a-ready", true, false),
            ("b-unready", false, false),
            ("c-leaving", true, true)
        ]
    );
    assert_eq!(endpoints[0].ports["http"], 8080);
}

#[test]
fn a_selector_becomes_a_label_selector() {
    let labels = object(&json!({"selector": {"app": "web", "tier": "front"}}));
    assert_eq!(selector(&labels).as_deref(), Some("app=web,tier=front"));
    assert_eq!(selector(&object(&json!({}))), None);
}
