//! Restarts of the container runtime: those of its sessions that the API server tells of, and those that fall silent.

use kube_tunnel::k8s::Carriers;
use kube_tunnel::transport::BoxStream;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::time::{Duration, Instant};

use crate::client::fetch;
use crate::command::{eventually, within};
use crate::forward::{EACH, Forward, echoes};
use crate::note::note;
use crate::outage::{Ended, Frozen};
use crate::program::Proxy;
use crate::scene::Scene;

/// When a session that has died without a word is known to be dead, and when one that is in use.
const IDLE: Duration = Duration::from_secs(15);
const ACTIVE: Duration = Duration::from_secs(6);

/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(1);

/// Longer than anything may take to work again by itself.
const HEALED: Duration = Duration::from_secs(60);

/// Waits until new connections work.
async fn heals(forward: &Forward) -> Duration {
    let began = Instant::now();
    within(HEALED, "new connections to work", async {
        eventually("a new connection", async || match forward.connect(9000).await {
            Ok(mut stream) => echoes(&mut stream).await,
            Err(_) => false,
        })
        .await;
    })
    .await;
    began.elapsed()
}

/// Waits until it is known that two connections are dead, of which one is in use. Returns how long that takes for each.
async fn ends(waiting: &mut BoxStream, asking: &mut BoxStream) -> (Duration, Duration) {
    let began = Instant::now();
    let told = async {
        within(
            IDLE + SLACK,
            "the idle connection's end",
            waiting.read(&mut [0; 8]),
        )
        .await
        .unwrap_err();
        began.elapsed()
    };
    let told_in_use = async {
        drop(asking.write_all(b"x").await);
        within(
            ACTIVE + SLACK,
            "the busy connection's end",
            asking.read(&mut [0; 8]),
        )
        .await
        .unwrap_err();
        began.elapsed()
    };
    tokio::join!(told, told_in_use)
}

/// A connection with a session of its own, so that what is asked of another is no sign of life for it.
async fn connected(scene: &Scene, carriers: Carriers) -> (Forward, BoxStream) {
    let forward = Forward::start(scene.shop, carriers).await;
    let stream = forward.echoes(1).await.remove(0);
    (forward, stream)
}

async fn restart(carriers: Carriers, idle: Duration, active: Duration) {
    let scene = Scene::alone().await;
    let (quiet, mut waiting) = connected(&scene, carriers).await;
    let (busy, mut asking) = connected(&scene, carriers).await;

    Ended::kill("containerd").await.start().await;
    let (told, told_in_use) = ends(&mut waiting, &mut asking).await;
    note(&format!(
        "{carriers:?}: containerd restarted; known after {} ms, in use after {} ms; new connections after {} ms more",
        told.as_millis(),
        told_in_use.as_millis(),
        heals(&quiet).await.as_millis()
    ));
    assert!(told <= idle + SLACK && told_in_use <= active + SLACK);
    heals(&busy).await;
}

#[tokio::test]
async fn a_restart_of_the_runtime_ends_direct_sessions_at_once() {
    restart(Carriers::Spdy, Duration::from_secs(1), Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_tunnel_that_dies_in_silence_is_noticed_and_replaced() {
    restart(Carriers::Tunnel, IDLE, ACTIVE).await;
}

#[tokio::test]
async fn a_restart_of_the_runtime_ends_channels_in_time() {
    restart(Carriers::Channel, IDLE, ACTIVE).await;
}

#[tokio::test]
async fn a_runtime_that_stands_still_is_noticed_in_every_form() {
    let scene = Scene::alone().await;
    for carriers in EACH {
        let (quiet, mut waiting) = connected(&scene, carriers).await;
        let (busy, mut asking) = connected(&scene, carriers).await;
        let frozen = Frozen::freeze("containerd").await;
        let (told, told_in_use) = ends(&mut waiting, &mut asking).await;
        drop(frozen);
        let healed = heals(&quiet).await;
        note(&format!(
            "{carriers:?}: containerd stands still; known after {} ms, in use after {} ms; new connections {} ms after it goes on",
            told.as_millis(),
            told_in_use.as_millis(),
            healed.as_millis()
        ));
        heals(&busy).await;
    }
}

#[tokio::test]
async fn the_program_finds_its_way_back_after_a_restart_of_the_runtime() {
    let scene = Scene::alone().await;
    for form in ["spdy", "tunnel", "channel"] {
        let proxy = Proxy::with(&[&format!("--port-forward={form}")]).await;
        let host = scene.shop.host("web");
        fetch(proxy.address, &host, "/health").await.pod();
        Ended::kill("containerd").await.start().await;
        let began = Instant::now();
        within(HEALED, "an answer", async {
            eventually("an answer", async || {
                fetch(proxy.address, &host, "/health").await.status == 200
            })
            .await;
        })
        .await;
        note(&format!(
            "--port-forward={form}: containerd restarted; an answer after {} ms",
            began.elapsed().as_millis()
        ));
    }
}
