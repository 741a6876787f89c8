//! Files that break their format's rules: cut, with wrong bits, with lying lengths.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arrow_array::*;
use arrow_schema::{DataType, Field as ArrowField};

use super::parquet_tests::times_of_96_bits;
use super::tests::*;
use super::*;
use crate::dataset::{self, Dataset};
use crate::vineyard::Store;
use crate::vineyard::fake::FakeStore;

/// Publishes the bytes whatever they are. Nothing panics, what is stored can be decoded and read, and what fails leaves
/// nothing behind.
fn survive(store: &FakeStore, temp: &Temp, view: Written) -> Option<Outcome> {
    let limits = Limits { inflated: 64 << 20 };
    let plan = match plan(&temp.staged(), view, &attrs(), limits) {
        Ok(plan) => plan,
        Err(error) => {
            assert_eq!(error.kind(), Kind::Invalid, "{error}");
            return None;
        }
    };
    let published = match publish(store, &|_| "x".into(), &plan, &temp.staged(), None) {
        Ok(published) => published,
        Err(error) => {
            assert_eq!(error.kind(), Kind::Full, "{error}");
            assert_eq!((store.blob_count(), store.object_count()), (0, 0));
            return None;
        }
    };
    let meta = meta_of(store, published.id);
    match dataset::decode(&meta, store).unwrap() {
        Dataset::Table(table) => {
            for column in table.batches.iter().flat_map(|b| &b.columns) {
                dataset::check(column, store).unwrap();
                dataset::materialize(column, store).unwrap();
            }
        }
        Dataset::File(span) => assert_eq!(span.to_vec(store).unwrap(), temp.staged().bytes),
        _ => {}
    }
    if published.outcome != Outcome::File {
        assert_eq!(bytes_back(store, &meta), temp.staged().bytes);
    }
    store.delete(&[published.id]).unwrap();
    assert_eq!((store.blob_count(), store.object_count()), (0, 0));
    Some(published.outcome)
}

fn samples() -> Vec<(Vec<u8>, Written)> {
    let batch = all_types(40);
    let frame = pandas_table(40, true);
    let plain = arrow_ipc::writer::IpcWriteOptions::default;
    let packed = |codec| plain().try_with_compression(Some(codec)).unwrap();
    vec![
        (arrow_bytes(&[batch.slice(0, 20), batch.slice(20, 20)], plain()), Written::Arrow),
        (arrow_bytes(std::slice::from_ref(&batch), packed(arrow_ipc::CompressionType::LZ4_FRAME)), Written::Feather),
        (arrow_bytes(std::slice::from_ref(&frame), packed(arrow_ipc::CompressionType::ZSTD)), Written::Feather),
        (arrow_bytes(std::slice::from_ref(&frame), plain()), Written::Feather),
        (stream_bytes(&batch), Written::Arrow),
        (parquet_bytes(&frame, Default::default()), Written::Parquet),
        (parquet_bytes(&batch.project(&[0, 5, 6, 7, 14, 16]).unwrap(), Default::default()), Written::Parquet),
        (times_of_96_bits(&[&[&[0, 1001]], &[&[1 << 70]]]), Written::Parquet),
        (
            b"\x93NUMPY\x01\x00\x3b\x00{'descr': '<i2', 'fortran_order': True, 'shape': (2, 3), } 123456789012"
                .to_vec(),
            Written::Npy,
        ),
    ]
}

#[test]
fn cut_files_are_incomplete_or_plain() {
    let store = FakeStore::new(32 << 20);
    for (bytes, view) in samples() {
        assert!(survive(&store, &Temp::new(bytes.clone()), view).is_some_and(|o| o != Outcome::File), "{view:?}");
        for cut in (0..bytes.len()).step_by(61) {
            let temp = Temp::new(bytes[..cut].to_vec());
            let stream = bytes.starts_with(&[0xff; 4]);
            // A stream that is cut between messages is a whole stream.
            let outcome = survive(&store, &temp, view);
            assert!(stream || matches!(outcome, None | Some(Outcome::File)), "{view:?} cut at {cut}: {outcome:?}");
        }
    }
}

#[test]
fn wrong_bytes_do_no_harm() {
    let store = FakeStore::new(32 << 20);
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for (bytes, view) in samples() {
        for round in 0..400 {
            let mut bad = bytes.clone();
            for _ in 0..=round % 3 {
                let at = (next() % bad.len() as u64) as usize;
                // Headers and footers are where lies matter.
                let at = match round % 4 {
                    0 => at,
                    1 => bad.len() - 1 - at % (bad.len() / 4),
                    _ => at % (bad.len() / 2),
                };
                match next() % 3 {
                    0 => bad[at] ^= 1 << (next() % 8),
                    1 => bad[at] = 0xff,
                    _ => {
                        let end = (at + 8).min(bad.len());
                        let word = [i64::MAX, -1, 1 << 40, 0][(next() % 4) as usize].to_le_bytes();
                        bad[at..end].copy_from_slice(&word[..end - at]);
                    }
                }
            }
            survive(&store, &Temp::new(bad), view);
        }
    }
}

#[test]
fn bombs_become_plain_files() {
    // 512 MiB of zeros in a few KiB.
    let zeros = std::sync::Arc::new(arrow_array::Int64Array::from(vec![0i64; 64 << 20]));
    let batch = arrow_array::RecordBatch::try_from_iter([("a", zeros as arrow_array::ArrayRef)]).unwrap();
    let options = arrow_ipc::writer::IpcWriteOptions::default();
    let options = options.try_with_compression(Some(arrow_ipc::CompressionType::ZSTD)).unwrap();
    let bytes = arrow_bytes(&[batch], options);
    assert!(bytes.len() < 1 << 20);
    assert_eq!(survive(&FakeStore::new(16 << 20), &Temp::new(bytes), Written::Arrow), Some(Outcome::File));
    // A dictionary of one long string, ten thousand times.
    let long = "x".repeat(1 << 14);
    let strings: arrow_array::StringViewArray = std::iter::repeat_n(Some(long), 10_000).collect();
    let batch = arrow_array::RecordBatch::try_from_iter([("s", std::sync::Arc::new(strings) as arrow_array::ArrayRef)]);
    let schema = batch.as_ref().unwrap().schema();
    let mut bytes = Vec::new();
    let options = parquet::arrow::arrow_writer::ArrowWriterOptions::new().with_skip_arrow_metadata(true);
    let mut writer = parquet::arrow::ArrowWriter::try_new_with_options(&mut bytes, schema, options).unwrap();
    writer.write(&batch.unwrap()).unwrap();
    writer.close().unwrap();
    assert!(bytes.len() < 1 << 20);
    assert_eq!(survive(&FakeStore::new(16 << 20), &Temp::new(bytes), Written::Parquet), Some(Outcome::File));
}

/// Columns whose elements take no bytes, of any number of rows, in files of a few hundred bytes.
fn weightless(rows: usize) -> Vec<ArrayRef> {
    let field = |data_type| Arc::new(ArrowField::new("x", data_type, true));
    let nothing = || Arc::new(StructArray::new_empty_fields(rows, None)) as ArrayRef;
    let binary = || FixedSizeBinaryArray::try_new_with_len(0, Vec::<u8>::new().into(), None, rows).unwrap();
    let no_bytes = Arc::new(Int8Array::from(Vec::<i8>::new()));
    let lists = FixedSizeListArray::try_new_with_length(field(DataType::Int8), 0, no_bytes, None, rows).unwrap();
    let of = |array: ArrayRef| {
        let field = field(array.data_type().clone());
        let outer = StructArray::new(vec![field.clone()].into(), vec![array.clone()], None);
        let offsets = arrow_buffer::OffsetBuffer::from_lengths([rows]);
        let list = LargeListArray::new(field, offsets, array, None);
        [Arc::new(outer) as ArrayRef, Arc::new(list)]
    };
    let nulls = Arc::new(NullArray::new(rows));
    [
        vec![nothing(), Arc::new(binary()), Arc::new(lists)],
        of(nothing()).into(),
        of(Arc::new(binary())).into(),
        of(nulls).into(),
    ]
    .concat()
}

#[test]
fn elements_of_no_bytes_take_none_of_the_store() {
    let store = FakeStore::new(1 << 20);
    for rows in [3, 30_000, 1 << 31, 1 << 40, 1 << 60] {
        for column in weightless(rows) {
            let name = format!("{rows} of {}", column.data_type());
            let batch = RecordBatch::try_from_iter_with_nullable([("x", column.clone(), true)]).unwrap();
            let temp = Temp::new(arrow_bytes(std::slice::from_ref(&batch), Default::default()));
            let plan = plan(&temp.staged(), Written::Arrow, &attrs(), Limits::default()).unwrap();
            assert_eq!((plan.outcome, &plan.warnings), (Outcome::Table, &Vec::new()), "{name}");
            // The largest bitmap is that of 32,768 rows, of an element and of one around it.
            assert!(plan.size() <= temp.staged().bytes.len() as u64 + 2 * 4096, "{name}: {}", plan.size());
            let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
            let meta = meta_of(&store, published.id);
            assert_eq!(bytes_back(&store, &meta), temp.staged().bytes, "{name}");
            same_table(&store, &meta, &[batch]);
            store.delete(&[published.id]).unwrap();
        }
    }
}

/// Joining batches makes a bitmap for all elements as soon as one of them is null.
#[test]
fn batches_of_elements_of_no_bytes_are_not_joined() {
    let batch = |len: usize, nulls| {
        let values = FixedSizeBinaryArray::try_new_with_len(0, Vec::<u8>::new().into(), nulls, len).unwrap();
        let field = Arc::new(ArrowField::new("x", DataType::FixedSizeBinary(0), true));
        let list = LargeListArray::new(field, arrow_buffer::OffsetBuffer::from_lengths([len]), Arc::new(values), None);
        RecordBatch::try_from_iter([("x", Arc::new(list) as ArrayRef)]).unwrap()
    };
    let mut batches = vec![batch(1 << 50, None); 5];
    batches.push(batch(2, Some(vec![true, false].into())));
    let store = FakeStore::new(1 << 20);
    let temp = Temp::new(arrow_bytes(&batches, Default::default()));
    let plan = plan(&temp.staged(), Written::Arrow, &attrs(), Limits::default()).unwrap();
    let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
    let meta = meta_of(&store, published.id);
    assert_eq!((published.outcome, meta.unsigned("partitions_-size").unwrap()), (Outcome::Table, 6));
    assert_eq!(bytes_back(&store, &meta), temp.staged().bytes);
}

#[test]
fn deep_nesting_is_a_plain_file() {
    use arrow_array::{ArrayRef, Int32Array, ListArray};
    let store = FakeStore::new(32 << 20);
    for (depth, expected) in [(20, Outcome::Table), (200, Outcome::File)] {
        let mut array: ArrayRef = std::sync::Arc::new(Int32Array::from(vec![1]));
        for _ in 0..depth {
            let field = arrow_schema::Field::new_list_field(array.data_type().clone(), true);
            let offsets = arrow_buffer::OffsetBuffer::from_lengths([1]);
            array = std::sync::Arc::new(ListArray::new(std::sync::Arc::new(field), offsets, array, None));
        }
        let batch = arrow_array::RecordBatch::try_from_iter([("deep", array)]).unwrap();
        let bytes = arrow_bytes(&[batch], Default::default());
        assert_eq!(survive(&store, &Temp::new(bytes), Written::Arrow), Some(expected), "{depth}");
    }
}

/// Structs of Thrift's compact protocol.
#[derive(Default)]
struct Thrift {
    bytes: Vec<u8>,
    last: u8,
}

impl Thrift {
    fn varint(mut n: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while n >= 0x80 {
            bytes.push(n as u8 | 0x80);
            n >>= 7;
        }
        bytes.push(n as u8);
        bytes
    }
    fn field(mut self, number: u8, kind: u8, value: &[u8]) -> Self {
        self.bytes.push((number - self.last) << 4 | kind);
        self.bytes.extend(value);
        Thrift { last: number, ..self }
    }
    fn int(self, number: u8, kind: u8, value: i64) -> Self {
        self.field(number, kind, &Self::varint((value << 1 ^ value >> 63) as u64))
    }
    fn text(self, number: u8, value: &str) -> Self {
        let bytes = [Self::varint(value.len() as u64), value.as_bytes().to_vec()].concat();
        self.field(number, 8, &bytes)
    }
    fn list(self, number: u8, kind: u8, values: &[Vec<u8>]) -> Self {
        let head = [vec![0xf0 | kind], Self::varint(values.len() as u64)].concat();
        self.field(number, 9, &[head, values.concat()].concat())
    }
    fn end(mut self) -> Vec<u8> {
        self.bytes.push(0);
        self.bytes
    }
}

/// A Parquet file with this body and footer.
fn parquet_of(body: &[u8], schema: &[Vec<u8>], rows: i64, groups: &[Vec<u8>]) -> Temp {
    let footer = Thrift::default().int(1, 5, 1).list(2, 12, schema).int(3, 6, rows).list(4, 12, groups).end();
    let length = (footer.len() as u32).to_le_bytes();
    Temp::new([b"PAR1", body, &footer, &length, b"PAR1"].concat())
}

fn group(name: &str, children: i64) -> Vec<u8> {
    Thrift::default().int(3, 5, 0).text(4, name).int(5, 5, children).end()
}

fn leaf(name: &str) -> Vec<u8> {
    Thrift::default().int(1, 5, 2).int(3, 5, 0).text(4, name).end()
}

#[test]
fn deep_and_wrong_parquet_schemas_are_plain_files() {
    let store = FakeStore::new(32 << 20);
    for (depth, native) in [(1, true), (30, true), (100, false), (1500, false), (200_000, false)] {
        let mut schema = vec![group("g", 1); depth];
        schema.push(leaf("x"));
        let outcome = survive(&store, &parquet_of(b"", &schema, 0, &[]), Written::Parquet);
        assert_eq!(outcome, Some(if native { Outcome::Table } else { Outcome::File }), "{depth}");
    }
    for children in [2, i32::MAX.into(), -1] {
        let schema = [group("g", children), leaf("x")];
        let outcome = survive(&store, &parquet_of(b"", &schema, 0, &[]), Written::Parquet);
        assert_eq!(outcome, Some(Outcome::File), "{children}");
    }
}

#[test]
fn parquet_pages_that_claim_much_are_not_believed() {
    let store = FakeStore::new(32 << 20);
    // A page of one int64; snappy has its length and a literal.
    let data = [&[8, 7 << 2, 1], &[0; 7][..]].concat();
    for (page_says, column_says, values, native) in [
        (8, 100, 1, true),
        (i32::MAX.into(), 100, 1, false),
        (i32::MAX.into(), i32::MAX.into(), 1, false),
        (8, 100, 1 << 30, false),
        (-1, 100, 1, false),
    ] {
        let header = Thrift::default().int(1, 5, values).int(2, 5, 0).int(3, 5, 3).int(4, 5, 3).end();
        let page = Thrift::default().int(1, 5, 0).int(2, 5, page_says).int(3, 5, data.len() as i64);
        let page = [page.field(5, 12, &header).end(), data.clone()].concat();
        let size = page.len() as i64;
        let column = Thrift::default().int(1, 5, 2).list(2, 5, &[vec![0], vec![6]]).list(3, 8, &[b"\x01x".to_vec()]);
        let column = column.int(4, 5, 1).int(5, 6, 1).int(6, 6, column_says).int(7, 6, size).int(9, 6, 4).end();
        let chunk = Thrift::default().int(2, 6, 4).field(3, 12, &column).end();
        let rows = Thrift::default().list(1, 12, &[chunk]).int(2, 6, 100).int(3, 6, 1).end();
        let file = parquet_of(&page, &[group("g", 1), leaf("x")], 1, &[rows]);
        let expected = if native { Outcome::Table } else { Outcome::File };
        assert_eq!(survive(&store, &file, Written::Parquet), Some(expected), "{page_says} {column_says} {values}");
    }
}
