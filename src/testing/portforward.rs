//! The `portforward` subresource: checks an upgrade and hands the connection to its carrier.

mod channel;
mod pod;
mod spdy;

use std::sync::Arc;

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::api::{Body, Connection, Query};
use super::cluster::pause;
use super::faults::{Carrier, ForwardFault};
use super::resource::Target;
use super::status::Failure;
use super::store::Key;
use pod::Pod;

/// The only subprotocol of SPDY port-forwards (`apimachinery:pkg/util/portforward/constants.go`).
const SPDY_PROTOCOL: &str = "portforward.k8s.io";

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
    match cluster.faults.forward(namespace, name) {
        Some(ForwardFault::PodGone) => return Err(not_found()),
        Some(ForwardFault::Upgrade(code)) => {
            let message = format!("error dialing backend: upgrade answered with {code}");
            return Err(Failure::new(code, "InternalError", &message));
        }
        _ => {}
    }
    if cluster
        .store
        .get(&Key::new(target.kind, namespace, name))
        .is_none()
    {
        return Err(not_found());
    }

    let (carrier, response) = match header(request.headers(), "upgrade").to_ascii_lowercase().as_str() {
        "spdy/3.1" => (Carrier::Spdy, spdy_response(request.headers())?),
        "websocket" => (Carrier::Channel, websocket_response(request.headers())?),
        _ => return Err(Failure::bad_request("Upgrade request required")),
    };
    if cluster.faults.refuses(carrier) {
        return Err(Failure::new(
            StatusCode::FORBIDDEN,
            "Forbidden",
            "upgrade not allowed",
        ));
    }
    let ports = match carrier {
        Carrier::Spdy => Vec::new(),
        Carrier::Channel => requested_ports(query)?,
    };

    let pod = Arc::new(Pod::new(cluster.clone(), namespace, name));
    let upgraded = hyper::upgrade::on(&mut request);
    let token = connection.token.child_token();
    let tasks = cluster.tasks.clone();
    cluster.tasks.spawn(async move {
        let io = match upgraded.await {
            Ok(io) => TokioIo::new(io),
            Err(error) => {
                tracing::debug!(%error, "upgrade failed");
                return;
            }
        };
        let ended = token.clone();
        let session = async {
            match carrier {
                Carrier::Spdy => spdy::serve(io, pod, tasks, token).await,
                Carrier::Channel => channel::serve(io, &pod, &ports).await,
            }
        };
        tokio::select! {
            () = session => {}
            () = ended.cancelled() => {}
        }
    });
    Ok(response)
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
        let message = format!("unable to negotiate protocol: client supports {offered:?}");
        return Err(Failure::new(StatusCode::FORBIDDEN, "Forbidden", &message));
    }
    let mut response = switching("SPDY/3.1");
    response.headers_mut().insert(
        "x-stream-protocol-version",
        HeaderValue::from_static(SPDY_PROTOCOL),
    );
    Ok(response)
}

/// Accepts `v4.channel.k8s.io` or no subprotocol at all. Other names, such as the tunnel's of KEP-4006, are refused
/// as servers do that do not know them; kubectl then falls back to SPDY.
fn websocket_response(headers: &HeaderMap) -> Result<Response<Body>, Failure> {
    let offered = words(headers, "sec-websocket-protocol");
    if !offered.is_empty() && !offered.contains(&CHANNEL_PROTOCOL) {
        return Err(Failure::bad_request("unable to upgrade: unsupported subprotocol"));
    }
    let key = headers
        .get("sec-websocket-key")
        .ok_or_else(|| Failure::bad_request("bad WebSocket handshake"))?;
    let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes()))
        .map_err(|_| Failure::bad_request("bad WebSocket handshake"))?;
    let mut response = switching("websocket");
    response.headers_mut().insert("sec-websocket-accept", accept);
    if !offered.is_empty() {
        response.headers_mut().insert(
            "sec-websocket-protocol",
            HeaderValue::from_static(CHANNEL_PROTOCOL),
        );
    }
    Ok(response)
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
