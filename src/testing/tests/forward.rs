//! Port-forwards over WebSocket channels.

use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Portforwarder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::scene::{self, CHANNEL};
use super::{admin, user, within};
use crate::testing::backend::Serve;
use crate::testing::{Carrier, FakeCluster, ForwardFault, Rule, Workload};

/// A cluster with one pod, and the API it is reached through.
struct Scene {
    cluster: FakeCluster,
    workload: Workload,
    pods: Api<Pod>,
}

impl Scene {
    async fn with(serve: Serve) -> Self {
        let cluster = FakeCluster::start().await.unwrap();
        cluster.faults().set_close_grace(Duration::from_millis(50));
        let workload = cluster
            .workload("shop", "db")
            .port("", 80, 5432)
            .serve(serve)
            .create()
            .unwrap();
        let pods = Api::namespaced(admin(&cluster).await, "shop");
        Self {
            cluster,
            workload,
            pods,
        }
    }

    fn pod(&self) -> &str {
        &self.workload.pods[0].name
    }

    async fn forward(&self) -> kube::Result<Portforwarder> {
        within(self.pods.portforward(self.pod(), &[5432])).await
    }

    fn break_with(&self, fault: ForwardFault) {
        self.cluster.faults().set_forward("shop", self.pod(), Some(fault));
    }
}

async fn error_text(forwarder: &mut Portforwarder) -> String {
    let error = forwarder.take_error(5432).unwrap();
    within(error).await.expect("no text on the error channel")
}

#[tokio::test]
async fn bytes_travel_to_the_pod_and_back() {
    let scene = Scene::with(Serve::Echo).await;
    let mut forwarder = scene.forward().await.unwrap();
    let (mut read, mut write) = tokio::io::split(forwarder.take_stream(5432).unwrap());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut received = vec![0; sent.len()];
    let (written, read) = tokio::join!(write.write_all(&sent), within(read.read_exact(&mut received)));
    written.unwrap();
    read.unwrap();
    assert!(sent == received);
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let scene = Scene::with(Serve::Greeting(Bytes::from_static(b"220 ready\r\n"))).await;
    let mut forwarder = scene.forward().await.unwrap();
    let mut greeting = [0; 11];
    within(forwarder.take_stream(5432).unwrap().read_exact(&mut greeting))
        .await
        .unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
}

#[tokio::test]
async fn a_refused_connection_is_reported_in_the_runtime_s_words() {
    let scene = Scene::with(Serve::Echo).await;
    scene.break_with(ForwardFault::Refused);
    let mut forwarder = scene.forward().await.unwrap();
    let text = error_text(&mut forwarder).await;
    assert!(text.starts_with("error forwarding port 5432 to pod "), "{text}");
    assert!(
        text.contains(", uid : failed to execute portforward in network namespace \""),
        "{text}"
    );
    assert!(
        text.contains("failed to connect to localhost:5432 inside namespace \""),
        "{text}"
    );
    assert!(
        text.contains("IPv4: dial tcp4 127.0.0.1:5432: connect: connection refused"),
        "{text}"
    );
}

#[tokio::test]
async fn a_port_nobody_listens_on_is_refused() {
    let mut scene = Scene::with(Serve::Echo).await;
    scene.workload.pods[0].backends.clear();
    let mut forwarder = scene.forward().await.unwrap();
    assert!(error_text(&mut forwarder).await.contains("connection refused"));
}

#[tokio::test]
async fn a_reset_comes_after_the_first_bytes() {
    let scene = Scene::with(Serve::Echo).await;
    scene.break_with(ForwardFault::Reset);
    let mut forwarder = scene.forward().await.unwrap();
    let mut stream = forwarder.take_stream(5432).unwrap();
    stream.write_all(b"hello").await.unwrap();
    assert!(
        error_text(&mut forwarder)
            .await
            .contains("connection reset by peer")
    );
}

#[tokio::test]
async fn a_stalled_pod_answers_nothing() {
    let scene = Scene::with(Serve::Echo).await;
    scene.break_with(ForwardFault::Stalled);
    let mut forwarder = scene.forward().await.unwrap();
    let mut stream = forwarder.take_stream(5432).unwrap();
    stream.write_all(b"hello").await.unwrap();
    let read = tokio::time::timeout(Duration::from_millis(200), stream.read_u8()).await;
    assert!(read.is_err());
}

#[tokio::test]
async fn upgrades_fail_with_the_status_asked_for() {
    let scene = Scene::with(Serve::Echo).await;
    let text = async || {
        scene
            .forward()
            .await
            .err()
            .expect("the upgrade worked")
            .to_string()
    };
    scene.break_with(ForwardFault::PodGone);
    assert!(text().await.contains("404"));
    scene.break_with(ForwardFault::Upgrade(http::StatusCode::INTERNAL_SERVER_ERROR));
    assert!(text().await.contains("500"));
    scene.cluster.faults().clear();
    scene.cluster.faults().refuse_carrier(Carrier::Channel, true);
    assert!(text().await.contains("403"));
    scene.cluster.faults().clear();
    scene.forward().await.unwrap();
}

#[tokio::test]
async fn an_upgrade_by_websocket_needs_the_verb_get() {
    let scene = Scene::with(Serve::Echo).await;
    scene
        .cluster
        .deny(Some("dev"), Rule::new(&["get"], &["pods/portforward"]));
    let pods: Api<Pod> = Api::namespaced(user(&scene.cluster, "dev").await, "shop");
    let error = within(pods.portforward(scene.pod(), &[5432]))
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("403"), "{error}");
    let calls = scene.cluster.calls();
    assert_eq!(calls.last().unwrap().subresource.as_deref(), Some("portforward"));
}

#[tokio::test]
async fn bytes_sent_before_the_101_are_lost() {
    let scene = scene::Scene::new().await;
    let (mut stream, head) = scene.raw("GET", &CHANNEL).await;
    let message = |text: &[u8; 4]| [&[0x82, 0x85, 0, 0, 0, 0, 0][..], text].concat();
    stream
        .write_all(&[head.as_bytes(), &message(b"soon")].concat())
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(within(stream.read_u8()).await.unwrap());
    }
    stream.write_all(&message(b"late")).await.unwrap();
    // The port on both channels, then what was echoed.
    let expected = b"\x82\x03\x00\x38\x15\x82\x03\x01\x38\x15\x82\x05\x00late";
    let mut received = vec![0; expected.len()];
    within(stream.read_exact(&mut received)).await.unwrap();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn more_ports_than_there_are_channels_for_are_refused() {
    let scene = scene::Scene::new().await;
    let pod = format!("/api/v1/namespaces/shop/pods/{}", scene.pod());
    for (ports, refused) in [(128, None), (129, Some(400))] {
        let ports = vec!["81"; ports].join(",");
        let path = format!("{pod}/portforward?ports={ports}");
        let answer = scene.upgrade_at(&path, &scene.client, "GET", &CHANNEL).await;
        assert_eq!(answer.err().map(|answer| answer.status().as_u16()), refused);
    }
}

#[tokio::test]
async fn nothing_but_pods_can_be_forwarded_to() {
    let scene = scene::Scene::new().await;
    let path = "/api/v1/namespaces/shop/services/db/portforward?ports=80";
    let answer = scene.upgrade_at(path, &scene.client, "GET", &CHANNEL).await;
    assert_eq!(answer.err().map(|answer| answer.status().as_u16()), Some(404));
}

#[tokio::test]
async fn a_restart_cuts_forwards() {
    let scene = Scene::with(Serve::Echo).await;
    let mut forwarder = scene.forward().await.unwrap();
    let mut stream = forwarder.take_stream(5432).unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(within(stream.read_u8()).await.unwrap(), b'x');
    scene.cluster.restart();
    assert!(within(stream.read_u8()).await.is_err());
}

#[tokio::test]
async fn a_replaced_pod_leads_where_the_old_one_did() {
    let scene = Scene::with(Serve::Echo).await;
    let new = scene.cluster.replace_pod("shop", scene.pod()).unwrap();
    assert!(scene.forward().await.is_err());
    let mut forwarder = within(scene.pods.portforward(&new, &[5432])).await.unwrap();
    let mut stream = forwarder.take_stream(5432).unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(within(stream.read_u8()).await.unwrap(), b'x');
}
