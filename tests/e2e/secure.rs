//! TLS, `Upgrade: h2c` and WebSocket, as curl speaks them.

use crate::command::run_client;
use crate::program::Proxy;
use crate::scene::Scene;

/// What curl says of a response: its version and status, and its body.
async fn curl(arguments: &[&str]) -> (String, String) {
    let mut all = vec![
        "--silent",
        "--show-error",
        "--write-out",
        "%{stderr}%{http_version} %{http_code}",
    ];
    all.extend(arguments);
    let done = run_client("curl", &all).await;
    (done.stderr.trim().to_owned(), done.stdout)
}

#[tokio::test]
async fn curl_verifies_a_service_host_against_the_exported_certificate() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let (certificate, connect) = (proxy.certificate(), format!("::{}", proxy.endpoint()));
    for (flag, version) in [("--http2", "2"), ("--http1.1", "1.1")] {
        // Port 443 of `multi` speaks TLS in the pod as well, and `web` does not.
        for service in ["web", "multi"] {
            let url = format!("https://{}/hello", scene.shop.host(service));
            let trust = certificate.to_str().unwrap();
            let (told, body) = curl(&[flag, "--cacert", trust, "--connect-to", &connect, &url]).await;
            assert_eq!(told, format!("{version} 200"), "{flag} {url}: {body}");
            assert!(body.contains("\"target\":\"/hello\""), "{body}");
        }
    }
}

#[tokio::test]
async fn an_upgrade_to_h2c_ends_on_http2() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = format!("Host: {}", scene.shop.host("web"));
    let url = format!("http://{}/hello", proxy.address);
    let (told, body) = curl(&["--http2", "--header", &host, &url]).await;
    assert_eq!(told, "2 200", "{body}");
    let (told, body) = curl(&["--http2", "--header", &host, "--data", "with a body", &url]).await;
    assert_eq!(
        told, "1.1 200",
        "a request with a body is answered in HTTP/1.1: {body}"
    );
    assert!(body.contains("with a body"), "{body}");
}

#[tokio::test]
async fn a_websocket_reaches_the_pod() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let stream = tokio::net::TcpStream::connect(proxy.address).await.unwrap();
    let url = format!("ws://{}/ws", scene.shop.host("web"));
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    for text in ["first", "second"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
    socket.close(None).await.unwrap();
}
