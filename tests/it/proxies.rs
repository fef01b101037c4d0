//! The proxy on the way to the API server (contract B4).

use std::net::SocketAddr;

use http::StatusCode;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::app::TestApp;
use crate::client::fetch;
use crate::kubeconfig::{WEB, cluster};

#[tokio::test]
async fn the_clusters_own_proxy_is_used_for_lookups_and_port_forwards() {
    let (cluster, _workload) = cluster().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let (seen, mut tunnels) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(connect_proxy(stream, seen.clone()));
        }
    });
    let server = format!("server: {}", cluster.url());
    let pad = cluster
        .kubeconfig()
        .lines()
        .find_map(|line| line.find("server:"))
        .unwrap();
    let own = format!(
        "{server}\n{}proxy-url: http://user:p%40ss@{proxy}",
        " ".repeat(pad)
    );
    let app = TestApp::with(&cluster.kubeconfig().replace(&server, &own), &[]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    let head = tunnels.recv().await.unwrap();
    assert!(
        head.starts_with(&format!("CONNECT {} ", cluster.address())),
        "{head}"
    );
    assert!(
        head.contains("dXNlcjpwQHNz"),
        "the password of the URL is sent, decoded: {head}"
    );
}

/// Serves one CONNECT of an HTTP proxy.
async fn connect_proxy(stream: TcpStream, seen: mpsc::UnboundedSender<String>) {
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let target: SocketAddr = head.split(' ').nth(1).unwrap().parse().unwrap();
    let _ = seen.send(head);
    let mut server = TcpStream::connect(target).await.unwrap();
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
}
