//! When port-forwards are opened: not too many at the same time, and one by one while the API server is in trouble, so that
//! nobody keeps it from coming back and everybody goes on as soon as it is.

use std::future::Future;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as Turns, MutexGuard as OnesTurn, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::k8s::portforward::carrier::{Refusal, Verdict};
use crate::transport::ConnectError;

/// How many are opened at the same time: each costs the API server, the kubelet and the runtime a connection, and after an
/// API server's restart all are opened again.
const BURST: usize = 8;

/// What takes longer than this gives way to the next: the pods of a dead node must not keep others waiting.
const PROMPT: Duration = Duration::from_millis(500);

/// How soon a server that could not be reached is tried again, give or take half of it. Whoever waits is served so much late.
const SPACING: Duration = Duration::from_millis(100);

/// For how long connections wait because the server asks for it. Where it is longer they fail, and are not tried. API servers
/// that start or stop ask for five seconds (`apiserver:pkg/server/filters/with_retry_after.go`), which gets longer by a quarter.
const LONGEST: Duration = Duration::from_secs(7);

/// What is taken of what the server asks for: whoever asks for an hour may be well in a minute.
const MOST: Duration = Duration::from_secs(30);

/// Lets openings pass.
#[derive(Debug)]
pub(super) struct Gate {
    burst: Semaphore,
    /// While the server is in trouble, one at a time tries.
    turns: Turns<()>,
    trouble: Mutex<Option<Trouble>>,
}

/// The API server's trouble.
#[derive(Debug, Clone)]
struct Trouble {
    error: ConnectError,
    verdict: Verdict,
    /// When it last showed.
    at: Instant,
    /// When the next may try.
    until: Instant,
}

/// The right to open one port-forward; one of the two.
#[derive(Debug)]
struct Turn<'a> {
    _permit: Option<SemaphorePermit<'a>>,
    _turn: Option<OnesTurn<'a, ()>>,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            burst: Semaphore::new(BURST),
            turns: Turns::new(()),
            trouble: Mutex::default(),
        }
    }

    /// Opens something when its time has come. While the server is in trouble, all that wait share the outcome of the one that
    /// tries. Cancel-safe if `opening` is.
    pub(super) async fn pass<T>(
        &self,
        opening: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let turn = self.enter().await?;
        let mut opening = pin!(opening);
        let Ok(opened) = tokio::time::timeout(PROMPT, &mut opening).await else {
            drop(turn);
            let opened = opening.await;
            self.learn(&opened, Instant::now());
            return opened;
        };
        // Before the next gets its turn.
        self.learn(&opened, Instant::now());
        opened
    }

    async fn enter(&self) -> Result<Turn<'_>, Refusal> {
        let arrived = Instant::now();
        loop {
            if self.trouble().is_none() {
                let permit = self.burst.acquire().await.ok();
                if self.trouble().is_none() {
                    return Ok(Turn {
                        _permit: permit,
                        _turn: None,
                    });
                }
            }
            let turn = self.turns.lock().await;
            let Some(trouble) = self.trouble().clone() else {
                continue;
            };
            let wait = trouble.until.saturating_duration_since(Instant::now());
            if trouble.at > arrived || wait > LONGEST {
                return Err(Refusal {
                    error: trouble.error,
                    verdict: trouble.verdict,
                });
            }
            tokio::time::sleep(wait).await;
            return Ok(Turn {
                _permit: None,
                _turn: Some(turn),
            });
        }
    }

    /// Notes what an opening has told of the server.
    fn learn<T>(&self, opened: &Result<T, Refusal>, now: Instant) {
        let wait = match opened {
            Err(Refusal {
                verdict: Verdict::Unreachable,
                ..
            }) => SPACING.mul_f64(0.5 + fastrand::f64()),
            // Not all clients of the server at the same moment.
            Err(Refusal {
                verdict: Verdict::Busy(wait),
                ..
            }) => (*wait).min(MOST).mul_f64(1.0 + fastrand::f64() / 4.0),
            // That may be one node's. While the server is in trouble it goes on, and those that wait are told.
            Err(Refusal {
                verdict: Verdict::Silent,
                ..
            }) => {
                if let Some(trouble) = &mut *self.trouble() {
                    trouble.at = now;
                }
                return;
            }
            _ => {
                *self.trouble() = None;
                return;
            }
        };
        if let Err(Refusal { error, verdict }) = opened {
            *self.trouble() = Some(Trouble {
                error: error.clone(),
                verdict: *verdict,
                at: now,
                until: now + wait,
            });
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use std::cell::Cell;

    fn refused<T>(verdict: Verdict) -> Result<T, Refusal> {
        Err(Refusal {
            error: ConnectError::Unavailable(format!("{verdict:?}")),
            verdict,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_a_burst_is_opened_at_a_time() {
        let (gate, open, most) = (Gate::new(), Cell::new(0), Cell::new(0));
        let opening = || async {
            open.set(open.get() + 1);
            most.set(most.get().max(open.get()));
            tokio::time::sleep(PROMPT / 2).await;
            open.set(open.get() - 1);
            Ok::<_, Refusal>(())
        };
        join_all((0..100).map(|_| gate.pass(opening()))).await;
        assert_eq!(most.get(), BURST);
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_gives_way_to_the_others() {
        let gate = Gate::new();
        let hanging = join_all((0..2 * BURST).map(|_| gate.pass(std::future::pending::<Result<(), _>>())));
        let healthy = async {
            tokio::task::yield_now().await;
            let before = Instant::now();
            gate.pass(async { Ok::<_, Refusal>(()) }).await.unwrap();
            before.elapsed()
        };
        tokio::select! {
            biased;
            _ = hanging => unreachable!("nothing answers"),
            waited = healthy => assert!(waited <= 2 * PROMPT + SPACING, "{waited:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_cannot_be_reached_is_tried_by_one_at_a_time_and_all_go_on_when_it_is_back() {
        let (gate, tries) = (Gate::new(), Cell::new(0_u32));
        let back_at = Instant::now() + 10 * SPACING;
        let opening = || async {
            tries.set(tries.get() + 1);
            if Instant::now() < back_at {
                return refused(Verdict::Unreachable);
            }
            Ok(Instant::now())
        };
        // Without the gate each of them would try thousands of times.
        let client = || async {
            loop {
                match gate.pass(opening()).await {
                    Ok(at) => return at,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let served = join_all((0..100).map(|_| client())).await;
        let late = served.into_iter().max().unwrap() - back_at;
        assert!(late <= 2 * SPACING, "{late:?}");
        // The first burst, one for each pause, and those that were served.
        assert!(tries.get() <= 8 + 20 + 100, "{} tries", tries.get());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_asks_to_wait_is_left_alone_for_that_time() {
        let gate = Gate::new();
        let wait = Duration::from_secs(2);
        let busy = async { refused::<()>(Verdict::Busy(wait)) };
        gate.pass(busy).await.unwrap_err();
        let before = Instant::now();
        let pass = || gate.pass(async { Ok::<_, Refusal>(()) });
        join_all((0..10).map(|_| pass())).await;
        let waited = before.elapsed();
        assert!(waited >= wait && waited <= wait.mul_f64(1.3), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_makes_sense() {
        let gate = Gate::new();
        let busy = async { refused::<()>(Verdict::Busy(2 * LONGEST)) };
        gate.pass(busy).await.unwrap_err();
        let before = Instant::now();
        let refused = gate.pass(async { Ok::<_, Refusal>(()) }).await.unwrap_err();
        assert_eq!(refused.verdict, Verdict::Busy(2 * LONGEST));
        assert!(before.elapsed() < PROMPT);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_sent_away_for_long() {
        let gate = Gate::new();
        let busy = async { refused::<()>(Verdict::Busy(Duration::MAX)) };
        gate.pass(busy).await.unwrap_err();
        // With the most of what is added so that not all come at once.
        tokio::time::advance(MOST.mul_f64(1.25)).await;
        gate.pass(async { Ok::<_, Refusal>(()) }).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_starts_is_waited_for() {
        let gate = Gate::new();
        let busy = async { refused::<()>(Verdict::Busy(Duration::from_secs(5))) };
        gate.pass(busy).await.unwrap_err();
        gate.pass(async { Ok::<_, Refusal>(()) }).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn silence_after_trouble_is_told_to_all_that_wait() {
        let gate = Gate::new();
        gate.pass(async { refused::<()>(Verdict::Unreachable) })
            .await
            .unwrap_err();
        let timeout = Duration::from_secs(10);
        let silent = || async {
            tokio::time::sleep(timeout).await;
            refused::<()>(Verdict::Silent)
        };
        let before = Instant::now();
        join_all((0..100).map(|_| gate.pass(silent()))).await;
        assert!(before.elapsed() < 3 * timeout, "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_whose_node_is_silent_says_nothing_of_the_server() {
        let gate = Gate::new();
        gate.pass(async { refused::<()>(Verdict::Silent) })
            .await
            .unwrap_err();
        let before = Instant::now();
        gate.pass(async { Ok::<_, Refusal>(()) }).await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
