//! `/ws`: a WebSocket echo, over HTTP/1.1 Upgrade (RFC 6455) or HTTP/2 extended CONNECT (RFC 8441).

use futures_util::{SinkExt, StreamExt};
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tonic::body::Body;

use super::listener::Connection;

/// Accepts the handshake and echoes in a task of its own, which is the connection's from then on.
pub(super) fn answer(connection: &Connection, mut request: Request<Incoming>) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let extended_connect = request.method() == Method::CONNECT;
    if !extended_connect {
        let accept = request
            .headers()
            .get("sec-websocket-key")
            .and_then(|key| HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok());
        let Some(accept) = accept else {
            *response.status_mut() = StatusCode::UPGRADE_REQUIRED;
            return response;
        };
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert("sec-websocket-accept", accept);
    }
    // A client that offers subprotocols must be answered with one of them; the first will do.
    if let Some(offered) = request.headers().get("sec-websocket-protocol")
        && let Some(first) = offered.to_str().ok().and_then(|list| list.split(',').next())
        && let Ok(chosen) = HeaderValue::try_from(first.trim())
    {
        response.headers_mut().insert("sec-websocket-protocol", chosen);
    }
    let upgraded = hyper::upgrade::on(&mut request);
    connection.spawn(async move {
        match upgraded.await {
            Ok(io) => {
                echo(WebSocketStream::from_raw_socket(TokioIo::new(io), Role::Server, None).await).await
            }
            Err(error) => tracing::debug!(%error, "WebSocket upgrade failed"),
        }
    });
    response
}

async fn echo(mut socket: WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>) {
    while let Some(Ok(message)) = socket.next().await {
        // Pings and Close are answered by the library.
        if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
            return;
        }
    }
}
