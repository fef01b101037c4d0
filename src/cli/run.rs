//! `kube-tunnel run`: the proxy against a real cluster, until a signal ends it.

use std::num::NonZero;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
#[cfg(unix)]
use tokio::signal::unix;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::config::Config;
use crate::files;
use crate::privileges::Privileges;
use crate::runtime;

/// Runs until SIGINT or SIGTERM and then drains; a second signal ends the process at once.
pub(super) fn run(config: &Config, privileges: Privileges) -> Result<ExitCode> {
    for origin in &config.pending {
        warn!("{origin} is accepted, but what it governs is not part of this version yet");
    }
    if config.cleanup {
        info!("nothing to undo: this version changes nothing in the operating system");
        return Ok(ExitCode::SUCCESS);
    }
    if config.dns_only {
        bail!("-dns-only: the DNS server is not part of this version yet, so there is nothing to run");
    }
    block_on(config.worker_threads, async {
        let mut signals = Signals::install()?;
        let Some(app) = start(config, privileges, &mut signals).await? else {
            return Ok(ExitCode::SUCCESS);
        };
        info!(
            "DNS, mDNS and the set-up of the system's DNS are not part of this version yet: send the service as the Host header"
        );
        until_stopped(app, signals).await
    })
}

/// Runs the program's one future on a runtime of its own.
pub(super) fn block_on<T>(
    threads: Option<NonZero<usize>>,
    future: impl Future<Output = Result<T>>,
) -> Result<T> {
    let runtime = runtime::build(threads).context("cannot start the runtime")?;
    let done = runtime.block_on(future);
    // Whatever is still running by now was told to end, or its user asked not to wait for it.
    runtime.shutdown_background();
    done
}

/// Binds the program, unless a signal comes first.
pub(super) async fn start(
    config: &Config,
    privileges: Privileges,
    signals: &mut Signals,
) -> Result<Option<App>> {
    let files = files::raise();
    debug!(files, "open files at most");
    tokio::select! {
        app = App::bind(config, privileges) => app.map(Some),
        signal = signals.next() => {
            info!(signal, "stopped before the start was complete");
            Ok(None)
        }
    }
}

/// Runs `app` until a first signal has made it drain, or a second one ends the wait for that.
pub(super) async fn until_stopped(app: App, mut signals: Signals) -> Result<ExitCode> {
    let (stop, now) = (CancellationToken::new(), CancellationToken::new());
    let mut running = pin!(app.run(stop.cancelled(), now.cancelled()));
    let signalled = async {
        let first = signals.next().await;
        info!(signal = first, "stopping; another signal ends at once");
        stop.cancel();
        signals.next().await;
        warn!("ended before running requests were complete");
    };
    tokio::select! {
        ended = &mut running => return ended.map(|()| ExitCode::SUCCESS),
        () = signalled => now.cancel(),
    }
    // Nothing is waited for any more but that what runs is dropped.
    running.await.map(|()| ExitCode::FAILURE)
}

/// The signals that ask the program to stop. Installed before anything else, so that none finds it half started.
pub(super) struct Signals {
    #[cfg(unix)]
    interrupt: unix::Signal,
    #[cfg(unix)]
    terminate: unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn install() -> Result<Self> {
        let install = |kind| unix::signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: install(unix::SignalKind::interrupt())?,
            terminate: install(unix::SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(not(unix))]
impl Signals {
    pub(super) fn install() -> Result<Self> {
        Ok(Self {})
    }

    async fn next(&mut self) -> &'static str {
        match tokio::signal::ctrl_c().await {
            Ok(()) => "Ctrl-C",
            Err(_) => std::future::pending().await,
        }
    }
}
