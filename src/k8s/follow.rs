//! Follows one narrow list of objects: list, then watch from that list's version; or read again and again where watching
//! is refused, and try to watch now and then. Yields the whole list each time it changed; the lists are one Service, or the
//! few slices of one.
//!
//! A Service is listed by its name and not fetched with a GET: a list carries the collection's resourceVersion, from which a
//! watch starts without a gap, while the version of a single object is usually older than what the server still remembers.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use kube::api::ListParams;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::k8s::error::{self, Kind};

/// First and longest wait after a failure. The longest is short: it is what a user waits after an outage has ended.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// The status of a watch whose version the server does not remember any more.
const GONE: u16 = 410;

/// For how long watching, or listing, is not tried again after it was refused. That may have been the moment of a server that has
/// just started, or of a role that was being replaced.
const REFUSED: Duration = Duration::from_mins(10);

/// A list asked for out of turn comes at most this often.
const SHORTEST_POLL: Duration = Duration::from_millis(250);

/// What to follow.
#[derive(Debug, Clone)]
pub(super) enum Selection {
    /// The one object of this name.
    Name(String),
    /// All objects with matching labels.
    Labels(String),
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Time between lists where watching is refused.
    pub(super) poll: Duration,
    /// How long the API server may take for a list, its body included.
    pub(super) timeout: Duration,
}

/// Changes when somebody asks for a list at once, where lists are polled. Its sender lives as long as it.
pub(super) type Recheck = watch::Receiver<()>;

/// The list each time it changed, or the error of a try that failed; it goes on after errors by itself.
pub(super) type Following<K> = BoxStream<'static, Result<Vec<K>, kube::Error>>;

/// Starts to follow.
pub(super) fn follow<K>(api: Api<K>, selection: Selection, pace: Pace, recheck: Recheck) -> Following<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let mode = Mode::watch(&api, &selection);
    let follower = Follower {
        api,
        selection,
        pace,
        recheck,
        mode,
        refused_at: None,
        listed: BTreeMap::new(),
        staged: BTreeMap::new(),
        wait: None,
        backoff: Backoff::new(Instant::now()),
    };
    stream::unfold(follower, |mut follower| async move {
        Some((follower.next().await, follower))
    })
    .boxed()
}

/// How news arrive.
enum Mode<K> {
    /// By a watch.
    Watch {
        events: BoxStream<'static, watcher::Result<Event<K>>>,
        /// Whether the list from which it starts is not complete yet.
        listing: bool,
    },
    /// By a list every now and then: `watch` is refused.
    List,
    /// By a GET every now and then: `list` is refused too.
    Get(String),
}

impl<K> Mode<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    fn watch(api: &Api<K>, selection: &Selection) -> Self {
        let config = match selection {
            Selection::Name(name) => watcher::Config::default().fields(&format!("metadata.name={name}")),
            Selection::Labels(labels) => watcher::Config::default().labels(labels),
        };
        Self::Watch {
            events: watcher::watcher(api.clone(), config).boxed(),
            listing: true,
        }
    }
}

struct Follower<K> {
    api: Api<K>,
    selection: Selection,
    pace: Pace,
    /// Asks for a list before its time.
    recheck: Recheck,
    mode: Mode<K>,
    /// When watching or listing was refused, if it was.
    refused_at: Option<Instant>,
    /// The list as last yielded, by name.
    listed: BTreeMap<String, K>,
    /// The list that a watch is delivering.
    staged: BTreeMap<String, K>,
    /// What to wait for before the next try.
    wait: Option<Wait>,
    backoff: Backoff,
}

/// A wait before the next try.
enum Wait {
    /// After a failure.
    Until(Instant),
    /// Between two lists; ends early when somebody asks.
    Poll { earliest: Instant, latest: Instant },
}

impl<K> Follower<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    async fn next(&mut self) -> Result<Vec<K>, kube::Error> {
        loop {
            self.wait().await;
            if self.refused_at.is_some_and(|at| at.elapsed() >= REFUSED) {
                self.refused_at = None;
                self.mode = Mode::watch(&self.api, &self.selection);
            }
            match self.step().await {
                Ok(Some(list)) => return Ok(list),
                Ok(None) => {}
                Err(failure) if self.step_down(&failure) => {}
                Err(Failure { error, .. }) => {
                    self.wait = Some(Wait::Until(self.backoff.after_failure(Instant::now())));
                    if let Mode::Watch { .. } = self.mode {
                        // A watch that goes on where it broke off says nothing until something changes; a list says at
                        // once that the trouble is over.
                        self.mode = Mode::watch(&self.api, &self.selection);
                    }
                    // A version that the server has forgotten is the way of watches, and no failure.
                    if !matches!(&error, kube::Error::Api(status) if status.code == GONE) {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn wait(&mut self) {
        match self.wait.take() {
            None => {}
            Some(Wait::Until(time)) => tokio::time::sleep_until(time).await,
            Some(Wait::Poll { earliest, latest }) => {
                tokio::time::sleep_until(earliest).await;
                let _ = tokio::time::timeout_at(latest, self.recheck.changed()).await;
            }
        }
    }

    /// Takes one event or one list. `None`: nothing to tell yet.
    async fn step(&mut self) -> Result<Option<Vec<K>>, Failure> {
        let timeout = self.pace.timeout;
        let items = match &mut self.mode {
            Mode::Watch { events, listing } => {
                let event = if *listing {
                    within(timeout, events.next()).await?
                } else {
                    events.next().await
                };
                return match event {
                    Some(Ok(event)) => Ok(self.take(event)),
                    Some(Err(error)) => Err(error.into()),
                    None => {
                        self.mode = Mode::watch(&self.api, &self.selection);
                        Ok(None)
                    }
                };
            }
            Mode::List => {
                let params = match &self.selection {
                    Selection::Name(name) => ListParams::default().fields(&format!("metadata.name={name}")),
                    Selection::Labels(labels) => ListParams::default().labels(labels),
                };
                self.recheck.mark_unchanged();
                within(timeout, self.api.list(&params)).await??.items
            }
            Mode::Get(name) => {
                self.recheck.mark_unchanged();
                within(timeout, self.api.get_opt(name))
                    .await??
                    .into_iter()
                    .collect()
            }
        };
        let now = Instant::now();
        self.wait = Some(Wait::Poll {
            earliest: now + SHORTEST_POLL.min(self.pace.poll),
            latest: now + self.pace.poll,
        });
        Ok(Some(items))
    }

    fn take(&mut self, event: Event<K>) -> Option<Vec<K>> {
        match event {
            Event::Init => {
                self.staged.clear();
                self.set_listing(true);
                return None;
            }
            Event::InitApply(object) => {
                self.staged.insert(object.name_any(), object);
                return None;
            }
            Event::InitDone => {
                self.listed = std::mem::take(&mut self.staged);
                self.set_listing(false);
            }
            Event::Apply(object) => drop(self.listed.insert(object.name_any(), object)),
            Event::Delete(object) => drop(self.listed.remove(&object.name_any())),
        }
        Some(self.listed.values().cloned().collect())
    }

    fn set_listing(&mut self, now: bool) {
        if let Mode::Watch { listing, .. } = &mut self.mode {
            *listing = now;
        }
    }

    /// Makes do with fewer rights: watch, then list, then get. Returns false when there is nothing below.
    fn step_down(&mut self, failure: &Failure) -> bool {
        if error::kind(&failure.error) != Kind::Forbidden {
            return false;
        }
        self.mode = match (&self.mode, &self.selection) {
            (Mode::Watch { .. }, _) if failure.watching => Mode::List,
            (Mode::Watch { .. } | Mode::List, Selection::Name(name)) => Mode::Get(name.clone()),
            _ => return false,
        };
        self.refused_at.get_or_insert_with(Instant::now);
        true
    }
}

/// Bounds a call and the reading of its answer: the client's own timeout ends with the headers.
async fn within<T>(timeout: Duration, call: impl Future<Output = T>) -> Result<T, kube::Error> {
    tokio::time::timeout(timeout, call).await.map_err(|_| {
        let text = format!("the API server began an answer and did not end it within {timeout:?}");
        kube::Error::Service(text.into())
    })
}

/// The growing wait between failures.
struct Backoff {
    /// The wait after the next failure.
    delay: Duration,
    /// When the last wait was over.
    resumed: Instant,
}

impl Backoff {
    fn new(now: Instant) -> Self {
        Self {
            delay: FIRST_DELAY,
            resumed: now,
        }
    }

    /// Returns when to try again. What went well for as long as the longest wait starts at the shortest; a list alone is not
    /// enough, for the watch after it may fail every time.
    fn after_failure(&mut self, now: Instant) -> Instant {
        if now.saturating_duration_since(self.resumed) > LONGEST_DELAY {
            self.delay = FIRST_DELAY;
        }
        self.resumed = now + self.delay;
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
        self.resumed
    }
}

/// A try that failed.
struct Failure {
    /// Whether the list was there and only the watch failed.
    watching: bool,
    error: kube::Error,
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        Self {
            watching: false,
            error,
        }
    }
}

impl From<watcher::Error> for Failure {
    fn from(error: watcher::Error) -> Self {
        let (watching, error) = match error {
            watcher::Error::InitialListFailed(error) => (false, error),
            watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => (true, error),
            watcher::Error::WatchError(status) => (true, kube::Error::Api(status)),
            watcher::Error::NoResourceVersion => (
                true,
                kube::Error::Service("the list has no resourceVersion".into()),
            ),
        };
        Self { watching, error }
    }
}

#[cfg(test)]
mod tests;
