//! Who takes the processors while something is measured: contestant, servers, pod and client share them, so what one of them
//! takes is what the others cannot do.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

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
    /// Everybody else, the kernel's own work included.
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

/// Processor seconds by party, from the machine's start or from one moment to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile([f64; PARTIES.len()]);

impl Profile {
    /// Reads what everybody has taken so far (proc(5), `stat`).
    pub(crate) fn now(contestant: u32) -> Result<Self> {
        let mut profile = Self([0.0; PARTIES.len()]);
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            // One that has ended meanwhile counts with the others.
            if let Some(number) = number
                && let Some((name, seconds)) = process(&path)
            {
                profile.0[party(number, &name, contestant) as usize] += seconds;
            }
        }
        let text = fs::read_to_string("/proc/stat")?;
        let all = text.lines().next().context("an empty stat")?;
        let mut all = all.split_whitespace().skip(1).map(|field| field.parse::<f64>());
        let mut next = || {
            all.next()
                .context("a short stat")?
                .context("a stat without numbers")
        };
        let (user, nice, system, idle, wait, hard, soft) =
            (next()?, next()?, next()?, next()?, next()?, next()?, next()?);
        profile.0[Party::Idle as usize] = (idle + wait) / TICKS;
        // What interrupts take is counted to nobody.
        let others = (user + nice + system + hard + soft) / TICKS - profile.busy_but_others();
        profile.0[Party::Others as usize] = others;
        Ok(profile)
    }

    /// Returns what was taken since another moment.
    pub(crate) fn since(self, before: Self) -> Self {
        let mut taken = self;
        taken
            .0
            .iter_mut()
            .zip(before.0)
            .for_each(|(now, before)| *now -= before);
        taken
    }

    /// Returns what one of them took, in seconds.
    pub(crate) fn of(&self, party: Party) -> f64 {
        self.0[party as usize]
    }

    fn busy_but_others(&self) -> f64 {
        let others = [Party::Others, Party::Idle];
        let known = PARTIES.into_iter().filter(|party| !others.contains(party));
        known.map(|party| self.of(party)).sum()
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
