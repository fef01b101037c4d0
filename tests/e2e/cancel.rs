//! A client that leaves: the pod learns of it at once.

use std::net::SocketAddr;

use futures_util::{StreamExt, stream};

use crate::client::{Client, PROTOCOLS, Protocol, fetch, get};
use crate::command::eventually;
use crate::delay::{Delays, now};
use crate::program::Proxy;
use crate::scene::Scene;

/// How often it is measured for each pair of protocols, and how many of these at the same time.
const TIMES: usize = 50;
const AT_ONCE: usize = 5;

/// How late the pod may learn of it, in milliseconds: what is promised at rest, and what a busy machine may make of it.
const MEDIAN: f64 = 50.0;
const WORST: f64 = 1000.0;

/// For so long a container runtime keeps a connection whose client has left (containerd and cri-o alike): an HTTP/1.1
/// request is given up by closing its connection, and no message goes past the runtime.
const RUNTIME: f64 = 1000.0;

#[tokio::test]
async fn a_client_that_leaves_is_known_to_the_pod_at_once() {
    let scene = Scene::alone().await;
    let proxy = Proxy::start().await;
    // One pod, which can be asked afterwards.
    let pod = scene.shop.host("db-0.db");
    for (port, speaks, held) in [(8080, "HTTP/1.1", RUNTIME), (8082, "h2c", 0.0)] {
        let host = format!("{pod}:{port}");
        for protocol in PROTOCOLS {
            let leavings = stream::iter(0..TIMES).map(async |number| {
                let id = format!("{protocol:?}-{port}-{number}");
                leave(proxy.address, protocol, &host, &id).await
            });
            let mut delays = Delays::default();
            for (left, learned) in leavings.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await {
                delays.add(left, learned);
            }
            let (median, worst) =
                delays.report(&format!("leaving over {protocol:?} a pod that speaks {speaks}"));
            assert!(
                median < held + MEDIAN && worst < held + WORST,
                "{protocol:?} to {speaks}"
            );
        }
    }
}

/// Asks, leaves after the head of the answer, and returns when that was and when the pod learned of it.
async fn leave(proxy: SocketAddr, protocol: Protocol, host: &str, id: &str) -> (f64, f64) {
    let mut client = Client::connect(proxy, protocol).await.unwrap();
    let response = client.send(get(host, &format!("/hold/{id}"))).await.unwrap();
    assert_eq!(response.status(), 200);
    let left = now();
    drop(response);
    drop(client);
    let mut learned = None;
    eventually("the pod to learn of it", async || {
        let reply = fetch(proxy, host, &format!("/cancelled/{id}")).await;
        learned = (reply.status == 200).then(|| reply.json().as_f64().unwrap());
        learned.is_some()
    })
    .await;
    (left, learned.unwrap())
}
