//! The tunnel over a scripted connection, over a pipe, and against another implementation.

mod channels;

use std::collections::VecDeque;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio_util::task::TaskTracker;

use super::frame::{GOING_AWAY, NORMAL, Opcode, PROTOCOL_ERROR};
use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// A connection that delivers given pieces and takes writes in given sizes.
#[derive(Default)]
struct Wire {
    /// What comes, read by read; after the last one the connection ends.
    pieces: VecDeque<Vec<u8>>,
    /// How many bytes each write takes, over and over; 0 is one `Pending`. Without any, writes wait for ever.
    takes: Vec<usize>,
    turn: usize,
    written: Vec<u8>,
    /// How many reads went through.
    reads: usize,
    shut: bool,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(mut piece) = self.pieces.pop_front() else {
            return Poll::Ready(Ok(()));
        };
        if piece.is_empty() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let rest = piece.split_off(piece.len().min(buf.remaining()));
        if !rest.is_empty() {
            self.pieces.push_front(rest);
        }
        self.reads += 1;
        buf.put_slice(&piece);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        assert!(!self.shut, "a write after the shutdown");
        if self.takes.is_empty() {
            return Poll::Pending;
        }
        let take = self.takes[self.turn % self.takes.len()].min(buf.len());
        self.turn += 1;
        if take == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.written.extend_from_slice(&buf[..take]);
        Poll::Ready(Ok(take))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}

fn tunnel(pieces: impl IntoIterator<Item = Vec<u8>>) -> WebSocket<Wire> {
    WebSocket::tunnel(Wire {
        pieces: pieces.into_iter().collect(),
        takes: vec![usize::MAX],
        ..Wire::default()
    })
}

const FINAL: u8 = 0x80;
const TEXT: u8 = 0x1;
const BINARY: u8 = Opcode::Binary as u8;
const CONTINUATION: u8 = Opcode::Continuation as u8;
const CLOSE: u8 = FINAL | Opcode::Close as u8;
const PING: u8 = FINAL | Opcode::Ping as u8;
const PONG: u8 = FINAL | Opcode::Pong as u8;

/// A server's frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        short @ ..=125 => bytes.push(short as u8),
        middle @ ..=0xFFFF => {
            bytes.push(126);
            bytes.extend_from_slice(&(middle as u16).to_be_bytes());
        }
        long => {
            bytes.push(127);
            bytes.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(payload);
    bytes
}

fn close_frame(code: u16, reason: &str) -> Vec<u8> {
    frame(CLOSE, &[&code.to_be_bytes(), reason.as_bytes()].concat())
}

/// A client's frames with the mask taken off: first byte and payload.
fn unmask(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [first, second, rest @ ..] = bytes {
        assert_ne!(second & 0x80, 0, "a client masks");
        let (length, rest) = match second & 0x7F {
            126 => (
                usize::from(u16::from_be_bytes(rest[..2].try_into().unwrap())),
                &rest[2..],
            ),
            127 => (
                u64::from_be_bytes(rest[..8].try_into().unwrap()) as usize,
                &rest[8..],
            ),
            short => (short.into(), rest),
        };
        let (key, rest) = rest.split_at(4);
        let payload = rest[..length].iter().zip(key.iter().cycle());
        frames.push((*first, payload.map(|(byte, key)| byte ^ key).collect()));
        bytes = &rest[length..];
    }
    assert!(bytes.is_empty(), "half a frame");
    frames
}

/// Cuts bytes into pieces of the given sizes, over and over.
fn cut(mut bytes: &[u8], sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    for size in sizes.iter().cycle() {
        if bytes.is_empty() {
            break;
        }
        let (piece, rest) = bytes.split_at(bytes.len().min(*size));
        pieces.push(piece.to_vec());
        bytes = rest;
    }
    pieces
}

/// Reads to the end with buffers of the given sizes, over and over.
async fn read_all(tunnel: &mut WebSocket<Wire>, rooms: &[usize]) -> (Vec<u8>, io::Result<()>) {
    let mut seen = Vec::new();
    for room in rooms.iter().cycle() {
        let mut buffer = vec![0; *room];
        match tunnel.read(&mut buffer).await {
            Ok(0) => break,
            Ok(read) => seen.extend_from_slice(&buffer[..read]),
            Err(error) => return (seen, Err(error)),
        }
    }
    (seen, Ok(()))
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(future)
}

fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(length as u64);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

/// Lengths around the edges of the length forms and the buffer.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0usize..20,
        1 => 120usize..130,
        1 => 8_150usize..8_300,
        1 => 16_000usize..17_000,
        1 => 65_530usize..65_540,
    ]
}

/// Sizes of pieces; 0 stands for a `Pending`.
fn sizes() -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![0usize..4, 1usize..200, 4_000usize..70_000];
    vec(size, 1..6).prop_filter("something has to move", |sizes| {
        sizes.iter().any(|size| *size > 0)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_fragments_in_any_cut_give_the_same_stream(
        messages in vec(vec(length(), 1..4), 0..6),
        pings in vec(vec(any::<u8>(), 0..=125), 1..3),
        cuts in sizes(),
        takes in sizes(),
        rooms in vec(prop_oneof![1usize..9, 100usize..70_000], 1..4),
    ) {
        let (mut bytes, mut data) = (Vec::new(), Vec::new());
        for fragments in &messages {
            for (index, length) in fragments.iter().enumerate() {
                let opcode = if index == 0 { BINARY } else { CONTINUATION };
                let last = if index + 1 == fragments.len() { FINAL } else { 0 };
                let payload = noise(*length);
                bytes.extend(frame(opcode | last, &payload));
                data.extend(payload);
                for ping in &pings {
                    bytes.extend(frame(PING, ping));
                }
            }
        }
        bytes.extend(close_frame(NORMAL, ""));
        let mut tunnel = tunnel(cut(&bytes, &cuts));
        tunnel.stream.takes = takes;
        let (seen, end) = block_on(read_all(&mut tunnel, &rooms));
        prop_assert!(end.is_ok(), "{:?}", end);
        block_on(tunnel.shutdown()).unwrap();
        prop_assert!(seen == data);
        let mut sent = unmask(&tunnel.stream.written);
        prop_assert_eq!(sent.pop(), Some((CLOSE, NORMAL.to_be_bytes().to_vec())));
        prop_assert!(sent.iter().all(|(first, payload)| *first == PONG && pings.contains(payload)));
        let last = (!messages.is_empty()).then(|| pings.last().unwrap());
        prop_assert_eq!(sent.last().map(|(_, payload)| payload), last);
    }

    #[test]
    fn any_partial_writes_give_whole_frames(writes in vec(length(), 0..8), takes in sizes()) {
        let data: Vec<_> = writes.iter().map(|length| noise(*length)).collect();
        let mut tunnel = tunnel([]);
        tunnel.stream.takes = takes;
        block_on(async {
            for chunk in &data {
                tunnel.write_all(chunk).await.unwrap();
            }
            tunnel.shutdown().await.unwrap();
        });
        prop_assert!(tunnel.stream.shut);
        let mut frames = unmask(&tunnel.stream.written);
        prop_assert_eq!(frames.pop(), Some((CLOSE, NORMAL.to_be_bytes().to_vec())));
        prop_assert!(frames.iter().all(|(first, _)| *first == FINAL | BINARY));
        prop_assert!(frames.iter().all(|(_, payload)| payload.len() <= outbound::LONGEST_DATA));
        let sent: Vec<_> = frames.into_iter().flat_map(|(_, payload)| payload).collect();
        prop_assert!(sent == data.concat());
    }

    #[test]
    fn whatever_bytes_come_the_stream_ends_the_same_way_in_every_cut(
        first in prop::sample::select(vec![BINARY, FINAL | BINARY, PING, CLOSE, FINAL | TEXT, 0xC2]),
        second in any::<u8>(),
        tail in vec(prop_oneof![any::<u8>(), Just(0), Just(FINAL | BINARY)], 0..300),
        cuts in sizes(),
    ) {
        let bytes = [vec![first, second], tail].concat();
        let read = |mut websocket: WebSocket<Wire>| {
            let (seen, end) = block_on(read_all(&mut websocket, &[64]));
            (seen, end.map_err(|error| (error.kind(), error.to_string())))
        };
        prop_assert_eq!(read(tunnel(cut(&bytes, &cuts))), read(tunnel([bytes.clone()])));
        prop_assert_eq!(read(channels::of(cut(&bytes, &cuts))), read(channels::of([bytes])));
    }
}

#[tokio::test]
async fn a_broken_frame_is_refused_for_good_and_told_to_the_peer() {
    let fragment = frame(BINARY, b"a");
    let cases = [
        ("text", frame(FINAL | TEXT, b"a")),
        ("reserved bits", frame(FINAL | 0x40 | BINARY, b"a")),
        ("unknown data opcode", frame(FINAL | 0x3, b"a")),
        ("unknown control opcode", frame(FINAL | 0xB, b"")),
        ("masked", vec![FINAL | BINARY, 0x81, 1, 2, 3, 4, 5]),
        ("2^63 bytes", [&[FINAL | BINARY, 127, 0x80][..], &[0; 7]].concat()),
        ("continuation of nothing", frame(FINAL | CONTINUATION, b"a")),
        (
            "message within a message",
            [fragment, frame(FINAL | BINARY, b"a")].concat(),
        ),
        ("fragment of a PING", frame(PING & !FINAL, b"a")),
        ("long PING", frame(PING, &[0; 126])),
        ("half a Close code", frame(CLOSE, &[3])),
        ("Close code 1005", close_frame(1005, "")),
        ("Close code 999", close_frame(999, "")),
        ("Close code 5000", close_frame(5000, "")),
    ];
    for (name, bytes) in cases {
        let mut tunnel = tunnel([bytes]);
        let (_, end) = read_all(&mut tunnel, &[64]).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData, "{name}");
        let again = tunnel.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::InvalidData, "{name}");
        let told = (CLOSE, PROTOCOL_ERROR.to_be_bytes().to_vec());
        assert_eq!(unmask(&tunnel.stream.written), [told], "{name}");
        let write = tunnel.write(b"a").await.unwrap_err();
        assert_eq!(write.kind(), io::ErrorKind::BrokenPipe, "{name}");
    }
}

#[tokio::test]
async fn an_orderly_close_is_the_end_and_what_follows_it_is_not_read() {
    let none = (frame(CLOSE, b""), vec![]);
    let normal = (close_frame(NORMAL, "done"), NORMAL.to_be_bytes().to_vec());
    let leaving = (close_frame(GOING_AWAY, ""), GOING_AWAY.to_be_bytes().to_vec());
    for (close, reply) in [none, normal, leaving] {
        let bytes = [frame(FINAL | BINARY, b"last"), close, frame(FINAL | TEXT, b"x")].concat();
        let mut tunnel = tunnel([bytes]);
        let (seen, end) = read_all(&mut tunnel, &[64]).await;
        assert_eq!((seen.as_slice(), end.is_ok()), (&b"last"[..], true));
        assert_eq!(tunnel.read(&mut [0; 8]).await.unwrap(), 0);
        tunnel.shutdown().await.unwrap();
        assert_eq!(unmask(&tunnel.stream.written), [(CLOSE, reply)]);
    }
}

#[tokio::test]
async fn a_close_for_another_cause_names_it() {
    let mut tunnel = tunnel([close_frame(1011, "backend\r\nfailed")]);
    let (_, end) = read_all(&mut tunnel, &[64]).await;
    let error = end.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert_eq!(
        error.to_string(),
        "the WebSocket was closed with code 1011: backend failed"
    );
    assert_eq!(
        unmask(&tunnel.stream.written),
        [(CLOSE, 1011u16.to_be_bytes().to_vec())]
    );
}

#[tokio::test]
async fn an_end_without_a_close_is_an_error_unless_we_closed_at_a_frames_edge() {
    let ends = async |bytes: Vec<u8>, shutdown: bool| {
        let mut tunnel = tunnel([bytes]);
        if shutdown {
            tunnel.shutdown().await.unwrap();
        }
        let (_, end) = read_all(&mut tunnel, &[64]).await;
        end.map_err(|error| error.kind())
    };
    let whole = frame(FINAL | BINARY, b"whole");
    let half = whole[..4].to_vec();
    let header = whole[..1].to_vec();
    let unexpected = Err(io::ErrorKind::UnexpectedEof);
    assert_eq!(ends(whole.clone(), false).await, unexpected);
    assert_eq!(ends(whole, true).await, Ok(()));
    assert_eq!(ends(half, true).await, unexpected);
    assert_eq!(ends(header, true).await, unexpected);
}

#[tokio::test]
async fn a_ping_between_fragments_is_answered_by_reading_alone() {
    let mut tunnel = tunnel([
        frame(BINARY, b"one"),
        frame(PING, b"alive?"),
        frame(PONG, b"unasked"),
        frame(CONTINUATION, b"two"),
        frame(FINAL | CONTINUATION, b""),
    ]);
    let mut seen = [0; 6];
    tunnel.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"onetwo");
    assert_eq!(unmask(&tunnel.stream.written), [(PONG, b"alive?".to_vec())]);
}

#[tokio::test]
async fn only_the_last_ping_is_answered_when_the_connection_took_nothing() {
    let data = frame(FINAL | BINARY, b"x");
    let mut tunnel = tunnel((0..100).map(|index| [frame(PING, &[index]), data.clone()].concat()));
    tunnel.stream.takes = Vec::new();
    let mut seen = [0; 100];
    tunnel.read_exact(&mut seen).await.unwrap();
    tunnel.stream.takes = vec![usize::MAX];
    tunnel.flush().await.unwrap();
    let answers = unmask(&tunnel.stream.written);
    // The first was on its way already when the others came.
    assert_eq!(answers, [(PONG, vec![0]), (PONG, vec![99])]);
}

#[tokio::test]
async fn many_small_frames_cost_one_read_and_a_large_one_no_copy_of_its_rest() {
    let small: Vec<_> = (0..1000).flat_map(|_| frame(FINAL | BINARY, b"four")).collect();
    let mut reader = tunnel([small]);
    reader.read_exact(&mut [0; 4000]).await.unwrap();
    assert_eq!(reader.stream.reads, 1);

    let mut reader = tunnel([
        frame(FINAL | BINARY, &noise(60_000)),
        frame(FINAL | BINARY, b"next"),
    ]);
    let mut room = vec![0; 100_000];
    let begin = reader.read(&mut room).await.unwrap();
    let rest = reader.read(&mut room).await.unwrap();
    assert_eq!(
        begin + rest,
        60_000,
        "the caller's buffer takes the rest in one read, and no more"
    );
    assert_eq!(reader.stream.reads, 2);
}

#[tokio::test]
async fn a_write_waits_for_the_frame_before_it() {
    let mut tunnel = tunnel([]);
    tunnel.stream.takes = vec![5, 0];
    let mut cx = Context::from_waker(Waker::noop());
    let write =
        |tunnel: &mut WebSocket<Wire>, cx: &mut Context<'_>| Pin::new(tunnel).poll_write(cx, &[7; 100]);
    assert!(matches!(write(&mut tunnel, &mut cx), Poll::Ready(Ok(100))));
    assert!(write(&mut tunnel, &mut cx).is_pending());
    tunnel.flush().await.unwrap();
    assert_eq!(
        unmask(&tunnel.stream.written).len(),
        1,
        "what was refused is not sent"
    );
}

#[tokio::test]
async fn a_reader_that_gave_up_sending_a_pong_does_not_keep_the_writer_asleep() {
    let (near, mut far) = tokio::io::duplex(16);
    let (mut reader, mut writer) = tokio::io::split(WebSocket::tunnel(near));
    let writing = TaskTracker::new().spawn(async move {
        writer.write_all(&[1; 40]).await?;
        writer.flush().await
    });
    tokio::task::yield_now().await; // the writer has filled the pipe and waits
    far.write_all(&frame(PING, b"")).await.unwrap();
    let mut buffer = [0; 8];
    {
        let reading = std::pin::pin!(reader.read(&mut buffer));
        assert!(futures_util::poll!(reading).is_pending());
    }
    let mut seen = vec![0; 2 + 4 + 40 + 2 + 4];
    let received = tokio::time::timeout(DEADLINE, far.read_exact(&mut seen)).await;
    received.expect("the writer goes on").unwrap();
    writing.await.unwrap().unwrap();
    assert_eq!(unmask(&seen), [(FINAL | BINARY, vec![1; 40]), (PONG, vec![])]);
}

#[cfg(feature = "testing")]
mod tungstenite {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    #[tokio::test]
    async fn another_implementation_echoes_a_long_stream_and_closes() {
        let (near, far) = tokio::io::duplex(10_000);
        let server = TaskTracker::new().spawn(async move {
            let mut socket = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
            let mut pongs = 0;
            while let Some(message) = socket.next().await {
                match message.unwrap() {
                    Message::Binary(data) => {
                        socket
                            .feed(Message::Ping(data.slice(..data.len().min(125))))
                            .await
                            .unwrap();
                        socket.send(Message::Binary(data)).await.unwrap();
                    }
                    Message::Pong(_) => pongs += 1,
                    Message::Close(close) => assert_eq!(u16::from(close.unwrap().code), NORMAL),
                    other => panic!("{other:?}"),
                }
            }
            pongs
        });
        let (mut reader, mut writer) = tokio::io::split(WebSocket::tunnel(near));
        let data = noise(2_000_000);
        let sent = data.clone();
        let writing = TaskTracker::new().spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer.flush().await.unwrap();
            writer
        });
        let mut seen = vec![0; data.len()];
        let echoed = tokio::time::timeout(DEADLINE, reader.read_exact(&mut seen)).await;
        echoed.expect("the stream goes on").unwrap();
        assert!(seen == data);
        let mut writer = writing.await.unwrap();
        writer.shutdown().await.unwrap();
        assert_eq!(
            reader.read(&mut [0; 8]).await.unwrap(),
            0,
            "the reply to our Close is the end"
        );
        assert!(server.await.unwrap() > 0, "PINGs were answered under way");
    }

    #[test]
    fn another_implementations_answer_to_the_handshake_is_good() {
        let handshake = handshake::Handshake::new(handshake::TUNNEL);
        let mut headers = http::HeaderMap::new();
        handshake.request(&mut headers);
        let accept = derive_accept_key(headers["sec-websocket-key"].as_bytes());
        headers.insert("sec-websocket-accept", accept.try_into().unwrap());
        assert_eq!(handshake.check(&headers), Ok(()));
    }
}
