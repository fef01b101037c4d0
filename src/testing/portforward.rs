//! The `portforward` subresource: checks an upgrade and hands the connection to its carrier.

mod channel;
mod closing;
mod pod;
mod spdy;
mod tunnel;
mod wire;

use std::sync::Arc;

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::api::{Body, Connection, Query, text_response};
use super::cluster::pause;
use super::faults::{Carrier, ForwardFault};
use super::forwards::Controls;
use super::resource::Target;
use super::server::ClientStream;
use super::status::Failure;
use super::store::Key;
use pod::Pod;
use wire::Wire;

/// The only subprotocol of SPDY port-forwards (`apimachinery:pkg/util/portforward/constants.go`).
const SPDY_PROTOCOL: &str = "portforward.k8s.io";

/// The WebSocket subprotocol of tunnelled SPDY: [`tunnel::PREFIX`] and [`SPDY_PROTOCOL`].
const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

/// The binary WebSocket subprotocol.
const CHANNEL_PROTOCOL: &str = "v4.channel.k8s.io";

/// Answers an upgrade request; the connection goes on in a task of its own.
pub(super) async fn upgrade(
    connection: &Connection,
    target: &Target,
    query: &Query,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let cluster = &connection.cluster;
    let namespace = target.namespace.as_deref().unwrap_or_default();
    let name = target.name.as_deref().unwrap_or_default();
    pause(cluster.faults.upgrade_delay()).await;
    let not_found = || Failure::not_found(target.kind, name);
    if let Some(seconds) = cluster.faults.busy() {
        return Err(Failure::busy(seconds));
    }
    match cluster.faults.forward(namespace, name) {
        Some(ForwardFault::Unanswered) => std::future::pending().await,
        Some(ForwardFault::PodGone) => return Err(not_found()),
        Some(ForwardFault::Upgrade(code)) => {
            let message = format!("error dialing backend: upgrade answered with {code}");
            return Err(Failure::new(code, "InternalError", &message));
        }
        Some(ForwardFault::Kubelet(code, text)) => return Ok(text_response(code, format!("{text}\n"))),
        _ => {}
    }
    let Some(sandbox) = cluster.store.lifetime(&Key::new(target.kind, namespace, name)) else {
        return Err(not_found());
    };

    let headers = request.headers();
    let (carrier, response) = match header(headers, "upgrade").to_ascii_lowercase().as_str() {
        "spdy/3.1" => (Carrier::Spdy, spdy_response(headers)?),
        "websocket" => websocket_response(headers)?,
        _ => return Err(Failure::bad_request("Upgrade request required")),
    };
    if let Some(status) = cluster.faults.refuses(carrier) {
        return Err(Failure::new(status, "Forbidden", "upgrade not allowed"));
    }
    let ports = match carrier {
        Carrier::Spdy | Carrier::Tunnel => Vec::new(),
        Carrier::Channel => requested_ports(query)?,
    };

    let pod = Arc::new(Pod::new(cluster.clone(), namespace, name, sandbox));
    let upgraded = hyper::upgrade::on(&mut request);
    let session = cluster
        .forwards
        .register(carrier, namespace, name, &connection.token);
    cluster.tasks.spawn(async move {
        let controls = &session.controls;
        let serve = async {
            match upgraded.await {
                Ok(io) => serve(carrier, io, pod, controls, &ports).await,
                Err(error) => tracing::debug!(%error, "upgrade failed"),
            }
        };
        tokio::select! {
            () = serve => {}
            () = controls.kill.cancelled() => {}
        }
    });
    Ok(response)
}

/// Whether the request asks for a WebSocket.
pub(super) fn is_websocket(headers: &HeaderMap) -> bool {
    header(headers, "upgrade").eq_ignore_ascii_case("websocket")
}

/// Serves an upgraded connection until it ends.
async fn serve(carrier: Carrier, io: Upgraded, pod: Arc<Pod>, controls: &Controls, ports: &[u16]) {
    let Ok(parts) = io.downcast::<ClientStream>() else {
        tracing::debug!("not a connection of this server");
        return;
    };
    // The API server takes the socket without the bytes it has read from it: what a client sends before it has seen the 101
    // is lost. Only where it ends the WebSocket itself it looks, and hangs up (`gorilla/websocket:server.go`).
    if carrier == Carrier::Tunnel && !parts.read_buf.is_empty() {
        tracing::debug!("the client did not wait for the 101");
        return;
    }
    let io = wire(parts.io.into_inner(), &pod, carrier, controls);
    match carrier {
        Carrier::Spdy => spdy::serve(io, pod, controls.clone()).await,
        Carrier::Tunnel => {
            let (inner, outer) = tokio::io::duplex(tunnel::PIPE_SIZE);
            tokio::join!(
                tunnel::serve(io, outer),
                spdy::serve(inner, pod, controls.clone())
            );
        }
        Carrier::Channel => tokio::select! {
            () = channel::serve(io, &pod, ports) => {}
            () = controls.forwards.cancelled() => {}
        },
    }
}

fn wire<I: AsyncRead + AsyncWrite>(io: I, pod: &Pod, carrier: Carrier, controls: &Controls) -> Wire<I> {
    Wire::new(io, pod.cluster.clone(), carrier, controls.silence.clone())
}

/// Negotiates the SPDY subprotocol as `apimachinery:pkg/util/httpstream/httpstream.go` (Handshake) does.
fn spdy_response(headers: &HeaderMap) -> Result<Response<Body>, Failure> {
    let offered = words(headers, "x-stream-protocol-version");
    if offered.is_empty() {
        return Err(Failure::bad_request(
            "header X-Stream-Protocol-Version is required",
        ));
    }
    if !offered.contains(&SPDY_PROTOCOL) {
        return Err(no_common_protocol(&offered));
    }
    let mut response = switching("SPDY/3.1");
    response.headers_mut().insert(
        "x-stream-protocol-version",
        HeaderValue::from_static(SPDY_PROTOCOL),
    );
    Ok(response)
}

/// Accepts `v4.channel.k8s.io` or no subprotocol at all, and SPDY tunnelled; other names are refused.
fn websocket_response(headers: &HeaderMap) -> Result<(Carrier, Response<Body>), Failure> {
    let offered = words(headers, "sec-websocket-protocol");
    let mut tunnelled = offered
        .iter()
        .filter_map(|name| name.strip_prefix(tunnel::PREFIX))
        .peekable();
    let (carrier, chosen) = if tunnelled.peek().is_some() {
        if !tunnelled.any(|name| name == SPDY_PROTOCOL) {
            return Err(no_common_protocol(&offered));
        }
        (Carrier::Tunnel, Some(TUNNEL_PROTOCOL))
    } else if offered.is_empty() {
        (Carrier::Channel, None)
    } else if offered.contains(&CHANNEL_PROTOCOL) {
        (Carrier::Channel, Some(CHANNEL_PROTOCOL))
    } else {
        return Err(Failure::bad_request("unable to upgrade: unsupported subprotocol"));
    };
    let key = headers
        .get("sec-websocket-key")
        .ok_or_else(|| Failure::bad_request("bad WebSocket handshake"))?;
    let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes()))
        .map_err(|_| Failure::bad_request("bad WebSocket handshake"))?;
    let mut response = switching("websocket");
    response.headers_mut().insert("sec-websocket-accept", accept);
    if let Some(chosen) = chosen {
        response
            .headers_mut()
            .insert("sec-websocket-protocol", HeaderValue::from_static(chosen));
    }
    Ok((carrier, response))
}

fn no_common_protocol(offered: &[&str]) -> Failure {
    let message = format!("unable to negotiate protocol: client supports {offered:?}");
    Failure::new(StatusCode::FORBIDDEN, "Forbidden", &message)
}

fn switching(protocol: &'static str) -> Response<Body> {
    let mut response = Response::new(Empty::new().boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response
        .headers_mut()
        .insert(UPGRADE, HeaderValue::from_static(protocol));
    response
}

/// Reads `ports`, which may be repeated and may hold lists.
fn requested_ports(query: &Query) -> Result<Vec<u16>, Failure> {
    let texts: Vec<&str> = query.all("ports").flat_map(|list| list.split(',')).collect();
    if texts.is_empty() {
        return Err(Failure::bad_request("query parameter \"ports\" is required"));
    }
    if texts.len() > channel::MAX_PORTS {
        return Err(Failure::bad_request("too many ports for the channels there are"));
    }
    let parse = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0);
    texts
        .iter()
        .map(|text| {
            parse(text).ok_or_else(|| Failure::bad_request(&format!("unable to parse \"{text}\" as a port")))
        })
        .collect()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// Every comma-separated word of every header of that name.
fn words<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    let values = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .collect()
}
