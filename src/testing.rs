//! An in-process Kubernetes cluster: an API server with services, pods and port-forwards that lead to real sockets.
//!
//! It serves the tests, the benches and `kube-tunnel demo`. It speaks enough of the API for kubectl and kube-rs: TLS,
//! tokens and client certificates, RBAC-like denials, get, list, watch, and `pods/portforward` over SPDY, SPDY tunnelled
//! in WebSocket messages and WebSocket channels, with the limits and oddities of the [`ContainerRuntime`]s. Failures are
//! switched on through [`Faults`] and [`Forwards`]. It leaves out everything that writes through the API: objects are
//! made in process, through [`FakeCluster`].

mod access;
mod api;
pub mod backend;
mod cluster;
mod delay;
mod discovery;
mod faults;
mod forwards;
mod kubeconfig;
mod pki;
mod pods;
mod portforward;
mod resource;
mod review;
mod runtime;
mod selector;
mod server;
mod status;
mod store;
mod table;
mod watch;
mod workload;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

pub use access::{Identity, Rule};
pub use cluster::ApiCall;
pub use faults::{Carrier, Faults, ForwardFault, STALLED_SOCKET};
pub use forwards::{ForwardCounts, Forwards};
pub use runtime::ContainerRuntime;
pub use workload::{PortTarget, Workload, WorkloadBuilder, WorkloadPod};

use cluster::{Cluster, lock};
use kubeconfig::Credentials;
use pki::Pki;
use resource::Kind;
use store::Key;

/// A running double. Dropping it ends every connection and task.
#[derive(Debug)]
pub struct FakeCluster {
    /// State shared with connections.
    cluster: Arc<Cluster>,
    /// Issues certificates.
    pki: Pki,
    /// Where the API server listens.
    address: SocketAddr,
    /// Bearer token of the administrator.
    admin_token: String,
}

/// An object that cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidObject {
    /// Only Namespace, Service, Pod and EndpointSlice are served.
    #[error("unknown kind {0:?}")]
    UnknownKind(String),
    /// `metadata.name` is missing or empty.
    #[error("object has no metadata.name")]
    NoName,
}

impl FakeCluster {
    /// Starts an empty cluster on a free port of 127.0.0.1.
    pub async fn start() -> io::Result<Self> {
        let pki = Pki::new()?;
        let tls = TlsAcceptor::from(Arc::new(pki.server_config()?));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let cluster = Arc::new(Cluster::new());
        let admin_token = format!("admin-{}", pods::suffix(24));
        cluster.access.add_token(access::ADMIN, &admin_token);
        cluster
            .tasks
            .spawn(server::accept(cluster.clone(), listener, tls));
        Ok(Self {
            cluster,
            pki,
            address,
            admin_token,
        })
    }

    /// The API server's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The API server's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// A kubeconfig for the administrator, with the single context `fake`.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        self.render(&Credentials::Token(self.admin_token.clone()))
    }

    /// A kubeconfig for somebody else; certificates are issued on the spot.
    pub fn kubeconfig_for(&self, identity: &Identity) -> io::Result<String> {
        let credentials = match identity {
            Identity::Token(token) => Credentials::Token(token.clone()),
            Identity::ClientCertificate { name, group } => {
                let issued = self.pki.issue(name, group.as_deref())?;
                self.cluster.access.add_certificate(name, &issued.der);
                Credentials::Certificate {
                    certificate: issued.certificate,
                    key: issued.key,
                }
            }
        };
        Ok(self.render(&credentials))
    }

    /// Makes `token` the bearer token of `user`.
    pub fn add_token(&self, user: &str, token: &str) {
        self.cluster.access.add_token(user, token);
    }

    /// Makes requests with `token` fail with 401 from now on; connections already upgraded live on.
    pub fn expire_token(&self, token: &str) {
        self.cluster.access.expire_token(token);
    }

    /// Makes requests with the certificates that `user` has fail with 401 from now on.
    pub fn expire_certificates(&self, user: &str) {
        self.cluster.access.expire_certificates(user);
    }

    /// Denies requests that `rule` covers, to one user or to everybody.
    pub fn deny(&self, user: Option<&str>, rule: Rule) {
        self.cluster.access.deny(user, rule);
    }

    /// Limits `user` to `rules`; users without limits may do everything.
    pub fn allow_only(&self, user: &str, rules: &[Rule]) {
        self.cluster.access.allow_only(user, rules);
    }

    /// Makes port-forwards over WebSocket need the verb `create` besides `get`, as servers do from 1.35 on (gate
    /// AuthorizePodWebsocketUpgradeCreatePermission); the double is a 1.33 otherwise.
    pub fn require_create_for_websockets(&self, required: bool) {
        self.cluster.access.require_create_for_websockets(required);
    }

    /// Lifts every denial and limit.
    pub fn allow_all(&self) {
        self.cluster.access.allow_all();
    }

    /// Creates or replaces a Namespace, Service, Pod or EndpointSlice and returns it as stored.
    pub fn apply(&self, object: Value) -> Result<Value, InvalidObject> {
        self.cluster.store.apply(object).map(Arc::unwrap_or_clone)
    }

    /// Removes an object; false when there is none. Use [`delete_pod`](Self::delete_pod) for pods with endpoints.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> bool {
        Kind::from_name(kind).is_some_and(|kind| {
            self.cluster
                .store
                .delete(&Key::new(kind, namespace, name))
                .is_some()
        })
    }

    /// Reads an object.
    #[must_use]
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = Key::new(Kind::from_name(kind)?, namespace, name);
        self.cluster.store.get(&key).map(Arc::unwrap_or_clone)
    }

    /// Forgets history: watches that start at an older version get 410.
    pub fn compact(&self) {
        self.cluster.store.compact();
    }

    /// Makes every watch that allows bookmarks send one now.
    pub fn send_bookmarks(&self) {
        self.cluster.bookmarks.send_modify(|count| *count += 1);
    }

    /// Describes a Service with its pods; `create` makes them.
    #[must_use]
    pub fn workload(&self, namespace: &str, name: &str) -> WorkloadBuilder {
        WorkloadBuilder::new(self.cluster.clone(), namespace, name)
    }

    /// Leads a container port of a pod to `address`.
    pub fn route(&self, namespace: &str, pod: &str, port: u16, address: SocketAddr) {
        lock(&self.cluster.routes).insert((namespace.to_owned(), pod.to_owned(), port), address);
    }

    /// Marks a pod and its endpoints ready or not; false when there is no such pod.
    pub fn set_ready(&self, namespace: &str, pod: &str, ready: bool) -> bool {
        pods::set_ready(&self.cluster, namespace, pod, ready)
    }

    /// Marks a pod and its endpoints as terminating, as the first half of a deletion does.
    pub fn terminate_pod(&self, namespace: &str, pod: &str) -> bool {
        pods::terminate(&self.cluster, namespace, pod)
    }

    /// Removes a pod, its endpoints and its routes; false when there is no such pod.
    pub fn delete_pod(&self, namespace: &str, pod: &str) -> bool {
        pods::delete(&self.cluster, namespace, pod)
    }

    /// Replaces a pod as a rollout does and returns the new pod's name: new uid and address, the old pod's routes.
    pub fn replace_pod(&self, namespace: &str, pod: &str) -> Option<String> {
        pods::replace(&self.cluster, namespace, pod)
    }

    /// Every authenticated resource request so far, denied ones included.
    #[must_use]
    pub fn calls(&self) -> Vec<ApiCall> {
        lock(&self.cluster.calls).clone()
    }

    /// Empties the record of requests.
    pub fn clear_calls(&self) {
        lock(&self.cluster.calls).clear();
    }

    /// The switches for failures.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.cluster.faults
    }

    /// The port-forward sessions: what they have done, and how to end them.
    #[must_use]
    pub fn forwards(&self) -> &Forwards {
        &self.cluster.forwards
    }

    /// Changes what the nodes run; forwarded connections that end from now on end its way.
    pub fn set_runtime(&self, runtime: ContainerRuntime) {
        *lock(&self.cluster.runtime) = runtime;
    }

    /// Cuts every live connection without a word, port-forwards included, as an API server that dies does. New ones
    /// are served unless [`Faults::set_api_down`] says otherwise.
    pub fn restart(&self) {
        self.cluster.cut_connections();
    }

    /// Stops and waits until every task has ended.
    pub async fn shutdown(self) {
        self.cluster.stop.cancel();
        self.cluster.tasks.close();
        self.cluster.tasks.wait().await;
    }

    fn render(&self, credentials: &Credentials) -> String {
        kubeconfig::render(&self.url(), &self.pki.authority_pem(), credentials)
    }
}

impl Drop for FakeCluster {
    fn drop(&mut self) {
        self.cluster.stop.cancel();
    }
}

#[cfg(test)]
mod tests;
