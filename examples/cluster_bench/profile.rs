//! Who takes the processors while something is measured: contestant, servers, pod and client share them, so what one of them
//! takes is what the others cannot do.

use std::fmt;
use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use anyhow::Result;
use tokio::time::Instant;

/// The kernel's unit of processor time in `/proc`, per second (time(7), `USER_HZ`).
const TICKS: f64 = 100.0;

/// Those that share the processors, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Party {
    Contestant,
    ApiServer,
    Kubelet,
    Runtime,
    Pod,
    Client,
    /// Every other process.
    Others,
    Idle,
}

pub(crate) const PARTIES: [Party; 8] = [
    Party::Contestant,
    Party::ApiServer,
    Party::Kubelet,
    Party::Runtime,
    Party::Pod,
    Party::Client,
    Party::Others,
    Party::Idle,
];

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Contestant => "itself",
            Self::ApiServer => "API server",
            Self::Kubelet => "kubelet",
            Self::Runtime => "containerd",
            Self::Pod => "pod",
            Self::Client => "client",
            Self::Others => "others",
            Self::Idle => "idle",
        })
    }
}

/// Processor seconds by party, since the start of each process or from one moment to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile {
    seconds: [f64; PARTIES.len()],
    at: Instant,
}

impl Profile {
    /// Reads what everybody has taken so far (proc(5), `stat`).
    pub(crate) fn now(contestant: u32) -> Result<Self> {
        let mut profile = Self {
            seconds: [0.0; PARTIES.len()],
            at: Instant::now(),
        };
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(number) = number
                && let Some((name, seconds)) = process(&path)
            {
                profile.seconds[party(number, &name, contestant) as usize] += seconds;
            }
        }
        Ok(profile)
    }

    /// Returns what was taken since another moment.
    pub(crate) fn since(self, before: Self) -> Result<Self> {
        let mut taken = self;
        for (now, before) in taken.seconds.iter_mut().zip(before.seconds) {
            // A process may have ended.
            *now = (*now - before).max(0.0);
        }
        let there_was = (self.at - before.at).as_secs_f64() * available_parallelism()?.get() as f64;
        taken.seconds[Party::Idle as usize] = (there_was - taken.seconds.iter().sum::<f64>()).max(0.0);
        Ok(taken)
    }

    /// Returns what one of them took, in seconds.
    pub(crate) fn of(&self, party: Party) -> f64 {
        self.seconds[party as usize]
    }
}

fn party(number: u32, name: &str, contestant: u32) -> Party {
    match name {
        _ if number == contestant => Party::Contestant,
        _ if number == std::process::id() => Party::Client,
        "kube-apiserver" => Party::ApiServer,
        "kubelet" => Party::Kubelet,
        "server" => Party::Pod,
        _ if name.starts_with("containerd") => Party::Runtime,
        _ => Party::Others,
    }
}

/// Returns a process's name and what it has taken, unless it has ended.
fn process(path: &Path) -> Option<(String, f64)> {
    let text = fs::read_to_string(path.join("stat")).ok()?;
    let (name, fields) = text.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((name.to_owned(), (ticks()? + ticks()?) / TICKS))
}
