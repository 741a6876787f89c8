//! Where bytes are: literally here, in a blob, or computed from a blob.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource};

/// Bytes that are computed from blobs when they are read: realigned bitmaps, packed booleans, columns of a matrix.
///
/// The length is known without looking at data, and every read of the same range gives the same bytes.
pub trait Derive: Debug + Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;
    /// True if there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Computes bytes `offset..offset + out.len()`, a range inside the length.
    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()>;
    /// The blobs behind the range.
    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey>;
    /// The parts of blobs that reading may touch, for [`Span::validate`].
    fn inputs(&self) -> Vec<Span>;
}

/// A run of bytes, by place. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Span {
    /// So many zero bytes.
    Zeros(u64),
    /// These bytes.
    Literal(Arc<[u8]>),
    /// Bytes `offset..offset + len` of a blob.
    Blob {
        /// The blob.
        key: BlobKey,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes `offset..offset + len` of something computed.
    Derived {
        /// The computation.
        from: Arc<dyn Derive>,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl Span {
    /// No bytes.
    pub const EMPTY: Span = Span::Zeros(0);

    /// The first `len` bytes of a blob.
    pub fn blob(key: BlobKey, len: u64) -> Span {
        if len == 0 { Span::EMPTY } else { Span::Blob { key, offset: 0, len } }
    }

    /// All bytes of a computation.
    pub fn derived(from: impl Derive + 'static) -> Span {
        let len = from.len();
        Span::Derived { from: Arc::new(from), offset: 0, len }
    }

    /// These bytes.
    pub fn literal(bytes: impl Into<Arc<[u8]>>) -> Span {
        Span::Literal(bytes.into())
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Span::Zeros(len) | Span::Blob { len, .. } | Span::Derived { len, .. } => *len,
            Span::Literal(bytes) => bytes.len() as u64,
        }
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes `offset..offset + len` of this span.
    ///
    /// # Errors
    /// `Malformed` if that is not inside.
    pub fn slice(&self, offset: u64, len: u64) -> Result<Span> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(Error::malformed(format!("bytes {offset} and {len} more of a buffer of {} bytes", self.len())));
        }
        if len == 0 {
            return Ok(Span::EMPTY);
        }
        Ok(match self {
            Span::Zeros(_) => Span::Zeros(len),
            Span::Literal(bytes) => Span::literal(&bytes[offset as usize..(offset + len) as usize]),
            // An offset near the end of u64 can only come from metadata that lies; `validate` would not see it wrap.
            Span::Blob { key, offset: start, .. } => {
                let offset = start.checked_add(offset).ok_or_else(|| Error::malformed("offset overflows"))?;
                Span::Blob { key: *key, offset, len }
            }
            Span::Derived { from, offset: start, .. } => {
                let offset = start.checked_add(offset).ok_or_else(|| Error::malformed("offset overflows"))?;
                Span::Derived { from: from.clone(), offset, len }
            }
        })
    }

    /// Copies bytes `offset..offset + out.len()`.
    ///
    /// # Errors
    /// `Malformed` if that is not inside; what the source says of its blobs.
    pub fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(Error::malformed(format!("read of {} bytes at {offset} of {}", out.len(), self.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        match self {
            Span::Zeros(_) => out.fill(0),
            Span::Literal(bytes) => out.copy_from_slice(&bytes[offset as usize..offset as usize + out.len()]),
            Span::Blob { key, offset: start, .. } => source.read(*key, start + offset, out)?,
            Span::Derived { from, offset: start, .. } => from.read(source, start + offset, out)?,
        }
        Ok(())
    }

    /// All bytes, in new memory. For small spans: headers, offsets, bitmaps.
    pub fn to_vec(&self, source: &dyn BlobSource) -> Result<Vec<u8>> {
        let mut out = vec![0; self.len() as usize];
        self.read(source, 0, &mut out)?;
        Ok(out)
    }

    /// The blobs behind a range of this span.
    pub fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        match self {
            Span::Blob { key, .. } if !range.is_empty() => vec![*key],
            Span::Derived { from, offset, .. } if !range.is_empty() => {
                from.blobs(offset + range.start..offset + range.end)
            }
            _ => Vec::new(),
        }
    }

    /// The parts of blobs behind a range of this span; whole blobs where it is computed from them.
    pub fn parts(&self, range: Range<u64>) -> Vec<(BlobKey, Range<u64>)> {
        match self {
            Span::Blob { key, offset, .. } if !range.is_empty() => {
                vec![(*key, offset.saturating_add(range.start)..offset.saturating_add(range.end))]
            }
            _ => self.blobs(range).into_iter().map(|key| (key, 0..u64::MAX)).collect(),
        }
    }

    /// True if both are the same place, or the same bytes of this process. Touches no data.
    pub fn is_same(&self, other: &Span) -> bool {
        match (self, other) {
            (Span::Zeros(a), Span::Zeros(b)) => a == b,
            (Span::Literal(a), Span::Literal(b)) => a == b,
            (Span::Blob { key: k, offset: o, len: l }, Span::Blob { key, offset, len }) => {
                (k, o, l) == (key, offset, len)
            }
            (Span::Derived { from: f, offset: o, len: l }, Span::Derived { from, offset, len }) => {
                Arc::ptr_eq(f, from) && (o, l) == (offset, len)
            }
            _ => false,
        }
    }

    /// Checks that the bytes lie inside their blobs.
    ///
    /// # Errors
    /// `Malformed` if they do not, `Stale` if a blob is gone.
    pub fn validate(&self, source: &dyn BlobSource) -> Result<()> {
        match self {
            Span::Zeros(_) | Span::Literal(_) => Ok(()),
            Span::Blob { key, offset, len } => {
                let size = source.size(*key)?;
                if offset.checked_add(*len).is_none_or(|end| end > size) {
                    return Err(Error::malformed(format!(
                        "needs bytes {offset} and {len} more of blob {key}, which has {size}"
                    )));
                }
                Ok(())
            }
            Span::Derived { from, .. } => from.inputs().iter().try_for_each(|span| span.validate(source)),
        }
    }
}
