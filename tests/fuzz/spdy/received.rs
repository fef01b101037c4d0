//! A second reading of a server's SPDY/3.1 frames, to compare with.

/// What a client may act upon.
#[derive(Debug)]
pub(super) enum Seen {
    Reply(u32),
    /// A part of a frame; whether the stream has ended.
    Data(u32, Vec<u8>, bool),
    Reset(u32),
    Pong(u32),
    Other,
}

#[derive(Default)]
pub(super) struct Received {
    buffer: Vec<u8>,
    /// Of a DATA frame: stream, bytes to come, whether it ends the stream.
    data: Option<(u32, usize, bool)>,
    /// Of a control frame: bytes to come that mean nothing.
    skipped: usize,
    broken: bool,
}

impl Received {
    /// Whether nothing that follows can be understood.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<Seen> {
        self.buffer.extend(bytes);
        let mut seen = Vec::new();
        while !self.broken
            && let Some(event) = self.next()
        {
            seen.push(event);
        }
        seen
    }

    fn next(&mut self) -> Option<Seen> {
        let skipped = self.skipped.min(self.buffer.len());
        self.buffer.drain(..skipped);
        self.skipped -= skipped;
        if self.skipped > 0 {
            return None;
        }
        if let Some((stream, left, fin)) = &mut self.data {
            if self.buffer.is_empty() && *left > 0 {
                return None;
            }
            let part: Vec<u8> = self.buffer.drain(..self.buffer.len().min(*left)).collect();
            *left -= part.len();
            let last = *left == 0;
            let event = Seen::Data(*stream, part, *fin && last);
            if last {
                self.data = None;
            }
            return Some(event);
        }
        let word = |at: usize| {
            Some(u32::from_be_bytes(
                self.buffer.get(at..at + 4)?.try_into().expect("as many bytes"),
            ))
        };
        let (first, second) = (word(0)?, word(4)?);
        let length = second as usize & 0xff_ffff;
        if first >> 31 == 0 {
            self.buffer.drain(..8);
            self.data = Some((first, length, second >> 24 & 1 == 1));
            return self.next();
        }
        // The least length of each type that exists (SPDY/3.1 section 2.6); the eighth and ninth have none that matters.
        let least = match (first >> 16, first & 0xffff) {
            (0x8003, 2 | 6) => 4,
            (0x8003, 3 | 7) => 8,
            (0x8003, 1 | 4 | 8 | 9) => 0,
            _ => usize::MAX,
        };
        if length < least || length > 64 << 10 {
            self.broken = true;
            return None;
        }
        let stream = if least > 0 { word(8)? } else { 0 };
        if self.buffer.len() < 8 + least {
            return None;
        }
        self.buffer.drain(..8 + least);
        self.skipped = length - least;
        Some(match first & 0xffff {
            2 => Seen::Reply(stream & 0x7fff_ffff),
            3 => Seen::Reset(stream & 0x7fff_ffff),
            6 => Seen::Pong(stream),
            _ => Seen::Other,
        })
    }
}
