//! HTTP/2 in clear text by `Upgrade: h2c` (RFC 7540 section 3.2), which `curl --http2` asks for.
//!
//! The request that asks becomes stream 1 of the HTTP/2 connection, half-closed by the client, and is answered there. The
//! HTTP/2 library knows no such stream, so the request is written into what it reads, as the frame that a client with prior
//! knowledge would have sent, just behind the client's own preface and settings.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::uri::Authority;
use http::{Request, Response, StatusCode, Version};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::proxy::body::ResponseBody;
use crate::proxy::detect::Prefixed;
use crate::proxy::http::headers;

/// The length of the client connection preface, and of a frame's header (RFC 9113 sections 3.4 and 4.1).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;

/// The largest first SETTINGS frame that is waited for: the initial limit of any frame (RFC 9113 section 6.5.2).
const MAX_SETTINGS: usize = 16_384;

/// END_STREAM and END_HEADERS of a HEADERS frame (RFC 9113 section 6.2).
const HEADERS: u8 = 1;
const END_STREAM_AND_HEADERS: u8 = 0x1 | 0x4;

const SETTINGS_FIELD: HeaderName = HeaderName::from_static("http2-settings");

/// Reports whether a request asks for HTTP/2 as it must, and can be stream 1: it has no body, and one authority that HTTP/2 can
/// carry. Any other request is answered over HTTP/1.1, as a server may, and there with an error if it deserves one.
pub(super) fn is_asked_for<B: Body>(request: &Request<B>) -> bool {
    let fields = request.headers();
    let valid = |value: &HeaderValue| {
        // A list of settings, six bytes each.
        URL_SAFE_NO_PAD
            .decode(value.as_bytes())
            .is_ok_and(|payload| payload.len() % 6 == 0)
    };
    let has_settings = || {
        let mut settings = fields.get_all(SETTINGS_FIELD).iter();
        settings.next().is_some_and(valid) && settings.next().is_none()
    };
    // In a request of HTTP/1.0 an Upgrade means nothing (RFC 9110 section 7.8).
    request.version() == Version::HTTP_11
        && headers::lists(fields, UPGRADE, "h2c")
        && headers::lists(fields, CONNECTION, "upgrade")
        && headers::lists(fields, CONNECTION, SETTINGS_FIELD.as_str())
        && has_settings()
        && request.body().is_end_stream()
        && headers::authority(request).is_ok_and(|authority| authority.parse::<Authority>().is_ok())
}

/// The answer that agrees.
pub(super) fn agreement() -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::own(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response
        .headers_mut()
        .insert(UPGRADE, HeaderValue::from_static("h2c"));
    response
}

/// Writes a request that [asks for it](is_asked_for) as the HEADERS frame of stream 1.
pub(super) fn first_stream<B>(request: &Request<B>) -> Bytes {
    let mut fields = request.headers().clone();
    headers::strip_hop_by_hop(&mut fields);
    headers::remove(&mut fields, |name| *name == SETTINGS_FIELD || name == HOST);
    let authority = headers::authority(request).expect("a request without an authority does not get here");
    let path = headers::path_and_query(request.uri());
    let block = header_block(
        request.method().as_str(),
        path.as_str(),
        authority.as_bytes(),
        &fields,
    );
    let mut frame = BytesMut::with_capacity(FRAME_HEADER + block.len());
    frame.put_uint(block.len() as u64, 3);
    frame.put_u8(HEADERS);
    frame.put_u8(END_STREAM_AND_HEADERS);
    frame.put_u32(1);
    frame.put(block);
    frame.freeze()
}

/// Encodes fields as literals that leave the compression state alone, which is the client's (RFC 7541 section 6.2.2).
fn header_block(method: &str, path: &str, authority: &[u8], fields: &HeaderMap) -> BytesMut {
    let mut block = BytesMut::new();
    let mut literal = |name: &[u8], value: &[u8]| {
        block.put_u8(0);
        string(&mut block, name);
        string(&mut block, value);
    };
    literal(b":method", method.as_bytes());
    literal(b":scheme", b"http");
    literal(b":path", path.as_bytes());
    literal(b":authority", authority);
    for (name, value) in fields {
        literal(name.as_str().as_bytes(), value.as_bytes());
    }
    block
}

/// A string literal without Huffman code: its length as an integer with a 7-bit prefix (RFC 7541 section 5).
fn string(block: &mut BytesMut, text: &[u8]) {
    match u8::try_from(text.len()) {
        Ok(length) if length < 0x7f => block.put_u8(length),
        _ => {
            block.put_u8(0x7f);
            let mut rest = text.len() - 0x7f;
            while rest >= 0x80 {
                block.put_u8(u8::try_from(rest & 0x7f).expect("seven bits") | 0x80);
                rest >>= 7;
            }
            block.put_u8(u8::try_from(rest).expect("what is left has seven bits"));
        }
    }
    block.put_slice(text);
}

/// Reads a client's preface and first SETTINGS frame, and gives the stream back with `frames` written in behind them.
///
/// # Errors
/// Any error of the stream, `UnexpectedEof` when it ends before that, `InvalidData` when that is not what comes.
pub(super) async fn inject<S: AsyncRead + Unpin>(mut stream: S, frames: &[u8]) -> io::Result<Prefixed<S>> {
    let mut read = BytesMut::new();
    let end = loop {
        if let Some(end) = opening_end(&read) {
            break end?;
        }
        if stream.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    let rest = read.split_off(end);
    read.extend_from_slice(frames);
    read.extend_from_slice(&rest);
    Ok(Prefixed::new(read.freeze(), stream))
}

/// The end of the preface and the SETTINGS frame behind it, once all of that is there.
fn opening_end(read: &[u8]) -> Option<io::Result<usize>> {
    let header = read.get(PREFACE..PREFACE + FRAME_HEADER)?;
    let length = header[..3]
        .iter()
        .fold(0, |length, &byte| length << 8 | usize::from(byte));
    if length > MAX_SETTINGS {
        let text = "the first frame is too large to be SETTINGS";
        return Some(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    let end = PREFACE + FRAME_HEADER + length;
    (read.len() >= end).then_some(Ok(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    #[test]
    fn lengths_beyond_the_prefix_take_more_bytes() {
        let mut block = BytesMut::new();
        string(&mut block, &[b'a'; 126]);
        assert_eq!(block[0], 126);
        block.clear();
        // The example of RFC 7541 section C.1.2 with a 7-bit prefix: 1337 = 127 + 1210.
        string(&mut block, &[b'a'; 1337]);
        assert_eq!(block[..3], [0x7f, 0xba, 0x09]);
    }

    /// A request that asks as it must.
    fn asking() -> http::request::Builder {
        Request::builder()
            .header("host", "a.b")
            .header("connection", "Upgrade, HTTP2-Settings")
            .header("upgrade", "h2c")
            .header("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA")
    }

    fn is_heard(request: http::request::Builder) -> bool {
        is_asked_for(&request.body(http_body_util::Empty::<Bytes>::new()).unwrap())
    }

    #[test]
    fn a_request_must_ask_in_every_way_it_has_to() {
        assert!(is_heard(asking()));
        let change = |change: &dyn Fn(&mut HeaderMap)| {
            let mut request = asking();
            change(request.headers_mut().unwrap());
            is_heard(request)
        };
        let set = |fields: &mut HeaderMap, name, value| {
            fields.insert(name, HeaderValue::from_static(value));
        };
        assert!(!change(&|fields| set(fields, CONNECTION, "Upgrade")));
        assert!(!change(&|fields| set(fields, SETTINGS_FIELD, "not base64!")));
        assert!(!change(&|fields| {
            fields.remove(SETTINGS_FIELD);
        }));
        assert!(!is_heard(asking().header("http2-settings", "AAMAAABk")));
        assert!(!is_heard(asking().version(Version::HTTP_10)));
    }

    #[test]
    fn a_request_that_deserves_an_error_gets_it_over_http1() {
        assert!(!is_heard(asking().header("host", "c.d")), "two hosts");
        assert!(!is_heard(asking().uri("http://user@a.b/")), "a user");
        assert!(!is_heard(asking().method("CONNECT").uri("a.b:80")), "CONNECT");
        let mut request = asking();
        let fields = request.headers_mut().unwrap();
        fields.insert(HOST, HeaderValue::from_static("a b/c"));
        assert!(!is_heard(request), "no host");
    }

    proptest! {
        #[test]
        fn any_split_of_the_opening_gives_the_same_bytes(split in 0usize..60, settings in 0usize..20) {
            let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            sent.extend([0, 0, u8::try_from(settings).unwrap(), 4, 0, 0, 0, 0, 0]);
            sent.extend(vec![9; settings]);
            let mut expected = sent.clone();
            sent.extend(b"rest");
            expected.extend(b"framesrest");
            let split = split.min(sent.len());
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let seen = runtime.block_on(async {
                let stream = AsyncReadExt::chain(&sent[..split], &sent[split..]);
                let mut seen = Vec::new();
                let mut injected = inject(stream, b"frames").await.unwrap();
                injected.read_to_end(&mut seen).await.unwrap();
                seen
            });
            prop_assert_eq!(seen, expected);
        }
    }
}
