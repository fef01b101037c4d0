//! Many clients at once, in front of the real binary: what they cost, and that the others do not notice them. The bounds are
//! generous; the figures themselves, which `docs/limits.md` has, are printed with `--nocapture`.
#![cfg(target_os = "linux")]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube_tunnel::files;
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, Workload};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use crate::app::{PATIENCE, eventually, web};
use crate::client::{Client, fetch, get};
use crate::program::{Lines, Running, address, kubeconfig, path, program};

/// The real binary in front of a cluster, with nothing else in its process.
pub(crate) struct Scene {
    pub(crate) address: SocketAddr,
    running: Running,
    folder: tempfile::TempDir,
    web: Workload,
    _kubeconfig: tempfile::NamedTempFile,
    pub(crate) cluster: FakeCluster,
}

impl Scene {
    pub(crate) async fn start(flags: &[&str]) -> Self {
        let cluster = FakeCluster::start().await.unwrap();
        let web = web(&cluster, 1);
        let folder = tempfile::tempdir().unwrap();
        let file = kubeconfig(&cluster.kubeconfig());
        let state = folder.path().to_str().unwrap();
        let fixed = [
            "-port=0",
            "--bind=127.0.0.1",
            "--log-level=warn,kube_tunnel::app=info",
        ];
        let mut arguments: Vec<_> = fixed.iter().chain(flags).copied().collect();
        arguments.extend(["--state-dir", state, "--kubeconfig", path(&file)]);
        let mut running = Running(program(&arguments).stderr(Stdio::piped()).spawn().unwrap());
        let log = Lines::new(running.0.stderr.take().unwrap());
        let address = address(&log.until("listening").await);
        let this = Self {
            address,
            running,
            folder,
            web,
            _kubeconfig: file,
            cluster,
        };
        this.others("before").await;
        this
    }

    /// Bytes of memory that the program has.
    pub(crate) fn memory(&self) -> u64 {
        let file = format!("/proc/{}/status", self.running.0.id());
        let status = std::fs::read_to_string(file).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Sends what everybody else sends meanwhile, each on a connection of its own, and says how long it took.
    async fn others(&self, when: &str) {
        const REQUESTS: usize = 40;
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let before = Instant::now();
            let reply = tokio::time::timeout(PATIENCE, fetch(self.address, "web.shop", "/")).await;
            assert_eq!(reply.expect("held up by the others").status, StatusCode::OK);
            times.push(before.elapsed());
        }
        times.sort();
        report(&format!(
            "others, {when}: median {:?}, slowest {:?}",
            times[REQUESTS / 2],
            times[REQUESTS - 1]
        ));
    }

    /// Reports what `count` clients cost each, beyond `before`, and returns it in bytes.
    fn cost(&self, what: &str, count: u64, before: u64) -> u64 {
        let each = self.memory().saturating_sub(before) / count;
        report(&format!(
            "{what}: {count}, {:.1} KiB of memory each",
            each as f64 / 1024.0
        ));
        each
    }

    fn tls(&self) -> TlsConnector {
        let exported = self.folder.path().join("tls/cluster.local/server.crt");
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(exported).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }
}

#[expect(clippy::print_stdout, reason = "the figures are one of the results")]
fn report(figure: &str) {
    println!("{figure}");
}

/// Makes sure that so many sockets can be had in this process; the program's own limit is the same.
fn need_files(count: u64) {
    let limit = files::raise();
    assert!(
        limit > count,
        "this test needs a hard limit of {count} open files, and has {limit}"
    );
}

/// Sends one request and reads its answer.
async fn once<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> S {
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"}\n") {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    stream
}

/// Runs `count` clients, so many at a time, and keeps what they return.
pub(crate) async fn many<T: Send + 'static, F>(count: u64, client: impl Fn(u64) -> F) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
{
    const AT_A_TIME: usize = 100;
    let (mut running, mut done) = (JoinSet::new(), Vec::new());
    for number in 0..count {
        if running.len() == AT_A_TIME {
            done.push(running.join_next().await.unwrap().unwrap());
        }
        running.spawn(client(number));
    }
    done.extend(running.join_all().await);
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_whose_clients_leave() {
    const COUNT: usize = 50;
    let scene = Scene::start(&[]).await;
    // The second that the container runtime gives the other direction comes on top, and is not ours.
    scene.cluster.faults().set_close_grace(Duration::ZERO);
    let backend = scene.web.pods[0].backends[0].http().unwrap();
    for http2 in [false, true] {
        let mut times = Vec::new();
        for _ in 0..COUNT {
            let mut client = if http2 {
                Client::h2c(scene.address).await
            } else {
                Client::http1(scene.address).await
            };
            // The next event is an hour away: the pod can learn it only from the connection.
            let events = client
                .send(get("web.shop", "/sse?count=2&interval_ms=3600000"))
                .await;
            assert_eq!(backend.in_flight(), 1);
            let before = Instant::now();
            drop(events); // resets the stream of HTTP/2, whose connection goes on
            let connection = Some(client).filter(|_| http2);
            eventually("the end at the pod", || backend.in_flight() == 0).await;
            times.push(before.elapsed());
            drop(connection);
        }
        times.sort();
        let (median, slowest) = (times[COUNT / 2], times[COUNT - 1]);
        report(&format!(
            "end at the pod, HTTP/2: {http2}: median {median:?}, slowest {slowest:?}"
        ));
        assert!(median < Duration::from_millis(250), "{median:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_connections() {
    const COUNT: u64 = 10_000;
    need_files(COUNT + 3_000);
    let scene = Scene::start(&["--header-timeout=1h"]).await;
    let (proxy, before) = (scene.address, scene.memory());
    let clients = many(COUNT, |_| async move {
        once(TcpStream::connect(proxy).await.unwrap()).await
    })
    .await;
    let each = scene.cost("idle connections in clear text", COUNT, before);
    scene.others("beside idle connections").await;
    assert!(each < 32 << 10, "{each} bytes");
    drop(clients);
    scene.others("after them").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_over_tls() {
    const COUNT: u64 = 1_000;
    need_files(COUNT + 3_000);
    let scene = Scene::start(&["--header-timeout=1h"]).await;
    let (proxy, before) = (scene.address, scene.memory());
    let tls = scene.tls();
    let clients = many(COUNT, |_| {
        let tls = tls.clone();
        async move {
            let name = ServerName::try_from("web.shop.svc.cluster.local").unwrap();
            once(
                tls.connect(name, TcpStream::connect(proxy).await.unwrap())
                    .await
                    .unwrap(),
            )
            .await
        }
    })
    .await;
    let each = scene.cost("idle connections over TLS", COUNT, before);
    scene.others("beside idle connections over TLS").await;
    assert!(each < 64 << 10, "{each} bytes");
    drop(clients);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_send_their_headers_slowly() {
    const COUNT: u64 = 1_000;
    let scene = Scene::start(&["--header-timeout=5s"]).await;
    let (proxy, before) = (scene.address, scene.memory());
    let started = Instant::now();
    let mut slow = JoinSet::new();
    for _ in 0..COUNT {
        slow.spawn(async move {
            let mut client = TcpStream::connect(proxy).await.unwrap();
            client
                .write_all(b"GET / HTTP/1.1\r\nHost: web.shop\r\n")
                .await
                .unwrap();
            let mut byte = [0];
            loop {
                // A byte every now and then, until the program has had enough of it.
                if client.write_all(b"X: 1\r\n").await.is_err() {
                    return;
                }
                let pause = Duration::from_millis(500);
                if tokio::time::timeout(pause, client.read(&mut byte)).await.is_ok() {
                    return;
                }
            }
        });
    }
    scene.others("beside slow senders of headers").await;
    scene.cost("slow senders of headers", COUNT, before);
    let closed = tokio::time::timeout(PATIENCE, slow.join_all()).await;
    assert!(closed.is_ok(), "some may send for ever");
    report(&format!("all of them were closed after {:?}", started.elapsed()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_on_one_connection() {
    const COUNT: u64 = 1_000;
    let scene = Scene::start(&[]).await;
    let h2c = Serve::Http(Protocols::Http2);
    let builder = scene.cluster.workload("shop", "events").port("http", 80, 8080);
    let builder = builder.app_protocol("kubernetes.io/h2c").serve(h2c);
    let _events = builder.create().unwrap();
    let io = TokioIo::new(TcpStream::connect(scene.address).await.unwrap());
    let (sender, connection) = http2::handshake::<_, _, Full<Bytes>>(TokioExecutor::new(), io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut first = Client::H2c(sender.clone());
    assert_eq!(first.get("events.shop", "/").await.status, StatusCode::OK);
    let before = scene.memory();
    let streams = many(COUNT - 1, |_| {
        let mut client = Client::H2c(sender.clone());
        async move {
            let mut events = client
                .send(get("events.shop", "/sse?count=2&interval_ms=3600000"))
                .await;
            events.body_mut().frame().await.unwrap().unwrap();
            events
        }
    })
    .await;
    let each = scene.cost("open streams of one HTTP/2 connection", COUNT - 1, before);
    assert!(each < 128 << 10, "{each} bytes");
    assert_eq!(
        first.get("events.shop", "/").await.status,
        StatusCode::OK,
        "the thousandth"
    );
    scene.others("beside a thousand streams").await;
    drop(streams);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_read_a_gibibyte() {
    const COUNT: u64 = 20;
    let scene = Scene::start(&[]).await;
    let before = scene.memory();
    let mut unread = Vec::new();
    let mut http2 = Client::h2c(scene.address).await;
    for _ in 0..COUNT / 2 {
        unread.push(http2.send(get("web.shop", "/bytes/1073741824")).await);
        unread.push(
            Client::http1(scene.address)
                .await
                .send(get("web.shop", "/bytes/1073741824"))
                .await,
        );
    }
    // Long enough for each to send it all, were it not held back.
    for _ in 0..5 {
        scene.others("beside clients that never read").await;
    }
    let each = scene.cost("clients that never read", COUNT, before);
    assert!(each < 8 << 20, "{each} bytes");
    drop(unread);
}
