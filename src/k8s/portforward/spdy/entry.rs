//! One forwarded connection as the session sees it: what has come, what has ended, and what that means.

use std::io;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::error::one_line;
use crate::k8s::portforward::cause;
use crate::k8s::portforward::spdy::chunks::Chunks;

/// How long the second of a connection's two streams may take to end after the first. A runtime ends them within a moment
/// of each other, in either order, and the text of a failure may come last.
const SETTLE: Duration = Duration::from_secs(2);

/// How much of a failure's text is kept.
const MAX_TEXT: usize = 4 << 10;

/// How the peer's half of a stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Half {
    /// More may come.
    #[default]
    Open,
    /// Ended in order.
    Fin,
    /// Given up by the peer.
    Reset,
}

/// How our half of the data stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Ours {
    /// More may be sent.
    #[default]
    Open,
    /// The user has ended it, but an answer is awaited, which an end would cut off after a second; so the end is held back
    /// until the peer has ended too, or has been silent for long since the given time, at which it could have had everything.
    Held(Instant),
    /// An end is to be sent.
    FinWanted,
    /// A reset is to be sent.
    ResetWanted,
    /// The end was sent.
    FinSent,
    /// A reset was sent.
    ResetSent,
}

/// Where a connection is in the session, once it has been opened there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The data stream's id; the error stream's is ten less, for the same worker.
    pub(super) id: u32,
    /// Their worker.
    pub(super) class: usize,
    /// The place of the data stream's opening among that worker's frames.
    pub(super) position: u64,
    /// When it was opened.
    pub(super) at: Instant,
}

/// What a connection's streams have come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// More may come from the pod.
    Open,
    /// The pod has ended the connection in order.
    End,
    /// It broke.
    Failed(io::ErrorKind, Arc<str>),
}

impl Outcome {
    /// Turns a failure into an error; anything else is an attempt to use what has ended.
    pub(super) fn error(&self) -> io::Error {
        match self {
            Self::Failed(kind, text) => io::Error::new(*kind, text.to_string()),
            Self::Open | Self::End => {
                io::Error::new(io::ErrorKind::BrokenPipe, "the pod has closed the connection")
            }
        }
    }
}

/// One forwarded connection.
#[derive(Debug, Default)]
pub(super) struct Entry {
    /// The pod's port.
    pub(super) port: u16,
    /// Whether it is to have its session for itself.
    pub(super) apart: bool,
    /// Nothing while it waits to be opened.
    pub(super) place: Option<Place>,
    /// Since when it has waited to be opened.
    pub(super) begun_at: Option<Instant>,
    /// What has come and was not read.
    pub(super) received: Chunks,
    /// When some of it was last read, or the first of it came.
    pub(super) read_at: Option<Instant>,
    /// Who waits for bytes.
    pub(super) reader: Option<Waker>,
    /// Who waits to write.
    pub(super) writer: Option<Waker>,
    /// Whether that is for room.
    pub(super) blocked: bool,
    /// The data stream, from the pod.
    pub(super) data: Half,
    /// The error stream.
    pub(super) error: Half,
    /// What came on the error stream.
    pub(super) text: Vec<u8>,
    /// When the first of the two ended.
    pub(super) ended_at: Option<Instant>,
    /// Whether the second has had its time.
    pub(super) late: bool,
    /// Our half.
    pub(super) ours: Ours,
    /// When the peer took the data stream.
    pub(super) replied_at: Option<Instant>,
    /// Whether payload waits until the pod's port has had time to refuse.
    pub(super) hold: bool,
    /// The last batch that has payload of it, and how much.
    pub(super) batch: (u64, usize),
    /// The first batch that has.
    pub(super) first_batch: Option<u64>,
    /// The place of its last payload among its worker's frames; zero before there was one.
    pub(super) last_payload: u64,
    /// Whether the last payload went to the pod.
    pub(super) awaiting: bool,
    /// How much payload went that way, to the pod or from it, since any went the other way.
    pub(super) run: usize,
    /// Whether that has been much.
    pub(super) large: bool,
    /// Since when payload has been waiting to be handed over.
    pub(super) unhanded: Option<Instant>,
    /// Whether the pod has sent anything.
    pub(super) heard: bool,
    /// Payload moved lately, and since when.
    pub(super) moved: (u64, Option<Instant>),
    /// Since when nobody uses it any more: what still comes is dropped.
    pub(super) detached: Option<Instant>,
    /// Whether it stands in the list of connections that wait for a time.
    pub(super) timed: bool,
    /// Why it broke, if that was not told by its streams.
    pub(super) failure: Option<(io::ErrorKind, Arc<str>)>,
}

impl Entry {
    /// Notes payload that went to the pod, or came from it.
    pub(super) fn carried(&mut self, to_pod: bool, bytes: usize) {
        if self.awaiting != to_pod {
            (self.awaiting, self.run) = (to_pod, 0);
        }
        self.run += bytes;
    }

    /// Returns how much payload went to the pod since it last spoke.
    pub(super) fn unheard(&self) -> usize {
        if self.awaiting { self.run } else { 0 }
    }

    /// Notes that the peer's half of one of the two streams has ended.
    pub(super) fn end(&mut self, error_stream: bool, how: Half, now: Instant) {
        let half = if error_stream {
            &mut self.error
        } else {
            &mut self.data
        };
        if *half == Half::Open {
            *half = how;
            self.ended_at.get_or_insert(now);
        }
    }

    /// Appends to the text of a failure.
    pub(super) fn explain(&mut self, bytes: &[u8]) {
        let room = MAX_TEXT.saturating_sub(self.text.len());
        self.text
            .extend_from_slice(bytes.get(..bytes.len().min(room)).unwrap_or_default());
    }

    /// Tells whether the peer has ended one of the two streams.
    pub(super) fn heard_end(&self) -> bool {
        self.ended_at.is_some()
    }

    /// Tells whether both streams have ended, or the second has had its time.
    pub(super) fn is_settled(&self) -> bool {
        let given_up = self.ours == Ours::ResetSent && self.error != Half::Open;
        self.data != Half::Open && self.error != Half::Open || given_up || self.late
    }

    /// Waits for the second of the two ends, which nobody was kept from reading since `read_since`. It has had its time when
    /// something else came that much later: of a silent server nothing can be said. Returns whether it is still to be waited
    /// for.
    pub(super) fn settle(&mut self, read_since: Instant, heard_at: Instant) -> bool {
        let Some(at) = self.ended_at else {
            return false;
        };
        self.late |= heard_at.duration_since(at.max(read_since)) >= SETTLE;
        !self.is_settled()
    }

    /// Judges what has come. An end is believed only when both streams have ended: the text of a failure may come before or
    /// after the end of the data, and containerd 1.7 resets the error stream without any.
    pub(super) fn outcome(&self) -> Outcome {
        if let Some((kind, text)) = &self.failure {
            return Outcome::Failed(*kind, text.clone());
        }
        if !self.is_settled() {
            return Outcome::Open;
        }
        if !self.text.is_empty() {
            let text = String::from_utf8_lossy(&self.text);
            let kind = match cause::kind(&text) {
                // Whoever has answered had not refused, whatever the text says.
                io::ErrorKind::ConnectionRefused if self.heard => io::ErrorKind::ConnectionAborted,
                kind => kind,
            };
            return Outcome::Failed(kind, one_line(&text).into());
        }
        if self.data == Half::Reset || self.error == Half::Reset {
            return Outcome::Failed(
                io::ErrorKind::ConnectionReset,
                "the pod reset the connection".into(),
            );
        }
        if self.data == Half::Open {
            let text = "the pod ended the connection without an end of its data";
            return Outcome::Failed(io::ErrorKind::ConnectionAborted, text.into());
        }
        Outcome::End
    }

    /// Tells whether nothing more can come or go, so that the entry may be forgotten.
    pub(super) fn is_over(&self) -> bool {
        let placed = self.place.is_some();
        self.detached.is_some()
            && (!placed || self.is_settled() && matches!(self.ours, Ours::FinSent | Ours::ResetSent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] =
        b"error forwarding port 80 to pod 1f, uid : failed to connect to localhost:80 inside namespace";

    fn ended(data: Half, error: Half, text: &[u8], now: Instant) -> Entry {
        let mut entry = Entry::default();
        entry.end(false, data, now);
        entry.explain(text);
        entry.end(true, error, now);
        entry
    }

    #[test]
    fn every_runtimes_way_to_end_is_understood() {
        let now = Instant::now();
        let kind = |entry: &Entry| match entry.outcome() {
            Outcome::Failed(kind, _) => Some(kind),
            Outcome::Open | Outcome::End => None,
        };
        assert_eq!(ended(Half::Fin, Half::Fin, b"", now).outcome(), Outcome::End);
        for error in [Half::Fin, Half::Reset] {
            let refused = ended(Half::Fin, error, TEXT, now);
            assert_eq!(
                kind(&refused),
                Some(io::ErrorKind::ConnectionRefused),
                "{error:?}"
            );
        }
        let reset_without_text = ended(Half::Fin, Half::Reset, b"", now);
        assert_eq!(kind(&reset_without_text), Some(io::ErrorKind::ConnectionReset));
        let both_reset = ended(Half::Reset, Half::Reset, b"", now);
        assert_eq!(kind(&both_reset), Some(io::ErrorKind::ConnectionReset));
    }

    #[test]
    fn a_port_that_has_answered_did_not_refuse() {
        let mut entry = ended(Half::Fin, Half::Fin, TEXT, Instant::now());
        entry.heard = true;
        let Outcome::Failed(kind, _) = entry.outcome() else {
            panic!("{:?}", entry.outcome());
        };
        assert_eq!(kind, io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn an_end_is_not_believed_before_the_other_stream_has_ended() {
        let now = Instant::now();
        let mut entry = Entry::default();
        entry.end(false, Half::Fin, now);
        assert_eq!(entry.outcome(), Outcome::Open);
        assert!(
            entry.settle(now + SETTLE, now + SETTLE),
            "it could not be read meanwhile"
        );
        assert!(!entry.settle(now, now + SETTLE));
        assert_eq!(entry.outcome(), Outcome::End, "it is not waited for without end");
        entry.explain(TEXT);
        entry.end(true, Half::Fin, now);
        assert!(matches!(entry.outcome(), Outcome::Failed(..)));
    }

    #[test]
    fn a_failures_text_is_kept_within_bounds() {
        let mut entry = Entry::default();
        (0..100).for_each(|_| entry.explain(&[b'x'; 1000]));
        assert_eq!(entry.text.len(), MAX_TEXT);
    }
}
