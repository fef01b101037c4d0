//! Requests one after the other, while something happens to the pods.

use std::net::SocketAddr;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::client::{Reply, try_fetch};
use crate::command::{DEADLINE, within};

/// A client that never stops asking; each request comes on a connection of its own.
pub(crate) struct Traffic {
    stop: CancellationToken,
    asking: JoinSet<Tally>,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How many a pod answered.
    pub(crate) answered: usize,
    /// The words of all others.
    pub(crate) failures: Vec<String>,
}

impl Traffic {
    /// Begins.
    pub(crate) fn start(proxy: SocketAddr, host: String) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let mut asking = JoinSet::new();
        asking.spawn(async move {
            let mut tally = Tally::default();
            while !stopped.is_cancelled() {
                match try_fetch(proxy, &host, "/health").await {
                    Ok(reply) if reply.status == 200 => tally.answered += 1,
                    Ok(reply) => tally.failures.push(describe(&reply)),
                    Err(error) => tally.failures.push(format!("{error:#}")),
                }
            }
            tally
        });
        Self { stop, asking }
    }

    /// Lets the last request end.
    pub(crate) async fn stop(mut self) -> Tally {
        self.stop.cancel();
        within(DEADLINE, "the last request", self.asking.join_next())
            .await
            .unwrap()
            .unwrap()
    }
}

fn describe(reply: &Reply) -> String {
    format!("{} {}", reply.status, reply.text().trim())
}
