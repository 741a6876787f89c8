//! Record batches of Arrow IPC as columns: places of buffers, checked, not copied.
//!
//! Format: `format/Message.fbs`, `format/File.fbs` and `docs/source/format/Columnar.rst` of Apache Arrow. Flatbuffers are
//! verified by their generated reader; everything that they say (counts, lengths, offsets, codecs) is checked here.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use arrow_ipc::{BodyCompressionMethod, CompressionType, MetadataVersion};
use arrow_schema::{DataType, SchemaRef, UnionMode};

use super::check;
use super::column::{Column, bytes, width};
use super::inflate::{Codec, Inflated};
use super::plan::Part;
use crate::cgroup;
use crate::error::{Error, Result};

/// Most decompressed bytes that checking keeps for the copy; beyond it a buffer is decompressed twice.
const KEEP: u64 = 256 << 20;

/// A field as IPC sees it: the type, and the dictionary that holds its values.
#[derive(Clone, Debug)]
pub(super) struct Node {
    data_type: DataType,
    dictionary: Option<i64>,
    /// Fields of nested types; of a dictionary's values, if those nest.
    children: Vec<Node>,
}

fn is_pair(entries: &DataType) -> bool {
    matches!(entries, DataType::Struct(fields) if fields.len() == 2 && !fields[0].is_nullable())
}

/// The entries of a map are never null, and run ends are signed integers of 16, 32 or 64 bits and never null (`Schema.fbs`
/// of the Arrow format): an array of another type cannot be made.
fn check_type(data_type: &DataType) -> Result<()> {
    use DataType::*;
    match data_type {
        RunEndEncoded(ends, _) if !ends.data_type().is_run_ends_type() || ends.is_nullable() => {
            Err(Error::malformed(format!("run ends of type {}, nullable or not", ends.data_type())))
        }
        Map(entries, _) if entries.is_nullable() => Err(Error::malformed("a map whose entries may be null")),
        Map(entries, _) if !is_pair(entries.data_type()) => {
            Err(Error::malformed("a map whose entries are not a key, never null, and a value"))
        }
        Map(f, _) | List(f) | LargeList(f) | ListView(f) | LargeListView(f) | FixedSizeList(f, _) => {
            check_type(f.data_type())
        }
        Struct(fields) => fields.iter().try_for_each(|f| check_type(f.data_type())),
        Union(fields, _) => fields.iter().try_for_each(|(_, f)| check_type(f.data_type())),
        Dictionary(_, values) => check_type(values),
        RunEndEncoded(_, values) => check_type(values.data_type()),
        _ => Ok(()),
    }
}

/// The schema of a file or stream.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) schema: SchemaRef,
    nodes: Vec<Node>,
}

impl Layout {
    /// Reads a schema.
    ///
    /// # Errors
    /// `Malformed` for what Arrow does not allow, big-endian data, and types that are not known here.
    pub(super) fn new(fb: arrow_ipc::Schema<'_>) -> Result<Self> {
        if fb.endianness() != arrow_ipc::Endianness::Little {
            return Err(Error::malformed("big-endian Arrow data"));
        }
        let schema = arrow_ipc::convert::try_fb_to_schema(fb).map_err(arrow)?;
        schema.fields().iter().try_for_each(|field| check_type(field.data_type()))?;
        let fields = fb.fields().ok_or_else(|| Error::malformed("a schema without fields"))?;
        let nodes = schema
            .fields()
            .iter()
            .zip(fields.iter())
            .map(|(field, fb)| node(field.data_type(), fb))
            .collect::<Result<_>>()?;
        Ok(Layout { schema: Arc::new(schema), nodes })
    }

    fn dictionary_node(&self, id: i64) -> Option<Node> {
        fn find(node: &Node, id: i64) -> Option<Node> {
            if node.dictionary == Some(id)
                && let DataType::Dictionary(_, values) = &node.data_type
            {
                let data_type = (**values).clone();
                return Some(Node { data_type, dictionary: None, children: node.children.clone() });
            }
            node.children.iter().find_map(|child| find(child, id))
        }
        self.nodes.iter().find_map(|node| find(node, id))
    }
}

fn node(data_type: &DataType, fb: arrow_ipc::Field<'_>) -> Result<Node> {
    use DataType::*;
    let dictionary = fb.dictionary().map(|d| d.id());
    let inner = match data_type {
        Dictionary(_, values) => values,
        other => other,
    };
    let types: Vec<&DataType> = match inner {
        List(f) | LargeList(f) | ListView(f) | LargeListView(f) | FixedSizeList(f, _) | Map(f, _) => {
            vec![f.data_type()]
        }
        Struct(fields) => fields.iter().map(|f| f.data_type()).collect(),
        Union(fields, _) => fields.iter().map(|(_, f)| f.data_type()).collect(),
        RunEndEncoded(ends, values) => vec![ends.data_type(), values.data_type()],
        _ => Vec::new(),
    };
    let count = fb.children().map_or(0, |c| c.len());
    if !types.is_empty() && count != types.len() {
        return Err(Error::malformed(format!("a field of {} children has {count}", types.len())));
    }
    let children = match fb.children() {
        Some(children) if !types.is_empty() => {
            types.into_iter().zip(children.iter()).map(|(t, c)| node(t, c)).collect::<Result<_>>()?
        }
        _ => Vec::new(),
    };
    Ok(Node { data_type: data_type.clone(), dictionary, children })
}

/// An error of the Arrow crates as one of a broken file.
pub(super) fn arrow(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::malformed("not valid Arrow data").with_source(error)
}

/// The message that starts at `range.start` and has at most `range` to fit in: the flatbuffer without its prefix.
///
/// # Errors
/// `Malformed` if it does not fit.
pub(super) fn message_bytes(staged: &[u8], range: Range<u64>) -> Result<&[u8]> {
    let outside = || Error::malformed("a message outside the file");
    let bytes = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end).ok())
        .and_then(|(start, end)| staged.get(start..end))
        .ok_or_else(outside)?;
    // Before format version 0.15 there was no continuation marker.
    let bytes = bytes.strip_prefix(&[0xff; 4]).unwrap_or(bytes);
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(outside)?;
    let length = usize::try_from(i32::from_le_bytes(*length)).map_err(|_| outside())?;
    rest.get(..length).ok_or_else(outside)
}

/// Reads messages of one file or stream, and keeps its dictionaries.
pub(super) struct Reader<'a> {
    staged: &'a [u8],
    layout: &'a Layout,
    dictionaries: HashMap<i64, Arc<Column>>,
    /// Decompressed bytes that may still be produced, and that may still be kept.
    budget: u64,
    keep: u64,
    /// Sum of the lengths of all buffers so far: a small file could name its bytes over and over.
    named: u64,
    /// True once a buffer was compressed: the file's own bytes are no list of blobs then.
    pub(super) compressed: bool,
}

impl<'a> Reader<'a> {
    /// A reader of `staged` that refuses to produce more than `budget` bytes by decompression.
    pub(super) fn new(staged: &'a [u8], layout: &'a Layout, budget: u64) -> Self {
        Reader { staged, layout, dictionaries: HashMap::new(), budget, keep: KEEP, named: 0, compressed: false }
    }

    /// Takes a dictionary.
    ///
    /// Returns false, and keeps the former one, if it is a delta or a replacement: those need decoding.
    pub(super) fn dictionary(&mut self, message: arrow_ipc::Message<'_>, body: Range<u64>) -> Result<bool> {
        let batch = message.header_as_dictionary_batch().ok_or_else(|| Error::malformed("no dictionary batch"))?;
        if batch.isDelta() || self.dictionaries.contains_key(&batch.id()) {
            return Ok(false);
        }
        // Dictionaries of no field are allowed, and of no use.
        let Some(node) = self.layout.dictionary_node(batch.id()) else { return Ok(true) };
        let data = batch.data().ok_or_else(|| Error::malformed("a dictionary without data"))?;
        let mut columns = self.columns(data, std::slice::from_ref(&node), message.version(), body)?;
        let column = columns.pop().ok_or_else(|| Error::malformed("a dictionary without values"))?;
        self.dictionaries.insert(batch.id(), Arc::new(column));
        Ok(true)
    }

    /// Takes a record batch: its number of rows and its columns.
    pub(super) fn batch(&mut self, message: arrow_ipc::Message<'_>, body: Range<u64>) -> Result<(u64, Vec<Column>)> {
        let batch = message.header_as_record_batch().ok_or_else(|| Error::malformed("no record batch"))?;
        let rows = length(batch.length())?;
        let layout = self.layout;
        let columns = self.columns(batch, &layout.nodes, message.version(), body)?;
        for (column, field) in columns.iter().zip(layout.schema.fields()) {
            if column.len != rows {
                return Err(Error::malformed(format!("column {:?} has {} rows of {rows}", field.name(), column.len)));
            }
        }
        Ok((rows, columns))
    }

    fn columns(
        &mut self,
        batch: arrow_ipc::RecordBatch<'_>,
        nodes: &[Node],
        version: MetadataVersion,
        body: Range<u64>,
    ) -> Result<Vec<Column>> {
        if version != MetadataVersion::V5 && version != MetadataVersion::V4 {
            return Err(Error::malformed(format!("metadata version {version:?} of Arrow")));
        }
        if body.start > body.end || body.end > self.staged.len() as u64 {
            return Err(Error::malformed("a body outside the file"));
        }
        let codec = match batch.compression() {
            None => None,
            Some(c) if c.method() != BodyCompressionMethod::BUFFER => {
                return Err(Error::malformed("a compression method that Arrow does not have"));
            }
            Some(c) if c.codec() == CompressionType::LZ4_FRAME => Some(Codec::Lz4),
            Some(c) if c.codec() == CompressionType::ZSTD => Some(Codec::Zstd),
            Some(c) => return Err(Error::malformed(format!("compression {:?}", c.codec()))),
        };
        self.compressed |= codec.is_some();
        let mut walk = Walk {
            field_nodes: batch.nodes().map(|v| v.iter().map(|n| (n.length(), n.null_count())).collect()),
            buffers: batch.buffers().map(|v| v.iter().map(|b| (b.offset(), b.length())).collect()),
            variadic: batch.variadicBufferCounts().map(|v| v.iter().collect()).unwrap_or_default(),
            next: (0, 0, 0),
            old_union: version == MetadataVersion::V4,
            reader: self,
            body,
            codec,
        };
        nodes.iter().map(|node| walk.column(node)).collect()
    }
}

fn length(value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| Error::malformed(format!("a length of {value}")))
}

/// One record batch being read, field after field.
struct Walk<'r, 'a> {
    field_nodes: Option<Vec<(i64, i64)>>,
    buffers: Option<Vec<(i64, i64)>>,
    variadic: Vec<i64>,
    /// Next field node, buffer, variadic count.
    next: (usize, usize, usize),
    old_union: bool,
    reader: &'r mut Reader<'a>,
    body: Range<u64>,
    codec: Option<Codec>,
}

impl<'a> Walk<'_, 'a> {
    /// The next buffer, whole: as long as the file says, or as its decompressed length says.
    fn take(&mut self) -> Result<Part> {
        let (offset, len) = *self
            .buffers
            .as_ref()
            .and_then(|b| b.get(self.next.1))
            .ok_or_else(|| Error::malformed("too few buffers"))?;
        self.next.1 += 1;
        let (offset, len) = (length(offset)?, length(len)?);
        if len == 0 {
            return Ok(Part::EMPTY);
        }
        self.reader.named = self.reader.named.saturating_add(len);
        if self.reader.named / 4 > self.reader.staged.len() as u64 {
            return Err(Error::malformed("buffers that share their bytes many times over"));
        }
        let end = offset.checked_add(len).filter(|&end| end <= self.body.end - self.body.start);
        let end = end.ok_or_else(|| Error::malformed("a buffer outside its body"))?;
        let at = self.body.start + offset..self.body.start + end;
        let Some(codec) = self.codec else { return Ok(Part::Staged(at)) };
        let prefix = self.reader.staged.get(at.start as usize..at.end as usize).and_then(|b| b.first_chunk::<8>());
        let declared =
            i64::from_le_bytes(*prefix.ok_or_else(|| Error::malformed("a compressed buffer without length"))?);
        let at = at.start + 8..at.end;
        match declared {
            -1 => Ok(if at.is_empty() { Part::EMPTY } else { Part::Staged(at) }),
            0 => Ok(Part::EMPTY),
            declared => {
                let declared = length(declared)?;
                self.reader.budget = self
                    .reader
                    .budget
                    .checked_sub(declared)
                    .ok_or_else(|| Error::malformed("buffers that decompress to more than the store holds"))?;
                Ok(Part::Inflated(Inflated { at, codec, declared, window: 0..declared }))
            }
        }
    }

    /// The next buffer, cut to `need` bytes.
    fn cut(&mut self, need: u64) -> Result<Part> {
        let part = self.take()?;
        if part.len() < need {
            return Err(Error::malformed(format!("a buffer of {} bytes where {need} are needed", part.len())));
        }
        part.slice(0..need)
    }

    /// The bytes of a part, for checking. A decompressed buffer stays for the copy if there is room.
    fn look(&mut self, part: &mut Part) -> Result<Cow<'a, [u8]>> {
        let staged: &'a [u8] = self.reader.staged;
        match part {
            Part::Staged(at) => staged
                .get(at.start as usize..at.end as usize)
                .map(Cow::Borrowed)
                .ok_or_else(|| Error::malformed("a buffer outside the file")),
            Part::Inflated(inflated) => {
                let bytes = inflated.to_vec(staged)?;
                let len = bytes.len() as u64;
                if len <= self.reader.keep && cgroup::room_for(len).is_ok() {
                    self.reader.keep -= len;
                    *part = Part::owned(bytes.clone());
                }
                Ok(Cow::Owned(bytes))
            }
            Part::Owned(buffer) => Ok(Cow::Owned(buffer.to_vec())),
            other => Ok(Cow::Owned(vec![0; other.len() as usize])),
        }
    }

    /// The next validity bitmap: its part (empty if nothing is null), its bytes and the number of nulls.
    fn validity(&mut self, len: u64, null_count: i64) -> Result<(Part, Cow<'a, [u8]>, u64)> {
        let whole = self.take()?;
        if null_count == 0 || len == 0 {
            return Ok((Part::EMPTY, Cow::Borrowed(&[]), 0));
        }
        if whole.len() < len.div_ceil(8) {
            return Err(Error::malformed(format!("a validity bitmap of {} bytes for {len} elements", whole.len())));
        }
        let mut part = whole.slice(0..len.div_ceil(8))?;
        let bytes = self.look(&mut part)?;
        // What is counted is right, whatever the file says.
        match check::count_nulls(&bytes, len) {
            0 => Ok((Part::EMPTY, Cow::Borrowed(&[]), 0)),
            nulls => Ok((part, bytes, nulls)),
        }
    }

    /// The next offsets, for `len` elements: the part, its bytes, first and last offset.
    fn offsets<T: check::Offset>(&mut self, len: u64) -> Result<(Part, Cow<'a, [u8]>, u64, u64)> {
        let whole = self.take()?;
        // Zero elements may come without the one offset that they have.
        if len == 0 && whole.len() < T::WIDTH as u64 {
            return Ok((Part::Zeros(T::WIDTH as u64), Cow::Owned(vec![0; T::WIDTH]), 0, 0));
        }
        let need = len.checked_add(1).ok_or_else(|| Error::malformed("too many elements"));
        let need = bytes(need?, T::WIDTH as u64)?;
        if whole.len() < need {
            return Err(Error::malformed(format!("{} bytes of offsets for {len} elements", whole.len())));
        }
        let mut part = whole.slice(0..need)?;
        let bytes = self.look(&mut part)?;
        let (first, last) = check::offsets::<T>(&bytes)?;
        Ok((part, bytes, first, last))
    }

    fn column(&mut self, node: &Node) -> Result<Column> {
        use DataType::*;
        let (len, null_count) = *self
            .field_nodes
            .as_ref()
            .and_then(|n| n.get(self.next.0))
            .ok_or_else(|| Error::malformed("too few field nodes"))?;
        self.next.0 += 1;
        let len = length(len)?;
        let mut column = Column {
            data_type: node.data_type.clone(),
            len,
            null_count: 0,
            buffers: Vec::new(),
            children: Vec::new(),
            dictionary: None,
        };
        let mut buffers = Vec::new();
        let bitmap = match &node.data_type {
            Null | RunEndEncoded(..) => Cow::Borrowed(&[][..]),
            Union(..) => {
                // Unions had a bitmap before metadata version 5; a union's nulls are its children's.
                if self.old_union {
                    self.take()?;
                }
                Cow::Borrowed(&[][..])
            }
            _ => {
                let (part, bitmap, nulls) = self.validity(len, null_count)?;
                buffers.push(part);
                column.null_count = nulls;
                bitmap
            }
        };
        match &node.data_type {
            Null => column.null_count = len,
            Boolean => buffers.push(self.cut(len.div_ceil(8))?),
            Utf8 => self.strings::<i32>(len, true, &mut buffers)?,
            Binary => self.strings::<i32>(len, false, &mut buffers)?,
            LargeUtf8 => self.strings::<i64>(len, true, &mut buffers)?,
            LargeBinary => self.strings::<i64>(len, false, &mut buffers)?,
            Utf8View | BinaryView => self.views(len, node.data_type == Utf8View, &bitmap, &mut buffers)?,
            List(_) | Map(..) => self.list::<i32>(node, len, &mut buffers, &mut column)?,
            LargeList(_) => self.list::<i64>(node, len, &mut buffers, &mut column)?,
            ListView(_) => self.list_view::<i32>(node, len, &mut buffers, &mut column)?,
            LargeListView(_) => self.list_view::<i64>(node, len, &mut buffers, &mut column)?,
            FixedSizeList(_, n) => {
                let child = self.child(node, 0)?;
                expect_len(&child, bytes(len, length((*n).into())?)?)?;
                column.children.push(child);
            }
            Struct(fields) => {
                for i in 0..fields.len() {
                    let child = self.child(node, i)?;
                    expect_len(&child, len)?;
                    column.children.push(child);
                }
            }
            Union(fields, mode) => {
                let mut ids = self.cut(len)?;
                let ids_bytes = self.look(&mut ids)?;
                buffers.push(ids);
                let mut offsets_bytes = Cow::Borrowed(&[][..]);
                if *mode == UnionMode::Dense {
                    let mut offsets = self.cut(bytes(len, 4)?)?;
                    offsets_bytes = self.look(&mut offsets)?;
                    buffers.push(offsets);
                }
                let mut known = Vec::new();
                for (i, (id, _)) in fields.iter().enumerate() {
                    let child = self.child(node, i)?;
                    if *mode == UnionMode::Sparse {
                        expect_len(&child, len)?;
                    }
                    known.push((id, child.len));
                    column.children.push(child);
                }
                check::union(&ids_bytes, &offsets_bytes, &known)?;
            }
            RunEndEncoded(ends, _) => self.runs(node, len, ends.data_type(), &mut column)?,
            Dictionary(key, _) => {
                let id = node.dictionary.ok_or_else(|| Error::malformed("a dictionary without id"))?;
                let width = width(key).ok_or_else(|| Error::malformed("dictionary keys that are no integers"))?;
                let mut keys = self.cut(bytes(len, width)?)?;
                let values = match self.reader.dictionaries.get(&id) {
                    Some(values) => values.clone(),
                    // A batch of nulls, or of no rows, needs no values.
                    None if column.null_count == len => Arc::new(self.no_values(id)?),
                    None => return Err(Error::malformed(format!("dictionary {id} is missing"))),
                };
                let looked = self.look(&mut keys)?;
                let signed = key.is_signed_integer();
                if let Some(cleaned) = check::keys(&looked, width as usize, signed, &bitmap, values.len)? {
                    keys = Part::owned(cleaned);
                }
                buffers.push(keys);
                column.dictionary = Some(values);
            }
            other => {
                let width = width(other).ok_or_else(|| Error::malformed(format!("type {other} is not known")))?;
                let part = self.cut(bytes(len, width)?)?;
                buffers.push(part);
            }
        }
        column.buffers = buffers.into_iter().map(|part| if part.is_empty() { vec![] } else { vec![part] }).collect();
        Ok(column)
    }

    fn child(&mut self, node: &Node, i: usize) -> Result<Column> {
        let child = node.children.get(i).ok_or_else(|| Error::malformed("a nested type without its field"))?;
        self.column(child)
    }

    fn strings<T: check::Offset>(&mut self, len: u64, text: bool, buffers: &mut Vec<Part>) -> Result<()> {
        let (part, offsets, first, last) = self.offsets::<T>(len)?;
        buffers.push(part);
        let mut data = self.cut(last)?;
        if text && first < last {
            let bytes = self.look(&mut data)?;
            check::utf8::<T>(&offsets, &bytes, first)?;
        }
        buffers.push(data);
        Ok(())
    }

    fn views(&mut self, len: u64, text: bool, bitmap: &[u8], buffers: &mut Vec<Part>) -> Result<()> {
        let mut views = self.cut(bytes(len, 16)?)?;
        let looked = self.look(&mut views)?;
        let count =
            self.variadic.get(self.next.2).copied().ok_or_else(|| Error::malformed("too few variadic counts"))?;
        self.next.2 += 1;
        let mut parts = Vec::new();
        let mut data = Vec::new();
        for _ in 0..length(count)? {
            let mut part = self.take()?;
            data.push(self.look(&mut part)?);
            parts.push(part);
        }
        if let Some(cleaned) = check::views(&looked, bitmap, &data, text)? {
            views = Part::owned(cleaned);
        }
        buffers.push(views);
        buffers.extend(parts);
        Ok(())
    }

    fn list<T: check::Offset>(
        &mut self,
        node: &Node,
        len: u64,
        buffers: &mut Vec<Part>,
        column: &mut Column,
    ) -> Result<()> {
        let (part, _, _, last) = self.offsets::<T>(len)?;
        buffers.push(part);
        let child = self.child(node, 0)?;
        if child.len < last {
            return Err(Error::malformed(format!("lists that end at {last} of {} values", child.len)));
        }
        column.children.push(child);
        Ok(())
    }

    fn list_view<T: check::Offset>(
        &mut self,
        node: &Node,
        len: u64,
        buffers: &mut Vec<Part>,
        column: &mut Column,
    ) -> Result<()> {
        let mut starts = self.cut(bytes(len, T::WIDTH as u64)?)?;
        let mut sizes = self.cut(bytes(len, T::WIDTH as u64)?)?;
        let (start_bytes, size_bytes) = (self.look(&mut starts)?, self.look(&mut sizes)?);
        let child = self.child(node, 0)?;
        check::list_views::<T>(&start_bytes, &size_bytes, child.len)?;
        buffers.extend([starts, sizes]);
        column.children.push(child);
        Ok(())
    }

    fn runs(&mut self, node: &Node, len: u64, ends_type: &DataType, column: &mut Column) -> Result<()> {
        let width = width(ends_type).ok_or_else(|| Error::malformed("run ends that are no integers"))?;
        let mut ends = self.child(node, 0)?;
        if ends.null_count > 0 {
            return Err(Error::malformed("run ends with nulls"));
        }
        let mut checked = 0;
        for part in ends.buffers.iter_mut().skip(1).flatten() {
            let looked = self.look(part)?;
            check::runs_reach(check::run_ends(&looked, width as usize, 0)?, len)?;
            checked += 1;
        }
        if checked == 0 && len > 0 {
            return Err(Error::malformed("runs without ends"));
        }
        let values = self.child(node, 1)?;
        expect_len(&values, ends.len)?;
        column.children.extend([ends, values]);
        Ok(())
    }

    /// An empty dictionary.
    fn no_values(&self, id: i64) -> Result<Column> {
        let node =
            self.reader.layout.dictionary_node(id).ok_or_else(|| Error::malformed("a dictionary of no field"))?;
        Ok(Column::empty(&node.data_type))
    }
}

fn expect_len(child: &Column, len: u64) -> Result<()> {
    if child.len == len {
        return Ok(());
    }
    Err(Error::malformed(format!("a child of {} elements where {len} are needed", child.len)))
}
