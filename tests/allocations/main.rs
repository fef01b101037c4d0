//! Moving bytes costs no memory: once a session has grown to what its load needs, further frames allocate nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

mod peer;

use std::time::Duration;

use allocation_counter::measure;
use kube_tunnel::drain::Drain;
use kube_tunnel::k8s::bare::Session;
use kube_tunnel::proxy::relay;
use kube_tunnel::transport::BoxStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::Instant;

use peer::Echo;

/// Rounds until everything has grown, and rounds that are counted.
const WARM_UP: usize = 500;
const ROUNDS: usize = 5000;

/// How long to go on with the warm-up: the session's clock has ticked a few times then, for which it keeps lists.
const TICKS: Duration = Duration::from_millis(500);

/// Sizes of messages: a frame each, but for the last, which takes several and has to wait for room.
const SIZES: [usize; 4] = [1, 1000, 60_000, 400_000];

fn runtime() -> Runtime {
    // One thread, whose allocations are all there are.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Sends so many messages of each size, each when the one before has come back.
async fn echo<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(
    stream: &mut S,
    message: &[u8],
    answer: &mut [u8],
    rounds: usize,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    for _ in 0..rounds {
        let (sent, read) = tokio::join!(writer.write_all(message), reader.read_exact(answer));
        sent.unwrap();
        read.unwrap();
    }
}

/// Sends messages both ways over `streams` at the same time, and counts the allocations after the warm-up.
fn allocations(runtime: &Runtime, streams: &mut [BoxStream], size: usize) -> u64 {
    let message = vec![7; size];
    let mut answers = vec![vec![0; size]; streams.len()];
    let rounds = ROUNDS / (1 + size / 20_000);
    let mut run = |rounds| {
        let mut all: Vec<_> = streams
            .iter_mut()
            .zip(&mut answers)
            .map(|(stream, answer)| Box::pin(echo(stream, &message, answer, rounds)))
            .collect();
        runtime.block_on(async {
            tokio::task::yield_now().await; // a run has a list of its own of those that let others go first
            // In turn, until all are done.
            std::future::poll_fn(|cx| {
                all.retain_mut(|echo| echo.as_mut().poll(cx).is_pending());
                if all.is_empty() {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
        });
    };
    let begun = Instant::now();
    while begun.elapsed() < TICKS {
        run(WARM_UP.min(rounds));
    }
    // The setting up of a run costs as much as one without rounds.
    let fixed = measure(|| run(0)).count_total;
    measure(|| run(rounds)).count_total - fixed
}

#[test]
fn frames_of_a_session_cost_no_allocation() {
    for connections in [1, 4] {
        let runtime = runtime();
        let drain = Drain::new();
        let session = runtime.block_on(async { Session::start(Echo::default(), &drain) });
        let mut streams: Vec<_> = (0..connections).map(|_| session.connect(80)).collect();
        for size in SIZES {
            let count = allocations(&runtime, &mut streams, size);
            assert_eq!(count, 0, "{connections} connections, messages of {size} bytes");
        }
        assert_eq!(session.ended(), None);
    }
}

#[test]
fn carrying_a_clients_bytes_costs_no_allocation() {
    let runtime = runtime();
    let drain = Drain::new();
    let mut client = runtime.block_on(async {
        let session = Session::start(Echo::default(), &drain);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let stream = session.connect(80);
        drain.spawn(async move {
            relay(socket, stream).await.unwrap();
        });
        client
    });
    for size in SIZES {
        let (message, mut answer) = (vec![7; size], vec![0; size]);
        let mut run = |rounds| {
            runtime.block_on(async {
                tokio::task::yield_now().await;
                echo(&mut client, &message, &mut answer, rounds).await;
            });
        };
        let begun = Instant::now();
        while begun.elapsed() < TICKS {
            run(WARM_UP);
        }
        let fixed = measure(|| run(0)).count_total;
        let count = measure(|| run(ROUNDS / 10)).count_total - fixed;
        assert_eq!(count, 0, "messages of {size} bytes");
    }
}
