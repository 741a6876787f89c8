//! The body of a record batch: which buffers, how long, and how many nulls.

use arrow_ipc::{Buffer, FieldNode};
use arrow_schema::{DataType, UnionMode};

use super::keys::Keys;
use super::{ALIGNMENT, Counts, has_validity};
use crate::dataset::{ArrayLayout, Span};
use crate::error::{Error, Kind, Result};
use crate::vineyard::BlobSource;

/// Most buffers of one batch: their entries must stay far from the 2 GiB that a flatbuffer can hold.
const MAX_BUFFERS: usize = 1 << 24;
/// Buffers of this size have pages of their own.
const LARGE: u64 = 256 << 10;
const PAGE: u64 = 4096;
/// Bytes of a bitmap that are looked at in one go.
const CHUNK: usize = 64 << 10;

/// What a record batch message says, and the buffers that follow it.
#[derive(Debug, Default)]
pub struct Body {
    /// Length and null count of each array, depth first.
    pub nodes: Vec<FieldNode>,
    /// Place of each buffer in the body.
    pub buffers: Vec<Buffer>,
    /// Number of data buffers of each view array.
    pub variadic: Vec<i64>,
    /// The bytes of each buffer.
    pub spans: Vec<Span>,
    /// Length with padding.
    pub len: u64,
    /// What the body's place in the file is to be a multiple of.
    pub alignment: u64,
}

impl Body {
    /// The body of arrays.
    ///
    /// # Errors
    /// `Malformed` if buffers or children do not fit type and length, `TooLarge`.
    pub fn of(columns: &[ArrayLayout], counts: Counts<'_>) -> Result<Body> {
        let mut body = Body { alignment: ALIGNMENT, ..Body::default() };
        columns.iter().try_for_each(|column| body.array(column, counts))?;
        Ok(body)
    }

    fn array(&mut self, array: &ArrayLayout, counts: Counts<'_>) -> Result<()> {
        let spans = buffers(array)?;
        let nulls = null_count(array, counts)?;
        let len = i64::try_from(array.len).map_err(|_| too_large(array.len))?;
        self.nodes.push(FieldNode::new(len, nulls as i64));
        if matches!(array.data_type, DataType::Utf8View | DataType::BinaryView) {
            // All but the validity bitmap and the views.
            self.variadic.push(spans.len() as i64 - 2);
        }
        spans.into_iter().try_for_each(|span| self.push(span))?;
        array.children.iter().try_for_each(|child| self.array(child, counts))
    }

    fn push(&mut self, span: Span) -> Result<()> {
        if self.buffers.len() >= MAX_BUFFERS {
            return Err(Error::new(Kind::TooLarge, format!("more than {MAX_BUFFERS} buffers in a batch")));
        }
        let len = span.len();
        // The kernel reads whole pages. A large buffer shares none with its neighbours, or reading one column would
        // bring a part of the next, which may live on another machine.
        let alignment = if len >= LARGE { PAGE } else { ALIGNMENT };
        self.alignment = self.alignment.max(alignment);
        let start = self.len.checked_next_multiple_of(alignment);
        let end = start.and_then(|start| start.checked_add(len)?.checked_next_multiple_of(alignment));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= i64::MAX as u64)) else {
            return Err(too_large(len));
        };
        self.buffers.push(Buffer::new(start as i64, len as i64));
        self.spans.push(span);
        self.len = end;
        Ok(())
    }
}

fn too_large(len: u64) -> Error {
    Error::new(Kind::TooLarge, format!("an array or buffer of {len} is beyond what an Arrow file can hold"))
}

/// Bytes of one value of a fixed-width type, of a key for dictionaries; `None` for other types.
pub fn width(data_type: &DataType) -> Option<u64> {
    match data_type {
        DataType::FixedSizeBinary(width) => u64::try_from(*width).ok(),
        DataType::Dictionary(key, _) => key.primitive_width().map(|width| width as u64),
        other => other.primitive_width().map(|width| width as u64),
    }
}

/// Nulls of an array as its node tells them.
///
/// # Errors
/// `Malformed` if the metadata's count cannot be; what the source says of its blobs.
pub fn null_count(array: &ArrayLayout, counts: Counts<'_>) -> Result<u64> {
    if array.data_type == DataType::Null {
        return Ok(array.len);
    }
    if !has_validity(&array.data_type) {
        return Ok(0);
    }
    let absent = array.buffers.first().is_none_or(Span::is_empty);
    match (array.null_count, counts) {
        (Some(0), _) => Ok(0),
        (None, _) if absent || array.len == 0 => Ok(0),
        (Some(nulls), _) if nulls > array.len || absent => {
            Err(Error::malformed(format!("{nulls} nulls among {} values without a bitmap for them", array.len)))
        }
        (Some(nulls), _) => Ok(nulls),
        (None, Counts::Skip) => Ok(0),
        (None, Counts::From(source)) => zeros(&array.buffers[0], array.len, source),
    }
}

/// Number of zero bits among the first `bits` of a bitmap.
fn zeros(bitmap: &Span, bits: u64, source: &dyn BlobSource) -> Result<u64> {
    let bitmap = bitmap.slice(0, bits.div_ceil(8))?;
    source.prepare(&bitmap.blobs(0..bitmap.len()))?;
    let mut chunk = vec![0; CHUNK.min(bitmap.len() as usize)];
    let mut ones = 0;
    let mut offset = 0;
    while offset < bitmap.len() {
        let part = &mut chunk[..(bitmap.len() - offset).min(CHUNK as u64) as usize];
        bitmap.read(source, offset, part)?;
        offset += part.len() as u64;
        if offset == bitmap.len() && !bits.is_multiple_of(8) {
            // Bits past the last value may be anything.
            if let Some(last) = part.last_mut() {
                *last &= (1 << (bits % 8)) - 1;
            }
        }
        let words = part.chunks_exact(8);
        ones += words.remainder().iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        ones += words
            .map(|w| u64::from(u64::from_ne_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]]).count_ones()))
            .sum::<u64>();
    }
    Ok(bits - ones)
}

/// The buffers of one array, without its children, each as long as its values need: validity first where the type has
/// it, empty where nothing is null.
///
/// # Errors
/// `Malformed` if buffers or children do not fit type and length, `TooLarge`.
pub fn buffers(array: &ArrayLayout) -> Result<Vec<Span>> {
    let len = array.len;
    let data_type = &array.data_type;
    let mut given = array.buffers.iter();
    let mut next = |what: &str| {
        given.next().ok_or_else(|| Error::malformed(format!("an array of type {data_type} without its {what}")))
    };
    let mut out = Vec::with_capacity(3);
    if has_validity(data_type) {
        let bitmap = next("validity")?;
        // With no nulls the bitmap says nothing; without it readers take their fast path.
        let needed = array.null_count != Some(0) && !bitmap.is_empty();
        out.push(if needed { exactly(bitmap, len.div_ceil(8))? } else { Span::EMPTY });
    }
    match data_type {
        DataType::Null => {}
        DataType::Boolean => out.push(exactly(next("values")?, len.div_ceil(8))?),
        DataType::Utf8 | DataType::Binary => {
            out.push(offsets(next("offsets")?, len, 4)?);
            // What lies beyond cannot be addressed.
            let data = next("data")?;
            out.push(data.slice(0, data.len().min(i32::MAX as u64))?);
        }
        DataType::LargeUtf8 | DataType::LargeBinary => {
            out.push(offsets(next("offsets")?, len, 8)?);
            out.push(next("data")?.clone());
        }
        DataType::Utf8View | DataType::BinaryView => {
            out.push(values(next("views")?, len, 16)?);
            out.extend(given.by_ref().cloned());
        }
        DataType::List(_) | DataType::Map(..) => out.push(offsets(next("offsets")?, len, 4)?),
        DataType::LargeList(_) => out.push(offsets(next("offsets")?, len, 8)?),
        DataType::ListView(_) | DataType::LargeListView(_) => {
            let width = if matches!(data_type, DataType::ListView(_)) { 4 } else { 8 };
            out.push(values(next("offsets")?, len, width)?);
            out.push(values(next("sizes")?, len, width)?);
        }
        DataType::Struct(_) => children_of(array, len)?,
        DataType::FixedSizeList(_, size) => {
            let total = u64::try_from(*size).ok().and_then(|size| size.checked_mul(len));
            children_of(array, total.ok_or_else(|| too_large(len))?)?;
        }
        DataType::Union(_, mode) => {
            out.push(exactly(next("type ids")?, len)?);
            match mode {
                UnionMode::Dense => out.push(values(next("offsets")?, len, 4)?),
                UnionMode::Sparse => children_of(array, len)?,
            }
        }
        DataType::RunEndEncoded(..) => match array.children.as_slice() {
            [ends, values] if ends.len == values.len => {}
            _ => return Err(Error::malformed("run ends and values differ in number")),
        },
        other => {
            let width = width(other).ok_or_else(|| Error::new(Kind::Unsupported, format!("arrays of type {other}")))?;
            let values = values(next("values")?, len, width)?;
            out.push(match (other, out.first()) {
                (DataType::Dictionary(..), Some(bitmap)) if !bitmap.is_empty() && len > 0 => {
                    Span::derived(Keys { keys: values, bitmap: bitmap.clone(), width })
                }
                _ => values,
            });
        }
    }
    match given.next() {
        None => Ok(out),
        Some(_) => Err(Error::malformed(format!("an array of type {data_type} with too many buffers"))),
    }
}

fn children_of(array: &ArrayLayout, len: u64) -> Result<()> {
    match array.children.iter().find(|child| child.len != len) {
        Some(child) => Err(Error::malformed(format!(
            "a child of {} values under an array of {} of type {}",
            child.len, array.len, array.data_type
        ))),
        None => Ok(()),
    }
}

fn exactly(span: &Span, bytes: u64) -> Result<Span> {
    span.slice(0, bytes)
}

fn values(span: &Span, len: u64, width: u64) -> Result<Span> {
    exactly(span, len.checked_mul(width).ok_or_else(|| too_large(len))?)
}

/// Offsets of `len` elements. An array of no elements may come without its one offset, which readers want to see.
fn offsets(span: &Span, len: u64, width: u64) -> Result<Span> {
    if len == 0 && span.len() < width {
        return Ok(Span::Zeros(width));
    }
    values(span, len.checked_add(1).ok_or_else(|| too_large(len))?, width)
}
