//! Bytes that have come for one stream and wait for its reader, in pieces of one size that a session's streams share.

use std::collections::VecDeque;

/// The size of a piece, which a reader takes at once: four TLS records of the way to the pod, since each write to a client's
/// socket costs a wake-up.
const SIZE: usize = 64 << 10;

/// How many unused pieces a session keeps: enough for a bulk stream not to allocate, a megabyte at most.
const SPARE: usize = 16;

/// A piece: bytes of which some are read already.
#[derive(Debug)]
pub(super) struct Chunk {
    bytes: Vec<u8>,
    read: usize,
}

impl Chunk {
    /// Returns what is left to read.
    pub(super) fn rest(&self) -> &[u8] {
        self.bytes.get(self.read..).unwrap_or_default()
    }

    /// Marks `count` more bytes as read.
    pub(super) fn advance(&mut self, count: usize) {
        self.read += count;
    }
}

/// Pieces without bytes.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<Vec<u8>>);

impl Spare {
    fn get(&mut self) -> Chunk {
        let bytes = self.0.pop().unwrap_or_else(|| Vec::with_capacity(SIZE));
        Chunk { bytes, read: 0 }
    }

    /// Takes a piece back.
    pub(super) fn put(&mut self, chunk: Chunk) {
        if self.0.len() < SPARE {
            let mut bytes = chunk.bytes;
            bytes.clear();
            self.0.push(bytes);
        }
    }
}

/// A queue of bytes.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    queue: VecDeque<Chunk>,
    len: usize,
}

impl Chunks {
    /// Returns how many bytes wait.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends bytes.
    pub(super) fn push(&mut self, mut bytes: &[u8], spare: &mut Spare) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            if self.queue.back().is_none_or(|last| last.bytes.len() == SIZE) {
                self.queue.push_back(spare.get());
            }
            let last = self.queue.back_mut().expect("there is one now");
            let (now, later) = bytes.split_at(bytes.len().min(SIZE - last.bytes.len()));
            last.bytes.extend_from_slice(now);
            bytes = later;
        }
    }

    /// Takes the first piece; it is never empty.
    pub(super) fn pop(&mut self) -> Option<Chunk> {
        let chunk = self.queue.pop_front()?;
        self.len -= chunk.rest().len();
        Some(chunk)
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self, spare: &mut Spare) {
        self.queue.drain(..).for_each(|chunk| spare.put(chunk));
        self.queue = VecDeque::new();
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out(parts in prop::collection::vec((any::<u8>(), 0_usize..40_000), 0..12)) {
            let (mut spare, mut chunks) = (Spare::default(), Chunks::default());
            let (mut put, mut got) = (Vec::new(), Vec::new());
            for (fill, length) in parts {
                let part = vec![fill; length];
                put.extend_from_slice(&part);
                chunks.push(&part, &mut spare);
                if fill % 3 == 0 && let Some(chunk) = chunks.pop() {
                    got.extend_from_slice(chunk.rest());
                    spare.put(chunk);
                }
                prop_assert_eq!(chunks.len(), put.len() - got.len());
            }
            while let Some(chunk) = chunks.pop() {
                got.extend_from_slice(chunk.rest());
                spare.put(chunk);
            }
            prop_assert_eq!(got, put);
        }
    }
}
