//! A byte stream inside a WebSocket: whatever the server sends, however it is cut, the payload is read unchanged up to the
//! same end, which stays the end, and what goes back is whole masked frames, none behind a Close.

mod frames;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use kube_tunnel::k8s::bare;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use frames::{Meaning, meaning, unmask};

/// Sizes of payloads, reads and writes.
const SIZES: [usize; 8] = [1, 2, 7, 125, 126, 9000, 65_536, 70_000];

/// What a server sends in one run, and what a user writes.
const MOST: usize = 200 << 10;
const MOST_WRITTEN: usize = 256 << 10;

/// The first four bytes say how the connection and the user cut the stream, the rest what the server sends.
pub fn check(data: &[u8]) {
    let Some((&[cut, room, taken, writes], script)) = data.split_first_chunk() else {
        return;
    };
    let bytes = stream(script);
    let (expected, length) = (meaning(&bytes), bytes.len());
    let mut wire = Wire {
        left: bytes.into(),
        reads: Amounts::new(cut, length),
        writes: Amounts::new(taken, MOST_WRITTEN),
        written: Vec::new(),
        shut: false,
    };
    let (mut seen, mut accepted, mut room) = (
        Vec::new(),
        Vec::new(),
        vec![0; SIZES[usize::from(room) % 8] + length / 500],
    );
    let end = {
        let mut tunnel = bare::tunnel(&mut wire);
        let mut cx = Context::from_waker(Waker::noop());
        let mut turn = 0_usize;
        let mut end = loop {
            turn += 1;
            if writes > 0 && turn.is_multiple_of(writes.into()) && accepted.len() < MOST_WRITTEN {
                let from = accepted.len();
                let payload: Vec<_> = (from..from + SIZES[turn % 8]).map(byte_at).collect();
                if let Poll::Ready(written) = Pin::new(&mut tunnel).poll_write(&mut cx, &payload) {
                    accepted.extend_from_slice(&payload[..written.unwrap_or(0)]);
                }
            }
            match read(&mut tunnel, &mut room, &mut cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(0)) => break None,
                Poll::Ready(Ok(count)) => seen.extend_from_slice(&room[..count]),
                Poll::Ready(Err(error)) => break Some(error),
            }
        };
        for _ in 0..3 {
            end = match read(&mut tunnel, &mut room, &mut cx) {
                Poll::Ready(Ok(0)) => {
                    assert!(end.is_none(), "an end after {end:?}");
                    None
                }
                Poll::Ready(Err(error)) => {
                    let before = end.expect("an error after an end");
                    assert_eq!(
                        (before.kind(), before.to_string()),
                        (error.kind(), error.to_string())
                    );
                    Some(error)
                }
                other => panic!("{other:?} after the end"),
            };
        }
        while Pin::new(&mut tunnel).poll_shutdown(&mut cx).is_pending() {}
        end.map(|error| error.kind())
    };
    assert!(
        seen == expected.payload,
        "{} bytes of {}",
        seen.len(),
        expected.payload.len()
    );
    assert_eq!(end, expected.end);
    assert!(wire.shut);
    answers(&wire.written, &expected, &accepted);
}

/// What is written at a place of the stream: no two parts of it are alike.
fn byte_at(place: usize) -> u8 {
    (place % 251 + place / 251) as u8
}

fn read<S: AsyncRead + Unpin>(
    stream: &mut S,
    room: &mut [u8],
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(room);
    Pin::new(stream)
        .poll_read(cx, &mut buffer)
        .map_ok(|()| buffer.filled().len())
}

/// What the client must have sent: what was written, a Close at last, and PONGs for some of the PINGs, in their order, in
/// between; for the last one at least, unless a Close overtook it.
fn answers(written: &[u8], expected: &Meaning, accepted: &[u8]) {
    let mut frames = unmask(written);
    let (opcode, close) = frames.pop().expect("a Close");
    assert_eq!(opcode, 0x88);
    let code = close.first_chunk().map(|code| u16::from_be_bytes(*code));
    assert_eq!(code, expected.reply);
    let (mut pings, mut data, mut last) = (expected.pings.iter(), Vec::new(), None);
    for (opcode, payload) in &frames {
        match opcode {
            0x82 => {
                assert!(!payload.is_empty() && payload.len() <= 64 << 10);
                data.extend_from_slice(payload);
            }
            0x8a => {
                assert!(pings.any(|ping| ping == payload), "a PONG without its PING");
                last = Some(payload);
            }
            other => panic!("opcode {other:#x}"),
        }
    }
    assert!(data == accepted, "what was accepted is sent as it is");
    assert_eq!(last, expected.pings.last(), "the last PING is answered");
}

/// Makes what the server sends: whole frames, and bytes as they are.
fn stream(mut script: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((&step, rest)) = script.split_first()
        && bytes.len() < MOST
    {
        let (&size, rest) = rest.split_first().unwrap_or((&0, &[]));
        script = rest;
        let first = match step % 16 {
            0..=2 => {
                let (raw, rest) = script.split_at(script.len().min(size.into()));
                bytes.extend_from_slice(raw);
                script = rest;
                continue;
            }
            3..=5 => 0x82,
            6 | 7 => 0x02,
            8 | 9 => 0x00,
            10 | 11 => 0x80,
            12 | 13 => 0x89,
            14 => 0x8a,
            _ => 0x88,
        };
        let size = match first {
            0x88..=0x8a => usize::from(size % 126),
            _ if size == 0 => 0,
            _ => SIZES[usize::from(size) % 8],
        };
        let payload = (0..size).map(|at| if at < 2 { [3, 0xe8][at] } else { (at / 3) as u8 });
        bytes.push(first);
        match size {
            ..=125 => bytes.push(size as u8),
            126..=0xffff => bytes.extend([126].into_iter().chain((size as u16).to_be_bytes())),
            _ => bytes.extend([127].into_iter().chain((size as u64).to_be_bytes())),
        }
        bytes.extend(payload);
    }
    bytes
}

/// The connection.
struct Wire {
    left: VecDeque<u8>,
    reads: Amounts,
    writes: Amounts,
    written: Vec<u8>,
    shut: bool,
}

/// How many bytes come or go at a time.
struct Amounts {
    of: usize,
    least: usize,
    turn: usize,
}

impl Amounts {
    /// Not too small for `length` bytes in all.
    fn new(of: u8, length: usize) -> Self {
        Self {
            of: of.into(),
            least: length / 500,
            turn: 0,
        }
    }

    /// The next one; none now and then, perhaps.
    fn next(&mut self) -> usize {
        self.turn += 1;
        match self.of {
            0 => usize::MAX,
            of if of < 128 && self.turn.is_multiple_of(3) => 0,
            of => of * of / 16 + 1 + self.least,
        }
    }
}

impl AsyncRead for &mut Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let amount = self.reads.next();
        if amount == 0 {
            return Poll::Pending;
        }
        let count = amount.min(buf.remaining()).min(self.left.len());
        for byte in self.left.drain(..count) {
            buf.put_slice(&[byte]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for &mut Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        assert!(!self.shut, "a write after the shutdown");
        let amount = self.writes.next().min(buf.len());
        if amount == 0 {
            return Poll::Pending;
        }
        self.written.extend_from_slice(&buf[..amount]);
        Poll::Ready(Ok(amount))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}
