//! How port-forwards get through the API server: as SPDY, as SPDY inside a WebSocket, or as WebSocket channels; what a refusal
//! of one of them means.

use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::k8s::error::{self, Kind};
use crate::k8s::portforward::cause;
use crate::k8s::portforward::websocket::handshake::{self, Handshake};
use crate::registry::PodRef;
use crate::transport::{ConnectError, io_cause};

/// The protocol of a port-forward's streams (`apimachinery:pkg/util/portforward/constants.go`).
const STREAM_PROTOCOL: &str = "portforward.k8s.io";
const STREAM_PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const SPDY: &str = "SPDY/3.1";

/// How much of a refusal's text is read.
const MAX_REFUSAL: usize = 64 << 10;

/// How long to wait for a server that has too much to do and does not say how long.
const BUSY: Duration = Duration::from_secs(1);

/// A form of port-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    /// `Upgrade: SPDY/3.1`: the least work for everybody, and every server's; proxies that know only WebSocket refuse it.
    Spdy,
    /// SPDY inside a WebSocket (KEP-4006): servers from 1.30 on, through proxies too.
    Tunnel,
    /// One WebSocket for each connection: every server's, but slow to open, and with no half-close.
    Channel,
}

/// What is asked of the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upgrade {
    /// A connection that speaks SPDY.
    Spdy,
    /// A WebSocket with such a one inside.
    Tunnel,
    /// A WebSocket with the channels of one port.
    Channels(u16),
}

/// Which forms a user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carriers {
    /// Whichever works, the best first.
    #[default]
    Auto,
    /// SPDY alone.
    Spdy,
    /// SPDY inside a WebSocket alone.
    Tunnel,
    /// WebSocket channels alone.
    Channel,
}

impl Carriers {
    /// The values of the setting, as they are written.
    pub const NAMES: &[&str] = &["auto", "spdy", "tunnel", "channel"];

    /// Adds to a form's refusal that the user wants no other one.
    pub(super) fn explain(self, refusal: ConnectError) -> ConnectError {
        let name = match self {
            Self::Auto => return refusal,
            Self::Spdy => "spdy",
            Self::Tunnel => "tunnel",
            Self::Channel => "channel",
        };
        let explained = |message| format!("{message} (port-forward={name} allows no other form)");
        match refusal {
            ConnectError::Forbidden(message) => ConnectError::Forbidden(explained(message)),
            ConnectError::Unavailable(message) => ConnectError::Unavailable(explained(message)),
            other => other,
        }
    }

    /// Returns the forms that are allowed, the best first.
    pub(super) fn order(self) -> &'static [Carrier] {
        match self {
            Self::Auto => &[Carrier::Spdy, Carrier::Tunnel, Carrier::Channel],
            Self::Spdy => &[Carrier::Spdy],
            Self::Tunnel => &[Carrier::Tunnel],
            Self::Channel => &[Carrier::Channel],
        }
    }
}

/// Not one of [`Carriers::NAMES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a form of port-forward")]
pub struct UnknownCarrier;

impl FromStr for Carriers {
    type Err = UnknownCarrier;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Self::Auto),
            "spdy" => Ok(Self::Spdy),
            "tunnel" => Ok(Self::Tunnel),
            "channel" => Ok(Self::Channel),
            _ => Err(UnknownCarrier),
        }
    }
}

/// Why there is no upgraded connection.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What it means.
    pub(super) error: ConnectError,
    /// What it says of the form and of the server.
    pub(super) verdict: Verdict,
}

/// What a refusal says of the form that was tried, and of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The form is not to be had here; another may be.
    Form,
    /// Either that, or somebody on the way is in trouble for a moment.
    Doubtful,
    /// It is about the pod or about us: every form would meet it.
    Final,
    /// Nothing was answered in time. The node may be dead, and the API server well.
    Silent,
    /// The API server cannot be reached.
    Unreachable,
    /// The API server asks us to wait.
    Busy(Duration),
}

impl Refusal {
    /// Nothing was answered within `timeout`.
    pub(super) fn silent(timeout: Duration) -> Self {
        Self {
            error: ConnectError::Unreachable(format!(
                "the API server did not open a port-forward within {timeout:?}"
            )),
            verdict: Verdict::Silent,
        }
    }
}

/// Upgrades one connection to a pod.
pub(super) async fn upgrade(
    client: &Client,
    upgrade: Upgrade,
    pod: &PodRef,
    timeout: Duration,
) -> Result<TokioIo<Upgraded>, Refusal> {
    let (request, handshake) = match upgrade {
        Upgrade::Spdy => (spdy_request(pod), None),
        Upgrade::Tunnel => websocket_request(&path(pod), handshake::TUNNEL),
        Upgrade::Channels(port) => {
            websocket_request(&format!("{}?ports={port}", path(pod)), handshake::CHANNELS)
        }
    };
    // The client bounds the wait for the headers itself, without the time that new credentials take.
    let response = client
        .send(request)
        .await
        .map_err(|error| match verdict(&error) {
            Verdict::Silent => Refusal::silent(timeout),
            verdict => Refusal {
                error: connect_error(&error),
                verdict,
            },
        })?;
    let upgrading = async {
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let agreed = match handshake {
            None => check_spdy(response.headers()),
            Some(handshake) => handshake
                .check(response.headers())
                .map_err(|error| error.to_string()),
        };
        agreed.map_err(|why| Refusal {
            error: ConnectError::Unavailable(why),
            verdict: Verdict::Form,
        })?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| Refusal {
            error: ConnectError::Unavailable(error.to_string()),
            verdict: Verdict::Doubtful,
        })?;
        Ok(TokioIo::new(upgraded))
    };
    tokio::time::timeout(timeout, upgrading)
        .await
        .unwrap_or_else(|_| Err(Refusal::silent(timeout)))
}

/// What may stand in a segment of a path as it is (RFC 3986 section 2.3).
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

fn path(pod: &PodRef) -> String {
    format!(
        "/api/v1/namespaces/{}/pods/{}/portforward",
        utf8_percent_encode(&pod.namespace, RESERVED),
        utf8_percent_encode(&pod.name, RESERVED)
    )
}

/// A POST, which RBAC knows as `create`. No port is named: each stream names its own.
fn spdy_request(pod: &PodRef) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path(pod).parse().expect("what is encoded is a path");
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
    headers.insert(STREAM_PROTOCOL_VERSION, HeaderValue::from_static(STREAM_PROTOCOL));
    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    request
}

fn check_spdy(headers: &HeaderMap) -> Result<(), String> {
    for (name, wanted) in [(UPGRADE, SPDY), (STREAM_PROTOCOL_VERSION, STREAM_PROTOCOL)] {
        let found = headers.get(&name).map(HeaderValue::as_bytes).unwrap_or_default();
        if !found.eq_ignore_ascii_case(wanted.as_bytes()) {
            let found = String::from_utf8_lossy(found);
            return Err(format!(
                "the server switched to {name} {found:?} instead of {wanted}"
            ));
        }
    }
    Ok(())
}

/// A GET, which RBAC knows as `get`.
fn websocket_request(path: &str, protocol: &'static str) -> (Request<Body>, Option<Handshake>) {
    let handshake = Handshake::new(protocol);
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = path.parse().expect("what is encoded is a path");
    handshake.request(request.headers_mut());
    (request, Some(handshake))
}

/// Reads an answer other than 101. A proxy on the way, or an older server, refuses a form with one of many statuses; those
/// of a server in trouble are among them.
async fn refusal(response: Response<Body>) -> Refusal {
    let (status, busy) = (response.status(), busy(&response));
    let body = Limited::new(response.into_body(), MAX_REFUSAL).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let message = message(status, &body);
    let (error, verdict) = match status {
        StatusCode::UNAUTHORIZED => (ConnectError::Unauthorized(message), Verdict::Final),
        // RBAC may allow one verb and not the other.
        StatusCode::FORBIDDEN => (ConnectError::Forbidden(message), Verdict::Form),
        // Besides a pod that was deleted, a kubelet that has just restarted answers so for a moment.
        StatusCode::NOT_FOUND => (ConnectError::PodGone(message), Verdict::Final),
        _ if cause::is_pod_gone(&message) => (ConnectError::PodGone(message), Verdict::Final),
        _ if let Some(wait) = busy => (ConnectError::Unavailable(message), Verdict::Busy(wait)),
        StatusCode::INTERNAL_SERVER_ERROR
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => (ConnectError::Unavailable(message), Verdict::Doubtful),
        _ => (ConnectError::Unavailable(message), Verdict::Form),
    };
    Refusal { error, verdict }
}

/// Tells for how long a server that is busy asks us to wait (RFC 6585 §4, RFC 9110 §15.6.4). API servers say it in seconds.
fn busy(response: &Response<Body>) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER);
    let seconds = seconds.and_then(|value| value.to_str().ok()?.trim().parse().ok());
    match response.status() {
        StatusCode::TOO_MANY_REQUESTS => Some(seconds.map_or(BUSY, Duration::from_secs)),
        StatusCode::SERVICE_UNAVAILABLE => seconds.map(Duration::from_secs),
        _ => None,
    }
}

/// Words a refusal: the message of a `Status` object, or the body's text.
fn message(status: StatusCode, body: &Bytes) -> String {
    #[derive(serde::Deserialize)]
    struct Status {
        message: String,
    }
    let text = match serde_json::from_slice::<Status>(body) {
        Ok(status) => status.message,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    match error::one_line(&text) {
        text if text.is_empty() => format!("the API server answered {status}"),
        text => text,
    }
}

/// Words the failure of a call that got no answer.
fn connect_error(error: &kube::Error) -> ConnectError {
    let message = error::message(error);
    match error::kind(error) {
        Kind::Unauthorized => ConnectError::Unauthorized(message),
        Kind::Forbidden => ConnectError::Forbidden(message),
        Kind::NotFound => ConnectError::PodGone(message),
        Kind::Unavailable => ConnectError::Unreachable(message),
    }
}

/// Tells what a call's failure says of the server. A connection that ends after the request and before its answer may be the
/// work of something on the way that knows no such upgrade.
fn verdict(error: &kube::Error) -> Verdict {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(client) = error.downcast_ref::<hyper_util::client::legacy::Error>()
            && client.is_connect()
        {
            return Verdict::Unreachable;
        }
        if let Some(http) = error.downcast_ref::<hyper::Error>()
            && (http.is_incomplete_message() || http.is_closed() || http.is_canceled())
        {
            return Verdict::Doubtful;
        }
        if error.is::<tower::timeout::error::Elapsed>() {
            return Verdict::Silent;
        }
        next = error.source();
    }
    match io_cause(error).map(std::io::Error::kind) {
        // The last is a TLS connection's end without a goodbye.
        Some(
            std::io::ErrorKind::ConnectionReset
            | std::io::ErrorKind::ConnectionAborted
            | std::io::ErrorKind::BrokenPipe
            | std::io::ErrorKind::UnexpectedEof,
        ) => Verdict::Doubtful,
        _ => Verdict::Final,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_without_an_answer_may_be_about_the_form_whatever_it_looks_like() {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        for kind in [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof] {
            let error = kube::Error::Service(Box::new(std::io::Error::from(kind)));
            assert_eq!(verdict(&error), Verdict::Doubtful, "{kind}");
        }
    }

    #[test]
    fn a_name_is_one_segment_of_the_path_whatever_it_is() {
        let pod = PodRef {
            namespace: "a/b".into(),
            name: "web/exec?command=sh #".into(),
            uid: "".into(),
        };
        let path = spdy_request(&pod).uri().to_string();
        assert_eq!(
            path,
            "/api/v1/namespaces/a%2Fb/pods/web%2Fexec%3Fcommand%3Dsh%20%23/portforward"
        );
    }
}
