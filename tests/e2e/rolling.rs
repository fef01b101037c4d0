//! Rollouts under load: nothing that may be sent again is lost, and nothing else is sent twice.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::client::{Client, Protocol, fetch};
use crate::cluster::Namespace;
use crate::command::eventually;
use crate::load::{Load, Tally};
use crate::note::note;
use crate::program::Proxy;
use crate::rpc::{self, Bidi};
use crate::scene::Scene;

const ROLLING: &str = include_str!("../cluster/manifests/rolling.yaml");
const LEDGER: &str = include_str!("../cluster/manifests/ledger.yaml");

/// The line that holds a pod back from its end until endpoints have followed.
const LIFECYCLE: &str = "          lifecycle: {preStop: {sleep: {seconds: PAUSE}}}\n";

/// How long each load lasts at least, in seconds.
const SECONDS: &str = "KUBE_TUNNEL_SOAK_SECONDS";
const SHORT: Duration = Duration::from_secs(20);

/// How many failures a report shows.
const SHOWN: usize = 4;

/// How long this run's loads last.
fn lasting() -> Duration {
    std::env::var(SECONDS).map_or(SHORT, |text| Duration::from_secs(text.parse().unwrap()))
}

/// Three replicas of `rolling`, and the ledger that they report to.
pub(crate) struct Rolling {
    pub(crate) namespace: Namespace,
    pub(crate) host: String,
}

impl Rolling {
    /// Makes them, with a pause of so many seconds before a pod ends, or without one.
    pub(crate) async fn create(purpose: &str, pause: u32) -> Self {
        let namespace = Namespace::create(purpose).await;
        namespace.apply(LEDGER).await;
        namespace.rolled_out("deployment/ledger").await;
        let path = "jsonpath={.items[0].status.podIP}";
        let address = namespace
            .kubectl(&["get", "pods", "-l", "app=ledger", "-o", path])
            .await
            .succeeded();
        let workload = ROLLING.replace("LEDGER_ADDRESS", address.trim());
        let workload = match pause {
            0 => workload.replace(LIFECYCLE, ""),
            seconds => workload.replace("PAUSE", &seconds.to_string()),
        };
        namespace.apply(&workload).await;
        namespace.rolled_out("deployment/rolling").await;
        namespace.ready_endpoints("rolling", 3).await;
        let host = namespace.host("rolling");
        Self { namespace, host }
    }

    /// Replaces all pods.
    pub(crate) async fn restart(&self) {
        self.namespace
            .kubectl(&["rollout", "restart", "deployment/rolling"])
            .await
            .succeeded();
        self.namespace.rolled_out("deployment/rolling").await;
    }

    /// Asks the ledger.
    pub(crate) async fn ledger(&self, proxy: &Proxy, path: &str) -> Value {
        fetch(
            proxy.address,
            &self.namespace.host("ledger"),
            &format!("/ledger{path}"),
        )
        .await
        .json()
    }

    /// Says what became of a load as a row of `docs/resilience.md`, and checks what must hold whatever happened: no id came
    /// twice.
    pub(crate) async fn report(&self, proxy: &Proxy, scenario: &str, tally: &Tally) {
        let mut counted = 0;
        for failure in tally.unsafe_ones() {
            if self.ledger(proxy, &format!("/{}", failure.id)).await == 1 {
                counted += 1;
            }
        }
        for failure in tally
            .failures
            .iter()
            .step_by(tally.failures.len().div_ceil(SHOWN).max(1))
        {
            note(&format!("{} {}: {}", failure.method, failure.id, failure.words));
        }
        let (safe, others) = (tally.idempotent().count(), tally.unsafe_ones().count());
        note(&format!(
            "| {scenario} | {} | {safe} | {others} ({counted} of them counted by a pod) | {} ms | {} ms |",
            tally.requests(),
            tally.longest_gap().as_millis(),
            tally.slowest.as_millis()
        ));
        let ledger = self.ledger(proxy, "").await;
        assert_eq!(ledger["repeated"], serde_json::json!([]), "sent twice");
        assert!(ledger["ids"].as_u64().unwrap() > 0, "{ledger}");
    }
}

/// Restarts all pods again and again under load.
async fn roll(purpose: &str, pause: u32) -> Tally {
    let rolling = Rolling::create(purpose, pause).await;
    let proxy = Proxy::start().await;
    let load = Load::start(proxy.address, &rolling.host);
    let started = Instant::now();
    let mut rollouts = 0;
    while started.elapsed() < lasting() {
        rolling.restart().await;
        rollouts += 1;
    }
    let seconds = started.elapsed().as_secs();
    let tally = load.stop().await;
    let scenario = format!("{rollouts} rollouts in {seconds} s, {purpose}");
    rolling.report(&proxy, &scenario, &tally).await;
    tally
}

#[tokio::test]
async fn rollouts_of_pods_that_pause_before_they_end_lose_no_request() {
    let _scene = Scene::alone().await;
    let tally = roll("with-prestop", 3).await;
    assert!(tally.failures.is_empty(), "{:#?}", tally.failures);
}

#[tokio::test]
async fn rollouts_of_pods_that_end_at_once_lose_only_what_was_sent_to_them() {
    let _scene = Scene::alone().await;
    let tally = roll("without-prestop", 0).await;
    tally.lost_only_what_was_sent();
}

#[tokio::test]
async fn a_grpc_connection_follows_the_pods() {
    let _scene = Scene::together().await;
    // Long enough for all that follows.
    let rolling = Rolling::create("grpc", 20).await;
    let namespace = &rolling.namespace;
    let scale = async |count: usize| {
        let replicas = format!("--replicas={count}");
        namespace
            .kubectl(&["scale", "deployment/rolling", &replicas])
            .await
            .succeeded();
        namespace.ready_endpoints("rolling", count).await;
    };
    let proxy = Proxy::start().await;
    let host = format!("{}:50051", rolling.host);
    let mut client = Client::connect(proxy.address, Protocol::H2c).await.unwrap();
    rpc::unary(&mut client, &host).await.unwrap();

    scale(4).await;
    let mut seen = BTreeSet::new();
    eventually("the new pod to be called on the old connection", async || {
        seen.insert(rpc::unary(&mut client, &host).await.unwrap());
        seen.len() == 4
    })
    .await;

    let mut stream = Bidi::open(&mut client, &host).await.unwrap();
    let leaving = stream.pod.clone();
    namespace
        .kubectl(&["delete", "pod", &leaving, "--wait=false"])
        .await
        .succeeded();
    eventually("another pod in its place", async || {
        let pod = rpc::unary(&mut client, &host).await.unwrap();
        pod != leaving && !seen.contains(&pod)
    })
    .await;
    for _ in 0..20 {
        assert_ne!(rpc::unary(&mut client, &host).await.unwrap(), leaving);
    }
    // It drains: what it had begun goes on.
    stream.again().await.unwrap();
    stream.close().await.unwrap();
}
