//! Why the proxy answers a request itself, and the one table of what that means: status, gRPC status, response flag.

use std::net::IpAddr;
use std::time::Duration;

use http::{Method, StatusCode};

use crate::name::{NameError, ServiceName};
use crate::registry::{LookupError, LookupErrorKind};
use crate::transport::{ConnectError, Target};

/// Why a request gets no answer from a pod. Each prints as what happened and what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The host or port cannot be read.
    #[error("invalid host: {0}")]
    BadHost(#[from] NameError),
    /// The request cannot be understood, or asks for what no proxy may do.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The host is well-formed, but no name of the cluster.
    #[error(
        "{host:?} is not a host of this cluster; ask for service.namespace.svc.{zone}, or send that as the Host header"
    )]
    UnknownHost {
        /// The host that was asked for.
        host: String,
        /// The cluster's zone.
        zone: String,
    },
    /// The proxy's own host has no such page.
    #[error(
        "kube-tunnel has no page {0:?}; to reach a Service send its name as the host, e.g. curl -H 'Host: web.default.svc.{1}' …"
    )]
    NoSuchPage(String, String),
    /// The page is there to be read, not to be written.
    #[error("kube-tunnel's own pages answer GET and HEAD, not {0}")]
    NotReadOnly(Method),
    /// The host is an address of neither this machine's loopback nor this connection.
    #[error(
        "kube-tunnel's own pages do not answer for {0}; ask localhost, or the address that it listens on"
    )]
    ForeignHost(IpAddr),
    /// A web page of another site asks for a page of the proxy's own.
    #[error(
        "kube-tunnel's own pages are not for pages of other sites; --cors-allow-origin names the sites that may read them"
    )]
    ForeignOrigin,
    /// The Service could not be looked up.
    #[error("{}", lookup_text(.0, .1))]
    Lookup(ServiceName, LookupError),
    /// The Service has no such port.
    #[error("service {service} has no port {port}; its ports are {known}")]
    NoSuchPort {
        /// The Service.
        service: ServiceName,
        /// The port that was asked for.
        port: u16,
        /// The ports it has, in words.
        known: String,
    },
    /// The Service stands for a name outside the cluster.
    #[error("service {0} is an ExternalName for {1}, outside the cluster; ask for {1} itself")]
    ExternalName(ServiceName, String),
    /// The Service leads back to this program, which has pages for it.
    #[error("service {0} is kube-tunnel itself")]
    Itself(ServiceName),
    /// The Service sends to addresses that are no pods, which a port-forward cannot reach.
    #[error(
        "service {service} sends to addresses without a pod ({addresses}), and a port-forward reaches pods alone; ask for them directly, \
         or if they are pods, give their endpoints a targetRef: kubectl get endpointslices -n {} -l kubernetes.io/service-name={} -o yaml",
        .service.namespace(), .service.name()
    )]
    NoPod {
        /// The Service.
        service: ServiceName,
        /// The addresses, in words.
        addresses: String,
    },
    /// No pod of the Service may get traffic.
    #[error("no ready pod for service {service}: {detail}; check with kubectl get pods,endpointslices -n {}", .service.namespace())]
    NoEndpoint {
        /// The Service.
        service: ServiceName,
        /// What there is instead.
        detail: String,
    },
    /// The way to the pod could not be opened.
    #[error("{}", connect_text(.0, .1))]
    Connect(Target, ConnectError),
    /// The pod was reached, but the connection broke before there was TLS with it.
    #[error("{}", tls_text(.0, .1))]
    Handshake(Target, String),
    /// The pod was reached, but it does not speak TLS, or is not to be trusted.
    #[error("{}", tls_text(.0, .1))]
    NoTls(Target, String),
    /// The pod's port refused the connection.
    #[error("port-forward to {0} failed: {1}; check that a container listens on that port of localhost")]
    Refused(Target, String),
    /// The connection broke before a response came.
    #[error("connection to {0} was closed before it answered ({1})")]
    Reset(Target, String),
    /// The pod reset the request's stream of HTTP/2 instead of answering.
    #[error("{0} reset the request ({1:?})")]
    StreamReset(Target, h2::Reason),
    /// The pod said that it did not process the request (RFC 9113 section 8.7).
    #[error("{0} did not take the request ({1})")]
    NotProcessed(Target, String),
    /// What the pod sent is not the protocol that was spoken to it.
    #[error("{0} does not answer in {1} ({2}); check the Service's appProtocol and the port")]
    Protocol(Target, &'static str, String),
    /// The pod has an answer where the client can only understand another protocol than HTTP, or a refusal.
    #[error("{0} answers {1} instead of switching to the protocol that was asked for; check the path")]
    NotSwitched(Target, StatusCode),
    /// The pod coded its answer for this one hop in a way that the proxy cannot undo, and therefore cannot pass on.
    #[error(
        "{0} answers with Transfer-Encoding: {1}, of which only chunked is understood; let it say Content-Encoding instead"
    )]
    Coding(Target, String),
    /// The request's body is coded in such a way (RFC 9112 section 6.1).
    #[error("the only Transfer-Encoding that is understood is chunked")]
    UnknownCoding,
    /// The client went away while it was still sending.
    #[error("the client stopped sending before the request was complete")]
    ClientGone,
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status.
    pub status: StatusCode,
    /// The gRPC status code (grpc/doc/statuscodes.md).
    pub grpc: u8,
    /// The response flag in the access record, with Envoy's names where it has one.
    pub flag: &'static str,
}

/// gRPC status codes in use here.
mod grpc {
    pub(super) const CANCELLED: u8 = 1;
    pub(super) const INVALID_ARGUMENT: u8 = 3;
    pub(super) const DEADLINE_EXCEEDED: u8 = 4;
    pub(super) const NOT_FOUND: u8 = 5;
    pub(super) const PERMISSION_DENIED: u8 = 7;
    pub(super) const RESOURCE_EXHAUSTED: u8 = 8;
    pub(super) const UNIMPLEMENTED: u8 = 12;
    pub(super) const INTERNAL: u8 = 13;
    pub(super) const UNAVAILABLE: u8 = 14;
    pub(super) const UNAUTHENTICATED: u8 = 16;
}

impl Error {
    /// Looks the error up in the table.
    #[must_use]
    pub fn reply(&self) -> Reply {
        let (status, grpc, flag) = match self {
            Self::BadHost(_) | Self::BadRequest(_) => (400, grpc::INVALID_ARGUMENT, "NR"),
            Self::UnknownHost { .. } => (400, grpc::INVALID_ARGUMENT, "NR"),
            Self::NoSuchPage(..) => (404, grpc::UNIMPLEMENTED, "NR"),
            Self::NotReadOnly(_) => (405, grpc::UNIMPLEMENTED, "NR"),
            Self::ForeignHost(_) | Self::ForeignOrigin => (403, grpc::PERMISSION_DENIED, "NR"),
            Self::Lookup(_, error) => match error.kind {
                LookupErrorKind::NotFound => (404, grpc::NOT_FOUND, "NC"),
                LookupErrorKind::Forbidden => (403, grpc::PERMISSION_DENIED, "UAEX"),
                LookupErrorKind::Unauthorized => (401, grpc::UNAUTHENTICATED, "UAEX"),
                LookupErrorKind::Unavailable => (503, grpc::UNAVAILABLE, "API"),
                LookupErrorKind::Timeout => (504, grpc::DEADLINE_EXCEEDED, "API"),
            },
            Self::NoSuchPort { .. } => (404, grpc::NOT_FOUND, "NC"),
            Self::ExternalName(..) => (502, grpc::UNAVAILABLE, "NC"),
            Self::Itself(_) => (508, grpc::UNAVAILABLE, "NC"),
            Self::NoPod { .. } => (502, grpc::UNAVAILABLE, "NC"),
            Self::NoEndpoint { .. } => (503, grpc::UNAVAILABLE, "UH"),
            Self::Connect(_, error) => match error {
                ConnectError::Forbidden(_) => (403, grpc::PERMISSION_DENIED, "UAEX"),
                ConnectError::Unauthorized(_) => (401, grpc::UNAUTHENTICATED, "UAEX"),
                ConnectError::Unreachable(_) => (503, grpc::UNAVAILABLE, "API"),
                ConnectError::PodGone(_) | ConnectError::Unavailable(_) => (502, grpc::UNAVAILABLE, "UF"),
                ConnectError::Timeout(..) => (504, grpc::DEADLINE_EXCEEDED, "UF"),
            },
            Self::Handshake(..) | Self::NoTls(..) | Self::Refused(..) => (502, grpc::UNAVAILABLE, "UF"),
            Self::NotProcessed(..) => (503, grpc::UNAVAILABLE, "UR"),
            Self::StreamReset(_, reason) => (502, reset_status(*reason), "UR"),
            Self::Protocol(..) | Self::NotSwitched(..) | Self::Coding(..) => (502, grpc::INTERNAL, "UPE"),
            Self::UnknownCoding => (501, grpc::UNIMPLEMENTED, "NR"),
            Self::Reset(..) => (502, grpc::UNAVAILABLE, "UC"),
            Self::ClientGone => (400, grpc::CANCELLED, "DC"),
        };
        Reply {
            status: StatusCode::from_u16(status).expect("the table holds valid codes"),
            grpc,
            flag,
        }
    }

    /// Reports whether the same request may succeed on another try (contract: refused, timeout, unreachable, reset; never
    /// authentication, and never what the user has to put right first).
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Handshake(..)
            | Self::NoTls(..)
            | Self::Refused(..)
            | Self::NotProcessed(..)
            | Self::Reset(..)
            | Self::StreamReset(..) => true,
            Self::Connect(_, error) => {
                matches!(
                    error,
                    ConnectError::PodGone(_)
                        | ConnectError::Unreachable(_)
                        | ConnectError::Unavailable(_)
                        | ConnectError::Timeout(..)
                )
            }
            _ => false,
        }
    }

    /// Says whether the same endpoint would do no better after a pause. Another one may.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::NoTls(..))
    }

    /// Says whether the cluster could not make the way to a pod that it lists as ready. That passes: either the pods come
    /// back, or the list changes.
    #[must_use]
    pub fn is_way_missing(&self) -> bool {
        use ConnectError::{PodGone, Unavailable, Unreachable};
        matches!(
            self,
            Self::Connect(_, PodGone(_) | Unreachable(_) | Unavailable(_))
        )
    }

    /// Says whether no byte of the request can have reached the application, so that even an unsafe one may be sent again.
    #[must_use]
    pub fn is_before_send(&self) -> bool {
        matches!(
            self,
            Self::Connect(..)
                | Self::Handshake(..)
                | Self::NoTls(..)
                | Self::Refused(..)
                | Self::NotProcessed(..)
        )
    }
}

/// The status that gRPC gives a stream that was reset (gRPC over HTTP/2, "Errors").
fn reset_status(reason: h2::Reason) -> u8 {
    match reason {
        h2::Reason::CANCEL => grpc::CANCELLED,
        h2::Reason::ENHANCE_YOUR_CALM => grpc::RESOURCE_EXHAUSTED,
        h2::Reason::INADEQUATE_SECURITY => grpc::PERMISSION_DENIED,
        h2::Reason::REFUSED_STREAM => grpc::UNAVAILABLE,
        _ => grpc::INTERNAL,
    }
}

fn tls_text(target: &Target, reason: &str) -> String {
    format!(
        "no TLS with {target} ({reason}); check that the port speaks TLS, and which authorities --backend-tls names"
    )
}

fn lookup_text(service: &ServiceName, error: &LookupError) -> String {
    let (namespace, name, message) = (service.namespace(), service.name(), &error.message);
    match error.kind {
        LookupErrorKind::NotFound => {
            format!("failed to get service {service}: {message}; check with kubectl get svc -n {namespace}")
        }
        LookupErrorKind::Forbidden => {
            format!(
                "not allowed to look up service {service}: {message}; check with kubectl auth can-i --list -n {namespace}"
            )
        }
        LookupErrorKind::Unauthorized => {
            format!(
                "the API server does not accept the credentials ({message}); log in again, then check with kubectl get svc {name} -n {namespace}"
            )
        }
        LookupErrorKind::Unavailable | LookupErrorKind::Timeout => {
            format!("failed to get service {service}: {message}; check with kubectl cluster-info")
        }
    }
}

fn connect_text(target: &Target, error: &ConnectError) -> String {
    let namespace = &target.pod.namespace;
    match error {
        ConnectError::Forbidden(message) => format!(
            "not allowed to forward to {target}: {message}; check with kubectl auth can-i --list -n {namespace}"
        ),
        ConnectError::Unauthorized(message) => {
            format!("the API server does not accept the credentials ({message}); log in again")
        }
        ConnectError::Unreachable(message) => format!(
            "no port-forward to {target}: the API server cannot be reached ({message}); check with kubectl cluster-info"
        ),
        _ => format!(
            "port-forward to {target} failed: {error}; check with kubectl get pod {} -n {namespace}",
            target.pod.name
        ),
    }
}

/// How long a client is told to wait before it asks again, where another try has a chance.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::PodRef;

    fn target() -> Target {
        let pod = PodRef {
            namespace: "default".into(),
            name: "web-1".into(),
            uid: "u".into(),
        };
        Target { pod, port: 8080 }
    }

    fn lookup(kind: LookupErrorKind) -> Error {
        let service = ServiceName::new("default", "web").unwrap();
        Error::Lookup(
            service,
            LookupError {
                kind,
                message: "why".into(),
            },
        )
    }

    #[test]
    fn the_table_matches_the_contract() {
        let rows = [
            (Error::BadRequest("no host"), 400, 3),
            (lookup(LookupErrorKind::NotFound), 404, 5),
            (lookup(LookupErrorKind::Forbidden), 403, 7),
            (lookup(LookupErrorKind::Unauthorized), 401, 16),
            (lookup(LookupErrorKind::Timeout), 504, 4),
            (
                Error::Connect(target(), ConnectError::Forbidden("no".into())),
                403,
                7,
            ),
            (
                Error::Connect(target(), ConnectError::Timeout(target(), Duration::from_secs(1))),
                504,
                4,
            ),
            (Error::Refused(target(), "refused".into()), 502, 14),
            (Error::Reset(target(), "reset".into()), 502, 14),
        ];
        for (error, status, grpc) in rows {
            let reply = error.reply();
            assert_eq!((reply.status.as_u16(), reply.grpc), (status, grpc), "{error}");
        }
    }

    #[test]
    fn what_the_user_must_put_right_is_not_tried_again() {
        assert!(!lookup(LookupErrorKind::Unauthorized).is_retryable());
        assert!(!Error::Connect(target(), ConnectError::Forbidden("no".into())).is_retryable());
        assert!(Error::Connect(target(), ConnectError::PodGone("gone".into())).is_retryable());
    }

    #[test]
    fn messages_name_the_object_and_the_next_command() {
        let text = lookup(LookupErrorKind::NotFound).to_string();
        assert!(
            text.contains("default/web") && text.contains("kubectl get svc -n default"),
            "{text}"
        );
    }
}
