//! Runs the real binary.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use crate::command::{Done, eventually, finish};
use crate::note::note;

/// The lines of the log that a failed test shows.
const SHOWN_LINES: usize = 80;

/// A running proxy; killed when dropped, and its log shown if the test has failed.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Its settings and its state.
    folder: TempDir,
}

impl Proxy {
    /// Starts on a free port of 127.0.0.1 with the kubeconfig of the environment.
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// Starts with a kubeconfig.
    pub(crate) async fn start_as(kubeconfig: &Path) -> Self {
        Self::with(&["--kubeconfig", kubeconfig.to_str().unwrap()]).await
    }

    /// Starts with further flags.
    pub(crate) async fn with(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(folder.path(), flags);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let reader = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                reader.lock().unwrap().push(line);
            }
        });
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut proxy = Self {
            address,
            child,
            log,
            folder,
        };
        eventually("the proxy to listen", async || {
            assert!(
                proxy.child.try_wait().unwrap().is_none(),
                "the proxy ended at once: {}",
                proxy.log()
            );
            proxy.listening().map(|address| proxy.address = address).is_some()
        })
        .await;
        proxy
    }

    /// Runs what must end by itself.
    pub(crate) async fn fails(flags: &[&str]) -> Done {
        let folder = tempfile::tempdir().unwrap();
        finish(command(folder.path(), flags).into(), "").await
    }

    /// Finds the address in the log.
    fn listening(&self) -> Option<SocketAddr> {
        let log = self.log.lock().unwrap();
        let line = log.iter().find(|line| line.contains("listening address="))?;
        let (_, address) = line.split_once("address=")?;
        Some(address.split_whitespace().next()?.parse().unwrap())
    }

    /// Returns all that it has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Returns the file of the certificate that clients are to trust.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.folder.path().join("state/tls/cluster.local/server.crt")
    }

    /// Returns its address as command lines take it.
    pub(crate) fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Returns the most memory that it ever had resident, in bytes (proc(5), `VmHWM`).
    pub(crate) fn memory_peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    /// Returns its process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop.
    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, name: &str) {
        let signal = format!("-{name}");
        let killed = Command::new("kill")
            .args([&signal, &self.child.id().to_string()])
            .status();
        assert!(killed.unwrap().success());
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the proxy to end", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Fails only for one that has ended.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(SHOWN_LINES);
            for line in log.lines().skip(from) {
                note(&format!("proxy: {line}"));
            }
        }
    }
}

/// The command line on a free port of 127.0.0.1, with no settings but the flags, and nothing written to the user's folders.
fn command(folder: &Path, flags: &[&str]) -> Command {
    let settings = folder.join("config.toml");
    std::fs::write(&settings, "").unwrap();
    let mut command = Command::new(binary());
    command
        .arg("--config")
        .arg(settings)
        .arg("--state-dir")
        .arg(folder.join("state"));
    command
        .args(["-port=0", "--bind=127.0.0.1", "--log-level=debug"])
        .args(flags);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KUBE_TUNNEL_") {
            command.env_remove(name);
        }
    }
    command
}

/// The program: measurements are of the release build.
fn binary() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/kube-tunnel");
    let binary = std::env::var_os("KUBE_TUNNEL_BIN").map_or_else(built, PathBuf::from);
    assert!(
        binary.is_file(),
        "there is no {}; run tests/cluster/e2e",
        binary.display()
    );
    binary
}
