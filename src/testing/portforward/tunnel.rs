//! SPDY in WebSocket messages, as the API server carries it (KEP-4006): a byte stream cut into binary messages whose edges
//! mean nothing (`apiserver:pkg/util/proxy/streamtunnel.go`).
//!
//! Below the messages of a WebSocket library, because what clients trip over is how frames are cut: gorilla's writer, which
//! the API server uses, sends what exceeds its buffers as a fragment that is not final, then an empty one that is.

mod decode;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{Frame, FrameHeader};

use decode::{Decoder, Event};

/// The prefix of subprotocols that tunnel SPDY; a SPDY subprotocol follows.
pub(super) const PREFIX: &str = "SPDY/3.1+";

/// Bytes of a session under way in one direction.
pub(super) const PIPE_SIZE: usize = 64 * 1024;

/// gorilla's write buffer without the room for a header: what fits into one frame of a small message.
const FRAGMENT: usize = 4096 - 14;

/// Chunks beyond this size bypass gorilla's write buffer.
const UNBUFFERED: usize = 2 * 4096;

/// Largest chunk: the copy buffer of Go.
const CHUNK: usize = 32 * 1024;

/// Close codes (RFC 6455 section 7.4.1).
const NORMAL: u16 = 1000;

/// Carries a session's bytes until either side ends.
pub(super) async fn serve(io: impl AsyncRead + AsyncWrite, session: impl AsyncRead + AsyncWrite) {
    let (from_client, to_client) = tokio::io::split(io);
    let (from_session, to_session) = tokio::io::split(session);
    tokio::pin!(from_client, to_client, from_session, to_session);
    let (answers, answered) = mpsc::channel(8);
    let incoming = receive(from_client, to_session, answers);
    let outgoing = send(to_client, from_session, answered);
    tokio::pin!(outgoing);
    tokio::select! {
        () = &mut outgoing => {}
        // The session learns of it as the end of its input, ends, and so ends the other direction too.
        () = incoming => outgoing.await,
    }
}

/// Unwraps the client's messages; answers its PINGs and its Close.
async fn receive(
    mut client: impl AsyncRead + Unpin,
    mut session: impl AsyncWrite + Unpin,
    answers: mpsc::Sender<(Control, Bytes)>,
) {
    let mut decoder = Decoder::default();
    let closing = 'closing: loop {
        match decoder.next() {
            Ok(Some(Event::Payload(bytes))) => {
                if session.write_all(&bytes).await.is_err() {
                    break None;
                }
            }
            Ok(Some(Event::Ping(payload))) => {
                if answers.send((Control::Pong, payload)).await.is_err() {
                    break None;
                }
            }
            Ok(Some(Event::Close(code))) => break Some(code),
            Ok(None) => match client.read_buf(decoder.buffer()).await {
                Ok(1..) => {}
                _ => break 'closing None,
            },
            Err(violation) => {
                tracing::debug!(%violation, "tunnel broken");
                break violation.close_code();
            }
        }
    };
    if let Some(code) = closing {
        let payload = Bytes::copy_from_slice(&code.to_be_bytes());
        let _ = answers.send((Control::Close, payload)).await;
    }
    // Fails only when the session has ended, which is what this is about.
    let _ = session.shutdown().await;
}

/// Wraps the session's bytes.
async fn send(
    mut client: impl AsyncWrite + Unpin,
    mut session: impl AsyncRead + Unpin,
    mut answers: mpsc::Receiver<(Control, Bytes)>,
) {
    let mut chunk = BytesMut::new();
    let mut frames = BytesMut::new();
    let mut closed = false;
    let mut answering = true;
    loop {
        chunk.reserve(CHUNK);
        tokio::select! {
            answer = answers.recv(), if answering => match answer {
                Some((kind, payload)) => {
                    closed |= kind == Control::Close;
                    frame(&mut frames, OpCode::Control(kind), true, &payload);
                }
                None => answering = false,
            },
            read = session.read_buf(&mut chunk) => match read {
                // Nothing may follow a Close.
                Ok(1..) if closed => chunk.clear(),
                Ok(1..) => while !chunk.is_empty() {
                    let cut = cut(chunk.len());
                    message(&mut frames, &chunk.split_to(cut));
                },
                _ => break,
            },
        }
        if client.write_all_buf(&mut frames).await.is_err() || client.flush().await.is_err() {
            return;
        }
    }
    if !closed {
        frame(
            &mut frames,
            OpCode::Control(Control::Close),
            true,
            &NORMAL.to_be_bytes(),
        );
        let _ = client.write_all_buf(&mut frames).await;
    }
    let _ = client.shutdown().await;
}

/// Where to end the next message. Mostly at the end of what has been read; sometimes after the four bytes of a SPDY header
/// word, which spdystream writes alone, or anywhere.
fn cut(length: usize) -> usize {
    match fastrand::u8(..16) {
        0 => 4.min(length),
        1 => fastrand::usize(1..=length),
        _ => CHUNK.min(length),
    }
}

/// Appends a binary message, cut into frames as gorilla's writer does (`gorilla/websocket:conn.go`).
fn message(out: &mut BytesMut, payload: &[u8]) {
    let binary = OpCode::Data(Data::Binary);
    let more = OpCode::Data(Data::Continue);
    if payload.len() > UNBUFFERED {
        frame(out, binary, false, payload);
        return frame(out, more, true, &[]);
    }
    let fragments = payload.len().div_ceil(FRAGMENT);
    for (index, fragment) in payload.chunks(FRAGMENT).enumerate() {
        let opcode = if index == 0 { binary } else { more };
        frame(out, opcode, index + 1 == fragments, fragment);
    }
}

fn frame(out: &mut BytesMut, opcode: OpCode, is_final: bool, payload: &[u8]) {
    let header = FrameHeader {
        is_final,
        opcode,
        ..FrameHeader::default()
    };
    let frame = Frame::from_payload(header, Bytes::copy_from_slice(payload));
    let mut bytes = Vec::with_capacity(frame.len());
    frame.format(&mut bytes).expect("a vector takes everything");
    out.extend_from_slice(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frames of a message: final or not, opcode, length.
    fn frames(length: usize) -> Vec<(bool, u8, usize)> {
        let mut bytes = BytesMut::new();
        message(&mut bytes, &vec![7; length]);
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let mut cursor = std::io::Cursor::new(rest);
            let (header, length) = FrameHeader::parse(&mut cursor).unwrap().unwrap();
            let length = usize::try_from(length).unwrap();
            let head = usize::try_from(cursor.position()).unwrap();
            rest = &rest[head + length..];
            found.push((header.is_final, header.opcode.into(), length));
        }
        found
    }

    #[test]
    fn messages_are_cut_as_gorilla_cuts_them() {
        assert_eq!(frames(4), [(true, 2, 4)]);
        assert_eq!(frames(FRAGMENT), [(true, 2, FRAGMENT)]);
        assert_eq!(frames(8192), [(false, 2, 4082), (false, 0, 4082), (true, 0, 28)]);
        assert_eq!(frames(8193), [(false, 2, 8193), (true, 0, 0)]);
    }
}
