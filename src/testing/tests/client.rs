//! A SPDY client written out frame by frame, sharing nothing with the double's own reading and writing.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::within;

/// A frame of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// SYN_REPLY
    Reply(u32),
    /// DATA without FIN
    Data(u32, Bytes),
    /// DATA with FIN
    Fin(u32),
    /// RST_STREAM and its status
    Reset(u32, u32),
    /// PING
    Pong(u32),
    /// GOAWAY and the last stream taken
    GoAway(u32),
}

/// Writes frames; remembers that the zlib header is out.
#[derive(Debug, Default)]
pub(super) struct Frames {
    started: bool,
}

impl Frames {
    /// SYN_STREAM with a stored, flushed header block.
    pub(super) fn open(&mut self, stream: u32, fin: bool, headers: &[(&str, &str)]) -> BytesMut {
        let mut plain = BytesMut::new();
        plain.put_u32(u32::try_from(headers.len()).unwrap());
        for text in headers.iter().flat_map(|&(name, value)| [name, value]) {
            plain.put_u32(u32::try_from(text.len()).unwrap());
            plain.put_slice(text.as_bytes());
        }
        let length = u16::try_from(plain.len()).unwrap();
        let mut body = BytesMut::new();
        body.put_u32(stream);
        body.put_slice(&[0; 6]);
        if !std::mem::replace(&mut self.started, true) {
            body.put_slice(&[0x78, 0x01]);
        }
        body.put_u8(0);
        body.put_u16_le(length);
        body.put_u16_le(!length);
        body.put_slice(&plain);
        body.put_slice(&[0, 0, 0, 0xff, 0xff]);
        let mut frame = control(1, u8::from(fin), body.len());
        frame.put_slice(&body);
        frame
    }
}

/// DATA.
pub(super) fn data(stream: u32, payload: &[u8]) -> BytesMut {
    let mut frame = BytesMut::new();
    frame.put_u32(stream);
    frame.put_u32(u32::try_from(payload.len()).unwrap());
    frame.put_slice(payload);
    frame
}

/// DATA with FIN and nothing else.
pub(super) fn fin(stream: u32) -> BytesMut {
    let mut frame = BytesMut::new();
    frame.put_u32(stream);
    frame.put_u32(0x0100_0000);
    frame
}

/// RST_STREAM with status CANCEL.
pub(super) fn reset(stream: u32) -> BytesMut {
    let mut frame = control(3, 0, 8);
    frame.put_u32(stream);
    frame.put_u32(5);
    frame
}

/// PING.
pub(super) fn ping(id: u32) -> BytesMut {
    let mut frame = control(6, 0, 4);
    frame.put_u32(id);
    frame
}

/// GOAWAY.
pub(super) fn go_away() -> BytesMut {
    let mut frame = control(7, 0, 8);
    frame.put_u64(0);
    frame
}

/// WINDOW_UPDATE for a stream.
pub(super) fn window_update(stream: u32) -> BytesMut {
    let mut frame = control(9, 0, 8);
    frame.put_u32(stream);
    frame.put_u32(1);
    frame
}

fn control(kind: u16, flags: u8, length: usize) -> BytesMut {
    let mut frame = BytesMut::new();
    frame.put_u16(0x8003);
    frame.put_u16(kind);
    frame.put_u32(u32::from(flags) << 24 | u32::try_from(length).unwrap());
    frame
}

/// Takes the server's next frame off a buffer.
pub(super) fn parse(buffer: &mut BytesMut) -> Option<Seen> {
    let mut head = &buffer[..];
    if head.len() < 8 {
        return None;
    }
    let (word, length) = (head.get_u32(), head.get_u32());
    let (flags, length) = (length >> 24, (length & 0xff_ffff) as usize);
    if head.len() < length {
        return None;
    }
    buffer.advance(8);
    let mut payload = buffer.split_to(length).freeze();
    if word >> 31 == 0 {
        return Some(match flags {
            0 => Seen::Data(word, payload),
            _ if payload.is_empty() => Seen::Fin(word),
            _ => panic!("FIN with payload"),
        });
    }
    let first = payload.get_u32();
    Some(match word & 0xffff {
        2 => Seen::Reply(first),
        3 => Seen::Reset(first, payload.get_u32()),
        6 => Seen::Pong(first),
        7 => Seen::GoAway(first),
        other => panic!("a server sends no frame of type {other}"),
    })
}

/// A client's session over an upgraded connection.
pub(super) struct Session {
    io: TokioIo<Upgraded>,
    received: BytesMut,
    /// Frames that came among the replies to a pair.
    early: VecDeque<Seen>,
    /// For what is sent in one write with other frames.
    pub(super) frames: Frames,
}

impl Session {
    pub(super) fn new(io: Upgraded) -> Self {
        Self {
            io: TokioIo::new(io),
            received: BytesMut::new(),
            early: VecDeque::new(),
            frames: Frames::default(),
        }
    }

    pub(super) async fn send(&mut self, frame: impl AsRef<[u8]>) {
        self.io.write_all(frame.as_ref()).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// Opens error stream `data - 10` and stream `data`, which the same worker handles, for a container port, and waits
    /// for the replies. `early` goes out with them.
    pub(super) async fn pair(&mut self, data: u32, port: u16, early: &[u8]) {
        let mut opening = self.open_pair(data, port);
        if !early.is_empty() {
            opening.extend_from_slice(&self::data(data, early));
        }
        self.send(opening).await;
        let replies = [Seen::Reply(data - 10), Seen::Reply(data)];
        let seen = self
            .until(|seen| replies.iter().all(|reply| seen.contains(reply)))
            .await;
        // A failure may be told before the second reply.
        self.early = seen
            .into_iter()
            .filter(|frame| !replies.contains(frame))
            .collect();
    }

    /// The frames that open a pair.
    pub(super) fn open_pair(&mut self, data: u32, port: u16) -> BytesMut {
        let request = data.to_string();
        let port = port.to_string();
        let mut opening = BytesMut::new();
        for (stream, kind) in [(data - 10, "error"), (data, "data")] {
            let headers = [
                ("streamtype", kind),
                ("port", port.as_str()),
                ("requestid", request.as_str()),
            ];
            opening.extend_from_slice(&self.frames.open(stream, kind == "error", &headers));
        }
        opening
    }

    /// The server's next frame; `None` at the end of the connection.
    pub(super) async fn next(&mut self) -> Option<Seen> {
        within(self.next_ever()).await
    }

    /// Like [`next`](Self::next), with no end to its patience. Cancel-safe.
    pub(super) async fn next_ever(&mut self) -> Option<Seen> {
        loop {
            if let Some(frame) = self.early.pop_front().or_else(|| parse(&mut self.received)) {
                return Some(frame);
            }
            match self.io.read_buf(&mut self.received).await {
                Ok(1..) => {}
                _ => return None,
            }
        }
    }

    /// Frames until `last` has come, which is the last of them.
    pub(super) async fn until(&mut self, last: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        let mut seen = Vec::new();
        while !last(&seen) {
            seen.push(self.next().await.expect("the connection ended"));
        }
        seen
    }

    /// Sends ten PINGs with the ids given and 2, 4, … 18 more; returns the workers, in the order of the PINGs, whose
    /// pongs come. `stuck` is the number of workers that are known not to answer.
    pub(super) async fn workers_alive(&mut self, first: u32, stuck: usize) -> Vec<u32> {
        for number in 0..10 {
            self.send(ping(first + 2 * number)).await;
        }
        let mut alive: Vec<u32> = Vec::new();
        while alive.len() < 10 - 2 * stuck {
            match self.next().await.expect("the connection ended") {
                Seen::Pong(id) => alive.push((id - first) / 2 % 5),
                other => panic!("unexpected {other:?}"),
            }
        }
        alive.sort_unstable();
        alive.dedup();
        alive
    }
}
