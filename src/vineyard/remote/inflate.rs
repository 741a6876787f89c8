//! Bytes that a vineyardd insists on compressing.
//!
//! One zstd stream spans all blobs of a reply. It comes in chunks, each a little-endian `u64` length and that many
//! bytes, flushed so that a chunk can be decoded whole; a blob is over when its bytes have come out. Source:
//! `src/server/util/remote.cc` and `src/common/compression/compressor.cc` of v6d 0.24.

use zstd::stream::raw::{Decoder, Operation};

use crate::error::{Error, Kind, Result};

/// Largest chunk that is accepted; vineyardd's have at most a zstd block of 128 KiB and its frame.
pub const MAX_CHUNK: u64 = 16 << 20;

/// The decoder of one reply.
pub struct Inflate {
    decoder: Decoder<'static>,
    out: Vec<u8>,
}

impl Inflate {
    /// At the start of a reply.
    ///
    /// # Errors
    /// If there is no memory for a decoder.
    pub fn new() -> Result<Self> {
        let decoder = Decoder::new().map_err(|e| Error::new(Kind::Internal, "no zstd decoder").with_source(e))?;
        Ok(Inflate { decoder, out: vec![0; 256 << 10] })
    }

    /// Decodes a chunk and hands out the bytes, in pieces.
    ///
    /// # Errors
    /// `Malformed` if it is no zstd; what `take` says.
    pub fn chunk(&mut self, mut chunk: &[u8], mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        loop {
            let status = self.decoder.run_on_buffers(chunk, &mut self.out);
            let status = status.map_err(|e| Error::malformed("compressed bytes are no zstd").with_source(e))?;
            take(self.out.get(..status.bytes_written).unwrap_or_default())?;
            chunk = chunk.get(status.bytes_read..).unwrap_or_default();
            // A full buffer may hide more.
            if chunk.is_empty() && status.bytes_written < self.out.len() {
                return Ok(());
            }
            if status.bytes_read == 0 && status.bytes_written == 0 {
                return Err(Error::malformed("compressed bytes after the end of the stream"));
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use zstd::stream::raw::{Encoder, InBuffer, OutBuffer};

    /// Chunks as vineyardd makes them: one stream, a flush at the end of each.
    fn chunks(parts: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut encoder = Encoder::new(1).unwrap();
        let mut all = Vec::new();
        for part in parts {
            let mut space = vec![0; part.len() * 2 + 1000];
            let mut out = OutBuffer::around(&mut space);
            let mut input = InBuffer::around(part);
            while input.pos() < part.len() {
                encoder.run(&mut input, &mut out).unwrap();
            }
            while encoder.flush(&mut out).unwrap() > 0 {}
            all.push(out.as_slice().to_vec());
        }
        all
    }

    #[test]
    fn one_stream_spans_many_chunks() {
        let large: Vec<u8> = (0..3_000_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let parts: [&[u8]; 3] = [b"hello", &large, b"world"];
        let mut inflate = Inflate::new().unwrap();
        for (chunk, part) in chunks(&parts).iter().zip(parts) {
            let mut found = Vec::new();
            inflate
                .chunk(chunk, |bytes| {
                    found.extend_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
            assert!(found == part);
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        let mut inflate = Inflate::new().unwrap();
        assert_eq!(inflate.chunk(b"not compressed", |_| Ok(())).unwrap_err().kind(), Kind::Malformed);
    }
}
