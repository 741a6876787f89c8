//! Shared memory and tables for tests: random arrays of every Arrow type, laid out over blobs.
#![allow(clippy::unwrap_used, missing_docs)]

mod types;

use std::sync::{Arc, Mutex};

use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, make_array};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, Schema, TimeUnit, UnionMode};

pub use self::types::{arrow_only_types, flat_types, tables};
use super::Image;
use super::arrow::has_validity;
use crate::dataset::{ArrayLayout, Batch, Span, Table};
use crate::error::{Error, Result};
use crate::vineyard::{Blob, BlobKey, BlobSource, InstanceId, ObjectId, Segment};

/// Blobs in this process.
#[derive(Debug, Default)]
pub struct Memory {
    blobs: Mutex<Vec<Arc<[u8]>>>,
}

const BASE: u64 = 0x8000_0000_0000_0001;

impl Memory {
    pub fn add(&self, bytes: &[u8]) -> Span {
        if bytes.is_empty() {
            return Span::EMPTY;
        }
        let mut blobs = self.blobs.lock().unwrap();
        let key = BlobKey { instance: InstanceId(0), id: ObjectId(BASE + blobs.len() as u64) };
        blobs.push(bytes.into());
        Span::blob(key, bytes.len() as u64)
    }

    fn get(&self, key: BlobKey) -> Result<Arc<[u8]>> {
        let index = key.id.0.wrapping_sub(BASE) as usize;
        self.blobs.lock().unwrap().get(index).cloned().ok_or_else(|| Error::stale(format!("blob {key}")))
    }
}

impl BlobSource for Memory {
    fn size(&self, key: BlobKey) -> Result<u64> {
        Ok(self.get(key)?.len() as u64)
    }
    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        let blob = self.get(key)?;
        let part = blob.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(part.ok_or_else(|| Error::malformed("outside the blob"))?);
        Ok(())
    }
    fn verify(&self, keys: &[BlobKey]) -> Result<()> {
        keys.iter().try_for_each(|key| self.get(*key).map(drop))
    }
}

/// One blob in a memory file of 4 KiB pages, mapped as the store's memory is.
pub struct Segments {
    file: std::fs::File,
    blob: Blob,
}

impl Segments {
    pub fn new(len: usize) -> Segments {
        use std::io::Write;
        let name = c"segment";
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = std::fs::File::from(fd);
        let mut random = Random(1);
        let chunk: Vec<u8> = (0..(1 << 20)).map(|_| random.next() as u8).collect();
        let mut left = len;
        while left > 0 {
            left -= file.write(&chunk[..left.min(chunk.len())]).unwrap();
        }
        let key = BlobKey { instance: InstanceId(0), id: ObjectId(BASE) };
        let blob = Blob::new(key, Segment::map(&file, len).unwrap(), 0, len as u64).unwrap();
        Segments { file, blob }
    }

    /// A part of the blob, with its bytes if they are few.
    pub fn piece(&self, offset: usize, len: usize) -> (Span, Vec<u8>) {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset as u64).unwrap();
        let span = Span::blob(self.blob.key(), self.blob.len()).slice(offset as u64, len as u64).unwrap();
        (span, bytes)
    }
}

impl BlobSource for Segments {
    fn size(&self, _: BlobKey) -> Result<u64> {
        Ok(self.blob.len())
    }
    fn read(&self, _: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        self.blob.read(offset, out)
    }
    fn verify(&self, _: &[BlobKey]) -> Result<()> {
        Ok(())
    }
    fn blob(&self, _: BlobKey) -> Result<Option<Blob>> {
        Ok(Some(self.blob.clone()))
    }
}

/// All bytes of an image.
pub fn bytes(image: &Image, source: &dyn BlobSource) -> Vec<u8> {
    image.validate(source).unwrap();
    let mut out = vec![0; image.size() as usize];
    image.read(source, 0, &mut out).unwrap();
    out
}

/// Lays an array out over blobs, its offset applied: buffers start at the first element, offsets need not start at 0.
pub fn layout(data: &ArrayData, memory: &Memory, counted: bool) -> ArrayLayout {
    let (len, offset) = (data.len(), data.offset());
    let data_type = data.data_type().clone();
    let raw = |i: usize| data.buffers()[i].as_slice();
    let fixed = |i: usize, width: usize, extra: usize| {
        let buffer = raw(i);
        if buffer.is_empty() {
            return Span::EMPTY;
        }
        memory.add(&buffer[offset * width..(offset + len + extra) * width])
    };
    let mut buffers = Vec::new();
    if has_validity(&data_type) {
        buffers.push(match data.nulls() {
            Some(nulls) => memory.add(nulls.inner().sliced().as_slice()),
            None => Span::EMPTY,
        });
    }
    let mut children: Vec<ArrayData> = Vec::new();
    let mut dictionary = None;
    match &data_type {
        DataType::Null => {}
        DataType::Boolean => buffers.push(memory.add(data.buffers()[0].bit_slice(offset, len).as_slice())),
        DataType::Utf8 | DataType::Binary => buffers.extend([fixed(0, 4, 1), memory.add(raw(1))]),
        DataType::LargeUtf8 | DataType::LargeBinary => buffers.extend([fixed(0, 8, 1), memory.add(raw(1))]),
        DataType::Utf8View | DataType::BinaryView => {
            buffers.push(fixed(0, 16, 0));
            buffers.extend((1..data.buffers().len()).map(|i| memory.add(raw(i))));
        }
        DataType::List(_) | DataType::Map(..) => {
            buffers.push(fixed(0, 4, 1));
            children.push(data.child_data()[0].clone());
        }
        DataType::LargeList(_) => {
            buffers.push(fixed(0, 8, 1));
            children.push(data.child_data()[0].clone());
        }
        DataType::ListView(_) => {
            buffers.extend([fixed(0, 4, 0), fixed(1, 4, 0)]);
            children.push(data.child_data()[0].clone());
        }
        DataType::LargeListView(_) => {
            buffers.extend([fixed(0, 8, 0), fixed(1, 8, 0)]);
            children.push(data.child_data()[0].clone());
        }
        DataType::FixedSizeList(_, size) => {
            let size = *size as usize;
            children.push(data.child_data()[0].slice(offset * size, len * size));
        }
        // `StructArray` keeps its children sliced, `ArrayData` its offset at 0.
        DataType::Struct(_) => children.extend(data.child_data().iter().map(|c| c.slice(offset, len))),
        DataType::Union(_, UnionMode::Sparse) => {
            buffers.push(fixed(0, 1, 0));
            children.extend(data.child_data().iter().map(|c| c.slice(offset, len)));
        }
        DataType::Union(_, UnionMode::Dense) => {
            buffers.extend([fixed(0, 1, 0), fixed(1, 4, 0)]);
            children.extend(data.child_data().iter().cloned());
        }
        DataType::RunEndEncoded(..) => {
            assert_eq!(offset, 0, "sliced run-end arrays are not laid out by tests");
            children.extend(data.child_data().iter().cloned());
        }
        DataType::Dictionary(key, _) => {
            buffers.push(fixed(0, key.primitive_width().unwrap(), 0));
            dictionary = Some(Arc::new(layout(&data.child_data()[0], memory, counted)));
        }
        other => {
            let width = super::arrow::width(other).unwrap() as usize;
            buffers.push(fixed(0, width, 0));
        }
    }
    ArrayLayout {
        null_count: counted.then_some(match data_type {
            DataType::Null => len as u64,
            _ => data.null_count() as u64,
        }),
        data_type,
        len: len as u64,
        buffers,
        children: children.iter().map(|child| layout(child, memory, counted)).collect(),
        dictionary,
    }
}

/// A table over blobs; null counts are unknown if not `counted`.
pub fn table(schema: Arc<Schema>, batches: &[RecordBatch], memory: &Memory, counted: bool) -> Table {
    let mut out = Table { schema, batches: Vec::new() };
    for batch in batches {
        let columns = batch.columns().iter().map(|column| layout(&column.to_data(), memory, counted)).collect();
        out.batches.push(Batch { rows: batch.num_rows() as u64, columns });
    }
    // Batches share their dictionaries, as the interface says.
    if let Some((first, rest)) = out.batches.split_first_mut() {
        for batch in rest {
            for (column, model) in batch.columns.iter_mut().zip(&first.columns) {
                share(column, model);
            }
        }
    }
    out
}

fn share(array: &mut ArrayLayout, model: &ArrayLayout) {
    array.dictionary.clone_from(&model.dictionary);
    array.children.iter_mut().zip(&model.children).for_each(|(child, model)| share(child, model));
}

/// Random numbers that depend on the seed alone.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
    /// Random bytes, aligned for every Arrow type.
    fn fill(&mut self, len: usize) -> MutableBuffer {
        let mut buffer = MutableBuffer::from_len_zeroed(len);
        buffer.as_slice_mut().iter_mut().for_each(|byte| *byte = self.next() as u8);
        buffer
    }
}

fn offsets(random: &mut Random, len: usize, most: usize, wide: bool) -> (Buffer, usize) {
    let mut ends = vec![0usize];
    for i in 0..len {
        ends.push(ends[i] + random.below(most + 1));
    }
    let total = ends[len];
    let buffer = if wide {
        Buffer::from_vec(ends.iter().map(|end| *end as i64).collect::<Vec<_>>())
    } else {
        Buffer::from_vec(ends.iter().map(|end| *end as i32).collect::<Vec<_>>())
    };
    (buffer, total)
}

fn text(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| b' ' + random.below(95) as u8).collect()
}

/// Values whose bytes may not be arbitrary get ones in range.
fn fixed_values(random: &mut Random, data_type: &DataType, len: usize) -> Buffer {
    let small = |random: &mut Random, limit: i64| (random.below(limit as usize) as i64) - limit / 2;
    match data_type {
        DataType::Float16 => {
            Buffer::from_vec((0..len).map(|_| 0x3c00 | (random.next() as u16 & 0x3ff)).collect::<Vec<_>>())
        }
        DataType::Float32 => Buffer::from_vec((0..len).map(|_| random.next() as i32 as f32 / 3.0).collect::<Vec<_>>()),
        DataType::Float64 => Buffer::from_vec((0..len).map(|_| random.next() as i64 as f64 / 3.0).collect::<Vec<_>>()),
        DataType::Date32 => Buffer::from_vec((0..len).map(|_| small(random, 40_000) as i32).collect::<Vec<_>>()),
        DataType::Date64 => Buffer::from_vec((0..len).map(|_| small(random, 40_000) * 86_400_000).collect::<Vec<_>>()),
        DataType::Time32(TimeUnit::Second) => {
            Buffer::from_vec((0..len).map(|_| random.below(86_400) as i32).collect::<Vec<_>>())
        }
        DataType::Time32(_) => Buffer::from_vec((0..len).map(|_| random.below(86_400_000) as i32).collect::<Vec<_>>()),
        DataType::Time64(_) => {
            Buffer::from_vec((0..len).map(|_| random.below(86_400_000_000) as i64).collect::<Vec<_>>())
        }
        DataType::Timestamp(..) | DataType::Duration(_) => {
            Buffer::from_vec((0..len).map(|_| small(random, 1 << 32)).collect::<Vec<_>>())
        }
        DataType::Decimal32(..) => Buffer::from_vec((0..len).map(|_| small(random, 90_000) as i32).collect::<Vec<_>>()),
        DataType::Decimal64(..) => Buffer::from_vec((0..len).map(|_| small(random, 90_000)).collect::<Vec<_>>()),
        DataType::Decimal128(..) => {
            Buffer::from_vec((0..len).map(|_| small(random, 90_000) as i128).collect::<Vec<_>>())
        }
        DataType::Decimal256(..) => Buffer::from_vec(
            (0..len).map(|_| arrow_buffer::i256::from_i128(small(random, 90_000) as i128)).collect::<Vec<_>>(),
        ),
        other => random.fill(len * super::arrow::width(other).unwrap() as usize).into(),
    }
}

/// A random array of a type, with nulls where `nullable`.
pub fn array(random: &mut Random, data_type: &DataType, nullable: bool, len: usize) -> ArrayRef {
    make_array(data(random, data_type, nullable, len))
}

fn child(random: &mut Random, field: &Field, len: usize) -> ArrayData {
    data(random, field.data_type(), field.is_nullable(), len)
}

fn data(random: &mut Random, data_type: &DataType, nullable: bool, len: usize) -> ArrayData {
    let mut builder = ArrayData::builder(data_type.clone()).len(len);
    if nullable && has_validity(data_type) && random.below(3) > 0 {
        let few = random.below(2) == 0;
        let bits: Vec<bool> = (0..len).map(|_| if few { random.below(20) > 0 } else { random.below(2) > 0 }).collect();
        builder = builder.nulls(Some(bits.into_iter().collect::<Vec<bool>>().into()));
    }
    builder = match data_type {
        DataType::Null => builder,
        DataType::Boolean => builder.add_buffer(random.fill(len.div_ceil(8)).into()),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => {
            let wide = matches!(data_type, DataType::LargeUtf8 | DataType::LargeBinary);
            let (offsets, total) = offsets(random, len, 20, wide);
            builder.add_buffer(offsets).add_buffer(text(random, total).into())
        }
        DataType::Utf8View => {
            let values = (0..len).map(|_| {
                String::from_utf8({
                    let n = random.below(30);
                    text(random, n)
                })
                .unwrap()
            });
            let built = arrow_array::StringViewArray::from_iter_values(values.collect::<Vec<_>>()).to_data();
            built.buffers().iter().fold(builder, |b, buffer| b.add_buffer(buffer.clone()))
        }
        DataType::BinaryView => {
            let values = (0..len).map(|_| {
                let n = random.below(30);
                text(random, n)
            });
            let built = arrow_array::BinaryViewArray::from_iter_values(values.collect::<Vec<_>>()).to_data();
            built.buffers().iter().fold(builder, |b, buffer| b.add_buffer(buffer.clone()))
        }
        DataType::List(field) | DataType::LargeList(field) => {
            let (offsets, total) = offsets(random, len, 3, matches!(data_type, DataType::LargeList(_)));
            builder.add_buffer(offsets).add_child_data(child(random, field, total))
        }
        DataType::Map(field, _) => {
            let (offsets, total) = offsets(random, len, 3, false);
            builder.add_buffer(offsets).add_child_data(child(random, field, total))
        }
        DataType::ListView(field) | DataType::LargeListView(field) => {
            let total = len * 2;
            let spans: Vec<(usize, usize)> = (0..len)
                .map(|_| {
                    let o = random.below(total);
                    (o, random.below((total - o).min(4)))
                })
                .collect();
            let buffers = if matches!(data_type, DataType::ListView(_)) {
                [
                    Buffer::from_vec(spans.iter().map(|s| s.0 as i32).collect::<Vec<_>>()),
                    Buffer::from_vec(spans.iter().map(|s| s.1 as i32).collect::<Vec<_>>()),
                ]
            } else {
                [
                    Buffer::from_vec(spans.iter().map(|s| s.0 as i64).collect::<Vec<_>>()),
                    Buffer::from_vec(spans.iter().map(|s| s.1 as i64).collect::<Vec<_>>()),
                ]
            };
            buffers
                .into_iter()
                .fold(builder, |b, buffer| b.add_buffer(buffer))
                .add_child_data(child(random, field, total))
        }
        DataType::FixedSizeList(field, size) => builder.add_child_data(child(random, field, len * *size as usize)),
        DataType::Struct(fields) => fields.iter().fold(builder, |b, field| b.add_child_data(child(random, field, len))),
        DataType::Union(fields, mode) => {
            let ids: Vec<i8> = fields.iter().map(|(id, _)| id).collect();
            let chosen: Vec<i8> = (0..len).map(|_| ids[random.below(ids.len())]).collect();
            let mut builder = builder.add_buffer(Buffer::from_vec(chosen.clone()));
            if *mode == UnionMode::Dense {
                let mut next = [0i32; 128];
                let offsets: Vec<i32> = chosen
                    .iter()
                    .map(|id| {
                        let n = next[*id as usize];
                        next[*id as usize] += 1;
                        n
                    })
                    .collect();
                builder = builder.add_buffer(Buffer::from_vec(offsets));
                fields
                    .iter()
                    .fold(builder, |b, (id, field)| b.add_child_data(child(random, field, next[id as usize] as usize)))
            } else {
                fields.iter().fold(builder, |b, (_, field)| b.add_child_data(child(random, field, len)))
            }
        }
        DataType::RunEndEncoded(ends, values) => {
            let mut runs = Vec::new();
            let mut end = 0;
            while end < len {
                end = (end + 1 + random.below(5)).min(len);
                runs.push(end as i32);
            }
            let count = runs.len();
            let ends = ArrayData::builder(ends.data_type().clone()).len(count).add_buffer(Buffer::from_vec(runs));
            builder.add_child_data(ends.build().unwrap()).add_child_data(child(random, values, count))
        }
        DataType::Dictionary(key, value) => {
            let count = 1 + random.below(20);
            let keys: Vec<u64> = (0..len).map(|_| random.below(count) as u64).collect();
            let buffer = match key.primitive_width().unwrap() {
                1 => Buffer::from_vec(keys.iter().map(|k| *k as u8).collect::<Vec<_>>()),
                2 => Buffer::from_vec(keys.iter().map(|k| *k as u16).collect::<Vec<_>>()),
                4 => Buffer::from_vec(keys.iter().map(|k| *k as u32).collect::<Vec<_>>()),
                _ => Buffer::from_vec(keys),
            };
            builder.add_buffer(buffer).add_child_data(data(random, value, false, count))
        }
        other => builder.add_buffer(fixed_values(random, other, len)),
    };
    builder.build().unwrap()
}

/// Batches of so many rows each, cut out of one random array per column.
pub fn batches(schema: &Arc<Schema>, rows: &[usize], seed: u64) -> Vec<RecordBatch> {
    let mut random = Random(seed);
    let total: usize = rows.iter().sum();
    let sliceable = schema.fields().iter().all(|field| !contains_runs(field.data_type()));
    let columns: Vec<ArrayRef> =
        schema.fields().iter().map(|f| array(&mut random, f.data_type(), f.is_nullable(), total)).collect();
    let all = RecordBatch::try_new_with_options(
        schema.clone(),
        columns,
        &RecordBatchOptions::new().with_row_count(Some(total)),
    )
    .unwrap();
    if !sliceable {
        return vec![all];
    }
    let mut start = 0;
    rows.iter()
        .map(|rows| {
            start += rows;
            all.slice(start - rows, *rows)
        })
        .collect()
}

/// Types whose arrays can hold nulls without a bitmap: their fields are nullable, or readers complain.
fn hides_nulls(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..))
}

fn contains_runs(data_type: &DataType) -> bool {
    match data_type {
        DataType::RunEndEncoded(..) => true,
        DataType::List(f)
        | DataType::LargeList(f)
        | DataType::ListView(f)
        | DataType::LargeListView(f)
        | DataType::FixedSizeList(f, _)
        | DataType::Map(f, _) => contains_runs(f.data_type()),
        DataType::Struct(fields) => fields.iter().any(|f| contains_runs(f.data_type())),
        DataType::Union(fields, _) => fields.iter().any(|(_, f)| contains_runs(f.data_type())),
        DataType::Dictionary(_, value) => contains_runs(value),
        _ => false,
    }
}
