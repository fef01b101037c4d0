//! Pairs of streams, each a forwarded connection, after `cri-streaming:pkg/streaming/portforward/httpstream.go`.
//!
//! The streams of a pair have one `requestid`: `data` carries bytes both ways, `error` the text of a failure.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::session::Session;
use super::stream::Stream;
use crate::testing::cluster::lock;
use crate::testing::portforward::closing::{self, Step};
use crate::testing::portforward::pod::{Client, Gone};

/// Time within which the second stream of a pair must arrive (`DefaultStreamCreationTimeout`).
pub(super) const PAIR_TIMEOUT: Duration = Duration::from_secs(30);

/// Half pairs by request id.
pub(super) type Pairs = Mutex<HashMap<String, Pair>>;

/// The streams of a pair that have come.
#[derive(Clone, Debug, Default)]
pub(super) struct Pair {
    /// `streamtype: data`
    data: Option<Arc<Stream>>,
    /// `streamtype: error`
    error: Option<Arc<Stream>>,
    /// Cancelled when both have come.
    complete: CancellationToken,
}

/// What a new stream is for.
#[derive(Debug)]
pub(super) struct Purpose {
    /// A data stream, else an error stream.
    data: bool,
    /// Container port.
    port: u16,
    /// Names the pair.
    request: String,
}

impl Purpose {
    /// Reads the headers of stream `id`; `None` when they are wrong.
    pub(super) fn of(headers: &HashMap<String, String>, id: u32) -> Option<Self> {
        let data = match headers.get("streamtype")?.as_str() {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        let port = headers.get("port")?.parse().ok().filter(|&port| port != 0)?;
        // Clients without request ids open the error stream, then the data stream two ids further.
        let guessed = || i64::from(id) - if data { 2 } else { 0 };
        let request = headers
            .get("requestid")
            .filter(|request| !request.is_empty())
            .cloned()
            .unwrap_or_else(|| guessed().to_string());
        Some(Self { data, port, request })
    }
}

impl Session {
    /// Puts a stream to its other half; starts the forward when both are there.
    pub(super) async fn pair(self: &Arc<Self>, stream: Arc<Stream>, purpose: Purpose) {
        let Purpose { data, port, request } = purpose;
        let (pair, new, duplicate) = {
            let mut pairs = lock(&self.pairs);
            let new = !pairs.contains_key(&request);
            let pair = pairs.entry(request.clone()).or_default();
            let half = if data { &mut pair.data } else { &mut pair.error };
            let duplicate = half.is_some();
            half.get_or_insert(stream);
            let pair = pair.clone();
            if pair.data.is_some() && pair.error.is_some() {
                pair.complete.cancel();
                pairs.remove(&request);
            }
            (pair, new, duplicate)
        };
        if new {
            let (session, pair, request) = (self.clone(), pair.clone(), request.clone());
            self.spawn(async move { session.await_pair(&pair, &request).await });
        }
        match (pair.data, pair.error) {
            (_, error) if duplicate => {
                let kind = if data { "data" } else { "error" };
                let text =
                    format!("error processing stream for request {request}: {kind} stream already assigned");
                if let Some(error) = error {
                    let _ = self.write(&error, text.as_bytes()).await;
                }
            }
            (Some(data), Some(error)) => {
                let session = self.clone();
                self.spawn(async move { session.forward(port, data, &error).await });
            }
            _ => {}
        }
    }

    /// Gives half a pair up when its other half does not come: a text on the error stream, if it is the half that came;
    /// no stream ends.
    async fn await_pair(&self, pair: &Pair, request: &str) {
        tokio::select! {
            () = tokio::time::sleep(PAIR_TIMEOUT) => {}
            () = pair.complete.cancelled() => return,
        }
        let left = {
            let mut pairs = lock(&self.pairs);
            if pair.complete.is_cancelled() {
                return;
            }
            pairs.remove(request)
        };
        if let Some(error) = left.and_then(|pair| pair.error) {
            let text = format!("(conn=0xc000526140, request={request}) timed out waiting for streams");
            let _ = self.write(&error, text.as_bytes()).await;
        }
    }

    /// Runs one forwarded connection and ends its streams.
    async fn forward(&self, port: u16, data: Arc<Stream>, error: &Stream) {
        let client = DataStream {
            session: self,
            stream: &data,
        };
        let outcome = self.pod.forward(port, &client).await;
        let ending = async {
            for step in closing::steps(self.pod.cluster.runtime(), &outcome.end) {
                match step {
                    Step::CloseData => self.close(&data).await,
                    Step::ResetData => self.reset(&data).await,
                    Step::CloseError => self.close(error).await,
                    Step::ResetError => self.reset(error).await,
                    Step::Text => {
                        let text = outcome.end.text().unwrap_or_default();
                        let _ = self.write(error, text.as_bytes()).await;
                    }
                }
            }
        };
        let left_over = async {
            if outcome.reading {
                data.read().await;
            }
        };
        tokio::join!(ending, left_over);
    }
}

/// A data stream as the pod sees it.
struct DataStream<'a> {
    /// Sends the frames.
    session: &'a Session,
    /// The stream.
    stream: &'a Stream,
}

impl Client for DataStream<'_> {
    async fn read(&self) -> Option<Bytes> {
        self.stream.read().await
    }

    async fn write(&self, bytes: Bytes) -> Result<(), Gone> {
        self.session.write(self.stream, &bytes).await
    }
}
