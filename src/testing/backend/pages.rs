//! The HTTP application's pages.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, SET_COOKIE, TRAILER};
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tonic::body::Body;

/// Bytes of a body that are described back. Of a longer one only the number is: somebody may send the demo a file.
const KEPT: usize = 64 * 1024;

/// One chunk of a download.
static BLOCK: [u8; 64 * 1024] = pattern();

/// Answers a request; unknown paths are described back.
pub(super) async fn answer(pod: &str, request: Request<Incoming>) -> Response<Body> {
    let query = query(request.uri().query().unwrap_or_default());
    let number = |key: &str, default: u64| {
        query
            .get(key)
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let path = request.uri().path().to_owned();
    match path.trim_start_matches('/').split_once('/') {
        Some(("bytes", size)) => match size.parse() {
            Ok(size) => download(size, query.contains_key("chunked")),
            Err(_) => text(StatusCode::BAD_REQUEST, "usage: /bytes/N\n"),
        },
        Some(("status", code)) => match code.parse::<StatusCode>() {
            Ok(code) => text(code, ""),
            Err(_) => text(StatusCode::BAD_REQUEST, "usage: /status/NNN\n"),
        },
        _ => match path.as_str() {
            "/health" => page(&json!({"status": "ok", "pod": pod})),
            "/upload" => upload(request.into_body()).await,
            "/sse" => events(
                number("count", 10),
                Duration::from_millis(number("interval_ms", 100)),
            ),
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(number("ms", 1000))).await;
                describe(pod, request).await
            }
            "/trailers" => trailers(),
            "/cookies" => cookies(),
            _ => describe(pod, request).await,
        },
    }
}

/// Describes the request as the application saw it. Header names are lower case, as the HTTP library hands them over;
/// headers of one name come together, in their order.
async fn describe(pod: &str, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let proto = match parts.version {
        Version::HTTP_2 => "HTTP/2.0",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    };
    let header_host = parts.headers.get(HOST).and_then(|value| value.to_str().ok());
    let host = parts
        .uri
        .authority()
        .map(http::uri::Authority::as_str)
        .or(header_host)
        .unwrap_or_default();
    let target = match parts.version {
        Version::HTTP_2 => parts
            .uri
            .path_and_query()
            .map_or("*", http::uri::PathAndQuery::as_str)
            .to_owned(),
        _ => parts.uri.to_string(),
    };
    let seen = match read(body).await {
        Ok(seen) => seen,
        Err(error) => {
            return text(
                StatusCode::BAD_REQUEST,
                &format!("cannot read the body: {error}\n"),
            );
        }
    };
    page(&json!({
        "pod": pod,
        "proto": proto,
        "method": parts.method.as_str(),
        "target": target,
        "host": host,
        "headers": pairs(&parts.headers),
        "body_bytes": seen.bytes,
        "body": (seen.bytes == seen.kept.len() as u64).then(|| String::from_utf8_lossy(&seen.kept)),
        "trailers": pairs(&seen.trailers),
    }))
}

/// A body that has been read.
#[derive(Debug, Default)]
struct Seen {
    /// Its first bytes.
    kept: Vec<u8>,
    /// The number of all.
    bytes: u64,
    /// What came behind it.
    trailers: HeaderMap,
}

async fn read(mut body: Incoming) -> Result<Seen, hyper::Error> {
    let mut seen = Seen::default();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
                seen.bytes += data.len() as u64;
                let room = KEPT - seen.kept.len();
                seen.kept.extend_from_slice(&data[..data.len().min(room)]);
            }
            Err(frame) => seen.trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    Ok(seen)
}

async fn upload(mut body: Incoming) -> Response<Body> {
    let mut bytes = 0_u64;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Err(error) => return text(StatusCode::BAD_REQUEST, &format!("upload broke off: {error}\n")),
        }
    }
    page(&json!({"bytes": bytes}))
}

fn download(size: u64, chunked: bool) -> Response<Body> {
    let chunks = stream::unfold(size, |left| async move {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK.len());
        (take > 0).then(|| (Bytes::from_static(&BLOCK[..take]), left - take as u64))
    });
    let mut response = streamed("application/octet-stream", chunks);
    if !chunked {
        response.headers_mut().insert(CONTENT_LENGTH, size.into());
    }
    response
}

fn events(count: u64, interval: Duration) -> Response<Body> {
    let events = stream::unfold(0, move |sequence| async move {
        if sequence == count {
            return None;
        }
        if sequence > 0 {
            tokio::time::sleep(interval).await;
        }
        let sent = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        let event = format!("data: {{\"seq\":{sequence},\"sent_unix_ns\":{sent}}}\n\n");
        Some((Bytes::from(event), sequence + 1))
    });
    let mut response = streamed("text/event-stream", events);
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn trailers() -> Response<Body> {
    let mut fields = HeaderMap::new();
    fields.insert("x-checksum", HeaderValue::from_static("b10a8db1"));
    let frames = [
        Frame::data(Bytes::from_static(b"trailers follow\n")),
        Frame::trailers(fields),
    ];
    let body = StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>)));
    let mut response = Response::new(Body::new(body));
    // HTTP/1.1 clients get them only after `TE: trailers`, and only the ones announced (RFC 9110, 6.5.1).
    response
        .headers_mut()
        .insert(TRAILER, HeaderValue::from_static("x-checksum"));
    response
}

fn cookies() -> Response<Body> {
    let mut response = text(StatusCode::OK, "two cookies\n");
    response.headers_mut().append(
        SET_COOKIE,
        HeaderValue::from_static("session=1; Path=/; HttpOnly"),
    );
    response
        .headers_mut()
        .append(SET_COOKIE, HeaderValue::from_static("theme=dark; Path=/"));
    response
}

fn streamed(
    content_type: &'static str,
    chunks: impl Stream<Item = Bytes> + Send + 'static,
) -> Response<Body> {
    let frames = futures_util::StreamExt::map(chunks, |chunk| Ok::<_, Infallible>(Frame::data(chunk)));
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn page(body: &Value) -> Response<Body> {
    let mut response = Response::new(full(format!("{body}\n")));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(code: StatusCode, text: &str) -> Response<Body> {
    let mut response = Response::new(full(text.to_owned()));
    *response.status_mut() = code;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

fn full(text: String) -> Body {
    Body::new(Full::new(Bytes::from(text)))
}

fn pairs(headers: &HeaderMap) -> Vec<[String; 2]> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers
        .iter()
        .map(|(name, value)| [name.as_str().to_owned(), text(value)])
        .collect()
}

fn query(text: &str) -> BTreeMap<&str, &str> {
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect()
}

/// Bytes that repeat with a period that no power of two divides, so that a misplaced chunk shows.
const fn pattern() -> [u8; 64 * 1024] {
    let mut block = [0; 64 * 1024];
    let mut index = 0;
    while index < block.len() {
        block[index] = (index % 251) as u8;
        index += 1;
    }
    block
}
