//! What the log says (contract H1, H2).

use std::net::SocketAddr;
use std::process::Stdio;

use http::StatusCode;
use kube_tunnel::testing::FakeCluster;
use serde_json::Value;

use crate::app::{PATIENCE, web};
use crate::backends::raw;
use crate::client::{Client, Reply, fetch, get};
use crate::program::{Lines, Running, address, kubeconfig, path, program};

/// Starts the program on a free port of 127.0.0.1.
pub(crate) async fn start(cluster: &FakeCluster, flags: &[&str]) -> (Running, Lines, SocketAddr) {
    let file = kubeconfig(&cluster.kubeconfig());
    let mut command = program(&["-port=0", "--bind=127.0.0.1", "--kubeconfig", path(&file)]);
    let mut running = Running(command.args(flags).stderr(Stdio::piped()).spawn().unwrap());
    let log = Lines::new(running.0.stderr.take().unwrap())
        .until("listening")
        .await;
    let address = address(&log);
    (running, log, address)
}

/// Serves one good and one failing request and returns the lines of the log.
async fn lines(format: &str) -> Vec<String> {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let (running, log, address) = start(&cluster, &[&format!("--log-format={format}")]).await;
    fetch(address, "web.shop.svc.cluster.local", "/page?secret=1").await;
    fetch(address, "nosuch.shop", "/").await;
    let log = log.until("nosuch").await;
    running.signal("-TERM");
    running.wait().await;
    log.seen
}

#[tokio::test]
async fn json_lines_parse_and_an_access_record_tells_the_whole_story() {
    let lines: Vec<Value> = lines("json")
        .await
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &lines {
        let time = line["timestamp"].as_str().unwrap();
        assert!(
            time.parse::<jiff::Timestamp>().is_ok() && time.ends_with('Z'),
            "{time}"
        );
    }
    let access: Vec<_> = lines.iter().filter(|line| line["message"] == "access").collect();
    assert_eq!(access.len(), 2, "one record for each request");
    let good = access[0];
    for (field, value) in [
        ("method", "GET"),
        ("authority", "web.shop.svc.cluster.local"),
        ("path", "/page"),
        ("protocol", "HTTP/1.1"),
        ("upstream_protocol", "HTTP/1.1"),
        ("service", "web"),
        ("namespace", "shop"),
        ("connection", "new"),
    ] {
        assert_eq!(good[field], value, "{good}");
    }
    assert_eq!((&good["status"], &good["attempts"]), (&200.into(), &1.into()));
    assert!(good["pod"].as_str().unwrap().starts_with("web-"));
    assert!(good["duration_ms"].as_f64() >= good["first_byte_ms"].as_f64());
    assert!(good.get("flag").is_none(), "{good}");
    let bad = access[1];
    assert_eq!((&bad["status"], &bad["flag"]), (&404.into(), &"NC".into()));
    assert!(bad["reason"].as_str().unwrap().contains("not found"));
}

#[tokio::test]
async fn text_lines_have_their_fields_in_a_fixed_order_and_no_colour_in_a_pipe() {
    let lines = lines("text").await;
    assert!(lines.iter().all(|line| !line.contains('\u{1b}')), "{lines:?}");
    let line = lines.iter().find(|line| line.contains(" access ")).unwrap();
    let order = [
        "method=",
        "authority=",
        "path=",
        "status=",
        "protocol=",
        "service=",
        "pod=",
        "duration_ms=",
        "attempts=",
    ];
    let places: Vec<_> = order
        .iter()
        .map(|field| line.find(&format!(" {field}")).unwrap())
        .collect();
    assert!(places.is_sorted(), "{line}");
    assert!(
        !line.contains("secret"),
        "the query does not belong into the log: {line}"
    );
}

#[tokio::test]
async fn trace_shows_the_frames_on_both_sides() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let (running, log, address) = start(&cluster, &["--log-level=trace"]).await;
    let mut client = Client::h2c(address).await;
    assert_eq!(client.get("web.shop", "/?secret=1").await.status, StatusCode::OK);
    let log = log.until("access").await;
    for frame in [
        "SYN_STREAM to be sent",
        "SYN_REPLY stream=",
        "DATA stream=",
        "Headers {",
    ] {
        assert!(
            log.seen.iter().any(|line| line.contains(frame)),
            "{frame}: {:#?}",
            log.seen
        );
    }
    assert!(
        !log.seen.iter().any(|line| line.contains("secret")),
        "{:#?}",
        log.seen
    );
    running.signal("-TERM");
    running.wait().await;
}

#[tokio::test]
async fn a_request_that_cannot_be_read_is_in_the_log_too() {
    let cluster = FakeCluster::start().await.unwrap();
    let flags = ["--max-header-fields=32", "--max-header-bytes=262144"];
    let (running, log, address) = start(&cluster, &flags).await;
    let fields: String = (0..40).map(|n| format!("X-{n}: 1\r\n")).collect();
    for (request, status) in [
        (format!("GET / HTTP/1.1\r\nHost: web.shop\r\n{fields}\r\n"), "431"),
        (
            format!("GET /{} HTTP/1.1\r\nHost: web.shop\r\n\r\n", "x".repeat(70_000)),
            "414",
        ),
        ("GET / HTTP/1.1\r\nHost : web.shop\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = raw(address, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    let mut log = log;
    for _ in 0..3 {
        log = log.until("cannot be read").await;
    }
    // Three connections: their lines come in any order.
    let said = |words: &str| {
        let lines = log.seen.iter().filter(|line| line.contains("cannot be read"));
        lines.filter(|line| line.contains(words)).count()
    };
    assert_eq!(said("--max-header-fields"), 1, "{:#?}", log.seen);
    assert_eq!(said("(414)"), 1, "{:#?}", log.seen);
    running.signal("-TERM");
    running.wait().await;
}

#[tokio::test]
async fn requests_that_a_second_signal_cuts_off_are_in_the_log() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let (running, log, address) = start(&cluster, &[]).await;
    let (mut http1, mut http2) = (Client::http1(address).await, Client::h2c(address).await);
    let without_end = || get("web.shop", "/sse?count=1000000&interval_ms=50");
    let _streams = (http1.send(without_end()).await, http2.send(without_end()).await);
    running.signal("-INT");
    let log = log.until("stopping").await;
    running.signal("-INT");
    assert_eq!(running.wait().await.code(), Some(1));
    let log = log.until(" access ").await.until(" access ").await;
    let records: Vec<_> = log
        .seen
        .iter()
        .filter(|line| line.contains("path=\"/sse\""))
        .collect();
    assert_eq!(records.len(), 2, "{:#?}", log.seen);
}

#[tokio::test]
async fn a_log_that_nobody_reads_holds_up_no_request() {
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let (running, log, address) = start(&cluster, &["--log-level=debug"]).await;
    // More than a pipe holds, and more lines than wait for it.
    let mut client = Client::http1(address).await;
    for _ in 0..2500 {
        let answered = async { Reply::read(client.send(get("web.shop", "/")).await).await };
        let reply = tokio::time::timeout(PATIENCE, answered).await;
        assert_eq!(reply.expect("held up by the log").status, StatusCode::OK);
    }
    running.signal("-TERM");
    running.wait().await;
    drop(log);
}
