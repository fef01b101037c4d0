//! A connection through channels against a server of frames. The clock goes on when nobody has anything to do.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_util::task::TaskTracker;

use super::*;

/// What the connection holds; more than an application's socket is sure to take.
const PIPE: usize = 256 << 10;

/// Opcodes of whole frames.
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8A;

/// The server's side.
struct Server(DuplexStream);

impl Server {
    async fn send(&mut self, first: u8, payload: &[u8]) {
        self.0.write_all(&[first, payload.len() as u8]).await.unwrap();
        self.0.write_all(payload).await.unwrap();
    }

    async fn greet(&mut self) {
        for channel in [0, 1] {
            self.send(BINARY, &[channel, 80, 0]).await;
        }
    }

    /// Greets, and answers the first PING.
    async fn begin(&mut self) {
        self.greet().await;
        assert_eq!(self.next().await, Some((PING, vec![])));
        self.send(PONG, &[]).await;
    }

    /// Says something as the pod.
    async fn say(&mut self, words: &str) {
        self.send(BINARY, &[&[0], words.as_bytes()].concat()).await;
    }

    /// Reads one frame; nothing once the connection has ended.
    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.0.read_u8().await.ok()?;
        let length = match self.0.read_u8().await.ok()? & 0x7F {
            126 => self.0.read_u16().await.ok()?.into(),
            127 => self.0.read_u64().await.ok()?,
            short => short.into(),
        };
        let mut key = [0; 4];
        self.0.read_exact(&mut key).await.ok()?;
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        let unmasked = payload.iter().zip(key.iter().cycle());
        Some((first, unmasked.map(|(byte, key)| byte ^ key).collect()))
    }

    /// Answers PINGs, until something else comes. Returns that.
    async fn serve(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.next().await? {
                (PING, payload) => self.send(PONG, &payload).await,
                other => return Some(other),
            }
        }
    }

    /// Takes so many bytes for the pod.
    async fn take(&mut self, bytes: usize) {
        let mut came = 0;
        while came < bytes {
            match self.serve().await {
                Some((BINARY, message)) => came += message.len() - 1,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Has nothing to say for so long.
    async fn idle(&mut self, time: Duration) {
        let came = tokio::time::timeout(time, self.serve()).await;
        assert!(came.is_err(), "{came:?}");
    }
}

fn scene() -> (Channel<DuplexStream>, Server) {
    scene_in(&Answers::default())
}

/// The same in a cluster of which something is known.
fn scene_in(answers: &Answers) -> (Channel<DuplexStream>, Server) {
    let (ours, theirs) = duplex(PIPE);
    (Channel::new(ours, answers.clone()), Server(theirs))
}

/// Reads until it is known that PINGs are answered; the pod says nothing meanwhile.
async fn learn(channel: &mut Channel<DuplexStream>) {
    let asked = tokio::time::timeout(2 * FIRST, channel.read_u8()).await;
    assert!(asked.is_err());
}

/// How long it takes until `reader` ends, and how.
async fn end(reader: &mut Channel<DuplexStream>) -> (Duration, io::Result<String>) {
    let (begun, mut read) = (Instant::now(), String::new());
    let ended = reader.read_to_string(&mut read).await;
    (begun.elapsed(), ended.map(|_| read))
}

#[tokio::test(start_paused = true)]
async fn an_answer_still_comes_after_our_end_and_then_a_close_goes_out() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.greet().await;
        assert_eq!(server.serve().await, Some((BINARY, b"\0question".to_vec())));
        server.idle(LINGER - Duration::from_secs(1)).await;
        server.say("ans").await;
        server.idle(CUT / 2).await;
        server.say("wer").await;
        let (first, _) = server.serve().await.unwrap();
        assert_eq!(first, CLOSE);
        server.send(CLOSE, &1000_u16.to_be_bytes()).await;
    });
    channel.write_all(b"question").await.unwrap();
    channel.shutdown().await.unwrap();
    assert_eq!(
        channel.write(b"more").await.unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "answer");
    assert!(elapsed < LINGER + 2 * CUT, "{elapsed:?}");
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_never_answers_is_not_waited_for_without_end() {
    let (mut channel, mut server) = scene();
    TaskTracker::new().spawn(async move {
        server.greet().await;
        while let Some((first, payload)) = server.serve().await {
            if first == CLOSE {
                server.send(CLOSE, &payload).await;
            }
        }
    });
    channel.write_all(b"question").await.unwrap();
    channel.shutdown().await.unwrap();
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "");
    assert!((LINGER..LINGER + QUIET).contains(&elapsed), "{elapsed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_silent_after_our_end_has_not_ended_the_answer() {
    let (mut channel, mut server) = scene();
    TaskTracker::new().spawn(async move {
        server.begin().await;
        server.serve().await;
        server.say("half an ans").await;
        while server.next().await.is_some() {}
    });
    learn(&mut channel).await;
    channel.write_all(b"question").await.unwrap();
    channel.shutdown().await.unwrap();
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    assert!(elapsed < LINGER, "{elapsed:?}");
}

#[tokio::test(start_paused = true)]
async fn our_end_waits_for_an_application_that_reads_slowly_and_for_its_answer() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.begin().await;
        tokio::time::sleep(2 * LINGER).await;
        server.take(2 * SWALLOWED).await;
        server.idle(LINGER - Duration::from_secs(1)).await;
        server.say("done").await;
        let (first, _) = server.serve().await.unwrap();
        assert_eq!(first, CLOSE);
        server.send(CLOSE, &1000_u16.to_be_bytes()).await;
    });
    learn(&mut channel).await;
    channel.write_all(&[0; 2 * SWALLOWED]).await.unwrap();
    channel.shutdown().await.unwrap();
    let (_, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "done");
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn our_end_does_not_wait_for_ever_for_an_application_that_never_reads() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.begin().await;
        tokio::time::sleep(2 * UNREAD).await;
        server
    });
    learn(&mut channel).await;
    channel.write_all(&[0; 2 * SWALLOWED]).await.unwrap();
    channel.shutdown().await.unwrap();
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "");
    assert!((UNREAD..UNREAD + QUIET).contains(&elapsed), "{elapsed:?}");
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_falls_silent_is_given_up_in_time() {
    for (asks, most) in [(false, QUIET + ANSWER), (true, ACTIVE + ACTIVE_ANSWER)] {
        let (mut channel, mut server) = scene();
        TaskTracker::new().spawn(async move {
            server.begin().await;
            while server.next().await.is_some() {}
        });
        // A while later.
        let idle = tokio::time::timeout(ACTIVE / 2, channel.read_u8()).await;
        assert!(idle.is_err());
        if asks {
            channel.write_all(b"question").await.unwrap();
        }
        let (elapsed, read) = end(&mut channel).await;
        let error = read.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(error.to_string().ends_with(SILENT), "{error}");
        assert!(elapsed <= most, "{elapsed:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_swallows_everything_is_given_up_and_one_that_answers_pings_never() {
    let (mut channel, mut server) = scene();
    TaskTracker::new().spawn(async move { while server.next().await.is_some() {} });
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    assert!(elapsed <= QUIET + ANSWER, "{elapsed:?}");

    let (mut channel, mut server) = scene();
    TaskTracker::new().spawn(async move {
        server.greet().await;
        while server.serve().await.is_some() {}
    });
    channel.write_all(b"question").await.unwrap();
    let hour = tokio::time::timeout(Duration::from_hours(1), channel.read_u8()).await;
    assert!(hour.is_err(), "{hour:?}");
}

#[tokio::test(start_paused = true)]
async fn silence_from_the_first_moment_takes_a_minute_unless_another_connection_was_answered() {
    let answers = Answers::default();
    for bounds in [UNPROVEN..UNPROVEN + QUIET, FIRST..QUIET + ANSWER] {
        let (mut channel, mut server) = scene_in(&answers);
        TaskTracker::new().spawn(async move {
            server.greet().await;
            while server.next().await.is_some() {}
        });
        let (elapsed, read) = end(&mut channel).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(bounds.contains(&elapsed), "{elapsed:?}");

        let (mut other, mut server) = scene_in(&answers);
        TaskTracker::new().spawn(async move { while server.serve().await.is_some() {} });
        let asked = tokio::time::timeout(2 * FIRST, other.read_u8()).await;
        assert!(asked.is_err(), "{asked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_has_spoken_tells_at_once_whether_pings_are_answered() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.greet().await;
        server.say("hi").await;
        let begun = Instant::now();
        assert_eq!(server.next().await, Some((PING, vec![])));
        (begun.elapsed(), server)
    });
    channel.read_exact(&mut [0; 2]).await.unwrap();
    // Nobody reads on.
    assert_eq!(server.await.unwrap().0, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_read_is_not_taken_for_a_dead_server() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.begin().await;
        // Its read loop waits for the application.
        tokio::time::sleep(Duration::from_mins(10)).await;
        server.take(2 * SWALLOWED).await;
        server.say("done").await;
        server.send(CLOSE, &[]).await;
        server
    });
    learn(&mut channel).await;
    channel.write_all(&[0; 2 * SWALLOWED]).await.unwrap();
    let (_, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "done");
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_word_that_answers_nothing_does_not_prove_that_the_application_reads() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.begin().await;
        tokio::time::sleep(2 * FIRST).await;
        // The application speaks without reading, and the read loop waits for it.
        server.say("wait").await;
        tokio::time::sleep(Duration::from_mins(10)).await;
        server.take(2 * SWALLOWED).await;
        // Now that everything has come, silence means death again.
        assert!(tokio::time::timeout(QUIET, server.serve()).await.is_err());
        while server.next().await.is_some() {}
    });
    learn(&mut channel).await;
    channel.write_all(&[0; 2 * SWALLOWED]).await.unwrap();
    let mut word = [0; 4];
    channel.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"wait");
    let (elapsed, read) = end(&mut channel).await;
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    let alive = Duration::from_mins(10) + QUIET;
    assert!((alive..=alive + QUIET + ANSWER).contains(&elapsed), "{elapsed:?}");
    drop(channel);
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_the_pod_says_after_our_close_still_comes() {
    let (mut channel, mut server) = scene();
    let server = TaskTracker::new().spawn(async move {
        server.greet().await;
        assert_eq!(server.serve().await, Some((BINARY, b"\0question".to_vec())));
        server.say("ans").await;
        assert_eq!(server.serve().await.unwrap().0, CLOSE);
        // The connection itself is not ended: that would overtake what is on its way.
        for word in ["w", "e", "r"] {
            assert!(
                tokio::time::timeout(ACTIVE_ANSWER / 2, server.next())
                    .await
                    .is_err()
            );
            server.say(word).await;
        }
        server.send(CLOSE, &1000_u16.to_be_bytes()).await;
        server
    });
    channel.write_all(b"question").await.unwrap();
    channel.shutdown().await.unwrap();
    let (_, read) = end(&mut channel).await;
    assert_eq!(read.unwrap(), "answer");
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_breaks_is_no_end() {
    let (mut channel, mut server) = scene();
    server.greet().await;
    server.say("half").await;
    drop(server);
    let mut half = [0; 4];
    channel.read_exact(&mut half).await.unwrap();
    let error = channel.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
}
