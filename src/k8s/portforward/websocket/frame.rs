//! The frames of RFC 6455 §5: reads a server's headers, makes a client's frames.

/// Close codes (§7.4.1).
pub(super) const NORMAL: u16 = 1000;
pub(super) const GOING_AWAY: u16 = 1001;
pub(super) const PROTOCOL_ERROR: u16 = 1002;

/// What a control frame carries at most, in bytes (§5.5).
pub(super) const LONGEST_CONTROL: usize = 125;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

/// The opcodes in use here (§5.2). A text frame is none of them: the tunnel is binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Opcode {
    Continuation = 0x0,
    Binary = 0x2,
    Close = 0x8,
    Ping = 0x9,
    Pong = 0xA,
}

/// A server's frame up to its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: Opcode,
    /// Whether the message ends with this frame.
    pub(super) is_final: bool,
    /// The payload's length in bytes; below 2^63, and at most [`LONGEST_CONTROL`] for a control frame.
    pub(super) length: u64,
    /// The header's own length in bytes.
    pub(super) size: usize,
}

/// Reads the header at the start of `bytes`; nothing when it is not complete yet. Fails with what is wrong with it.
pub(super) fn header(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let Some((&[first, second], rest)) = bytes.split_first_chunk() else {
        return Ok(None);
    };
    if first & RESERVED != 0 {
        return Err("the WebSocket peer set reserved bits");
    }
    if second & MASKED != 0 {
        return Err("the WebSocket server masked a frame");
    }
    let is_final = first & FIN != 0;
    let opcode = match first & !FIN {
        0x0 => Opcode::Continuation,
        0x1 => return Err("the WebSocket peer sent text"),
        0x2 => Opcode::Binary,
        0x8 => Opcode::Close,
        0x9 => Opcode::Ping,
        0xA => Opcode::Pong,
        _ => return Err("the WebSocket peer sent an unknown opcode"),
    };
    let is_control = matches!(opcode, Opcode::Close | Opcode::Ping | Opcode::Pong);
    if is_control && (!is_final || usize::from(second) > LONGEST_CONTROL) {
        return Err("the WebSocket peer sent a control frame that is cut or too long");
    }
    let length = match second {
        126 => rest
            .first_chunk()
            .map(|bytes| (u16::from_be_bytes(*bytes).into(), 4)),
        127 => rest.first_chunk().map(|bytes| (u64::from_be_bytes(*bytes), 10)),
        short => Some((short.into(), 2)),
    };
    let Some((length, size)) = length else {
        return Ok(None);
    };
    if length > i64::MAX as u64 {
        return Err("the WebSocket peer announced a frame of 2^63 bytes or more");
    }
    Ok(Some(Header {
        opcode,
        is_final,
        length,
        size,
    }))
}

/// Reads a Close frame's payload (§5.5.1): code and reason, if any. Fails for what must not be sent (§7.4).
pub(super) fn close(payload: &[u8]) -> Result<Option<(u16, String)>, &'static str> {
    let Some((code, reason)) = payload.split_first_chunk() else {
        let malformed = "the WebSocket peer sent half a Close code";
        return if payload.is_empty() {
            Ok(None)
        } else {
            Err(malformed)
        };
    };
    match u16::from_be_bytes(*code) {
        1004..=1006 | 1015 | 0..=999 | 5000.. => {
            Err("the WebSocket peer sent a Close code that must not be sent")
        }
        code => Ok(Some((code, String::from_utf8_lossy(reason).into_owned()))),
    }
}

/// Appends a whole frame, masked with `key` (§5.3). Its payload is in two parts.
pub(super) fn encode(opcode: Opcode, prefix: &[u8], payload: &[u8], key: [u8; 4], into: &mut Vec<u8>) {
    into.push(FIN | opcode as u8);
    match prefix.len() + payload.len() {
        short @ ..=125 => into.push(MASKED | short as u8),
        middle @ ..=0xFFFF => {
            into.push(MASKED | 126);
            into.extend_from_slice(&(middle as u16).to_be_bytes());
        }
        long => {
            into.push(MASKED | 127);
            into.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    into.extend_from_slice(&key);
    let start = into.len();
    into.extend_from_slice(prefix);
    into.extend_from_slice(payload);
    mask(&mut into[start..], key);
}

/// Masks by words, which the compiler makes vectors of.
fn mask(bytes: &mut [u8], key: [u8; 4]) {
    let [a, b, c, d] = key;
    let twice = [a, b, c, d, a, b, c, d];
    let (words, rest) = bytes.as_chunks_mut();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ u64::from_ne_bytes(twice)).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(twice) {
        *byte ^= key;
    }
}
