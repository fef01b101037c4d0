//! A worker's queue, after `moby/spdystream:priority.go`.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::sync::Notify;

use crate::testing::cluster::lock;

/// Frames a queue holds.
pub(super) const QUEUE_SIZE: usize = 50;

/// A bounded queue for one writer and one reader: by priority, within one priority first in, first out.
#[derive(Debug)]
pub(super) struct Queue<T> {
    /// Everything a lock protects.
    inner: Mutex<Inner<T>>,
    /// Wakes the reader.
    pushed: Notify,
    /// Wakes the writer.
    popped: Notify,
}

#[derive(Debug)]
struct Inner<T> {
    /// Frames by priority and arrival.
    frames: BTreeMap<(u8, u64), T>,
    /// Frames that have arrived.
    arrived: u64,
    /// The reader ends when the queue is empty.
    draining: bool,
}

impl<T> Queue<T> {
    /// An empty queue.
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                frames: BTreeMap::new(),
                arrived: 0,
                draining: false,
            }),
            pushed: Notify::new(),
            popped: Notify::new(),
        }
    }

    /// Appends a frame; waits while the queue is full.
    pub(super) async fn push(&self, frame: T, priority: u8) {
        loop {
            {
                let mut inner = lock(&self.inner);
                if inner.frames.len() < QUEUE_SIZE {
                    let place = (priority, inner.arrived);
                    inner.arrived += 1;
                    inner.frames.insert(place, frame);
                    break;
                }
            }
            self.popped.notified().await;
        }
        self.pushed.notify_one();
    }

    /// Takes the first frame; `None` when the queue is empty and will stay so.
    pub(super) async fn pop(&self) -> Option<T> {
        loop {
            {
                let mut inner = lock(&self.inner);
                if let Some((_, frame)) = inner.frames.pop_first() {
                    self.popped.notify_one();
                    return Some(frame);
                }
                if inner.draining {
                    return None;
                }
            }
            self.pushed.notified().await;
        }
    }

    /// Lets the reader end once it has taken everything.
    pub(super) fn drain(&self) {
        lock(&self.inner).draining = true;
        self.pushed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_full_queue_holds_its_writer() {
        let queue = Queue::new();
        for number in 0..QUEUE_SIZE {
            queue.push(number, 0).await;
        }
        let blocked = queue.push(QUEUE_SIZE, 0);
        tokio::pin!(blocked);
        assert!(blocked.as_mut().now_or_never().is_none());
        assert_eq!(queue.pop().await, Some(0));
        assert!(blocked.now_or_never().is_some());
    }

    #[tokio::test]
    async fn lower_priorities_wait_and_the_rest_keeps_its_order() {
        let queue = Queue::new();
        for (number, priority) in [(1, 7), (2, 0), (3, 0)] {
            queue.push(number, priority).await;
        }
        queue.drain();
        let mut order = Vec::new();
        while let Some(number) = queue.pop().await {
            order.push(number);
        }
        assert_eq!(order, [2, 3, 1]);
    }
}
