//! The proxy without sockets, between a client that sends what it is told and the one pod of `web.shop`, which reads strictly
//! and answers everything.
//!
//! Time is paused: it jumps to the next deadline when nobody has anything to do, so that every run ends and no run waits.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use kube_tunnel::drain::{Drain, Drained};
use kube_tunnel::name::{Naming, PortRef, ServiceName};
use kube_tunnel::proxy::{AllowOrigin, Bind, Config, Limits, Listener, PodTls, Proxy, RetryPolicy, Tls};
use kube_tunnel::registry::{
    self, Endpoint, Interest, LookupError, LookupErrorKind, PodRef, Protocol, Service, ServiceKind,
    ServicePort, View,
};
use kube_tunnel::tls::{CertificateAuthority, Trust, server_config};
use kube_tunnel::transport::{Connect, Connecting, Target};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, Take};
use tokio::time::timeout;

use crate::message::{self, Message, Parsed};

/// How long the client waits for more once it has sent everything: longer than any limit of the proxy, which then either has
/// closed the connection or waits for the client.
const QUIET: Duration = Duration::from_mins(5);

/// What is under way in one direction between the client and the proxy: as much as with a socket, because hyper does not wait
/// for a client to take the answer to a request that it cannot read.
const CLIENT_BUFFER: usize = 1 << 16;

/// The same between the pod and the proxy.
const POD_BUFFER: usize = 4096;

/// The field by which the pod numbers its answers, and the one that repeats the request's method.
pub(crate) const NUMBER: &str = "x-request";
pub(crate) const METHOD: &str = "x-method";

/// The server's side of TLS, and the certificate of its authority (PEM). One for all runs: keys are slow to make.
pub(crate) static TLS: LazyLock<(Arc<ServerConfig>, String)> = LazyLock::new(|| {
    let authority = CertificateAuthority::ephemeral(&Naming::default().zone).expect("a key can be made");
    let pem = authority.pem().to_owned();
    (server_config(authority).expect("the settings are valid"), pem)
});

static POD_TLS: LazyLock<PodTls> =
    LazyLock::new(|| PodTls::new(&Trust::Skip).expect("there is no file to be read"));

/// What came of one connection.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// What the proxy wrote to the client.
    pub(crate) answer: Vec<u8>,
    /// The requests that the pod has read, from the first to the last byte.
    pub(crate) requests: Vec<Message>,
}

/// Sends `sent` in pieces of `step` bytes, waits until nothing more can happen, and ends the connection.
///
/// # Panics
/// When the proxy does not end then, or when the pod reads something that is no request.
pub(crate) fn exchange(sent: &[u8], step: u64) -> Exchange {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without IO needs nothing");
    runtime.block_on(async {
        let (clients, background, cluster) = (Drain::new(), Drain::new(), Drain::new());
        let pod = Pod {
            requests: Arc::default(),
            tasks: cluster.clone(),
        };
        let proxy = proxy(pod.clone(), clients.clone(), &background, &cluster);
        let (client, server) = tokio::io::duplex(CLIENT_BUFFER);
        let (reader, writer) = tokio::io::split(server);
        let pieces = Pieces {
            stream: reader.take(step),
            step,
            paused: false,
        };
        let server = tokio::io::join(pieces, writer);
        clients.spawn(proxy.serve(server, SocketAddr::from((Ipv4Addr::LOCALHOST, 40_000))));
        let answer = converse(client, sent).await;
        assert_eq!(
            clients.complete(QUIET).await,
            Drained::Gracefully,
            "something of the client is left"
        );
        drop(proxy);
        assert_eq!(
            background.complete(QUIET).await,
            Drained::Gracefully,
            "something of the pod is left"
        );
        let requests = std::mem::take(&mut *pod.requests.lock().unwrap_or_else(PoisonError::into_inner));
        Exchange { answer, requests }
    })
}

/// The client's side: returns all that it was answered.
async fn converse(client: DuplexStream, sent: &[u8]) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(client);
    let mut answer = Vec::new();
    let writing = async {
        // An error would say that the proxy has gone first.
        let _ = writer.write_all(sent).await;
        std::future::pending().await
    };
    let talking = async {
        tokio::select! {
            () = writing => {}
            () = read_to_end(&mut reader, &mut answer) => {}
        }
    };
    if timeout(QUIET, talking).await.is_err() {
        let _ = writer.shutdown().await;
        let ended = timeout(QUIET, read_to_end(&mut reader, &mut answer)).await;
        assert!(ended.is_ok(), "the proxy goes on without its client");
    }
    answer
}

async fn read_to_end(mut stream: impl AsyncRead + Unpin, into: &mut Vec<u8>) {
    while stream.read_buf(into).await.is_ok_and(|length| length > 0) {}
}

/// A stream in pieces of `step` bytes, with a pause before each.
struct Pieces {
    stream: Take<ReadHalf<DuplexStream>>,
    step: u64,
    paused: bool,
}

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.paused = !self.paused;
        if self.paused {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let step = self.step;
        self.stream.set_limit(step);
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

fn proxy(pod: Pod, clients: Drain, background: &Drain, cluster: &Drain) -> Proxy {
    let config = Config {
        bind: Bind::Addresses(Vec::new()),
        port: 0,
        naming: Naming {
            namespace: Some("shop".into()),
            ..Naming::default()
        },
        // Every request that the pod reads is then one of the client's.
        retry: RetryPolicy {
            max_retries: 0,
            base_delay: Duration::from_millis(1),
        },
        ready_timeout: Duration::ZERO,
        // Nor does the proxy answer a preflight in the pod's place.
        cors: AllowOrigin::List(Vec::new()),
        forwarded_headers: true,
        header_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_mins(10),
        limits: Limits {
            connections: None,
            connections_per_client: None,
            connections_per_pod: 1000,
            header_bytes: 64 << 10,
            header_fields: 256,
            response_header_bytes: 256 << 10,
            response_header_fields: 256,
            replay_bytes: 64 << 10,
            linger: Duration::from_secs(10),
            streams: 1000,
        },
    };
    let tls = Tls {
        server: TLS.0.clone(),
        pods: POD_TLS.clone(),
    };
    let (registry, writer, mut interests) = registry::channel(Duration::from_secs(5));
    cluster.spawn(async move {
        while let Some(interest) = interests.recv().await {
            if let Interest::Follow(service) = interest {
                writer.begin(&service);
                writer.answer(&service, look_up(&service));
            }
        }
    });
    let listener = Listener::bind(&config.bind, config.port).expect("no address is no conflict");
    Proxy::new(
        listener,
        &config,
        tls,
        registry,
        Arc::new(pod),
        clients,
        background,
    )
}

/// The cluster has one Service.
fn look_up(service: &ServiceName) -> Result<View, LookupError> {
    if (service.namespace(), service.name()) != ("shop", "web") {
        return Err(LookupError {
            kind: LookupErrorKind::NotFound,
            message: "there is no such service".into(),
        });
    }
    let port = ServicePort {
        name: "http".into(),
        number: 80,
        protocol: Protocol::Tcp,
        app_protocol: Some("http".into()),
        target: PortRef::Number(8080),
    };
    let endpoint = Endpoint {
        pod: PodRef {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "1".into(),
        },
        addresses: vec![],
        hostname: None,
        ready: true,
        terminating: false,
        ports: [("http".to_owned(), 8080)].into(),
        is_itself: false,
        load: Arc::default(),
    };
    Ok(View {
        service: Service {
            name: service.clone(),
            kind: ServiceKind::Virtual,
            ports: vec![port],
            has_selector: true,
            publish_not_ready: false,
            affinity: None,
        },
        endpoints: vec![Arc::new(endpoint)],
        podless: vec![],
        served: true,
    })
}

/// The pod: speaks HTTP/1.1 alone, and any other protocol as an echo.
#[derive(Debug, Clone)]
struct Pod {
    requests: Arc<Mutex<Vec<Message>>>,
    tasks: Drain,
}

impl Connect for Pod {
    fn connect<'a>(&'a self, _: &'a Target) -> Connecting<'a> {
        let (ours, theirs) = tokio::io::duplex(POD_BUFFER);
        let pod = self.clone();
        self.tasks.spawn(async move { pod.serve(theirs).await });
        Box::pin(async move { Ok(Box::new(tokio::io::BufReader::new(ours)) as _) })
    }
}

impl Pod {
    async fn serve(&self, mut stream: DuplexStream) {
        let mut read = Vec::new();
        loop {
            if read.starts_with(b"PRI * HTTP/2.0\r\n") {
                return; // a gRPC call
            }
            match message::request(&read) {
                Err(wrong) => panic!("the pod got no request, {wrong}: {}", read.escape_ascii()),
                Ok(Parsed::Whole(request, length)) => {
                    read.drain(..length);
                    let protocol = request.all("upgrade").first().map(|name| (*name).to_owned());
                    let answer = self.answer(request);
                    // The proxy may have gone meanwhile.
                    if stream.write_all(&answer).await.is_err() {
                        return;
                    }
                    if protocol.is_some() {
                        return echo(stream, read).await;
                    }
                }
                Ok(Parsed::Partial) => match stream.read_buf(&mut read).await {
                    Ok(length) if length > 0 => {}
                    _ => return,
                },
            }
        }
    }

    /// Notes a request and makes its answer: agrees to leave HTTP, or sends a few bytes, in chunks if the target asks for it.
    fn answer(&self, request: Message) -> Vec<u8> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let [method, target, _] = &request.start;
        let marks = format!("{NUMBER}: {}\r\n{METHOD}: {method}\r\n", requests.len());
        let (head, body) = match request.all("upgrade").first() {
            Some(protocol) => (
                format!("101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n"),
                "",
            ),
            None if target.contains("chunked") => (
                "200 OK\r\ntransfer-encoding: chunked\r\n".to_owned(),
                "2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n",
            ),
            None => ("200 OK\r\ncontent-length: 2\r\n".to_owned(), "ok"),
        };
        let body = if method == "HEAD" { "" } else { body };
        let answer = format!("HTTP/1.1 {head}{marks}\r\n{body}").into_bytes();
        requests.push(request);
        answer
    }
}

async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin, mut read: Vec<u8>) {
    while stream.write_all(&read).await.is_ok() {
        read.clear();
        if !stream.read_buf(&mut read).await.is_ok_and(|length| length > 0) {
            return;
        }
    }
}
