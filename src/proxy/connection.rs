//! One client connection: tells its protocol, ends TLS, and serves HTTP on it until it ends or the drain has been heeded.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::Version;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info};

use crate::name::{Authority, NameError, Naming};
use crate::proxy::Context;
use crate::proxy::admission::Admitted;
use crate::proxy::detect::{self, Prefixed, Protocol};
use crate::proxy::front::{Front, FrontStream};
use crate::proxy::h2c;
use crate::proxy::http::answer;
use crate::proxy::socket::Reset;

/// HTTP/2 towards clients as the seed has it: 1 MiB frames; windows that keep a bulk upload moving.
const MAX_FRAME: u32 = 1 << 20;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// How much of an HTTP/1.1 body is received at once, and how much of an answer waits for the client, at most. More than that is out of
/// the processor's cache by the time it is sent on, and comes in allocations that the system is asked for again each time.
const BODY: usize = 128 << 10;

/// An HTTP/2 client that says nothing for so long is asked whether it is still there, and given up if it does not answer.
const PING_AFTER: Duration = Duration::from_mins(1);
const PING_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client that was told to go on in HTTP/2 may take to do so once the proxy drains.
const PREFACE: Duration = Duration::from_secs(1);

/// The two ends of a client's connection.
#[derive(Debug)]
pub(super) struct Ends {
    /// The client's address.
    pub(super) client: SocketAddr,
    /// Ours.
    pub(super) local: SocketAddr,
    /// How it is told to end with a reset.
    pub(super) reset: Reset,
}

/// What is known of a client's connection.
#[derive(Debug)]
pub(super) struct Downstream {
    /// Its address.
    pub(super) client: SocketAddr,
    /// Our address on it.
    pub(super) local: SocketAddr,
    /// Whether it speaks TLS.
    pub(super) security: Security,
    /// How it is told to end with a reset.
    pub(super) reset: Reset,
    /// The stream below HTTP/1.1; of no meaning to requests over HTTP/2.
    pub(super) front: Arc<Front>,
    /// The authority that its last request named, and what that means: the next one nearly always names the same.
    named: Mutex<Option<(Box<str>, Authority)>>,
    /// Counts it for as long as anything of it lives, if it came to a listener.
    _admitted: Option<Admitted>,
}

/// Whether a connection is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Security {
    /// Clear text.
    Cleartext,
    /// TLS, which ends here.
    Tls {
        /// The protocol that was agreed on, if any was.
        alpn: Option<String>,
    },
}

impl Downstream {
    /// Names the protocol as access records do.
    pub(super) fn protocol(&self, version: Version) -> &'static str {
        match (&self.security, version) {
            (Security::Cleartext, Version::HTTP_2) => "h2c",
            (Security::Cleartext, Version::HTTP_10) => "HTTP/1.0",
            (Security::Cleartext, _) => "HTTP/1.1",
            (Security::Tls { .. }, Version::HTTP_2) => "h2",
            (Security::Tls { .. }, Version::HTTP_10) => "HTTP/1.0+TLS",
            (Security::Tls { .. }, _) => "HTTP/1.1+TLS",
        }
    }

    /// Reads the authority of a request.
    ///
    /// # Errors
    /// As [`Naming::parse`].
    pub(super) fn read_authority(&self, naming: &Naming, authority: &str) -> Result<Authority, NameError> {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, meaning)) = &*named
            && **last == *authority
        {
            return Ok(meaning.clone());
        }
        let meaning = naming.parse(authority)?;
        *named = Some((authority.into(), meaning.clone()));
        Ok(meaning)
    }

    /// The port that a request means when it names none.
    pub(super) fn default_port(&self) -> u16 {
        match self.security {
            Security::Cleartext => 80,
            Security::Tls { .. } => 443,
        }
    }
}

/// Serves one client.
pub(super) async fn serve<S>(context: Arc<Context>, stream: S, ends: Ends, admitted: Option<Admitted>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Some((protocol, stream)) = detect(&context, stream, ends.client).await else {
        return;
    };
    if protocol == Protocol::Tls {
        boxed(|| serve_tls(context, stream, ends, admitted)).await;
    } else {
        let Ends { client, local, reset } = ends;
        let downstream = Downstream {
            client,
            local,
            reset,
            security: Security::Cleartext,
            front: Arc::default(),
            named: Mutex::default(),
            _admitted: admitted,
        };
        serve_http(context, protocol, stream, downstream).await;
    }
}

/// Gives a future an allocation of its own, which ends with it. Without it an idle connection would hold the size of the
/// largest of all ways, TLS handshakes included, for as long as it lives.
fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

/// Reads the first bytes. `None`: there is nothing to serve.
async fn detect<S: AsyncRead + Unpin>(
    context: &Context,
    stream: S,
    client: SocketAddr,
) -> Option<(Protocol, Prefixed<S>)> {
    let detected = tokio::select! {
        biased;
        detected = detect::read(stream, context.header_timeout) => detected,
        // A client that has sent nothing yet loses nothing.
        () = context.clients.started() => return None,
    };
    match detected {
        Ok(Some(detected)) => return Some(detected),
        Ok(None) => debug!(%client, "closed: no request came"),
        Err(error) => debug!(%client, %error, "connection lost before its first request"),
    }
    None
}

/// Ends TLS and serves what is inside. A client that agreed on no protocol is told apart by its first bytes once more.
async fn serve_tls<S>(context: Arc<Context>, stream: S, ends: Ends, admitted: Option<Admitted>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Ends { client, local, reset } = ends;
    let (timeout, acceptor) = (context.header_timeout, TlsAcceptor::from(context.tls.clone()));
    let accepting = boxed(|| tokio::time::timeout(timeout, acceptor.accept(stream)));
    let accepted = tokio::select! {
        biased;
        accepted = accepting => accepted,
        // A client that has asked for nothing yet loses nothing.
        () = context.clients.started() => return,
    };
    let stream = match accepted {
        Ok(Ok(stream)) => Box::new(stream), // it is large, and moves through several futures
        Ok(Err(error)) => return info!(%client, %error, "TLS handshake failed"),
        Err(_) => return debug!(%client, "closed: the TLS handshake took too long"),
    };
    let alpn = stream
        .get_ref()
        .1
        .alpn_protocol()
        .map(|name| String::from_utf8_lossy(name).into_owned());
    let agreed = match alpn.as_deref() {
        Some("h2") => Some(Protocol::Http2),
        Some(_) => Some(Protocol::Http1),
        None => None,
    };
    let downstream = Downstream {
        client,
        local,
        reset,
        security: Security::Tls { alpn },
        front: Arc::default(),
        named: Mutex::default(),
        _admitted: admitted,
    };
    match agreed {
        Some(protocol) => serve_http(context, protocol, stream, downstream).await,
        None => {
            if let Some((protocol, stream)) = detect(&context, stream, client).await {
                serve_http(context, protocol, stream, downstream).await;
            }
        }
    }
}

async fn serve_http<S>(context: Arc<Context>, protocol: Protocol, stream: S, downstream: Downstream)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let client = downstream.client;
    let downstream = Arc::new(downstream);
    let ended = match protocol {
        Protocol::Http1 => boxed(|| serve_http1(context, stream, downstream)).await,
        Protocol::Http2 => boxed(|| serve_http2(context, stream, downstream)).await,
        protocol => return info!(%client, ?protocol, "closed: this protocol is not served on this port"),
    };
    match ended {
        Ok(()) => {}
        // The HTTP library has answered, with a status alone. It has a limit of its own for the target.
        Err(error) if error.is_parse_too_large() && error.to_string().contains("URI") => info!(
            %client,
            "the request's head cannot be read (414): its target is longer than 65,534 bytes"
        ),
        Err(error) if error.is_parse_too_large() => info!(
            %client,
            "the request's head cannot be read (431): it exceeds --max-header-bytes or --max-header-fields"
        ),
        Err(error) if error.is_parse() => info!(%client, %error, "the request's head cannot be read (400)"),
        Err(error) => debug!(%client, %error, "client connection ended"),
    }
}

async fn serve_http1<S>(
    context: Arc<Context>,
    stream: S,
    downstream: Arc<Downstream>,
) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (clients, timeout) = (context.clients.clone(), context.header_timeout);
    let limits = context.limits.clone();
    let stream = FrontStream::new(stream, downstream.front.clone(), limits.linger);
    let service = service_fn(move |mut request| {
        let (context, downstream) = (context.clone(), downstream.clone());
        downstream.front.begin(&request);
        async move {
            if downstream.security == Security::Cleartext && h2c::is_asked_for(&request) {
                let frames = h2c::first_stream(&request);
                let client = hyper::upgrade::on(&mut request);
                downstream.front.upgrade();
                context
                    .clients
                    .clone()
                    .spawn(serve_upgraded(context, client, frames, downstream));
                return Ok(h2c::agreement());
            }
            boxed(|| answer(context, downstream, request)).await
        }
    });
    let header_bytes = usize::try_from(limits.header_bytes).unwrap_or(usize::MAX);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .max_header_size(header_bytes)
        .max_headers(limits.header_fields)
        .max_buf_size(header_bytes.max(BODY))
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased; // a request that has arrived is answered, also at the moment of draining
        ended = connection.as_mut() => ended,
        () = clients.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

async fn serve_http2<S>(
    context: Arc<Context>,
    stream: S,
    downstream: Arc<Downstream>,
) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (clients, limits) = (context.clients.clone(), context.limits.clone());
    let service = service_fn(move |request| boxed(|| answer(context.clone(), downstream.clone(), request)));
    let connection = http2::Builder::new(clients.clone())
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .max_concurrent_streams(limits.streams)
        .max_frame_size(MAX_FRAME)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(limits.header_bytes)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_TIMEOUT)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased; // a request that has arrived is answered, also at the moment of draining
        ended = connection.as_mut() => ended,
        () = clients.started() => {
            connection.as_mut().graceful_shutdown(); // sends GOAWAY and lets open streams end
            connection.await
        }
    }
}

/// Goes on with a client that asked for HTTP/2 in clear text; `frames` hold the request it asked with.
async fn serve_upgraded(
    context: Arc<Context>,
    client: OnUpgrade,
    frames: Bytes,
    downstream: Arc<Downstream>,
) {
    let address = downstream.client;
    let opening = async {
        let stream = TokioIo::new(client.await.map_err(io::Error::other)?);
        h2c::inject(stream, &frames).await
    };
    let opened = tokio::select! {
        biased;
        opened = tokio::time::timeout(context.header_timeout, opening) => opened,
        () = async {
            context.clients.started().await;
            tokio::time::sleep(PREFACE).await;
        } => return,
    };
    let ended = match opened {
        Ok(Ok(stream)) => serve_http2(context, stream, downstream)
            .await
            .map_err(io::Error::other),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    if let Err(error) = ended {
        debug!(client = %address, %error, "client connection ended");
    }
}
