//! How long after a disturbance each contestant answers again, all of them in the same one.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::process::Command;
use tokio::time::{Instant, interval, sleep, timeout};

use crate::contestant::{Contestant, Running};
use crate::delay::Delayed;
use crate::load::{Ask, Line, lines};
use crate::report::{Figures, Measure};
use crate::{POD, Settings};

/// How long what was disturbed may take to be ready again, and a contestant to answer after that.
const LIMIT: Duration = Duration::from_secs(60);

/// The pause between two looks at what was disturbed.
const PAUSE: Duration = Duration::from_millis(50);

/// How often an attempt is made, whatever becomes of those before it, and how long one may take.
const PERIOD: Duration = Duration::from_millis(100);
const ATTEMPT: Duration = Duration::from_secs(20);

/// The component that is restarted.
const API_SERVER: &str = "kube-apiserver";

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Disturbance {
    /// The API server is killed and started again.
    Restart,
    /// The pod is deleted, and its StatefulSet makes another one of its name.
    Replacement,
    /// The connections to the API server pass nothing any more, and do not end; new ones are sound.
    BlackHole,
}

/// Returns the seconds from where an answer is possible again to an answer, for each contestant by its place.
pub(crate) async fn run(
    disturbance: Disturbance,
    contestants: &[Contestant],
    settings: &Settings,
) -> Result<Vec<(usize, Figures)>> {
    let way = match disturbance {
        Disturbance::BlackHole => Some(Delayed::start(Duration::ZERO)?),
        Disturbance::Restart | Disturbance::Replacement => None,
    };
    let kubeconfig = way.as_ref().map(Delayed::kubeconfig);
    let mut running = Vec::new();
    for contestant in contestants {
        let started = contestant
            .start(&settings.namespace, &[8080], kubeconfig.as_deref())
            .await?;
        drop(lines(started.address(0), &Ask::get(&started.host, true), 1).await?);
        running.push(started);
    }
    let old = pod(&settings.namespace).await?;
    match disturbance {
        Disturbance::Restart => component("kill", API_SERVER).await?,
        Disturbance::Replacement => {
            // A restart of the API server may end it ("Scheduler cache is corrupted"), and no kubelet starts it again here.
            component("start", "kube-scheduler").await?;
            delete(&settings.namespace, &old).await?;
        }
        Disturbance::BlackHole => way.iter().for_each(Delayed::swallow),
    }
    let down = Instant::now();
    let possible = async {
        match disturbance {
            Disturbance::Restart => {
                component("start", API_SERVER).await?;
                until(down, "the API server", ready).await?;
            }
            Disturbance::Replacement => {
                let other = || async {
                    let pod = pod(&settings.namespace).await;
                    pod.is_ok_and(|pod| pod.uid != old.uid && pod.ready)
                };
                until(down, "the pod", other).await?;
            }
            Disturbance::BlackHole => {}
        }
        Ok::<_, anyhow::Error>(Instant::now())
    };
    let answers = join_all(running.iter_mut().map(|one| answered(one, down)));
    let (possible, answers) = tokio::join!(possible, answers);
    let possible = possible?;
    let seconds = |answer: Option<Instant>| {
        answer.map_or(f64::INFINITY, |at| {
            at.saturating_duration_since(possible).as_secs_f64()
        })
    };
    let figures = |answer| vec![(Measure::Recovery, seconds(answer))];
    Ok(answers.into_iter().map(figures).enumerate().collect())
}

async fn until<F: Future<Output = bool>>(since: Instant, what: &str, ready: impl Fn() -> F) -> Result<()> {
    while !ready().await {
        ensure!(since.elapsed() < LIMIT, "{what} did not come back");
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Waits for the first answer over a new connection; a program that has ended never answers.
async fn answered(running: &mut Running, down: Instant) -> Option<Instant> {
    let ask = Ask::get(&running.host, false);
    let address = running.address(0);
    let attempt = || async {
        let mut line = Line::new(address, &ask);
        matches!(timeout(ATTEMPT, line.exchange()).await, Ok(Ok(_)))
    };
    let mut attempts = FuturesUnordered::new();
    let mut next = interval(PERIOD);
    loop {
        tokio::select! {
            Some(answered) = attempts.next() => {
                if answered {
                    return Some(Instant::now());
                }
            }
            _ = next.tick() => {
                if down.elapsed() >= 2 * LIMIT || running.ended() {
                    return None;
                }
                attempts.push(attempt());
            }
        }
    }
}

async fn component(verb: &str, name: &str) -> Result<()> {
    let status = Command::new("tests/cluster/component")
        .args([verb, name])
        .status()
        .await
        .context("tests/cluster/component")?;
    ensure!(status.success(), "component {verb} {name} failed");
    Ok(())
}

async fn ready() -> bool {
    kubectl(&["get", "--raw=/readyz"]).await.is_ok()
}

/// The pod that all contestants reach.
struct Pod {
    uid: String,
    ready: bool,
}

async fn pod(namespace: &str) -> Result<Pod> {
    let fields = "jsonpath={.metadata.uid} {.status.containerStatuses[0].ready}";
    let output = kubectl(&["-n", namespace, "get", "pod", POD, "-o", fields]).await?;
    let text = String::from_utf8(output.stdout)?;
    let (uid, ready) = text.split_once(' ').context("a pod without status")?;
    Ok(Pod {
        uid: uid.to_owned(),
        ready: ready == "true",
    })
}

/// Deletes the pod, and waits until nothing of it can answer any more.
async fn delete(namespace: &str, pod: &Pod) -> Result<()> {
    ensure!(pod.ready, "{POD} is not ready");
    kubectl(&["-n", namespace, "delete", "pod", POD, "--grace-period=1"]).await?;
    Ok(())
}

async fn kubectl(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new("kubectl");
    let output = command.args(arguments).output().await?;
    ensure!(
        output.status.success(),
        "kubectl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}
