//! Dictionary columns in several batches: what is stored once, and what comes back.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arrow_array::types::*;
use arrow_array::*;
use arrow_schema::{DataType, Field as ArrowField};

use super::tests::*;
use super::*;
use crate::dataset;
use crate::dataset::recipe::recipe_of;
use crate::vineyard::fake::FakeStore;
use crate::vineyard::{Meta, ObjectId, Store};

/// Stores a file and checks that it comes back, byte for byte and as the same table.
fn comes_back(bytes: Vec<u8>, view: Written, batches: &[RecordBatch]) -> (FakeStore, Meta) {
    let store = FakeStore::new(256 << 20);
    let temp = Temp::new(bytes);
    let plan = plan(&temp.staged(), view, &attrs(), Limits::default()).unwrap();
    let published = publish(&store, &|_| "x".into(), &plan, &temp.staged(), None).unwrap();
    assert_eq!((published.warnings, published.outcome), (Vec::<String>::new(), Outcome::Table));
    let meta = meta_of(&store, published.id);
    assert!(bytes_back(&store, &meta) == temp.staged().bytes);
    same_table(&store, &meta, batches);
    (store, meta)
}

fn batch_of(keys: Vec<Option<i8>>, values: ArrayRef) -> RecordBatch {
    let column = DictionaryArray::<Int8Type>::try_new(Int8Array::from(keys), values).unwrap();
    RecordBatch::try_from_iter([("d", Arc::new(column) as ArrayRef)]).unwrap()
}

/// Values that nest: structs, lists, lists of a dictionary.
fn nested_values() -> Vec<ArrayRef> {
    let number: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "bb", "ü"]));
    let structs = StructArray::from(vec![
        (Arc::new(ArrowField::new("n", DataType::Int64, true)), number.clone()),
        (Arc::new(ArrowField::new("t", DataType::Utf8, true)), text),
    ]);
    let list = |values: ArrayRef| -> ArrayRef {
        let field = Arc::new(ArrowField::new_list_field(values.data_type().clone(), true));
        Arc::new(ListArray::new(field, arrow_buffer::OffsetBuffer::from_lengths([1, 0, 2]), values, None))
    };
    let inner: DictionaryArray<Int16Type> = ["p", "q", "p"].into_iter().collect();
    vec![Arc::new(structs), list(number), list(Arc::new(inner))]
}

#[test]
fn dictionaries_of_nested_values_in_several_batches() {
    for values in nested_values() {
        let batches = [
            batch_of(vec![Some(0), Some(2), None], values.clone()),
            batch_of(vec![Some(1)], values.clone()),
            batch_of(vec![None, Some(2)], values.clone()),
        ];
        for codec in [None, Some(arrow_ipc::CompressionType::ZSTD)] {
            let options = arrow_ipc::writer::IpcWriteOptions::default().try_with_compression(codec).unwrap();
            comes_back(arrow_bytes(&batches, options), Written::Arrow, &batches);
        }
        let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        comes_back(writer.into_inner().unwrap(), Written::Arrow, &batches);
    }
}

/// The first batch of a stream may need no dictionary, and come before it.
#[test]
fn a_batch_of_nulls_takes_the_dictionary_of_the_others() {
    for values in nested_values() {
        let empty = batch_of(vec![None, None], values.slice(0, 0));
        let full = batch_of(vec![Some(1), None, Some(2)], values.clone());
        let parts = [column_of(&empty), column_of(&full), column_of(&empty)];
        let mut layouts: Vec<_> = parts.to_vec();
        let mut columns: Vec<_> = layouts.iter_mut().collect();
        dataset::materialize::unify_dictionaries(&mut columns, &FakeStore::new(0)).unwrap();
        for (layout, batch) in layouts.iter().zip([&empty, &full, &empty]) {
            let array = dataset::materialize(layout, &FakeStore::new(0)).unwrap();
            assert_eq!(layout.dictionary.as_ref().unwrap().len, values.len() as u64);
            assert_eq!(array.nulls(), batch.column(0).nulls());
        }
        assert_eq!(&*dataset::materialize::materialize(&layouts[1], &FakeStore::new(0)).unwrap(), full.column(0));
    }
}

fn column_of(batch: &RecordBatch) -> dataset::ArrayLayout {
    dataset::literal(&batch.column(0).to_data()).unwrap()
}

/// However large it is: nothing of it is read to see that it is one.
#[test]
fn a_dictionary_that_all_batches_name_is_not_read() {
    use crate::vineyard::{BlobKey, InstanceId};
    let huge = |id: u64| dataset::Span::Blob {
        key: BlobKey { instance: InstanceId(1), id: ObjectId(1 << 63 | id) },
        offset: 0,
        len: 1 << 40,
    };
    let values = |id| {
        let buffers = vec![dataset::Span::EMPTY, huge(id), huge(id + 1)];
        Arc::new(dataset::ArrayLayout::flat(DataType::LargeUtf8, (1 << 37) - 1, Some(0), buffers))
    };
    let column = |id| {
        let data_type = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::LargeUtf8));
        let buffers = vec![dataset::Span::EMPTY, dataset::Span::Zeros(4)];
        dataset::ArrayLayout {
            dictionary: Some(values(id)),
            ..dataset::ArrayLayout::flat(data_type, 1, Some(0), buffers)
        }
    };
    let unify = |ids: &[u64]| {
        let mut layouts: Vec<_> = ids.iter().map(|id| column(*id)).collect();
        let mut columns: Vec<_> = layouts.iter_mut().collect();
        let unified = dataset::materialize::unify_dictionaries(&mut columns, &crate::dataset::testing::Nothing);
        unified.map(|()| {
            layouts
                .windows(2)
                .all(|pair| Arc::ptr_eq(pair[0].dictionary.as_ref().unwrap(), pair[1].dictionary.as_ref().unwrap()))
        })
    };
    assert!(unify(&[7, 7, 7]).unwrap());
    assert_eq!(unify(&[7, 7, 9]).unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn a_parquet_file_keeps_each_dictionary_once() {
    let words: ArrayRef = Arc::new(StringArray::from_iter_values((0..200).map(|i| format!("word {i:05}"))));
    let keys = |step: i32| Int32Array::from_iter_values((0..50_000).map(|i| i * step % 200));
    let column = |step| Arc::new(DictionaryArray::try_new(keys(step), words.clone()).unwrap()) as ArrayRef;
    let batch = RecordBatch::try_from_iter([("a", column(1)), ("b", column(7))]).unwrap();
    let properties = parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(10_000));
    let bytes = parquet_bytes(&batch, properties.build());
    let (store, meta) = comes_back(bytes, Written::Parquet, std::slice::from_ref(&batch));
    let partitions = meta.list("partitions_").unwrap();
    assert!(partitions.len() >= 5);
    for column in ["__columns_-0", "__columns_-1"] {
        let ids: std::collections::HashSet<ObjectId> =
            partitions.iter().map(|p| p.member(column).unwrap().member("dictionary_").unwrap().id()).collect();
        assert_eq!(ids.len(), 1, "{column}");
    }
    store.delete(&[meta.id()]).unwrap();
    assert_eq!((store.blob_count(), store.object_count()), (0, 0));
}

/// What cannot be read again is stored as it is, before the former version goes.
#[test]
fn an_object_that_cannot_be_read_is_none() {
    let batch = batch_of(vec![Some(0), None], nested_values().remove(0));
    let bytes = arrow_bytes(std::slice::from_ref(&batch), Default::default());
    let temp = Temp::new(bytes);
    for store in [FakeStore::new(1 << 20), FakeStore::new(1 << 20).alone()] {
        let good = plan(&temp.staged(), Written::Arrow, &attrs(), Limits::default()).unwrap();
        let name = |outcome: Outcome| format!("x{}", if outcome == Outcome::File { ".arrow" } else { "" });
        let old = publish(&store, &name, &good, &temp.staged(), None).unwrap();
        let mut bad = good.clone();
        let root = bad.objects.last_mut().unwrap();
        let schema = root.fields.iter_mut().find(|(key, _)| key == crate::dataset::native::TRUE_SCHEMA).unwrap();
        schema.1 = "{\"bytes\": [1]}".into();
        let published = publish(&store, &name, &bad, &temp.staged(), Some(old.id)).unwrap();
        assert_eq!(published.outcome, Outcome::File);
        assert!(published.warnings[0].contains("could not be read again"), "{:?}", published.warnings);
        let dataset = dataset::decode(&meta_of(&store, published.id), &store).unwrap();
        let dataset::Dataset::File(span) = dataset else { panic!("{dataset:?}") };
        assert!(span.to_vec(&store).unwrap() == temp.staged().bytes);
        assert!(recipe_of(&meta_of(&store, published.id)).unwrap().is_none());
        store.delete(&[published.id]).unwrap();
        assert_eq!((store.blob_count(), store.object_count()), (0, 0));
    }
}
