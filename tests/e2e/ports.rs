//! Ports by number and by name, and pods by name.

use crate::client::{Client, PROTOCOLS};
use crate::program::Proxy;
use crate::scene::Scene;

#[tokio::test]
async fn the_port_of_the_host_picks_the_services_port_and_its_protocol() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        for (port, spoken) in [(80, "HTTP/1.1"), (8081, "HTTP/1.1"), (8082, "HTTP/2.0")] {
            let host = format!("{}:{port}", scene.shop.host("multi"));
            let reply = client.get(&host, "/").await;
            reply.pod();
            assert_eq!(
                (&reply.json()["proto"], &reply.json()["host"]),
                (&spoken.into(), &host.clone().into())
            );
        }
    }
}

#[tokio::test]
async fn a_host_without_a_port_means_port_eighty() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        assert_eq!(
            client.get(&scene.shop.host("multi"), "/").await.json()["proto"],
            "HTTP/1.1"
        );
    }
}

#[tokio::test]
async fn a_pod_of_a_headless_service_is_reached_by_its_name() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        for pod in ["db-0", "db-1", "db-0"] {
            let host = format!("{}:8080", scene.shop.host(&format!("{pod}.db")));
            for _ in 0..3 {
                assert_eq!(client.get(&host, "/health").await.pod(), pod);
            }
        }
        let reply = client
            .get(&format!("{}:8080", scene.shop.host("db-7.db")), "/health")
            .await;
        assert!(
            reply.status == 503 && reply.text().contains("db-7"),
            "{} {}",
            reply.status,
            reply.text()
        );
    }
}

#[tokio::test]
async fn a_headless_service_is_reached_as_a_whole() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let pods = scene.shop.pods("web").await;
    let mut client = Client::connect(proxy.address, PROTOCOLS[0]).await.unwrap();
    assert!(pods.contains(&client.get(&scene.shop.host("headless"), "/health").await.pod()));
}
