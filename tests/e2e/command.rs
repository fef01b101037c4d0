//! Runs other programs, with a deadline for everything and no process left behind.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Longer than any one step takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) success: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// Returns standard output of a run that must have worked.
    pub(crate) fn succeeded(self) -> String {
        assert!(self.success, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs a program to its end.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Done {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command, "").await
}

/// Runs a client of the proxy to its end; no proxy of the machine comes between.
pub(crate) async fn run_client(program: &str, arguments: &[&str]) -> Done {
    let mut command = Command::new(program);
    command.args(arguments).env("NO_PROXY", "*").env("no_proxy", "*");
    finish(command, "").await
}

/// Runs a program that reads `input`.
pub(crate) async fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Done {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command, input).await
}

/// Runs a command to its end with `input` on its standard input.
pub(crate) async fn finish(mut command: Command, input: &str) -> Done {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let what = format!("{:?}", command.as_std());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{what}: {error}; these tests run by tests/cluster/e2e"));
    let mut stdin = child.stdin.take().unwrap();
    // A program that does not read its input may have gone before all of it was written.
    drop(stdin.write_all(input.as_bytes()).await);
    drop(stdin);
    let output = within(DEADLINE, &what, child.wait_with_output()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Done {
        success: output.status.success(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// Fails a test that would otherwise hang.
pub(crate) async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, future)
        .await
        .unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFnMut() -> bool) {
    assert!(in_time(condition).await, "not within {DEADLINE:?}: {what}");
}

/// Waits until `condition` holds, and tells whether it came to that.
pub(crate) async fn in_time(mut condition: impl AsyncFnMut() -> bool) -> bool {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.is_ok()
}
