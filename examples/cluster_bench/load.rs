//! The client: exchanges of a small request and its answer, one after the other on each of some lines.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// How long the exchanges before anything counts may take.
const WARM_UP: Duration = Duration::from_secs(60);

/// How long all lines go on together before anything counts.
const SETTLE: Duration = Duration::from_secs(1);

/// The pause after a failure, so that a refusing contestant does not look fast.
const PAUSE: Duration = Duration::from_millis(10);

/// What is sent, and how the end of the answer is known.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    request: Vec<u8>,
    /// The answer is the request; otherwise one of HTTP with `Content-Length`.
    echo: bool,
    /// The next exchange goes over the same connection; otherwise the client closes after the answer.
    keep: bool,
}

impl Ask {
    /// A GET of 16 bytes.
    pub(crate) fn get(host: &str, keep: bool) -> Self {
        Self {
            request: format!("GET /bytes/16 HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(),
            echo: false,
            keep,
        }
    }

    /// Bytes that come back.
    pub(crate) fn echo(length: usize, keep: bool) -> Self {
        Self {
            request: vec![b'.'; length],
            echo: true,
            keep,
        }
    }
}

/// One line of exchanges.
#[derive(Debug)]
pub(crate) struct Line {
    address: SocketAddr,
    ask: Ask,
    connection: Option<TcpStream>,
    /// When the exchange under way began.
    begun: Option<Instant>,
}

impl Line {
    /// Makes a line that connects with its first exchange.
    pub(crate) fn new(address: SocketAddr, ask: &Ask) -> Self {
        Self {
            address,
            ask: ask.clone(),
            connection: None,
            begun: None,
        }
    }

    /// Sends the request and takes the answer. Not cancel safe: the line must not be used after that.
    pub(crate) async fn exchange(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        self.begun = Some(begun);
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => TcpStream::connect(self.address).await?,
        };
        connection.set_nodelay(true)?;
        connection.write_all(&self.ask.request).await?;
        if self.ask.echo {
            take_echo(&mut connection, self.ask.request.len()).await?;
        } else {
            take_response(&mut connection).await?;
        }
        if self.ask.keep {
            self.connection = Some(connection);
        }
        self.begun = None;
        Ok(begun.elapsed())
    }
}

async fn take_echo(connection: &mut TcpStream, length: usize) -> io::Result<()> {
    let mut buffer = [0; 64];
    let mut taken = 0;
    while taken < length {
        match connection.read(&mut buffer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => taken += more,
        }
    }
    Ok(())
}

async fn take_response(connection: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut filled = 0;
    let mut whole = None;
    loop {
        if whole.is_some_and(|whole| filled >= whole) {
            return Ok(());
        }
        match connection.read(&mut buffer[filled..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => filled += more,
        }
        if whole.is_none() {
            whole = length(&buffer[..filled])?;
        }
    }
}

/// Returns the length of the whole response, once its head is there.
fn length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&bytes[..end]);
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(head.into_owned()));
    }
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then_some(value.trim())
    });
    let body: usize = value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::Error::other("a response without a length"))?;
    Ok(Some(end + 4 + body))
}

/// What the lines did together.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// How long each exchange took, in milliseconds, in ascending order.
    pub(crate) latencies: Vec<f64>,
    /// Exchanges that were answered.
    pub(crate) answered: usize,
    /// Exchanges that failed.
    pub(crate) failed: usize,
    /// For how long, in seconds.
    pub(crate) elapsed: f64,
}

impl Load {
    /// Returns the latency that the given part of the exchanges did not exceed. Without any exchange there is none.
    pub(crate) fn percentile(&self, part: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let place = (part * last as f64).round() as usize;
        self.latencies.get(place).copied().unwrap_or(f64::INFINITY)
    }

    /// Returns the answered exchanges per second.
    pub(crate) fn rate(&self) -> f64 {
        self.answered as f64 / self.elapsed
    }
}

/// Makes lines and lets each do its first exchange, 16 at a time.
pub(crate) async fn lines(address: SocketAddr, ask: &Ask, count: usize) -> io::Result<Vec<Line>> {
    let mut lines: Vec<_> = (0..count).map(|_| Line::new(address, ask)).collect();
    let first = async {
        for some in lines.chunks_mut(16) {
            for done in join_all(some.iter_mut().map(Line::exchange)).await {
                done?;
            }
        }
        Ok::<_, io::Error>(())
    };
    timeout(WARM_UP, first).await??;
    Ok(lines)
}

/// Lets all lines exchange at the same time for a moment, so that who opens connections to the pod as requests need them has
/// opened them, as those have by then who open one for each client's.
pub(crate) async fn settle(lines: &mut [Line]) -> io::Result<()> {
    let settled = Instant::now() + SETTLE;
    let together = lines.iter_mut().map(|line| async move {
        while Instant::now() < settled {
            line.exchange().await?;
        }
        Ok::<_, io::Error>(())
    });
    timeout(WARM_UP, try_join_all(together)).await??;
    Ok(())
}

/// Repeats exchanges on all lines until the time is up. An exchange that is under way then counts only if it has waited longer
/// than any before: it is stuck.
pub(crate) async fn repeat(mut lines: Vec<Line>, time: Duration) -> Load {
    let load = RefCell::new(Load::default());
    let begun = Instant::now();
    let end = begun + time;
    let work = lines.iter_mut().map(|line| async {
        while Instant::now() < end {
            match line.exchange().await {
                Ok(took) => load.borrow_mut().latencies.push(took.as_secs_f64() * 1e3),
                Err(_) => {
                    load.borrow_mut().failed += 1;
                    sleep(PAUSE).await;
                }
            }
        }
    });
    // Cut when the time is up, whatever is under way.
    drop(timeout_at(end, join_all(work)).await);
    let mut load = load.into_inner();
    load.elapsed = begun.elapsed().as_secs_f64();
    load.answered = load.latencies.len();
    load.latencies.sort_by(f64::total_cmp);
    let stuck = lines.iter().filter_map(|line| line.begun);
    if let Some(since) = stuck.min() {
        let waited = since.elapsed().as_secs_f64() * 1e3;
        if load.latencies.last().is_none_or(|worst| waited > *worst) {
            load.latencies.push(waited);
        }
    }
    load
}
