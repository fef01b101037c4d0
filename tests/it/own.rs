//! The pages of the proxy's own hosts (contract D6, D7).

use std::process::Stdio;

use http::{Method, Request, StatusCode};
use http_body_util::Full;
use kube_tunnel::config::setting;
use kube_tunnel::testing::FakeCluster;
use serde_json::{Value, json};

use crate::app::{PATIENCE, TestApp, web};
use crate::client::{Client, Reply, fetch, get};
use crate::program::{Lines, Running, address, kubeconfig, path, program};

const WEB: &str = "web.shop.svc.cluster.local";

async fn services(app: &TestApp) -> Value {
    fetch(app.address, "localhost", "/services").await.json()["services"].clone()
}

#[tokio::test]
async fn services_tells_what_is_in_use_and_what_is_not_there() {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 2);
    let app = TestApp::start(&cluster).await;
    assert_eq!(services(&app).await, json!([]), "nothing was asked for yet");

    let mut client = Client::http1(app.address).await;
    let pod = client.get(WEB, "/").await.pod();
    fetch(app.address, "nosuch.shop", "/").await;
    // Its answer begins and does not end.
    let mut stream = Client::http1(app.address).await;
    let events = stream.send(get(WEB, "/sse?count=1000&interval_ms=10")).await;

    let services = services(&app).await;
    let [nosuch, web] = &services.as_array().unwrap()[..] else {
        panic!("{services:#}");
    };
    assert_eq!(
        (&nosuch["name"], &nosuch["state"]),
        (&json!("nosuch"), &json!("error"))
    );
    assert_eq!(nosuch["error"]["kind"], "not-found");
    let mut members: Vec<_> = web.as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    assert_eq!(
        members,
        [
            "addresses_without_pod",
            "endpoints",
            "error",
            "external_name",
            "host",
            "last_used",
            "name",
            "namespace",
            "ports",
            "state",
            "type"
        ],
        "these names are documented"
    );
    assert_eq!((&web["namespace"], &web["host"]), (&json!("shop"), &json!(WEB)));
    assert_eq!(
        (&web["state"], &web["type"]),
        (&json!("ready"), &json!("virtual"))
    );
    assert_eq!(
        web["ports"],
        json!([{"name": "http", "port": 80, "protocol": "TCP", "app_protocol": null, "target_port": "http"}])
    );
    let last_used: jiff::Timestamp = web["last_used"].as_str().unwrap().parse().unwrap();
    assert!(
        jiff::Timestamp::now().duration_since(last_used).as_secs() < 60,
        "{last_used}"
    );

    let endpoints = web["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 2);
    let sum = |member: &str| {
        endpoints
            .iter()
            .map(|endpoint| endpoint[member].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(sum("requests_in_flight"), 1);
    for endpoint in endpoints {
        assert_eq!(endpoint["namespace"], "shop");
        assert_eq!(endpoint["addresses"].as_array().unwrap().len(), 1, "{endpoint:#}");
        let flags = (&endpoint["ready"], &endpoint["terminating"], &endpoint["serving"]);
        assert_eq!(flags, (&json!(true), &json!(false), &json!(true)));
    }
    let used = endpoints
        .iter()
        .find(|endpoint| endpoint["pod"] == pod.as_str())
        .unwrap();
    assert_eq!(used["ports"][0]["backend_protocol"], "HTTP/1.1", "{used:#}");
    assert!(used["ports"][0]["connections"].as_u64().unwrap() >= 1, "{used:#}");

    drop((events, stream));
    let pod = workload.pods[0].name.clone();
    assert!(cluster.set_ready("shop", &pod, false));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let services = self::services(&app).await;
        let endpoints = services[1]["endpoints"].as_array().unwrap();
        let unready = endpoints
            .iter()
            .find(|endpoint| endpoint["pod"] == pod.as_str())
            .unwrap();
        let idle = endpoints
            .iter()
            .all(|endpoint| endpoint["requests_in_flight"] == 0);
        if unready["serving"] == false && idle {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{services:#}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn own_pages_are_read_and_nothing_else() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    for http2 in [false, true] {
        let mut client = if http2 {
            Client::h2c(app.address).await
        } else {
            Client::http1(app.address).await
        };
        for page in ["/health", "/services"] {
            let mut ask = async |method: Method| {
                let request = Request::builder()
                    .method(method)
                    .uri(page)
                    .header("host", "localhost");
                Reply::read(client.send(request.body(Full::default()).unwrap()).await).await
            };
            let (whole, head) = (ask(Method::GET).await, ask(Method::HEAD).await);
            assert_eq!((whole.status, head.status), (StatusCode::OK, StatusCode::OK));
            assert_eq!(head.body.len(), 0);
            assert_eq!(head.headers["content-length"], whole.body.len().to_string());
            assert_eq!(head.headers["content-type"], "application/json");
            for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
                let refused = ask(method.clone()).await;
                assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {page}");
                assert_eq!(refused.headers["allow"], "GET, HEAD");
            }
        }
    }
}

#[tokio::test]
async fn probes_are_answered() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    for page in ["/livez", "/readyz"] {
        let reply = fetch(app.address, "localhost", page).await;
        assert_eq!(
            (reply.status, reply.text().as_str()),
            (StatusCode::OK, "ok\n"),
            "{page}"
        );
    }
}

#[tokio::test]
async fn a_name_that_was_made_to_point_here_gets_no_own_page() {
    let cluster = FakeCluster::start().await.unwrap();
    let app = TestApp::start(&cluster).await;
    for page in ["/health", "/services"] {
        for host in [
            "www.evil.example",
            "evil",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            let reply = fetch(app.address, &format!("{host}:{}", app.address.port()), page).await;
            assert_eq!(
                reply.status,
                StatusCode::BAD_REQUEST,
                "{host}{page}: {}",
                reply.text()
            );
            assert!(
                reply.text().contains("is not a host of this cluster"),
                "{}",
                reply.text()
            );
        }
        // A name of two labels may be a Service, and is looked up as one.
        let reply = fetch(app.address, "evil.example", page).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{}", reply.text());
        for host in ["0.0.0.0", "192.0.2.1", "[::]"] {
            let reply = fetch(app.address, host, page).await;
            assert_eq!(
                reply.status,
                StatusCode::FORBIDDEN,
                "{host}{page}: {}",
                reply.text()
            );
            assert!(reply.text().contains("ask localhost"), "{}", reply.text());
        }
        for host in [
            "localhost",
            "LOCALHOST.:8080",
            "kube.localhost",
            "127.0.0.1",
            "[::1]",
        ] {
            assert_eq!(
                fetch(app.address, host, page).await.status,
                StatusCode::OK,
                "{host}{page}"
            );
        }
    }
}

#[tokio::test]
async fn a_page_of_another_site_gets_no_own_page() {
    let cluster = FakeCluster::start().await.unwrap();
    let ask = async |app: &TestApp, origin: &str, page: &str| {
        let mut request = get("localhost", page);
        request.headers_mut().insert("origin", origin.parse().unwrap());
        Reply::read(Client::http1(app.address).await.send(request).await).await
    };
    let app = TestApp::start(&cluster).await;
    for page in ["/health", "/services"] {
        for origin in [
            "https://evil.example",
            "null",
            "http://localhost.evil.example",
            "http://web.shop",
        ] {
            let reply = ask(&app, origin, page).await;
            assert_eq!(
                reply.status,
                StatusCode::FORBIDDEN,
                "{origin}{page}: {}",
                reply.text()
            );
            assert!(
                !reply.headers.contains_key("access-control-allow-origin"),
                "{origin}"
            );
        }
        let reply = ask(&app, "http://localhost:3000", page).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        assert_eq!(
            reply.headers["access-control-allow-origin"],
            "http://localhost:3000"
        );
    }
    let open = TestApp::with(&cluster.kubeconfig(), &[(&setting::CORS_ALLOW_ORIGIN, "*")]).await;
    assert_eq!(
        ask(&open, "https://evil.example", "/health").await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_service_that_leads_back_has_its_own_pages_and_does_not_go_round_and_round() {
    let cluster = FakeCluster::start().await.unwrap();
    let kubeconfig = kubeconfig(&cluster.kubeconfig());
    // Whoever listens where the pod's port is, it is kube-tunnel that listens on that number here.
    let (app, own_port) = (web(&cluster, 2), free_port());
    let own = cluster
        .workload("shop", "own")
        .port("http", 80, own_port)
        .replicas(2)
        .create()
        .unwrap();
    for (pod, host, expected) in [
        (&own.pods[1].name, "own.shop.svc.cluster.local", "ok\n"),
        // Beside it in a pod is another program.
        (&app.pods[1].name, WEB, ""),
    ] {
        let port = format!("--port={own_port}");
        let mut command = program(&[&port, "--bind=127.0.0.1", "--kubeconfig", path(&kubeconfig)]);
        command.env("POD_NAMESPACE", "shop").env("POD_NAME", pod);
        let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
        let log = Lines::new(running.0.stderr.take().unwrap())
            .until("listening")
            .await;
        let reply = fetch(address(&log), host, "/livez").await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        match expected {
            "" => drop(reply.pod()),
            page => assert_eq!(reply.text(), page),
        }
    }
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
