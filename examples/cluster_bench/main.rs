//! Measures ways to reach a pod side by side, on the cluster of `KUBECONFIG`, and prints tables in Markdown: the driver of
//! `tests/cluster/bench`, which says what it needs and how it is called.
//!
//! One client for all contestants, in one thread: [`load`]. What runs beside a measurement has a thread of its own.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "its tables are its result"
)]

mod aside;
mod bulk;
mod cases;
mod contestant;
mod delay;
mod load;
mod memory;
mod pingpong;
mod profile;
mod recovery;
mod report;
mod targets;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use cases::{CASES, Case, Kind};
use contestant::Contestant;
use report::Results;

/// What the command line says.
#[derive(Debug)]
pub(crate) struct Settings {
    /// How often each case is measured with each contestant.
    rounds: usize,
    /// How long one measurement lasts.
    pub(crate) time: Duration,
    /// Parts of the names of the cases to run; all without one.
    filter: Vec<String>,
    /// Connections held open where memory is measured.
    pub(crate) many: usize,
    /// Programs that take `NAMESPACE POD PORT...` and print an address for each port.
    rivals: Vec<PathBuf>,
    /// Where the pod is.
    pub(crate) namespace: String,
}

/// The pod of `tests/cluster/manifests/base.yaml` that all contestants reach.
pub(crate) const POD: &str = "db-0";

fn main() -> Result<()> {
    let settings = settings()?;
    let mut contestants = vec![Contestant::Proxy, Contestant::Raw, Contestant::Kubectl];
    contestants.extend(settings.rivals.iter().cloned().map(Contestant::Rival));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let chosen = |case: &&Case| {
        settings.filter.is_empty()
            || settings
                .filter
                .iter()
                .any(|part| case.name.contains(part.as_str()))
    };
    let mut results = Results::new(&contestants);
    for case in CASES.iter().filter(chosen) {
        for round in 0..settings.rounds {
            runtime.block_on(run_round(case, round, &contestants, &settings, &mut results));
        }
    }
    println!("{results}");
    if results.is_empty() {
        bail!("no case was measured");
    }
    Ok(())
}

/// Measures a case once with each contestant. Another one begins each round: what drifts hits all alike.
async fn run_round(
    case: &'static Case,
    round: usize,
    contestants: &[Contestant],
    settings: &Settings,
    results: &mut Results,
) {
    eprintln!("{}, round {}", case.name, round + 1);
    if let Kind::Recovery(disturbance) = case.kind {
        match recovery::run(disturbance, contestants, settings).await {
            Ok(figures) => figures
                .into_iter()
                .for_each(|(which, figures)| results.add(case, round, which, figures)),
            Err(error) => results.fail(format!("{}: {error:#}", case.name)),
        }
        return;
    }
    let mut turns: Vec<_> = contestants.iter().enumerate().collect();
    turns.retain(|(_, contestant)| case.takes(contestant, settings));
    let first = round % turns.len().max(1);
    turns.rotate_left(first);
    // Nobody always follows the same one.
    if round % 2 == 1 {
        turns.reverse();
    }
    for (which, contestant) in turns {
        match cases::run(case, contestant, settings).await {
            Ok(figures) => results.add(case, round, which, figures),
            Err(error) => results.fail(format!("{} with {contestant}: {error:#}", case.name)),
        }
    }
}

fn settings() -> Result<Settings> {
    let mut settings = Settings {
        rounds: 3,
        time: Duration::from_secs(4),
        filter: Vec::new(),
        many: 1000,
        rivals: Vec::new(),
        namespace: std::env::var("BENCH_NAMESPACE").context("BENCH_NAMESPACE: use tests/cluster/bench")?,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "-r" => settings.rounds = value()?.parse().context("-r")?,
            "-s" => settings.time = Duration::from_secs_f64(value()?.parse().context("-s")?),
            "--cases" => settings.filter = value()?.split(',').map(str::to_owned).collect(),
            "--many" => settings.many = value()?.parse().context("--many")?,
            flag if flag.starts_with('-') => bail!("unknown flag {flag}"),
            path => settings.rivals.push(path.into()),
        }
    }
    Ok(settings)
}
