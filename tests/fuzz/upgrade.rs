//! Leaving HTTP/1.1: by `Upgrade: h2c`, which must mean the same request as without, and by any other upgrade, after which not
//! a byte is lost.

use crate::double::{NUMBER, exchange};
use crate::message::{self, Message, Parsed};

const AT_ONCE: u64 = 1 << 16;

/// The client connection preface and an empty SETTINGS frame.
const OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;

/// The input is what the client sends, a request and whatever follows it.
pub fn check(data: &[u8]) {
    let first = exchange(data, AT_ONCE);
    let Ok(Parsed::Whole(answer, length)) = message::response(&first.answer, |_| false) else {
        return;
    };
    if answer.start[1] != "101" {
        return;
    }
    let mut lines = data.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let line = lines.find(|line| !line.is_empty()).unwrap_or_default();
    assert!(
        line.ends_with(b" HTTP/1.1"),
        "HTTP/1.0 knows no upgrade (RFC 9110 section 7.8)"
    );
    let after = &first.answer[length..];
    if answer.all(NUMBER).is_empty() {
        assert_eq!(answer.all("upgrade"), ["h2c"]);
        if !after.is_empty() {
            frames(after);
        }
        if let Some(head) = head(data) {
            as_without(head);
        }
    } else if let Ok(Parsed::Whole(_, length)) = message::request(data) {
        assert_eq!(after, &data[length..], "the echo is not what was sent");
    }
}

/// The head of the first request with the empty line, if all readers agree where it ends.
fn head(data: &[u8]) -> Option<&[u8]> {
    let end = data.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = &data[..end];
    let bare = head
        .iter()
        .enumerate()
        .any(|(at, &byte)| byte == b'\n' && (at == 0 || head[at - 1] != b'\r'));
    (!bare && !head.starts_with(b"\r")).then_some(head)
}

/// The pod sees the same request, or none, whether it came with the wish for HTTP/2 or without.
fn as_without(head: &[u8]) {
    let about = |line: &&[u8]| {
        let line = line.to_ascii_lowercase();
        line.starts_with(b"upgrade:") || line.starts_with(b"http2-settings:")
    };
    let plain: Vec<u8> = head
        .split_inclusive(|&byte| byte == b'\n')
        .filter(|line| !about(line))
        .flatten()
        .copied()
        .collect();
    let plain = exchange(&plain, AT_ONCE);
    let asked = exchange(&[head, OPENING].concat(), AT_ONCE);
    let essence = |requests: &[Message]| requests.iter().map(essence).collect::<Vec<_>>();
    assert_eq!(
        essence(&asked.requests),
        essence(&plain.requests),
        "HTTP/2 means another request"
    );
    let Ok(Parsed::Whole(_, length)) = message::response(&asked.answer, |_| false) else {
        panic!("the same request was not answered in the same way twice");
    };
    let frames = frames(&asked.answer[length..]);
    assert!(frames.contains(&(HEADERS, 1)), "stream 1 has no answer");
}

/// What must be the same: all but the words about the way, the order of different fields, and that HTTP/2 joins cookies (RFC
/// 9113 section 8.2.3).
fn essence(request: &Message) -> Message {
    let mut request = request.clone();
    let mut cookies = request.all("cookie");
    cookies.retain(|cookie| !cookie.is_empty());
    let cookies = cookies.join("; ");
    request
        .fields
        .retain(|(name, _)| name != "via" && name != "cookie");
    request.fields.push(("cookie".into(), cookies));
    request.fields.sort_by(|a, b| a.0.cmp(&b.0));
    request
}

/// Reads frames, as kinds and streams; they begin with SETTINGS (RFC 9113 section 3.4) and none is cut off.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u32)> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let header = bytes.get(..9).expect("a frame's header is cut off");
        let length = header[..3]
            .iter()
            .fold(0, |length, &byte| length << 8 | usize::from(byte));
        let stream = header[5..]
            .iter()
            .fold(0, |stream, &byte| stream << 8 | u32::from(byte));
        frames.push((header[3], stream));
        bytes = bytes.get(9 + length..).expect("a frame is cut off");
    }
    assert_eq!(frames.first(), Some(&(SETTINGS, 0)));
    frames
}
