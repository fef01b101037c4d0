//! The proxy on the way to the API server (contract B4).

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use kube_tunnel::testing::{Carrier, FakeCluster};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use crate::app::TestApp;
use crate::client::fetch;
use crate::kubeconfig::{WEB, cluster, with_user};
use crate::program::{Lines, Running, address, kubeconfig, path, program, run};
use crate::tls::acceptor;

/// A name of the API server that its certificate has and no resolver here: only through a proxy it is reached.
const SERVER: &str = "kubernetes.default.svc";

/// The user and password that proxies ask for, and how a URL has them.
const LOGIN: (&str, &str) = ("user", "p@ss");
const IN_URL: &str = "user:p%40ss";

/// What a proxy speaks.
#[derive(Clone)]
enum Speaks {
    Connect,
    ConnectInTls(TlsAcceptor),
    Socks5 {
        /// Whether it asks for [`LOGIN`].
        login: bool,
    },
}

/// A proxy that leads to a cluster, whatever it is asked for.
struct Proxy {
    address: SocketAddr,
    /// What it was asked for, by connection.
    seen: mpsc::UnboundedReceiver<Seen>,
}

#[derive(Debug)]
struct Seen {
    target: String,
    /// What the head of a CONNECT says of the user, as it stands there.
    authorization: Option<String>,
}

impl Proxy {
    async fn start(cluster: &FakeCluster, speaks: Speaks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, seen) = mpsc::unbounded_channel();
        let server = cluster.address();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, speaks.clone(), server, tell.clone()));
            }
        });
        Self { address, seen }
    }

    /// What it was asked for since the last time.
    fn seen(&mut self) -> Vec<Seen> {
        std::iter::from_fn(|| self.seen.try_recv().ok()).collect()
    }
}

/// Serves one connection; a client that does it wrong is left alone.
async fn serve(
    mut stream: TcpStream,
    speaks: Speaks,
    server: SocketAddr,
    tell: mpsc::UnboundedSender<Seen>,
) -> io::Result<()> {
    let seen = match speaks {
        Speaks::Socks5 { login } => socks5(&mut stream, login).await?,
        Speaks::Connect => connect(&mut stream).await?,
        Speaks::ConnectInTls(acceptor) => {
            let mut stream = acceptor.accept(stream).await?;
            let _ = tell.send(connect(&mut stream).await?);
            return lead(&mut stream, server).await;
        }
    };
    let _ = tell.send(seen);
    lead(&mut stream, server).await
}

async fn lead(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), server: SocketAddr) -> io::Result<()> {
    let mut server = TcpStream::connect(server).await?;
    tokio::io::copy_bidirectional(stream, &mut server).await.map(drop)
}

/// Takes an HTTP CONNECT.
async fn connect(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<Seen> {
    // The client waits for the answer, so that nothing is left in the buffer.
    let mut reader = BufReader::new(&mut *stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    let target = head
        .strip_prefix("CONNECT ")
        .and_then(|rest| rest.split(' ').next());
    let authorization = head
        .lines()
        .find_map(|line| line.strip_prefix("Proxy-Authorization: "));
    Ok(Seen {
        target: target.unwrap().into(),
        authorization: authorization.map(str::to_owned),
    })
}

/// Takes a CONNECT of SOCKS5 (RFC 1928), and the user and password of RFC 1929 before that if they are asked for.
async fn socks5(stream: &mut TcpStream, login: bool) -> io::Result<Seen> {
    assert_eq!(stream.read_u8().await?, 5);
    let methods = short_text(stream).await?;
    let method = if login { 2 } else { 0 };
    if !methods.as_bytes().contains(&method) {
        stream.write_all(&[5, 0xff]).await?;
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.write_all(&[5, method]).await?;
    if login {
        assert_eq!(stream.read_u8().await?, 1);
        let (user, password) = (short_text(stream).await?, short_text(stream).await?);
        let right = (user.as_str(), password.as_str()) == LOGIN;
        stream.write_all(&[1, u8::from(!right)]).await?;
        if !right {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let host = match head {
        [5, 1, 0, 1] => Ipv4Addr::from(stream.read_u32().await?).to_string(),
        [5, 1, 0, 3] => short_text(stream).await?,
        other => panic!("not a CONNECT: {other:?}"),
    };
    let target = format!("{host}:{}", stream.read_u16().await?);
    stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    Ok(Seen {
        target,
        authorization: None,
    })
}

/// Reads bytes with their number in front.
async fn short_text(stream: &mut TcpStream) -> io::Result<String> {
    let mut bytes = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut bytes).await?;
    Ok(String::from_utf8(bytes).unwrap())
}

/// A kubeconfig with other settings in place of the server's address.
fn with_server(cluster: &FakeCluster, settings: &[String]) -> String {
    let text = cluster.kubeconfig();
    let server = format!("server: {}", cluster.url());
    let pad = text.lines().find_map(|line| line.find(&server)).unwrap();
    text.replace(&server, &settings.join(&format!("\n{}", " ".repeat(pad))))
}

fn through(cluster: &FakeCluster, proxy: &str) -> String {
    let port = cluster.address().port();
    with_server(
        cluster,
        &[
            format!("server: https://{SERVER}:{port}"),
            format!("proxy-url: {proxy}"),
        ],
    )
}

/// Asserts that a request is served, its lookup and its port-forward having gone through the proxy.
async fn assert_carries(cluster: &FakeCluster, kubeconfig: &str, proxy: &mut Proxy) -> Vec<Seen> {
    let before = cluster.forwards().counts().upgrades(Carrier::Spdy);
    let app = TestApp::with(kubeconfig, &[]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    assert!(
        cluster.forwards().counts().upgrades(Carrier::Spdy) > before,
        "no port-forward was opened"
    );
    let seen = proxy.seen();
    let server = format!("{SERVER}:{}", cluster.address().port());
    assert!(
        seen.len() >= 2,
        "the API calls and the port-forward have a connection each: {seen:?}"
    );
    assert!(seen.iter().all(|seen| seen.target == server), "{seen:?}");
    seen
}

#[tokio::test]
async fn the_clusters_own_http_proxy_carries_lookups_and_port_forwards() {
    let (cluster, _workload) = cluster().await;
    for (user, authorization) in [
        ("", None),
        (&format!("{IN_URL}@"), Some("user:p@ss")),
        ("user@", Some("user:")),
    ] {
        let mut proxy = Proxy::start(&cluster, Speaks::Connect).await;
        let kubeconfig = through(&cluster, &format!("http://{user}{}", proxy.address));
        let seen = assert_carries(&cluster, &kubeconfig, &mut proxy).await;
        let expected = authorization.map(|login| format!("Basic {}", STANDARD.encode(login)));
        assert!(seen.iter().all(|seen| seen.authorization == expected), "{seen:?}");
    }
}

#[tokio::test]
async fn a_proxy_that_speaks_tls_itself_is_trusted_as_the_server_is() {
    let (cluster, _workload) = cluster().await;
    let (acceptor, certificate) = acceptor(&["127.0.0.1"], &[]);
    let mut proxy = Proxy::start(&cluster, Speaks::ConnectInTls(acceptor)).await;
    let kubeconfig_text = through(&cluster, &format!("https://{IN_URL}@{}", proxy.address));
    let file = kubeconfig(&kubeconfig_text);
    let refused = run(&["-port=0", "--kubeconfig", path(&file)]).await;
    assert_eq!(refused.status, Some(1));
    assert!(refused.stderr.contains("certificate"), "{}", refused.stderr);
    assert!(proxy.seen().is_empty(), "a stranger got the password");

    let key = "certificate-authority-data: ";
    let own = kubeconfig_text.split(key).nth(1).unwrap().lines().next().unwrap();
    let both = [&STANDARD.decode(own).unwrap()[..], certificate.as_bytes()].concat();
    let trusting = kubeconfig_text.replace(own, &STANDARD.encode(both));
    let seen = assert_carries(&cluster, &trusting, &mut proxy).await;
    assert!(seen.iter().all(|seen| seen.authorization.is_some()), "{seen:?}");
}

#[tokio::test]
async fn a_socks_proxy_carries_everything_and_resolves_the_servers_name() {
    let (cluster, _workload) = cluster().await;
    for scheme in ["socks5", "socks5h"] {
        for (login, user) in [(false, String::new()), (true, format!("{IN_URL}@"))] {
            let mut proxy = Proxy::start(&cluster, Speaks::Socks5 { login }).await;
            let url = format!("{scheme}://{user}{}", proxy.address);
            assert_carries(&cluster, &through(&cluster, &url), &mut proxy).await;
        }
    }
}

#[tokio::test]
async fn a_socks_proxy_that_lets_nobody_in_ends_the_start() {
    let (cluster, _workload) = cluster().await;
    for user in ["", "user:wrong@"] {
        let mut proxy = Proxy::start(&cluster, Speaks::Socks5 { login: true }).await;
        let url = format!("socks5://{user}{}", proxy.address);
        let file = kubeconfig(&through(&cluster, &url));
        let done = run(&["-port=0", "--kubeconfig", path(&file)]).await;
        assert_eq!(done.status, Some(1));
        assert!(
            done.stderr.contains("cannot reach the API server"),
            "{}",
            done.stderr
        );
        assert!(done.stderr.contains("SOCKS"), "{}", done.stderr);
        assert!(!done.stderr.contains("wrong"), "{}", done.stderr);
        assert!(proxy.seen().is_empty());
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_credential_plugin_is_told_of_the_proxy() {
    use std::os::unix::fs::PermissionsExt;
    let (cluster, _workload) = cluster().await;
    cluster.add_token("plugin", "plugin-token");
    let mut proxy = Proxy::start(&cluster, Speaks::Connect).await;
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("plugin");
    let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"plugin-token"}}"#;
    let told = format!(
        "case $KUBERNETES_EXEC_INFO in *proxy-url*{}*) echo '{credential}';; *) exit 1;; esac",
        proxy.address
    );
    std::fs::write(&plugin, format!("#!/bin/sh\n{told}\n")).unwrap();
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    let user = format!(
        "exec:\n  apiVersion: client.authentication.k8s.io/v1\n  command: {}\n  interactiveMode: Never\n  provideClusterInfo: true",
        plugin.display()
    );
    let kubeconfig = with_user(&through(&cluster, &format!("http://{}", proxy.address)), &user);
    assert_carries(&cluster, &kubeconfig, &mut proxy).await;
}

#[tokio::test]
async fn a_proxy_of_another_kind_is_refused_with_those_that_work() {
    let cluster = FakeCluster::start().await.unwrap();
    let file = kubeconfig(&through(&cluster, "ftp://user:secret@127.0.0.1:21"));
    let done = run(&["-port=0", "--kubeconfig", path(&file)]).await;
    assert_eq!(done.status, Some(1));
    for word in ["proxy-url", "\"ftp\"", "http, https, socks5 or socks5h"] {
        assert!(done.stderr.contains(word), "{word} in {}", done.stderr);
    }
    assert!(!done.stderr.contains("secret"), "{}", done.stderr);
}

#[tokio::test]
async fn the_proxy_of_the_variables_is_used_unless_they_except_the_server() {
    let (cluster, _workload) = cluster().await;
    // An address of this machine that does not say so.
    let unspecified = "0.0.0.0";
    for (host, no_proxy, proxied) in [
        (unspecified, "", true),
        (unspecified, "127.0.0.1", true),
        // Entries that kube would not start with.
        (unspecified, "other.example, ,0.0.0.0/8,", false),
        ("127.0.0.1", "", false),
    ] {
        let mut proxy = Proxy::start(&cluster, Speaks::Connect).await;
        let port = cluster.address().port();
        let server = [
            format!("server: https://{host}:{port}"),
            "tls-server-name: localhost".into(),
        ];
        let file = kubeconfig(&with_server(&cluster, &server));
        let mut command = program(&["-port=0", "--kubeconfig", path(&file)]);
        let mut running = Running(
            command
                .env("HTTPS_PROXY", proxy.address.to_string())
                .env("NO_PROXY", no_proxy)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let log = Lines::new(running.0.stderr.take().unwrap());
        let log = log.until("listening").await;
        assert_eq!(fetch(address(&log), WEB, "/").await.status, StatusCode::OK);
        assert_eq!(!proxy.seen().is_empty(), proxied, "{host} with {no_proxy:?}");
    }
}
