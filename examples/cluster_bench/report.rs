//! Collects figures and prints them as tables in Markdown: first what was aimed at, then all medians, ratios first.

use std::collections::BTreeMap;
use std::fmt;
use std::thread::available_parallelism;

use crate::cases::{CASES, Case};
use crate::contestant::Contestant;
use crate::profile::{PARTIES, Party};
use crate::targets;

/// What one measurement found.
pub(crate) type Figures = Vec<(Measure, f64)>;

/// What is measured, in the order of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Measure {
    /// Median latency.
    P50,
    /// Latency that one of a hundred exceeds.
    P99,
    /// The longest latency: pings come one after the other, so however long a stall is, it is one latency of many.
    Worst,
    /// Exchanges per second.
    Rate,
    /// Megabytes (10^6) per second.
    Bytes,
    /// The same in the slowest of several directions at once.
    SlowestBytes,
    /// The contestant's processor time per 10,000 exchanges.
    ProcessorPerRequests,
    /// The contestant's processor time per GiB.
    ProcessorPerGib,
    /// Resident memory at rest.
    MemoryIdle,
    /// Resident memory with that many open connections.
    MemoryOpen(usize),
    /// Time from where an answer is possible again to the first one.
    Recovery,
    /// Processor time of one of those that share the machine, per 10,000 exchanges or per GiB; in a table of its own.
    Share(Party),
    /// Exchanges that failed; not shown where none did.
    Failed,
    /// Neighbours that ended before the measurement; not shown where none did.
    Left,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::P50 => "p50, ms",
            Self::P99 => "p99, ms",
            Self::Worst => "worst, ms",
            Self::Rate => "per second",
            Self::Bytes => "MB/s",
            Self::SlowestBytes => "MB/s of the slower direction",
            Self::ProcessorPerRequests => "CPU s per 10,000",
            Self::ProcessorPerGib => "CPU s per GiB",
            Self::MemoryIdle => "idle, MiB",
            Self::MemoryOpen(count) => return write!(f, "{count} connections, MiB"),
            Self::Recovery => "s until it answers again",
            Self::Share(party) => return write!(f, "CPU s of {party}"),
            Self::Failed => "failed",
            Self::Left => "neighbours that left",
        })
    }
}

/// The figures of all rounds.
#[derive(Debug)]
pub(crate) struct Results {
    contestants: Vec<Contestant>,
    /// By case, measure and the contestant's place, then by round.
    figures: BTreeMap<(&'static str, Measure, usize), BTreeMap<usize, f64>>,
    /// What could not be measured.
    failures: Vec<String>,
}

impl Results {
    /// Makes an empty collection.
    pub(crate) fn new(contestants: &[Contestant]) -> Self {
        Self {
            contestants: contestants.to_vec(),
            figures: BTreeMap::new(),
            failures: Vec::new(),
        }
    }

    /// Adds one measurement, and says it on the way.
    pub(crate) fn add(&mut self, case: &Case, round: usize, which: usize, figures: Figures) {
        for (measure, figure) in figures {
            if !matches!(measure, Measure::Share(_)) {
                tell(&format!(
                    "  {}: {measure}: {}",
                    self.contestants[which],
                    short(figure)
                ));
            }
            let key = (case.name, measure, which);
            self.figures.entry(key).or_default().insert(round, figure);
        }
    }

    /// Adds a measurement that was not to be had.
    pub(crate) fn fail(&mut self, what: String) {
        tell(&format!("  {what}"));
        self.failures.push(what);
    }

    /// Says whether there is nothing to show.
    pub(crate) fn is_empty(&self) -> bool {
        self.figures.is_empty()
    }

    /// Returns the median of a contestant's rounds; of the worst there was, the worst.
    pub(crate) fn median(&self, case: &str, measure: Measure, which: usize) -> Option<f64> {
        let figures = self.rounds(case, measure, which)?.values().copied();
        match measure {
            Measure::Worst => figures.max_by(f64::total_cmp),
            _ => middle(figures),
        }
    }

    /// Returns the median of the ratios to kubectl in the same round: between rounds the machine itself may get faster or slower.
    pub(crate) fn ratio(&self, case: &str, measure: Measure, which: usize) -> Option<f64> {
        if measure == Measure::Worst {
            return Some(self.median(case, measure, which)? / self.median(case, measure, self.kubectl())?);
        }
        let kubectl = self.rounds(case, measure, self.kubectl())?;
        let figures = self.rounds(case, measure, which)?;
        let ratios = figures
            .iter()
            .filter_map(|(round, figure)| Some(figure / kubectl.get(round)?));
        middle(ratios.filter(|ratio| ratio.is_finite()))
    }

    fn rounds(&self, case: &str, measure: Measure, which: usize) -> Option<&BTreeMap<usize, f64>> {
        let rounds = self
            .figures
            .iter()
            .find(|((name, known, place), _)| *name == case && *known == measure && *place == which);
        rounds.map(|(_, rounds)| rounds)
    }

    /// Prints who took the processors, and how many times kubectl's rate would be left to a contestant that took nothing.
    fn print_shares(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shares = |case: &Case, which| {
            let share = |party| self.median(case.name, Measure::Share(party), which);
            PARTIES.map(share).into_iter().collect::<Option<Vec<_>>>()
        };
        let mut begun = false;
        for case in CASES {
            for (which, contestant) in self.contestants.iter().enumerate() {
                let Some(shares) = shares(case, which) else {
                    continue;
                };
                if !std::mem::replace(&mut begun, true) {
                    write!(f, "\n| CPU s per 10,000, or per GiB | with |")?;
                    PARTIES.iter().try_for_each(|party| write!(f, " {party} |"))?;
                    writeln!(f, " ÷ kubectl | if itself took none |")?;
                    writeln!(f, "|---|---|{}", "---|".repeat(PARTIES.len() + 2))?;
                }
                write!(f, "| {} | {contestant} |", case.what)?;
                shares
                    .iter()
                    .try_for_each(|share| write!(f, " {} |", short(*share)))?;
                let ratio = [Measure::Rate, Measure::Bytes]
                    .into_iter()
                    .find_map(|measure| self.ratio(case.name, measure, which));
                let share = |party| self.median(case.name, Measure::Share(party), which);
                match (ratio, share(Party::Contestant), share(Party::Idle)) {
                    (Some(ratio), Some(itself), Some(idle)) => {
                        let without = Without {
                            ratio,
                            all: shares.iter().sum(),
                            itself,
                            idle,
                        };
                        writeln!(f, " {}x | {without} |", short(ratio))?;
                    }
                    _ => writeln!(f, " | |")?,
                }
            }
        }
        Ok(())
    }

    fn kubectl(&self) -> usize {
        let kubectl = |one: &Contestant| matches!(one, Contestant::Kubectl);
        self.contestants.iter().position(kubectl).unwrap_or(0)
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        targets::print(self, f)?;
        let all = 0..self.contestants.len();
        let others: Vec<_> = all.clone().filter(|which| *which != self.kubectl()).collect();
        write!(f, "| case | measure |")?;
        for which in &others {
            write!(f, " {} ÷ kubectl |", self.contestants[*which])?;
        }
        for contestant in &self.contestants {
            write!(f, " {contestant} |")?;
        }
        writeln!(
            f,
            "\n|---|---|{}",
            "---|".repeat(others.len() + self.contestants.len())
        )?;
        for case in CASES {
            let mut measures: Vec<_> = self
                .figures
                .keys()
                .filter(|(name, ..)| *name == case.name)
                .map(|(_, measure, _)| *measure)
                .filter(|measure| !matches!(measure, Measure::Share(_)))
                .collect();
            measures.dedup();
            for measure in measures {
                write!(f, "| {} | {measure} |", case.what)?;
                for which in &others {
                    match self.ratio(case.name, measure, *which) {
                        Some(ratio) => write!(f, " {}x |", short(ratio))?,
                        None => write!(f, " |")?,
                    }
                }
                for which in all.clone() {
                    let figure = self.median(case.name, measure, which);
                    write!(f, " {} |", figure.map(short).unwrap_or_default())?;
                }
                writeln!(f)?;
            }
        }
        self.print_shares(f)?;
        for failure in &self.failures {
            writeln!(f, "\nNot measured: {}", failure.replace('\n', " "))?;
        }
        Ok(())
    }
}

/// How many times kubectl's rate would be left if the contestant took nothing.
struct Without {
    ratio: f64,
    /// Processor time there was, with what nobody took.
    all: f64,
    itself: f64,
    idle: f64,
}

/// Where this part of the processors is idle, more than one of them does not always find work.
const IDLE: f64 = 0.1;

impl fmt::Display for Without {
    /// Where all processors are busy, what the contestant takes is what the others lack. Where they are not, the work is done one
    /// thing after the other, and all of that time may be saved: then both are told.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let saved = |itself: f64| short(self.ratio * self.all / (self.all - itself));
        write!(f, "{}x", saved(self.itself))?;
        if self.idle > IDLE * self.all {
            let processors = available_parallelism().map_or(1, usize::from) as f64;
            write!(f, " to {}x", saved(processors * self.itself))?;
        }
        Ok(())
    }
}

/// Returns the middle one, of an even number the mean of the two.
fn middle(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let upper = figures.get(figures.len() / 2)?;
    let lower = figures.get((figures.len() - 1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

/// Writes three digits, and what never came as such.
pub(crate) fn short(figure: f64) -> String {
    match figure.abs() {
        size if size.is_infinite() => "never".to_owned(),
        100.0.. => format!("{figure:.0}"),
        10.0.. => format!("{figure:.1}"),
        0.1.. => format!("{figure:.2}"),
        _ => format!("{figure:.3}"),
    }
}

fn tell(text: &str) {
    eprintln!("{text}");
}
