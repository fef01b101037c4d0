//! Runs kubectl, with a deadline for everything and no process left behind.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tokio::process::{ChildStderr, ChildStdout, Command};

/// Longer than one kubectl command takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A kubectl binary with its kubeconfig.
pub(crate) struct Kubectl {
    /// The binary.
    binary: PathBuf,
    /// Its kubeconfig.
    kubeconfig: PathBuf,
    /// Its home, so that neither settings nor caches of the machine count.
    home: PathBuf,
}

/// A running kubectl; killed when dropped.
pub(crate) struct Child {
    /// The process.
    _process: tokio::process::Child,
    /// Its standard output.
    stdout: Lines<BufReader<ChildStdout>>,
    /// Its standard error.
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Kubectl {
    pub(crate) fn new(binary: &Path, kubeconfig: &Path, home: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            home: home.to_owned(),
        }
    }

    /// Runs a command that must work; returns its standard output.
    pub(crate) async fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{} {arguments:?}: {errors}",
            self.binary.display()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail; returns its standard error.
    pub(crate) async fn fails(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments).await;
        assert!(
            !output.status.success(),
            "{} {arguments:?} succeeded",
            self.binary.display()
        );
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts a command that goes on.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Child {
        let mut process = self
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(process.stderr.take().unwrap()).lines();
        Child {
            _process: process,
            stdout,
            stderr,
        }
    }

    async fn output(&self, arguments: &[&str]) -> std::process::Output {
        within(&format!("{arguments:?}"), self.command(arguments).output())
            .await
            .unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(if arguments.contains(&"-A") {
                &[][..]
            } else {
                &["--namespace", "shop"]
            })
            .env("HOME", &self.home)
            .env("NO_PROXY", "*")
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }
}

impl Child {
    /// Waits for a line of standard output that contains `text`.
    pub(crate) async fn line_with(&mut self, text: &str) -> String {
        line_with(&mut self.stdout, text).await
    }

    /// Waits for a line of standard error that contains `text`.
    pub(crate) async fn error_line_with(&mut self, text: &str) -> String {
        line_with(&mut self.stderr, text).await
    }
}

async fn line_with(lines: &mut Lines<BufReader<impl AsyncRead + Unpin>>, text: &str) -> String {
    within(text, async {
        loop {
            let line = lines.next_line().await.unwrap();
            let line = line.unwrap_or_else(|| panic!("kubectl ended without saying {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    })
    .await
}

/// Fails a test that would otherwise hang.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}
