//! Peers that stop reading for a while: they are waited for, not cut. That nothing happens takes its time to show.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::BodyExt;
use tokio::task::JoinSet;
use tokio::time::Duration;

use crate::client::{Client, PROTOCOLS, get};
use crate::command::eventually;
use crate::large::{CHUNK, SIZE, upload};
use crate::program::Proxy;
use crate::scene::Scene;

/// Longer than any time after which a connection counts as dead.
const PAUSE: Duration = Duration::from_secs(25);

#[tokio::test]
async fn an_upload_waits_for_a_pod_that_does_not_read() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = format!("{}:9002", scene.shop.host("multi"));
    let (mut uploads, mut all_taken) = (JoinSet::new(), Vec::new());
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let taken = Arc::<AtomicUsize>::default();
        let request = upload(&host, SIZE, taken.clone());
        all_taken.push(taken);
        uploads.spawn(async move {
            let response = client.send(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            anyhow::Ok(format!(
                "{protocol:?}: {status} {}",
                String::from_utf8_lossy(&body)
            ))
        });
    }
    eventually("every upload to begin", async || {
        let has_begun = |taken: &Arc<AtomicUsize>| taken.load(Ordering::Relaxed) > CHUNK;
        all_taken.iter().all(has_begun)
    })
    .await;
    if let Ok(ended) = tokio::time::timeout(PAUSE, uploads.join_next()).await {
        panic!("the pod reads nothing and closes nothing, but the upload ended: {ended:?}");
    }
}

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
