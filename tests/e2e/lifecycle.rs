//! The end of the program.

use tokio::net::TcpStream;

use crate::client::{Client, PROTOCOLS};
use crate::command::eventually;
use crate::events::Events;
use crate::program::Proxy;
use crate::scene::Scene;

#[tokio::test]
async fn sigterm_lets_a_running_stream_end_and_ends_with_success() {
    let scene = Scene::together().await;
    for protocol in PROTOCOLS {
        let mut proxy = Proxy::start().await;
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let mut events = Events::open(
            &mut client,
            &scene.shop.host("web"),
            "/sse?count=15&interval_ms=100",
        )
        .await;
        events.next().await.unwrap();

        proxy.terminate();

        eventually("the port to close", async || {
            TcpStream::connect(proxy.address).await.is_err()
        })
        .await;
        let mut last = 0;
        while let Some(event) = events.next().await {
            last = event["seq"].as_u64().unwrap();
        }
        assert_eq!(last, 14, "{protocol:?}");
        assert_eq!(proxy.ended().await.code(), Some(0), "{}", proxy.log());
        assert!(
            proxy.log().contains("every request was completed"),
            "{}",
            proxy.log()
        );
    }
}

#[tokio::test]
async fn the_deadline_cuts_a_stream_without_end() {
    let scene = Scene::together().await;
    let mut proxy = Proxy::with(&["--drain-timeout=500ms"]).await;
    let mut client = Client::connect(proxy.address, PROTOCOLS[0]).await.unwrap();
    let mut events = Events::open(&mut client, &scene.shop.host("web"), "/sse?count=0").await;
    events.next().await.unwrap();
    proxy.terminate();
    assert_eq!(proxy.ended().await.code(), Some(0), "{}", proxy.log());
    assert!(proxy.log().contains("cut off at the deadline"), "{}", proxy.log());
}
