//! Bodies much larger than the memory that the program may take for them.

use std::iter::repeat_n;

use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::time::{Duration, Instant};

use crate::client::{Client, PROTOCOLS, get};
use crate::command::within;
use crate::program::Proxy;
use crate::scene::Scene;

const SIZE: usize = 1 << 30;
const CHUNK: usize = 64 << 10;
/// How much the program may need beyond what it has at rest.
const GROWTH: u64 = 64 << 20;
/// Enough for 2 MB/s.
const LIMIT: Duration = Duration::from_secs(600);
/// Byte i of a download is i modulo this.
const PERIOD: usize = 251;

/// Measures from a warm connection on.
struct Measured {
    proxy: Proxy,
    host: String,
    memory: u64,
    _scene: Scene,
}

impl Measured {
    async fn start() -> Self {
        let scene = Scene::alone().await;
        let proxy = Proxy::start().await;
        let host = scene.shop.host("web");
        for protocol in PROTOCOLS {
            let mut client = Client::connect(proxy.address, protocol).await.unwrap();
            client.get(&host, "/bytes/1000").await;
        }
        let memory = proxy.memory_peak();
        Self {
            proxy,
            host,
            memory,
            _scene: scene,
        }
    }

    fn finish(&self, what: &str, started: Instant) {
        let growth = self.proxy.memory_peak() - self.memory;
        let rate = SIZE as f64 / started.elapsed().as_secs_f64() / 1e6;
        #[expect(clippy::print_stderr, reason = "for information")]
        {
            eprintln!(
                "{what}: {rate:.0} MB/s, {} KiB of memory at rest, {} KiB more at most",
                self.memory >> 10,
                growth >> 10
            );
        }
        assert!(growth < GROWTH, "{what}: memory grew by {growth} bytes");
    }
}

#[tokio::test]
async fn a_download_of_one_gibibyte_needs_no_memory_for_it() {
    let measured = Measured::start().await;
    let pattern: Vec<u8> = (0..(4 << 20) + PERIOD).map(|i| (i % PERIOD) as u8).collect();
    for protocol in PROTOCOLS {
        let mut client = Client::connect(measured.proxy.address, protocol).await.unwrap();
        let started = Instant::now();
        let download = async {
            let mut body = client
                .send(get(&measured.host, &format!("/bytes/{SIZE}")))
                .await
                .unwrap()
                .into_body();
            let mut at = 0;
            while let Some(frame) = body.frame().await {
                let data = frame.unwrap().into_data().unwrap();
                let start = at % PERIOD;
                assert!(
                    data == pattern[start..start + data.len()],
                    "wrong bytes after {at}"
                );
                at += data.len();
            }
            at
        };
        assert_eq!(within(LIMIT, "the download", download).await, SIZE);
        measured.finish(&format!("download over {protocol:?}"), started);
    }
}

#[tokio::test]
async fn an_upload_of_one_gibibyte_needs_no_memory_for_it() {
    let measured = Measured::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(measured.proxy.address, protocol).await.unwrap();
        let started = Instant::now();
        let chunk = Bytes::from(vec![7; CHUNK]);
        let body = StreamBody::new(stream::iter(
            repeat_n(chunk, SIZE / CHUNK).map(|chunk| Ok(Frame::data(chunk))),
        ));
        let request = Request::post("/upload?hash=0")
            .header("host", &measured.host)
            .header("content-length", SIZE)
            .body(body.boxed_unsync())
            .unwrap();
        let upload = async {
            client
                .send(request)
                .await
                .unwrap()
                .into_body()
                .collect()
                .await
                .unwrap()
                .to_bytes()
        };
        let reply: serde_json::Value =
            serde_json::from_slice(&within(LIMIT, "the upload", upload).await).unwrap();
        assert_eq!(reply["bytes"], SIZE);
        measured.finish(&format!("upload over {protocol:?}"), started);
    }
}
