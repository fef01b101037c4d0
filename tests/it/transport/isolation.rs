//! That no connection to a pod disturbs another, whatever happens to it (contract G4). Those that share a session anyway are
//! a crowd, which most tests open before the trouble starts.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use kube_tunnel::config::{Setting, setting};
use kube_tunnel::drain::Drain;
use kube_tunnel::k8s::{Cluster, PortForward};
use kube_tunnel::registry::PodRef;
use kube_tunnel::testing::{Carrier, ContainerRuntime, FakeCluster, ForwardFault, STALLED_SOCKET, Workload};
use kube_tunnel::transport::{BoxStream, Connect, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::app::{PATIENCE, TestApp, client_config, eventually};
use crate::client::{Client, fetch, get};
use crate::transport::{
    FEW, FEW_LATE, FIRST_LATE, NOBODY, NOBODY_PORT, RUNTIMES, SIDE, SIDE_PORT, WEB, assert_others_go_on, pod,
    submit, warm_up,
};

/// More than all buffers on the way to a pod and the queues of the peer's workers hold.
const LARGE: usize = 32 << 20;

struct Scene {
    cluster: FakeCluster,
    workload: Workload,
    app: TestApp,
}

/// A pod with a crowd of idle connections to both of its ports, more on a session than the peer has workers.
async fn scene(form: &str) -> Scene {
    scene_with(&[(&setting::PORT_FORWARD, form)]).await
}

async fn scene_with(flags: &[(&'static Setting, &str)]) -> Scene {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let app = TestApp::with(&cluster.kubeconfig(), flags).await;
    tokio::join!(warm_up(app.address, WEB, 32), warm_up(app.address, SIDE, 32));
    let counts = cluster.forwards().counts();
    assert!(
        counts.connections_open > 5 * counts.sessions_open,
        "they do not share: {counts:?}"
    );
    Scene {
        cluster,
        workload,
        app,
    }
}

impl Scene {
    fn break_side(&self, fault: ForwardFault) {
        let pod = &self.workload.pods[0].name;
        self.cluster
            .faults()
            .set_port_forward("shop", pod, SIDE_PORT, Some(fault));
    }

    fn bytes_from_pods(&self) -> u64 {
        self.cluster.forwards().counts().bytes_from_pods
    }
}

/// Waits until more than `least` has moved, and no more does: for longer than a busy machine leaves anybody without a turn.
async fn until_stalled(least: u64, moved: impl Fn() -> u64) {
    const LOOKS: usize = 40;
    let (mut before, mut same) = (0, 0);
    eventually("it stalls", || {
        let now = moved();
        same = if now == before { same + 1 } else { 0 };
        before = now;
        same >= LOOKS && now > least
    })
    .await;
}

/// Asks for something over a connection to the pod, and waits for the first byte of the answer.
async fn ask(stream: &mut BoxStream, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {WEB}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.read_u8().await.unwrap();
}

#[tokio::test]
async fn readers_that_stall_do_not_touch_what_was_opened_at_the_same_moment() {
    // With the lively one as many as get a session of their own when they come together.
    const STALLED: usize = 1;
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kubeconfig.path(), cluster.kubeconfig()).unwrap();
    let config = client_config(kubeconfig.path());
    let (kubernetes, drain) = (Cluster::load(&config).await.unwrap(), Drain::new());
    let forward = PortForward::new(&kubernetes, &config, &drain);
    let target = Target {
        pod: PodRef {
            namespace: "shop".into(),
            name: workload.pods[0].name.as_str().into(),
            uid: "".into(),
        },
        port: 8080,
    };
    let connections = (0..=STALLED).map(|_| forward.connect(&target));
    let mut streams: Vec<BoxStream> = futures_util::future::try_join_all(connections).await.unwrap();
    let mut lively = streams.swap_remove(STALLED / 2);
    for stalled in &mut streams {
        ask(stalled, "/bytes/1099511627776").await;
    }
    // What they do not read has stopped them all: it is more than a session holds.
    let forwards = cluster.forwards();
    until_stalled((STALLED << 20) as u64, || forwards.counts().bytes_from_pods).await;
    for _ in 0..50 {
        tokio::time::timeout(PATIENCE, ask(&mut lively, "/"))
            .await
            .expect("held up");
        let mut rest = vec![0; 64 << 10];
        let _ = lively.read(&mut rest).await.unwrap();
    }
    // None of them had to give way.
    for stalled in &mut streams {
        stalled.read_exact(&mut vec![0; 2 << 20]).await.unwrap();
    }
}

#[tokio::test]
async fn others_go_on_beside_a_client_that_does_not_read() {
    // It is not given up before the others have been answered.
    let flags = [
        (&setting::PORT_FORWARD, "tunnel"),
        (&setting::SLOW_READER_TIMEOUT, "10m"),
    ];
    let scene = scene_with(&flags).await;
    let before = scene.bytes_from_pods();
    let unread = Client::http1(scene.app.address)
        .await
        .send(get(SIDE, "/bytes/1073741824"))
        .await;
    // It has begun to pile up.
    eventually("the download", || scene.bytes_from_pods() - before > 1 << 20).await;
    assert_others_go_on(scene.app.address, FEW_LATE).await;
    drop(unread);
}

#[tokio::test]
async fn no_request_takes_a_connection_that_a_transfer_holds_up_while_there_may_be_another() {
    const CROWD: usize = 32;
    // The session gives up no reader before the requests are answered, or given up.
    let flags = [
        (&setting::PORT_FORWARD, "spdy"),
        (&setting::SLOW_READER_TIMEOUT, "10m"),
    ];
    let scene = scene_with(&flags).await;
    let unread = Client::http1(scene.app.address)
        .await
        .send(get(WEB, "/bytes/1073741824"))
        .await;
    until_stalled(4 << 20, || scene.bytes_from_pods()).await;
    let mut requests = JoinSet::new();
    for _ in 0..CROWD {
        let address = scene.app.address;
        requests
            .spawn(async move { tokio::time::timeout(PATIENCE, fetch(address, WEB, "/slow?ms=5")).await });
    }
    for reply in requests.join_all().await {
        assert_eq!(reply.expect("held up").status, StatusCode::OK);
    }
    drop(unread);
}

#[tokio::test]
async fn others_go_on_beside_an_application_that_does_not_read() {
    // Requests that already wait behind it are sent again some seconds later.
    let scene = scene("spdy").await;
    scene.break_side(ForwardFault::NotReading);
    let before = scene.cluster.forwards().counts().bytes_to_pods;
    let mut client = Client::http1(scene.app.address).await;
    let upload = tokio::spawn(async move {
        let request = Request::post("/upload")
            .header("host", SIDE)
            .body(Full::from(Bytes::from(vec![0; LARGE])))
            .unwrap();
        client.send(request).await.into_body().collect().await
    });
    let forwards = scene.cluster.forwards();
    forwards
        .until(|counts| counts.bytes_to_pods - before > STALLED_SOCKET as u64)
        .await;
    assert_others_go_on(scene.app.address, FIRST_LATE).await;
    // Once it reads again, it gets everything.
    assert!(!upload.is_finished());
    scene.cluster.faults().clear();
    let answer = tokio::time::timeout(PATIENCE, upload).await.unwrap();
    let answer = answer.unwrap().unwrap().to_bytes();
    assert_eq!(answer, format!("{{\"bytes\":{LARGE}}}\n"));
}

#[tokio::test]
async fn others_go_on_beside_bulk_transfers() {
    let scene = scene("auto").await;
    let mut download = Client::http1(scene.app.address)
        .await
        .send(get(SIDE, "/bytes/1099511627776"))
        .await;
    let reading = tokio::spawn(async move { while let Some(Ok(_)) = download.frame().await {} });
    assert_others_go_on(scene.app.address, FEW_LATE).await;
    assert!(!reading.is_finished(), "there was nothing beside them");
    reading.abort();
}

/// Posts go to a port that fails each of its connections, with early data on the way.
async fn assert_others_go_on_beside(runtime: ContainerRuntime, fault: Option<ForwardFault>) {
    let scene = scene("auto").await;
    scene.cluster.set_runtime(runtime);
    scene.cluster.faults().set_close_grace(Duration::from_millis(20));
    let pod = &scene.workload.pods[0].name;
    scene
        .cluster
        .faults()
        .set_port_forward("shop", pod, NOBODY_PORT, fault);
    let failures = async {
        for _ in 0..10 {
            let reply = submit(scene.app.address, NOBODY, "/").await;
            assert_eq!(
                reply.status,
                StatusCode::BAD_GATEWAY,
                "{runtime:?}: {}",
                reply.text()
            );
        }
    };
    tokio::join!(failures, assert_others_go_on(scene.app.address, FEW_LATE));
    let upgrades = scene.cluster.forwards().counts().upgrades(Carrier::Spdy);
    assert!(upgrades <= 2 * FEW, "{runtime:?}: {upgrades} sessions");
}

#[tokio::test]
async fn others_go_on_beside_connections_that_are_refused_with_data_on_the_way() {
    for runtime in RUNTIMES {
        assert_others_go_on_beside(runtime, None).await;
    }
}

#[tokio::test]
async fn others_go_on_beside_connections_that_are_reset() {
    for runtime in RUNTIMES {
        assert_others_go_on_beside(runtime, Some(ForwardFault::Reset)).await;
    }
}
