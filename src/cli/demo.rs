//! Demo.
use crate::config::{Config, Layers};
use std::process::ExitCode;
pub(super) fn run(_config: Config, _layers: &Layers) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
