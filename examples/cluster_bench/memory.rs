//! Resident memory: at rest, and with many open connections that have each had one answer.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::sleep;

use crate::contestant::Running;
use crate::load::{Ask, lines};

/// Time to come to rest.
const REST: Duration = Duration::from_secs(1);

/// Returns both, in MiB.
pub(crate) async fn run(running: &Running, many: usize) -> Result<(f64, f64)> {
    let ask = Ask::get(&running.host, true);
    drop(lines(running.address(0), &ask, 1).await?);
    sleep(REST).await;
    let idle = running.memory()?;
    let _open = lines(running.address(0), &ask, many)
        .await
        .with_context(|| format!("{many} connections"))?;
    sleep(REST).await;
    Ok((idle, running.memory()?))
}
