//! Builds a Service with its Pods, its EndpointSlice and what runs in them.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::backend::{Backend, Serve};
use super::cluster::{Cluster, lock};
use super::pods::{new_pod_ip, set_pod_ip, suffix};
use super::store::new_uid;

/// Collects the description of a workload; nothing exists before [`create`](Self::create).
#[derive(Debug)]
pub struct WorkloadBuilder {
    /// Where it will be created.
    cluster: Arc<Cluster>,
    /// Namespace of every object.
    namespace: String,
    /// Service name and `app` label.
    name: String,
    /// Service ports.
    ports: Vec<Port>,
    /// Number of pods.
    replicas: usize,
    /// No cluster address, stable pod names.
    headless: bool,
    /// Extra fields of the Service's `spec`.
    spec: Vec<(String, Value)>,
}

/// Where a service port leads: a number, or a named container port with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortTarget {
    /// `targetPort: 8080`
    Number(u16),
    /// `targetPort: http`, a container port of that name.
    Named(String, u16),
}

impl From<u16> for PortTarget {
    fn from(number: u16) -> Self {
        Self::Number(number)
    }
}

impl From<(&str, u16)> for PortTarget {
    fn from((name, number): (&str, u16)) -> Self {
        Self::Named(name.to_owned(), number)
    }
}

/// Gives the address behind a pod's container port.
type RouteFn = Box<dyn Fn(&str) -> SocketAddr + Send + Sync>;

struct Port {
    /// Name of the service port; empty for none.
    name: String,
    /// Number of the service port.
    number: u16,
    /// Container port.
    target: PortTarget,
    /// `appProtocol`.
    app_protocol: Option<String>,
    /// What listens there.
    behind: Behind,
}

/// What listens on a container port.
enum Behind {
    /// Nothing: connections are refused.
    Nothing,
    /// A backend of ours in every pod.
    Serve(Serve),
    /// An address of the caller's.
    Route(RouteFn),
}

/// What [`WorkloadBuilder::create`] made. Its backends stop when it is dropped; the objects stay.
#[derive(Debug)]
pub struct Workload {
    /// The pods, in order of creation.
    pub pods: Vec<WorkloadPod>,
}

/// One pod of a workload.
#[derive(Debug)]
pub struct WorkloadPod {
    /// Pod name.
    pub name: String,
    /// Pod address in the cluster.
    pub ip: String,
    /// The running backends, one for each port made with [`serve`](WorkloadBuilder::serve), in port order.
    pub backends: Vec<Backend>,
}

impl WorkloadBuilder {
    pub(super) fn new(cluster: Arc<Cluster>, namespace: &str, name: &str) -> Self {
        Self {
            cluster,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ports: Vec::new(),
            replicas: 1,
            headless: false,
            spec: Vec::new(),
        }
    }

    /// Adds a service port; an empty name leaves it unnamed. The next calls of [`app_protocol`](Self::app_protocol),
    /// [`serve`](Self::serve) and [`backend`](Self::backend) are about this port.
    #[must_use]
    pub fn port(mut self, name: &str, number: u16, target: impl Into<PortTarget>) -> Self {
        self.ports.push(Port {
            name: name.to_owned(),
            number,
            target: target.into(),
            app_protocol: None,
            behind: Behind::Nothing,
        });
        self
    }

    /// Sets the last port's `appProtocol`.
    #[must_use]
    pub fn app_protocol(mut self, protocol: &str) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.app_protocol = Some(protocol.to_owned());
        }
        self
    }

    /// Runs a backend of ours behind the last port, one per pod.
    #[must_use]
    pub fn serve(mut self, serve: Serve) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.behind = Behind::Serve(serve);
        }
        self
    }

    /// Leads the last port of each pod to an address; the argument is the pod's name.
    #[must_use]
    pub fn backend(mut self, address: impl Fn(&str) -> SocketAddr + Send + Sync + 'static) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.behind = Behind::Route(Box::new(address));
        }
        self
    }

    /// Sets the number of pods; one by default.
    #[must_use]
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// Makes the Service headless and names the pods as a StatefulSet does.
    #[must_use]
    pub fn headless(mut self) -> Self {
        self.headless = true;
        self
    }

    /// Sets a field of the Service's `spec`, such as `sessionAffinity` or `publishNotReadyAddresses`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.spec.push((field.to_owned(), value.into()));
        self
    }

    /// Starts the backends and creates the objects: pods first, so that nothing points nowhere.
    pub fn create(self) -> io::Result<Workload> {
        let hash = suffix(10);
        let mut pods = Vec::with_capacity(self.replicas);
        let mut endpoints = Vec::with_capacity(self.replicas);
        for ordinal in 0..self.replicas {
            let name = match self.headless {
                true => format!("{}-{ordinal}", self.name),
                false => format!("{}-{hash}-{}", self.name, suffix(5)),
            };
            let mut backends = Vec::new();
            for port in &self.ports {
                let address = match &port.behind {
                    Behind::Nothing => continue,
                    Behind::Route(address) => address(&name),
                    Behind::Serve(serve) => {
                        let backend = Backend::start(serve, &name)?;
                        let address = backend.address();
                        backends.push(backend);
                        address
                    }
                };
                let key = (self.namespace.clone(), name.clone(), port.target.number());
                lock(&self.cluster.routes).insert(key, address);
            }
            let (uid, ip) = (new_uid(), new_pod_ip());
            self.apply(self.pod(&name, &uid, &ip))?;
            endpoints.push(self.endpoint(&name, &uid, &ip));
            pods.push(WorkloadPod { name, ip, backends });
        }
        self.apply(self.service())?;
        self.apply(self.slice(&endpoints))?;
        Ok(Workload { pods })
    }

    fn apply(&self, object: Value) -> io::Result<()> {
        self.cluster
            .store
            .apply(object)
            .map(drop)
            .map_err(io::Error::other)
    }

    fn service(&self) -> Value {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| {
                let target = match &port.target {
                    PortTarget::Number(number) => json!(number),
                    PortTarget::Named(name, _) => json!(name),
                };
                let mut entry = json!({"port": port.number, "protocol": "TCP", "targetPort": target});
                port.describe(&mut entry);
                entry
            })
            .collect();
        let ip = match self.headless {
            true => "None".to_owned(),
            false => format!("10.96.{}.{}", fastrand::u8(..), fastrand::u8(2..255)),
        };
        let mut service = json!({
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": {"app": self.name}},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": ip,
                "clusterIPs": [ip],
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "internalTrafficPolicy": "Cluster",
                "sessionAffinity": "None",
                "selector": {"app": self.name},
                "ports": ports,
            },
            "status": {"loadBalancer": {}},
        });
        for (field, value) in &self.spec {
            service["spec"][field] = value.clone();
        }
        service
    }

    fn pod(&self, name: &str, uid: &str, ip: &str) -> Value {
        let mut ports: Vec<Value> = Vec::new();
        for port in &self.ports {
            let mut entry = json!({"containerPort": port.target.number(), "protocol": "TCP"});
            if let PortTarget::Named(name, _) = &port.target {
                entry["name"] = name.as_str().into();
            }
            // Two service ports may lead to one container port.
            if !ports.contains(&entry) {
                ports.push(entry);
            }
        }
        let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
            .map(|kind| json!({"type": kind, "status": "True"}));
        let mut pod = json!({
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "uid": uid,
                "labels": {"app": self.name},
            },
            "spec": {
                "nodeName": "fake-node",
                "containers": [{"name": self.name, "image": "kube-tunnel/testing", "ports": ports}],
            },
            "status": {
                "phase": "Running",
                "hostIP": "192.168.49.2",
                "conditions": conditions,
                "containerStatuses": [{
                    "name": self.name,
                    "image": "kube-tunnel/testing",
                    "ready": true,
                    "restartCount": 0,
                    "state": {"running": {}},
                }],
            },
        });
        if self.headless {
            pod["spec"]["hostname"] = name.into();
            pod["spec"]["subdomain"] = self.name.as_str().into();
        }
        set_pod_ip(&mut pod, ip);
        pod
    }

    fn endpoint(&self, name: &str, uid: &str, ip: &str) -> Value {
        let mut endpoint = json!({
            "addresses": [ip],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": "fake-node",
            "targetRef": {"kind": "Pod", "name": name, "namespace": self.namespace, "uid": uid},
        });
        if self.headless {
            endpoint["hostname"] = name.into();
        }
        endpoint
    }

    fn slice(&self, endpoints: &[Value]) -> Value {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| {
                let mut entry = json!({"name": "", "port": port.target.number(), "protocol": "TCP"});
                port.describe(&mut entry);
                entry
            })
            .collect();
        json!({
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", self.name, suffix(5)),
                "namespace": self.namespace,
                "labels": {
                    "app": self.name,
                    "kubernetes.io/service-name": self.name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports,
        })
    }
}

impl PortTarget {
    fn number(&self) -> u16 {
        match *self {
            Self::Number(number) | Self::Named(_, number) => number,
        }
    }
}

impl Port {
    /// Writes what a Service's and an EndpointSlice's port have in common.
    fn describe(&self, entry: &mut Value) {
        if !self.name.is_empty() {
            entry["name"] = self.name.as_str().into();
        }
        if let Some(protocol) = &self.app_protocol {
            entry["appProtocol"] = protocol.as_str().into();
        }
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let behind = match &self.behind {
            Behind::Nothing => "nothing".to_owned(),
            Behind::Serve(serve) => format!("{serve:?}"),
            Behind::Route(_) => "route".to_owned(),
        };
        f.debug_struct("Port")
            .field("name", &self.name)
            .field("number", &self.number)
            .field("target", &self.target)
            .field("behind", &behind)
            .finish_non_exhaustive()
    }
}
