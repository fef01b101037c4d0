//! Port-forwards as a program that uses the library sees them: what goes wrong with one connection is told to that one, and
//! known to no other.

use std::io::ErrorKind;

use kube_tunnel::drain::Drain;
use kube_tunnel::k8s::{Carriers, Cluster, Config, PortForward, SlowReaders};
use kube_tunnel::privileges::Account;
use kube_tunnel::registry::PodRef;
use kube_tunnel::transport::{BoxStream, Connect, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use crate::cluster::Namespace;
use crate::command::within;
use crate::scene::Scene;

/// Longer than any connection takes to tell.
const LIMIT: Duration = Duration::from_secs(20);

const ECHO: u16 = 9000;

/// Each way to a pod by itself.
pub(crate) const EACH: [Carriers; 3] = [Carriers::Spdy, Carriers::Tunnel, Carriers::Channel];

/// Connects to the cluster of the environment.
pub(crate) async fn cluster() -> Cluster {
    Cluster::load(&config(Carriers::Auto)).await.unwrap()
}

fn config(carriers: Carriers) -> Config {
    Config {
        kubeconfig: None,
        context: None,
        timeout: LIMIT,
        poll_interval: LIMIT,
        idle_timeout: Duration::from_mins(10),
        carriers,
        slow_readers: SlowReaders::default(),
        account: Account::default(),
    }
}

/// Picks a pod of `web`.
pub(crate) async fn pod(namespace: &Namespace) -> PodRef {
    let pods = namespace.pods("web").await;
    PodRef {
        namespace: namespace.name.as_str().into(),
        name: pods.first().unwrap().as_str().into(),
        uid: "".into(),
    }
}

/// Port-forwards to one pod.
pub(crate) struct Forward {
    forward: PortForward,
    pod: PodRef,
}

impl Forward {
    pub(crate) async fn start(namespace: &Namespace, carriers: Carriers) -> Self {
        let config = config(carriers);
        let cluster = Cluster::load(&config).await.unwrap();
        let drain = Drain::new();
        Self {
            forward: PortForward::new(&cluster, &config, &drain),
            pod: pod(namespace).await,
        }
    }

    pub(crate) async fn connect(&self, port: u16) -> anyhow::Result<BoxStream> {
        let target = Target {
            pod: self.pod.clone(),
            port,
        };
        Ok(self.forward.connect(&target).await?)
    }

    /// Opens connections that echo.
    pub(crate) async fn echoes(&self, count: usize) -> Vec<BoxStream> {
        let mut streams = Vec::new();
        for _ in 0..count {
            let mut stream = self.connect(ECHO).await.unwrap();
            assert!(echoes(&mut stream).await, "a new connection does not echo");
            streams.push(stream);
        }
        streams
    }
}

/// Tells whether a connection echoes, soon.
pub(crate) async fn echoes(stream: &mut BoxStream) -> bool {
    let mut answer = [0; 5];
    let echo = async {
        stream.write_all(b"hello").await?;
        stream.read_exact(&mut answer).await
    };
    matches!(tokio::time::timeout(LIMIT, echo).await, Ok(Ok(_))) && answer == *b"hello"
}

async fn assert_all_echo(streams: &mut [BoxStream]) {
    for (number, stream) in streams.iter_mut().enumerate() {
        assert!(echoes(stream).await, "connection {number} does not echo any more");
    }
}

#[tokio::test]
async fn every_way_to_a_pod_carries_bytes_both_ways_unchanged() {
    const PIECE: usize = 100_003;
    const PIECES: usize = 80;
    let scene = Scene::together().await;
    for carriers in EACH {
        let stream = Forward::start(scene.shop, carriers).await.connect(ECHO).await;
        let (mut reader, mut writer) = tokio::io::split(stream.unwrap());
        let piece: Vec<u8> = (0..PIECE).map(|at| (at % 251) as u8).collect();
        let sent = piece.clone();
        let sending = async move {
            for _ in 0..PIECES {
                writer.write_all(&sent).await.unwrap();
            }
            writer
        };
        let receiving = async {
            let mut came = vec![0; PIECE];
            for number in 0..PIECES {
                reader.read_exact(&mut came).await.unwrap();
                assert!(came == piece, "{carriers:?}: piece {number} is another one");
            }
        };
        within(LIMIT, "the echo", async { tokio::join!(sending, receiving) }).await;
    }
}

#[tokio::test]
async fn a_refused_connection_is_told_why_and_costs_no_other() {
    let scene = Scene::together().await;
    for carriers in EACH {
        let forward = Forward::start(scene.shop, carriers).await;
        let mut others = forward.echoes(8).await;
        for _ in 0..3 {
            let mut refused = forward.connect(4444).await.unwrap();
            // Bytes on their way when the port refuses are what stops a worker of older runtimes.
            drop(refused.write_all(b"early").await);
            let error = within(LIMIT, "a refusal", refused.read_u8()).await.unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::ConnectionRefused,
                "{carriers:?}: {error}"
            );
            assert!(error.to_string().contains("connection refused"), "{error}");
        }
        assert_all_echo(&mut others).await;
        assert_all_echo(&mut forward.echoes(8).await).await;
    }
}

#[tokio::test]
async fn a_connection_that_is_reset_costs_no_other() {
    let scene = Scene::together().await;
    for carriers in EACH {
        let forward = Forward::start(scene.shop, carriers).await;
        let mut others = forward.echoes(8).await;
        for _ in 0..3 {
            let mut reset = forward.connect(9003).await.unwrap();
            reset.write_all(b"x").await.unwrap();
            let error = within(LIMIT, "a reset", reset.read_u8()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{carriers:?}: {error}");
        }
        assert_all_echo(&mut others).await;
        assert_all_echo(&mut forward.echoes(8).await).await;
    }
}

#[tokio::test]
async fn an_application_that_does_not_read_holds_up_no_other_connection() {
    let scene = Scene::together().await;
    for carriers in EACH {
        let forward = Forward::start(scene.shop, carriers).await;
        let mut others = forward.echoes(8).await;
        let mut uploads = JoinSet::new();
        for _ in 0..2 {
            let mut hold = forward.connect(9002).await.unwrap();
            uploads.spawn(async move { hold.write_all(&vec![0; 64 << 20]).await });
        }
        keep_echoing(&forward, &mut others).await;
        assert_eq!(uploads.len(), 2);
        assert!(
            uploads.try_join_next().is_none(),
            "{carriers:?}: an upload has ended that nobody reads"
        );
    }
}

#[tokio::test]
async fn a_reader_that_stops_holds_up_no_other_connection() {
    let scene = Scene::together().await;
    for carriers in EACH {
        let forward = Forward::start(scene.shop, carriers).await;
        let mut others = forward.echoes(8).await;
        let mut floods = Vec::new();
        for _ in 0..2 {
            let mut flood = forward.connect(9004).await.unwrap();
            within(LIMIT, "the flood", flood.read_u8()).await.unwrap();
            floods.push(flood);
        }
        keep_echoing(&forward, &mut others).await;
        for flood in &mut floods {
            // More than waits for a reader anywhere: it goes on where it stopped.
            let mut rest = vec![0; 32 << 20];
            within(LIMIT, "the rest of the flood", flood.read_exact(&mut rest))
                .await
                .unwrap();
        }
    }
}

/// Lets connections echo, and new ones too, for as long as those beside them need to fill what the kernel takes.
async fn keep_echoing(forward: &Forward, others: &mut [BoxStream]) {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        assert_all_echo(others).await;
        assert_all_echo(&mut forward.echoes(2).await).await;
    }
}

#[tokio::test]
async fn an_end_that_answers_the_applications_is_not_held_back() {
    let scene = Scene::together().await;
    // A channel has only one end for both: it stands for the application's as long as that may still say something.
    for (carriers, most) in EACH.into_iter().zip([700, 700, 1700]) {
        let forward = Forward::start(scene.shop, carriers).await;
        for _ in 0..5 {
            let mut stream = forward.connect(8081).await.unwrap();
            let request = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            within(LIMIT, "an answer", stream.read_u8()).await.unwrap();
            let began = Instant::now();
            // Without it the runtime holds the application's end back for a second.
            stream.shutdown().await.unwrap();
            let mut rest = String::new();
            within(LIMIT, "the end", stream.read_to_string(&mut rest))
                .await
                .unwrap();
            assert!(rest.ends_with("}\n"), "{carriers:?}: {rest}");
            assert!(
                began.elapsed() < Duration::from_millis(most),
                "{carriers:?}: {:?}",
                began.elapsed()
            );
        }
    }
}

#[tokio::test]
async fn an_end_before_the_answer_does_not_cut_it_off() {
    let scene = Scene::together().await;
    for carriers in EACH {
        let forward = Forward::start(scene.shop, carriers).await;
        let mut stream = forward.connect(8081).await.unwrap();
        let request = b"GET /slow?ms=2500 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        within(LIMIT, "the answer", stream.read_to_string(&mut answer))
            .await
            .unwrap();
        let whole = answer.starts_with("HTTP/1.1 200") && answer.ends_with("}\n");
        assert!(whole, "{carriers:?}: {answer}");
    }
}
