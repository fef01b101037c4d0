//! What is measured.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bulk::{self, Way};
use crate::contestant::{Contestant, Running};
use crate::delay::Delayed;
use crate::load::{Ask, Load, lines, repeat, settle};
use crate::pingpong::{self, Beside, Neighbour};
use crate::profile::{PARTIES, Party, Profile};
use crate::recovery::Disturbance;
use crate::report::{Figures, Measure};
use crate::{Settings, memory};

/// One case, in all rounds and with all contestants.
#[derive(Debug)]
pub(crate) struct Case {
    /// What `--cases` chooses by.
    pub(crate) name: &'static str,
    /// What the tables say.
    pub(crate) what: &'static str,
    pub(crate) kind: Kind,
}

/// What a case does.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Small GETs on that many connections.
    Get(usize),
    /// Small GETs, each over a new connection, that many at a time.
    GetNew(usize),
    /// One byte there and back over a new connection, that many at a time.
    Connect(usize),
    /// A small GET over a new connection, one at a time, the API server that many milliseconds away.
    FirstByte(u64),
    /// Many bytes in these directions at once, over that many streams in each.
    Bulk(&'static [Way], usize),
    /// 16 bytes there and back beside something else.
    PingPong(Beside),
    /// Resident memory with that many connections of clients; without a number, with as many as `--many` says.
    Memory(Option<usize>),
    Recovery(Disturbance),
}

/// What a paced transfer moves in a second, in bytes: several times what a video needs, and a tenth of what all goes at most.
const PACE: u64 = 32_000_000;

const fn case(name: &'static str, what: &'static str, kind: Kind) -> Case {
    Case { name, what, kind }
}

/// All cases, in the order of the tables.
pub(crate) const CASES: &[Case] = &[
    case("get-1", "GET, 1 connection", Kind::Get(1)),
    case("get-16", "GET, 16 connections", Kind::Get(16)),
    case("get-256", "GET, 256 connections", Kind::Get(256)),
    case(
        "get-new",
        "GET, a new connection each, 8 at a time",
        Kind::GetNew(8),
    ),
    case(
        "connect",
        "TCP, connect and echo 1 byte, 8 at a time",
        Kind::Connect(8),
    ),
    case("first-byte-0", "connect to first byte, +0 ms", Kind::FirstByte(0)),
    case(
        "first-byte-20",
        "connect to first byte, +20 ms",
        Kind::FirstByte(20),
    ),
    case(
        "first-byte-100",
        "connect to first byte, +100 ms",
        Kind::FirstByte(100),
    ),
    case("down-1", "download, 1 stream", Kind::Bulk(&[Way::Down], 1)),
    case("down-8", "download, 8 streams", Kind::Bulk(&[Way::Down], 8)),
    case("up-1", "upload, 1 stream", Kind::Bulk(&[Way::Up], 1)),
    case("up-8", "upload, 8 streams", Kind::Bulk(&[Way::Up], 8)),
    case(
        "both-1",
        "download and upload, 1 stream each",
        Kind::Bulk(&[Way::Down, Way::Up], 1),
    ),
    case(
        "both-4",
        "download and upload, 4 streams each",
        Kind::Bulk(&[Way::Down, Way::Up], 4),
    ),
    case("ping-quiet", "ping-pong, quiet", Kind::PingPong(Beside::Quiet)),
    case(
        "ping-down",
        "ping-pong beside a download",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Down, None), 1)),
    ),
    case(
        "ping-up",
        "ping-pong beside an upload",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Up, None), 1)),
    ),
    case(
        "ping-down-elsewhere",
        "ping-pong beside a download of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Down, None), 1)),
    ),
    case(
        "ping-up-elsewhere",
        "ping-pong beside an upload of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Up, None), 1)),
    ),
    case(
        "ping-paced-down",
        "ping-pong beside a download of 32 MB/s",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Down, Some(PACE)), 1)),
    ),
    case(
        "ping-paced-up",
        "ping-pong beside an upload of 32 MB/s",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Up, Some(PACE)), 1)),
    ),
    case(
        "ping-reader",
        "ping-pong beside a stalled reader",
        Kind::PingPong(Beside::Here(Neighbour::StalledReader, 1)),
    ),
    case(
        "ping-twin",
        "ping-pong beside a stalled reader of the same age",
        Kind::PingPong(Beside::Twin(Neighbour::StalledReader)),
    ),
    case(
        "ping-app",
        "ping-pong beside a stalled app",
        Kind::PingPong(Beside::Here(Neighbour::StalledUpload, 1)),
    ),
    case(
        "ping-20-readers",
        "ping-pong beside 20 stalled readers",
        Kind::PingPong(Beside::Here(Neighbour::StalledReader, 20)),
    ),
    case(
        "ping-20-elsewhere",
        "ping-pong beside 20 stalled readers of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::StalledReader, 20)),
    ),
    case(
        "ping-2-down",
        "ping-pong beside 2 downloads",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Down, None), 2)),
    ),
    case(
        "ping-2-down-elsewhere",
        "ping-pong beside 2 downloads of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Down, None), 2)),
    ),
    case(
        "ping-2-up",
        "ping-pong beside 2 uploads",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Up, None), 2)),
    ),
    case(
        "ping-2-up-elsewhere",
        "ping-pong beside 2 uploads of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Up, None), 2)),
    ),
    case(
        "ping-20-down",
        "ping-pong beside 20 downloads",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Down, None), 20)),
    ),
    case(
        "ping-20-down-elsewhere",
        "ping-pong beside 20 downloads of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Down, None), 20)),
    ),
    case(
        "ping-20-up",
        "ping-pong beside 20 uploads",
        Kind::PingPong(Beside::Here(Neighbour::Bulk(Way::Up, None), 20)),
    ),
    case(
        "ping-20-up-elsewhere",
        "ping-pong beside 20 uploads of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::Bulk(Way::Up, None), 20)),
    ),
    // After the other pings: the pod never reads, so it never notices an end, and keeps these connections for good.
    case(
        "ping-20-stuck",
        "ping-pong beside 20 stalled uploads",
        Kind::PingPong(Beside::Here(Neighbour::StalledUpload, 20)),
    ),
    case(
        "ping-20-stuck-elsewhere",
        "ping-pong beside 20 stalled uploads of another process",
        Kind::PingPong(Beside::Elsewhere(Neighbour::StalledUpload, 20)),
    ),
    case("memory", "memory", Kind::Memory(None)),
    case("memory-10000", "memory", Kind::Memory(Some(10_000))),
    case(
        "recovery-restart",
        "restart of the API server",
        Kind::Recovery(Disturbance::Restart),
    ),
    case(
        "recovery-pod",
        "another pod of the same name",
        Kind::Recovery(Disturbance::Replacement),
    ),
    case(
        "recovery-silence",
        "connections to the API server fall silent",
        Kind::Recovery(Disturbance::BlackHole),
    ),
];

/// Connections that the node is asked to hold: each costs the container runtime two threads and four descriptors, and Go ends
/// a program with 10,000 threads, hence containerd with half as many connections.
const NODE_HOLDS: usize = 1000;

impl Case {
    /// Says whether a contestant can take part.
    pub(crate) fn takes(&self, contestant: &Contestant, settings: &Settings) -> bool {
        let proxy = matches!(contestant, Contestant::Proxy);
        match self.kind {
            // The proxy speaks HTTP only.
            Kind::Connect(_) | Kind::PingPong(_) => !proxy,
            // It is the only one that does not need a connection to the pod for each client's.
            Kind::Memory(many) => proxy || many.unwrap_or(settings.many) <= NODE_HOLDS,
            _ => true,
        }
    }
}

/// Measures one case with a newly started contestant.
pub(crate) async fn run(case: &Case, contestant: &Contestant, settings: &Settings) -> Result<Figures> {
    let delayed = match case.kind {
        Kind::FirstByte(milliseconds) => Some(Delayed::start(Duration::from_millis(milliseconds))?),
        _ => None,
    };
    let ports: &[u16] = match case.kind {
        Kind::PingPong(_) => &pingpong::PORTS,
        Kind::Connect(_) => &[9000],
        _ => &[8080],
    };
    let kubeconfig = delayed.as_ref().map(Delayed::kubeconfig);
    let running = contestant
        .start(&settings.namespace, ports, kubeconfig.as_deref())
        .await?;
    let other = match case.kind {
        Kind::PingPong(Beside::Elsewhere(..)) => {
            Some(contestant.start(&settings.namespace, ports, None).await?)
        }
        _ => None,
    };
    measure(&case.kind, &running, other.as_ref().unwrap_or(&running), settings).await
}

/// `other`: where the neighbours go.
async fn measure(kind: &Kind, running: &Running, other: &Running, settings: &Settings) -> Result<Figures> {
    let host = &running.host;
    Ok(match *kind {
        Kind::Get(count) => exchanges(running, &Ask::get(host, true), count, settings.time, true).await?,
        Kind::GetNew(count) => exchanges(running, &Ask::get(host, false), count, settings.time, true).await?,
        Kind::Connect(count) => exchanges(running, &Ask::echo(1, false), count, settings.time, true).await?,
        Kind::FirstByte(_) => exchanges(running, &Ask::get(host, false), 1, settings.time, false).await?,
        Kind::Bulk(ways, streams) => {
            let moved = bulk::run(running, ways, streams, settings.time).await?;
            let mut figures = vec![
                (Measure::Bytes, moved.rate / 1e6),
                (
                    Measure::ProcessorPerGib,
                    moved.profile.of(Party::Contestant) / moved.amount,
                ),
            ];
            if ways.len() > 1 {
                figures.push((Measure::SlowestBytes, moved.slowest / 1e6));
            }
            figures.extend(shares(&moved.profile, moved.amount));
            figures
        }
        Kind::PingPong(beside) => {
            let pings = pingpong::run(running, other, beside, settings.time).await?;
            let mut figures = latencies(&pings.load);
            figures.push((Measure::Worst, pings.load.percentile(1.0)));
            // It went on over another connection, or beside fewer than it says.
            for (measure, count) in [(Measure::Failed, pings.load.failed), (Measure::Left, pings.left)] {
                if count > 0 {
                    figures.push((measure, count as f64));
                }
            }
            figures
        }
        Kind::Memory(many) => {
            let count = many.unwrap_or(settings.many);
            let (idle, open) = memory::run(running, count).await?;
            let mut figures = vec![(Measure::MemoryOpen(count), open)];
            if many.is_none() {
                figures.push((Measure::MemoryIdle, idle));
            }
            figures
        }
        Kind::Recovery(_) => anyhow::bail!("all contestants recover together"),
    })
}

async fn exchanges(
    running: &Running,
    ask: &Ask,
    count: usize,
    time: Duration,
    rates: bool,
) -> Result<Figures> {
    let mut lines = lines(running.address(0), ask, count).await?;
    settle(&mut lines).await?;
    let before = running.profile()?;
    let load = repeat(lines, time).await;
    let profile = running.profile()?.since(before)?;
    ensure!(
        load.failed * 100 <= load.answered,
        "{} of {} exchanges failed",
        load.failed,
        load.answered + load.failed
    );
    let mut figures = latencies(&load);
    if rates {
        figures.push((Measure::Rate, load.rate()));
        let amount = load.answered as f64 / 1e4;
        figures.push((
            Measure::ProcessorPerRequests,
            profile.of(Party::Contestant) / amount,
        ));
        figures.extend(shares(&profile, amount));
    }
    if load.failed > 0 {
        figures.push((Measure::Failed, load.failed as f64));
    }
    Ok(figures)
}

/// What each took of the processors for each unit of `amount`.
fn shares(profile: &Profile, amount: f64) -> impl Iterator<Item = (Measure, f64)> {
    PARTIES
        .into_iter()
        .map(move |party| (Measure::Share(party), profile.of(party) / amount))
}

fn latencies(load: &Load) -> Figures {
    vec![
        (Measure::P50, load.percentile(0.5)),
        (Measure::P99, load.percentile(0.99)),
    ]
}
