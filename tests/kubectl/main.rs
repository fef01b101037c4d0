//! Real kubectl binaries against the in-process cluster: `cargo test --test kubectl`.
//!
//! `KUBECTL` lists the binaries to try, separated like `PATH`; without it the `kubectl` on `PATH` is used.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

mod process;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{Carrier, ContainerRuntime, FakeCluster, Identity, Rule, Workload};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use process::{Child, Kubectl, within};

/// A cluster with the Service `web` of two pods.
struct Scene {
    cluster: FakeCluster,
    workload: Workload,
    /// Holds the kubeconfig files.
    directory: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Self {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = cluster
            .workload("shop", "web")
            .port("http", 80, ("web", 8080))
            .serve(Serve::Http(Protocols::Any))
            .replicas(2)
            .create()
            .unwrap();
        Self {
            cluster,
            workload,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// kubectl as the administrator, in the namespace `shop`.
    fn admin(&self, binary: &Path) -> Kubectl {
        self.kubectl(binary, "admin", &self.cluster.kubeconfig())
    }

    fn with_token(&self, binary: &Path, token: &str) -> Kubectl {
        let identity = Identity::Token(token.to_owned());
        self.kubectl(binary, token, &self.cluster.kubeconfig_for(&identity).unwrap())
    }

    fn kubectl(&self, binary: &Path, name: &str, kubeconfig: &str) -> Kubectl {
        let file = self.directory.path().join(name);
        std::fs::write(&file, kubeconfig).unwrap();
        Kubectl::new(binary, &file, self.directory.path())
    }

    fn pod(&self) -> &str {
        &self.workload.pods[0].name
    }
}

/// Every binary to try; having none is a failure, or the suite would pass without having shown anything.
fn binaries() -> Vec<PathBuf> {
    let search = |list: &std::ffi::OsStr| std::env::split_paths(list).collect::<Vec<_>>();
    let found: Vec<PathBuf> = match std::env::var_os("KUBECTL") {
        Some(list) => search(&list),
        None => std::env::var_os("PATH")
            .map(|path| search(&path))
            .unwrap_or_default()
            .into_iter()
            .map(|directory| directory.join("kubectl"))
            .find(|binary| binary.is_file())
            .into_iter()
            .collect(),
    };
    assert!(
        !found.is_empty() && found.iter().all(|binary| binary.is_file()),
        "these tests need kubectl: install it from https://kubernetes.io/docs/tasks/tools/ so that it is on PATH, or \
         set KUBECTL to the paths of one or more binaries; looked at {found:?}"
    );
    found
}

#[tokio::test]
async fn tables_show_what_kubectl_shows() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let kubectl = scene.admin(&binary);
        let services = kubectl.succeeds(&["get", "svc", "-o", "wide"]).await;
        let line = services.lines().find(|line| line.starts_with("web")).unwrap();
        assert!(
            line.contains("ClusterIP") && line.contains("80/TCP") && line.contains("app=web"),
            "{services}"
        );
        let slices = kubectl.succeeds(&["get", "endpointslices"]).await;
        assert!(
            slices.contains("IPv4") && slices.contains("8080") && slices.contains("10.244."),
            "{slices}"
        );
        let all = kubectl.succeeds(&["get", "svc,pods,endpointslices", "-A"]).await;
        assert!(
            all.contains("service/web") && all.contains("1/1") && all.contains("Running"),
            "{all}"
        );
    }
}

#[tokio::test]
async fn tables_can_be_sorted_by_any_field() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let last = json!({
            "kind": "Service", "metadata": {"name": "api", "namespace": "shop"}, "spec": {"ports": [{"port": 90}]},
        });
        scene.cluster.apply(last).unwrap();
        let sorted = ["get", "svc", "--sort-by=.spec.ports[0].port"];
        let services = scene.admin(&binary).succeeds(&sorted).await;
        let names: Vec<_> = services
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(names, ["web", "api"], "{services}");
    }
}

#[tokio::test]
async fn objects_come_as_json() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let kubectl = scene.admin(&binary);
        let pods = kubectl
            .succeeds(&["get", "pods", "-l", "app in (web,api)", "-o", "json"])
            .await;
        let pods: Value = serde_json::from_str(&pods).unwrap();
        assert_eq!(pods["items"].as_array().unwrap().len(), 2);
        let pod = kubectl.succeeds(&["get", "pod", scene.pod(), "-o", "json"]).await;
        let pod: Value = serde_json::from_str(&pod).unwrap();
        assert_eq!(pod["status"]["podIP"], scene.workload.pods[0].ip);
        let missing = kubectl.fails(&["get", "pod", "nobody"]).await;
        assert_eq!(
            missing.trim(),
            "Error from server (NotFound): pods \"nobody\" not found"
        );
    }
}

#[tokio::test]
async fn a_watch_sees_an_added_object() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let mut watch = scene.admin(&binary).spawn(&["get", "svc", "-w"]);
        watch.line_with("web").await;
        let object =
            json!({"kind": "Service", "metadata": {"name": "late", "namespace": "shop"}, "spec": {}});
        scene.cluster.apply(object).unwrap();
        watch.line_with("late").await;
    }
}

#[tokio::test]
async fn a_bad_token_must_log_in() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let text = scene.with_token(&binary, "stale").fails(&["get", "svc"]).await;
        assert!(text.contains("You must be logged in to the server"), "{text}");
    }
}

#[tokio::test]
async fn a_denial_is_explained() {
    for binary in binaries() {
        let scene = Scene::new().await;
        scene.cluster.add_token("dev", "dev-token");
        scene
            .cluster
            .deny(Some("dev"), Rule::new(&["list"], &["services"]));
        let kubectl = scene.with_token(&binary, "dev-token");
        assert_eq!(
            kubectl.fails(&["get", "svc"]).await.trim(),
            "Error from server (Forbidden): services is forbidden: User \"dev\" cannot list resource \"services\" in \
             API group \"\" in the namespace \"shop\""
        );
        let allowed = kubectl.succeeds(&["auth", "can-i", "get", "pods"]).await;
        assert_eq!(allowed.trim(), "yes");
    }
}

#[tokio::test]
async fn forwards_to_a_pod_carry_concurrent_requests() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let (_forward, address) =
            forward(&scene.admin(&binary), &format!("pod/{}", scene.pod()), ":8080").await;
        let (first, second) = tokio::join!(get(address, "/slow?ms=200"), get(address, "/bytes/3000000"));
        let first: Value = serde_json::from_slice(&first).unwrap();
        assert_eq!(first["pod"], scene.pod());
        assert_eq!(second.len(), 3_000_000);
        let calls = scene.cluster.calls();
        let upgrade = calls
            .iter()
            .rfind(|call| call.subresource.as_deref() == Some("portforward"))
            .unwrap();
        let verb = if tunnels(&scene.admin(&binary)).await {
            "get"
        } else {
            "create"
        };
        assert_eq!((upgrade.verb.as_str(), upgrade.resource.as_str()), (verb, "pods"));
    }
}

#[tokio::test]
async fn newer_kubectl_tunnels_and_older_speaks_spdy_directly() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let kubectl = scene.admin(&binary);
        let (_forward, address) = forward(&kubectl, &format!("pod/{}", scene.pod()), ":8080").await;
        get(address, "/health").await;
        let expected = if tunnels(&kubectl).await {
            [0, 1, 0]
        } else {
            [1, 0, 0]
        };
        assert_eq!(upgrades(&scene), expected, "{}", binary.display());
    }
}

#[tokio::test]
async fn a_refused_tunnel_is_replaced_by_spdy() {
    for binary in binaries() {
        let scene = Scene::new().await;
        scene.cluster.faults().refuse_carrier(Carrier::Tunnel, true);
        let (_forward, address) =
            forward(&scene.admin(&binary), &format!("pod/{}", scene.pod()), ":8080").await;
        let large = get(address, "/bytes/3000000").await;
        assert_eq!(large.len(), 3_000_000);
        assert_eq!(upgrades(&scene), [1, 0, 0], "{}", binary.display());
    }
}

#[tokio::test]
async fn bytes_come_back_as_they_were_sent() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let echo = scene.cluster.workload("shop", "echo").port("", 80, 9000);
        let _echo = echo.serve(Serve::Echo).create().unwrap();
        let (_forward, address) = forward(&scene.admin(&binary), "svc/echo", ":80").await;
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut echoed = vec![0; sent.len()];
        let mut stream = TcpStream::connect(address).await.unwrap();
        let (mut read, mut write) = stream.split();
        let (written, read) = within("the echo", async {
            tokio::join!(write.write_all(&sent), read.read_exact(&mut echoed))
        })
        .await;
        written.unwrap();
        read.unwrap();
        assert!(echoed == sent);
    }
}

#[tokio::test]
async fn forwards_to_a_service_follow_its_named_port() {
    for binary in binaries() {
        let scene = Scene::new().await;
        let (_forward, address) = forward(&scene.admin(&binary), "svc/web", ":80").await;
        let health: Value = serde_json::from_slice(&get(address, "/health").await).unwrap();
        assert_eq!(health["status"], "ok");
    }
}

#[tokio::test]
async fn a_refused_port_is_reported_by_kubectl() {
    for binary in binaries() {
        let mut scene = Scene::new().await;
        scene.workload.pods[0].backends.clear();
        let (mut forward, address) =
            forward(&scene.admin(&binary), &format!("pod/{}", scene.pod()), ":8080").await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let text = forward.error_line_with("n error occurred forwarding").await; // "An" since 1.37
        assert!(
            text.contains("failed to connect to localhost:8080 inside namespace"),
            "{text}"
        );
        assert!(text.contains("connection refused"), "{text}");
    }
}

#[tokio::test]
async fn refusals_of_every_runtime_are_understood() {
    for binary in binaries() {
        for runtime in [
            ContainerRuntime::Containerd16,
            ContainerRuntime::Containerd17,
            ContainerRuntime::Containerd21,
            ContainerRuntime::Old,
            ContainerRuntime::CriO,
            ContainerRuntime::Kwok,
        ] {
            let scene = Scene::new().await;
            scene.cluster.set_runtime(runtime);
            let target = format!("pod/{}", scene.pod());
            let (mut forward, address) = forward(&scene.admin(&binary), &target, ":81").await;
            let _stream = TcpStream::connect(address).await.unwrap();
            let text = forward.error_line_with("n error occurred forwarding").await;
            assert!(
                text.contains("connect: connection refused"),
                "{runtime:?}: {text}"
            );
        }
    }
}

/// Whether kubectl asks for the tunnel first, as it does since 1.31.
async fn tunnels(kubectl: &Kubectl) -> bool {
    let version = kubectl.succeeds(&["version", "--client", "-o", "json"]).await;
    let version: Value = serde_json::from_str(&version).unwrap();
    let minor = version["clientVersion"]["minor"].as_str().unwrap();
    minor.trim_end_matches('+').parse::<u32>().unwrap() >= 31
}

/// Upgrades seen: direct SPDY, tunnelled, channels.
fn upgrades(scene: &Scene) -> [u64; 3] {
    let counts = scene.cluster.forwards().counts();
    [Carrier::Spdy, Carrier::Tunnel, Carrier::Channel].map(|carrier| counts.upgrades(carrier))
}

/// Starts a port-forward and waits for the local address it tells.
async fn forward(kubectl: &Kubectl, target: &str, ports: &str) -> (Child, SocketAddr) {
    let mut child = kubectl.spawn(&["port-forward", "--address", "127.0.0.1", target, ports]);
    let line = child.line_with("Forwarding from ").await;
    let address = line["Forwarding from ".len()..]
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    (child, address)
}

async fn get(address: SocketAddr, path: &str) -> Bytes {
    within(path, async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        TaskTracker::new().spawn(connection);
        let request = Request::get(path)
            .header("host", "web")
            .body(Empty::<Bytes>::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body().collect().await.unwrap().to_bytes()
    })
    .await
}
