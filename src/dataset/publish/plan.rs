//! What publishing will write: blobs with their parts, and the objects over them.
//!
//! A plan is made from a staged file without copying its data: a blob is a list of parts, and a part that holds column
//! data is a range of the file.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use arrow_buffer::Buffer;
use serde_json::Value;

use super::column::Column;
use super::inflate::Inflated;
use super::parquet_file::Decode;
use crate::dataset::recipe::{KEPT, RECIPE, Written, given_up};
use crate::error::{Error, Kind, Result};
use crate::vineyard::ObjectId;

/// Most objects that get the same bitmap.
const MOST_OWNERS: usize = 64;
/// Bytes of a bitmap that nothing needs to outweigh.
const SMALL_BITMAP: u64 = 4096;

/// Consecutive bytes of a blob, and how to get them.
#[derive(Clone, Debug)]
pub enum Part {
    /// These bytes of the staged file.
    Staged(Range<u64>),
    /// These bytes.
    Owned(Buffer),
    /// So many zeros.
    Zeros(u64),
    /// So many bytes of which every bit is set.
    Ones(u64),
    /// A window of a buffer that the staged file holds compressed.
    Inflated(Inflated),
    /// Offsets of the staged file as 64-bit ones, each plus `shift`.
    Shifted {
        /// The offsets.
        at: Range<u64>,
        /// Bytes of one of them: 4 or 8.
        width: u64,
        /// Added to each.
        shift: i64,
    },
    /// A bitmap of the staged file as one byte (0 or 1) for each bit.
    Unpacked {
        /// Where the bitmap starts.
        at: u64,
        /// Number of bits.
        bits: u64,
    },
    /// Elements of the staged file in the order of the transposed shape: column-major to row-major.
    Transposed(Arc<super::npy::Transposed>),
}

impl Part {
    /// No bytes.
    pub const EMPTY: Part = Part::Zeros(0);

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Part::Staged(range) => range.end - range.start,
            Part::Owned(buffer) => buffer.len() as u64,
            Part::Zeros(n) | Part::Ones(n) => *n,
            Part::Inflated(inflated) => inflated.len(),
            Part::Shifted { at, width, .. } => (at.end - at.start) / width.max(&1) * 8,
            Part::Unpacked { bits, .. } => *bits,
            Part::Transposed(transposed) => transposed.len(),
        }
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Owned bytes.
    pub fn owned(bytes: Vec<u8>) -> Part {
        Part::Owned(Buffer::from_vec(bytes))
    }

    /// Bytes `range` of this part.
    ///
    /// # Errors
    /// `Malformed` if that is not inside, or for parts that are never cut (shifted, unpacked, transposed).
    pub fn slice(&self, range: Range<u64>) -> Result<Part> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::malformed(format!("bytes {range:?} of a buffer of {}", self.len())));
        }
        if range.start == range.end {
            return Ok(Part::EMPTY);
        }
        Ok(match self {
            Part::Staged(at) => Part::Staged(at.start + range.start..at.start + range.end),
            Part::Owned(buffer) => {
                Part::Owned(buffer.slice_with_length(range.start as usize, (range.end - range.start) as usize))
            }
            Part::Zeros(_) => Part::Zeros(range.end - range.start),
            Part::Ones(_) => Part::Ones(range.end - range.start),
            Part::Inflated(inflated) => Part::Inflated(inflated.window(range)),
            whole if range == (0..whole.len()) => whole.clone(),
            _ => return Err(Error::new(Kind::Internal, "cut of a part that is made as a whole")),
        })
    }
}

/// A blob to be made.
#[derive(Clone, Debug)]
pub struct PlannedBlob {
    /// Its bytes, in order.
    pub parts: Vec<Part>,
}

impl PlannedBlob {
    /// Number of bytes.
    pub fn size(&self) -> u64 {
        self.parts.iter().map(Part::len).sum()
    }
}

/// A value of an object to be made.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// A plain value: string, number, boolean.
    Json(Value),
    /// The blob of no bytes.
    Empty,
    /// A blob, by its place in [`Plan::blobs`].
    Blob(usize),
    /// Another object, by its place in [`Plan::objects`], which is before this one's.
    Object(usize),
    /// An object that exists in the store.
    Existing(ObjectId),
}

impl<T: Into<Value>> From<T> for Field {
    fn from(value: T) -> Self {
        Field::Json(value.into())
    }
}

/// An object to be made.
#[derive(Clone, Debug)]
pub struct PlannedObject {
    /// Its type.
    pub typename: String,
    /// Its keys and values, without `typename` and what the store adds.
    pub fields: Vec<(String, Field)>,
}

/// What a plan makes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A vineyard `DataFrame`.
    Frame,
    /// A vineyard `Table`.
    Table,
    /// A vineyard `Tensor`.
    Tensor,
    /// A vineyard `PickleBuffer`.
    Pickle,
    /// The file as it is.
    File,
}

/// Blobs and objects that stand for one file.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the root is.
    pub outcome: Outcome,
    /// The blobs.
    pub blobs: Vec<PlannedBlob>,
    /// The objects, members before the objects that hold them; the last is the root.
    pub objects: Vec<PlannedObject>,
    /// What the user should know, such as why a file is stored as it is.
    pub warnings: Vec<String>,
    /// What to store if the data turns out to be broken while it is copied, as compressed and encoded data can, or if what
    /// was made of it cannot be read again.
    pub fallback: Option<Box<Plan>>,
    /// A Parquet file to be decoded while its columns are stored; the root gets its partitions then.
    pub(super) decode: Option<Arc<Decode>>,
}

impl Plan {
    /// The plan without the bytes of the file beside its decoded columns; `None` if it keeps none.
    pub fn without_kept(&self) -> Option<Plan> {
        let mut plan = self.clone();
        let last = plan.blobs.len().checked_sub(1)?;
        let root = plan.objects.last_mut()?;
        let at = root.fields.iter().position(|(key, _)| key == KEPT)?;
        // It was planned last, so that no other number changes.
        if root.fields.remove(at).1 != Field::Blob(last) {
            return None;
        }
        let (_, recipe) = root.fields.iter_mut().find(|(key, _)| key == RECIPE)?;
        let Field::Json(Value::String(text)) = recipe else { return None };
        let said: Value = serde_json::from_str(text).ok()?;
        let written = said.get("view").and_then(Value::as_str).and_then(Written::from_extension)?;
        *recipe = given_up(written).into();
        plan.blobs.pop();
        Some(plan)
    }

    /// How many objects are made with one request.
    pub(super) fn objects_at_once(&self) -> usize {
        self.objects.len().max(self.decode.as_ref().map_or(0, |decode| decode.arrays()))
    }

    /// Sum of the blobs' sizes in bytes; about, where some are known only after decoding.
    pub fn size(&self) -> u64 {
        let decoded = self.decode.as_ref().map_or(0, |decode| decode.size());
        self.blobs.iter().map(PlannedBlob::size).sum::<u64>().saturating_add(decoded)
    }
}

/// A plan in the making.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) blobs: Vec<PlannedBlob>,
    pub(super) objects: Vec<PlannedObject>,
    /// Blobs that are one range of the staged file, so that buffers that share bytes share the blob.
    ranges: HashMap<(u64, u64), usize>,
    /// Blobs of set bits by the number of bytes, and how many objects have each.
    all_valid: HashMap<u64, (usize, usize)>,
    /// Objects of dictionaries that several columns share. The column is kept: its address is the key.
    dictionaries: HashMap<usize, (Arc<Column>, Field)>,
}

impl Draft {
    /// Adds a blob.
    pub(super) fn blob(&mut self, mut parts: Vec<Part>) -> Field {
        parts.retain(|part| !part.is_empty());
        if parts.is_empty() {
            return Field::Empty;
        }
        let key = match parts.as_slice() {
            [Part::Staged(range)] => Some((range.start, range.end)),
            _ => None,
        };
        if let Some(&index) = key.and_then(|key| self.ranges.get(&key)) {
            return Field::Blob(index);
        }
        self.blobs.push(PlannedBlob { parts });
        let index = self.blobs.len() - 1;
        if let Some(key) = key {
            self.ranges.insert(key, index);
        }
        Field::Blob(index)
    }

    /// The validity bitmap of `len` elements of which none is null, and whose values take `values` bytes.
    ///
    /// vineyard's own clients take the one empty blob of the store for it. For each member of a new object vineyardd walks
    /// all the owners that the member has (`IMetaService::IncRef`, `src/server/services/meta_service.cc` of v6d 0.24):
    /// with 16,000 such columns in the store, saving a table of 81 took a quarter of a second, and deleting it as long.
    ///
    /// Values of no bytes (structs without fields, binaries of width 0) may be any number in a file of a few hundred
    /// bytes: a bitmap that is larger than what it speaks of is the empty blob, as elsewhere.
    pub(super) fn all_valid(&mut self, len: u64, values: u64) -> Field {
        let size = len.div_ceil(8);
        if size == 0 || size > values.max(SMALL_BITMAP) {
            return Field::Empty;
        }
        let blobs = &mut self.blobs;
        let new = |blobs: &mut Vec<PlannedBlob>| {
            blobs.push(PlannedBlob { parts: vec![Part::Ones(size)] });
            (blobs.len() - 1, 0)
        };
        let (index, owners) = self.all_valid.entry(size).or_insert_with(|| new(blobs));
        if *owners == MOST_OWNERS {
            (*index, *owners) = new(blobs);
        }
        *owners += 1;
        Field::Blob(*index)
    }

    /// Adds an object.
    pub(super) fn object(&mut self, typename: impl Into<String>, fields: Vec<(String, Field)>) -> Field {
        self.objects.push(PlannedObject { typename: typename.into(), fields });
        Field::Object(self.objects.len() - 1)
    }

    /// The object of a shared dictionary, made once.
    pub(super) fn shared(
        &mut self,
        column: &Arc<Column>,
        make: impl FnOnce(&mut Draft, &Column) -> Result<Field>,
    ) -> Result<Field> {
        let key = Arc::as_ptr(column) as usize;
        if let Some((_, field)) = self.dictionaries.get(&key) {
            return Ok(field.clone());
        }
        let field = make(self, column)?;
        self.dictionaries.insert(key, (column.clone(), field.clone()));
        Ok(field)
    }

    /// Lets columns with this dictionary refer to an object that exists.
    pub(super) fn share(&mut self, column: &Arc<Column>, field: Field) {
        self.dictionaries.insert(Arc::as_ptr(column) as usize, (column.clone(), field));
    }

    /// The object of a dictionary, if one was made or is known.
    pub(super) fn field_of(&self, column: &Arc<Column>) -> Option<&Field> {
        self.dictionaries.get(&(Arc::as_ptr(column) as usize)).map(|(_, field)| field)
    }

    /// The plan; the object that was added last is its root.
    pub(super) fn finish(self, outcome: Outcome) -> Plan {
        Plan { outcome, blobs: self.blobs, objects: self.objects, warnings: Vec::new(), fallback: None, decode: None }
    }
}

/// Keys and values of an object in the making.
pub(super) type Fields = Vec<(String, Field)>;

/// Shorthand for one key and value.
pub(super) fn field(key: impl Into<String>, value: impl Into<Field>) -> (String, Field) {
    (key.into(), value.into())
}
