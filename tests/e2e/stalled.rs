//! Peers that stop reading for a while: they are waited for, not cut. That nothing happens takes its time to show.

use http_body_util::BodyExt;
use tokio::task::JoinSet;
use tokio::time::Duration;

use crate::client::{Client, PROTOCOLS, get};
use crate::program::Proxy;
use crate::scene::Scene;

/// Longer than any time after which a connection counts as dead.
const PAUSE: Duration = Duration::from_secs(25);

#[tokio::test]
async fn a_download_waits_for_a_client_that_does_not_read() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("web");
    let mut downloads = JoinSet::new();
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let size = 64 << 20;
        let response = client.send(get(&host, &format!("/bytes/{size}"))).await.unwrap();
        downloads.spawn(async move {
            tokio::time::sleep(PAUSE).await;
            let body = response.into_body().collect().await.unwrap().to_bytes();
            drop(client);
            assert_eq!(body.len(), size, "{protocol:?}");
        });
    }
    while let Some(download) = downloads.join_next().await {
        download.unwrap();
    }
}
