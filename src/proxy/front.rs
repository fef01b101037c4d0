//! The client's side of an HTTP/1.1 connection, below the HTTP library: what the library has no means for. Interim responses
//! go out between the library's own bytes, a client that only stopped sending still gets its answer, and a client that is
//! still sending is not reset before it has read the answer.

mod interim;
mod linger;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderMap, Request, StatusCode, Version};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::proxy::front::interim::Interim;
use crate::proxy::front::linger::Linger;
use crate::proxy::http::headers;

/// How long a client that has stopped sending is taken to be waiting for the answer to its last request. By then it counts
/// as gone, which looks the same.
const HALF_CLOSED: Duration = Duration::from_mins(1);

/// What the stream and the requests on it tell each other.
#[derive(Debug, Default)]
pub(super) struct Front {
    /// Whether the client may have sent, or be sending, what nobody has read: then closing would reset the connection.
    unread: AtomicBool,
    /// Whether the client said that it sends no request after this one.
    last: AtomicBool,
    /// Whether the answer to that has begun.
    answered: AtomicBool,
    /// Whether the body of the last request will not be read to its end.
    abandoned: AtomicBool,
    /// Whether the bytes are another protocol's by now.
    upgraded: AtomicBool,
    interim: Interim,
}

impl Front {
    /// Notes that a request's head has arrived.
    pub(super) fn begin<B: Body>(&self, request: &Request<B>) {
        let lists = |member| headers::lists(request.headers(), CONNECTION, member);
        let last = lists("close") || (request.version() == Version::HTTP_10 && !lists("keep-alive"));
        self.last.store(last, Ordering::Relaxed);
        self.answered.store(false, Ordering::Relaxed);
        if request.body().is_end_stream() {
            self.body_read();
        }
    }

    /// Notes that the request's body has been read to its end.
    pub(super) fn body_read(&self) {
        self.unread.store(false, Ordering::Relaxed);
    }

    /// Notes that nobody will read the rest of the request's body.
    pub(super) fn abandon_body(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Tells whether the connection ends with the answer, because the request's body stands before the next request.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// Notes that the bytes from here on are another protocol's.
    pub(super) fn upgrade(&self) {
        self.upgraded.store(true, Ordering::Relaxed);
    }

    /// Sends an interim response before the final one. To be called only while that has not begun, and only for a client of
    /// HTTP/1.1 (RFC 9110 section 15.2).
    pub(super) fn interim(&self, status: StatusCode, headers: &HeaderMap) {
        self.interim.push(status, headers);
    }

    /// Notes that the library writes bytes of its own.
    fn writes(&self) {
        self.answered.store(true, Ordering::Relaxed);
        self.interim.began();
    }

    /// Whether the end of what the client sends is just that: it waits for the answer to its last request.
    fn is_half_closed(&self) -> bool {
        self.last.load(Ordering::Relaxed)
            && !self.unread.load(Ordering::Relaxed)
            && !self.upgraded.load(Ordering::Relaxed)
    }
}

/// A client's stream, as the HTTP library sees it.
#[derive(Debug)]
pub(super) struct FrontStream<S> {
    stream: S,
    front: Arc<Front>,
    /// Whether the client has stopped sending.
    ended: bool,
    /// Runs while that is kept from the library.
    hidden: Option<Pin<Box<Sleep>>>,
    /// How long a client may go on sending when its answer is there, and the state of that closing, once it has begun.
    patience: Duration,
    linger: Option<Linger>,
}

impl<S> FrontStream<S> {
    /// Wraps a stream whose requests know `front`. A client may go on sending for as long as `patience` when its answer is there.
    pub(super) fn new(stream: S, front: Arc<Front>, patience: Duration) -> Self {
        Self {
            stream,
            front,
            ended: false,
            hidden: None,
            patience,
            linger: None,
        }
    }
}

impl<S: AsyncRead + Unpin> FrontStream<S> {
    /// Tells the library of the end, at once or when the client has waited long enough. Once the answer has begun, writing it
    /// shows whether the client is there.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.front.is_half_closed() {
            return Poll::Ready(Ok(()));
        }
        if self.front.answered.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        self.hidden
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(HALF_CLOSED)))
            .as_mut()
            .poll(cx)
            .map(Ok)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrontStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended {
            return self.poll_ended(cx);
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.front.unread.store(true, Ordering::Relaxed);
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(())); // nothing was asked for
        }
        self.ended = true;
        self.poll_ended(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for FrontStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.front.interim.poll_write_to(cx, &mut this.stream))?;
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf));
        this.front.writes();
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.front.interim.poll_write_to(cx, &mut this.stream))?;
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs));
        this.front.writes();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.front.interim.flushed(cx.waker());
        ready!(this.front.interim.poll_write_to(cx, &mut this.stream))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            let still_sending = this.front.unread.load(Ordering::Relaxed)
                && !this.front.upgraded.load(Ordering::Relaxed)
                && !this.ended;
            if !still_sending {
                return Poll::Ready(Ok(()));
            }
        }
        this.linger
            .get_or_insert_with(|| Linger::new(this.patience))
            .poll(cx, &mut this.stream)
            .map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{Empty, Full};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::Instant;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (DuplexStream, FrontStream<DuplexStream>, Arc<Front>) {
        let (client, server) = duplex(1 << 20);
        let front = Arc::new(Front::default());
        (client, FrontStream::new(server, front.clone(), PATIENCE), front)
    }

    fn closing() -> Request<Empty<bytes::Bytes>> {
        Request::builder()
            .header("connection", "close")
            .body(Empty::new())
            .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_last_request_is_not_the_end_of_the_client() {
        let (mut client, mut stream, front) = pair();
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        stream.read_exact(&mut [0; 7]).await.unwrap();
        front.begin(&closing());
        let before = Instant::now();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(before.elapsed(), HALF_CLOSED);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_has_begun_goes_on_for_as_long_as_it_takes() {
        let (mut client, mut stream, front) = pair();
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        stream.read_exact(&mut [0; 7]).await.unwrap();
        front.begin(&closing());
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
        let mut byte = [0];
        let reading = tokio::time::timeout(10 * HALF_CLOSED, stream.read(&mut byte)).await;
        assert!(reading.is_err(), "{reading:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_in_the_middle_of_a_body_or_between_requests_is_told_at_once() {
        let (mut client, mut stream, front) = pair();
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        stream.read_exact(&mut [0; 7]).await.unwrap();
        let before = Instant::now();
        front.begin(&closing().map(|_| Full::new(bytes::Bytes::from_static(b"body"))));
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        front.begin(&Request::new(Empty::<bytes::Bytes>::new()));
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn closing_waits_for_a_client_that_is_still_sending_and_for_no_other() {
        let (mut client, mut stream, front) = pair();
        client.write_all(b"request and").await.unwrap();
        stream.read_exact(&mut [0; 11]).await.unwrap();
        let before = Instant::now();
        let sending = async {
            let mut sent = 0;
            while client.write_all(&[0; 1 << 16]).await.is_ok() {
                sent += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
                if sent == 20 {
                    client.shutdown().await.unwrap();
                    return;
                }
            }
            panic!("cut off while sending");
        };
        let (closed, ()) = tokio::join!(stream.shutdown(), sending);
        closed.unwrap();
        assert_eq!(before.elapsed().as_secs(), 2, "until the client was done");

        let (mut client, mut stream, _front_of_endless) = pair();
        client.write_all(b"request and").await.unwrap();
        stream.read_exact(&mut [0; 11]).await.unwrap();
        let before = Instant::now();
        let sending = async {
            while client.write_all(&[0; 1 << 10]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            closed = stream.shutdown() => closed.unwrap(),
            () = sending => panic!("cut off while sending"),
        }
        assert_eq!(
            before.elapsed().as_secs(),
            PATIENCE.as_secs(),
            "no longer than that"
        );

        let (mut client, mut stream, front_of_idle) = pair();
        client.write_all(b"request").await.unwrap();
        stream.read_exact(&mut [0; 7]).await.unwrap();
        front_of_idle.begin(&Request::new(Empty::<bytes::Bytes>::new()));
        let before = Instant::now();
        stream.shutdown().await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);
        drop(front);
    }

    #[tokio::test(start_paused = true)]
    async fn interim_responses_come_before_the_final_one_and_never_inside_another() {
        let (mut client, mut stream, front) = pair();
        let mut fields = HeaderMap::new();
        fields.insert("link", "</style.css>; rel=preload".parse().unwrap());
        fields.insert("connection", "close".parse().unwrap());
        stream.flush().await.unwrap();
        front.interim(StatusCode::EARLY_HINTS, &fields);
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
        front.interim(StatusCode::PROCESSING, &fields);
        stream.write_all(b"\r\n").await.unwrap();
        stream.flush().await.unwrap();
        drop(stream);
        let mut seen = String::new();
        client.read_to_string(&mut seen).await.unwrap();
        assert_eq!(
            seen,
            "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
        );
    }
}
