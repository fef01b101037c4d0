//! What is aimed at, and by how much it is missed.

use std::fmt;

use crate::report::{Measure, Results, short};

/// Places of the contestants that have targets.
const PROXY: usize = 0;
const RAW: usize = 1;

/// One figure that has to be good enough.
struct Target {
    what: &'static str,
    case: &'static str,
    measure: Measure,
    /// Whose figure.
    whose: &'static [usize],
    bound: Bound,
}

/// What is good enough.
enum Bound {
    /// At least so many times what kubectl does.
    AtLeast(f64),
    /// At most so many times what kubectl takes.
    AtMost(f64),
    /// At most so many times the same figure of another case.
    Times(f64, &'static str),
    /// At most so much more than the same figure of another case.
    Beyond(f64, &'static str),
}

use Bound::{AtLeast, AtMost, Beyond, Times};
use Measure::{Bytes, P50, P99, ProcessorPerGib, Rate};

const fn target(
    what: &'static str,
    case: &'static str,
    measure: Measure,
    whose: &'static [usize],
    bound: Bound,
) -> Target {
    Target {
        what,
        case,
        measure,
        whose,
        bound,
    }
}

const BOTH: &[usize] = &[PROXY, RAW];

const TARGETS: &[Target] = &[
    target("GET, 1 connection, p50", "get-1", P50, BOTH, AtMost(0.75)),
    target(
        "GET, 16 connections, per second",
        "get-16",
        Rate,
        BOTH,
        AtLeast(1.6),
    ),
    target(
        "GET, 256 connections, per second",
        "get-256",
        Rate,
        BOTH,
        AtLeast(2.0),
    ),
    target(
        "GET, a new connection each, per second",
        "get-new",
        Rate,
        &[PROXY],
        AtLeast(8.0),
    ),
    target(
        "TCP, new connections per second",
        "connect",
        Rate,
        &[RAW],
        AtLeast(1.7),
    ),
    target(
        "connect to first byte at +100 ms, p50",
        "first-byte-100",
        P50,
        BOTH,
        Beyond(105.0, "first-byte-0"),
    ),
    target("download, 1 stream, MB/s", "down-1", Bytes, BOTH, AtLeast(1.4)),
    target("download, 8 streams, MB/s", "down-8", Bytes, BOTH, AtLeast(1.4)),
    target("upload, 1 stream, MB/s", "up-1", Bytes, BOTH, AtLeast(1.4)),
    target("upload, 8 streams, MB/s", "up-8", Bytes, BOTH, AtLeast(1.4)),
    target(
        "download, CPU per GiB",
        "down-1",
        ProcessorPerGib,
        BOTH,
        AtMost(0.4),
    ),
    target("upload, CPU per GiB", "up-1", ProcessorPerGib, BOTH, AtMost(0.4)),
    target(
        "ping-pong beside a download, p99",
        "ping-down",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside an upload, p99",
        "ping-up",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside a download of 32 MB/s, p99",
        "ping-paced-down",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside an upload of 32 MB/s, p99",
        "ping-paced-up",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside a stalled reader, p99",
        "ping-reader",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside a stalled reader of the same age, p99",
        "ping-twin",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside a stalled app, p99",
        "ping-app",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside 20 stalled readers, p99",
        "ping-20-readers",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside 20 downloads, p99",
        "ping-20-down",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside 20 uploads, p99",
        "ping-20-up",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
    target(
        "ping-pong beside 20 stalled uploads, p99",
        "ping-20-stuck",
        P99,
        &[RAW],
        Times(2.0, "ping-quiet"),
    ),
];

/// Prints the targets that the measured cases have.
pub(crate) fn print(results: &Results, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(f, "| figure | target | proxy | raw |\n|---|---|---|---|")?;
    for target in TARGETS {
        let verdicts = [PROXY, RAW].map(|which| verdict(results, target, which));
        if verdicts.iter().all(String::is_empty) {
            continue;
        }
        let [proxy, raw] = verdicts;
        writeln!(f, "| {} | {} | {proxy} | {raw} |", target.what, target.bound)?;
    }
    writeln!(f)
}

fn verdict(results: &Results, target: &Target, which: usize) -> String {
    if !target.whose.contains(&which) {
        return String::new();
    }
    let measure = target.measure;
    let other = |case| {
        Some((
            results.median(target.case, measure, which)?,
            results.median(case, measure, which)?,
        ))
    };
    let found = match target.bound {
        AtLeast(_) | AtMost(_) => results.ratio(target.case, measure, which),
        Times(_, case) => other(case).map(|(figure, base)| figure / base),
        Beyond(_, case) => other(case).map(|(figure, base)| figure - base),
    };
    let Some(found) = found else {
        return String::new();
    };
    let (met, unit) = match target.bound {
        AtLeast(bound) => (found >= bound, "x"),
        AtMost(bound) | Times(bound, _) => (found <= bound, "x"),
        Beyond(bound, _) => (found <= bound, " ms"),
    };
    let missed = if met {
        String::new()
    } else {
        format!(", missed by {}", missed(&target.bound, found))
    };
    format!("{}{unit}{missed}", short(found))
}

/// How much of the bound is missing, or too much.
fn missed(bound: &Bound, found: f64) -> String {
    match bound {
        AtLeast(bound) => format!("{:.0} %", (1.0 - found / bound) * 100.0),
        AtMost(bound) | Times(bound, _) => format!("{:.0} %", (found / bound - 1.0) * 100.0),
        Beyond(bound, _) => format!("{} ms", short(found - bound)),
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AtLeast(times) => write!(f, "≥ {times}x kubectl"),
            AtMost(times) => write!(f, "≤ {times}x kubectl"),
            Times(times, _) => write!(f, "≤ {times}x quiet"),
            Beyond(more, _) => write!(f, "≤ {more} ms more than at +0 ms"),
        }
    }
}
