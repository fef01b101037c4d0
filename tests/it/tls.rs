//! TLS on the one port (contract C1 to C3).

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, Workload};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::app::TestApp;
use crate::client::{Client, Reply};

const WEB: &str = "web.shop.svc.cluster.local";

async fn app() -> (FakeCluster, Workload, TestApp) {
    let cluster = FakeCluster::start().await.unwrap();
    let any = || Serve::Http(Protocols::Any);
    let builder = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .serve(any());
    let workload = builder.port("http-tls", 443, 8443).serve(any()).create().unwrap();
    let app = TestApp::start(&cluster).await;
    (cluster, workload, app)
}

/// Connects as a client that trusts the exported certificate and nothing else.
async fn connect(
    app: &TestApp,
    name: &str,
    alpn: &[&str],
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let exported = app.folder.path().join("tls/cluster.local/server.crt");
    connect_to(app.address, &exported, name, alpn, versions).await
}

/// Connects as a client that trusts the certificate in a file and nothing else.
pub(crate) async fn connect_to(
    proxy: SocketAddr,
    trusted: &Path,
    name: &str,
    alpn: &[&str],
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(trusted).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(proxy).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[tokio::test]
async fn a_client_that_trusts_the_exported_certificate_verifies_service_hosts() {
    let (_cluster, workload, app) = app().await;
    for (alpn, version) in [
        ("h2", &rustls::version::TLS13),
        ("http/1.1", &rustls::version::TLS12),
    ] {
        let stream = connect(&app, WEB, &[alpn], &[version]).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(session.alpn_protocol(), Some(alpn.as_bytes()));
        assert_eq!(
            session.protocol_version() == Some(ProtocolVersion::TLSv1_3),
            alpn == "h2"
        );
        let reply = match alpn {
            "h2" => {
                let io = TokioIo::new(stream);
                let (mut sender, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                        .await
                        .unwrap();
                tokio::spawn(connection);
                let request = Request::get(format!("https://{WEB}/page"))
                    .body(Full::<bytes::Bytes>::default())
                    .unwrap();
                Reply::read(sender.send_request(request).await.unwrap()).await
            }
            _ => {
                let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .unwrap();
                tokio::spawn(connection);
                Client::Http1(sender).get(WEB, "/page").await
            }
        };
        assert_eq!(
            (reply.status, reply.pod()),
            (StatusCode::OK, workload.pods[0].name.clone())
        );
    }
}

#[tokio::test]
async fn health_tells_the_protocol_and_localhost_verifies_too() {
    let (_cluster, _workload, app) = app().await;
    for name in ["localhost", "127.0.0.1"] {
        let stream = connect(&app, name, &["http/1.1"], rustls::DEFAULT_VERSIONS)
            .await
            .unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let health = Client::Http1(sender).get(name, "/health").await.json();
        assert_eq!(health["protocol"], "HTTP/1.1 (TLS) ALPN:http/1.1");
    }
    let stream = connect(&app, "localhost", &["h2"], rustls::DEFAULT_VERSIONS)
        .await
        .unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = Request::get("https://localhost/health").body(Full::<bytes::Bytes>::default());
    let answer = sender.send_request(request.unwrap()).await.unwrap();
    assert_eq!(
        Reply::read(answer).await.json(),
        serde_json::json!({
            "status": "healthy",
            "protocol": "HTTP/2.0 (TLS) ALPN:h2",
            "version": env!("CARGO_PKG_VERSION"),
            "features": ["http/1.1", "h2c", "h2", "grpc"],
        })
    );
}

#[tokio::test]
async fn a_client_without_alpn_is_told_apart_by_its_first_bytes() {
    let (_cluster, _workload, app) = app().await;
    let mut stream = connect(&app, WEB, &[], rustls::DEFAULT_VERSIONS).await.unwrap();
    let request = format!("GET / HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[tokio::test]
async fn the_authority_vouches_for_the_zone_and_this_machine_only() {
    let (_cluster, _workload, app) = app().await;
    for foreign in ["www.example.com", "web.shop.svc.other.zone", "192.0.2.1"] {
        let error = connect(&app, foreign, &[], rustls::DEFAULT_VERSIONS)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("certificate"), "{foreign}: {error}");
    }
}

#[tokio::test]
async fn a_bad_hello_closes_the_connection_and_nothing_else() {
    let (_cluster, _workload, app) = app().await;
    for hello in [
        &b"\x16\x03\x01\x00\x05hello"[..],
        b"\x16\x03\x01\xff\xff",
        b"\x16\x02",
        b"\x00\x01\x02",
    ] {
        let mut stream = TcpStream::connect(app.address).await.unwrap();
        stream.write_all(hello).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(
            !answer.starts_with(b"HTTP"),
            "plain text in answer to a bad hello: {answer:?}"
        );
    }
    assert_eq!(
        crate::client::fetch(app.address, "web.shop", "/").await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_request_without_a_port_means_443() {
    let (_cluster, workload, app) = app().await;
    let stream = connect(&app, WEB, &["http/1.1"], rustls::DEFAULT_VERSIONS)
        .await
        .unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    assert_eq!(Client::Http1(sender).get(WEB, "/").await.status, StatusCode::OK);
    crate::client::fetch(app.address, WEB, "/").await;
    let backends = &workload.pods[0].backends;
    let requests: Vec<_> = backends
        .iter()
        .map(|backend| backend.http().unwrap().requests().len())
        .collect();
    assert_eq!(requests, [1, 1], "one over TLS to 443, one in clear text to 80");
}

/// A backend that speaks TLS with a certificate of its own making, and tells what was spoken to it.
async fn tls_backend(names: &[&str], alpn: &[&str]) -> (std::net::SocketAddr, String) {
    let (acceptor, certificate) = acceptor(names, alpn);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let name = stream.get_ref().1.server_name().unwrap_or_default().to_owned();
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let text = format!("{:?} to {name}", request.version());
                    async move {
                        Ok::<_, std::convert::Infallible>(http::Response::new(Full::<bytes::Bytes>::from(
                            text,
                        )))
                    }
                });
                let io = TokioIo::new(stream);
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(io, service).await;
            });
        }
    });
    (address, certificate)
}

/// Accepts TLS with a certificate of its own making, which is returned too.
pub(crate) fn acceptor(names: &[&str], alpn: &[&str]) -> (tokio_rustls::TlsAcceptor, String) {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    (tokio_rustls::TlsAcceptor::from(Arc::new(config)), made.cert.pem())
}

#[tokio::test]
async fn a_service_port_that_speaks_tls_is_spoken_to_in_tls_with_the_services_name() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = tls_backend(&["whatever.example"], &["h2", "http/1.1"]).await;
    let builder = cluster
        .workload("shop", "web")
        .port("https", 443, 8443)
        .backend(move |_| address);
    let _workload = builder
        .port("h2", 8443, 8444)
        .backend(move |_| address)
        .create()
        .unwrap();
    let app = TestApp::start(&cluster).await;
    for host in ["web.shop:443", "web.shop:8443"] {
        let reply = crate::client::fetch(app.address, host, "/").await;
        assert_eq!(reply.text(), format!("HTTP/2.0 to {WEB}"), "the pod prefers it");
    }
}

#[tokio::test]
async fn a_pod_chooses_the_version_of_http_over_tls_before_anything_is_sent() {
    for (alpn, hint, spoken) in [
        (&["h2"][..], "https", "HTTP/2.0"),
        (&["http/1.1"], "https", "HTTP/1.1"),
        (&["http/1.1"], "h2", "HTTP/1.1"),
        (&[], "https", "HTTP/1.1"),
    ] {
        let cluster = FakeCluster::start().await.unwrap();
        let (address, _) = tls_backend(&[WEB], alpn).await;
        let builder = cluster.workload("shop", "web").port(hint, 443, 8443);
        let _workload = builder.backend(move |_| address).create().unwrap();
        // What is sent to the wrong version cannot be sent again: it is a POST, and retries are off.
        let app = TestApp::with(
            &cluster.kubeconfig(),
            &[(&kube_tunnel::config::setting::MAX_RETRIES, "0")],
        )
        .await;
        let request = Request::post("/")
            .header("host", "web.shop")
            .body(Full::from("body"))
            .unwrap();
        let answer = crate::client::Client::http1(app.address)
            .await
            .send(request)
            .await;
        let reply = crate::client::Reply::read(answer).await;
        assert_eq!(reply.text(), format!("{spoken} to {WEB}"), "{alpn:?}, {hint}");
    }
}

#[tokio::test]
async fn with_authorities_set_only_their_certificates_for_the_services_name_count() {
    use kube_tunnel::config::setting;
    let cluster = FakeCluster::start().await.unwrap();
    let (good, pem) = tls_backend(&[WEB], &["http/1.1"]).await;
    let (bad, _) = tls_backend(&[WEB], &["http/1.1"]).await;
    let _good = cluster
        .workload("shop", "web")
        .port("https", 443, 8443)
        .backend(move |_| good)
        .create()
        .unwrap();
    let _bad = cluster
        .workload("shop", "bad")
        .port("https", 443, 8443)
        .backend(move |_| bad)
        .create()
        .unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pem).unwrap();
    let flags = [
        (&setting::BACKEND_TLS, file.path().to_str().unwrap()),
        (&setting::MAX_RETRIES, "0"),
    ];
    let app = TestApp::with(&cluster.kubeconfig(), &flags).await;
    assert_eq!(
        crate::client::fetch(app.address, "web.shop", "/").await.status,
        StatusCode::OK
    );
    let reply = crate::client::fetch(app.address, "bad.shop", "/").await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    assert!(reply.text().contains("certificate"), "{}", reply.text());
}

#[tokio::test]
async fn many_first_requests_find_out_together_what_a_port_speaks() {
    let cluster = FakeCluster::start().await.unwrap();
    let (address, _) = tls_backend(&[WEB], &["h2"]).await;
    let builder = cluster.workload("shop", "web").port("https", 443, 8443);
    let _workload = builder.backend(move |_| address).create().unwrap();
    let app = TestApp::with(
        &cluster.kubeconfig(),
        &[(&kube_tunnel::config::setting::MAX_RETRIES, "0")],
    )
    .await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let proxy = app.address;
        clients.spawn(async move { crate::client::fetch(proxy, "web.shop", "/").await.text() });
    }
    for text in clients.join_all().await {
        assert_eq!(text, format!("HTTP/2.0 to {WEB}"));
    }
}
