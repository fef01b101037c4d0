//! Opaque connections: bytes both ways between a client's socket and a pod's port, whatever they mean.
//!
//! Nothing is copied into buffers of a connection's own: what the pod sends is written to the socket from where the transport
//! received it, and what the client sends passes through one buffer per thread, so that a quiet connection costs next to
//! nothing and a busy one no allocation. A transfer's bytes go straight to where the transport sends them from.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::transport::BoxStream;

/// How much is read from a client at once.
const READ: usize = 64 << 10;

/// How long what a client still sends is taken and dropped once the pod has ended the connection: closing the socket with
/// bytes unread would take the pod's last bytes away from the client.
const LINGER: Duration = Duration::from_secs(1);

/// How many buffers of connections that had to wait each thread keeps for the next ones: a megabyte at most.
const SPARE: usize = 16;

thread_local! {
    /// What has just been read from some client. Nothing stays in it.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());

    /// Empty buffers for what a pod does not take at once.
    static SPARES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// How many bytes a connection has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Carried {
    /// From the client to the pod.
    pub to_pod: u64,
    /// From the pod to the client.
    pub to_client: u64,
}

/// Carries bytes both ways until both sides have ended, or one has failed. Dropping the future closes both sides.
///
/// When the client ends its side, the pod's answer still arrives. When the pod's side fails, the client's socket is reset, so
/// that it does not look like an orderly end.
///
/// # Errors
/// The first error of either side.
pub async fn relay(mut client: TcpStream, mut pod: BoxStream) -> io::Result<Carried> {
    let _ = client.set_nodelay(true);
    let mut relay = Relay::default();
    let carried = poll_fn(|cx| relay.poll(&mut client, &mut pod, cx)).await;
    match carried {
        Ok(()) => {
            client.shutdown().await?;
            if !relay.client_ended {
                let mut rest = tokio::io::sink();
                let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut client, &mut rest)).await;
            }
            Ok(relay.carried)
        }
        Err(error) => {
            let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
            Err(error)
        }
    }
}

/// Which side has failed on the way to the pod.
enum Broken {
    Client(io::Error),
    Pod(io::Error),
}

#[derive(Default)]
struct Relay {
    /// What the client has sent and the pod has not taken yet, from the given place on.
    pending: Vec<u8>,
    taken: usize,
    client_ended: bool,
    /// Whether the pod's side knows of that.
    pod_told: bool,
    carried: Carried,
}

impl Relay {
    /// Resolves when the pod has ended the connection; there is nobody to send to then.
    fn poll(
        &mut self,
        client: &mut TcpStream,
        pod: &mut BoxStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        // The client first: its first bytes then leave together with the opening of the connection.
        match self.poll_upload(client, pod, cx) {
            Poll::Ready(Err(Broken::Client(error))) => Poll::Ready(Err(error)),
            Poll::Ready(Err(Broken::Pod(error))) => {
                // Why the pod takes nothing more is told to its reader.
                let ended = ready!(self.poll_download(client, pod, cx)).is_ok();
                let in_order = ended && error.kind() == io::ErrorKind::BrokenPipe;
                Poll::Ready(if in_order { Ok(()) } else { Err(error) })
            }
            Poll::Ready(Ok(())) | Poll::Pending => self.poll_download(client, pod, cx),
        }
    }

    fn poll_upload(
        &mut self,
        client: &mut TcpStream,
        pod: &mut BoxStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        loop {
            while let Some(rest) = self.pending.get(self.taken..)
                && !rest.is_empty()
            {
                let sent = ready!(Pin::new(&mut *pod).poll_write(cx, rest)).map_err(Broken::Pod)?;
                self.taken += sent;
                self.carried.to_pod += sent as u64;
            }
            self.release();
            if self.client_ended {
                if !self.pod_told {
                    ready!(Pin::new(&mut *pod).poll_shutdown(cx)).map_err(Broken::Pod)?;
                    self.pod_told = true;
                }
                return Poll::Ready(Ok(()));
            }
            let read = match pod.poll_send_from(client, cx) {
                Some(sent) => sent
                    .map_ok(|sent| {
                        self.carried.to_pod += sent as u64;
                        sent
                    })
                    .map_err(Broken::Client),
                None => self.poll_pass(client, pod, cx),
            };
            let Poll::Ready(read) = read else {
                // What was taken leaves although nothing comes that would take it along.
                let _ = Pin::new(&mut *pod).poll_flush(cx).map_err(Broken::Pod)?;
                return Poll::Pending;
            };
            self.client_ended = read? == 0;
        }
    }

    /// Reads from the client, and writes to the pod what it takes at once. Resolves with how much the client had sent.
    fn poll_pass(
        &mut self,
        client: &mut TcpStream,
        pod: &mut BoxStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize, Broken>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *client).poll_read(cx, &mut buffer)).map_err(Broken::Client)?;
            let bytes = buffer.filled();
            let sent = match Pin::new(&mut *pod).poll_write(cx, bytes) {
                Poll::Ready(sent) if !bytes.is_empty() => sent.map_err(Broken::Pod)?,
                Poll::Ready(_) | Poll::Pending => 0,
            };
            self.carried.to_pod += sent as u64;
            if let Some(rest) = bytes.get(sent..)
                && !rest.is_empty()
            {
                self.pending = SPARES.with_borrow_mut(|spares| spares.pop().unwrap_or_default());
                self.pending.extend_from_slice(rest);
            }
            Poll::Ready(Ok(bytes.len()))
        })
    }

    /// Gives back the buffer of what was waiting, so that a quiet connection has none.
    fn release(&mut self) {
        let mut buffer = std::mem::take(&mut self.pending);
        self.taken = 0;
        buffer.clear();
        if buffer.capacity() > 0 {
            SPARES.with_borrow_mut(|spares| {
                if spares.len() < SPARE {
                    spares.push(buffer);
                }
            });
        }
    }

    fn poll_download(
        &mut self,
        client: &mut TcpStream,
        pod: &mut BoxStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let bytes = ready!(Pin::new(&mut *pod).poll_fill_buf(cx))?;
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let written = ready!(Pin::new(&mut *client).poll_write(cx, bytes))?;
            Pin::new(&mut *pod).consume(written);
            self.carried.to_client += written as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, BufReader, DuplexStream, WriteHalf, duplex};
    use tokio::net::TcpListener;

    use super::*;

    /// The way to a pod, which has to be asked twice for its end.
    struct Reluctant {
        way: WriteHalf<DuplexStream>,
        asked: bool,
    }

    impl AsyncWrite for Reluctant {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.way).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.way).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            if std::mem::replace(&mut self.asked, true) {
                return Pin::new(&mut self.way).poll_shutdown(cx);
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    /// A client, and the socket at which the proxy has it.
    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_client_that_gives_up_ends_it_though_the_pod_is_silent() {
        let (mut client, socket) = connected().await;
        let (stream, mut pod) = duplex(1 << 10);
        let talking = async {
            client.write_all(b"question").await.unwrap();
            pod.read_exact(&mut [0; 8]).await.unwrap();
            SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
        };
        let both = async { tokio::join!(relay(socket, Box::new(BufReader::new(stream))), talking) };
        let (carried, ()) = tokio::time::timeout(10 * LINGER, both).await.expect("it stays");
        assert_eq!(carried.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(pod.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_pod_that_is_slow_to_take_the_clients_end_gets_it() {
        let (mut client, socket) = connected().await;
        let (stream, mut pod) = duplex(1 << 10);
        let (back, way) = tokio::io::split(stream);
        let stream = tokio::io::join(back, Reluctant { way, asked: false });
        let relaying = relay(socket, Box::new(BufReader::new(stream)));
        let talking = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = String::new();
            pod.read_to_string(&mut question).await.unwrap();
            pod.write_all(b"answer").await.unwrap();
            drop(pod);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            (question, answer)
        };
        let both = async { tokio::join!(relaying, talking) };
        let (carried, said) = tokio::time::timeout(10 * LINGER, both)
            .await
            .expect("it never got it");
        assert_eq!(said, ("question".into(), "answer".into()));
        assert_eq!(
            carried.unwrap(),
            Carried {
                to_pod: 8,
                to_client: 6
            }
        );
    }
}
