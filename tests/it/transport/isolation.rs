//! That no connection to a pod disturbs another, whatever happens to it (contract G4). Each test opens connections that share
//! sessions before the trouble starts.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use kube_tunnel::config::setting;
use kube_tunnel::testing::{Carrier, ContainerRuntime, FakeCluster, ForwardFault, STALLED_SOCKET, Workload};

use crate::app::{PATIENCE, TestApp, eventually};
use crate::client::{Client, get};
use crate::transport::{
    FEW, NOBODY, NOBODY_PORT, RUNTIMES, SIDE, SIDE_PORT, WEB, assert_others_go_on, pod, submit, warm_up,
};

/// More than all buffers on the way to a pod and the queues of the peer's workers hold.
const LARGE: usize = 32 << 20;

struct Scene {
    cluster: FakeCluster,
    workload: Workload,
    app: TestApp,
}

/// A pod with idle connections to both of its ports, more on a session than the peer has workers.
async fn scene(form: &str) -> Scene {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = pod(&cluster);
    let flags = [(&setting::PORT_FORWARD, form)];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    tokio::join!(warm_up(app.address, WEB, 8), warm_up(app.address, SIDE, 8));
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

#[tokio::test]
async fn others_go_on_beside_a_client_that_does_not_read() {
    let scene = scene("tunnel").await;
    let before = scene.bytes_from_pods();
    let unread = Client::http1(scene.app.address)
        .await
        .send(get(SIDE, "/bytes/1073741824"))
        .await;
    // It has begun to pile up.
    eventually("the download", || scene.bytes_from_pods() - before > 1 << 20).await;
    assert_others_go_on(scene.app.address).await;
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
    assert_others_go_on(scene.app.address).await;
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
    assert_others_go_on(scene.app.address).await;
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
    tokio::join!(failures, assert_others_go_on(scene.app.address));
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
