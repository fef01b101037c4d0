//! With `LOG_LEVEL=debug` the log tells why a request was slow, refused or tried again (contract H1, H2).

use std::net::SocketAddr;

use http::StatusCode;
use kube_tunnel::testing::{FakeCluster, ForwardFault};
use serde_json::Value;

use crate::app::web;
use crate::client::fetch;
use crate::log::start;
use crate::program::{Lines, Running};

const WEB: &str = "web.shop.svc.cluster.local";

/// The program with a debug log.
struct Proxy {
    running: Running,
    log: Lines,
    address: SocketAddr,
}

impl Proxy {
    async fn start(cluster: &FakeCluster, format: &str) -> Self {
        let format = format!("--log-format={format}");
        let (running, log, address) =
            start(cluster, &[&format, "--log-level=debug", "--retry-delay-ms=50"]).await;
        Self {
            running,
            log,
            address,
        }
    }

    /// Stops the program, and returns what it logged about the request of this number, in order.
    async fn story(self, request: u64) -> Vec<Value> {
        let lines = self.lines().await;
        let parsed = lines
            .iter()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        parsed.filter(|line| line["request"] == request).collect()
    }

    async fn lines(self) -> Vec<String> {
        self.running.signal("-TERM");
        let log = self.log.until("every request was completed").await;
        self.running.wait().await;
        for line in log.seen.iter().filter(|line| line.starts_with('{')) {
            for name in ["timestamp", "level", "target", "message"] {
                // A field of an event by that name would stand there twice.
                assert_eq!(line.matches(&format!("\"{name}\":")).count(), 1, "{line}");
            }
        }
        log.seen
    }
}

fn messages(story: &[Value]) -> Vec<&str> {
    story
        .iter()
        .map(|line| line["message"].as_str().unwrap())
        .collect()
}

/// The line with this message.
fn line<'a>(story: &'a [Value], message: &str) -> &'a Value {
    story
        .iter()
        .find(|line| line["message"] == message)
        .unwrap_or_else(|| panic!("no {message:?} in {story:#?}"))
}

#[tokio::test]
async fn a_slow_backend_is_told_from_a_slow_lookup_and_a_slow_tunnel() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    let proxy = Proxy::start(&cluster, "json").await;
    let latency = std::time::Duration::from_millis(100);
    cluster.faults().set_api_latency(latency);
    fetch(proxy.address, WEB, "/slow?ms=300").await;
    fetch(proxy.address, WEB, "/slow?ms=300").await;
    let lines = proxy.lines().await;
    let lines: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let story = |number: u64| -> Vec<Value> {
        lines
            .iter()
            .filter(|line| line["request"] == number)
            .cloned()
            .collect()
    };
    let ms = |line: &Value, field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field}: {line}"));

    let first = story(1);
    assert_eq!(
        messages(&first),
        ["service resolved", "endpoint chosen", "pod answered", "access"]
    );
    let resolved = line(&first, "service resolved");
    assert_eq!(resolved["service"], "shop/web");
    assert!(ms(resolved, "resolve_ms") >= 100.0, "{resolved}");
    assert!(resolved["ready_wait_ms"].is_null(), "it did not wait: {resolved}");
    let chosen = line(&first, "endpoint chosen");
    let target = format!("shop/{}:8080", workload.pods[0].name);
    assert_eq!(chosen["endpoint"], target.as_str());
    assert_eq!(
        (&chosen["candidates"], &chosen["protocol"]),
        (&1.into(), &"HTTP/1.1".into())
    );
    let answered = line(&first, "pod answered");
    assert_eq!(answered["connection"], "new");
    assert!(ms(answered, "connection_ms") >= 100.0, "{answered}");
    assert!(
        ms(answered, "ms") - ms(answered, "connection_ms") >= 300.0,
        "{answered}"
    );
    let opened = line(&lines, "stream to the pod opened");
    assert!(
        opened["endpoint"] == target.as_str() && ms(opened, "ms") >= 100.0,
        "{opened}"
    );

    let second = story(2);
    let (resolved, answered) = (line(&second, "service resolved"), line(&second, "pod answered"));
    let sooner = |now: &Value, before: &str, field: &str| ms(now, field) < ms(line(&first, before), field);
    assert!(sooner(resolved, "service resolved", "resolve_ms"), "{resolved}");
    assert_eq!(answered["connection"], "reused");
    assert!(
        sooner(answered, "pod answered", "connection_ms") && ms(answered, "ms") >= 300.0,
        "{answered}"
    );
}

#[tokio::test]
async fn a_request_that_is_refused_everywhere_tells_each_try_and_pause() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::Refused));
    let proxy = Proxy::start(&cluster, "json").await;
    assert_eq!(
        fetch(proxy.address, WEB, "/").await.status,
        StatusCode::BAD_GATEWAY
    );
    let story = proxy.story(1).await;
    let attempts: Vec<_> = story
        .iter()
        .filter(|line| line["message"] == "attempt failed")
        .collect();
    assert_eq!(attempts.len(), 1 + 3, "{story:#?}");
    for (number, attempt) in attempts.iter().enumerate() {
        assert_eq!(attempt["attempt"], number + 1);
        assert!(
            attempt["error"].as_str().unwrap().contains("refused"),
            "{attempt}"
        );
    }
    let pauses: Vec<_> = story
        .iter()
        .filter_map(|line| line["pause_ms"].as_f64())
        .collect();
    assert_eq!(pauses.len(), 3);
    for (pause, longest) in pauses.iter().zip([50.0, 100.0, 200.0]) {
        assert!((longest * 0.75..=longest).contains(pause), "{pauses:?}");
    }
    let access = story.last().unwrap();
    assert_eq!((&access["flag"], &access["attempts"]), (&"UF".into(), &4.into()));
}

#[tokio::test]
async fn a_request_that_moved_to_another_pod_tells_both() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let [bad, good] = [0, 1].map(|pod| format!("shop/{}:8080", workload.pods[pod].name));
    cluster
        .faults()
        .set_forward("shop", &workload.pods[0].name, Some(ForwardFault::Refused));
    let proxy = Proxy::start(&cluster, "json").await;
    // The endpoints take turns: one of two requests meets the bad one first.
    for _ in 0..2 {
        assert_eq!(fetch(proxy.address, WEB, "/").await.status, StatusCode::OK);
    }
    let lines = proxy.lines().await;
    let lines: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let failed = line(&lines, "attempt failed");
    assert_eq!(
        (&failed["endpoint"], &failed["verdict"]),
        (&bad.into(), &"MoveOn".into())
    );
    let story: Vec<Value> = lines
        .iter()
        .filter(|line| line["request"] == failed["request"])
        .cloned()
        .collect();
    assert_eq!(
        messages(&story),
        [
            "service resolved",
            "endpoint chosen",
            "attempt failed",
            "service resolved",
            "endpoint chosen",
            "pod answered",
            "access"
        ]
    );
    assert_eq!(line(&story, "pod answered")["endpoint"], good.as_str());
}

#[tokio::test]
async fn a_request_that_waited_for_a_ready_pod_tells_for_how_long() {
    for format in ["json", "text"] {
        let cluster = FakeCluster::start().await.unwrap();
        let workload = web(&cluster, 1);
        let pod = &workload.pods[0].name;
        assert!(cluster.set_ready("shop", pod, false));
        let mut proxy = Proxy::start(&cluster, format).await;
        let asking = tokio::spawn(fetch(proxy.address, WEB, "/"));
        proxy.log = proxy.log.until("waiting for a ready pod").await;
        assert!(cluster.set_ready("shop", pod, true));
        assert_eq!(asking.await.unwrap().status, StatusCode::OK);
        if format == "json" {
            let story = proxy.story(1).await;
            assert_eq!(
                messages(&story),
                [
                    "waiting for a ready pod",
                    "service resolved",
                    "endpoint chosen",
                    "pod answered",
                    "access"
                ]
            );
            assert!(line(&story, "service resolved")["ready_wait_ms"].as_f64() > Some(0.0));
            let reason = line(&story, "waiting for a ready pod")["reason"]
                .as_str()
                .unwrap();
            assert!(
                reason.contains("1 found") && reason.contains("not ready"),
                "{reason}"
            );
        } else {
            let lines = proxy.lines().await;
            let story: Vec<_> = lines.iter().filter(|line| line.contains(" request=1")).collect();
            let places = [
                "waiting for a ready pod",
                "ready_wait_ms=",
                "endpoint chosen",
                "pod answered",
                "access",
            ]
            .map(|words| story.iter().position(|line| line.contains(words)));
            assert!(
                places.iter().all(Option::is_some) && places.is_sorted(),
                "{story:#?}"
            );
        }
    }
}
