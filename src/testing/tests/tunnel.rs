//! SPDY tunnelled in WebSocket messages, frame by frame.

use std::io::Cursor;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;

use super::client::{self, Frames, Seen, data, fin, ping};
use super::scene::{SPDY, Scene, TUNNEL};
use super::within;
use crate::testing::Carrier;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// A frame of the server: final or not, opcode, payload.
type Frame = (bool, u8, Bytes);

/// A WebSocket client that shows the frames.
struct Tunnel {
    io: TokioIo<Upgraded>,
    received: BytesMut,
    /// The session inside.
    session: BytesMut,
    frames: Frames,
}

impl Tunnel {
    fn new(io: Upgraded) -> Self {
        Self {
            io: TokioIo::new(io),
            received: BytesMut::new(),
            session: BytesMut::new(),
            frames: Frames::default(),
        }
    }

    async fn send(&mut self, is_final: bool, opcode: u8, payload: &[u8]) {
        let mask = [9, 8, 7, 6];
        let mut frame = BytesMut::new();
        frame.put_u8(u8::from(is_final) << 7 | opcode);
        frame.put_u8(0x80 | 126);
        frame.put_u16(u16::try_from(payload.len()).unwrap());
        frame.put_slice(&mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, key)| byte ^ key),
        );
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// Opens the pair 1 and 11.
    async fn pair(&mut self, early: &[u8]) {
        let mut opening = BytesMut::new();
        for (stream, kind) in [(1, "error"), (11, "data")] {
            let headers = [("streamtype", kind), ("port", "5432"), ("requestid", "0")];
            opening.extend_from_slice(&self.frames.open(stream, kind == "error", &headers));
        }
        opening.extend_from_slice(&data(11, early));
        self.send(true, BINARY, &opening).await;
        assert_eq!(self.next_seen().await, Some(Seen::Reply(1)));
        assert_eq!(self.next_seen().await, Some(Seen::Reply(11)));
    }

    /// The next frame; `None` at the end of the connection.
    async fn next(&mut self) -> Option<Frame> {
        within(self.next_ever()).await
    }

    async fn next_ever(&mut self) -> Option<Frame> {
        loop {
            let mut cursor = Cursor::new(&self.received[..]);
            if let Some((header, length)) = FrameHeader::parse(&mut cursor).unwrap() {
                let head = usize::try_from(cursor.position()).unwrap();
                let length = usize::try_from(length).unwrap();
                if self.received.len() >= head + length {
                    self.received.advance(head);
                    let payload = self.received.split_to(length).freeze();
                    return Some((header.is_final, header.opcode.into(), payload));
                }
            }
            match self.io.read_buf(&mut self.received).await {
                Ok(1..) => {}
                _ => return None,
            }
        }
    }

    /// The session's next frame, however it is cut.
    async fn next_seen(&mut self) -> Option<Seen> {
        loop {
            if let Some(seen) = client::parse(&mut self.session) {
                return Some(seen);
            }
            let (_, opcode, payload) = self.next().await?;
            assert!(matches!(opcode, BINARY | CONTINUATION), "opcode {opcode}");
            self.session.extend_from_slice(&payload);
        }
    }
}

async fn tunnel(scene: &Scene) -> Tunnel {
    let (_, io) = scene.tunnel().await;
    Tunnel::new(io)
}

#[tokio::test]
async fn the_answer_names_exactly_the_subprotocol_asked_for() {
    let scene = Scene::new().await;
    let (headers, _io) = scene.tunnel().await;
    assert_eq!(headers["sec-websocket-protocol"], "SPDY/3.1+portforward.k8s.io");
    assert_eq!(headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert!(!headers.contains_key("x-stream-protocol-version"));
    let counts = scene.cluster.forwards().counts();
    assert_eq!(counts.upgrades(Carrier::Tunnel), 1);
}

#[tokio::test]
async fn other_spdy_subprotocols_are_refused() {
    let scene = Scene::new().await;
    let mut asked = TUNNEL;
    asked[3].1 = "SPDY/3.1+v9.portforward.k8s.io";
    let refused = scene.upgrade(&scene.client, "GET", &asked).await.unwrap_err();
    assert_eq!(refused.status(), 403);
    let mut asked = SPDY;
    asked[1].1 = "v9.portforward.k8s.io";
    let refused = scene.upgrade(&scene.client, "POST", &asked).await.unwrap_err();
    assert_eq!(refused.status(), 403);
}

#[tokio::test]
async fn bytes_sent_before_the_101_end_the_tunnel() {
    let scene = Scene::new().await;
    let (mut stream, head) = scene.raw("GET", &TUNNEL).await;
    stream
        .write_all(&[head.as_bytes(), b"early"].concat())
        .await
        .unwrap();
    let mut answer = Vec::new();
    // The end comes without a goodbye of TLS.
    let _ = within(stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    let forwards = scene.cluster.forwards();
    within(forwards.until(|counts| counts.sessions_open == 0)).await;
}

#[tokio::test]
async fn the_client_s_messages_may_be_cut_anywhere() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.pair(b"").await;
    let bytes = [data(11, b"hello"), fin(11)].concat();
    tunnel.send(false, BINARY, &bytes[..3]).await;
    tunnel.send(false, CONTINUATION, b"").await;
    tunnel.send(true, CONTINUATION, &bytes[3..9]).await;
    tunnel.send(true, BINARY, b"").await;
    tunnel.send(true, BINARY, &bytes[9..]).await;
    assert_eq!(tunnel.next_seen().await, Some(Seen::Data(11, "hello".into())));
}

#[tokio::test]
async fn large_chunks_come_as_a_fragment_and_an_empty_end() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.pair(b"").await;
    let mut frames = Vec::new();
    let mut echoed = BytesMut::new();
    let sent: Vec<u8> = (0..600_000_u32).map(|n| (n % 251) as u8).collect();
    for chunk in sent.chunks(30_000) {
        tunnel.send(true, BINARY, &data(11, chunk)).await;
        let until = echoed.len() + chunk.len();
        while echoed.len() < until {
            let frame = tunnel.next().await.unwrap();
            tunnel.session.extend_from_slice(&frame.2);
            frames.push((frame.0, frame.1, frame.2.len()));
            while let Some(seen) = client::parse(&mut tunnel.session) {
                let Seen::Data(11, payload) = seen else {
                    panic!("unexpected {seen:?}")
                };
                echoed.extend_from_slice(&payload);
            }
        }
    }
    assert!(echoed == sent);
    let large = frames.iter().filter(|(_, _, length)| *length > 8192).count();
    assert!(large > 10, "{large}");
    for pair in frames.windows(2).filter(|pair| pair[0].2 > 8192) {
        assert_eq!(pair[0], (false, BINARY, pair[0].2));
        assert_eq!(pair[1], (true, CONTINUATION, 0));
    }
}

#[tokio::test]
async fn a_text_message_ends_the_tunnel() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.send(true, TEXT, b"hello").await;
    let closed = tunnel.next().await;
    assert_eq!(closed, Some((true, CLOSE, Bytes::from_static(&[0x03, 0xe8]))));
    assert_eq!(tunnel.next().await, None);
}

#[tokio::test]
async fn a_frame_out_of_place_is_a_protocol_error() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.send(true, CONTINUATION, b"hello").await;
    let closed = tunnel.next().await;
    assert_eq!(closed, Some((true, CLOSE, Bytes::from_static(&[0x03, 0xea]))));
    assert_eq!(tunnel.next().await, None);
}

#[tokio::test]
async fn websocket_pings_are_answered_by_the_server_itself() {
    let scene = Scene::new().await;
    scene.cluster.faults().set_drop_pongs(true);
    let mut tunnel = tunnel(&scene).await;
    tunnel.send(true, PING, b"there?").await;
    assert_eq!(
        tunnel.next().await,
        Some((true, PONG, Bytes::from_static(b"there?")))
    );
}

#[tokio::test]
async fn a_close_ends_the_session_and_is_answered() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.pair(b"").await;
    tunnel.send(true, CLOSE, &1000_u16.to_be_bytes()).await;
    let closed = tunnel.next().await;
    assert_eq!(closed, Some((true, CLOSE, Bytes::from_static(&[0x03, 0xe8]))));
    assert_eq!(tunnel.next().await, None);
    let forwards = scene.cluster.forwards();
    within(forwards.until(|counts| counts.sessions_open == 0 && counts.connections_open == 0)).await;
}

#[tokio::test]
async fn the_end_of_the_session_closes_the_tunnel_with_1000() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.send(true, BINARY, &client::go_away()).await;
    let closed = tunnel.next().await;
    assert_eq!(closed, Some((true, CLOSE, Bytes::from_static(&[0x03, 0xe8]))));
    assert_eq!(tunnel.next().await, None);
}

#[tokio::test]
async fn a_restart_of_the_runtime_leaves_a_silent_tunnel() {
    let scene = Scene::new().await;
    let mut tunnel = tunnel(&scene).await;
    tunnel.pair(b"hello").await;
    assert_eq!(tunnel.next_seen().await, Some(Seen::Data(11, "hello".into())));
    assert_eq!(scene.cluster.forwards().restart_runtime(), 1);
    let forwards = scene.cluster.forwards();
    within(forwards.until(|counts| counts.connections_open == 0)).await;
    tunnel.send(true, BINARY, &ping(1)).await;
    tunnel.send(true, PING, b"there?").await;
    let answer = tokio::time::timeout(std::time::Duration::from_millis(200), tunnel.next_ever()).await;
    assert!(answer.is_err(), "{answer:?}");
    assert_eq!(forwards.counts().sessions_open, 1);
}
