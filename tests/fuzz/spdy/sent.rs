//! What a session writes, as its peer sees it: frames in order, streams that obey, queues that never fill.

use std::collections::BTreeMap;

use super::received::Seen;

/// What one of the peer's five workers can have waiting (`moby/spdystream:connection.go`, `QUEUE_SIZE`).
const QUEUE: usize = 50;

/// The largest payload of a frame.
const MOST_PAYLOAD: usize = 512 << 10;

/// The id of a stream that is refused by the read loop, and takes no worker's time.
const PROBE: u32 = 1;

#[derive(Default)]
pub(super) struct Sent {
    last_id: u32,
    /// Whether the headers' zlib stream has begun.
    begun: bool,
    /// The error stream whose data stream must come next.
    half: Option<u32>,
    streams: BTreeMap<u32, Stream>,
    /// Streams without headers, with their places.
    barriers: BTreeMap<u32, usize>,
    pings: u32,
    unanswered: BTreeMap<u32, usize>,
    workers: [Worker; 5],
}

struct Stream {
    place: usize,
    ended: bool,
    payload: usize,
    byte: u8,
}

#[derive(Default)]
struct Worker {
    sent: usize,
    handed: usize,
}

impl Sent {
    /// How much payload a stream has had, and of which bytes it was.
    pub(super) fn payload(&self, stream: u32) -> (usize, u8) {
        let stream = &self.streams[&stream];
        (stream.payload, stream.byte)
    }

    /// PINGs without an answer.
    pub(super) fn unanswered(&self) -> Vec<u32> {
        self.unanswered.keys().copied().collect()
    }

    /// Notes what the peer says about its workers.
    pub(super) fn answered(&mut self, event: &Seen) {
        let (class, place) = match event {
            Seen::Pong(id) => (*id as usize / 2 % 5, self.unanswered.remove(id)),
            Seen::Reply(id) => (*id as usize % 5, self.streams.get(id).map(|stream| stream.place)),
            Seen::Reset(id) => (*id as usize % 5, self.barriers.get(id).copied()),
            Seen::Data(..) | Seen::Other => return,
        };
        if let Some(place) = place {
            let worker = &mut self.workers[class];
            worker.handed = worker.handed.max(place);
        }
    }

    /// Takes whole frames.
    pub(super) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("as many bytes"));
            let (first, second) = (word(0), word(4));
            let (flags, length) = (second >> 24, second as usize & 0xff_ffff);
            let payload = &bytes[8..8 + length];
            assert!(
                self.half.is_none() || first == 0x8003_0001,
                "the halves of a pair are parted"
            );
            match first {
                0x8003_0001 => self.open(word(8), flags, &payload[4..]),
                0x8003_0003 => {
                    assert_eq!((length, word(12)), (8, 5), "a reset that cancels");
                    self.end(word(8));
                }
                0x8003_0006 => {
                    assert_eq!((length, word(8)), (4, 2 * self.pings + 1), "PINGs are counted");
                    let place = self.queue(self.pings as usize);
                    self.unanswered.insert(word(8), place);
                    self.pings += 1;
                }
                stream if stream >> 31 == 0 => self.data(stream, flags, payload),
                other => panic!("frame {other:#x}"),
            }
            bytes = &bytes[8 + length..];
        }
        assert!(self.half.is_none(), "half a pair");
    }

    fn open(&mut self, id: u32, flags: u32, rest: &[u8]) {
        let (zeroes, block) = rest.split_at(6);
        assert_eq!(zeroes, [0; 6]);
        let headers = self.inflate(block);
        assert_eq!(id % 2, 1, "a client's streams are odd");
        if id == PROBE {
            assert!(headers.is_empty() && flags == 1 && self.last_id > PROBE);
            return;
        }
        assert!(id > self.last_id, "stream {id} after {}", self.last_id);
        self.last_id = id;
        let place = self.queue(id as usize);
        if headers.is_empty() {
            assert!(self.half.is_none() && flags == 1);
            self.barriers.insert(id, place);
            return;
        }
        let kind = match self.half.take() {
            None => {
                self.half = Some(id);
                ("error", 1, id + 10)
            }
            Some(error) => {
                assert_eq!(id, error + 10, "one worker has both");
                let stream = Stream {
                    place,
                    ended: false,
                    payload: 0,
                    byte: 0,
                };
                self.streams.insert(id, stream);
                ("data", 0, id)
            }
        };
        assert_eq!(flags, kind.1);
        let [streamtype, port, request] = &headers[..] else {
            panic!("{headers:?}");
        };
        assert_eq!(*streamtype, ("streamtype".into(), kind.0.into()));
        assert!(port.0 == "port" && port.1.starts_with('8'));
        assert_eq!(*request, ("requestid".into(), kind.2.to_string()));
    }

    /// Reads headers out of their one stored block, with the sync flush behind it (RFC 1951 section 3.2.4).
    fn inflate(&mut self, block: &[u8]) -> Vec<(String, String)> {
        let begin: &[u8] = if self.begun { &[] } else { &[0x78, 0x01] };
        self.begun = true;
        let block = block
            .strip_prefix(begin)
            .expect("the beginning of the zlib stream");
        let block = block.strip_prefix(&[0]).expect("a stored block");
        let (lengths, block) = block.split_at(4);
        let length = u16::from_le_bytes([lengths[0], lengths[1]]);
        assert_eq!(length, !u16::from_le_bytes([lengths[2], lengths[3]]));
        let (mut text, flush) = block.split_at(length.into());
        assert_eq!(flush, [0, 0, 0, 0xff, 0xff]);
        let mut number = || {
            let (number, rest) = text.split_first_chunk().expect("a number");
            text = rest;
            u32::from_be_bytes(*number)
        };
        let count = number();
        let mut headers = Vec::new();
        let mut rest = text;
        let mut string = || {
            let (length, behind) = rest.split_first_chunk().expect("a number");
            let (string, behind) = behind.split_at(u32::from_be_bytes(*length) as usize);
            rest = behind;
            String::from_utf8(string.to_vec()).expect("text")
        };
        for _ in 0..count {
            headers.push((string(), string()));
        }
        assert!(rest.is_empty());
        headers
    }

    fn data(&mut self, id: u32, flags: u32, payload: &[u8]) {
        assert!(payload.len() <= MOST_PAYLOAD);
        if flags == 1 {
            assert!(payload.is_empty());
            self.end(id);
            return;
        }
        assert_eq!(flags, 0);
        self.queue(id as usize);
        let stream = self.streams.get_mut(&id).expect("a stream that was opened");
        assert!(!stream.ended, "payload after our end");
        stream.payload += payload.len();
        if let Some(byte) = payload.first() {
            assert!(stream.byte == *byte || stream.payload == payload.len());
            stream.byte = *byte;
            assert!(
                payload.iter().all(|other| other == byte),
                "bytes of another connection"
            );
        }
    }

    fn end(&mut self, id: u32) {
        self.queue(id as usize);
        self.streams.get_mut(&id).expect("a stream that was opened").ended = true;
    }

    /// Puts a frame into a worker's queue and returns its place there.
    fn queue(&mut self, class: usize) -> usize {
        let worker = &mut self.workers[class % 5];
        worker.sent += 1;
        assert!(
            worker.sent - worker.handed <= QUEUE,
            "the queue of a worker is full"
        );
        worker.sent
    }
}
