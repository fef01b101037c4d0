//! SPDY/3.1 frames: the ones a port-forward uses, on bytes that may stop anywhere.
//!
//! Layout and limits follow `moby/spdystream:spdy/{types,read,write}.go`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Largest control frame taken; real ones are far below.
const MAX_CONTROL: usize = 64 * 1024;

/// Flag: the sender will send no more on this stream.
const FLAG_FIN: u8 = 0x01;

/// RST_STREAM statuses.
pub(super) const PROTOCOL_ERROR: u32 = 1;
/// See [`PROTOCOL_ERROR`].
pub(super) const CANCEL: u32 = 5;

/// A frame from the client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Payload of a stream.
    Data {
        /// Stream id.
        stream: u32,
        /// Last frame of this direction.
        fin: bool,
        /// Bytes.
        payload: Bytes,
    },
    /// A new stream.
    SynStream {
        /// Stream id.
        stream: u32,
        /// Opened half-closed.
        fin: bool,
        /// From 0, the first to be handled, to 7.
        priority: u8,
        /// Compressed headers.
        headers: Bytes,
    },
    /// The client gives a stream up.
    RstStream {
        /// Stream id.
        stream: u32,
        /// Why.
        status: u32,
    },
    /// A ping, to be echoed if the client started it.
    Ping {
        /// Ping id.
        id: u32,
    },
    /// The client will open no more streams.
    GoAway,
    /// SYN_REPLY: servers ignore it, but it moves the decompressor.
    SynReply {
        /// Stream id.
        stream: u32,
        /// Compressed headers.
        headers: Bytes,
    },
    /// Headers of a known stream.
    Headers {
        /// Stream id.
        stream: u32,
        /// Compressed headers.
        headers: Bytes,
    },
    /// SETTINGS and WINDOW_UPDATE, which spdystream parses and forgets.
    Ignored,
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum FrameError {
    /// Not version 3, or a type spdystream does not know.
    #[error("unsupported control frame {0:#010x}")]
    Unsupported(u32),
    /// A length that does not fit the type.
    #[error("control frame of type {0} has a wrong length")]
    Length(u16),
    /// Flags a frame of the type cannot have.
    #[error("control frame of type {0} has flags")]
    Flags(u16),
    /// Stream or ping id zero.
    #[error("id is zero")]
    ZeroId,
    /// RST_STREAM with status zero.
    #[error("reset without a status")]
    ZeroStatus,
}

/// Takes the next frame off the buffer; `None` when more bytes are needed.
pub(super) fn parse(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let mut head: &[u8] = buffer;
    if head.len() < 8 {
        return Ok(None);
    }
    let word = head.get_u32();
    let flags_length = head.get_u32();
    let flags = (flags_length >> 24) as u8;
    let length = (flags_length & 0x00ff_ffff) as usize;
    let control = word & 0x8000_0000 != 0;
    let kind = (word & 0xffff) as u16;
    if control && (word >> 16) & 0x7fff != 3 {
        return Err(FrameError::Unsupported(word));
    }
    if control && length > MAX_CONTROL {
        return Err(FrameError::Length(kind));
    }
    if head.len() < length {
        buffer.reserve(8 + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(8);
    let payload = buffer.split_to(length).freeze();
    if control {
        return control_frame(word, kind, flags, payload).map(Some);
    }
    Ok(Some(Frame::Data {
        stream: id(word)?,
        fin: flags & FLAG_FIN != 0,
        payload,
    }))
}

/// SYN_REPLY with an already compressed header block.
pub(super) fn syn_reply(stream: u32, headers: &[u8]) -> Bytes {
    let length = u32::try_from(4 + headers.len()).expect("a reply's headers are a few bytes");
    let mut frame = control(2, length);
    frame.put_u32(stream);
    frame.put_slice(headers);
    frame.freeze()
}

/// RST_STREAM.
pub(super) fn rst_stream(stream: u32, status: u32) -> Bytes {
    let mut frame = control(3, 8);
    frame.put_u32(stream);
    frame.put_u32(status);
    frame.freeze()
}

/// GOAWAY with status OK.
pub(super) fn go_away(last_stream: u32) -> Bytes {
    let mut frame = control(7, 8);
    frame.put_u32(last_stream);
    frame.put_u32(0);
    frame.freeze()
}

/// PING.
pub(super) fn ping(id: u32) -> Bytes {
    let mut frame = control(6, 4);
    frame.put_u32(id);
    frame.freeze()
}

/// DATA; the payload must be shorter than 16 MiB.
pub(super) fn data(stream: u32, fin: bool, payload: &[u8]) -> Bytes {
    let length = u32::try_from(payload.len()).expect("payload fits a frame");
    let flags = if fin { u32::from(FLAG_FIN) << 24 } else { 0 };
    let mut frame = BytesMut::with_capacity(8 + payload.len());
    frame.put_u32(stream);
    frame.put_u32(flags | length);
    frame.put_slice(payload);
    frame.freeze()
}

fn control(kind: u16, length: u32) -> BytesMut {
    let mut frame = BytesMut::with_capacity(8 + length as usize);
    frame.put_u16(0x8003);
    frame.put_u16(kind);
    frame.put_u32(length);
    frame
}

fn control_frame(word: u32, kind: u16, flags: u8, mut payload: Bytes) -> Result<Frame, FrameError> {
    let (shortest, longest, flags_allowed) = match kind {
        1 => (10, MAX_CONTROL, true),
        2 | 8 => (4, MAX_CONTROL, true),
        3 => (8, 8, true),
        4 => (4, MAX_CONTROL, true),
        6 => (4, 4, false),
        7 | 9 => (8, 8, false),
        _ => return Err(FrameError::Unsupported(word)),
    };
    if !(shortest..=longest).contains(&payload.len()) {
        return Err(FrameError::Length(kind));
    }
    if flags != 0 && !flags_allowed {
        return Err(FrameError::Flags(kind));
    }
    // Long enough for every read below.
    let first = payload.get_u32();
    Ok(match kind {
        1 => {
            payload.advance(4);
            let priority = payload.get_u8() >> 5;
            payload.advance(1);
            Frame::SynStream {
                stream: id(first)?,
                fin: flags & FLAG_FIN != 0,
                priority,
                headers: payload,
            }
        }
        2 => Frame::SynReply {
            stream: id(first)?,
            headers: payload,
        },
        3 => match payload.get_u32() {
            0 => return Err(FrameError::ZeroStatus),
            status => Frame::RstStream {
                stream: id(first)?,
                status,
            },
        },
        6 if first == 0 => return Err(FrameError::ZeroId),
        6 => Frame::Ping { id: first },
        7 => Frame::GoAway,
        8 => Frame::Headers {
            stream: id(first)?,
            headers: payload,
        },
        4 if first as usize > payload.len() / 8 => return Err(FrameError::Length(kind)),
        _ => Frame::Ignored,
    })
}

fn id(word: u32) -> Result<u32, FrameError> {
    match word & 0x7fff_ffff {
        0 => Err(FrameError::ZeroId),
        id => Ok(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_however_the_bytes_are_split() {
        let mut wire = BytesMut::new();
        wire.put_slice(&data(3, true, b"hello"));
        wire.put_slice(&ping(7));
        wire.put_slice(&rst_stream(5, CANCEL));
        let expected = [
            Frame::Data {
                stream: 3,
                fin: true,
                payload: Bytes::from_static(b"hello"),
            },
            Frame::Ping { id: 7 },
            Frame::RstStream {
                stream: 5,
                status: CANCEL,
            },
        ];
        for step in 1..=wire.len() {
            let mut buffer = BytesMut::new();
            let mut found = Vec::new();
            for piece in wire.chunks(step) {
                buffer.put_slice(piece);
                while let Some(frame) = parse(&mut buffer).unwrap() {
                    found.push(frame);
                }
            }
            assert_eq!(found, expected, "step {step}");
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn what_kills_a_real_session_is_an_error_here() {
        let parse = |bytes: &[u8]| parse(&mut BytesMut::from(bytes));
        assert_eq!(parse(&[0, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::ZeroId));
        assert_eq!(
            parse(&[0x80, 3, 0, 5, 0, 0, 0, 0]),
            Err(FrameError::Unsupported(0x8003_0005))
        );
        assert_eq!(
            parse(&[0x80, 2, 0, 1, 0, 0, 0, 0]),
            Err(FrameError::Unsupported(0x8002_0001))
        );
        assert_eq!(
            parse(&[0x80, 3, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1]),
            Err(FrameError::Length(3))
        );
        assert_eq!(
            parse(&[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0]),
            Err(FrameError::ZeroStatus)
        );
        assert_eq!(
            parse(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 0]),
            Err(FrameError::ZeroId)
        );
        assert_eq!(
            parse(&[0x80, 3, 0, 6, 1, 0, 0, 4, 0, 0, 0, 1]),
            Err(FrameError::Flags(6))
        );
        assert_eq!(
            parse(&[0x80, 3, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1]),
            Err(FrameError::Length(4))
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_frames_or_an_error(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = super::parse(&mut buffer) {}
        }
    }
}
