//! The programs that are compared: how each is started, where it listens, what it takes of the machine.

use std::fmt;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::POD;
use crate::profile::Profile;

/// How long a contestant may take until it listens.
const START: Duration = Duration::from_secs(20);

/// One way to a pod.
#[derive(Debug, Clone)]
pub(crate) enum Contestant {
    /// The program: HTTP, one port for all Services.
    Proxy,
    /// The example `tcp_forward`: raw bytes over the same port-forwards.
    Raw,
    /// `kubectl port-forward` of `PATH`.
    Kubectl,
    /// A program that prints the local address of each port it is given, in order.
    Rival(PathBuf),
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Proxy => f.write_str("proxy"),
            Self::Raw => f.write_str("raw"),
            Self::Kubectl => f.write_str("kubectl"),
            Self::Rival(path) => match path.file_name() {
                Some(name) => f.write_str(&name.to_string_lossy()),
                None => f.write_str("rival"),
            },
        }
    }
}

/// A running contestant; killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    /// Where each port is found, in the order asked for.
    addresses: Vec<SocketAddr>,
    /// The value of `Host` for HTTP.
    pub(crate) host: String,
    _folder: TempDir,
}

impl Contestant {
    /// Starts it and waits until it listens for all `ports` of the pod.
    pub(crate) async fn start(
        &self,
        namespace: &str,
        ports: &[u16],
        kubeconfig: Option<&Path>,
    ) -> Result<Running> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let mut command = self.command(namespace, ports, folder.path())?;
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("KUBE_TUNNEL_") {
                command.env_remove(name);
            }
        }
        if let Some(kubeconfig) = kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        // To a file, as one would redirect it: nobody's reading takes part in the measurement.
        let output = File::create(&log)?;
        command
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().with_context(|| format!("cannot start {self}"))?;
        let mut running = Running {
            child,
            addresses: Vec::new(),
            host: format!("{POD}.db.{namespace}.svc.cluster.local:8080"),
            _folder: folder,
        };
        let deadline = Instant::now() + START;
        while running.addresses.len() < ports.len() {
            let text = std::fs::read_to_string(&log)?;
            ensure!(
                Instant::now() < deadline && !running.ended(),
                "{self} does not listen: {text}"
            );
            running.addresses = text.lines().filter_map(|line| self.address(line)).collect();
            if let (Self::Proxy, Some(first)) = (self, running.addresses.first()) {
                running.addresses = vec![*first; ports.len()];
            }
            sleep(Duration::from_millis(10)).await;
        }
        Ok(running)
    }

    fn command(&self, namespace: &str, ports: &[u16], folder: &Path) -> Result<Command> {
        let built = |name: &str| Path::new("target/release").join(name);
        let ports = ports.iter().map(ToString::to_string);
        let mut command;
        match self {
            Self::Proxy => {
                let settings = folder.join("config.toml");
                File::create(&settings)?;
                let program = std::env::var_os("KUBE_TUNNEL_BIN").map(PathBuf::from);
                command = Command::new(program.unwrap_or_else(|| built("kube-tunnel")));
                command
                    .args(["-port=0", "--bind=127.0.0.1", "--config"])
                    .arg(settings);
                command.arg("--state-dir").arg(folder.join("state"));
            }
            Self::Kubectl => {
                command = Command::new("kubectl");
                command.args([
                    "port-forward",
                    "--address=127.0.0.1",
                    "--namespace",
                    namespace,
                    POD,
                ]);
                command.args(ports.map(|port| format!(":{port}")));
            }
            Self::Raw | Self::Rival(_) => {
                let program = match self {
                    Self::Rival(path) => path.clone(),
                    _ => built("examples/tcp_forward"),
                };
                command = Command::new(program);
                command.args([namespace, POD]).args(ports);
            }
        }
        Ok(command)
    }

    /// Finds an address where this line of output tells one.
    fn address(&self, line: &str) -> Option<SocketAddr> {
        let text = match self {
            Self::Proxy => line.split_once("listening address=")?.1,
            Self::Kubectl => line.strip_prefix("Forwarding from ")?,
            Self::Raw | Self::Rival(_) => line,
        };
        text.split_whitespace().next()?.parse().ok()
    }
}

impl Running {
    /// Returns the address of the port that was given in that place.
    pub(crate) fn address(&self, place: usize) -> SocketAddr {
        self.addresses[place]
    }

    /// Says whether it has ended by itself.
    pub(crate) fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Returns what it and everybody else have taken of the processors.
    pub(crate) fn profile(&self) -> Result<Profile> {
        Profile::now(self.child.id())
    }

    /// Returns its resident memory in MiB (proc(5), `VmRSS`).
    pub(crate) fn memory(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kib.context("no VmRSS")?.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only for one that has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
