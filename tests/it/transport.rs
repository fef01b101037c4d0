//! Port-forwards under the whole program: which form carries them, what they keep apart, what they survive, what they cost.

mod economy;
mod fallback;
mod isolation;
mod robustness;
mod runtimes;
mod silence;
mod trouble;

use std::net::SocketAddr;
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::Full;
use kube_tunnel::testing::backend::{HttpBackend, Protocols, Serve};
use kube_tunnel::testing::{ContainerRuntime, FakeCluster, Workload};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::PATIENCE;
use crate::client::{Client, Reply, fetch};

/// The Service of most of these tests: port 80 is the one that is watched, port 81 the one with the trouble, behind port 82
/// nobody listens.
const WEB: &str = "web.shop";
const SIDE: &str = "web.shop:81";
const NOBODY: &str = "web.shop:82";

/// The container ports behind the last two.
const SIDE_PORT: u16 = 8081;
const NOBODY_PORT: u16 = 8082;

/// As many sessions as a pod may have for newcomers, and one that is being opened.
const FEW: u64 = 9;

/// How many requests are made at a time to see whether others go on.
const WIDTH: usize = 8;

/// How many of them may come late because the machine is busy.
const FEW_LATE: usize = 2;

/// How many of them may come late where trouble shows only by an answer that does not come: those that were the first to wait
/// for one, which are sent again.
const FIRST_LATE: usize = WIDTH;

/// Every way to end a connection.
const RUNTIMES: [ContainerRuntime; 6] = [
    ContainerRuntime::Containerd16,
    ContainerRuntime::Containerd17,
    ContainerRuntime::Containerd21,
    ContainerRuntime::Old,
    ContainerRuntime::CriO,
    ContainerRuntime::Kwok,
];

/// Makes the Service with one pod.
fn pod(cluster: &FakeCluster) -> Workload {
    let builder = cluster.workload("shop", "web").port("http", 80, 8080);
    let builder = builder
        .serve(Serve::Http(Protocols::Any))
        .port("side", 81, SIDE_PORT);
    let builder = builder
        .serve(Serve::Http(Protocols::Any))
        .port("nobody", 82, NOBODY_PORT);
    builder.create().unwrap()
}

/// The application behind port 80.
fn backend(workload: &Workload) -> &HttpBackend {
    workload.pods[0].backends[0].http().unwrap()
}

/// Makes a POST with a short body.
fn post(host: &str, path: &str) -> Request<Full<bytes::Bytes>> {
    Request::post(path)
        .header("host", host)
        .body(Full::from("once"))
        .unwrap()
}

/// Sends one POST on a connection of its own.
pub(crate) async fn submit(proxy: SocketAddr, host: &str, path: &str) -> Reply {
    Reply::read(Client::http1(proxy).await.send(post(host, path)).await).await
}

/// Opens so many connections to the pod at once, which are idle afterwards.
async fn warm_up(proxy: SocketAddr, host: &'static str, count: usize) {
    let mut requests = JoinSet::new();
    for _ in 0..count {
        requests.spawn(async move { fetch(proxy, host, "/slow?ms=400").await.status });
    }
    for status in requests.join_all().await {
        assert_eq!(status, StatusCode::OK);
    }
}

/// Asserts that what everybody else asks for comes, and that all of it but `late` requests comes soon, over `WIDTH` connections
/// to the pod at a time.
async fn assert_others_go_on(proxy: SocketAddr, late: usize) {
    const ROUNDS: usize = 8;
    const SOON: Duration = Duration::from_secs(2);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let mut requests = JoinSet::new();
        for _ in 0..WIDTH {
            requests.spawn(async move {
                let before = Instant::now();
                let reply = tokio::time::timeout(PATIENCE, fetch(proxy, WEB, "/slow?ms=5")).await;
                let reply = reply.expect("held up by another connection");
                assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
                before.elapsed()
            });
        }
        times.extend(requests.join_all().await);
    }
    times.sort();
    let median = times[times.len() / 2];
    assert!(
        median < Duration::from_millis(500),
        "median {median:?} of {times:?}"
    );
    let found = times.iter().filter(|&&time| time > SOON).count();
    assert!(found <= late, "{found} came late: {times:?}");
}
