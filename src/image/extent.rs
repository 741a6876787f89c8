//! Images: what a file's bytes are made of.

use std::ops::Range;

use crate::dataset::Span;
use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource};

/// A run of bytes of an image.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Offset in the file.
    pub start: u64,
    /// What is there; never empty.
    pub span: Span,
}

/// The bytes of one view of one object. Immutable.
#[derive(Clone, Debug, Default)]
pub struct Image {
    size: u64,
    extents: Vec<Extent>,
}

/// Puts an image together, front to back. Literal neighbours are joined.
#[derive(Debug, Default)]
pub struct Builder {
    image: Image,
    literal: Vec<u8>,
}

impl Builder {
    /// An image of no bytes yet.
    pub fn new() -> Self {
        Builder::default()
    }

    /// Bytes so far: the offset of what is pushed next.
    pub fn position(&self) -> u64 {
        self.image.size + self.literal.len() as u64
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.literal.extend_from_slice(bytes);
    }

    /// Appends a span.
    pub fn span(&mut self, span: Span) {
        match span {
            span if span.is_empty() => {}
            Span::Literal(bytes) if bytes.len() <= 4096 => self.literal.extend_from_slice(&bytes),
            Span::Zeros(len) if len <= 4096 => self.literal.resize(self.literal.len() + len as usize, 0),
            span => {
                self.flush();
                let start = self.image.size;
                self.image.size += span.len();
                self.image.extents.push(Extent { start, span });
            }
        }
    }

    /// Appends zeros up to the next multiple of `alignment`, a power of two.
    pub fn align(&mut self, alignment: u64) {
        let padding = self.position().next_multiple_of(alignment) - self.position();
        self.span(Span::Zeros(padding));
    }

    fn flush(&mut self) {
        if !self.literal.is_empty() {
            let span = Span::literal(std::mem::take(&mut self.literal));
            let start = self.image.size;
            self.image.size += span.len();
            self.image.extents.push(Extent { start, span });
        }
    }

    /// The image.
    pub fn finish(mut self) -> Image {
        self.flush();
        self.image.extents.shrink_to_fit();
        self.image
    }
}

impl Image {
    /// Size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The extents, in file order, without gaps.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extents that a range of the file touches, each with the part of its span.
    pub(super) fn covering(&self, range: Range<u64>) -> impl Iterator<Item = (&Extent, Range<u64>)> {
        let first = self.extents.partition_point(|e| e.start + e.span.len() <= range.start);
        self.extents[first..].iter().take_while(move |e| e.start < range.end).map(move |e| {
            let from = range.start.max(e.start) - e.start;
            let to = range.end.min(e.start + e.span.len()) - e.start;
            (e, from..to)
        })
    }

    /// Copies bytes `offset..offset + out.len()`, which must lie in the file.
    ///
    /// # Errors
    /// What the source says of its blobs. The bytes may be of recycled memory until the source has verified
    /// [`Image::blobs`] of the range.
    pub fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        if end > self.size {
            return Err(Error::malformed(format!("read up to {end} of an image of {} bytes", self.size)));
        }
        for (extent, part) in self.covering(offset..end) {
            let at = (extent.start + part.start - offset) as usize;
            extent.span.read(source, part.start, &mut out[at..at + (part.end - part.start) as usize])?;
        }
        Ok(())
    }

    /// The blob that holds a whole range of the file as it is, and the part of it.
    pub fn single(&self, range: Range<u64>) -> Option<(BlobKey, Range<u64>)> {
        let mut covering = self.covering(range);
        match (covering.next()?, covering.next()) {
            ((Extent { span: span @ Span::Blob { .. }, .. }, part), None) => span.parts(part).pop(),
            _ => None,
        }
    }

    /// The blobs behind a range of the file, each once, sorted.
    pub fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        let mut keys: Vec<BlobKey> = self.covering(range).flat_map(|(extent, part)| extent.span.blobs(part)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The parts of blobs behind a range of the file, in file order; whole blobs where bytes are computed from them.
    pub fn parts(&self, range: Range<u64>) -> Vec<(BlobKey, Range<u64>)> {
        self.covering(range).flat_map(|(extent, part)| extent.span.parts(part)).collect()
    }

    /// Checks that every extent lies inside its blobs.
    pub fn validate(&self, source: &dyn BlobSource) -> Result<()> {
        self.extents.iter().try_for_each(|extent| extent.span.validate(source))
    }
}
