//! A second reading of RFC 6455 section 5, to compare with.

use std::io;

/// What a server's bytes mean.
pub(super) struct Meaning {
    pub(super) payload: Vec<u8>,
    /// The error that it ends with; nothing for an orderly end.
    pub(super) end: Option<io::ErrorKind>,
    pub(super) pings: Vec<Vec<u8>>,
    /// The code of the Close that is due.
    pub(super) reply: Option<u16>,
}

pub(super) fn meaning(bytes: &[u8]) -> Meaning {
    let mut meaning = Meaning {
        payload: Vec::new(),
        end: Some(io::ErrorKind::UnexpectedEof),
        pings: Vec::new(),
        reply: Some(1000),
    };
    let (mut rest, mut within) = (bytes, false);
    loop {
        match next(&mut rest, &mut within, &mut meaning) {
            Some(Step::On) => {}
            Some(Step::Closed(None)) => {
                (meaning.end, meaning.reply) = (None, None);
                return meaning;
            }
            Some(Step::Closed(Some(code))) => {
                meaning.end = (!matches!(code, 1000 | 1001)).then_some(io::ErrorKind::ConnectionAborted);
                meaning.reply = Some(code);
                return meaning;
            }
            Some(Step::Broken) => {
                (meaning.end, meaning.reply) = (Some(io::ErrorKind::InvalidData), Some(1002));
                return meaning;
            }
            None => return meaning,
        }
    }
}

enum Step {
    On,
    Closed(Option<u16>),
    Broken,
}

/// Reads one frame; nothing when it is not whole.
fn next(rest: &mut &[u8], within: &mut bool, meaning: &mut Meaning) -> Option<Step> {
    let (&[first, second], behind) = rest.split_first_chunk()?;
    let (last, opcode) = (first & 0x80 != 0, first & 0x0f);
    let control = opcode >= 8;
    let known = matches!(opcode, 0 | 2 | 8 | 9 | 10);
    if first & 0x70 != 0 || second & 0x80 != 0 || !known || control && (!last || second > 125) {
        return Some(Step::Broken);
    }
    let (length, behind) = match second {
        126 => {
            let (length, behind) = behind.split_first_chunk()?;
            (u64::from(u16::from_be_bytes(*length)), behind)
        }
        127 => {
            let (length, behind) = behind.split_first_chunk()?;
            (u64::from_be_bytes(*length), behind)
        }
        short => (short.into(), behind),
    };
    if length >> 63 == 1 || !control && *within == (opcode == 2) {
        return Some(Step::Broken);
    }
    let there = behind.len().min(usize::try_from(length).unwrap_or(usize::MAX));
    let (payload, behind) = behind.split_at(there);
    let whole = there as u64 == length;
    if !control {
        // What has come of a frame counts.
        meaning.payload.extend_from_slice(payload);
        *within = !last;
    }
    if !whole {
        return None;
    }
    *rest = behind;
    match opcode {
        8 => Some(match payload {
            [] => Step::Closed(None),
            [_] => Step::Broken,
            [high, low, ..] => match u16::from_be_bytes([*high, *low]) {
                0..=999 | 1004..=1006 | 1015 | 5000.. => Step::Broken,
                code => Step::Closed(Some(code)),
            },
        }),
        9 => {
            meaning.pings.push(payload.to_vec());
            Some(Step::On)
        }
        _ => Some(Step::On),
    }
}

/// Takes a client's frames apart: the first byte and the payload of each.
pub(super) fn unmask(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        assert_ne!(bytes[1] & 0x80, 0, "a client masks");
        let (length, size) = match bytes[1] & 0x7f {
            126 => (u16::from_be_bytes([bytes[2], bytes[3]]).into(), 4),
            127 => (
                u64::from_be_bytes(bytes[2..10].try_into().expect("as many bytes")) as usize,
                10,
            ),
            short => (usize::from(short), 2),
        };
        let (key, masked) = bytes[size..].split_at(4);
        let payload = masked[..length].iter().zip(key.iter().cycle());
        frames.push((bytes[0], payload.map(|(byte, key)| byte ^ key).collect()));
        bytes = &masked[length..];
    }
    frames
}
