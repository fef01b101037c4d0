//! How connections end, with each container runtime.

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use kube_tunnel::config::setting;
use kube_tunnel::testing::{ContainerRuntime, FakeCluster, ForwardFault};

use crate::app::{PATIENCE, TestApp};
use crate::backends::{behind, scripted};
use crate::client::{Client, fetch, get};
use crate::transport::{NOBODY, RUNTIMES, SIDE, SIDE_PORT, WEB, pod, submit};

/// Runs a test with each of some runtimes, over SPDY and in the tunnel.
async fn with_each(runtimes: &[ContainerRuntime], test: impl AsyncFn(FakeCluster, String, &'static str)) {
    for &runtime in runtimes {
        for form in ["spdy", "tunnel"] {
            let cluster = FakeCluster::start().await.unwrap();
            cluster.set_runtime(runtime);
            test(cluster, format!("{runtime:?} {form}"), form).await;
        }
    }
}

/// Starts without retries.
async fn start(cluster: &FakeCluster, form: &str) -> TestApp {
    let flags = [(&setting::PORT_FORWARD, form), (&setting::MAX_RETRIES, "0")];
    TestApp::with(&cluster.kubeconfig(), &flags).await
}

#[tokio::test]
async fn a_refused_port_is_a_502_that_says_so() {
    with_each(&RUNTIMES, async |cluster, how, form| {
        let _workload = pod(&cluster);
        let app = start(&cluster, form).await;
        for _ in 0..2 {
            let reply = submit(app.address, NOBODY, "/").await;
            assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{how}");
            let words = ["connection refused", "check that a container listens"];
            assert!(
                words.iter().all(|words| reply.text().contains(words)),
                "{how}: {}",
                reply.text()
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_port_that_resets_is_a_502_that_says_so() {
    with_each(&RUNTIMES, async |cluster, how, form| {
        let workload = pod(&cluster);
        let fault = Some(ForwardFault::Reset);
        let name = &workload.pods[0].name;
        cluster.faults().set_port_forward("shop", name, SIDE_PORT, fault);
        let app = start(&cluster, form).await;
        let reply = submit(app.address, SIDE, "/").await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{how}");
        assert!(
            reply.text().contains("reset") && reply.text().contains("closed before it answered"),
            "{how}: {}",
            reply.text()
        );
    })
    .await;
}

#[tokio::test]
async fn a_response_that_ends_with_the_connection_is_complete() {
    // kwok tells of no end before we have ended our half, and no server waits for that.
    let telling: Vec<_> = RUNTIMES
        .into_iter()
        .filter(|&runtime| runtime != ContainerRuntime::Kwok)
        .collect();
    with_each(&telling, async |cluster, how, form| {
        let (address, _) = scripted(b"HTTP/1.1 200 OK\r\n\r\nuntil the end").await;
        let _workload = behind(&cluster, address);
        let app = start(&cluster, form).await;
        let reply = tokio::time::timeout(PATIENCE, fetch(app.address, WEB, "/")).await;
        assert_eq!(reply.expect(&how).text(), "until the end", "{how}");
    })
    .await;
}

#[tokio::test]
async fn a_response_with_a_length_does_not_wait_for_the_late_end_of_its_connection() {
    with_each(&RUNTIMES, async |cluster, how, form| {
        // The end comes much later than any bound of this test.
        cluster.faults().set_close_grace(Duration::from_hours(1));
        let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
        let (address, _) = scripted(answer).await;
        let _workload = behind(&cluster, address);
        let app = start(&cluster, form).await;
        for _ in 0..3 {
            let reply = tokio::time::timeout(PATIENCE, fetch(app.address, WEB, "/")).await;
            assert_eq!(reply.expect(&how).text(), "ok", "{how}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_response_whose_session_breaks_is_not_complete() {
    with_each(&RUNTIMES, async |cluster, how, form| {
        let (address, _) = scripted(b"HTTP/1.1 200 OK\r\n\r\nuntil the end").await;
        cluster.faults().set_close_grace(Duration::from_hours(1));
        let workload = behind(&cluster, address);
        let app = start(&cluster, form).await;
        let mut response = Client::http1(app.address).await.send(get(WEB, "/")).await;
        response.body_mut().frame().await.unwrap().unwrap();
        cluster.forwards().kill_sessions("shop", &workload.pods[0].name);
        let rest = tokio::time::timeout(PATIENCE, response.into_body().collect()).await;
        assert!(
            rest.expect(&how).is_err(),
            "{how}: half a response looked complete"
        );
    })
    .await;
}
