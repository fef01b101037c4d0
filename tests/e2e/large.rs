//! Bodies much larger than the memory that the program may take for them.

use std::iter::repeat_n;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use crate::client::{Body, Client, PROTOCOLS, Protocol, get};
use crate::command::{eventually, within};
use crate::note::note;
use crate::program::Proxy;
use crate::scene::Scene;

pub(crate) const SIZE: usize = 1 << 30;
pub(crate) const CHUNK: usize = 64 << 10;
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
    /// Its pods read nothing.
    holding: String,
    memory: u64,
    _scene: Scene,
}

impl Measured {
    async fn start() -> Self {
        let scene = Scene::alone().await;
        let proxy = Proxy::start().await;
        let host = scene.shop.host("web");
        let holding = format!("{}:9002", scene.shop.host("multi"));
        for protocol in PROTOCOLS {
            let mut client = Client::connect(proxy.address, protocol).await.unwrap();
            client.get(&host, "/bytes/1000").await;
        }
        let memory = proxy.memory_peak();
        Self {
            proxy,
            host,
            holding,
            memory,
            _scene: scene,
        }
    }

    async fn connect(&self, protocol: Protocol) -> Client {
        Client::connect(self.proxy.address, protocol).await.unwrap()
    }

    fn finish(&self, what: &str, started: Instant) {
        let growth = self.proxy.memory_peak() - self.memory;
        let rate = SIZE as f64 / started.elapsed().as_secs_f64() / 1e6;
        note(&format!(
            "{what}: {rate:.0} MB/s, {} KiB of memory at rest, {} KiB more at most",
            self.memory >> 10,
            growth >> 10
        ));
        assert!(growth < GROWTH, "{what}: memory grew by {growth} bytes");
    }
}

#[tokio::test]
async fn a_download_of_one_gibibyte_needs_no_memory_for_it() {
    let measured = Measured::start().await;
    let pattern = pattern();
    for protocol in PROTOCOLS {
        let mut client = measured.connect(protocol).await;
        let started = Instant::now();
        let download = download(&mut client, &measured.host, SIZE, &pattern);
        within(LIMIT, "the download", download).await;
        measured.finish(&format!("download over {protocol:?}"), started);
    }
}

#[tokio::test]
async fn an_upload_of_one_gibibyte_needs_no_memory_for_it() {
    let measured = Measured::start().await;
    for protocol in PROTOCOLS {
        let mut client = measured.connect(protocol).await;
        let started = Instant::now();
        within(
            LIMIT,
            "the upload",
            upload_whole(&mut client, &measured.host, SIZE),
        )
        .await;
        measured.finish(&format!("upload over {protocol:?}"), started);
    }
}

#[tokio::test]
async fn many_transfers_at_once_arrive_whole_and_others_are_answered_meanwhile() {
    const EACH: usize = 64 << 20;
    const OF_A_KIND: usize = 5;
    let measured = Measured::start().await;
    let (host, pattern) = (measured.host.clone(), Arc::new(pattern()));
    let mut other = measured.connect(Protocol::Http1).await;
    let mut transfers = JoinSet::new();
    for protocol in PROTOCOLS {
        for _ in 0..OF_A_KIND {
            let (mut client, host) = (measured.connect(protocol).await, host.clone());
            let pattern = pattern.clone();
            transfers.spawn(async move { download(&mut client, &host, EACH, &pattern).await });
            let (mut client, host) = (measured.connect(protocol).await, measured.host.clone());
            transfers.spawn(async move { upload_whole(&mut client, &host, EACH).await });
        }
    }
    let (started, count) = (Instant::now(), transfers.len());
    let all = within(LIMIT, "the transfers", transfers.join_all());
    let mut waits = Vec::new();
    let asking = async {
        loop {
            let asked = Instant::now();
            assert_eq!(other.get(&host, "/health").await.status, 200);
            waits.push(asked.elapsed());
        }
    };
    tokio::select! {
        _ = all => {}
        () = asking => unreachable!("it asks on and on"),
    }
    let lasted = started.elapsed();
    let rate = (count * EACH) as f64 / lasted.as_secs_f64() / 1e6;
    waits.sort();
    let (middle, worst) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    note(&format!(
        "{count} transfers at once: {rate:.0} MB/s; beside them {} requests were answered within {middle:?} (median), {worst:?} (worst)",
        waits.len()
    ));
    assert!(waits.len() > count, "{} answers", waits.len());
    assert!(worst < lasted / 2, "one waited {worst:?} of {lasted:?}");
}

/// What downloads are made of, from any of its first [`PERIOD`] bytes on.
fn pattern() -> Vec<u8> {
    (0..(4 << 20) + PERIOD).map(|i| (i % PERIOD) as u8).collect()
}

/// Downloads so many bytes, and compares each with the pattern.
async fn download(client: &mut Client, host: &str, size: usize, pattern: &[u8]) {
    let response = client.send(get(host, &format!("/bytes/{size}"))).await.unwrap();
    let (mut body, mut at) = (response.into_body(), 0);
    while let Some(frame) = body.frame().await {
        let data = frame.unwrap().into_data().unwrap();
        let start = at % PERIOD;
        assert!(
            data == pattern[start..start + data.len()],
            "wrong bytes after {at}"
        );
        at += data.len();
    }
    assert_eq!(at, size);
}

/// Uploads so many bytes, and asks the pod for their number.
async fn upload_whole(client: &mut Client, host: &str, size: usize) {
    let response = client.send(upload(host, size, Arc::default())).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let reply: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(reply["bytes"], size);
}

/// Makes an upload that counts the bytes that were taken from it.
pub(crate) fn upload(host: &str, size: usize, taken: Arc<AtomicUsize>) -> Request<Body> {
    let chunks = repeat_n(Bytes::from(vec![7; CHUNK]), size / CHUNK).map(move |chunk| {
        taken.fetch_add(chunk.len(), Ordering::Relaxed);
        Ok(Frame::data(chunk))
    });
    let request = Request::post("/upload?hash=0")
        .header("host", host)
        .header("content-length", size);
    request
        .body(StreamBody::new(stream::iter(chunks)).boxed_unsync())
        .unwrap()
}

#[tokio::test]
async fn a_client_that_stops_reading_needs_no_memory() {
    let measured = Measured::start().await;
    for protocol in PROTOCOLS {
        let mut stalled = measured.connect(protocol).await;
        let path = format!("/bytes/{SIZE}");
        let mut held = stalled
            .send(get(&measured.host, &path))
            .await
            .unwrap()
            .into_body();
        held.frame().await.unwrap().unwrap();
        let started = Instant::now();

        // While this one passes, all of the other would have come, too.
        let mut reading = measured.connect(protocol).await;
        let mut body = reading
            .send(get(&measured.host, &path))
            .await
            .unwrap()
            .into_body();
        let rest = async { while body.frame().await.transpose().unwrap().is_some() {} };
        within(LIMIT, "the other download", rest).await;

        measured.finish(
            &format!("download beside a stalled one over {protocol:?}"),
            started,
        );
        held.frame().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_pod_that_stops_reading_needs_no_memory() {
    let measured = Measured::start().await;
    for protocol in PROTOCOLS {
        let mut stalled = measured.connect(protocol).await;
        let taken = Arc::new(AtomicUsize::new(0));
        let request = upload(&measured.holding, SIZE, taken.clone());
        let mut sending = JoinSet::new();
        // Whether it is cut in the end is not asked here.
        sending.spawn(async move { drop(stalled.send(request).await) });
        eventually("the stalled upload to begin", async || {
            taken.load(Ordering::Relaxed) > CHUNK
        })
        .await;
        let started = Instant::now();

        let mut writing = measured.connect(protocol).await;
        let request = upload(&measured.host, SIZE, Arc::default());
        within(LIMIT, "the other upload", writing.send(request))
            .await
            .unwrap();

        measured.finish(&format!("upload beside a stalled one over {protocol:?}"), started);
    }
}
