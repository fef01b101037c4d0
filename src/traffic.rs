//! What happened to each request: one [`AccessRecord`], filled on the way and emitted soon after it is dropped, so that no path
//! can forget it. Log, metrics and dashboard all have it from here.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::info;

use crate::drain::Drain;
use crate::name::ServiceName;
use crate::registry::PodRef;
use crate::telemetry::{self, ACCESS};

/// How long records wait for others. To put one into words takes a tenth of a small request's processor time, most of it for code
/// that is not in the caches; it takes half as much where many are put into words at a time, and no client waits meanwhile.
const PACE: Duration = Duration::from_millis(10);

/// How many wait at most; who brings one more emits them.
const MOST_WAITING: usize = 1024;

/// How many bytes of what a client or a pod says a record shows. A path may have 60 kB, and thousands of records wait in memory
/// while nobody reads the log.
const LONGEST: usize = 2 << 10;

/// Bytes of a body that have passed so far. There is nothing to count until it is [shared](Self::share) with whoever passes them.
#[derive(Debug, Clone, Default)]
pub struct ByteCount(Option<Arc<AtomicU64>>);

impl ByteCount {
    /// Returns another handle of the same count.
    #[must_use]
    pub fn share(&mut self) -> Self {
        Self(Some(self.0.get_or_insert_default().clone()))
    }

    /// Adds `bytes`, if it is shared.
    pub fn add(&self, bytes: usize) {
        if let Some(count) = &self.0 {
            count.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Returns the sum so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.as_ref().map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

/// How the exchange ended for the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Outcome {
    /// The client left before the response was complete.
    #[default]
    Abandoned,
    /// The response was cut off because the upstream side failed in its middle.
    Broken,
    /// The client has the whole response.
    Complete,
}

/// Opens the records of a proxy's requests, and emits those that have ended. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct AccessLog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// How many requests there were.
    requests: AtomicU64,
    ended: Mutex<Ended>,
    /// Rung when the first of them has come.
    bell: Notify,
}

/// Records that wait to be emitted.
#[derive(Debug, Default)]
struct Ended {
    records: Vec<(Box<AccessRecord>, Instant)>,
    /// Whether anybody comes for them.
    expected: bool,
}

impl AccessLog {
    /// Opens the record of the next request, of which nothing is known but what its head says.
    #[must_use]
    pub fn open(
        &self,
        client: SocketAddr,
        downstream: &'static str,
        method: Method,
        path: String,
    ) -> OpenRecord {
        let request = self.0.requests.fetch_add(1, Ordering::Relaxed) + 1;
        OpenRecord {
            record: Some(AccessRecord::new(request, client, downstream, method, path)),
            log: self.clone(),
        }
    }

    /// Emits records until `drain` starts. Those that end before this or after it are emitted at once, so that what is said of the
    /// end of all comes last.
    pub async fn run(self, drain: Drain) {
        self.lock().expected = true;
        // However this ends, nothing is left.
        let last = Last(self);
        let pace = async {
            loop {
                last.0.0.bell.notified().await;
                tokio::time::sleep(PACE).await;
                last.0.emit();
            }
        };
        tokio::select! {
            () = drain.started() => {}
            () = pace => {}
        }
    }

    fn take(&self, record: Box<AccessRecord>) {
        let mut ended = self.lock();
        ended.records.push((record, Instant::now()));
        if ended.expected && ended.records.len() < MOST_WAITING {
            if ended.records.len() == 1 {
                self.0.bell.notify_one();
            }
        } else {
            drop(ended);
            self.emit();
        }
    }

    fn emit(&self) {
        let records = std::mem::take(&mut self.lock().records);
        let now = Instant::now();
        for (record, ended) in records {
            telemetry::as_of(now.duration_since(ended), || record.emit(ended));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ended> {
        self.0.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last to be waited for.
struct Last(AccessLog);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.lock().expected = false;
        self.0.emit();
    }
}

/// The record of a request that has not ended; it has when this is dropped.
#[derive(Debug)]
pub struct OpenRecord {
    /// There until it is dropped.
    record: Option<Box<AccessRecord>>,
    log: AccessLog,
}

impl Deref for OpenRecord {
    type Target = AccessRecord;

    fn deref(&self) -> &AccessRecord {
        self.record.as_deref().expect("it has not been dropped")
    }
}

impl DerefMut for OpenRecord {
    fn deref_mut(&mut self) -> &mut AccessRecord {
        self.record.as_deref_mut().expect("it has not been dropped")
    }
}

impl Drop for OpenRecord {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.log.take(record);
        }
    }
}

/// One request, from its headers to the end of its response.
#[derive(Debug)]
pub struct AccessRecord {
    /// Its number, which all that is logged about it has.
    pub request: u64,
    /// When the request's headers had been read.
    pub started: Instant,
    /// The client.
    pub client: SocketAddr,
    /// The request's method.
    pub method: Method,
    /// The authority that it was sent to, as the client wrote it.
    pub authority: String,
    /// The path, without the query, which may hold secrets.
    pub path: String,
    /// The protocol on the client's side.
    pub downstream: &'static str,
    /// The protocol on the pod's side.
    pub upstream: Option<&'static str>,
    /// The Service that the host names.
    pub service: Option<ServiceName>,
    /// The pod that answered, or that was tried last.
    pub pod: Option<PodRef>,
    /// The response's status.
    pub status: Option<StatusCode>,
    /// The response's `grpc-status`, from its headers or trailers.
    pub grpc_status: Option<String>,
    /// Bytes of the request's body.
    pub received: ByteCount,
    /// Bytes of the response's body.
    pub sent: u64,
    /// When the response's headers were there.
    pub first_byte: Option<Instant>,
    /// How often the request was sent to a pod, or was tried to be.
    pub attempts: u32,
    /// Whether the connection to the pod was already there.
    pub reused: Option<bool>,
    /// The response flag (Envoy's term): why we answered ourselves or cut the response off.
    pub flag: Option<&'static str>,
    /// The same in words.
    pub reason: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
}

impl AccessRecord {
    /// Makes the record of a request. It is on its way for as long as the request, through many hands, so it stays in one place.
    fn new(
        request: u64,
        client: SocketAddr,
        downstream: &'static str,
        method: Method,
        path: String,
    ) -> Box<Self> {
        Box::new(Self {
            request,
            started: Instant::now(),
            client,
            method,
            authority: String::new(),
            path,
            downstream,
            upstream: None,
            service: None,
            pod: None,
            status: None,
            grpc_status: None,
            received: ByteCount::default(),
            sent: 0,
            first_byte: None,
            attempts: 0,
            reused: None,
            flag: None,
            reason: None,
            outcome: Outcome::default(),
        })
    }

    /// The flag to show: the one that was set, or the one that the outcome implies.
    fn shown_flag(&self) -> Option<&'static str> {
        self.flag.or(match self.outcome {
            Outcome::Complete => None,
            Outcome::Abandoned => Some("DC"),
            Outcome::Broken => Some("UC"),
        })
    }

    fn emit(&self, ended: Instant) {
        let method = cut(self.method.as_str());
        let (authority, path) = (cut(&self.authority), cut(&self.path));
        let grpc_status = self.grpc_status.as_deref().map(cut);
        let reason = self.reason.as_deref().map(cut);
        info!(
            target: ACCESS,
            method = %method,
            authority = &*authority,
            path = &*path,
            status = self.status.map(|status| status.as_u16()),
            grpc_status = grpc_status.as_deref(),
            protocol = self.downstream,
            upstream_protocol = self.upstream,
            service = self.service.as_ref().map(ServiceName::name),
            namespace = self.service.as_ref().map(ServiceName::namespace),
            pod = self.pod.as_ref().map(|pod| &*pod.name),
            bytes_received = self.received.get(),
            bytes_sent = self.sent,
            duration_ms = milliseconds(ended.duration_since(self.started)),
            first_byte_ms = self.first_byte.map(|time| milliseconds(time.duration_since(self.started))),
            attempts = self.attempts,
            connection = self.reused.map(|reused| if reused { "reused" } else { "new" }),
            flag = self.shown_flag(),
            reason = reason.as_deref(),
            client = %Address(self.client),
            request = self.request,
            "access",
        );
    }
}

/// Cuts a text that is too long for a record; an ellipsis shows where.
fn cut(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST {
        return Cow::Borrowed(text);
    }
    let (shown, _) = text.split_at(text.floor_char_boundary(LONGEST));
    Cow::Owned(format!("{shown}…"))
}

/// An address as the library shows it, which for IPv4 takes as much time as all other numbers of a record together.
struct Address(SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SocketAddr::V4(address) = self.0 else {
            return self.0.fmt(f);
        };
        let mut digits = itoa::Buffer::new();
        for (octet, separator) in address.ip().octets().into_iter().zip(["", ".", ".", "."]) {
            f.write_str(separator)?;
            f.write_str(digits.format(octet))?;
        }
        f.write_str(":")?;
        f.write_str(digits.format(address.port()))
    }
}

/// Returns a span of time as logs show it: in milliseconds, rounded to microseconds, for finer digits are noise.
#[must_use]
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use tracing::subscriber::DefaultGuard;

    use super::*;

    /// What was logged.
    #[derive(Debug, Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        /// Takes what this thread logs, until the guard is dropped.
        fn gather() -> (Self, DefaultGuard) {
            let lines = Self::default();
            let writer = lines.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(move || writer.clone())
                .finish();
            (lines, tracing::subscriber::set_default(subscriber))
        }

        fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
        }

        fn count(&self) -> usize {
            self.text().lines().count()
        }
    }

    /// Has somebody come for what has ended, until `drain` starts.
    async fn run(log: &AccessLog, drain: &Drain) {
        drain.spawn(log.clone().run(drain.clone()));
        tokio::task::yield_now().await;
    }

    fn open(log: &AccessLog) -> OpenRecord {
        log.open(
            ([127, 0, 0, 1], 1).into(),
            "HTTP/1.1",
            Method::GET,
            "/".to_owned(),
        )
    }

    #[test]
    fn an_address_is_shown_as_the_library_shows_it() {
        for address in [
            "127.0.0.1:80",
            "255.0.10.199:65535",
            "[::1]:8080",
            "[fe80::1%3]:1",
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(Address(address).to_string(), address.to_string());
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters_and_a_short_one_is_not_copied() {
        let longest = "x".repeat(LONGEST);
        assert!(matches!(cut(&longest), Cow::Borrowed(text) if text == longest));
        assert_eq!(cut(&format!("{longest}x")), format!("{longest}…"));
        let before = &longest[1..];
        assert_eq!(cut(&format!("{before}éé")), format!("{before}…"));
    }

    #[test]
    fn a_record_is_short_however_much_is_said() {
        const SAID: usize = 60_000;
        let (lines, _guard) = Lines::gather();
        let mut record = AccessLog::default().open(
            ([127, 0, 0, 1], 1).into(),
            "HTTP/1.1",
            Method::from_bytes("M".repeat(SAID).as_bytes()).unwrap(),
            "/".repeat(SAID),
        );
        record.authority = "a".repeat(SAID);
        record.grpc_status = Some("1".repeat(SAID));
        record.reason = Some("r".repeat(SAID));
        drop(record);
        let text = lines.text();
        assert_eq!(text.matches('…').count(), 5, "{text}");
        assert!(text.len() < 6 * LONGEST, "{} bytes", text.len());
    }

    #[tokio::test(start_paused = true)]
    async fn records_are_emitted_together_and_soon_with_the_time_that_they_took() {
        let (lines, _guard) = Lines::gather();
        let (log, drain) = (AccessLog::default(), Drain::new());
        run(&log, &drain).await;
        for _ in 0..3 {
            let record = open(&log);
            tokio::time::advance(Duration::from_millis(2)).await;
            drop(record);
        }
        assert_eq!(lines.count(), 0);
        tokio::time::sleep(PACE).await;
        tokio::task::yield_now().await;
        let text = lines.text();
        assert_eq!(text.matches(" duration_ms=2.0 ").count(), 3, "{text}");
        for number in 1..=3 {
            assert!(text.contains(&format!(" request={number}\n")), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_record_is_lost_at_the_end_or_beyond_it() {
        let (lines, _guard) = Lines::gather();
        let (log, drain) = (AccessLog::default(), Drain::new());
        drop(open(&log));
        assert_eq!(lines.count(), 1, "nobody comes for it yet");
        run(&log, &drain).await;
        drop(open(&log));
        drain.complete(Duration::from_secs(1)).await;
        assert_eq!(lines.count(), 2);
        drop(open(&log));
        assert_eq!(lines.count(), 3, "nobody comes any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_waits_for_nobody_and_takes_no_more_memory() {
        let (lines, _guard) = Lines::gather();
        let (log, drain) = (AccessLog::default(), Drain::new());
        run(&log, &drain).await;
        for _ in 0..MOST_WAITING {
            drop(open(&log));
        }
        assert_eq!(lines.count(), MOST_WAITING);
    }
}
