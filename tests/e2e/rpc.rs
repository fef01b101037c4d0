//! gRPC as it is on the wire (grpc/doc/PROTOCOL-HTTP2.md): calls of the interop test service, over a connection of a test's own.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::Request;
use hyper::body::Frame;
use tokio::sync::mpsc::UnboundedSender;

use crate::client::{Body, Client, Pieces, pieces};

/// `response_size` 3 of `SimpleRequest`, and the `SimpleResponse` that it asks for: `payload.body` of three zeros.
const UNARY: &[u8] = &[0x10, 3];
const ANSWER: &[u8] = &[0x0a, 5, 0x12, 3, 0, 0, 0];
/// The same with `response_parameters.size` of `StreamingOutputCallRequest`.
const STREAMING: &[u8] = &[0x12, 2, 0x08, 3];

/// Makes a unary call. Returns the name of the pod that answered.
pub(crate) async fn unary(client: &mut Client, host: &str) -> Result<String> {
    let (send, body) = pieces();
    send_message(&send, UNARY)?;
    drop(send);
    let (pod, mut answer) = call(client, host, "UnaryCall", body).await?;
    ensure!(message(&mut answer).await? == ANSWER);
    ended_well(&mut answer).await?;
    Ok(pod)
}

/// A call that both sides can go on with.
pub(crate) struct Bidi {
    send: UnboundedSender<Frame<Bytes>>,
    answer: Pieces,
    /// The pod at its other end.
    pub(crate) pod: String,
}

impl Bidi {
    /// Begins with one message and its answer.
    pub(crate) async fn open(client: &mut Client, host: &str) -> Result<Self> {
        let (send, body) = pieces();
        send_message(&send, STREAMING)?;
        let (pod, answer) = call(client, host, "FullDuplexCall", body).await?;
        let mut this = Self { send, answer, pod };
        ensure!(message(&mut this.answer).await? == ANSWER);
        Ok(this)
    }

    /// Sends another message and gets its answer.
    pub(crate) async fn again(&mut self) -> Result<()> {
        send_message(&self.send, STREAMING)?;
        ensure!(message(&mut self.answer).await? == ANSWER);
        Ok(())
    }

    /// Ends it.
    pub(crate) async fn close(mut self) -> Result<()> {
        drop(self.send);
        ended_well(&mut self.answer).await
    }
}

async fn call(client: &mut Client, host: &str, method: &str, body: Body) -> Result<(String, Pieces)> {
    let request = Request::post(format!("/grpc.testing.TestService/{method}"))
        .header("host", host)
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let response = client.send(request.body(body)?).await?;
    let (head, body) = response.into_parts();
    ensure!(head.status == 200, "{}", head.status);
    if let Some(status) = head.headers.get("grpc-status") {
        bail!("grpc-status {status:?} {:?}", head.headers.get("grpc-message"));
    }
    let pod = head.headers.get("x-pod").context("no pod")?;
    Ok((pod.to_str()?.to_owned(), Pieces::of(body)))
}

fn send_message(send: &UnboundedSender<Frame<Bytes>>, message: &[u8]) -> Result<()> {
    let length = u32::try_from(message.len())?.to_be_bytes();
    send.send(Frame::data([&[0], &length[..], message].concat().into()))?;
    Ok(())
}

/// Reads a message, uncompressed.
async fn message(answer: &mut Pieces) -> Result<Vec<u8>> {
    let head = answer.take(5).await?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    answer.take(length.try_into()?).await
}

async fn ended_well(answer: &mut Pieces) -> Result<()> {
    let trailers = answer.end().await?.context("no trailers")?;
    ensure!(
        trailers.get("grpc-status").is_some_and(|status| status == "0"),
        "{trailers:?}"
    );
    Ok(())
}
