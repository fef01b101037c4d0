//! A session over a pipe, with a client written out frame by frame.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::frame::{self, Frame};
use super::*;
use crate::testing::FakeCluster;
use crate::testing::backend::Serve;
use crate::testing::faults::ForwardFault;

const DEADLINE: Duration = Duration::from_secs(20);

struct Client {
    io: DuplexStream,
    received: BytesMut,
    started: bool,
    /// Keeps the pod and its cluster alive.
    scene: (FakeCluster, crate::testing::Workload),
}

impl Client {
    async fn connect() -> Self {
        let cluster = FakeCluster::start().await.unwrap();
        cluster.faults().set_close_grace(Duration::from_millis(20));
        let workload = cluster
            .workload("shop", "db")
            .port("", 80, 5432)
            .serve(Serve::Echo)
            .create()
            .unwrap();
        let pod = Arc::new(Pod::new(cluster.cluster.clone(), "shop", &workload.pods[0].name));
        let (io, server) = tokio::io::duplex(1 << 20);
        let tasks = TaskTracker::new();
        tasks.spawn(serve(
            server,
            pod,
            tasks.clone(),
            cluster.cluster.stop.child_token(),
        ));
        Self {
            io,
            received: BytesMut::new(),
            started: false,
            scene: (cluster, workload),
        }
    }

    fn break_with(&self, fault: ForwardFault) {
        let (cluster, workload) = &self.scene;
        cluster
            .faults()
            .set_forward("shop", &workload.pods[0].name, Some(fault));
    }

    async fn send(&mut self, frame: &[u8]) {
        self.io.write_all(frame).await.unwrap();
    }

    /// Opens a stream, with the stored-block encoding a client may use.
    async fn open(&mut self, stream: u32, fin: bool, headers: &[(&str, &str)]) {
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
        let mut frame = BytesMut::new();
        frame.put_slice(&[0x80, 3, 0, 1]);
        frame.put_u32(u32::from(fin) << 24 | u32::try_from(body.len()).unwrap());
        frame.put_slice(&body);
        self.send(&frame).await;
    }

    /// Opens error stream `first` and data stream `first + 2`.
    async fn pair(&mut self, first: u32) {
        let request = first.to_string();
        for (stream, kind) in [(first, "error"), (first + 2, "data")] {
            let headers = [
                ("streamtype", kind),
                ("port", "5432"),
                ("requestid", request.as_str()),
            ];
            self.open(stream, kind == "error", &headers).await;
        }
        for _ in 0..2 {
            assert!(matches!(self.next().await, Some(Frame::Headers { .. })));
        }
    }

    /// The server's next frame; replies come as [`Frame::Headers`]. `None` at the end of the session.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = frame::parse(&mut self.received).unwrap() {
                return Some(frame);
            }
            let read = self.io.read_buf(&mut self.received);
            if tokio::time::timeout(DEADLINE, read)
                .await
                .expect("no frame came")
                .unwrap()
                == 0
            {
                return None;
            }
        }
    }

    /// Bytes of a stream up to its FIN.
    async fn until_fin(&mut self, wanted: u32) -> Bytes {
        let mut bytes = BytesMut::new();
        loop {
            match self.next().await.expect("the session ended") {
                Frame::Data { stream, fin, payload } if stream == wanted => {
                    bytes.put_slice(&payload);
                    if fin {
                        return bytes.freeze();
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn both_streams_end_after_a_clean_close() {
    let mut client = Client::connect().await;
    client.pair(1).await;
    client.send(&frame::data(3, false, b"hello ")).await;
    client.send(&frame::data(3, true, b"world")).await;
    assert_eq!(client.until_fin(3).await, "hello world");
    assert_eq!(client.until_fin(1).await, "");
}

#[tokio::test]
async fn streams_and_data_may_arrive_in_one_write() {
    let mut client = Client::connect().await;
    client.pair(1).await;
    client.pair(5).await;
    client
        .send(&[frame::data(7, true, b"second"), frame::data(3, true, b"first")].concat())
        .await;
    let mut seen = HashMap::<u32, BytesMut>::new();
    let mut ended = 0;
    while ended < 4 {
        if let Some(Frame::Data { stream, fin, payload }) = client.next().await {
            seen.entry(stream).or_default().put_slice(&payload);
            ended += u32::from(fin);
        }
    }
    assert_eq!((&seen[&3][..], &seen[&7][..]), (&b"first"[..], &b"second"[..]));
}

#[tokio::test]
async fn a_refused_dial_ends_data_then_explains_then_resets() {
    let mut client = Client::connect().await;
    client.break_with(ForwardFault::Refused);
    client.pair(1).await;
    assert_eq!(client.until_fin(3).await, "");
    let Some(Frame::Data {
        stream: 1,
        fin: false,
        payload,
    }) = client.next().await
    else {
        panic!("no text")
    };
    let text = String::from_utf8(payload.to_vec()).unwrap();
    assert!(text.starts_with("error forwarding port 5432 to pod "), "{text}");
    assert_eq!(client.next().await, Some(Frame::RstStream { stream: 1 }));
}

#[tokio::test]
async fn a_reset_by_the_client_ends_only_its_pair() {
    let mut client = Client::connect().await;
    client.pair(1).await;
    client.pair(5).await;
    client.send(&frame::rst_stream(3, frame::CANCEL)).await;
    assert_eq!(client.until_fin(1).await, "");
    client.send(&frame::data(7, true, b"alive")).await;
    assert_eq!(client.until_fin(7).await, "alive");
}

#[tokio::test]
async fn pings_of_the_client_are_echoed() {
    let mut client = Client::connect().await;
    client.send(&frame::ping(2)).await;
    client.send(&frame::ping(3)).await;
    assert_eq!(client.next().await, Some(Frame::Ping { id: 3 }));
}

#[tokio::test]
async fn bad_streams_are_reset_and_bad_frames_end_the_session() {
    let mut client = Client::connect().await;
    client
        .open(
            5,
            false,
            &[("streamtype", "data"), ("port", "0"), ("requestid", "1")],
        )
        .await;
    assert_eq!(client.next().await, Some(Frame::RstStream { stream: 5 }));
    // Ids only go up.
    client
        .open(
            3,
            false,
            &[("streamtype", "data"), ("port", "80"), ("requestid", "1")],
        )
        .await;
    assert_eq!(client.next().await, Some(Frame::RstStream { stream: 3 }));
    client.send(&frame::data(0, false, b"x")).await;
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn half_a_pair_is_given_up() {
    let mut client = Client::connect().await;
    client
        .open(
            1,
            true,
            &[("streamtype", "error"), ("port", "80"), ("requestid", "9")],
        )
        .await;
    assert!(matches!(client.next().await, Some(Frame::Headers { .. })));
    tokio::time::pause();
    tokio::time::advance(PAIR_TIMEOUT).await;
    tokio::time::resume();
    let Some(Frame::Data {
        stream: 1, payload, ..
    }) = client.next().await
    else {
        panic!("no text")
    };
    assert_eq!(payload, "(request=9) timed out waiting for streams");
    assert_eq!(client.next().await, Some(Frame::RstStream { stream: 1 }));
}
