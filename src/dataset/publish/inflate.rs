//! Compressed buffers of Arrow IPC bodies: eight bytes with the length, then an LZ4 or Zstandard frame.
//!
//! Format: "Compression" in `docs/source/format/Columnar.rst` of Apache Arrow. The length is what the file says; nothing
//! is allocated for it before that many bytes have come out of the decoder.

use std::io::{BufRead, BufReader};
use std::ops::Range;

use crate::cgroup;
use crate::error::{Context, Error, Result};

/// Decompressed bytes for which room is asked at a time; no piece that a decoder passes on is longer.
const ROOM: u64 = 16 << 20;

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

    /// The wanted bytes, in memory that grows with what really comes out, and as far as there is some.
    ///
    /// # Errors
    /// As [`Inflated::stream`]; `ENOMEM` where the control group has no room for what comes.
    pub(super) fn to_vec(&self, staged: &[u8]) -> Result<Vec<u8>> {
        self.to_vec_in(staged, |bytes| cgroup::room_for(bytes).context(|| "memory for decompressing".into()))
    }

    /// As [`Inflated::to_vec`]; `ask` tells whether there is room for so many bytes more.
    fn to_vec_in(&self, staged: &[u8], ask: impl Fn(u64) -> Result<()>) -> Result<Vec<u8>> {
        // The largest ratio of LZ4 is 255; a true one beyond it costs some copies.
        let hint = self.len().min((self.at.end - self.at.start).saturating_mul(256));
        let mut bytes = Vec::with_capacity(hint as usize);
        let mut room = 0;
        self.stream(staged, |_, piece| {
            if bytes.len() + piece.len() > room {
                ask(ROOM)?;
                room = bytes.len() + ROOM as usize;
            }
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::malformed("a compressed buffer is broken").with_source(error)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::error::Kind;

    /// Room is asked as bytes come out of the decoder, whatever length is declared.
    #[test]
    fn decompressing_stops_where_there_is_no_room() {
        let data = vec![7; 100 << 20];
        let frame = zstd::encode_all(data.as_slice(), 1).unwrap();
        let inflated = |declared| {
            let at = 0..frame.len() as u64;
            Inflated { at, codec: Codec::Zstd, declared, window: 0..declared }
        };
        let asked = Cell::new(0);
        let room = |most: u64| {
            let asked = &asked;
            asked.set(0);
            move |bytes: u64| {
                asked.set(asked.get() + bytes);
                if asked.get() <= most { Ok(()) } else { Err(Error::new(Kind::Os(libc::ENOMEM), "no room")) }
            }
        };
        let whole = inflated(100 << 20);
        assert!(whole.to_vec_in(&frame, room(u64::MAX)).unwrap() == data);
        assert!((100 << 20..=100 << 20 | ROOM).contains(&asked.get()), "{}", asked.get());
        assert_eq!(whole.to_vec_in(&frame, room(40 << 20)).unwrap_err().kind(), Kind::Os(libc::ENOMEM));
        assert_eq!(asked.get(), 48 << 20);
        // A lie is told by what comes out, not by what is declared.
        assert_eq!(inflated(1 << 50).to_vec_in(&frame, room(120 << 20)).unwrap_err().kind(), Kind::Malformed);
    }
}
