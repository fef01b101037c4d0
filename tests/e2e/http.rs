//! Requests: what passes, as real clients send it.

use std::collections::BTreeSet;

use http::{Method, Request, StatusCode};

use crate::client::{Client, PROTOCOLS, Protocol, fetch, full, get};
use crate::command::run_client;
use crate::program::Proxy;
use crate::scene::Scene;

#[tokio::test]
async fn http1_and_h2c_clients_are_answered_by_a_pod() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let pods = scene.shop.pods("web").await;
    let host = scene.shop.host("web");
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        for _ in 0..3 {
            let reply = client.get(&host, "/hello?x=1").await;
            assert!(pods.contains(&reply.pod()), "{}", reply.text());
            assert_eq!(
                (&reply.json()["target"], &reply.json()["host"]),
                (&"/hello?x=1".into(), &host.clone().into())
            );
        }
    }
}

#[tokio::test]
async fn curl_is_answered_in_the_protocol_that_it_speaks() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let header = format!("Host: {}", scene.shop.host("web"));
    let url = format!("http://{}/hello", proxy.address);
    for (flag, version) in [
        ("--http1.1", "1.1"),
        ("--http2-prior-knowledge", "2"),
        ("--http1.0", "1"),
    ] {
        let format = "%{stderr}%{http_version} %{http_code}";
        let arguments = [
            "--silent",
            "--show-error",
            flag,
            "--header",
            &header,
            "--write-out",
            format,
            &url,
        ];
        let done = run_client("curl", &arguments).await;
        assert_eq!(done.stderr.trim(), format!("{version} 200"), "{flag}: {done:?}");
        assert!(done.stdout.contains("\"target\":\"/hello\""), "{flag}: {done:?}");
    }
}

#[tokio::test]
async fn the_raw_target_repeated_headers_and_the_body_pass_untouched() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let request = Request::post("/a//b/%2F/../c?q=%20&r")
            .header("host", scene.shop.host("web"))
            .header("x-many", "one")
            .header("x-many", "two")
            .header("cookie", "a=1; b=2")
            .header("user-agent", "e2e")
            .header("accept-encoding", "br")
            .body(full("some body"))
            .unwrap();
        let seen = client.exchange(request).await.unwrap().json();
        assert_eq!(
            (&seen["method"], &seen["target"]),
            (&"POST".into(), &"/a//b/%2F/../c?q=%20&r".into())
        );
        assert_eq!(
            (&seen["body"], &seen["body_bytes"]),
            (&"some body".into(), &9.into())
        );
        for (name, expected) in [
            ("X-Many", &["one", "two"][..]),
            ("Cookie", &["a=1; b=2"]),
            ("User-Agent", &["e2e"]),
            ("Accept-Encoding", &["br"]),
        ] {
            let pairs = seen["headers"].as_array().unwrap();
            let values: Vec<_> = pairs
                .iter()
                .filter(|pair| pair[0] == name)
                .map(|pair| &pair[1])
                .collect();
            assert_eq!(values, expected, "{protocol:?} {name}");
        }
    }
}

#[tokio::test]
async fn every_cookie_status_and_trailer_of_the_pod_arrives() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("web");
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        assert_eq!(
            client
                .get(&host, "/cookies")
                .await
                .headers
                .get_all("set-cookie")
                .iter()
                .count(),
            2
        );
        for status in [204, 304, 404, 418, 500, 503] {
            assert_eq!(
                client
                    .get(&host, &format!("/status/{status}"))
                    .await
                    .status
                    .as_u16(),
                status
            );
        }
        let mut request = get(&host, "/trailers");
        request.headers_mut().insert("te", "trailers".parse().unwrap());
        let reply = client.exchange(request).await.unwrap();
        assert!(
            reply
                .trailers
                .is_some_and(|trailers| trailers.contains_key("x-body-sha256")),
            "{protocol:?}"
        );
    }
}

#[tokio::test]
async fn the_answer_to_head_has_a_length_and_no_body() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("web");
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let mut head = get(&host, "/bytes/1000");
        *head.method_mut() = Method::HEAD;
        let reply = client.exchange(head).await.unwrap();
        assert_eq!(
            (reply.status, &reply.headers["content-length"]),
            (StatusCode::OK, &"1000".parse().unwrap())
        );
        assert!(reply.body.is_empty());
        assert_eq!(
            client.get(&host, "/bytes/1000").await.body.len(),
            1000,
            "the connection is good after a HEAD"
        );
    }
}

#[tokio::test]
async fn requests_are_spread_over_both_replicas() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let mut seen = BTreeSet::new();
        for _ in 0..10 {
            seen.insert(client.get(&scene.shop.host("web"), "/health").await.pod());
        }
        assert_eq!(seen, scene.shop.pods("web").await);
    }
}

#[tokio::test]
async fn many_clients_at_once_are_all_answered() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (address, host) = (proxy.address, scene.shop.host("web"));
        clients.spawn(async move {
            let mut client = Client::connect(address, Protocol::Http1).await.unwrap();
            for _ in 0..5 {
                client.get(&host, "/slow?ms=20").await.pod();
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
}

#[tokio::test]
async fn short_hosts_mean_the_same_service() {
    let scene = Scene::together().await;
    let (name, pods) = (&scene.shop.name, scene.shop.pods("web").await);
    let proxy = Proxy::with(&["--namespace", name]).await;
    for host in [
        "web".to_owned(),
        format!("web.{name}"),
        format!("web.{name}.svc"),
        format!("WEB.{name}.svc.cluster.local."),
    ] {
        assert!(
            pods.contains(&fetch(proxy.address, &host, "/health").await.pod()),
            "{host}"
        );
    }
}
