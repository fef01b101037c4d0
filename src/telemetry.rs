//! What the program says about itself: log format, level and colour. One line per event on stderr, time in RFC 3339.

mod fields;

use std::cell::{Cell, RefCell};
use std::fmt::{self, Write as _};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::telemetry::fields::Fields;

/// The target of access records, so that `kube_tunnel::access=off` silences exactly them.
pub const ACCESS: &str = "kube_tunnel::access";

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// `time LEVEL message key=value …`, for people.
    #[default]
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("expected text or json".into()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Which events are logged: a level for our own code, or directives in the syntax of `RUST_LOG`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// The text as it was given, for showing the configuration.
    given: String,
    /// The directives it stands for.
    directives: String,
}

impl Default for Filter {
    fn default() -> Self {
        Self::level("info")
    }
}

impl Filter {
    /// Libraries speak up only for what an operator should see; kube's watcher repeats every refusal we already report. `trace`
    /// shows the frames of HTTP/2 besides those of port-forwards.
    fn level(level: &str) -> Self {
        let frames = if level == "trace" { ",h2::codec=debug" } else { "" };
        Self {
            given: level.into(),
            directives: format!("warn,kube_client=error,kube_runtime=error,kube_tunnel={level}{frames}"),
        }
    }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = text.trim().to_ascii_lowercase();
        match level.as_str() {
            "error" | "warn" | "info" | "debug" | "trace" => Ok(Self::level(&level)),
            "warning" => Ok(Self::level("warn")),
            // Libraries are silent, too.
            "off" => Ok(Self {
                given: "off".into(),
                directives: "off".into(),
            }),
            _ if text.contains('=') || text.contains(',') => {
                EnvFilter::try_new(text).map_err(|error| error.to_string())?;
                Ok(Self {
                    given: text.into(),
                    directives: text.into(),
                })
            }
            _ => Err(
                "expected off, error, warn, info, debug, trace or directives such as kube_tunnel=debug,info"
                    .into(),
            ),
        }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.given)
    }
}

/// Settings of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Which events are logged.
    pub filter: Filter,
    /// How they look.
    pub format: Format,
}

thread_local! {
    /// How long ago what this thread logs has happened.
    static AGE: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    /// The second in which that was, and how it is written: most lines of a busy proxy share it with the one before.
    static SECOND: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
}

/// Lets `log` log what happened so long ago.
pub(crate) fn as_of(age: Duration, log: impl FnOnce()) {
    AGE.set(age);
    log();
    AGE.set(Duration::ZERO);
}

/// Prints the time as RFC 3339 in UTC with milliseconds.
#[derive(Debug)]
struct Rfc3339;

impl FormatTime for Rfc3339 {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        write_time(jiff::Timestamp::now() - AGE.get(), w)
    }
}

fn write_time(time: jiff::Timestamp, w: &mut Writer<'_>) -> fmt::Result {
    SECOND.with_borrow_mut(|(second, written)| {
        if *second != time.as_second() {
            written.clear();
            write!(written, "{time:.0}")?;
            written.pop(); // the Z, which comes after the milliseconds
            *second = time.as_second();
        }
        w.write_str(written)
    })?;
    write!(w, ".{:03}Z", time.subsec_millisecond())
}

/// How many lines wait while stderr is not being read; more are lost. It bounds memory because access records are short, whatever
/// clients and pods say.
const WAITING_LINES: usize = 10_000;

/// How much goes to stderr in one write.
const WRITE: usize = 64 << 10;

/// How long lines are gathered after a write. What comes after a pause is written at once.
const PACE: Duration = Duration::from_millis(10);

/// How long the end of the log may take.
const END: Duration = Duration::from_millis(1500);

/// The log's end: dropping it writes what waits, as far as that is possible within a second or two.
#[derive(Debug)]
#[must_use = "the log ends with it"]
pub struct Log {
    /// Taken to end the log before its losses are told.
    writer: Option<WorkerGuard>,
    lost: ErrorCounter,
}

impl Drop for Log {
    fn drop(&mut self) {
        let (writer, lost) = (self.writer.take(), self.lost.clone());
        let (end, ended) = mpsc::channel::<()>();
        // Whoever did not read before may not read the rest either, and must not keep the program from ending.
        let ending = thread::Builder::new().spawn(move || {
            let _end = end;
            drop(writer);
            let lost = lost.dropped_lines();
            if lost > 0 {
                let _ = writeln!(
                    io::stderr(),
                    "{lost} lines of the log were lost: stderr was not read fast enough"
                );
            }
        });
        if ending.is_ok() {
            let _ = ended.recv_timeout(END);
        }
    }
}

/// A writer that takes its time after each flush. The log's thread flushes when nothing waits, and would be woken for each line
/// of a busy proxy, which cost a seventh of its processor time; so it finds many lines when it looks again.
struct Paced<W>(W);

impl<W: Write> Write for Paced<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.0.flush();
        thread::sleep(PACE);
        flushed
    }
}

/// Installs the log for the whole process. Colour only on a terminal, and never when `NO_COLOR` is set (no-color.org).
///
/// A thread of its own writes, so that a terminal that is scrolled back, or a pipe that nobody reads, holds up no request;
/// what is logged at the same time leaves in one write.
pub fn init(config: &Config) -> Log {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let (lines, writer) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(Paced(BufWriter::with_capacity(WRITE, io::stderr())));
    let lost = lines.error_counter();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter.directives))
        .with_timer(Rfc3339)
        // It would be reported with `eprintln!`, which panics when stderr is what cannot be written to.
        .log_internal_errors(false)
        .with_writer(lines)
        .with_ansi(io::stderr().is_terminal() && !no_color);
    // An error means that a log is installed already.
    let _ = match config.format {
        Format::Text => builder.with_target(false).fmt_fields(Fields).try_init(),
        Format::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .try_init(),
    };
    Log {
        writer: Some(writer),
        lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing::level_filters::LevelFilter;

    /// Counts writes, and keeps the bytes.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut sink = self.0.lock().unwrap();
            sink.0 += 1;
            sink.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_of_one_moment_leave_in_few_writes_and_none_is_lost() {
        const LINES: usize = 1000;
        let sink = Sink::default();
        let (mut lines, writer) = NonBlockingBuilder::default()
            .lossy(false)
            .finish(Paced(BufWriter::with_capacity(WRITE, sink.clone())));
        let mut expected = String::new();
        for number in 0..LINES {
            let line = format!("line {number}\n");
            lines.write_all(line.as_bytes()).unwrap();
            // Each by itself, as requests are.
            thread::yield_now();
            expected.push_str(&line);
        }
        drop(writer);
        let sink = sink.0.lock().unwrap();
        assert_eq!(String::from_utf8_lossy(&sink.1), expected);
        assert!(sink.0 < LINES / 4, "{} writes", sink.0);
    }

    #[test]
    fn what_is_logged_late_has_the_time_when_it_happened() {
        let time = || {
            let mut text = String::new();
            Rfc3339.format_time(&mut Writer::new(&mut text)).unwrap();
            text.parse::<jiff::Timestamp>().unwrap()
        };
        let (age, before) = (Duration::from_secs(3600), time());
        let mut late = None;
        as_of(age, || late = Some(time()));
        let (late, after) = (late.unwrap(), time());
        assert!(
            before <= late + age && late + age <= after,
            "{before} {late} {after}"
        );
    }

    #[test]
    fn a_time_is_written_in_full_whatever_was_written_before() {
        for (nanoseconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_795_873_625_987_999_999, "2026-11-28T13:47:05.987Z"),
            (1_795_873_625_004_000_000, "2026-11-28T13:47:05.004Z"),
            (1_795_873_626_000_000_000, "2026-11-28T13:47:06.000Z"),
        ] {
            let (time, mut text) = (
                jiff::Timestamp::from_nanosecond(nanoseconds).unwrap(),
                String::new(),
            );
            write_time(time, &mut Writer::new(&mut text)).unwrap();
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn levels_are_read_in_any_case_and_with_the_alias() {
        for (given, level) in [
            ("INFO", "info"),
            ("Warning", "warn"),
            (" debug ", "debug"),
            ("trace", "trace"),
        ] {
            assert_eq!(given.parse::<Filter>().unwrap(), Filter::level(level), "{given}");
        }
    }

    #[test]
    fn off_silences_everybody() {
        let filter: Filter = "Off".parse().unwrap();
        assert_eq!(filter.to_string(), "off");
        let most = EnvFilter::new(&filter.directives).max_level_hint();
        assert_eq!(most, Some(LevelFilter::OFF));
    }

    #[test]
    fn directives_pass_through_and_nonsense_is_refused() {
        let filter: Filter = "kube_tunnel::proxy=trace,hyper=debug".parse().unwrap();
        assert_eq!(filter.directives, "kube_tunnel::proxy=trace,hyper=debug");
        assert!("loud".parse::<Filter>().is_err());
        assert!("kube_tunnel".parse::<Filter>().is_err());
        assert!("kube_tunnel=loud".parse::<Filter>().is_err());
    }
}
