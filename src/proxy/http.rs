//! The HTTP side of the proxy: serves one client connection and sends each of its requests to a pod.

mod exchange;
mod headers;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tracing::debug;

use crate::name::{Authority, Host};
use crate::proxy::body::{ResponseBody, grpc_status};
use crate::proxy::detect::{self, Prefixed, Protocol};
use crate::proxy::error::Error;
use crate::proxy::http::exchange::{Destination, exchange};
use crate::proxy::reply::{self, Form};
use crate::proxy::upstream::Answer;
use crate::proxy::{Context, own};
use crate::registry::InFlight;
use crate::traffic::AccessRecord;

/// HTTP/2 towards clients as the seed has it: 1000 streams, 1 MiB frames; windows that keep a bulk upload moving.
const MAX_STREAMS: u32 = 1000;
const MAX_FRAME: u32 = 1 << 20;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Headers of one request, all together; more is answered with 431.
const MAX_HEADER_LIST: u32 = 64 << 10;

/// The port that a request without one means on a clear-text listener.
const DEFAULT_PORT: u16 = 80;

/// Serves one client connection until it ends or the drain has been heeded.
pub(super) async fn serve(context: Arc<Context>, stream: TcpStream, client: SocketAddr) {
    let detected = tokio::select! {
        detected = detect::read(stream, context.header_timeout) => detected,
        // A client that has sent nothing yet loses nothing.
        () = context.clients.started() => return,
    };
    match detected {
        Ok(Some((Protocol::Http1, stream))) => serve_http1(context, stream, client).await,
        Ok(Some((Protocol::Http2, stream))) => serve_http2(context, stream, client).await,
        Ok(Some((protocol, _))) => {
            debug!(%client, ?protocol, "closed: this protocol is not served on this port")
        }
        Ok(None) => debug!(%client, "closed: no request came"),
        Err(error) => debug!(%client, %error, "connection lost before its first request"),
    }
}

async fn serve_http1(context: Arc<Context>, stream: Prefixed<TcpStream>, client: SocketAddr) {
    let clients = context.clients.clone();
    let timeout = context.header_timeout;
    let service = service_fn(move |request| answer(context.clone(), client, "HTTP/1.1", request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = clients.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    log_end(client, ended);
}

async fn serve_http2(context: Arc<Context>, stream: Prefixed<TcpStream>, client: SocketAddr) {
    let clients = context.clients.clone();
    let service = service_fn(move |request| answer(context.clone(), client, "h2c", request));
    let connection = http2::Builder::new(clients.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_frame_size(MAX_FRAME)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = clients.started() => {
            connection.as_mut().graceful_shutdown(); // sends GOAWAY and lets open streams end
            connection.await
        }
    };
    log_end(client, ended);
}

fn log_end(client: SocketAddr, ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        debug!(%client, %error, "client connection ended");
    }
}

/// Answers one request; whatever goes wrong becomes a response.
async fn answer(
    context: Arc<Context>,
    client: SocketAddr,
    protocol: &'static str,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let path = request.uri().path().to_owned();
    let mut record = AccessRecord::new(client, protocol, request.method().clone(), path);
    let form = Form::of(request.headers());
    let answered = match headers::authority(&request) {
        Ok(authority) => {
            record.authority = authority;
            dispatch(&context, request, &mut record).await
        }
        Err(error) => Err(error),
    };
    Ok(match answered {
        Ok(Answered::Pod(answer, in_flight)) => pass_on(answer, in_flight, record),
        Ok(Answered::Health(version)) => own::health(version, form == Form::Grpc, record),
        Err(error) => reply::fail(form, &error, record),
    })
}

/// Who has the answer.
enum Answered {
    Pod(Answer, InFlight),
    Health(Version),
}

/// Decides by the host who answers, and gets the answer.
async fn dispatch(
    context: &Context,
    request: Request<Incoming>,
    record: &mut AccessRecord,
) -> Result<Answered, Error> {
    let zone = || context.naming.zone.to_string();
    let Authority { host, port } = context.naming.parse(&record.authority)?;
    match host {
        Host::Service { service, hostname } => {
            record.service = Some(service.clone());
            let destination = Destination {
                service,
                hostname,
                port: port.unwrap_or(DEFAULT_PORT),
            };
            let (answer, in_flight) = exchange(context, &destination, request, record).await?;
            Ok(Answered::Pod(answer, in_flight))
        }
        Host::Own if record.path == "/health" => Ok(Answered::Health(request.version())),
        Host::Own => Err(Error::NoSuchPage(record.path.clone(), zone())),
        Host::Unknown => Err(Error::UnknownHost {
            host: record.authority.clone(),
            zone: zone(),
        }),
    }
}

/// Passes a pod's response on to the client.
fn pass_on(answer: Answer, in_flight: InFlight, mut record: AccessRecord) -> Response<ResponseBody> {
    let (mut parts, body) = answer.response.into_parts();
    headers::strip_hop_by_hop(&mut parts.headers);
    record.status = Some(parts.status);
    record.grpc_status = grpc_status(&parts.headers);
    record.first_byte = Some(Instant::now());
    Response::from_parts(
        parts,
        ResponseBody::upstream(body, answer.lease, in_flight, record),
    )
}
