//! The client's WebSocket frames, taken apart as they come (RFC 6455 section 5).

use std::io::Cursor;

use bytes::{Buf, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};

/// Longest payload of a control frame (section 5.5).
const MAX_CONTROL: u64 = 125;

/// Takes frames off a buffer; payloads come out as soon as there is some of them.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// Bytes not yet understood.
    buffer: BytesMut,
    /// The data frame that has begun.
    frame: Option<DataFrame>,
    /// A message has begun and its last frame has not come.
    in_message: bool,
}

#[derive(Debug)]
struct DataFrame {
    /// Bytes to come.
    left: u64,
    /// The mask, turned so that the next byte is its first.
    mask: [u8; 4],
}

/// What the client sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Bytes of binary messages.
    Payload(Bytes),
    /// PING, to be answered with the same payload.
    Ping(Bytes),
    /// Close and the code to answer with.
    Close(u16),
}

/// Why a tunnel cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// Only binary messages carry bytes.
    #[error("invalid message type received")]
    Text,
    /// Not a frame, or not in its place.
    #[error("frame violates RFC 6455")]
    Protocol,
}

impl Violation {
    /// The code to close with, where the WebSocket layer itself found the violation.
    pub(super) fn close_code(self) -> Option<u16> {
        match self {
            Self::Text => None,
            Self::Protocol => Some(1002),
        }
    }
}

impl Decoder {
    /// Where received bytes go.
    pub(super) fn buffer(&mut self) -> &mut BytesMut {
        self.buffer.reserve(16 * 1024);
        &mut self.buffer
    }

    /// Takes the next event; `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<Event>, Violation> {
        loop {
            if let Some(frame) = self.frame.as_mut().filter(|frame| frame.left > 0) {
                let length = usize::try_from(frame.left).unwrap_or(usize::MAX);
                let mut payload = self.buffer.split_to(length.min(self.buffer.len()));
                if payload.is_empty() {
                    return Ok(None);
                }
                unmask(&mut payload, frame.mask);
                frame.left -= payload.len() as u64;
                frame.mask.rotate_left(payload.len() % 4);
                return Ok(Some(Event::Payload(payload.freeze())));
            }
            let mut cursor = Cursor::new(&self.buffer[..]);
            let Some((header, length)) = FrameHeader::parse(&mut cursor).map_err(|_| Violation::Protocol)?
            else {
                return Ok(None);
            };
            let head = usize::try_from(cursor.position()).map_err(|_| Violation::Protocol)?;
            let mask = header.mask.ok_or(Violation::Protocol)?;
            if header.rsv1 || header.rsv2 || header.rsv3 {
                return Err(Violation::Protocol);
            }
            match header.opcode {
                OpCode::Data(Data::Text) => return Err(Violation::Text),
                OpCode::Data(Data::Binary) if !self.in_message => {}
                OpCode::Data(Data::Continue) if self.in_message => {}
                OpCode::Control(control) if header.is_final && length <= MAX_CONTROL => {
                    let length = usize::try_from(length).map_err(|_| Violation::Protocol)?;
                    if self.buffer.len() < head + length {
                        return Ok(None);
                    }
                    self.buffer.advance(head);
                    let mut payload = self.buffer.split_to(length);
                    unmask(&mut payload, mask);
                    match control {
                        Control::Ping => return Ok(Some(Event::Ping(payload.freeze()))),
                        Control::Close => {
                            let code = payload.try_get_u16().unwrap_or(1000);
                            return Ok(Some(Event::Close(code)));
                        }
                        Control::Pong => continue,
                        Control::Reserved(_) => return Err(Violation::Protocol),
                    }
                }
                _ => return Err(Violation::Protocol),
            }
            self.buffer.advance(head);
            self.in_message = !header.is_final;
            self.frame = Some(DataFrame { left: length, mask });
        }
    }
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    for (byte, key) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A masked frame; `first` is its first byte.
    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let length = u8::try_from(payload.len()).unwrap();
        let mut payload = payload.to_vec();
        unmask(&mut payload, mask);
        [&[first, 0x80 | length], &mask[..], &payload].concat()
    }

    #[test]
    fn payloads_are_the_same_however_messages_and_reads_are_cut() {
        let wire = [
            masked(0x02, b"hel"),
            masked(0x89, b"ping"),
            masked(0x00, b""),
            masked(0x80, b"lo "),
            masked(0x82, b"world"),
            masked(0x88, &1000_u16.to_be_bytes()),
        ]
        .concat();
        for step in 1..=wire.len() {
            let mut decoder = Decoder::default();
            let (mut payload, mut others) = (Vec::new(), Vec::new());
            for piece in wire.chunks(step) {
                decoder.buffer().extend_from_slice(piece);
                while let Some(event) = decoder.next().unwrap() {
                    match event {
                        Event::Payload(bytes) => payload.extend_from_slice(&bytes),
                        other => others.push(other),
                    }
                }
            }
            assert_eq!(payload, b"hello world", "step {step}");
            assert_eq!(
                others,
                [Event::Ping(Bytes::from_static(b"ping")), Event::Close(1000)]
            );
        }
    }

    #[test]
    fn what_a_server_must_refuse_is_refused() {
        let decode = |wire: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.buffer().extend_from_slice(wire);
            decoder.next()
        };
        assert_eq!(decode(&masked(0x81, b"text")), Err(Violation::Text));
        assert_eq!(decode(&masked(0x80, b"lost")), Err(Violation::Protocol));
        assert_eq!(decode(&masked(0x09, b"")), Err(Violation::Protocol));
        assert_eq!(decode(&masked(0xc2, b"rsv")), Err(Violation::Protocol));
        assert_eq!(decode(&masked(0x83, b"opcode")), Err(Violation::Protocol));
        assert_eq!(decode(b"\x82\x01x"), Err(Violation::Protocol));
        assert_eq!(
            decode(&[masked(0x02, b""), masked(0x82, b"")].concat()),
            Err(Violation::Protocol)
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_events_or_a_violation(bytes: Vec<u8>) {
            let mut decoder = Decoder::default();
            decoder.buffer().extend_from_slice(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }
    }
}
