//! The program's configuration: the sum of its components' settings, from flags, environment, file and defaults.
//!
//! Each setting is defined once, in [`setting`]; parser, help, environment, file and reference page all come from there.
//! Everything is validated here, so that components never see a bad value.

mod file;
mod layer;
pub mod setting;

use std::fmt::Write as _;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::k8s::{self, SlowReaders};
use crate::name::{Naming, ServiceName};
use crate::privileges::Account;
use crate::proxy::{self, Bind, Limits, RetryPolicy};
use crate::telemetry;
use crate::tls::Trust;

pub use layer::{Layers, Source, Value};
pub use setting::Setting;

/// Why there is no configuration: a mistake of the user's, worded for them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that its setting does not take.
    #[error("{origin}: {value:?} is not valid: {reason}")]
    BadValue {
        /// Where the value came from, e.g. `--port` or `KUBE_TUNNEL_PORT`.
        origin: String,
        /// The value.
        value: String,
        /// What is expected.
        reason: String,
    },
    /// The file cannot be read, is no TOML, or has an unknown key.
    #[error("configuration file {}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, in one line.
        reason: String,
    },
}

/// The whole configuration, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The log.
    pub telemetry: telemetry::Config,
    /// The Kubernetes side.
    pub k8s: k8s::Config,
    /// The proxy.
    pub proxy: proxy::Config,
    /// Whose word counts for the certificates of pods.
    pub backend_tls: Trust,
    /// How long a request waits for the first answer about its Service.
    pub resolve_timeout: Duration,
    /// Where files live that outlast a run; nothing on a machine without a home folder.
    pub state_dir: Option<PathBuf>,
    /// How long requests may go on after the word to stop.
    pub drain_timeout: Duration,
    /// How many threads carry requests; nothing stands for half of the processors.
    pub worker_threads: Option<NonZero<usize>>,
    /// Only undo what was changed on this machine, and stop.
    pub cleanup: bool,
    /// Only serve DNS, without the proxy.
    pub dns_only: bool,
    /// Settings in use whose feature is not part of this version, in words.
    pub pending: Vec<String>,
}

impl Config {
    /// Validates the merged layers. The files of a setting that nobody gave a path for are those of `account`.
    ///
    /// # Errors
    /// [`Error::BadValue`] for the first value that its setting does not take.
    pub fn new(layers: &Layers, account: &Account) -> Result<Self, Error> {
        use setting as s;
        let idle_timeout = layers.duration(&s::IDLE_TIMEOUT)?;
        Ok(Self {
            telemetry: telemetry::Config {
                filter: layers.parse(&s::LOG_LEVEL)?,
                format: layers.parse(&s::LOG_FORMAT)?,
            },
            k8s: k8s::Config {
                kubeconfig: layers.text(&s::KUBECONFIG).map(PathBuf::from),
                context: layers.text(&s::CONTEXT),
                timeout: layers.duration(&s::API_TIMEOUT)?,
                poll_interval: layers.duration(&s::POLL_INTERVAL)?,
                idle_timeout,
                carriers: layers.parse(&s::PORT_FORWARD)?,
                slow_readers: SlowReaders {
                    bytes: layers.parse(&s::MAX_UNREAD_BYTES)?,
                    timeout: layers.duration(&s::SLOW_READER_TIMEOUT)?,
                },
                account: account.clone(),
            },
            proxy: proxy::Config {
                bind: bind(layers)?,
                port: layers.parse(&s::PORT)?,
                naming: Naming {
                    zone: layers.parse(&s::CLUSTER_DOMAIN)?,
                    namespace: namespace(layers)?,
                },
                retry: RetryPolicy {
                    max_retries: layers.parse(&s::MAX_RETRIES)?,
                    base_delay: Duration::from_millis(layers.parse(&s::RETRY_DELAY_MS)?),
                },
                ready_timeout: layers.duration(&s::READY_TIMEOUT)?,
                cors: layers.parse(&s::CORS_ALLOW_ORIGIN)?,
                forwarded_headers: layers.switch(&s::FORWARDED_HEADERS)?,
                header_timeout: layers.duration(&s::HEADER_TIMEOUT)?,
                idle_timeout,
                limits: Limits {
                    connections: layers.optional(&s::MAX_CONNECTIONS)?,
                    connections_per_client: layers.optional(&s::MAX_CONNECTIONS_PER_CLIENT)?,
                    connections_per_pod: layers.parse(&s::MAX_CONNECTIONS_PER_POD)?,
                    header_bytes: layers.parse(&s::MAX_HEADER_BYTES)?,
                    header_fields: layers.parse(&s::MAX_HEADER_FIELDS)?,
                    response_header_bytes: layers.parse(&s::MAX_RESPONSE_HEADER_BYTES)?,
                    response_header_fields: layers.parse(&s::MAX_RESPONSE_HEADER_FIELDS)?,
                    replay_bytes: layers.parse(&s::MAX_REPLAY_BYTES)?,
                    linger: layers.duration(&s::LINGER_TIMEOUT)?,
                    streams: layers.parse(&s::MAX_STREAMS)?,
                },
            },
            backend_tls: layers.parse(&s::BACKEND_TLS)?,
            resolve_timeout: layers.duration(&s::RESOLVE_TIMEOUT)?,
            state_dir: layers
                .text(&s::STATE_DIR)
                .map(PathBuf::from)
                .or_else(|| default_state_dir(account)),
            drain_timeout: layers.duration(&s::DRAIN_TIMEOUT)?,
            worker_threads: layers.optional(&s::WORKER_THREADS)?,
            cleanup: layers.switch(&s::CLEANUP)?,
            dns_only: layers.switch(&s::DNS_ONLY)?,
            pending: pending(layers),
        })
    }
}

/// The user's state folder (XDG Base Directory Specification).
fn default_state_dir(account: &Account) -> Option<PathBuf> {
    let configured = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let state = configured.or_else(|| Some(account.home.as_ref()?.join(".local/state")))?;
    Some(state.join("kube-tunnel"))
}

/// `auto` means loopback, and every address in a pod: there the clients are other pods (contract A5).
fn bind(layers: &Layers) -> Result<Bind, Error> {
    if layers.text(&setting::BIND).as_deref() != Some("auto") {
        return layers.parse(&setting::BIND);
    }
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    Ok(if in_pod { Bind::All } else { Bind::Loopback })
}

/// A namespace is a label, as a Service's name is; with any other, every host that it completes would be refused.
fn namespace(layers: &Layers) -> Result<Option<Arc<str>>, Error> {
    let Some(text) = layers.text(&setting::NAMESPACE) else {
        return Ok(None);
    };
    if ServiceName::new(&text, "any").is_ok() {
        return Ok(Some(text.into()));
    }
    let source = layers.value(&setting::NAMESPACE).source;
    Err(Error::BadValue {
        origin: source.origin(&setting::NAMESPACE),
        value: text,
        reason: "expected a DNS label (1 to 63 of a-z, 0-9 and '-', no '-' at either end)".into(),
    })
}

/// Lists the settings that somebody set although what they govern does not exist yet.
fn pending(layers: &Layers) -> Vec<String> {
    let set = setting::ALL
        .iter()
        .filter(|setting| setting.pending && layers.value(setting).source != Source::Default);
    set.map(|setting| layers.value(setting).source.origin(setting))
        .collect()
}

/// Prints the effective configuration as a configuration file, each line with the place its value came from.
#[must_use]
pub fn show(layers: &Layers) -> String {
    let mut text = String::new();
    for setting in setting::ALL {
        let value = layers.value(setting);
        let comment = if value.text.is_some() { "" } else { "# " };
        let shown = setting.kind.toml(value.text.as_deref().unwrap_or_default());
        let origin = value.source.origin(setting);
        let _ = writeln!(text, "{comment}{} = {shown} # {origin}", setting.key);
    }
    text
}

/// Renders the reference page of all settings, `docs/configuration.md`.
#[must_use]
pub fn reference() -> String {
    let mut page = String::from(
        "# Settings\n\n\
         Generated from the definitions in `src/config/setting.rs`; `cargo test` fails when this page is stale, and\n\
         `UPDATE_DOCS=1 cargo test --test docs` rewrites it.\n\n\
         Every setting is a flag (`-port=8080`, `-port 8080`, `--port=8080` are the same), an environment variable and a key\n\
         of the TOML file that `--config` names (default: `kube-tunnel/config.toml` under `$XDG_CONFIG_HOME` or `~/.config`).\n\
         A flag wins over the environment, the environment over the file, the file over the default. Unknown keys of the file\n\
         are errors. `kube-tunnel config` prints what is in force and where each value came from.\n\n\
         Durations are written as `200ms`, `30s`, `10m` or `1h 30m`.\n\n\
         | flag and key | environment | type | default | meaning |\n|---|---|---|---|---|\n",
    );
    for setting in setting::ALL {
        let names: Vec<_> = setting.variables().map(|name| format!("`{name}`")).collect();
        let default = setting
            .default
            .map_or_else(|| "none".into(), |default| format!("`{default}`"));
        let later = if setting.pending {
            "*Accepted, but not part of this version yet.*"
        } else {
            setting.why
        };
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {default} | {}. {later} |",
            setting.key,
            names.join(", "),
            setting.kind,
            setting.help,
        );
    }
    page.push_str(
        "\nA bad value of `max-retries`, `retry-delay-ms` or `log-level` in the environment, under either name, never stops the program:\n\
         it is reported in one warning and passed over. Any other bad value is an error (exit code 2). An empty variable is not set.\n",
    );
    page
}

#[cfg(test)]
mod tests;
