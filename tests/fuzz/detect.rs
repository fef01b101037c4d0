//! Protocol detection: the first bytes decide, however they arrive, and not a byte is lost or read too early.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use kube_tunnel::proxy::detect::{Protocol, read, sniff};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

/// So many bytes decide, whatever they are: the longest method that is waited for, and the byte behind it.
const DECISIVE: usize = 33;

/// One read takes no more than this.
const FIRST_READ: usize = 4096;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of the input says how the stream is cut into reads; the stream is the rest.
pub fn check(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let decided = (1..=bytes.len()).find_map(|end| Some((end, sniff(&bytes[..end])?)));
    assert_eq!(sniff(&[]), None);
    let Some((needed, protocol)) = decided else {
        assert!(bytes.len() < DECISIVE, "{DECISIVE} bytes decide nothing");
        assert!(detect(bytes, usize::from(cut) + 1).is_none());
        return;
    };
    assert!(needed <= DECISIVE, "{needed} bytes were needed");
    for end in needed..=bytes.len().min(needed + DECISIVE) {
        assert_eq!(
            sniff(&bytes[..end]),
            Some(protocol),
            "more bytes changed the answer"
        );
    }
    assert_eq!(
        sniff(bytes),
        Some(protocol),
        "all bytes at once changed the answer"
    );
    says_what_it_means(protocol, bytes);
    for step in [1, usize::from(cut) + 1, usize::MAX] {
        let (seen, taken, all) = detect(bytes, step).expect("what is decided is detected");
        assert_eq!(seen, protocol, "in steps of {step}");
        assert_eq!(all, bytes, "in steps of {step}");
        let allowed = needed.div_ceil(step).saturating_mul(step).min(FIRST_READ);
        assert!(
            taken <= allowed,
            "{taken} bytes were read where {allowed} were enough"
        );
    }
}

/// The answer against the definition of each protocol.
fn says_what_it_means(protocol: Protocol, bytes: &[u8]) {
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let method = bytes.iter().take_while(|byte| token(byte)).count();
    let http1 = matches!(bytes[0], b'\r' | b'\n') || (method > 0 && bytes.get(method) == Some(&b' '));
    match protocol {
        Protocol::Http1 => assert!(http1 && !bytes.starts_with(PREFACE)),
        Protocol::Http2 => assert!(bytes.starts_with(PREFACE)),
        Protocol::Tls => assert!(bytes.starts_with(&[0x16, 3])),
        Protocol::Socks5 => assert_eq!(bytes[0], 5),
        Protocol::Unknown => {
            assert!(!bytes.starts_with(PREFACE) && !bytes.starts_with(&[0x16, 3]) && bytes[0] != 5);
            assert!(!http1 || method >= DECISIVE);
        }
    }
}

/// Detects on a stream that gives at most `step` bytes at a time. Returns the answer, how much was read for it, and all that
/// can be read afterwards.
fn detect(bytes: &[u8], step: usize) -> Option<(Protocol, usize, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without IO needs nothing");
    let taken = Cell::new(0);
    let stream = Steps {
        left: bytes,
        step,
        taken: &taken,
    };
    runtime.block_on(async {
        let detected = read(stream, Duration::from_secs(10)).await;
        let (protocol, mut rest) = detected.expect("the stream has no errors")?;
        let needed = taken.get();
        let mut all = Vec::new();
        // Pieces that are smaller than what was read, so that giving it back has to go on where it stopped.
        let mut piece = [0; 7];
        loop {
            match rest.read(&mut piece).await.expect("the stream has no errors") {
                0 => return Some((protocol, needed, all)),
                length => all.extend_from_slice(&piece[..length]),
            }
        }
    })
}

/// A stream in pieces, which counts what was taken of it.
struct Steps<'a> {
    left: &'a [u8],
    step: usize,
    taken: &'a Cell<usize>,
}

impl AsyncRead for Steps<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.left.len().min(self.step).min(buf.remaining());
        let (now, left) = self.left.split_at(length);
        buf.put_slice(now);
        self.left = left;
        self.taken.set(self.taken.get() + length);
        Poll::Ready(Ok(()))
    }
}
