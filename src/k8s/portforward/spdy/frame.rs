//! SPDY/3.1 frames, as far as a client of port-forwards needs them. Layout and limits are those of the peer,
//! `moby/spdystream:spdy/{types,read,write}.go`; integers are big endian.
//!
//! Headers are written without a compressor: the peer inflates them, and a deflate stream may consist of stored blocks alone.
//! They are never read: the peer's replies carry none, and nothing else of its headers is of use here.

use std::fmt;
use std::io::{IoSlice, Write as _};

use tracing::trace;

/// Largest payload that a frame's 24-bit length can tell.
pub(super) const MAX_PAYLOAD: usize = (1 << 24) - 1;

/// Bytes before a frame's payload.
pub(super) const HEAD: usize = 8;

/// Largest control frame taken: the peer's largest is a reset or a reply without headers.
const MAX_CONTROL: usize = 64 << 10;

/// The part of a control frame's payload that means anything here.
const MAX_PREFIX: usize = 8;

const FLAG_FIN: u8 = 0x01;
const CONTROL_VERSION: u16 = 0x8003;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// `RST_STREAM` status of a stream that nobody wants any more.
pub(super) const CANCEL: u32 = 5;

/// What came from the peer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event<'a> {
    /// The peer took the stream; its port is not connected yet.
    Reply {
        /// Stream id.
        stream: u32,
    },
    /// A part of a stream's payload. One frame comes as several, cut wherever the input was.
    Data {
        /// Stream id.
        stream: u32,
        /// The bytes, possibly none.
        payload: &'a [u8],
        /// Whether the peer will send no more on the stream.
        fin: bool,
    },
    /// The peer gives the stream up.
    Reset {
        /// Stream id.
        stream: u32,
        /// Why, as a status of `RST_STREAM`.
        status: u32,
    },
    /// A PING; an answer if its id is odd.
    Ping {
        /// The id.
        id: u32,
    },
    /// The peer will take no more streams.
    GoAway,
}

/// Tells the frame, without the payload.
impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply { stream } => write!(f, "SYN_REPLY stream={stream}"),
            Self::Data { stream, payload, fin } => {
                write!(f, "DATA stream={stream} bytes={} fin={fin}", payload.len())
            }
            Self::Reset { stream, status } => write!(f, "RST_STREAM stream={stream} status={status}"),
            Self::Ping { id } => write!(f, "PING id={id}"),
            Self::GoAway => f.write_str("GOAWAY"),
        }
    }
}

/// Why the peer's bytes cannot be understood; nothing that follows them can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    /// Not version 3, or a type that SPDY/3.1 does not know.
    #[error("unsupported control frame {0:#010x}")]
    Unsupported(u32),
    /// A length that does not fit the type.
    #[error("a control frame of type {0} has {1} bytes")]
    Length(u16, usize),
}

/// Finds frames in bytes that may be cut anywhere. Keeps at most the head of one frame and never payload.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The beginning of the current frame: its head, and what matters of a control frame's payload.
    head: [u8; HEAD + MAX_PREFIX],
    filled: usize,
    /// What the bytes after it are.
    body: Body,
}

#[derive(Debug, Default)]
enum Body {
    /// Not known yet: the head is incomplete.
    #[default]
    Unknown,
    /// So many bytes of a stream.
    Data { stream: u32, left: usize, fin: bool },
    /// So many bytes to pass over.
    Skipped { left: usize },
}

impl Decoder {
    /// Takes the next event off the input, or all of the input if it holds no whole one.
    ///
    /// # Errors
    /// A [`FrameError`]; the decoder must not be used after it.
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, FrameError> {
        loop {
            match &mut self.body {
                Body::Data { stream, left, fin } => {
                    let payload = take(input, *left);
                    if payload.is_empty() && *left > 0 {
                        return Ok(None);
                    }
                    *left -= payload.len();
                    let (stream, fin) = (*stream, *fin && *left == 0);
                    if *left == 0 {
                        self.body = Body::Unknown;
                    }
                    return Ok(Some(Event::Data { stream, payload, fin }));
                }
                Body::Skipped { left } => {
                    *left -= take(input, *left).len();
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.body = Body::Unknown;
                }
                Body::Unknown => {
                    if !self.fill(HEAD, input) {
                        return Ok(None);
                    }
                    let head = Head::read(&self.head);
                    if !head.control {
                        self.filled = 0;
                        self.body = Body::Data {
                            stream: head.word & 0x7fff_ffff,
                            left: head.length,
                            fin: head.flags & FLAG_FIN != 0,
                        };
                        continue;
                    }
                    let prefix = head.prefix()?;
                    if !self.fill(HEAD + prefix, input) {
                        return Ok(None);
                    }
                    self.filled = 0;
                    self.body = Body::Skipped {
                        left: head.length - prefix,
                    };
                    if let Some(event) = self.control(head.kind()) {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// Collects the first `wanted` bytes of the frame. Returns whether they are all there.
    fn fill(&mut self, wanted: usize, input: &mut &[u8]) -> bool {
        let missing = wanted.saturating_sub(self.filled);
        let found = take(input, missing);
        if let Some(room) = self.head.get_mut(self.filled..self.filled + found.len()) {
            room.copy_from_slice(found);
        }
        self.filled += found.len();
        found.len() == missing
    }

    /// Reads a control frame whose prefix is complete.
    fn control(&self, kind: u16) -> Option<Event<'static>> {
        let (first, second) = (word(&self.head, HEAD), word(&self.head, HEAD + 4));
        let stream = first & 0x7fff_ffff;
        match kind {
            SYN_REPLY => Some(Event::Reply { stream }),
            RST_STREAM => Some(Event::Reset {
                stream,
                status: second,
            }),
            PING => Some(Event::Ping { id: first }),
            GOAWAY => Some(Event::GoAway),
            _ => None,
        }
    }
}

/// The first eight bytes of a frame.
struct Head {
    word: u32,
    control: bool,
    flags: u8,
    length: usize,
}

impl Head {
    fn read(bytes: &[u8; HEAD + MAX_PREFIX]) -> Self {
        let (first, second) = (word(bytes, 0), word(bytes, 4));
        Self {
            word: first,
            control: first & 0x8000_0000 != 0,
            flags: second.to_be_bytes()[0],
            length: (second & 0x00ff_ffff) as usize,
        }
    }

    fn kind(&self) -> u16 {
        (self.word & 0xffff) as u16
    }

    /// Tells how many bytes of a control frame's payload are read.
    fn prefix(&self) -> Result<usize, FrameError> {
        let wrong = FrameError::Length(self.kind(), self.length);
        if self.word >> 16 != u32::from(CONTROL_VERSION) {
            return Err(FrameError::Unsupported(self.word));
        }
        if self.length > MAX_CONTROL {
            return Err(wrong);
        }
        let prefix = match self.kind() {
            SYN_REPLY | PING => 4,
            RST_STREAM | GOAWAY => 8,
            SYN_STREAM | SETTINGS | HEADERS | WINDOW_UPDATE => 0,
            _ => return Err(FrameError::Unsupported(self.word)),
        };
        if self.length < prefix {
            Err(wrong)
        } else {
            Ok(prefix)
        }
    }
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

fn word(bytes: &[u8; HEAD + MAX_PREFIX], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|four| four.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

/// Writes frames that carry headers: all of a session's headers are one zlib stream.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    /// Whether the stream's two-byte beginning has been written.
    begun: bool,
}

impl Encoder {
    /// Writes the two `SYN_STREAM`s of one forwarded connection, the error stream half-closed: nothing is ever sent on it.
    /// They must not be parted, since a runtime may abort over half a pair (kubernetes/kubelet commit f8c45c3).
    pub(super) fn pair(&mut self, out: &mut Vec<u8>, error: u32, data: u32, port: u16) {
        // The data stream's id is as good a name for the pair as any.
        self.syn_stream(out, error, FLAG_FIN, Some(("error", port, data)));
        self.syn_stream(out, data, 0, Some(("data", port, data)));
    }

    /// Writes a `SYN_STREAM` without headers, which a peer answers with a reset: from its read loop if the id is an old one,
    /// from the stream's worker if it is new.
    pub(super) fn bare(&mut self, out: &mut Vec<u8>, stream: u32) {
        self.syn_stream(out, stream, FLAG_FIN, None);
    }

    fn syn_stream(&mut self, out: &mut Vec<u8>, stream: u32, flags: u8, purpose: Option<(&str, u16, u32)>) {
        trace!(stream, ?purpose, "SYN_STREAM to be sent");
        let start = out.len();
        control(out, SYN_STREAM, flags);
        out.extend_from_slice(&stream.to_be_bytes());
        // No associated stream, priority 0, slot 0.
        out.extend_from_slice(&[0; 6]);
        self.headers(out, purpose);
        finish(out, start);
    }

    /// Writes a header block as one stored deflate block, and an empty one behind it: the sync flush that tells the peer's
    /// inflater that the block ends here.
    fn headers(&mut self, out: &mut Vec<u8>, purpose: Option<(&str, u16, u32)>) {
        if !self.begun {
            self.begun = true;
            out.extend_from_slice(&[0x78, 0x01]); // no preset dictionary
        }
        out.push(0x00);
        let lengths = out.len();
        out.extend_from_slice(&[0; 4]);
        let start = out.len();
        match purpose {
            None => out.extend_from_slice(&0_u32.to_be_bytes()),
            Some((kind, port, request)) => {
                out.extend_from_slice(&3_u32.to_be_bytes());
                header(out, "streamtype", format_args!("{kind}"));
                header(out, "port", format_args!("{port}"));
                header(out, "requestid", format_args!("{request}"));
            }
        }
        let length = u16::try_from(out.len() - start).expect("three short headers fit a stored block");
        put(out, lengths, &length.to_le_bytes());
        put(out, lengths + 2, &(!length).to_le_bytes());
        out.extend_from_slice(&[0x00, 0x00, 0x00, 0xff, 0xff]);
    }
}

/// Writes one header; its name must be in lower case.
fn header(out: &mut Vec<u8>, name: &str, value: std::fmt::Arguments<'_>) {
    text(out, format_args!("{name}"));
    text(out, value);
}

fn text(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    out.write_fmt(text).expect("a vector takes every byte");
    let length = u32::try_from(out.len() - at - 4).expect("a header is short");
    put(out, at, &length.to_be_bytes());
}

/// Writes one DATA frame with the first `length` bytes of `parts`, at most [`MAX_PAYLOAD`].
#[cfg(any(test, feature = "internals"))]
pub(super) fn data(out: &mut Vec<u8>, stream: u32, parts: &[IoSlice<'_>], length: usize) {
    out.reserve(HEAD + length);
    let start = begin_data(out, stream);
    payload(out, parts, length);
    finish(out, start);
}

/// Writes the head of a DATA frame, whose payload is to follow. Returns where the frame begins, for [`finish`].
pub(super) fn begin_data(out: &mut Vec<u8>, stream: u32) -> usize {
    let start = out.len();
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    start
}

/// Writes the first `length` bytes of `parts`.
pub(super) fn payload(out: &mut Vec<u8>, parts: &[IoSlice<'_>], length: usize) {
    let mut left = length;
    for part in parts {
        let (taken, _) = part.split_at(left.min(part.len()));
        out.extend_from_slice(taken);
        left -= taken.len();
    }
}

/// Writes an empty DATA frame that ends our half of a stream.
pub(super) fn fin(out: &mut Vec<u8>, stream: u32) {
    trace!(stream, "DATA with FIN to be sent");
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[FLAG_FIN, 0, 0, 0]);
}

/// Writes a `RST_STREAM`.
pub(super) fn reset(out: &mut Vec<u8>, stream: u32, status: u32) {
    trace!(stream, status, "RST_STREAM to be sent");
    let start = out.len();
    control(out, RST_STREAM, 0);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&status.to_be_bytes());
    finish(out, start);
}

/// Writes a PING.
pub(super) fn ping(out: &mut Vec<u8>, id: u32) {
    trace!(id, "PING to be sent");
    let start = out.len();
    control(out, PING, 0);
    out.extend_from_slice(&id.to_be_bytes());
    finish(out, start);
}

/// Writes a GOAWAY. The peer reads nothing after it and ends every stream.
pub(super) fn go_away(out: &mut Vec<u8>) {
    trace!("GOAWAY to be sent");
    let start = out.len();
    control(out, GOAWAY, 0);
    out.extend_from_slice(&[0; 8]);
    finish(out, start);
}

fn control(out: &mut Vec<u8>, kind: u16, flags: u8) {
    out.extend_from_slice(&CONTROL_VERSION.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&[flags, 0, 0, 0]);
}

/// Fills in the length of the frame that begins at `start` and ends here. A DATA frame that is the last one may grow and be
/// finished again.
///
/// # Panics
/// If the payload is more than [`MAX_PAYLOAD`].
pub(super) fn finish(out: &mut [u8], start: usize) {
    let length = out.len() - start - HEAD;
    assert!(length <= MAX_PAYLOAD, "a frame of {length} bytes");
    let [_, high, middle, low] = (length as u32).to_be_bytes();
    put(out, start + 5, &[high, middle, low]);
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = out.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An event that owns its bytes; neighbouring parts of one stream's payload are one.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Seen {
        Data(u32, Vec<u8>, bool),
        Reply(u32),
        Reset(u32, u32),
        Ping(u32),
        GoAway,
    }

    fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Seen>, FrameError> {
        let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
        for mut piece in pieces {
            while let Some(event) = decoder.next(&mut piece)? {
                let next = match event {
                    Event::Data { stream, payload, fin } => {
                        if let Some(Seen::Data(last, bytes, ended)) = seen.last_mut()
                            && *last == stream
                            && !*ended
                        {
                            bytes.extend_from_slice(payload);
                            *ended = fin;
                            continue;
                        }
                        Seen::Data(stream, payload.to_vec(), fin)
                    }
                    Event::Reply { stream } => Seen::Reply(stream),
                    Event::Reset { stream, status } => Seen::Reset(stream, status),
                    Event::Ping { id } => Seen::Ping(id),
                    Event::GoAway => Seen::GoAway,
                };
                seen.push(next);
            }
            assert!(piece.is_empty(), "input was left over");
        }
        Ok(seen)
    }

    fn reply(out: &mut Vec<u8>, stream: u32) {
        let start = out.len();
        control(out, SYN_REPLY, 0);
        out.extend_from_slice(&stream.to_be_bytes());
        out.extend_from_slice(&[0x78, 0xf9, 1, 2, 3]); // headers, passed over
        finish(out, start);
    }

    fn write(seen: &Seen, out: &mut Vec<u8>) {
        match seen {
            Seen::Data(stream, payload, _) => {
                // A FIN keeps two frames of one stream apart.
                data(out, *stream, &[IoSlice::new(payload)], payload.len());
                fin(out, *stream);
            }
            Seen::Reply(stream) => reply(out, *stream),
            Seen::Reset(stream, status) => reset(out, *stream, *status),
            Seen::Ping(id) => ping(out, *id),
            Seen::GoAway => go_away(out),
        }
    }

    fn frames() -> impl Strategy<Value = Vec<Seen>> {
        let stream = 1_u32..1000;
        let frame = prop_oneof![
            (stream.clone(), prop::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(id, payload)| { Seen::Data(id, payload, true) }),
            stream.clone().prop_map(Seen::Reply),
            (stream, any::<u32>()).prop_map(|(id, status)| Seen::Reset(id, status)),
            any::<u32>().prop_map(Seen::Ping),
            Just(Seen::GoAway),
        ];
        prop::collection::vec(frame, 0..20)
    }

    proptest! {
        #[test]
        fn frames_are_found_however_the_bytes_are_cut(frames in frames(), step in 1_usize..50) {
            let mut wire = Vec::new();
            frames.iter().for_each(|frame| write(frame, &mut wire));
            prop_assert_eq!(decode(wire.chunks(step)).unwrap(), frames);
        }

        #[test]
        fn any_bytes_give_events_or_an_error(bytes: Vec<u8>, step in 1_usize..20) {
            let whole = decode(std::iter::once(&bytes[..]));
            prop_assert_eq!(decode(bytes.chunks(step)).is_err(), whole.is_err());
        }
    }

    #[test]
    fn what_no_peer_sends_is_an_error() {
        let decode = |bytes: &[u8]| decode(std::iter::once(bytes));
        for wrong in [
            [0x80, 2, 0, 1, 0, 0, 0, 0],  // version 2
            [0x80, 3, 0, 5, 0, 0, 0, 0],  // NOOP
            [0x80, 3, 0, 3, 0, 0, 0, 4],  // a reset without a status
            [0x80, 3, 0, 2, 0, 16, 0, 0], // a megabyte of headers
        ] {
            assert!(decode(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn headers_are_stored_blocks_that_zlib_inflates_one_by_one() {
        let (mut encoder, mut wire) = (Encoder::default(), Vec::new());
        encoder.pair(&mut wire, 11, 21, 8080);
        encoder.bare(&mut wire, 1);
        let mut inflater = flate2::Decompress::new(true);
        let mut texts = Vec::new();
        let mut rest = &wire[..];
        while !rest.is_empty() {
            let length = usize::from(u16::from_be_bytes([rest[6], rest[7]]));
            let mut text = Vec::with_capacity(4096);
            let block = &rest[HEAD + 10..HEAD + length];
            inflater
                .decompress_vec(block, &mut text, flate2::FlushDecompress::Sync)
                .unwrap();
            texts.push(String::from_utf8_lossy(&text).replace('\0', ""));
            rest = &rest[HEAD + length..];
        }
        let pair = |kind: &str, length: char| {
            let length = length.to_string();
            format!("\u{3}\nstreamtype{length}{kind}\u{4}port\u{4}8080\trequestid\u{2}21")
        };
        assert_eq!(
            texts,
            [pair("error", '\u{5}'), pair("data", '\u{4}'), String::new()]
        );
    }
}
