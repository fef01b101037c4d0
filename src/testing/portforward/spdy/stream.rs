//! One stream of a session, after `moby/spdystream:stream.go`.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// A stream the client has opened.
#[derive(Debug)]
pub(super) struct Stream {
    /// Its id.
    pub(super) id: u32,
    /// Its place in a worker's queue, from 0 (first) to 7.
    pub(super) priority: u8,
    /// Cancelled when the client will send no more: FIN, RST, the session's end; or when we have reset the stream.
    pub(super) remote_closed: CancellationToken,
    /// Cancelled once SYN_REPLY is sent; nothing may be written before.
    pub(super) replied: CancellationToken,
    /// We will send no FIN or RST any more, having sent one or received an RST.
    finished: AtomicBool,
    /// The worker's end of the hand-off.
    offers: mpsc::Sender<Offer>,
    /// The reader's end. It lives as long as the stream: an offer nobody takes must wait, not fail.
    offered: Mutex<mpsc::Receiver<Offer>>,
}

/// A payload that a worker holds out to the reader.
#[derive(Debug)]
struct Offer {
    /// The payload.
    payload: Bytes,
    /// Lets the worker go on.
    taken: oneshot::Sender<()>,
}

impl Stream {
    /// A stream without a reply yet.
    pub(super) fn new(id: u32, priority: u8) -> Self {
        let (offers, offered) = mpsc::channel(1);
        Self {
            id,
            priority,
            remote_closed: CancellationToken::new(),
            replied: CancellationToken::new(),
            finished: AtomicBool::new(false),
            offers,
            offered: Mutex::new(offered),
        }
    }

    /// Hands a payload over, as an unbuffered Go channel does: returns when the reader has taken it or the client's side
    /// of the stream is closed, which may be never.
    pub(super) async fn offer(&self, payload: Bytes) {
        let (taken, wait) = oneshot::channel();
        let hand_over = async {
            if self.offers.send(Offer { payload, taken }).await.is_ok() {
                let _ = wait.await;
            }
        };
        tokio::select! {
            biased;
            () = self.remote_closed.cancelled() => {}
            () = hand_over => {}
        }
    }

    /// Takes the next payload; `None` at the end. Cancel-safe.
    pub(super) async fn read(&self) -> Option<Bytes> {
        let mut offered = self.offered.lock().await;
        loop {
            let offer = tokio::select! {
                () = self.remote_closed.cancelled() => return None,
                offer = offered.recv() => offer?,
            };
            // A worker that was freed meanwhile has taken its offer back.
            if offer.taken.send(()).is_ok() {
                return Some(offer.payload);
            }
        }
    }

    /// Notes that no FIN or RST may follow; true if none has been sent before.
    pub(super) fn finish(&self) -> bool {
        !self.finished.swap(true, Ordering::Relaxed)
    }

    /// Whether we have sent FIN or RST, or received RST.
    pub(super) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }
}
