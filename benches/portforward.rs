//! What a port-forward costs without a cluster: the codec, and bytes through a session and the copy loop to a client, against a
//! server within the connection. `cargo bench`; docs/benchmarks.md tells what it is good for.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step ends the benchmark, and the panic says where"
)]

#[path = "../tests/allocations/peer.rs"]
mod peer;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kube_tunnel::drain::Drain;
use kube_tunnel::k8s::bare::{Codec, Session};
use kube_tunnel::proxy::relay;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use peer::Echo;

/// Payloads of frames and messages.
const SIZES: [usize; 3] = [100, 4 << 10, 64 << 10];

/// Frames in what is encoded or decoded at once.
const FRAMES: u32 = 100;

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let mut out = Vec::new();
    for size in SIZES {
        let payload = vec![7; size];
        group.throughput(Throughput::Bytes(u64::from(FRAMES) * size as u64));
        group.bench_function(format!("encode data of {size}"), |bencher| {
            let mut codec = Codec::default();
            bencher.iter(|| {
                out.clear();
                (0..FRAMES).for_each(|stream| codec.data(&mut out, stream, &payload));
                out.len()
            });
        });
        let (mut codec, mut frames) = (Codec::default(), Vec::new());
        (0..FRAMES).for_each(|stream| codec.data(&mut frames, stream, &payload));
        group.bench_function(format!("decode data of {size}"), |bencher| {
            let mut codec = Codec::default();
            // In the pieces that a session reads.
            bencher.iter(|| {
                let pieces = frames.chunks(64 << 10);
                pieces.map(|piece| codec.decode(piece).1).sum::<usize>()
            });
        });
    }
    group.throughput(Throughput::Elements(u64::from(FRAMES)));
    group.bench_function("encode openings", |bencher| {
        let mut codec = Codec::default();
        bencher.iter(|| {
            out.clear();
            (1..=FRAMES).for_each(|number| codec.open(&mut out, 20 * number + 1, 8080));
            out.len()
        });
    });
    group.bench_function("decode a mixture", |bencher| {
        let mut codec = Codec::default();
        out.clear();
        for number in 0..FRAMES {
            match number % 4 {
                0 => codec.ping(&mut out, 2 * number + 1),
                1 => codec.end(&mut out, number),
                _ => codec.data(&mut out, number, &[7; 1000]),
            }
        }
        bencher.iter(|| codec.decode(&out));
    });
    group.finish();
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, message: &[u8], answer: &mut [u8]) {
    stream.write_all(message).await.unwrap();
    stream.read_exact(answer).await.unwrap();
}

fn session(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let drain = Drain::new();
    let mut direct = runtime.block_on(async { Session::start(Echo::default(), &drain).connect(80) });
    let mut client = runtime.block_on(async {
        let pod = Session::start(Echo::default(), &drain).connect(80);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        drain.spawn(async move {
            relay(socket, pod).await.unwrap();
        });
        client
    });
    let mut group = criterion.benchmark_group("echo");
    for size in SIZES {
        let (message, mut answer) = (vec![7; size], vec![0; size]);
        group.throughput(Throughput::Bytes(2 * size as u64));
        group.bench_function(format!("through a session, {size}"), |bencher| {
            bencher.iter(|| runtime.block_on(echo(&mut direct, &message, &mut answer)));
        });
        group.bench_function(
            format!("through socket, copy loop and session, {size}"),
            |bencher| {
                bencher.iter(|| runtime.block_on(echo(&mut client, &message, &mut answer)));
            },
        );
    }
    group.finish();
}

criterion_group!(benches, codec, session);
criterion_main!(benches);
