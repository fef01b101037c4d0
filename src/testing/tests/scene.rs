//! A cluster with one pod for the tests of port-forwards, and raw upgrades to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use hyper::upgrade::Upgraded;
use kube::Client;
use kube::client::Body;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::TaskTracker;

use super::client::Session;
use super::{admin, within};
use crate::testing::backend::Serve;
use crate::testing::{FakeCluster, ForwardFault, Workload};

/// The container port of the pod that echoes.
pub(super) const ECHO: u16 = 5432;

/// A container port nobody listens on.
pub(super) const NOBODY: u16 = 81;

/// How long the double waits for the second direction, in these tests.
pub(super) const GRACE: Duration = Duration::from_millis(200);

/// A cluster with the pod and an administrator.
pub(super) struct Scene {
    pub(super) cluster: FakeCluster,
    pub(super) client: Client,
    workload: Workload,
    tasks: TaskTracker,
}

impl Scene {
    pub(super) async fn new() -> Self {
        let cluster = FakeCluster::start().await.unwrap();
        cluster.faults().set_close_grace(GRACE);
        let workload = cluster
            .workload("shop", "db")
            .port("", 80, ECHO)
            .serve(Serve::Echo)
            .create()
            .unwrap();
        Self {
            client: admin(&cluster).await,
            cluster,
            workload,
            tasks: TaskTracker::new(),
        }
    }

    pub(super) fn pod(&self) -> &str {
        &self.workload.pods[0].name
    }

    pub(super) fn break_with(&self, fault: Option<ForwardFault>) {
        self.cluster.faults().set_forward("shop", self.pod(), fault);
    }

    /// Runs an application behind another container port of the pod.
    pub(super) async fn application<F>(&self, port: u16, talk: impl Fn(TcpStream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        self.cluster
            .route("shop", self.pod(), port, listener.local_addr().unwrap());
        let tasks = self.tasks.clone();
        self.tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tasks.spawn(talk(stream));
            }
        });
    }

    /// Asks for an upgrade; `Ok` is the answer with the upgraded connection.
    pub(super) async fn upgrade(
        &self,
        client: &Client,
        method: &str,
        headers: &[(&str, &str)],
    ) -> Result<(HeaderMap, Upgraded), Response<Body>> {
        let path = format!("/api/v1/namespaces/shop/pods/{}/portforward", self.pod());
        self.upgrade_at(&path, client, method, headers).await
    }

    /// Asks for an upgrade at another path.
    pub(super) async fn upgrade_at(
        &self,
        path: &str,
        client: &Client,
        method: &str,
        headers: &[(&str, &str)],
    ) -> Result<(HeaderMap, Upgraded), Response<Body>> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in [("connection", "Upgrade")].iter().chain(headers) {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        let response = within(client.send(request)).await.unwrap();
        if response.status() != 101 {
            return Err(response);
        }
        let headers = response.headers().clone();
        Ok((headers, within(hyper::upgrade::on(response)).await.unwrap()))
    }

    /// A connection to the API server without HTTP, and the head of an upgrade for it.
    pub(super) async fn raw(&self, method: &str, headers: &[(&str, &str)]) -> (TlsStream<TcpStream>, String) {
        let mut roots = RootCertStore::empty();
        let authority = self.cluster.pki.authority_pem();
        roots
            .add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap())
            .unwrap();
        let tls = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let address = self.cluster.address();
        let tcp = TcpStream::connect(address).await.unwrap();
        let stream = TlsConnector::from(Arc::new(tls))
            .connect(address.ip().into(), tcp)
            .await
            .unwrap();
        let mut head = format!(
            "{method} /api/v1/namespaces/shop/pods/{}/portforward?ports={ECHO} HTTP/1.1\r\nHost: api\r\n\
             Authorization: Bearer {}\r\nConnection: Upgrade\r\n",
            self.pod(),
            self.cluster.admin_token
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        (stream, head)
    }

    /// A session over direct SPDY.
    pub(super) async fn spdy(&self) -> Session {
        let (_, io) = self.upgrade(&self.client, "POST", &SPDY).await.unwrap();
        Session::new(io)
    }

    /// A tunnelled session's connection, as WebSocket frames.
    pub(super) async fn tunnel(&self) -> (HeaderMap, Upgraded) {
        self.upgrade(&self.client, "GET", &TUNNEL).await.unwrap()
    }
}

/// What asks for SPDY.
pub(super) const SPDY: [(&str, &str); 2] = [
    ("upgrade", "SPDY/3.1"),
    ("x-stream-protocol-version", "portforward.k8s.io"),
];

/// What asks for tunnelled SPDY.
pub(super) const TUNNEL: [(&str, &str); 4] = [
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("sec-websocket-protocol", "SPDY/3.1+portforward.k8s.io"),
];

/// What asks for channels.
pub(super) const CHANNEL: [(&str, &str); 4] = [
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("sec-websocket-protocol", "v4.channel.k8s.io"),
];
