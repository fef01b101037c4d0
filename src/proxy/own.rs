//! The pages of the proxy's own hosts (`localhost`, IP literals). On a Service's host every path belongs to the backend.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Response, StatusCode, Version};
use serde_json::json;

use crate::proxy::body::ResponseBody;
use crate::proxy::reply::respond;
use crate::traffic::AccessRecord;

/// The protocols that the one port takes.
const FEATURES: [&str; 3] = ["http/1.1", "h2c", "grpc"];

/// Answers `/health`: the proxy is alive, and this is how you reached it.
pub(super) fn health(version: Version, grpc: bool, record: AccessRecord) -> Response<ResponseBody> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let body = json!({
        "status": "healthy",
        "protocol": describe(version, grpc),
        "version": env!("CARGO_PKG_VERSION"),
        "features": FEATURES,
    });
    respond(StatusCode::OK, headers, Bytes::from(format!("{body}\n")), record)
}

/// Words the protocol as the seed's `/health` does, e.g. `HTTP/2.0 (cleartext) gRPC`.
fn describe(version: Version, grpc: bool) -> String {
    format!("{version:?} (cleartext){}", if grpc { " gRPC" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_worded_as_the_seed_does() {
        assert_eq!(describe(Version::HTTP_11, false), "HTTP/1.1 (cleartext)");
        assert_eq!(describe(Version::HTTP_2, true), "HTTP/2.0 (cleartext) gRPC");
    }
}
