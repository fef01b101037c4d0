//! SPDY header blocks: one zlib stream per direction for the life of a session.

use std::collections::HashMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Decompress, FlushDecompress, Status};

/// The preset dictionary of SPDY/3, a constant of the protocol.
static DICTIONARY: &[u8; 1423] = include_bytes!("dictionary.bin");

/// Largest inflated block taken; CVE-2026-35469 is about peers without such a bound.
const MAX_BLOCK: usize = 64 * 1024;

/// Most headers taken in a block, as spdystream does since the fix of that CVE.
const MAX_HEADERS: u32 = 1000;

/// What Z_SYNC_FLUSH appends: length and inverted length of an empty stored block.
const FLUSH: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

/// Names the peer refuses in a request (`moby/spdystream:spdy/types.go`).
const FORBIDDEN_NAMES: [&str; 5] = [
    "connection",
    "host",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
];

/// Why a header block cannot be read. Any of these ends the session: the compression state is lost.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    /// Not the continuation of the session's zlib stream.
    #[error("header block does not inflate")]
    Inflate(#[from] flate2::DecompressError),
    /// The block before this one did not end with a flush.
    #[error("header blocks are not flushed")]
    NotFlushed,
    /// The inflated block is cut short or oversized.
    #[error("header block is malformed")]
    Malformed,
    /// Names must be lower case and unique, and not those of HTTP/1.1 connections.
    #[error("header name {0:?} is not allowed")]
    Name(String),
}

/// Reads the client's header blocks, in wire order.
#[derive(Debug)]
pub(super) struct Decoder {
    /// The client's zlib stream.
    inflate: Decompress,
    /// The last block did not end with a flush. Go's decompressor gives such a block out only because it meets the end of
    /// its input, and repeats that error ever after.
    broken: bool,
}

/// Writes our header blocks, in wire order.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    /// Whether the zlib header is out.
    started: bool,
}

impl Decoder {
    /// A decoder for a new session.
    pub(super) fn new() -> Self {
        Self {
            inflate: Decompress::new(true),
            broken: false,
        }
    }

    /// Inflates and reads one block.
    pub(super) fn decode(&mut self, mut block: &[u8]) -> Result<HashMap<String, String>, HeaderError> {
        if std::mem::replace(&mut self.broken, !block.ends_with(&FLUSH)) {
            return Err(HeaderError::NotFlushed);
        }
        let mut plain = Vec::with_capacity(1024);
        loop {
            if plain.len() == plain.capacity() {
                if plain.len() >= MAX_BLOCK {
                    return Err(HeaderError::Malformed);
                }
                plain.reserve(plain.len());
            }
            let (read, written) = (self.inflate.total_in(), plain.len());
            let step = self
                .inflate
                .decompress_vec(block, &mut plain, FlushDecompress::Sync);
            let taken =
                usize::try_from(self.inflate.total_in() - read).map_err(|_| HeaderError::Malformed)?;
            block = block.get(taken..).ok_or(HeaderError::Malformed)?;
            match step {
                // The dictionary counts only if the stream's header asks for it.
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY)?;
                }
                Err(error) => return Err(error.into()),
                Ok(Status::StreamEnd) => return Err(HeaderError::Malformed),
                Ok(_) if plain.len() < plain.capacity() && block.is_empty() => break,
                Ok(_) if taken == 0 && plain.len() == written && plain.len() < plain.capacity() => {
                    return Err(HeaderError::Malformed);
                }
                Ok(_) => {}
            }
        }
        read_pairs(Bytes::from(plain))
    }
}

impl Encoder {
    /// A block without headers, which is all a runtime ever replies.
    ///
    /// Stored deflate blocks need neither compressor nor dictionary; the empty one at the end is the flush without
    /// which a reader would wait for more.
    pub(super) fn empty(&mut self) -> Bytes {
        let mut block = BytesMut::with_capacity(16);
        if !self.started {
            self.started = true;
            block.put_slice(&[0x78, 0x01]);
        }
        block.put_slice(&[0x00, 0x04, 0x00, 0xfb, 0xff]);
        block.put_u32(0);
        block.put_slice(&[0x00, 0x00, 0x00, 0xff, 0xff]);
        block.freeze()
    }
}

fn read_pairs(mut block: Bytes) -> Result<HashMap<String, String>, HeaderError> {
    let count = block.try_get_u32().map_err(|_| HeaderError::Malformed)?;
    if count > MAX_HEADERS {
        return Err(HeaderError::Malformed);
    }
    let mut headers = HashMap::new();
    for _ in 0..count {
        let name = read_text(&mut block)?;
        let value = read_text(&mut block)?;
        let forbidden = name.is_empty() || FORBIDDEN_NAMES.contains(&name.as_str());
        if forbidden || name.chars().any(|c| c.is_ascii_uppercase()) || headers.contains_key(&name) {
            return Err(HeaderError::Name(name));
        }
        headers.insert(name, value);
    }
    if block.is_empty() {
        Ok(headers)
    } else {
        Err(HeaderError::Malformed)
    }
}

fn read_text(block: &mut Bytes) -> Result<String, HeaderError> {
    let length = block.try_get_u32().map_err(|_| HeaderError::Malformed)? as usize;
    if block.len() < length {
        return Err(HeaderError::Malformed);
    }
    String::from_utf8(block.split_to(length).to_vec()).map_err(|_| HeaderError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    fn plain(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        block.put_u32(u32::try_from(pairs.len()).unwrap());
        for text in pairs.iter().flat_map(|&(name, value)| [name, value]) {
            block.put_u32(u32::try_from(text.len()).unwrap());
            block.put_slice(text.as_bytes());
        }
        block
    }

    fn compress(deflate: &mut Compress, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(4096);
        deflate
            .compress_vec(plain, &mut out, FlushCompress::Sync)
            .unwrap();
        out
    }

    #[test]
    fn the_dictionary_is_the_one_of_the_protocol() {
        let (a, b) = DICTIONARY.iter().fold((1_u32, 0_u32), |(a, b), &byte| {
            let a = (a + u32::from(byte)) % 65_521;
            (a, (a + b) % 65_521)
        });
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_of_one_session_share_their_compression() {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(DICTIONARY).unwrap();
        let mut decoder = Decoder::new();
        for request in ["0", "1", "2"] {
            let block = plain(&[("streamtype", "data"), ("port", "8080"), ("requestid", request)]);
            let headers = decoder.decode(&compress(&mut deflate, &block)).unwrap();
            assert_eq!(headers["requestid"], request);
            assert_eq!(headers["streamtype"], "data");
        }
    }

    #[test]
    fn stored_blocks_need_no_dictionary() {
        let mut encoder = Encoder::default();
        let mut decoder = Decoder::new();
        assert!(decoder.decode(&encoder.empty()).unwrap().is_empty());
        assert!(decoder.decode(&encoder.empty()).unwrap().is_empty());
    }

    #[test]
    fn a_block_without_a_flush_is_the_last() {
        let mut decoder = Decoder::new();
        let stored = b"\x00\x04\x00\xfb\xff\x00\x00\x00\x00";
        assert!(decoder.decode(&[b"\x78\x01", &stored[..]].concat()).is_ok());
        assert!(matches!(decoder.decode(stored), Err(HeaderError::NotFlushed)));
    }

    #[test]
    fn bad_names_and_lengths_are_refused() {
        let decode = |pairs: &[(&str, &str)]| {
            let mut deflate = Compress::new(Compression::fast(), true);
            Decoder::new().decode(&compress(&mut deflate, &plain(pairs)))
        };
        assert!(decode(&[("Port", "1")]).is_err());
        assert!(decode(&[("port", "1"), ("port", "2")]).is_err());
        assert!(decode(&[("host", "1")]).is_err());
        let many: Vec<String> = (0..=MAX_HEADERS).map(|n| n.to_string()).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "")).collect();
        assert!(decode(&many[..many.len() - 1]).is_ok());
        assert!(decode(&many).is_err());
        assert!(
            Decoder::new()
                .decode(b"\x78\x01\x00\x02\x00\xfd\xff\x00\x00\x00\x00\x00\xff\xff")
                .is_err()
        );
        assert!(Decoder::new().decode(b"garbage").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_block_gives_headers_or_an_error(bytes: Vec<u8>, stored: Vec<u8>) {
            let _ = Decoder::new().decode(&bytes);
            let length = u16::try_from(stored.len()).unwrap();
            let mut block = vec![0x78, 0x01, 0];
            block.put_u16_le(length);
            block.put_u16_le(!length);
            block.put_slice(&stored);
            block.put_slice(&[0, 0, 0, 0xff, 0xff]);
            let _ = Decoder::new().decode(&block);
        }
    }
}
