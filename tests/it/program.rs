//! Runs the real binary.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::app::PATIENCE;

/// What a run of the program left.
pub(crate) struct Done {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-tunnel"));
    command
        .args(arguments)
        .env_clear()
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

pub(crate) async fn run(arguments: &[&str]) -> Done {
    run_command(&mut program(arguments)).await
}

pub(crate) async fn run_command(command: &mut Command) -> Done {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let running = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = tokio::time::timeout(PATIENCE, running)
        .await
        .expect("the program did not end")
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done {
        status: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// Ends the program when the test fails half-way.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn signal(&self, signal: &str) {
        let killed = Command::new("kill")
            .args([signal, &self.0.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
    }

    pub(crate) async fn wait(mut self) -> ExitStatus {
        let waiting = async {
            loop {
                if let Some(status) = self.0.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .expect("the program did not end")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn kubeconfig(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

pub(crate) fn path(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// Reads the address of 127.0.0.1 out of the last line, which says that the program listens there.
pub(crate) fn address(log: &Lines) -> SocketAddr {
    let address = log.seen.last().unwrap().split("127.0.0.1:").nth(1).unwrap();
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()))
}

/// The log of a running program.
pub(crate) struct Lines {
    /// What was read so far.
    pub(crate) seen: Vec<String>,
    stderr: BufReader<ChildStderr>,
}

impl Lines {
    pub(crate) fn new(stderr: ChildStderr) -> Self {
        Self {
            seen: Vec::new(),
            stderr: BufReader::new(stderr),
        }
    }

    /// Reads until a line has this word; that line is the last one seen.
    pub(crate) async fn until(mut self, word: &'static str) -> Self {
        let reading = tokio::task::spawn_blocking(move || {
            loop {
                let mut line = String::new();
                assert!(
                    self.stderr.read_line(&mut line).unwrap() > 0,
                    "never said {word:?}: {:#?}",
                    self.seen
                );
                self.seen.push(line.trim_end().to_owned());
                if line.contains(word) {
                    return self;
                }
            }
        });
        tokio::time::timeout(PATIENCE, reading)
            .await
            .unwrap_or_else(|_| panic!("never said: {word:?}"))
            .unwrap()
    }
}
