//! Components of the cluster that end and come back; needs a cluster of `tests/cluster/up`.

mod containerd;
mod under_load;

use std::process::Command;

use tokio::time::{Duration, Instant};

use crate::client::{Client, PROTOCOLS, fetch, try_fetch};
use crate::command::{eventually, run, within};
use crate::note::note;
use crate::program::Proxy;
use crate::scene::Scene;

/// Ends and starts components.
pub(crate) const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/component");

/// Longer than a request may take while the API server is away.
const ANSWER: Duration = Duration::from_secs(30);

fn assert_is_ours(name: &str) {
    assert!(
        std::env::var_os("KUBE_TUNNEL_CLUSTER_STATE").is_some(),
        "this test ends the {name} of a cluster of tests/cluster/up, and KUBE_TUNNEL_CLUSTER_STATE names none; leave it out on \
         other clusters with --skip outage"
    );
}

/// A component that was ended; starts again when dropped.
struct Ended(&'static str);

impl Ended {
    async fn kill(name: &'static str) -> Self {
        Self::end("kill", name).await
    }

    /// Ends it by `kill`, or by `stop`, which lets it say goodbye.
    async fn end(how: &str, name: &'static str) -> Self {
        assert_is_ours(name);
        let ended = Self(name);
        run(SCRIPT, &[how, name]).await.succeeded();
        ended
    }

    async fn start(self) {
        run(SCRIPT, &["start", self.0]).await.succeeded();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Does nothing to one that runs; a failure shows in every test that comes later.
        drop(Command::new(SCRIPT).args(["start", self.0]).status());
    }
}

/// A component that does nothing and keeps its connections; goes on when dropped.
struct Frozen(&'static str);

impl Frozen {
    async fn freeze(name: &'static str) -> Self {
        assert_is_ours(name);
        let frozen = Self(name);
        run(SCRIPT, &["freeze", name]).await.succeeded();
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // A failure shows in every test that comes later.
        drop(Command::new(SCRIPT).args(["thaw", self.0]).status());
    }
}

async fn api_server_is_ready() -> bool {
    run("kubectl", &["get", "--raw=/readyz"]).await.success
}

/// Waits for the API server, and has those start afresh that make pods and endpoints. An outage keeps them away for up to a minute
/// after its end, and each further one for longer: client-go's reflectors double their waits until two minutes have been quiet.
/// The tests that come next are about none of that.
async fn api_server_is_back() {
    eventually("the API server", api_server_is_ready).await;
    for name in ["kube-controller-manager", "kube-scheduler"] {
        Ended::kill(name).await.start().await;
    }
}

async fn kubelet_is_healthy(node: &str) -> bool {
    let health = format!("--raw=/api/v1/nodes/{node}/proxy/healthz");
    run("kubectl", &["get", &health]).await.success
}

#[tokio::test]
async fn requests_work_again_after_a_restart_of_the_api_server() {
    let scene = Scene::alone().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("web");
    let mut clients = Vec::new();
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        client.get(&host, "/health").await.pod();
        clients.push(client);
    }

    let ended = Ended::kill("kube-apiserver").await;
    let started = Instant::now();
    match within(
        ANSWER,
        "a request without API server",
        try_fetch(proxy.address, &host, "/health"),
    )
    .await
    {
        Ok(reply) => note(&format!(
            "warm, without API server, {:?}: {} {}",
            started.elapsed(),
            reply.status,
            reply.text().trim()
        )),
        Err(error) => note(&format!(
            "warm, without API server, {:?}: {error:#}",
            started.elapsed()
        )),
    }
    let cold = within(
        ANSWER,
        "a cold request",
        fetch(proxy.address, &scene.shop.host("headless"), "/"),
    )
    .await;
    assert!(
        [503, 504].contains(&cold.status.as_u16()),
        "{} {}",
        cold.status,
        cold.text()
    );
    assert!(cold.text().contains("kubectl cluster-info"), "{}", cold.text());
    ended.start().await;
    api_server_is_back().await;

    let back = Instant::now();
    for client in &mut clients {
        client.get(&host, "/health").await.pod();
    }
    note(&format!("with the API server back, {:?}", back.elapsed()));
    fetch(proxy.address, &scene.shop.host("headless"), "/")
        .await
        .pod();
}

#[tokio::test]
async fn changes_during_a_restart_of_the_api_server_are_seen_after_it() {
    let scene = Scene::alone().await;
    let own = crate::cluster::Namespace::web("restart").await;
    let proxy = Proxy::start().await;
    let host = own.host("web");
    fetch(proxy.address, &host, "/health").await.pod();
    let old = own.pods("web").await;

    // It stands still, so that its watches end before the change, and it hears of neither.
    proxy.signal("STOP");
    let ended = Ended::kill("kube-apiserver").await;
    ended.start().await;
    api_server_is_back().await;
    own.kubectl(&["rollout", "restart", "deployment/web"])
        .await
        .succeeded();
    own.rolled_out("deployment/web").await;
    proxy.signal("CONT");

    for _ in 0..10 {
        assert!(!old.contains(&fetch(proxy.address, &host, "/health").await.pod()));
    }
    drop(scene);
}

#[tokio::test]
async fn requests_work_again_after_a_restart_of_the_kubelet() {
    let scene = Scene::alone().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("web");
    let mut client = Client::connect(proxy.address, PROTOCOLS[0]).await.unwrap();
    client.get(&host, "/health").await.pod();
    let node = run(
        "kubectl",
        &["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"],
    )
    .await
    .succeeded();

    let ended = Ended::kill("kubelet").await;
    let started = Instant::now();
    let reply = within(ANSWER, "a request without kubelet", client.get(&host, "/health")).await;
    note(&format!(
        "warm, without kubelet, {:?}: {} {}",
        started.elapsed(),
        reply.status,
        reply.text().trim()
    ));
    ended.start().await;
    eventually("the kubelet", async || kubelet_is_healthy(&node).await).await;
    scene.shop.ready_endpoints("web", 2).await;

    for _ in 0..4 {
        client.get(&host, "/health").await.pod();
    }
}
