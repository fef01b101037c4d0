//! Fifty clients at once: GET and POST in turn, over kept and over new connections, in HTTP/1.1 and in HTTP/2.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use http::{Method, Request};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, PROTOCOLS, Protocol, empty, full};
use crate::command::{DEADLINE, eventually, within};

const CLIENTS: usize = 50;

/// How often each client asks, unless it waits for an answer.
const PACE: Duration = Duration::from_millis(100);

/// The clients, while they ask.
pub(crate) struct Load {
    stop: CancellationToken,
    clients: JoinSet<Tally>,
    /// How many requests a pod has answered.
    answered: Arc<AtomicUsize>,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// When each answer of a pod came.
    answers: Vec<Instant>,
    /// How long the slowest of them took.
    pub(crate) slowest: Duration,
    /// All others.
    pub(crate) failures: Vec<Failure>,
}

/// A request that no pod answered with 200.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) method: Method,
    /// What the ledger knows it by, if it was a POST.
    pub(crate) id: String,
    /// Since when it was under way, and until when.
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) words: String,
}

impl Load {
    /// Begins.
    pub(crate) fn start(proxy: SocketAddr, host: &str) -> Self {
        let stop = CancellationToken::new();
        let answered = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let user = User {
                number,
                proxy,
                host: host.to_owned(),
                protocol: PROTOCOLS[number % 2],
                kept: number / 2 % 2 == 0,
                connection: None,
                answered: answered.clone(),
            };
            clients.spawn(user.ask_until(stop.clone()));
        }
        Self {
            stop,
            clients,
            answered,
        }
    }

    /// Goes on until another thousand requests have been answered.
    pub(crate) async fn another_thousand(&self) {
        let enough = self.answered.load(Ordering::Relaxed) + 1000;
        eventually("a thousand answers", async || {
            self.answered.load(Ordering::Relaxed) >= enough
        })
        .await;
    }

    /// Lets the last requests end.
    pub(crate) async fn stop(mut self) -> Tally {
        self.stop.cancel();
        let mut all = Tally::default();
        let ending = async {
            while let Some(tally) = self.clients.join_next().await {
                let tally = tally.unwrap();
                all.answers.extend(tally.answers);
                all.failures.extend(tally.failures);
                all.slowest = all.slowest.max(tally.slowest);
            }
        };
        within(DEADLINE, "the last requests", ending).await;
        all.answers.sort_unstable();
        all.failures.sort_by_key(|failure| failure.began);
        all
    }
}

impl Tally {
    /// How many requests there were.
    pub(crate) fn requests(&self) -> usize {
        self.answers.len() + self.failures.len()
    }

    /// Those that failed although they could have been sent again.
    pub(crate) fn idempotent(&self) -> impl Iterator<Item = &Failure> {
        self.failures
            .iter()
            .filter(|failure| failure.method.is_idempotent())
    }

    /// Those that failed and must not be sent again once they have arrived.
    pub(crate) fn unsafe_ones(&self) -> impl Iterator<Item = &Failure> {
        self.failures
            .iter()
            .filter(|failure| !failure.method.is_idempotent())
    }

    /// Checks that nothing failed that may be sent again, and nothing else but what had been sent.
    pub(crate) fn lost_only_what_was_sent(&self) {
        let idempotent: Vec<_> = self.idempotent().collect();
        assert!(idempotent.is_empty(), "{idempotent:#?}");
        for failure in self.unsafe_ones() {
            let sent = failure.words.contains("was closed before it answered");
            assert!(sent, "{failure:#?}");
        }
    }

    /// The longest time in which no answer came.
    pub(crate) fn longest_gap(&self) -> Duration {
        let gaps = self.answers.windows(2).map(|pair| pair[1] - pair[0]);
        gaps.max().unwrap_or(Duration::MAX)
    }
}

/// One client.
struct User {
    number: usize,
    proxy: SocketAddr,
    host: String,
    protocol: Protocol,
    /// Whether its next request takes the same connection.
    kept: bool,
    connection: Option<Client>,
    answered: Arc<AtomicUsize>,
}

impl User {
    async fn ask_until(mut self, stop: CancellationToken) -> Tally {
        let mut tally = Tally::default();
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for count in 0_u64.. {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = pace.tick() => {}
            }
            // Not all of them in step.
            let method = if (count + self.number as u64 / 4).is_multiple_of(2) {
                Method::GET
            } else {
                Method::POST
            };
            let id = format!("{}-{count}", self.number);
            let began = Instant::now();
            match self.ask(&method, &id).await {
                Ok(()) => {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                    tally.answers.push(Instant::now());
                    tally.slowest = tally.slowest.max(began.elapsed());
                }
                Err(error) => {
                    self.connection = None;
                    tally.failures.push(Failure {
                        method,
                        id,
                        began,
                        ended: Instant::now(),
                        words: format!("{error:#}"),
                    });
                }
            }
        }
        tally
    }

    async fn ask(&mut self, method: &Method, id: &str) -> Result<()> {
        let mut client = match self.connection.take() {
            Some(client) => client,
            None => Client::connect(self.proxy, self.protocol).await?,
        };
        let request = Request::builder().method(method).header("host", &self.host);
        let request = if *method == Method::GET {
            request.uri("/slow?ms=20").body(empty())?
        } else {
            request.uri(format!("/mark/{id}")).body(full("some body"))?
        };
        let reply = client.exchange(request).await?;
        ensure!(reply.status == 200, "{} {}", reply.status, reply.text().trim());
        self.connection = Some(client).filter(|_| self.kept);
        Ok(())
    }
}
