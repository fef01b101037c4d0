//! What a load loses, and for how long, when a process of the cluster is killed.

use std::collections::BTreeSet;
use std::process::Command;

use tokio::time::{Duration, Instant};

use crate::client::fetch;
use crate::command::{eventually, run};
use crate::load::{Load, Tally};
use crate::outage::{Ended, api_server_is_back, api_server_is_ready, kubelet_is_healthy};
use crate::program::Proxy;
use crate::rolling::Rolling;
use crate::scene::Scene;

/// Longer than anything may take to work again by itself.
const HEALED: Duration = Duration::from_secs(15);

/// Returns when the last request failed, from `since` on.
fn failed_for(tally: &Tally, since: Instant) -> Duration {
    let last = tally.failures.iter().map(|failure| failure.ended).max();
    last.map_or(Duration::ZERO, |last| last - since)
}

/// Kills the server of a pod, as a process of this machine.
async fn kill_server(rolling: &Rolling, pod: &str) {
    let path = "jsonpath={.metadata.uid}";
    let uid = rolling
        .namespace
        .kubectl(&["get", "pod", pod, "-o", path])
        .await
        .succeeded();
    let of_pod = |process: &std::path::Path| {
        let read = |file| std::fs::read_to_string(process.join(file)).unwrap_or_default();
        read("comm").trim() == "server" && read("cgroup").contains(uid.trim())
    };
    let processes = std::fs::read_dir("/proc")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let found: Vec<_> = processes.filter(|process| of_pod(process)).collect();
    assert_eq!(found.len(), 1, "the server of {pod}: {found:?}");
    let number = found[0].file_name().unwrap().to_str().unwrap();
    let killed = Command::new("kill").args(["-KILL", number]).status();
    assert!(killed.unwrap().success());
}

/// Waits until that many pods of `rolling` have answered.
async fn all_answer(rolling: &Rolling, proxy: &Proxy, count: usize) {
    rolling.namespace.ready_endpoints("rolling", count).await;
    let mut seen = BTreeSet::new();
    eventually("every pod to answer", async || {
        let reply = fetch(proxy.address, &rolling.host, "/health").await;
        if reply.status == 200 {
            seen.insert(reply.pod());
        }
        seen.len() == count
    })
    .await;
}

#[tokio::test]
async fn a_killed_server_costs_only_what_had_reached_it() {
    let _scene = Scene::alone().await;
    let rolling = Rolling::create("killed", 3).await;
    let proxy = Proxy::start().await;
    let load = Load::start(proxy.address, &rolling.host);
    let pods = rolling.namespace.pods("rolling").await;
    for pod in &pods {
        kill_server(&rolling, pod).await;
        let path = "jsonpath={.status.containerStatuses[0].restartCount}";
        eventually("the container to start again", async || {
            let restarts = rolling.namespace.kubectl(&["get", "pod", pod, "-o", path]).await;
            restarts.succeeded().trim() == "1"
        })
        .await;
        all_answer(&rolling, &proxy, pods.len()).await;
    }
    let tally = load.stop().await;
    let scenario = format!("`kill -9` of {} servers, one by one", pods.len());
    rolling.report(&proxy, &scenario, &tally).await;
    tally.lost_only_what_was_sent();
}

/// Ends a component under load, starts it again, and looks at how long requests failed.
async fn outage(how: &str, name: &'static str, healthy: impl AsyncFnMut() -> bool) {
    let rolling = Rolling::create(&format!("{how}-{name}"), 3).await;
    let proxy = Proxy::start().await;
    all_answer(&rolling, &proxy, 3).await;
    let load = Load::start(proxy.address, &rolling.host);
    load.another_thousand().await;

    let killed = Instant::now();
    let ended = Ended::end(how, name).await;
    // One that says goodbye goes on for a while.
    let gone = killed.elapsed();
    ended.start().await;
    eventually(name, healthy).await;
    let back = killed.elapsed();
    all_answer(&rolling, &proxy, 3).await;
    load.another_thousand().await;

    let tally = load.stop().await;
    let failed = failed_for(&tally, killed);
    let scenario = format!(
        "`component {how} {name}`, healthy again after {} ms; requests failed until {} ms after it",
        back.as_millis(),
        failed.as_millis()
    );
    rolling.report(&proxy, &scenario, &tally).await;
    tally.lost_only_what_was_sent();
    let failed = failed.saturating_sub(gone);
    assert!(failed < HEALED, "requests failed for {failed:?}");
    let gap = tally.longest_gap();
    assert!(gap < HEALED, "no answer for {gap:?}");
}

#[tokio::test]
async fn a_load_survives_the_kubelet() {
    let _scene = Scene::alone().await;
    let path = "jsonpath={.items[0].metadata.name}";
    let node = run("kubectl", &["get", "nodes", "-o", path]).await.succeeded();
    outage("kill", "kubelet", async || kubelet_is_healthy(&node).await).await;
}

#[tokio::test]
async fn a_load_survives_the_api_server() {
    let _scene = Scene::alone().await;
    outage("kill", "kube-apiserver", api_server_is_ready).await;
    api_server_is_back().await;
}

#[tokio::test]
async fn a_load_survives_an_api_server_that_says_goodbye() {
    let _scene = Scene::alone().await;
    outage("stop", "kube-apiserver", api_server_is_ready).await;
    api_server_is_back().await;
}
