//! The pages of the proxy's own hosts (`localhost`, IP literals). On a Service's host every path belongs to the backend.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Response, StatusCode, Version};
use serde_json::json;

use crate::proxy::body::ResponseBody;
use crate::proxy::connection::{Downstream, Security};
use crate::proxy::reply::respond;
use crate::traffic::AccessRecord;

/// The protocols that the one port takes.
const FEATURES: [&str; 4] = ["http/1.1", "h2c", "h2", "grpc"];

/// Answers `/health`: the proxy is alive, and this is how you reached it.
pub(super) fn health(
    downstream: &Downstream,
    version: Version,
    grpc: bool,
    record: AccessRecord,
) -> Response<ResponseBody> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let body = json!({
        "status": "healthy",
        "protocol": describe(version, &downstream.security, grpc),
        "version": env!("CARGO_PKG_VERSION"),
        "features": FEATURES,
    });
    respond(StatusCode::OK, headers, Bytes::from(format!("{body}\n")), record)
}

/// Words the protocol as the seed's `/health` does, e.g. `HTTP/2.0 (TLS) ALPN:h2 gRPC`.
fn describe(version: Version, security: &Security, grpc: bool) -> String {
    let security = match security {
        Security::Cleartext => "(cleartext)".to_owned(),
        Security::Tls { alpn: None } => "(TLS)".to_owned(),
        Security::Tls { alpn: Some(alpn) } => format!("(TLS) ALPN:{alpn}"),
    };
    format!("{version:?} {security}{}", if grpc { " gRPC" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_worded_as_the_seed_does() {
        let tls = |alpn: Option<&str>| Security::Tls {
            alpn: alpn.map(str::to_owned),
        };
        assert_eq!(
            describe(Version::HTTP_11, &Security::Cleartext, false),
            "HTTP/1.1 (cleartext)"
        );
        assert_eq!(
            describe(Version::HTTP_2, &Security::Cleartext, true),
            "HTTP/2.0 (cleartext) gRPC"
        );
        assert_eq!(
            describe(Version::HTTP_2, &tls(Some("h2")), false),
            "HTTP/2.0 (TLS) ALPN:h2"
        );
        assert_eq!(describe(Version::HTTP_11, &tls(None), false), "HTTP/1.1 (TLS)");
    }
}
