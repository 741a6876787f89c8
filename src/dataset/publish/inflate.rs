//! Compressed buffers of Arrow IPC bodies: eight bytes with the length, then an LZ4 or Zstandard frame.
//!
//! Format: "Compression" in `docs/source/format/Columnar.rst` of Apache Arrow. The length is what the file says; nothing
//! is allocated for it before that many bytes have come out of the decoder.

use std::io::{BufRead, BufReader};
use std::ops::Range;

use crate::error::{Error, Result};

/// The two codecs of Arrow IPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// LZ4 frame format.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// A window of the decompressed bytes of a range of the staged file.
#[derive(Clone, Debug)]
pub struct Inflated {
    /// The frame, without the length before it.
    pub(super) at: Range<u64>,
    /// How it is compressed.
    pub(super) codec: Codec,
    /// Length of the decompressed bytes, as the file says.
    pub(super) declared: u64,
    /// The wanted bytes of them.
    pub(super) window: Range<u64>,
}

impl Inflated {
    /// Number of wanted bytes.
    pub(super) fn len(&self) -> u64 {
        self.window.end - self.window.start
    }

    /// A smaller window; `range` is inside this one.
    pub(super) fn window(&self, range: Range<u64>) -> Inflated {
        let start = self.window.start;
        Inflated { window: start + range.start..start + range.end, ..self.clone() }
    }

    /// Decompresses, and passes the wanted bytes on in pieces of at most 8 MiB, each with its offset in the window.
    ///
    /// # Errors
    /// `Malformed` if the frame is broken or is not as long as declared; what `out` returns.
    pub(super) fn stream(&self, staged: &[u8], mut out: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let frame = usize::try_from(self.at.start)
            .ok()
            .zip(usize::try_from(self.at.end).ok())
            .and_then(|(start, end)| staged.get(start..end))
            .ok_or_else(|| Error::malformed("a compressed buffer outside the file"))?;
        // The decoders' own buffers are passed on, without a copy of each.
        let mut decoder: Box<dyn BufRead + '_> = match self.codec {
            Codec::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(frame)),
            Codec::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(broken)?;
                Box::new(BufReader::with_capacity(self.declared.clamp(1, 1 << 20) as usize, decoder))
            }
        };
        let mut position = 0u64;
        loop {
            let piece = decoder.fill_buf().map_err(broken)?;
            let n = piece.len();
            if n == 0 {
                break;
            }
            let end = position + n as u64;
            if end > self.declared {
                return Err(Error::malformed(format!(
                    "a compressed buffer holds more than its {} bytes",
                    self.declared
                )));
            }
            let from = self.window.start.clamp(position, end);
            let to = self.window.end.clamp(position, end);
            if from < to {
                out(from - self.window.start, &piece[(from - position) as usize..(to - position) as usize])?;
            }
            decoder.consume(n);
            position = end;
        }
        if position != self.declared {
            return Err(Error::malformed(format!("a compressed buffer of {} bytes holds {position}", self.declared)));
        }
        Ok(())
    }

    /// The wanted bytes, in memory that grows with what really comes out.
    pub(super) fn to_vec(&self, staged: &[u8]) -> Result<Vec<u8>> {
        // The largest ratio of LZ4 is 255; a true one beyond it costs some copies.
        let hint = self.len().min((self.at.end - self.at.start).saturating_mul(256));
        let mut bytes = Vec::with_capacity(hint as usize);
        self.stream(staged, |_, piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::malformed("a compressed buffer is broken").with_source(error)
}
