//! Tells from the first bytes of a connection which protocol its client speaks.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The client connection preface of HTTP/2 (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest method that is waited for before the bytes count as no HTTP; real ones have at most 17 characters.
const LONGEST_METHOD: usize = 32;

/// Bytes that arrive together are taken together; a request head rarely needs more.
const FIRST_READ: usize = 4096;

/// A protocol that a client may open a connection with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1 in clear text.
    Http1,
    /// HTTP/2 in clear text with prior knowledge.
    Http2,
    /// A TLS handshake.
    Tls,
    /// SOCKS version 5 (RFC 1928).
    Socks5,
    /// Nothing that is known here.
    Unknown,
}

/// Decides from the bytes so far; `None` asks for more. Any split of the same bytes leads to the same answer.
#[must_use]
pub fn sniff(bytes: &[u8]) -> Option<Protocol> {
    let (&first, rest) = bytes.split_first()?;
    match first {
        // A TLS record of type handshake, any version 3.x (RFC 8446 section 5.1).
        0x16 => rest.first().map(|&major| {
            if major == 3 {
                Protocol::Tls
            } else {
                Protocol::Unknown
            }
        }),
        0x05 => Some(Protocol::Socks5),
        // An empty line before the request line is to be ignored (RFC 9112 section 2.2).
        b'\r' | b'\n' => Some(Protocol::Http1),
        _ => sniff_http(bytes),
    }
}

fn sniff_http(bytes: &[u8]) -> Option<Protocol> {
    let common = bytes.iter().zip(PREFACE).take_while(|(a, b)| a == b).count();
    if common == PREFACE.len() {
        return Some(Protocol::Http2);
    }
    if common == bytes.len() {
        return None;
    }
    // HTTP/1: a method, which is a token, and a space (RFC 9112 section 3). What lies behind the longest method must not
    // count: whether it is there already depends on how the bytes were split.
    let mut decisive = bytes.iter().take(LONGEST_METHOD + 1);
    match decisive.position(|&byte| !is_token(byte)) {
        Some(end) if end > 0 && bytes[end] == b' ' => Some(Protocol::Http1),
        Some(_) => Some(Protocol::Unknown),
        None if bytes.len() > LONGEST_METHOD => Some(Protocol::Unknown),
        None => None,
    }
}

/// `tchar` of RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Reads until the protocol is known. `None`: the client closed or fell silent before it said anything useful.
///
/// # Errors
/// Any error of the stream.
pub async fn read<S>(mut stream: S, patience: Duration) -> io::Result<Option<(Protocol, Prefixed<S>)>>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = BytesMut::with_capacity(FIRST_READ);
    let reading = async {
        loop {
            if stream.read_buf(&mut bytes).await? == 0 {
                return Ok(None);
            }
            if let Some(protocol) = sniff(&bytes) {
                return Ok(Some(protocol));
            }
        }
    };
    match tokio::time::timeout(patience, reading).await {
        Ok(Ok(Some(protocol))) => Ok(Some((protocol, Prefixed::new(bytes.freeze(), stream)))),
        Ok(Ok(None)) | Err(_) => Ok(None),
        Ok(Err(error)) => Err(error),
    }
}

/// A stream with bytes before its own: those that have been read already, to be read again.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    /// Puts `prefix` before what `stream` has to read.
    #[must_use]
    pub fn new(prefix: Bytes, stream: S) -> Self {
        Self { prefix, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..length]);
        self.prefix.advance(length);
        if self.prefix.is_empty() {
            self.prefix = Bytes::new(); // gives the memory back for the life of the connection
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds every prefix, as a stream that is split after each byte would.
    fn feed(bytes: &[u8]) -> Option<Protocol> {
        (1..=bytes.len()).find_map(|end| sniff(&bytes[..end]))
    }

    #[test]
    fn each_protocol_is_known_by_its_first_bytes() {
        let cases: [(&[u8], Option<Protocol>); 15] = [
            (b"GET / HTTP/1.1\r\n", Some(Protocol::Http1)),
            (b"POST /x HTTP/1.1\r\n", Some(Protocol::Http1)),
            (b"PRI /x HTTP/1.1\r\n", Some(Protocol::Http1)),
            (b"PROPFIND / HTTP/1.1\r\n", Some(Protocol::Http1)),
            (b"\r\nGET / HTTP/1.1\r\n", Some(Protocol::Http1)),
            (PREFACE, Some(Protocol::Http2)),
            (b"\x16\x03\x01\x02\x00", Some(Protocol::Tls)),
            (b"\x16\x02", Some(Protocol::Unknown)),
            (b"\x05\x01\x00", Some(Protocol::Socks5)),
            (b"\x00\x00", Some(Protocol::Unknown)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Protocol::Unknown)),
            (b"AMETHODOFTHIRTYTWOCHARACTERS0032 /", Some(Protocol::Http1)),
            (b"AMETHODOFTHIRTYTHREECHARACTERS033 /", Some(Protocol::Unknown)),
            (b"PRI * HTTP/2.0\r\n\r\nSM", None),
            (b"P", None),
        ];
        for (bytes, expected) in cases {
            let text = bytes.escape_ascii().to_string();
            assert_eq!(feed(bytes), expected, "{text}");
            assert_eq!(sniff(bytes), expected, "{text} in one piece");
        }
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(early) = feed(&bytes) {
                prop_assert_eq!(sniff(&bytes), Some(early));
            }
        }

        #[test]
        fn any_split_of_a_request_gives_the_same_bytes_back(split in 1usize..20) {
            let request = b"GET /some/path HTTP/1.1\r\nhost: a\r\n\r\n";
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let (head, tail) = request.split_at(split);
                let stream = AsyncReadExt::chain(head, tail); // delivers the two in separate reads
                let (protocol, mut stream) = read(stream, Duration::from_secs(1)).await.unwrap().unwrap();
                assert_eq!(protocol, Protocol::Http1);
                let mut seen = Vec::new();
                stream.read_to_end(&mut seen).await.unwrap();
                assert_eq!(seen, request);
            });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_given_up_after_the_wait() {
        let (_client, server) = tokio::io::duplex(64);
        assert!(read(server, Duration::from_secs(10)).await.unwrap().is_none());
    }
}
