//! How port-forwards get through the API server: as SPDY, as SPDY inside a WebSocket, or as WebSocket channels; which of them
//! works is found out and remembered.

use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;

use crate::k8s::error::{self, Kind};
use crate::k8s::portforward::cause;
use crate::k8s::portforward::tunnel::handshake::Handshake;
use crate::registry::PodRef;
use crate::transport::ConnectError;

/// The protocol of a port-forward's streams (`apimachinery:pkg/util/portforward/constants.go`).
const STREAM_PROTOCOL: &str = "portforward.k8s.io";
const STREAM_PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const SPDY: &str = "SPDY/3.1";

/// How much of a refusal's text is read.
const MAX_REFUSAL: usize = 64 << 10;

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

    fn order(self) -> &'static [Carrier] {
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

/// What is known of a cluster's forms.
#[derive(Debug)]
pub(super) struct Memory {
    wanted: Carriers,
    known: Mutex<Option<Known>>,
}

/// The form that worked last.
#[derive(Debug, Clone, Copy)]
struct Known {
    carrier: Carrier,
    /// Whether nothing has spoken against it since.
    sure: bool,
}

impl Memory {
    pub(super) fn new(wanted: Carriers) -> Self {
        Self {
            wanted,
            known: Mutex::new(None),
        }
    }

    /// Returns what the user wants.
    pub(super) fn wanted(&self) -> Carriers {
        self.wanted
    }

    /// Returns the forms to try, the one that worked last before the others.
    pub(super) fn order(&self) -> Vec<Carrier> {
        let last = self.lock().map(|known| known.carrier);
        let rest = self
            .wanted
            .order()
            .iter()
            .copied()
            .filter(|&carrier| Some(carrier) != last);
        last.into_iter().chain(rest).collect()
    }

    /// Tells whether a form is sure to work.
    pub(super) fn works(&self, carrier: Carrier) -> bool {
        self.lock()
            .is_some_and(|known| known.carrier == carrier && known.sure)
    }

    /// Remembers that a form works.
    pub(super) fn note(&self, carrier: Carrier) {
        *self.lock() = Some(Known { carrier, sure: true });
    }

    /// Has the form that worked last prove itself again: the way to the server may be another one now.
    pub(super) fn doubt(&self) {
        if let Some(known) = &mut *self.lock() {
            known.sure = false;
        }
    }

    /// Begins again with the best form.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no upgraded connection.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What it means.
    pub(super) error: ConnectError,
    /// Whether another form might fare better.
    pub(super) form: bool,
}

/// Upgrades one connection to a pod.
pub(super) async fn upgrade(
    client: &Client,
    carrier: Carrier,
    pod: &PodRef,
    timeout: Duration,
) -> Result<TokioIo<Upgraded>, Refusal> {
    let upgrading = async {
        let handshake = Handshake::new();
        let request = match carrier {
            Carrier::Spdy => spdy_request(pod),
            Carrier::Tunnel | Carrier::Channel => tunnel_request(pod, &handshake),
        };
        let response = client.send(request).await.map_err(|error| Refusal {
            error: connect_error(&error),
            form: false,
        })?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let agreed = match carrier {
            Carrier::Spdy => check_spdy(response.headers()),
            Carrier::Tunnel | Carrier::Channel => handshake
                .check(response.headers())
                .map_err(|error| error.to_string()),
        };
        agreed.map_err(|why| Refusal {
            error: ConnectError::Unavailable(why),
            form: true,
        })?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| Refusal {
            error: ConnectError::Unavailable(error.to_string()),
            form: false,
        })?;
        Ok(TokioIo::new(upgraded))
    };
    let late = || Refusal {
        error: ConnectError::Unreachable(format!(
            "the API server did not open a port-forward within {timeout:?}"
        )),
        form: false,
    };
    tokio::time::timeout(timeout, upgrading)
        .await
        .unwrap_or_else(|_| Err(late()))
}

fn path(pod: &PodRef) -> String {
    format!(
        "/api/v1/namespaces/{}/pods/{}/portforward",
        pod.namespace, pod.name
    )
}

/// A POST, which RBAC knows as `create`. No port is named: each stream names its own.
fn spdy_request(pod: &PodRef) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path(pod).parse().expect("names of pods are parts of paths");
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
fn tunnel_request(pod: &PodRef, handshake: &Handshake) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = path(pod).parse().expect("names of pods are parts of paths");
    handshake.request(request.headers_mut());
    request
}

/// Reads an answer other than 101. A proxy on the way, or an older server, refuses a form with one of many statuses; those
/// of a server in trouble say nothing about the form.
async fn refusal(response: Response<Body>) -> Refusal {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_REFUSAL).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let message = message(status, &body);
    let (error, form) = match status {
        StatusCode::UNAUTHORIZED => (ConnectError::Unauthorized(message), false),
        // RBAC may allow one verb and not the other.
        StatusCode::FORBIDDEN => (ConnectError::Forbidden(message), true),
        // Besides a pod that was deleted, a kubelet that has just restarted answers so for a moment.
        StatusCode::NOT_FOUND => (ConnectError::PodGone(message), false),
        _ if cause::is_pod_gone(&message) => (ConnectError::PodGone(message), false),
        StatusCode::INTERNAL_SERVER_ERROR
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT
        | StatusCode::TOO_MANY_REQUESTS => (ConnectError::Unavailable(message), false),
        _ => (ConnectError::Unavailable(message), true),
    };
    Refusal { error, form }
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

/// Words the failure of a call that got no answer, or an answer that kube has read.
pub(super) fn connect_error(error: &kube::Error) -> ConnectError {
    let message = error::message(error);
    let answered = matches!(error, kube::Error::Api(_) | kube::Error::UpgradeConnection(_));
    match error::kind(error) {
        Kind::Unauthorized => ConnectError::Unauthorized(message),
        Kind::Forbidden => ConnectError::Forbidden(message),
        Kind::NotFound => ConnectError::PodGone(message),
        Kind::Unavailable if cause::is_pod_gone(&message) => ConnectError::PodGone(message),
        Kind::Unavailable if answered => ConnectError::Unavailable(message),
        Kind::Unavailable => ConnectError::Unreachable(message),
    }
}
