//! What happens at the limits (contract C4, C5; docs/limits.md).

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::Full;
use kube_tunnel::config::setting;
use kube_tunnel::testing::FakeCluster;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::app::{PATIENCE, TestApp, eventually, web};
use crate::backends::{behind, raw, scripted};
use crate::client::{Client, Reply, fetch, get};
use crate::interim::until;
use crate::upgrade::frame;

const REQUEST: &str = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A connection that has had an answer, so that it is known to be counted.
async fn counted(app: &TestApp) -> TcpStream {
    let mut client = TcpStream::connect(app.address).await.unwrap();
    client.write_all(REQUEST.as_bytes()).await.unwrap();
    until(&mut client, "}\n").await;
    client
}

#[tokio::test]
async fn connections_above_the_limit_wait_for_one_that_ends() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::MAX_CONNECTIONS, "2")]).await;
    let first = counted(&app).await;
    let _second = counted(&app).await;
    let mut third = TcpStream::connect(app.address).await.unwrap();
    third.write_all(REQUEST.as_bytes()).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(200), third.read_u8()).await;
    assert!(early.is_err(), "served above the limit");
    drop(first);
    until(&mut third, "}\n").await;
}

#[tokio::test]
async fn a_client_above_its_limit_is_closed_and_may_come_back() {
    let cluster = FakeCluster::start().await.unwrap();
    let flags = [(&setting::MAX_CONNECTIONS_PER_CLIENT, "1")];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    let first = counted(&app).await;
    let mut second = TcpStream::connect(app.address).await.unwrap();
    let closed = tokio::time::timeout(PATIENCE, second.read(&mut [0])).await;
    assert_eq!(closed.expect("neither served nor closed").unwrap_or(0), 0);
    drop(first);
    let again = async {
        loop {
            let mut client = TcpStream::connect(app.address).await.unwrap();
            if client.write_all(REQUEST.as_bytes()).await.is_ok() && client.read_u8().await.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, again).await.unwrap();
}

#[tokio::test]
async fn requests_above_a_pods_connections_wait_their_turn() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let flags = [(&setting::MAX_CONNECTIONS_PER_POD, "2")];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    let address = app.address;
    let requests: Vec<_> = (0..40)
        .map(|_| tokio::spawn(async move { fetch(address, "web.shop", "/slow?ms=10").await.status }))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
    let backend = workload.pods[0].backends[0].http().unwrap();
    assert_eq!(backend.connections(), 2);
}

#[tokio::test]
async fn a_websocket_has_a_pods_connection_until_it_ends() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let flags = [(&setting::MAX_CONNECTIONS_PER_POD, "1")];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let (socket, _) = tokio_tungstenite::client_async("ws://web.shop/ws", stream)
        .await
        .unwrap();
    let address = app.address;
    let waiting = tokio::spawn(async move { fetch(address, "web.shop", "/").await.status });
    // Somebody who leaves the queue does not hold it up.
    let left = tokio::time::timeout(Duration::from_millis(100), fetch(address, "web.shop", "/")).await;
    assert!(left.is_err() && !waiting.is_finished());
    drop(socket);
    let status = tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("never its turn");
    assert_eq!(status.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn a_request_does_not_wait_for_ever_for_a_pods_connection() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let flags = [
        (&setting::MAX_CONNECTIONS_PER_POD, "1"),
        (&setting::READY_TIMEOUT, "200ms"),
    ];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    let stream = TcpStream::connect(app.address).await.unwrap();
    let (socket, _) = tokio_tungstenite::client_async("ws://web.shop/ws", stream)
        .await
        .unwrap();
    let refused = fetch(app.address, "web.shop", "/").await;
    assert_eq!(refused.status, StatusCode::BAD_GATEWAY);
    assert!(
        refused.text().contains("--max-connections-per-pod"),
        "{}",
        refused.text()
    );
    drop(socket);
    eventually_served(&app).await;
}

/// Waits until a request is served.
async fn eventually_served(app: &TestApp) {
    let served = async { while fetch(app.address, "web.shop", "/").await.status != StatusCode::OK {} };
    tokio::time::timeout(PATIENCE, served).await.unwrap();
}

#[tokio::test]
async fn large_heads_are_refused_at_the_settings_limits() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let flags = [
        (&setting::MAX_HEADER_BYTES, "8192"),
        (&setting::MAX_HEADER_FIELDS, "32"),
    ];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    for (value, status) in [
        (6000, StatusCode::OK),
        (9000, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
    ] {
        for mut client in [Client::http1(app.address).await, Client::h2c(app.address).await] {
            let mut request = get("web.shop", "/");
            let large = "x".repeat(value).parse().unwrap();
            request.headers_mut().insert("x-large", large);
            assert_eq!(Reply::read(client.send(request).await).await.status, status);
        }
    }
    let default = TestApp::start(&cluster).await;
    // With `Host` and `Connection`.
    for (app, most) in [(&app, 32), (&default, 100)] {
        for (fields, status) in [(most - 2, "200"), (most - 1, "431")] {
            let many: String = (0..fields).map(|n| format!("X-{n}: 1\r\n")).collect();
            let request = format!("GET / HTTP/1.1\r\nHost: web.shop\r\nConnection: close\r\n{many}\r\n");
            let answer = raw(app.address, &request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
    }
}

#[tokio::test]
async fn large_heads_of_responses_are_refused_at_the_settings_limits() {
    let flags = [
        (&setting::MAX_RESPONSE_HEADER_BYTES, "16384"),
        (&setting::MAX_RESPONSE_HEADER_FIELDS, "32"),
        (&setting::MAX_RETRIES, "1"),
    ];
    let defaults = [(&setting::MAX_RETRIES, "1")];
    // With `Content-Length` and `X-Large`.
    for (flags, fields, bytes, status) in [
        (&flags[..], 30, 8000, StatusCode::OK),
        (&flags, 20, 20_000, StatusCode::BAD_GATEWAY),
        (&flags, 31, 0, StatusCode::BAD_GATEWAY),
        (&defaults, 98, 20_000, StatusCode::OK),
        (&defaults, 99, 0, StatusCode::BAD_GATEWAY),
    ] {
        let many: String = (0..fields).map(|n| format!("X-{n}: 1\r\n")).collect();
        let large = "x".repeat(bytes);
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{many}X-Large: {large}\r\n\r\n");
        let cluster = FakeCluster::start().await.unwrap();
        let (address, _) = scripted(answer.leak().as_bytes()).await;
        let _workload = behind(&cluster, address);
        let app = TestApp::with(&cluster.kubeconfig(), flags).await;
        let reply = fetch(app.address, "web.shop", "/").await;
        assert_eq!(
            reply.status,
            status,
            "{fields} fields, {bytes} bytes: {}",
            reply.text()
        );
    }
}

#[tokio::test]
async fn a_body_is_sent_again_only_if_all_of_it_was_kept() {
    for (kept, times) in [("10", 2), ("9", 1)] {
        let cluster = FakeCluster::start().await.unwrap();
        // Every connection ends without an answer.
        let (address, seen) = scripted(b"").await;
        let _workload = behind(&cluster, address);
        let flags = [(&setting::MAX_REPLAY_BYTES, kept), (&setting::MAX_RETRIES, "1")];
        let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
        let mut client = Client::http1(app.address).await;
        let request = Request::put("/").header("host", "web.shop");
        let request = request.body(Full::from("0123456789")).unwrap();
        let reply = Reply::read(client.send(request).await).await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{}", reply.text());
        assert_eq!(seen.load(Ordering::SeqCst), times, "{kept} bytes kept");
    }
}

#[tokio::test]
async fn streams_of_one_connection_are_as_many_as_the_setting_says() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::MAX_STREAMS, "3")]).await;
    let mut client = Client::h2c(app.address).await;
    client.get("web.shop", "/").await;
    let Client::H2c(sender) = client else {
        unreachable!()
    };
    let requests: Vec<_> = (0..9)
        .map(|_| {
            let mut client = Client::H2c(sender.clone());
            tokio::spawn(async move { client.get("web.shop", "/slow?ms=20").await.status })
        })
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
    let connections = workload.pods[0].backends[0].http().unwrap().connections();
    assert!(connections <= 3, "{connections} requests at the same time");
}

#[tokio::test]
async fn a_client_that_says_nothing_or_never_ends_its_headers_is_closed() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::with(&cluster.kubeconfig(), &[(&setting::HEADER_TIMEOUT, "300ms")]).await;
    for opening in [
        &b""[..],
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: web",
        b"\x16\x03\x01\x02",
        b"PRI * HT",
    ] {
        let mut client = TcpStream::connect(app.address).await.unwrap();
        client.write_all(opening).await.unwrap();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, client.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "{opening:?} is waited for without end");
    }
}

/// The CPU time of a process so far.
#[cfg(target_os = "linux")]
fn cpu_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // USER_HZ is 100 on every architecture of Linux that matters here
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn without_files_left_the_program_waits_says_so_once_and_goes_on() {
    use crate::program::{Lines, Running, kubeconfig, path, program};
    let cluster = FakeCluster::start().await.unwrap();
    let file = kubeconfig(&cluster.kubeconfig());
    let mut limited = std::process::Command::new("sh");
    let inner = program(&[]);
    limited
        .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args([
            "-port=0",
            "--bind=127.0.0.1",
            "--max-connections=1000",
            "--kubeconfig",
            path(&file),
        ])
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("PATH", "/usr/bin:/bin")
        .stdin(std::process::Stdio::null());
    let mut running = Running(limited.stderr(std::process::Stdio::piped()).spawn().unwrap());
    let log = Lines::new(running.0.stderr.take().unwrap())
        .until("listening")
        .await;
    let address = crate::program::address(&log);
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    let log = log.until("cannot accept").await;
    let line = log.seen.last().unwrap();
    assert!(
        line.contains("ulimit -n") && line.contains("--max-connections"),
        "{line}"
    );
    let before = cpu_time(running.0.id());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = cpu_time(running.0.id()) - before;
    assert!(
        spent < Duration::from_millis(500),
        "{spent:?} of CPU time in two seconds of waiting"
    );
    drop(clients);
    assert_eq!(
        fetch(address, "localhost", "/health").await.status,
        StatusCode::OK
    );
    running.signal("-TERM");
    let log = log.until("completed").await;
    let said = log
        .seen
        .iter()
        .filter(|line| line.contains("cannot accept"))
        .count();
    assert_eq!(said, 1, "{:#?}", log.seen);
    running.wait().await;
}

/// The head of a HTTP/2 frame without its length's first two bytes, which are zero.
fn head(length: u8, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let mut head = vec![0, 0, length, kind, flags];
    head.extend(stream.to_be_bytes());
    head
}

/// `GET / http` of the static table, and the authority as a literal (RFC 7541 sections 6.1 and 6.2.1).
const GET: &[u8; 13] = b"\x82\x84\x86\x41\x08web.shop";

#[tokio::test]
async fn a_client_that_floods_its_connection_is_sent_away_or_made_to_wait() {
    const FRAMES: u32 = 20_000;
    const GOAWAY: u8 = 7;
    const ENHANCE_YOUR_CALM: [u8; 4] = [0, 0, 0, 0xb];
    let get = |stream, flags| [head(13, 1, flags, stream), GET.to_vec()].concat();
    let resets = (0..FRAMES).flat_map(|n| {
        let stream = 2 * n + 1;
        [get(stream, 0x5), head(4, 3, 0, stream), vec![0, 0, 0, 8]].concat()
    });
    let continuations = get(1, 0x1)
        .into_iter()
        .chain((0..FRAMES).flat_map(|_| head(0, 9, 0, 1)));
    let empty = get(1, 0x4)
        .into_iter()
        .chain((0..FRAMES).flat_map(|_| head(0, 0, 0, 1)));
    let settings = (0..FRAMES).flat_map(|_| head(0, 4, 0, 0));
    let pings = (0..FRAMES).flat_map(|_| [head(8, 6, 0, 0), vec![0; 8]].concat());
    let floods: [(&str, Vec<u8>, bool); 5] = [
        ("RST_STREAM", resets.collect(), true),
        ("CONTINUATION", continuations.collect(), true),
        ("DATA", empty.collect(), true),
        ("SETTINGS", settings.collect(), false),
        ("PING", pings.collect(), false),
    ];
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    for (what, flood, sent_away) in floods {
        let mut client = TcpStream::connect(app.address).await.unwrap();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        client.write_all(preface).await.unwrap();
        // It may be cut off on the way, or be made to wait, as it reads nothing.
        let sending = client.write_all(&flood);
        let _ = tokio::time::timeout(Duration::from_secs(1), sending).await;
        assert_eq!(
            fetch(app.address, "web.shop", "/").await.status,
            StatusCode::OK,
            "{what}"
        );
        if sent_away {
            let told = async {
                loop {
                    let (kind, _, _, payload) = frame(&mut client).await;
                    if kind == GOAWAY {
                        return payload[4..8] == ENHANCE_YOUR_CALM;
                    }
                }
            };
            assert!(tokio::time::timeout(PATIENCE, told).await.unwrap(), "{what}");
        }
    }
    let reached = workload.pods[0].backends[0].http().unwrap().requests().len();
    assert!(reached < 2000, "{reached} of the requests reached the pod");
}

#[tokio::test]
async fn one_client_that_never_reads_holds_nobody_up() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let app = TestApp::start(&cluster).await;
    let backend = workload.pods[0].backends[0].http().unwrap();
    let mut silent = TcpStream::connect(app.address).await.unwrap();
    let request = "GET /bytes/1073741824 HTTP/1.1\r\nHost: web.shop\r\n\r\n";
    silent.write_all(request.as_bytes()).await.unwrap();
    eventually("the request at the pod", || backend.in_flight() == 1).await;
    // On one HTTP/2 connection, too, the stream that nobody reads leaves room for the others.
    let mut client = Client::h2c(app.address).await;
    let unread = client.send(get("web.shop", "/bytes/1073741824")).await;
    for _ in 0..20 {
        assert_eq!(client.get("web.shop", "/").await.status, StatusCode::OK);
        assert_eq!(fetch(app.address, "web.shop", "/").await.status, StatusCode::OK);
    }
    drop((silent, unread));
    eventually("the end at the pod", || backend.in_flight() == 0).await;
}
