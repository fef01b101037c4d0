//! Watches: a stream of events that starts at a version and follows every write.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::cluster::Cluster;
use super::resource::Kind;
use super::selector::Selector;
use super::status::Failure;
use super::store::Change;
use super::table::{self, Include};

/// Time between unasked bookmarks. A real server sends one about every minute; tests should not wait that long.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);

/// A part of the answer's body.
pub(super) type Chunk = Result<Frame<Bytes>, Infallible>;

/// What one watch asked for.
#[derive(Debug)]
pub(super) struct Watch {
    /// Kind watched.
    pub(super) kind: Kind,
    /// One namespace, or all.
    pub(super) namespace: Option<String>,
    /// Objects of interest.
    pub(super) selector: Selector,
    /// Version after which changes are wanted; absent to start with the present objects.
    pub(super) from: Option<u64>,
    /// Whether bookmarks were allowed.
    pub(super) bookmarks: bool,
    /// End of the watch.
    pub(super) timeout: Option<Duration>,
    /// Send objects as table rows that include this.
    pub(super) table: Option<Include>,
}

impl Watch {
    /// Writes events until the client leaves, the timeout passes or the cluster stops.
    pub(super) async fn run(self, cluster: Arc<Cluster>, body: mpsc::Sender<Chunk>) {
        let mut changed = cluster.store.subscribe();
        let mut demanded = cluster.bookmarks.subscribe();
        let end = self.timeout.map(|timeout| Instant::now() + timeout);
        let Some(mut position) = self.start(&cluster, &body).await else {
            return;
        };
        let mut next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
        loop {
            let (changes, reached) = cluster.store.since(position);
            for event in changes.iter().filter_map(|change| self.event(change)) {
                if send(&body, &event).await.is_err() {
                    return;
                }
            }
            position = reached;
            tokio::select! {
                _ = changed.changed() => {}
                _ = demanded.changed(), if self.bookmarks => {
                    // The writes of before the demand come before the bookmark.
                    position = self.catch_up(&cluster, &body, position).await;
                    if send(&body, &self.bookmark(position)).await.is_err() { return; }
                }
                () = sleep_until(next_bookmark), if self.bookmarks => {
                    next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
                    if send(&body, &self.bookmark(position)).await.is_err() { return; }
                }
                () = sleep_until(end.unwrap_or(next_bookmark)), if end.is_some() => return,
                () = body.closed() => return,
                () = cluster.stop.cancelled() => return,
            }
        }
    }

    /// Sends the present objects, or checks that history reaches back far enough.
    async fn start(&self, cluster: &Cluster, body: &mpsc::Sender<Chunk>) -> Option<u64> {
        if let Some(from) = self.from {
            if let Err(oldest) = cluster.store.can_watch_from(from) {
                // A real server has sent 200 by the time it finds out, so 410 travels inside the stream.
                let gone = Failure::expired(from, oldest).body;
                let _ = send(body, &json!({"type": "ERROR", "object": gone})).await;
                return None;
            }
            return Some(from);
        }
        let (objects, version) = cluster.store.list(self.kind, self.namespace.as_deref());
        for object in objects.iter().filter(|object| self.selector.matches(object)) {
            send(body, &self.envelope("ADDED", object)).await.ok()?;
        }
        Some(version)
    }

    async fn catch_up(&self, cluster: &Cluster, body: &mpsc::Sender<Chunk>, position: u64) -> u64 {
        let (changes, reached) = cluster.store.since(position);
        for event in changes.iter().filter_map(|change| self.event(change)) {
            if send(body, &event).await.is_err() {
                break;
            }
        }
        reached
    }

    /// Turns a write into the event this watch sees: an object that stops matching is deleted as far as the watch
    /// is concerned, one that starts matching is new (`apiserver:pkg/storage/cacher/cache_watcher.go`).
    fn event(&self, change: &Change) -> Option<Value> {
        let in_scope = change.key.kind == self.kind
            && self
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == change.key.namespace);
        if !in_scope {
            return None;
        }
        let before = change
            .before
            .as_deref()
            .filter(|object| self.selector.matches(object));
        let after = change
            .after
            .as_deref()
            .filter(|object| self.selector.matches(object));
        match (before, after) {
            (None, None) => None,
            (None, Some(object)) => Some(self.envelope("ADDED", object)),
            (Some(_), Some(object)) => Some(self.envelope("MODIFIED", object)),
            (Some(object), None) => {
                let mut last = object.clone();
                last["metadata"]["resourceVersion"] = change.version.to_string().into();
                Some(self.envelope("DELETED", &last))
            }
        }
    }

    fn envelope(&self, event: &str, object: &Value) -> Value {
        let object = match self.table {
            Some(include) => table::of(self.kind, &[object], "", include),
            None => object.clone(),
        };
        json!({"type": event, "object": object})
    }

    fn bookmark(&self, version: u64) -> Value {
        let mark = json!({
            "kind": self.kind.name(),
            "apiVersion": self.kind.api_version(),
            "metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null},
        });
        json!({"type": "BOOKMARK", "object": mark})
    }
}

async fn send(body: &mpsc::Sender<Chunk>, event: &Value) -> Result<(), ()> {
    let mut line = event.to_string();
    line.push('\n');
    body.send(Ok(Frame::data(Bytes::from(line)))).await.map_err(drop)
}
