//! How long after a restart of the API server each contestant answers again, all of them in the same restart.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::Settings;
use crate::contestant::{Contestant, Running};
use crate::load::{Ask, Line, lines};
use crate::report::{Figures, Measure};

/// How long the API server may take to be ready again, and a contestant to answer after that.
const LIMIT: Duration = Duration::from_secs(60);

/// The pause between attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// Returns the seconds from a ready API server to an answer, for each contestant by its place.
pub(crate) async fn run(contestants: &[Contestant], settings: &Settings) -> Result<Vec<(usize, Figures)>> {
    let mut running = Vec::new();
    for contestant in contestants {
        let started = contestant.start(&settings.namespace, &[8080], None).await?;
        drop(lines(started.address(0), &Ask::get(&started.host, true), 1).await?);
        running.push(started);
    }
    component("kill").await?;
    let down = Instant::now();
    let restart = async {
        component("start").await?;
        while !ready().await {
            ensure!(down.elapsed() < LIMIT, "the API server did not come back");
            sleep(PAUSE).await;
        }
        Ok(Instant::now())
    };
    let answers = join_all(running.iter_mut().map(|one| answered(one, down)));
    let (ready, answers) = tokio::join!(restart, answers);
    let ready = ready?;
    let seconds = |answer: Option<Instant>| {
        answer.map_or(f64::INFINITY, |at| {
            at.saturating_duration_since(ready).as_secs_f64()
        })
    };
    let figures = |answer| vec![(Measure::Recovery, seconds(answer))];
    Ok(answers.into_iter().map(figures).enumerate().collect())
}

/// Waits for the first answer over a new connection; a program that has ended never answers.
async fn answered(running: &mut Running, down: Instant) -> Option<Instant> {
    let ask = Ask::get(&running.host, false);
    while down.elapsed() < 2 * LIMIT && !running.ended() {
        let mut line = Line::new(running.address(0), &ask);
        if let Ok(Ok(_)) = timeout(ATTEMPT, line.exchange()).await {
            return Some(Instant::now());
        }
        sleep(PAUSE).await;
    }
    None
}

async fn component(verb: &str) -> Result<()> {
    let status = Command::new("tests/cluster/component")
        .args([verb, "kube-apiserver"])
        .status()
        .await
        .context("tests/cluster/component")?;
    ensure!(status.success(), "component {verb} failed");
    Ok(())
}

async fn ready() -> bool {
    let mut command = Command::new("kubectl");
    command.args(["get", "--raw=/readyz", "--request-timeout=2s"]);
    command.output().await.is_ok_and(|output| output.status.success())
}
