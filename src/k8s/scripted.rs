//! An API server for tests that answers each request with bytes of the test's choice, broken ones too.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::k8s::{Cluster, Config};

/// What follows an answer's bytes.
pub(super) enum Then {
    /// The end of the connection.
    Close,
    /// Nothing, for ever.
    Stall,
}

/// Gives the answer to a request line.
type Script = dyn Fn(&str) -> (String, Then) + Send + Sync;

/// Starts the server and a client of it.
#[expect(
    clippy::disallowed_methods,
    reason = "the runtime of a test ends with it, and every task too"
)]
pub(super) async fn cluster(
    config: Config,
    script: impl Fn(&str) -> (String, Then) + Send + Sync + 'static,
) -> Cluster {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let address = listener.local_addr().unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
    );
    std::fs::write(file.path(), text).unwrap();
    let script: Arc<Script> = Arc::new(script);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, script.clone()));
        }
    });
    let kubeconfig = Some(file.path().to_owned());
    Cluster::load(&Config { kubeconfig, ..config }).await.unwrap()
}

async fn serve(stream: TcpStream, script: Arc<Script>) {
    let mut stream = BufReader::new(stream);
    let (mut line, mut head) = (String::new(), String::new());
    stream.read_line(&mut line).await.unwrap();
    while head != "\r\n" {
        head.clear();
        if stream.read_line(&mut head).await.unwrap() == 0 {
            return;
        }
    }
    let (answer, then) = script(&line);
    // The client may have left meanwhile.
    let _ = stream.write_all(answer.as_bytes()).await;
    match then {
        Then::Close => {}
        Then::Stall => std::future::pending().await,
    }
}

/// The configuration of such a client.
pub(super) fn config() -> Config {
    Config {
        kubeconfig: None,
        context: None,
        timeout: Duration::from_secs(5),
        poll_interval: Duration::from_secs(5),
        account: crate::privileges::Account::default(),
        idle_timeout: Duration::from_secs(60),
        carriers: crate::k8s::Carriers::Auto,
        slow_readers: crate::k8s::SlowReaders::default(),
    }
}

/// A whole answer.
pub(super) fn answer(status: &str, body: &str) -> (String, Then) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n");
    (
        format!("{head}Content-Length: {length}\r\n\r\n{body}"),
        Then::Close,
    )
}

/// A refusal by RBAC.
pub(super) fn forbidden() -> (String, Then) {
    answer(
        "403 Forbidden",
        r#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"no","reason":"Forbidden","code":403}"#,
    )
}

/// A list without items.
pub(super) fn empty_list() -> (String, Then) {
    answer(
        "200 OK",
        r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[]}"#,
    )
}

/// An answer whose body never comes.
pub(super) fn stalled() -> (String, Then) {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    (head.into(), Then::Stall)
}
