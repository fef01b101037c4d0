//! A great many connections that end at once: nothing of them is left behind, neither here nor in the container runtime.
//! Needs a cluster of `tests/cluster/up`, whose runtime is a process of this machine.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kube_tunnel::k8s::Carriers;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use crate::client::try_fetch;
use crate::command::{eventually, run, within};
use crate::forward::Forward;
use crate::note::note;
use crate::outage::SCRIPT;
use crate::program::Proxy;
use crate::scene::Scene;

/// How many connections each path has to bear.
const CONNECTIONS: &str = "KUBE_TUNNEL_SOAK_CONNECTIONS";
const FEW: usize = 4000;

const AT_ONCE: usize = 32;

/// How often it is looked at what the processes hold; the first part is their warm-up.
const PARTS: usize = 10;

/// Longer than one connection takes.
const LIMIT: Duration = Duration::from_secs(30);

/// When containerd is told once more to write down its stacks.
const AGAIN: Duration = Duration::from_secs(10);

/// What may come and go, or come to stay once: connections that are just ending, sessions that are replaced.
const SPARE_FILES: usize = 20;
/// What containerd holds of connections that are just ending, four for each.
const ENDING_FILES: usize = 4 * AT_ONCE;
const SPARE_THREADS: usize = 20;
const SPARE_GOROUTINES: usize = 50;
const SPARE_TASKS: usize = 8;
const SPARE_MEMORY: usize = 3 << 20;

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    files: usize,
    threads: usize,
    /// Bytes.
    memory: usize,
}

impl Held {
    fn by(process: u32) -> Self {
        let folder = Path::new("/proc").join(process.to_string());
        let status = std::fs::read_to_string(folder.join("status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse::<usize>().unwrap()
        };
        Self {
            files: std::fs::read_dir(folder.join("fd")).unwrap().count(),
            threads: number("Threads:"),
            memory: number("VmRSS:") << 10,
        }
    }

    /// Says it as a part of a row.
    fn row(self) -> String {
        format!(
            "{} files, {} threads, {} MB",
            self.files,
            self.threads,
            self.memory >> 20
        )
    }
}

/// The process of the container runtime.
async fn runtime() -> u32 {
    assert!(
        std::env::var_os("KUBE_TUNNEL_CLUSTER_STATE").is_some(),
        "this test looks at the containerd of a cluster of tests/cluster/up, and KUBE_TUNNEL_CLUSTER_STATE names none; leave \
         it out on other clusters with --skip wear"
    );
    let pid = run(SCRIPT, &["pid", "containerd"]).await.succeeded();
    pid.trim().parse().unwrap()
}

/// Counts the goroutines of containerd, which writes their stacks to a file when it is told to.
async fn goroutines(process: u32) -> usize {
    // The number that it knows itself by (proc(5), `NSpid`).
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let numbers = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    let own = numbers.split_whitespace().last().unwrap();
    let file = format!("/proc/{process}/root/tmp/containerd.{own}.stacks.log");
    drop(std::fs::remove_file(&file));
    let (mut count, mut told) = (0, None::<Instant>);
    eventually("the stacks of containerd", async || {
        // Again, should it be too busy to take notice.
        if told.is_none_or(|at| at.elapsed() > AGAIN) {
            told = Some(Instant::now());
            let kill = Command::new("kill")
                .args(["-USR1", &process.to_string()])
                .status();
            assert!(kill.unwrap().success());
        }
        let text = std::fs::read(&file).unwrap_or_default();
        let found = String::from_utf8_lossy(&text).matches("\ngoroutine ").count();
        let before = std::mem::replace(&mut count, found + 1);
        !text.is_empty() && before == count
    })
    .await;
    drop(std::fs::remove_file(&file));
    count
}

/// Makes connections, several at a time, and returns what both processes held after each part.
async fn wear<F>(path: &str, ours: u32, connect: impl Fn() -> F)
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let total = std::env::var(CONNECTIONS).map_or(FEW, |text| text.parse().unwrap());
    let theirs = runtime().await;
    let (mut held, mut slowest) = (Vec::new(), Duration::ZERO);
    let began = Instant::now();
    for part in 0..PARTS {
        let left = Arc::new(AtomicUsize::new(total / PARTS));
        let mut tasks = JoinSet::new();
        let take = || {
            let taken = left.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            taken.is_ok()
        };
        while tasks.len() < AT_ONCE && take() {
            tasks.spawn(timed(connect()));
        }
        while let Some(done) = tasks.join_next().await {
            slowest = slowest.max(
                done.unwrap()
                    .unwrap_or_else(|error| panic!("{path}, part {part}: {error:#}")),
            );
            if take() {
                tasks.spawn(timed(connect()));
            }
        }
        held.push((
            Held::by(ours),
            Held::by(theirs),
            goroutines(theirs).await,
            alive(),
        ));
    }
    let seconds = began.elapsed().as_secs_f64();
    for (part, (ours, theirs, goroutines, tasks)) in held.iter().enumerate() {
        note(&format!(
            "| {path} | {} | {}, {tasks} tasks | {}, {goroutines} goroutines |",
            total / PARTS * (part + 1),
            ours.row(),
            theirs.row()
        ));
    }
    note(&format!(
        "{path}: {total} connections, none failed; {:.0} per second, the slowest {} ms",
        total as f64 / seconds,
        slowest.as_millis()
    ));
    let (warm, last) = (held[1], held[PARTS - 1]);
    for (what, warm, last, spare) in [
        ("we", warm.0, last.0, SPARE_FILES),
        ("containerd", warm.1, last.1, SPARE_FILES + ENDING_FILES),
    ] {
        assert!(last.files <= warm.files + spare, "{what}: files stay open");
        assert!(
            last.threads <= warm.threads + SPARE_THREADS,
            "{what}: threads stay"
        );
    }
    // Of each stream containerd keeps a little for as long as its session lives.
    assert!(last.0.memory <= warm.0.memory + SPARE_MEMORY, "we grow");
    assert!(last.2 <= warm.2 + SPARE_GOROUTINES, "containerd keeps goroutines");
    assert!(last.3 <= warm.3 + SPARE_TASKS, "we keep tasks");
}

/// The tasks of this process.
fn alive() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

async fn timed(connection: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    within(LIMIT, "a short connection", connection).await?;
    Ok(began.elapsed())
}

#[tokio::test]
async fn short_connections_to_a_port_leave_nothing_behind() {
    let scene = Scene::alone().await;
    let forward = Arc::new(Forward::start(scene.shop, Carriers::Auto).await);
    let connect = || {
        let forward = forward.clone();
        async move {
            let mut stream = forward.connect(8081).await?;
            let request = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await?;
            anyhow::ensure!(stream.read_u8().await? == b'H', "no answer");
            stream.shutdown().await?;
            stream.read_to_end(&mut Vec::new()).await?;
            Ok(())
        }
    };
    wear("raw", std::process::id(), connect).await;
}

#[tokio::test]
async fn short_connections_of_http_leave_nothing_behind() {
    let scene = Scene::alone().await;
    // The pod ends its connection with the answer, so that each takes another.
    let proxy = Proxy::start().await;
    let host = format!("{}:8081", scene.shop.host("multi"));
    let (address, path) = (proxy.address, "/last");
    let connect = || {
        let host = host.clone();
        async move {
            let reply = try_fetch(address, &host, path).await?;
            anyhow::ensure!(reply.status == 200, "{} {}", reply.status, reply.text());
            Ok(())
        }
    };
    wear("HTTP", proxy.process(), connect).await;
}
