//! The proxy's own words to a client: JSON or text by what it accepts, gRPC status for gRPC calls.

use bytes::Bytes;
use http::header::{ACCEPT, ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Method, Response, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::json;

use crate::proxy::body::ResponseBody;
use crate::proxy::error::{self, Error};
use crate::traffic::{OpenRecord, Outcome};

/// What `grpc-message` must percent-encode: everything but printable ASCII, and the percent sign (gRPC over HTTP/2).
const GRPC_MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

/// Which form of answer a client understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A `grpc-status` in a response without a body.
    Grpc,
    /// A JSON object.
    Json,
    /// One line of text.
    Text,
}

impl Form {
    /// Chooses by the request's headers.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        if is_grpc(headers) {
            return Self::Grpc;
        }
        let accepts = |kind: &str| {
            headers
                .get_all(ACCEPT)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .any(|value| value.contains(kind))
        };
        if accepts("application/json") && !accepts("text/html") {
            Self::Json
        } else {
            Self::Text
        }
    }
}

/// Reports whether a request is a gRPC call: `application/grpc`, alone or with `+format` or parameters. `application/grpc-web`
/// is another protocol.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    kind.strip_prefix("application/grpc")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

/// Answers a request that got no answer from a pod.
pub(super) fn fail(form: Form, error: &Error, mut record: OpenRecord) -> Response<ResponseBody> {
    let reply = error.reply();
    let text = error.to_string();
    record.flag = Some(reply.flag);
    record.reason = Some(text.clone());
    match form {
        Form::Grpc => {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(u16::from(reply.grpc)));
            if let Ok(message) = utf8_percent_encode(&text, GRPC_MESSAGE).to_string().try_into() {
                headers.insert("grpc-message", message);
            }
            record.grpc_status = Some(reply.grpc.to_string());
            respond(StatusCode::OK, headers, Bytes::new(), record)
        }
        Form::Json => {
            let body = json!({"status": reply.status.as_u16(), "flag": reply.flag, "message": text});
            respond(
                reply.status,
                own_headers("application/json", reply.status),
                format!("{body}\n").into(),
                record,
            )
        }
        Form::Text => {
            let headers = own_headers("text/plain; charset=utf-8", reply.status);
            respond(reply.status, headers, format!("{text}\n").into(), record)
        }
    }
}

fn own_headers(kind: &'static str, status: StatusCode) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from(error::RETRY_AFTER.as_secs()));
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    headers
}

/// Sends an answer of our own.
pub(super) fn respond(
    status: StatusCode,
    mut headers: HeaderMap,
    mut body: Bytes,
    mut record: OpenRecord,
) -> Response<ResponseBody> {
    if record.method == Method::HEAD {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        body.clear();
    }
    record.status = Some(status);
    record.first_byte = Some(tokio::time::Instant::now());
    record.sent = body.len() as u64;
    // Whether the client reads these few bytes is not observed.
    record.outcome = Outcome::Complete;
    let mut response = Response::new(ResponseBody::own(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    http::HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn the_form_follows_the_request() {
        assert_eq!(Form::of(&headers(&[])), Form::Text);
        assert_eq!(Form::of(&headers(&[("accept", "*/*")])), Form::Text);
        assert_eq!(Form::of(&headers(&[("accept", "application/json")])), Form::Json);
        assert_eq!(
            Form::of(&headers(&[("accept", "text/html,application/json;q=0.9")])),
            Form::Text
        );
        for kind in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc; charset=utf-8",
        ] {
            assert_eq!(
                Form::of(&headers(&[("content-type", kind)])),
                Form::Grpc,
                "{kind}"
            );
        }
        for kind in [
            "application/grpc-web",
            "application/grpc-web+proto",
            "application/json",
        ] {
            assert_ne!(
                Form::of(&headers(&[("content-type", kind)])),
                Form::Grpc,
                "{kind}"
            );
        }
    }
}
